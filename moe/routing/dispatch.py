"""The dispatcher: which assignments fit into the capacity, and the way of tokens to experts and back.

The router decides which experts a token asks for. This module decides which of these assignments are carried out.
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
    """The assignments that are carried out, sorted by expert.

    token, weight: (R) token index and gate weight. The assignments of expert 0 come first.
    offered, kept: (E) assignments per expert before and after capacity.
    by_token: (R) indices that sort these assignments by token.
    """

    token: Int[Tensor, "R"]
    weight: Float[Tensor, "R"]
    offered: Int[Tensor, "E"]
    kept: Int[Tensor, "E"]
    by_token: Int[Tensor, "R"]


def capacity_per_expert(assignments: int, num_experts: int, capacity: float) -> int:
    """Return the capacity of one expert in assignments: ceil(capacity * A / E), at least 1 (GShard 2006.16668)."""
    return max(1, math.ceil(capacity * assignments / num_experts))


def order_by_position(routing: Routing, seq_len: int) -> Int[Tensor, "A"]:
    """Sort assignments by position in the sequence, earliest first, and those at the same position by sequence.

    Whether a token is dropped then never depends on later tokens of its own sequence. No sequence has an advantage
    because it comes first in the batch. If a sequence contains several documents, the first one has an advantage.
    """
    return torch.argsort(routing.token % seq_len, stable=True)


def order_by_score(routing: Routing, seq_len: int) -> Int[Tensor, "A"]:
    """Sort assignments by gate weight, largest first (as in GShard).

    Not causal, because a later token can displace an earlier one.
    """
    return torch.argsort(routing.weight.detach(), descending=True, stable=True)


def order_at_random(routing: Routing, seq_len: int) -> Int[Tensor, "A"]:
    """Shuffle assignments.

    Not causal, because the chance of a token depends on how many later tokens compete with it.
    """
    return torch.randperm(len(routing.token), device=routing.token.device)


# The order in which an expert accepts assignments until it is full. Only the first keeps a causal router causal.
DROP_POLICIES: dict[str, Callable[[Routing, int], Int[Tensor, "A"]]] = {
    "position": order_by_position,
    "score": order_by_score,
    "random": order_at_random,
}


def dispatch(
    routing: Routing, num_experts: int, *, capacity: float | None, seq_len: int, drop: str = "position"
) -> Dispatch:
    """Return the assignments that are carried out, sorted by expert.

    capacity: the capacity factor. Each expert keeps assignments up to `capacity_per_expert`, in the order of the policy
        `drop`. The number of assignments that fit is read back from the device. None: all assignments are kept, and
        those of one expert stay in token order.
    """
    token, expert, weight = routing.token, routing.expert, routing.weight
    offered = count(expert, num_experts)
    if capacity is None:
        order = torch.argsort(expert, stable=True)
        token = token[order]
        return Dispatch(token, weight[order], offered, offered, torch.argsort(token, stable=True))
    queue = DROP_POLICIES[drop](routing, seq_len)
    order = queue[torch.argsort(expert[queue], stable=True)]
    rank = torch.arange(len(order), device=order.device) - (offered.cumsum(0) - offered)[expert[order]]
    limit = capacity_per_expert(len(expert), num_experts, capacity)
    order = order[rank < limit]
    token, weight = token[order], weight[order]
    if routing.renormalize:
        weight = weight / weight.new_zeros(len(expert)).index_add(0, token, weight)[token]
    return Dispatch(token, weight, offered, offered.clamp(max=limit), torch.argsort(token, stable=True))


def gather(x: Float[Tensor, "T D"], dispatched: Dispatch) -> Float[Tensor, "R D"]:
    """Return the hidden state of its token for each assignment."""
    return _Gather.apply(x, dispatched.token, dispatched.by_token)


def combine(outputs: Float[Tensor, "R D"], dispatched: Dispatch, tokens: int) -> Float[Tensor, "T D"]:
    """Return the weighted sum of the expert outputs of each of `tokens` tokens.

    A token without experts gets zeros; the residual connection passes it on.
    """
    weight = dispatched.weight.to(outputs.dtype)
    return _Combine.apply(outputs, weight, dispatched.token, dispatched.by_token, tokens)


# Each of these two functions computes the gradient of the other. They are written by hand because a sum over known rows
# needs neither a copy of the weighted rows nor the atomic additions of `index_add`. On CUDA the order of atomic
# additions differs between runs, and so do the results.


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
    """Return the sum of the rows of each token (T, D), added in the order of the experts."""
    counts = count(token, tokens)
    weights = None if weight is None else weight[by_token]
    starts = counts.cumsum(0) - counts
    return F.embedding_bag(by_token, rows.contiguous(), starts, mode="sum", per_sample_weights=weights)
