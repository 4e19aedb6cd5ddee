"""The finished run whose routing `moe.routers.replay.Replay` takes: whether its model fits. The check imports torch."""

from pathlib import Path
from typing import Any

from moe.checks import require
from moe.config.checkpoints import files, saved
from moe.config.classes import build
from moe.config.model import ModelConfig

KEY = "router.run"


def model_of(run: str) -> str:
    """Return the folder of the model that a run saved at its end. Raises ConfigError if it is missing."""
    folder = Path(run, "model")
    require(folder.is_dir(), KEY, run, "the folder of a finished run that has a saved model: the folder model in it")
    return str(folder)


def digest_of(run: str, given: str | None) -> str:
    """Return the checksum of the model of a run. Raises ConfigError if it differs from the one that is given."""
    name = model_of(run)
    found = files.digest(name, key=KEY)
    require(given in (None, found), "router.digest", given, f"{found}, the checksum of {name}, or left out")
    return found


def check(run: str, model: ModelConfig, *, seq_len: int) -> None:
    """Raise ConfigError unless the model of `run` can decide for the layers of `model`. It may be a stranger's."""
    name = model_of(run)
    content = files.content(KEY, name, None)
    where = f"in config.json of {KEY}={name}"
    sizes = {
        "model_type": saved.KIND,
        "imported": None,
        "adapter": None,
        "num_hidden_layers": model.layers,
        "first_k_dense_replace": model.first_k_dense_replace,
        "num_experts": model.num_experts,
        "experts_by_layer": model.experts_by_layer,
    }
    for key, value in sizes.items():
        require(content.get(key) == value, f"{key} {where}", content.get(key), f"{value}, as in this run")
    for key in ("hidden_size", "max_position_embeddings"):
        value = content.get(key)
        require(type(value) is int and 1 <= value <= 10**6, f"{key} {where}", value, "a whole number from 1 to 10^6")
    longest = content["max_position_embeddings"]
    require(seq_len <= longest, "data.seq_len", seq_len, f"at most {longest}, the number of positions of {name}")
    for router in _routers(content, model):
        alone = router.causal and not router.told and len(router.chain) == 1 and router.replays is None
        allowed = "a causal router that decides once in a layer, adds no output, and knows no domains"
        kind = f"{type(router).__module__}.{type(router).__qualname__}"
        fits = alone and not router.adds_output and not router.learns_from_outputs
        require(fits, f"router._target_ {where}", kind, allowed)


def _routers(content: dict[str, Any], model: ModelConfig) -> list[Any]:
    """Return a router of each kind in the layers of `content`, without memory for its parameters.

    model: has as many experts in each layer as `content`.
    """
    import torch

    of_layers = content.get("router_layers") or {}
    kinds = [(of_layers.get(str(layer), content.get("router")), model.experts_of(layer)) for layer in model.moe_layers]
    with torch.device("meta"):
        return [
            build(spec, "router", content["hidden_size"], experts, trusted=False)
            for number, (spec, experts) in enumerate(kinds)
            if (spec, experts) not in kinds[:number]
        ]
