"""The dispatcher: which assignments fit, in what order the experts work through them, and how results come back.

Which expert a token wants is the router's business; whether it fits is decided here.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.routing import Routing


class Plan(NamedTuple):
    """Kept assignments, sorted by expert.

    token, weight: (R) token index and gate weight, expert 0's assignments first.
    offered, kept: (E) assignments per expert before and after capacity.
    """

    token: Int[Tensor, "R"]
    weight: Float[Tensor, "R"]
    offered: Int[Tensor, "E"]
    kept: Int[Tensor, "E"]


def slots(assignments: int, num_experts: int, capacity: float) -> int:
    """Assignments that one expert may take: ceil(capacity * A / E), at least 1 (GShard 2006.16668)."""
    return max(1, math.ceil(capacity * assignments / num_experts))


def by_position(routing: Routing, seq_len: int) -> Int[Tensor, "A"]:
    """Earliest position in its sequence first, ties by sequence: whether a token is dropped never depends on later
    tokens of its own sequence, and no sequence is favoured for standing first in the batch."""
    return torch.argsort(routing.token % seq_len, stable=True)


def by_score(routing: Routing, seq_len: int) -> Int[Tensor, "A"]:
    """Largest gate weight first (GShard's priority): not causal, a later token may displace an earlier one."""
    return torch.argsort(routing.weight.detach(), descending=True, stable=True)


def by_chance(routing: Routing, seq_len: int) -> Int[Tensor, "A"]:
    """In random order: not causal, how many later tokens compete decides who stays."""
    return torch.randperm(len(routing.token), device=routing.token.device)


# In which order assignments queue for the slots of their expert; only the first keeps a causal router causal.
DROP_POLICIES: dict[str, Callable[[Routing, int], Int[Tensor, "A"]]] = {
    "position": by_position,
    "score": by_score,
    "random": by_chance,
}


def plan(routing: Routing, num_experts: int, *, capacity: float | None, seq_len: int, drop: str = "position") -> Plan:
    """Sort assignments by expert; with a capacity factor, each expert keeps only the first `slots` of its queue.

    Dropless when `capacity` is None; assignments of an expert then stay in token order.
    """
    token, expert, weight = routing.token, routing.expert, routing.weight
    offered = torch.bincount(expert, minlength=num_experts)
    if capacity is None:
        order = torch.argsort(expert, stable=True)
        return Plan(token[order], weight[order], offered, offered)
    queue = DROP_POLICIES[drop](routing, seq_len)
    order = queue[torch.argsort(expert[queue], stable=True)]
    place = torch.arange(len(order), device=order.device) - (offered.cumsum(0) - offered)[expert[order]]
    limit = slots(len(expert), num_experts, capacity)
    order = order[place < limit]
    token, weight = token[order], weight[order]
    if routing.renormalise:
        weight = weight / weight.new_zeros(len(expert)).index_add(0, token, weight)[token]
    return Plan(token, weight, offered, offered.clamp(max=limit))


def combine(outputs: Float[Tensor, "R D"], plan: Plan, tokens: int) -> Float[Tensor, "T D"]:
    """Weighted sum of each token's expert outputs; a token without any gets zeros (the residual carries it on)."""
    y = outputs.new_zeros(tokens, outputs.shape[-1])
    return y.index_add(0, plan.token, outputs * plan.weight.to(outputs.dtype)[:, None])
