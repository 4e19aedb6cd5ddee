"""Run the model of the run whose routing a router replays."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from moe.checks import ConfigError, first_line, require
from moe.config.checkpoints import files, replayed
from moe.files import require_files
from moe.fused import uncompiled
from moe.model.architecture import MoEConfig
from moe.model.layer import MoELayer
from moe.model.routed import build_router
from moe.routing.decision import Context, Routing


def replays(layers: list[MoELayer]) -> tuple[str, str | None] | None:
    """Return the run whose model decides for some of these layers, and its checksum; None if there is none."""
    return next((layer.router.replays for layer in layers if layer.router.replays is not None), None)


def experts_per_token(run: str, layer: int, *, seq_len: int) -> float | None:
    """Return how many experts the model of a run takes for a token in a decoder layer, see `Router.experts_per_token`.

    None if the files do not say it: a saved model that replays can be read without the run, but does not run.
    """
    try:
        config = MoEConfig.from_dict(files.content(replayed.KEY, replayed.model_of(run), None))
        with torch.device("meta"):
            return build_router(config, layer, trusted=False).experts_per_token(seq_len)
    except ConfigError:
        return None


@lru_cache(maxsize=2)
def _loaded(run: str, digest: str | None, device: torch.device) -> Any:
    """Return the model of a run, which is read once. It is no part of the model that replays it: no run saves it."""
    replayed.digest_of(run, digest)
    folder = replayed.model_of(run)
    try:
        require_files(Path(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:  # whatever a wrong file makes a library raise
        raise ConfigError(f"{replayed.KEY}={folder}: cannot be read as a saved model ({first_line(error)})") from error
    model.requires_grad_(False).eval().to(device)
    again = replays(model.moe_layers) is not None
    require(not again, replayed.KEY, run, "a run whose model decides by itself")
    return model


@uncompiled
@torch.no_grad()
def decisions(layers: list[MoELayer], context: Context, mask: Tensor | None) -> list[Routing] | None:
    """Return how the model that these layers replay routes the tokens, for each MoE layer; None if they replay none.

    mask: the attention mask of the call, or None.
    """
    found = replays(layers)
    if found is None:
        return None
    ids = context.ids
    model = _loaded(*found, ids.device)
    with torch.autocast(ids.device.type, enabled=False):
        output: Any = model(ids, attention_mask=mask)
    allowed = f"a run whose model has {len(layers)} MoE layers"
    require(len(output.routing) == len(layers), replayed.KEY, found[0], allowed)
    return [chain[0] for chain in output.routing]


def check_tokenizer(layers: list[MoELayer], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError unless the model that these layers replay, if any, reads text with the same tokenizer."""
    from tokenizers import Tokenizer

    if (found := replays(layers)) is None:
        return
    try:
        known = Tokenizer.from_file(str(Path(replayed.model_of(found[0])) / "tokenizer.json")).get_vocab()
    except Exception as error:  # the library raises no other class
        raise ConfigError(f"{replayed.KEY}={found[0]}: tokenizer.json cannot be read ({first_line(error)})") from error
    require(known == tokenizer.get_vocab(), replayed.KEY, found[0], "a run with the tokenizer of this run")
