"""Expert parallelism: each rank holds some of the experts, and token vectors are sent to the rank of their expert."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

# Takes rows sorted by expert and the number of rows of each expert. Returns the outputs in the same order.
RunExperts = Callable[[Tensor, Tensor], Tensor]


def run_distributed_experts(
    rows: Float[Tensor, "R D"], counts: Int[Tensor, " E"], run_local: RunExperts
) -> Float[Tensor, "R D"]:
    """Run E experts that are divided over N ranks: send each row to the rank of its expert, and the output back.

    rows: token vectors sorted by expert, `counts` rows for each of the E experts. The number of rows can differ between
        ranks.
    run_local: runs the E/N experts of this rank. Rank 0 has the first E/N experts, rank 1 the next ones, and so on.

    All ranks call this together. It waits for the device, because the numbers of rows are copied to the CPU.
    """
    ranks = dist.get_world_size()
    sent = counts.view(ranks, -1)  # [rank, expert of that rank]
    received = torch.empty_like(sent)  # [rank that the rows come from, expert of this rank]
    dist.all_to_all_single(received, sent.contiguous())
    rows_sent, rows_received = sent.sum(1).tolist(), received.sum(1).tolist()
    arrived = _AllToAll.apply(rows, rows_sent, rows_received)
    # The rows arrive sorted by the rank that sent them. Only the rows of one rank are sorted by expert.
    expert = torch.arange(received.shape[1], device=rows.device).repeat(ranks).repeat_interleave(received.flatten())
    order = torch.argsort(expert, stable=True)
    outputs = run_local(arrived[order], received.sum(0))
    return _AllToAll.apply(outputs[torch.argsort(order)], rows_received, rows_sent)


class _AllToAll(torch.autograd.Function):
    """Send rows to all ranks and receive rows from all ranks. The backward pass sends the gradients back.

    rows: sorted by the rank that they go to. The result is sorted by the rank that the rows come from.
    sent, received: number of rows that go to each rank, and that come from each rank.
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
