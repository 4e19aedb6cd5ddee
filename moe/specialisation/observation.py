"""What a model decides and predicts on validation blocks, as arrays; everything that is counted starts from here."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.data import Prepared, batch
from moe.model import MoEForCausalLM, next_token
from moe.routing import Knobs, Routing

BATCH = 8  # blocks a forward pass; routers that are not causal see these together


class Observation(NamedTuple):
    """B blocks of S tokens, N = B*S tokens one after another, each block of one domain.

    chosen: who was asked for, in any iteration of a chain. weight: with what gate weight, 0 elsewhere.
    predicted: the likeliest next token. nats: cross-entropy of the true next token, NaN at the end of a block.
    """

    ids: Int[np.ndarray, "B S"]
    domain: Int[np.ndarray, "B"]
    chosen: Bool[np.ndarray, "L N E"]
    weight: Float[np.ndarray, "L N E"]
    predicted: Int[np.ndarray, "B S"]
    nats: Float[np.ndarray, "B S"]


def blocks(data: Prepared, count: int) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B"]]:
    """Token ids and domains of `count` evenly spaced validation blocks, or of all: domains keep their shares."""
    count = min(count, len(data.val))
    return batch(data.val, [index * len(data.val) // count for index in range(count)])


def refusal(model: MoEForCausalLM, ids: Int[Tensor, "B S"]) -> str | None:
    """Why experts of this model have no tokens of their own to be studied by; None if they do."""
    if not model.moe_layers:
        return "a dense model: there is no routing"
    with torch.no_grad():
        routing = model(ids[:1].to(model.device)).routing
    if any(decision.slots is not None for layer in routing for decision in layer):
        return "experts work on mixtures of tokens: no token has experts of its own"
    return None


@torch.no_grad()
def observe(model: MoEForCausalLM, ids: Int[Tensor, "B S"], domain: Int[Tensor, "B"], knobs: Knobs) -> Observation:
    """Run the blocks through a model in evaluation mode; ValueError where `refusal` has a reason."""
    if reason := refusal(model, ids):
        raise ValueError(reason)
    experts = model.config.num_experts
    parts = []
    for block in ids.to(model.device).split(BATCH):
        output = model(block, knobs=knobs)
        layers = [_weights(layer, tokens=block.numel(), experts=experts) for layer in output.routing]
        chosen, weight = (torch.stack(tensors) for tensors in zip(*layers, strict=True))
        parts.append((chosen, weight, output.logits.argmax(-1), _nats(output.logits, block)))
    masks, gates, tokens, nats = zip(*parts, strict=True)
    tensors = (ids, domain, torch.cat(masks, 1), torch.cat(gates, 1), torch.cat(tokens), torch.cat(nats))
    return Observation(*(tensor.cpu().numpy() for tensor in tensors))


@torch.no_grad()
def next_token_nats(model: MoEForCausalLM, ids: Int[Tensor, "B S"], knobs: Knobs) -> Float[Tensor, "B S"]:
    """Cross-entropy of each next token; NaN at the end of a block."""
    return torch.cat([_nats(model(block, knobs=knobs).logits, block) for block in ids.to(model.device).split(BATCH)])


def _nats(logits: Float[Tensor, "B S V"], ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    nats = F.cross_entropy(logits.float().flatten(0, 1), next_token(ids).flatten(), reduction="none").view_as(ids)
    nats[:, -1] = math.nan
    return nats


def _weights(
    decisions: tuple[Routing, ...], *, tokens: int, experts: int
) -> tuple[Bool[Tensor, "N E"], Float[Tensor, "N E"]]:
    chosen = torch.zeros(tokens, experts, dtype=torch.bool, device=decisions[0].token.device)
    weight = torch.zeros(tokens, experts, device=chosen.device)
    for decision in decisions:
        chosen[decision.token, decision.expert] = True
        weight.index_put_((decision.token, decision.expert), decision.weight, accumulate=True)
    return chosen, weight
