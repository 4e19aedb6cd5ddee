"""Dispatch: select the assignments that fit into the capacity, send tokens to experts, and combine the outputs.

The router decides which experts a token asks for. This module decides which of these assignments are carried out.

Letters in shapes: T tokens, E experts, D width of a hidden state, A assignments that the router asks for, R assignments
that are carried out after drops.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe.fused import fused, product_type
from moe.routing.decision import Routing, count


class Dispatch(NamedTuple):
    """The R assignments that are carried out, sorted by expert.

    token, weight: (R) token index and gate weight. The assignments of expert 0 come first.
    offered, kept: (E) assignments per expert before and after capacity. `offered` is the load.
    by_token: (R) indices that sort these assignments by token.
    places: how many assignments all experts together accept. None without a limit.
    each: every token has this many assignments, so that a GPU can add their rows without looking where they begin. None
        otherwise, and on a CPU.
    """

    token: Int[Tensor, " R"]
    weight: Float[Tensor, " R"]
    offered: Int[Tensor, " E"]
    kept: Int[Tensor, " E"]
    by_token: Int[Tensor, " R"]
    places: Int[Tensor, ""] | None = None
    each: int | None = None


def capacity_per_expert(assignments: int, num_experts: int, capacity: float) -> int:
    """Return the capacity of one expert: ceil(capacity * A / E) assignments, at least 1 (GShard 2006.16668).

    assignments: A, the number of assignments in the micro-batch, or in one document. capacity: the capacity factor.
    """
    return max(1, math.ceil(capacity * assignments / num_experts))


def order_by_position(routing: Routing, position: Int[Tensor, " A"]) -> Int[Tensor, " A"]:
    """Sort assignments by the position of their tokens, earliest first.

    Whether a token is dropped then never depends on tokens at later positions. It can depend on tokens of other
    sequences at the same or an earlier position. If two tokens have the same position, the one in the earlier
    sequence comes first, provided that the router lists its assignments token by token. Otherwise the order of the
    sequences in the micro-batch does not matter.
    """
    return torch.argsort(position, stable=True)


def order_by_score(routing: Routing, position: Int[Tensor, " A"]) -> Int[Tensor, " A"]:
    """Sort assignments by gate weight, largest first (as in GShard).

    Not causal, because a later token can displace an earlier one.
    """
    return torch.argsort(routing.weight.detach(), descending=True, stable=True)


def order_at_random(routing: Routing, position: Int[Tensor, " A"]) -> Int[Tensor, " A"]:
    """Shuffle assignments.

    Not causal, because the chance that a token is dropped depends on how many later tokens compete with it.
    """
    return torch.randperm(len(routing.token), device=routing.token.device)


# The order in which an expert accepts assignments until it is full, given the routing and the position of each
# assignment's token in its document. Only `position` keeps a causal router causal: a
# drop then never depends on later tokens. See `Router.is_causal`.
DROP_POLICIES: dict[str, Callable[[Routing, Int[Tensor, " A"]], Int[Tensor, " A"]]] = {
    "position": order_by_position,
    "score": order_by_score,
    "random": order_at_random,
}


def dispatch(
    routing: Routing,
    num_experts: int,
    *,
    capacity: float | None,
    seq_len: int,
    drop: str = "position",
    position: Int[Tensor, " T"] | None = None,
    document: Int[Tensor, " T"] | None = None,
) -> Dispatch:
    """Return the assignments that are carried out, sorted by expert.

    capacity: the capacity factor. Each expert keeps assignments up to `capacity_per_expert`, in the order of the policy
        `drop`. With a limit, this function waits for the device once, to read how many assignments fit. None: all
        assignments are kept, and those of one expert stay in the order in which the router listed them.
    position: position of each token (or slot) in its document, for `drop`. None: t % seq_len.
    document: `Context.document`. If it is given, each document has places of its own: a share of its assignments. So
        documents do not displace each other. If None, all tokens share the places of the micro-batch.

    If `routing.log_weight` is given, the weights that a token keeps after drops sum to 1 again. Without a limit nothing
    is dropped, and weights stay as they are.
    """
    token, expert, weight = routing.token, routing.expert, routing.weight
    offered = count(expert, num_experts)
    if capacity is None and routing.each is not None and expert.is_cuda:
        return _dispatch_each(routing, routing.each, offered)
    if capacity is None:
        order = torch.argsort(expert, stable=True)
        token = token[order]
        return Dispatch(token, weight[order], offered, offered, torch.argsort(token, stable=True))
    queue = DROP_POLICIES[drop](routing, token % seq_len if position is None else position[token])
    if document is None:
        order = queue[torch.argsort(expert[queue], stable=True)]
        place = torch.arange(len(order), device=order.device) - (offered.cumsum(0) - offered)[expert[order]]
        limit = capacity_per_expert(len(expert), num_experts, capacity)
        order, kept, places = order[place < limit], offered.clamp(max=limit), expert.new_full((), num_experts * limit)
    else:
        order, places = _fit_documents(expert, document[token], queue, num_experts, capacity, bound=len(document))
        kept = count(expert[order], num_experts)
    token, weight = token[order], weight[order]
    by_token = torch.argsort(token, stable=True)
    if routing.log_weight is not None:
        weight = _softmax_by_token(routing.log_weight[order], token, by_token)
    return Dispatch(token, weight, offered, kept, by_token, places)


def _dispatch_each(routing: Routing, each: int, offered: Int[Tensor, " E"]) -> Dispatch:
    """Return all assignments sorted by expert, if every token has as many of them.

    A token's assignments stay in the order in which the router listed them, so nothing has to be sorted by token. A GPU
    sorts numbers of 8 bits in a third of the time.
    """
    expert, experts = routing.expert, len(offered)
    order = torch.argsort(expert.to(torch.uint8) if experts <= 256 else expert, stable=True)
    by_token = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    weight = _Gather.apply(routing.weight[:, None], order, by_token, 1, routing.weight.dtype)[:, 0]
    return Dispatch(order // each, weight, offered, offered, by_token, each=each)


def _fit_documents(
    expert: Int[Tensor, " A"],
    document: Int[Tensor, " A"],
    queue: Int[Tensor, " A"],
    num_experts: int,
    capacity: float,
    *,
    bound: int,
) -> tuple[Int[Tensor, " R"], Int[Tensor, ""]]:
    """Return the assignments that fit, sorted by expert, if each document has `capacity_per_expert` of its own.

    expert, document: of each assignment. queue: the order in which experts accept assignments. The second result is the
    number of places in all documents. bound: more than the largest document. Waits for the device.
    """
    asked = count(document, bound)
    limit = (capacity * asked.double() / num_experts).ceil().long()  # as in `capacity_per_expert`; 0 where none asks
    group = expert * len(asked) + document
    order = queue[torch.argsort(group[queue], stable=True)]
    index = torch.arange(len(order), device=order.device)
    first = F.pad(group[order].diff() != 0, (1, 0), value=True)[: len(order)]  # of the same expert and document
    place = index - (index * first).cummax(0).values
    return order[place < limit[document[order]]], num_experts * limit.sum()


def _softmax_by_token(
    scores: Float[Tensor, " R"], token: Int[Tensor, " R"], by_token: Int[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """Return the softmax of the scores over the assignments of each token. It is finite for all scores."""
    sorted_token = token[by_token]
    begins = F.pad(sorted_token[1:] != sorted_token[:-1], (1, 0))[: len(token)]
    number = torch.empty_like(token).index_copy(0, by_token, begins.cumsum(0))  # of the token among those that are left
    highest = scores.detach().new_full((len(token),), -torch.inf).scatter_reduce(0, number, scores.detach(), "amax")
    exponentials = (scores - highest[number]).exp()
    sums = _Combine.apply(exponentials[:, None], torch.ones_like(exponentials), number, by_token, len(token), None)
    return exponentials / _Gather.apply(sums, number, by_token, None, sums.dtype)[:, 0]


def gather(x: Float[Tensor, "T D"], dispatched: Dispatch) -> Float[Tensor, "R D"]:
    """For each assignment, return the hidden state of its token, in the type in which experts compute."""
    return _Gather.apply(x, dispatched.token, dispatched.by_token, dispatched.each, product_type(x))


def combine(outputs: Float[Tensor, "R D"], dispatched: Dispatch, tokens: int) -> Float[Tensor, "T D"]:
    """For each of `tokens` tokens, return the weighted sum of the outputs of its experts.

    A token without experts gets zeros. The residual connection of the layer still carries its hidden state.
    """
    weight = dispatched.weight.to(outputs.dtype)
    return _Combine.apply(outputs, weight, dispatched.token, dispatched.by_token, tokens, dispatched.each)


@torch.no_grad()
def sum_by_expert(rows: Float[Tensor, "R D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "E D"]:
    """Return the sum of the rows of each expert in fp32, for rows sorted by expert. Always adds in the same order."""
    index = torch.arange(len(rows), device=rows.device)
    return F.embedding_bag(index, rows.float(), counts.cumsum(0) - counts, mode="sum")


def sum_by_group(rows: Float[Tensor, "T N"], group: Int[Tensor, " T"]) -> Float[Tensor, "T N"]:
    """Return the sum of the rows of each group, for rows sorted by group. Groups that do not occur get zeros.

    group: numbers from 0 to T - 1. The gradient and the sums have a fixed order, unlike those of `index_add` on CUDA.
    """
    order = torch.arange(len(rows), device=rows.device)
    return _Combine.apply(rows, torch.ones_like(rows[:, 0]), group, order, len(rows), None)


# Gather and combine are each other's backward pass. Both are written by hand, because the gradient that PyTorch would
# use adds floating-point rows with `index_add`. On CUDA that uses atomic additions, whose order differs between runs,
# and so do the results. `_sum` adds the rows of a token in a fixed order and makes no copy of the weighted rows.
# (`count` also uses `index_add`, but on integers, where the order does not matter. It is called in forward passes only,
# because `repeatable_gradients` makes it slow.)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, by_token: Tensor, each: int | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(by_token, None if each else _starts(token, len(x)))
        ctx.each, ctx.dtype = each, x.dtype
        return x.to(dtype).index_select(0, token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_token, starts = ctx.saved_tensors
        return _sum(gradient, by_token, starts, None, ctx.each, ctx.dtype), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, token: Tensor, by_token: Tensor, tokens: int, each: int | None
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, token)
        starts = None if each else _starts(token, tokens)
        return _sum(rows, by_token, starts, weight[by_token], each, rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, token = ctx.saved_tensors
        return *_differentiate(gradient, rows, weight, token, ctx.needs_input_grad[1]), None, None, None, None


@fused(least=2**22)
def _differentiate(
    gradient: Tensor, rows: Tensor, weight: Tensor, token: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the rows and, if they learn, of their weights, given that of the weighted sums."""
    token_gradients = gradient.index_select(0, token)
    weight_gradient = (token_gradients * rows).sum(-1) if learns else None
    return token_gradients.mul_(weight[:, None]), weight_gradient


def _starts(token: Tensor, tokens: int) -> Tensor:
    """For each of `tokens` tokens, return where its rows begin among the rows sorted by token."""
    counts = count(token, tokens)
    return counts.cumsum(0) - counts


def _sum(
    rows: Tensor,
    by_token: Tensor,
    starts: Tensor | None,
    weights: Tensor | None,
    each: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """For each token, return the (weighted) sum of its rows (T, D), in a fixed order.

    starts: as from `_starts`. None if `each` token has as many rows.
    weights: the weight of each row, in the order of `by_token`.
    """
    if each is not None:
        return _sum_each(rows.detach(), by_token, weights, each, dtype)
    return F.embedding_bag(by_token, rows.to(dtype).contiguous(), starts, mode="sum", per_sample_weights=weights)


@fused(least=2**22)
def _sum_each(rows: Tensor, by_token: Tensor, weights: Tensor | None, each: int, dtype: torch.dtype) -> Tensor:
    if each == 1 and weights is None:
        return rows.index_select(0, by_token).to(dtype)
    found = rows.index_select(0, by_token).unflatten(0, (-1, each))
    weighted = found if weights is None else found * weights.view(-1, each, 1)
    return weighted.sum(1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
