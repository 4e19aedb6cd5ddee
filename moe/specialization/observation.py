"""Run a model over validation blocks and return the experts that it chooses and the tokens that it predicts.

All statistics of the specialization study start from these arrays.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe.checks import require
from moe.data.blocks import Batch, Prepared, batch, evenly_spaced
from moe.data.labels import IGNORED, next_token
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Knobs, Routing

BLOCKS_PER_PASS = 8  # Blocks in one forward pass. A router that is not causal sees them together.


class Observation(NamedTuple):
    """Choices and predictions of a model on B blocks of S tokens (N = B * S tokens). Each block is of one domain.

    chosen: for each of the L layers, which of its E experts a token asked for, in any iteration of a chain. Layers can
        have different numbers of experts.
    weight: for each layer, the gate weight of each token and expert; 0 if the expert was not chosen.
    predicted: the most likely next token.
    nats: cross-entropy of the true next token. NaN where the next token has no label: at the end of a block, and in
        conversations before every token that the assistant does not say.
    blocks: the input of the model.
    """

    ids: Int[np.ndarray, "B S"]
    domain: Int[np.ndarray, " B"]
    chosen: list[Bool[np.ndarray, "N E"]]
    weight: list[Float[np.ndarray, "N E"]]
    predicted: Int[np.ndarray, "B S"]
    nats: Float[np.ndarray, "B S"]
    blocks: Batch


def validation_blocks(data: Prepared, count: int) -> Batch:
    """Return `count` evenly spaced validation blocks, or all if there are fewer."""
    return batch(data.val, evenly_spaced(len(data.val), count))


def text_blocks(model: Any, tokenizer: Any, text: str) -> list[Batch]:
    """Return a text as batches of one block. A text that is longer than the model reads at once is cut into parts.

    Raises ConfigError for what is no model of this project, for text without a token, and for another model's tokens.
    """
    allowed = "a model of this project, such as load_run(folder).model()"
    require(isinstance(model, MoEForCausalLM), "model", type(model).__name__, allowed)
    allowed = "the tokenizer of the model, such as load_run(folder).tokenizer()"
    require(isinstance(tokenizer, PreTrainedTokenizerBase), "tokenizer", type(tokenizer).__name__, allowed)
    valid = isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)
    require(valid, "text", text, "text without halves of surrogate pairs")
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"]], dtype=torch.long)
    require(ids.numel() > 0, "text", text, "text with at least one token")
    known, largest = model.config.vocab_size, int(ids.max())
    require(largest < known, "tokenizer", f"token {largest}", f"the tokenizer of this model, with {known} tokens")
    parts = ids.split(model.config.max_position_embeddings, dim=1)
    return [Batch(part, torch.zeros(1, dtype=torch.long), part, None) for part in parts]


def documents_of_blocks(data: Prepared, count: int) -> Int[np.ndarray, " B"]:
    """Return the document in which each of the `validation_blocks` begins."""
    return np.asarray(data.val[evenly_spaced(len(data.val), count)]["document"])


def reason_not_studied(model: MoEForCausalLM, blocks: Batch) -> str | None:
    """Return why this model's routing cannot be studied, or None if it can: experts must work on single tokens."""
    if not model.moe_layers:
        return "a dense model: there is no routing"
    with torch.no_grad():
        routing = model(**blocks.take(slice(1)).to(model.device).inputs).routing
    if any(decision.slots is not None for layer in routing for decision in layer):
        return "experts work on mixtures of tokens: no token has experts of its own"
    return None


@torch.no_grad()
def observe(model: MoEForCausalLM, blocks: Batch, knobs: Knobs) -> Observation:
    """Run the blocks through a model in evaluation mode. Raises ValueError if `reason_not_studied` gives a reason."""
    if reason := reason_not_studied(model, blocks):
        raise ValueError(reason)
    parts = []
    for part in blocks.to(model.device).split(BLOCKS_PER_PASS):
        output = model(**part.inputs, knobs=knobs)
        layers = [
            _choices(decisions, tokens=part.ids.numel(), experts=experts)
            for decisions, experts in zip(output.routing, experts_of_layers(model), strict=True)
        ]
        parts.append((*zip(*layers, strict=True), output.logits.argmax(-1), _nats(output.logits, part.labels)))
    masks, gates, tokens, nats = zip(*parts, strict=True)
    chosen, weight = ([_joined(of_layer) for of_layer in zip(*each, strict=True)] for each in (masks, gates))
    ids, domain = blocks.ids.cpu().numpy(), blocks.domain.cpu().numpy()
    return Observation(ids, domain, chosen, weight, _joined(tokens), _joined(nats), blocks)


def experts_of_layers(model: MoEForCausalLM) -> list[int]:
    """Return the number of experts of each MoE layer."""
    return [layer.router.num_experts for layer in model.moe_layers]


def _joined(parts: Sequence[Tensor]) -> Any:
    """Return the array of all parts of the blocks, on the CPU."""
    return torch.cat(tuple(parts)).cpu().numpy()


@torch.no_grad()
def next_token_nats(model: MoEForCausalLM, blocks: Batch, knobs: Knobs) -> Float[Tensor, "B S"]:
    """Return the cross-entropy of each next token; NaN where it has no label."""
    parts = blocks.to(model.device).split(BLOCKS_PER_PASS)
    return torch.cat([_nats(model(**part.inputs, knobs=knobs).logits, part.labels) for part in parts])


def _nats(logits: Float[Tensor, "B S V"], labels: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    targets = next_token(labels)
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return nats.view_as(targets).masked_fill(targets == IGNORED, math.nan)


def _choices(
    decisions: tuple[Routing, ...], *, tokens: int, experts: int
) -> tuple[Bool[Tensor, "N E"], Float[Tensor, "N E"]]:
    """Return which experts each token chose in one layer, and with which gate weights."""
    chosen = torch.zeros(tokens, experts, dtype=torch.bool, device=decisions[0].token.device)
    weight = torch.zeros(tokens, experts, device=chosen.device)
    for decision in decisions:
        chosen[decision.token, decision.expert] = True
        weight.index_put_((decision.token, decision.expert), decision.weight, accumulate=True)
    return chosen, weight
