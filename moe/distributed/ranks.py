"""The processes of one run, as `accelerate launch` and torchrun start them: the ranks. They share the micro-batches of
a step, and the first of them alone reads and writes the run's files. A process by itself is a rank of one."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from jaxtyping import Int

if TYPE_CHECKING:  # who only asks for numbers need not wait for torch
    from torch import Tensor


def world_size() -> int:
    """How many ranks this run has."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    return rank() == 0


def launched_with(engine: str) -> bool:
    """Whether Accelerate's launch file names this engine, FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"


def start(*, timeout: int) -> None:
    """Let the ranks find one another; from then on, one that waits for another fails after `timeout` seconds."""
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=timeout))


def broadcast(value: Any) -> Any:
    """The value that the first rank has."""
    return all_gather(value)[0]


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def maximum(value: int) -> int:
    """The largest of the values of all ranks."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    most = torch.tensor(value, device=PartialState().device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def total(tensors: "Sequence[Tensor]") -> "list[Tensor]":
    """The sums over ranks of tensors that have the same shapes on each, added in fp64 and in one exchange."""
    if world_size() == 1:
        return list(tensors)
    import torch
    import torch.distributed as dist

    sums = torch.cat([tensor.double().flatten() for tensor in tensors])
    dist.all_reduce(sums)
    parts = sums.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def sum_before(counts: "Int[Tensor, 'E']") -> "Int[Tensor, 'E']":
    """The sum over the ranks before this one."""
    if world_size() == 1:
        return counts.new_zeros(counts.shape)
    import torch
    import torch.distributed as dist

    everyone = [torch.empty_like(counts) for _ in range(world_size())]
    dist.all_gather(everyone, counts)
    return torch.stack(everyone)[: rank()].sum(0)
