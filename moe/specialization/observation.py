"""What a model decides and predicts on validation blocks, as arrays; everything that is counted starts from here."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.data.blocks import Batch, Prepared, batch
from moe.data.labels import IGNORED, next_token
from moe.model.decoder import MoEForCausalLM
from moe.routing.decision import Knobs, Routing

BATCH = 8  # blocks a forward pass; routers that are not causal see these together


class Observation(NamedTuple):
    """B blocks of S tokens, N = B*S tokens one after another, each block of one domain.

    chosen: who was asked for, in any iteration of a chain. weight: with what gate weight, 0 elsewhere.
    predicted: the likeliest next token. nats: cross-entropy of the true next token, NaN where it has no label: at the
    end of a block, and in conversations before all that no assistant says. blocks: what the model saw.
    """

    ids: Int[np.ndarray, "B S"]
    domain: Int[np.ndarray, "B"]
    chosen: Bool[np.ndarray, "L N E"]
    weight: Float[np.ndarray, "L N E"]
    predicted: Int[np.ndarray, "B S"]
    nats: Float[np.ndarray, "B S"]
    blocks: Batch


def blocks(data: Prepared, count: int) -> Batch:
    """`count` evenly spaced validation blocks, or all: domains keep their shares."""
    return batch(data.val, _places(data, count))


def documents(data: Prepared, count: int) -> Int[np.ndarray, "B"]:
    """The document that each of those `blocks` begins in."""
    return np.asarray(data.val[_places(data, count)]["document"])


def _places(data: Prepared, count: int) -> list[int]:
    count = min(count, len(data.val))
    return [index * len(data.val) // count for index in range(count)]


def refusal(model: MoEForCausalLM, blocks: Batch) -> str | None:
    """Why experts of this model have no tokens of their own to be studied by; None if they do."""
    if not model.moe_layers:
        return "a dense model: there is no routing"
    with torch.no_grad():
        routing = model(blocks.ids[:1].to(model.device)).routing
    if any(decision.slots is not None for layer in routing for decision in layer):
        return "experts work on mixtures of tokens: no token has experts of its own"
    return None


@torch.no_grad()
def observe(model: MoEForCausalLM, blocks: Batch, knobs: Knobs) -> Observation:
    """Run the blocks through a model in evaluation mode; ValueError where `refusal` has a reason."""
    if reason := refusal(model, blocks):
        raise ValueError(reason)
    experts = model.config.num_experts
    parts = []
    for part in blocks.to(model.device).split(BATCH):
        output = model(part.ids, position_ids=part.position_ids, knobs=knobs)
        layers = [_weights(layer, tokens=part.ids.numel(), experts=experts) for layer in output.routing]
        chosen, weight = (torch.stack(tensors) for tensors in zip(*layers, strict=True))
        parts.append((chosen, weight, output.logits.argmax(-1), _nats(output.logits, part.labels)))
    masks, gates, tokens, nats = zip(*parts, strict=True)
    tensors = (blocks.ids, blocks.domain, torch.cat(masks, 1), torch.cat(gates, 1), torch.cat(tokens), torch.cat(nats))
    fields: tuple[Any, ...] = (*(tensor.cpu().numpy() for tensor in tensors), blocks)
    return Observation(*fields)


@torch.no_grad()
def next_token_nats(model: MoEForCausalLM, blocks: Batch, knobs: Knobs) -> Float[Tensor, "B S"]:
    """Cross-entropy of each next token; NaN where it has no label."""
    parts = blocks.to(model.device).split(BATCH)
    return torch.cat([_nats(model(p.ids, position_ids=p.position_ids, knobs=knobs).logits, p.labels) for p in parts])


def _nats(logits: Float[Tensor, "B S V"], labels: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    targets = next_token(labels)
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return nats.view_as(targets).masked_fill(targets == IGNORED, math.nan)


def _weights(
    decisions: tuple[Routing, ...], *, tokens: int, experts: int
) -> tuple[Bool[Tensor, "N E"], Float[Tensor, "N E"]]:
    chosen = torch.zeros(tokens, experts, dtype=torch.bool, device=decisions[0].token.device)
    weight = torch.zeros(tokens, experts, device=chosen.device)
    for decision in decisions:
        chosen[decision.token, decision.expert] = True
        weight.index_put_((decision.token, decision.expert), decision.weight, accumulate=True)
    return chosen, weight
