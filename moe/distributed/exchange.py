"""Experts that live on several ranks: rows travel to the rank that has their expert, and back."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

Apply = Callable[[Tensor, Tensor], Tensor]  # rows sorted by expert, and how many each has -> rows


def traveling(rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"], apply: Apply) -> Float[Tensor, "R D"]:
    """What `apply` would give for rows sorted by expert, `counts` of them for each, if it had all E experts.

    Each of N ranks has E/N of them, in order. All ranks call this together, each with rows of its own, as many as it
    likes; the numbers of rows are read back from the device.
    """
    ranks = dist.get_world_size()
    ours = counts.view(ranks, -1)
    theirs = torch.empty_like(ours)
    dist.all_to_all_single(theirs, ours.contiguous())
    there, here = ours.sum(1).tolist(), theirs.sum(1).tolist()
    arrived = _Exchange.apply(rows, there, here)
    expert = torch.arange(theirs.shape[1], device=rows.device).repeat(ranks).repeat_interleave(theirs.flatten())
    order = torch.argsort(expert, stable=True)
    outputs = apply(arrived[order], theirs.sum(0))
    return _Exchange.apply(outputs[torch.argsort(order)], here, there)


class _Exchange(torch.autograd.Function):
    """Rows in the order of the ranks that get them -> rows in the order of the ranks that they come from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sizes = received, sent
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(gradient, *ctx.sizes), None, None
