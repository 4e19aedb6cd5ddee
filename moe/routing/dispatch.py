"""The dispatcher: which assignments fit, in what order the experts work through them, and how results come back.

Which expert a token wants is the router's business; whether it fits is decided here.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe.routing.decision import Routing, count


class Dispatch(NamedTuple):
    """Kept assignments, sorted by expert.

    token, weight: (R) token index and gate weight, expert 0's assignments first.
    offered, kept: (E) assignments per expert before and after capacity.
    by_token: (R) the same assignments in the order of their tokens.
    """

    token: Int[Tensor, "R"]
    weight: Float[Tensor, "R"]
    offered: Int[Tensor, "E"]
    kept: Int[Tensor, "E"]
    by_token: Int[Tensor, "R"]


def capacity_slots(assignments: int, num_experts: int, capacity: float) -> int:
    """Assignments that one expert may take: ceil(capacity * A / E), at least 1 (GShard 2006.16668)."""
    return max(1, math.ceil(capacity * assignments / num_experts))


def by_position(routing: Routing, seq_len: int) -> Int[Tensor, "A"]:
    """Earliest position in its sequence first, ties by sequence: whether a token is dropped never depends on later
    tokens of its own sequence, and no sequence is favored for standing first in the batch. Of several texts in one
    sequence, the first is."""
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


def dispatch(
    routing: Routing, num_experts: int, *, capacity: float | None, seq_len: int, drop: str = "position"
) -> Dispatch:
    """Sort assignments by expert; with a capacity factor, each expert keeps only the first `slots` of its queue.

    Dropless when `capacity` is None; assignments of an expert then stay in token order. With a capacity, the number of
    assignments that fit is read back from the device.
    """
    token, expert, weight = routing.token, routing.expert, routing.weight
    offered = count(expert, num_experts)
    if capacity is None:
        order = torch.argsort(expert, stable=True)
        token = token[order]
        return Dispatch(token, weight[order], offered, offered, torch.argsort(token, stable=True))
    queue = DROP_POLICIES[drop](routing, seq_len)
    order = queue[torch.argsort(expert[queue], stable=True)]
    place = torch.arange(len(order), device=order.device) - (offered.cumsum(0) - offered)[expert[order]]
    limit = capacity_slots(len(expert), num_experts, capacity)
    order = order[place < limit]
    token, weight = token[order], weight[order]
    if routing.renormalize:
        weight = weight / weight.new_zeros(len(expert)).index_add(0, token, weight)[token]
    return Dispatch(token, weight, offered, offered.clamp(max=limit), torch.argsort(token, stable=True))


def gather(x: Float[Tensor, "T D"], plan: Dispatch) -> Float[Tensor, "R D"]:
    """A copy of its token for each assignment."""
    return _Gather.apply(x, plan.token, plan.by_token)


def combine(outputs: Float[Tensor, "R D"], plan: Dispatch, tokens: int) -> Float[Tensor, "T D"]:
    """Weighted sum of each token's expert outputs; a token without any gets zeros (the residual carries it on)."""
    return _Combine.apply(outputs, plan.weight.to(outputs.dtype), plan.token, plan.by_token, tokens)


# Each of the two is the other's gradient. Written out because a sum over rows that are known beforehand needs no copy
# of weighted rows, and no atomic additions, which `index_add` makes on CUDA in an order that differs between runs.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, by_token: Tensor) -> Tensor:
        ctx.save_for_backward(token, by_token)
        ctx.tokens = len(x)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        token, by_token = ctx.saved_tensors
        return _sum(gradient, token, by_token, ctx.tokens), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, token: Tensor, by_token: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(rows, weight, token)
        return _sum(rows, token, by_token, tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, token = ctx.saved_tensors
        copies = gradient.index_select(0, token)
        by_weight = (copies * rows).sum(-1) if ctx.needs_input_grad[1] else None
        return copies.mul_(weight[:, None]), by_weight, None, None, None


def _sum(rows: Tensor, token: Tensor, by_token: Tensor, tokens: int, weight: Tensor | None = None) -> Tensor:
    """(T, D): the rows of each token added up, in the order of their experts."""
    counts = count(token, tokens)
    weights = None if weight is None else weight[by_token]
    starts = counts.cumsum(0) - counts
    return F.embedding_bag(by_token, rows.contiguous(), starts, mode="sum", per_sample_weights=weights)
