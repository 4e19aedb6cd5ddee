"""Expert parallelism: each rank has some of the experts, and rows are sent to the rank that has their expert."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

# takes rows sorted by expert and the number of rows of each expert; returns the outputs in the same order
RunExperts = Callable[[Tensor, Tensor], Tensor]


def run_distributed_experts(
    rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"], run_local: RunExperts
) -> Float[Tensor, "R D"]:
    """Run E experts that are divided over N ranks: send rows to their experts' ranks, and outputs back.

    rows: sorted by expert, `counts` rows for each of the E experts. Every rank may have another number of rows.
    run_local: runs the E/N experts of this rank; rank 0 has the first E/N experts, rank 1 the next ones, and so on.

    All ranks call this together. The numbers of rows are copied from the device to the CPU, so the device is waited
    for.
    """
    ranks = dist.get_world_size()
    sent = counts.view(ranks, -1)  # [rank, expert of that rank]
    received = torch.empty_like(sent)  # [rank that the rows come from, expert of this rank]
    dist.all_to_all_single(received, sent.contiguous())
    rows_sent, rows_received = sent.sum(1).tolist(), received.sum(1).tolist()
    arrived = _AllToAll.apply(rows, rows_sent, rows_received)
    # the rows arrive sorted by rank, and by expert only within a rank
    expert = torch.arange(received.shape[1], device=rows.device).repeat(ranks).repeat_interleave(received.flatten())
    order = torch.argsort(expert, stable=True)
    outputs = run_local(arrived[order], received.sum(0))
    return _AllToAll.apply(outputs[torch.argsort(order)], rows_received, rows_sent)


class _AllToAll(torch.autograd.Function):
    """Send rows to all ranks and receive rows from all; the gradient goes the way back.

    rows: sorted by the rank that they go to. The result is sorted by the rank that the rows come from.
    sent, received: numbers of rows for each rank, and from each rank.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sizes = received, sent
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.apply(gradient, *ctx.sizes), None, None
