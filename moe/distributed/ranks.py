"""The processes (ranks) of one run, as `accelerate launch` and torchrun start them, and how they communicate.

The ranks share the micro-batches of each optimizer step. Only rank 0 writes the files of the run. If a decision depends
on files, rank 0 decides for all ranks. A single process counts as one rank. All functions that communicate must be
called by all ranks together.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds, and many callers only need `rank` or `world_size`
    from jaxtyping import Int
    from torch import Tensor


def world_size() -> int:
    """Return the number of ranks."""
    # WORLD_SIZE alone does not mean that there are ranks. Launchers always set RANK too.
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Return whether this process is rank 0."""
    return rank() == 0


def launched_with(engine: str) -> bool:
    """Return whether the Accelerate configuration enables this engine, FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"


def start(*, timeout: int) -> None:
    """Connect the ranks. Afterwards, a rank that waits for another one for more than `timeout` seconds fails."""
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=timeout))


def stop(status: int) -> int:
    """Disconnect the ranks at the end of a command. Return its exit status, or with several ranks end this process.

    A process that ends connected may crash. One that disconnects may still have threads of libtorch, which abort it now
    and then if they wait for Python while the interpreter shuts down ("terminate called without an active exception").
    So exit handlers run here, and the process then ends without shutting down the interpreter.
    """
    if world_size() == 1:
        return status
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def broadcast(value: Any) -> Any:
    """Return the value of rank 0. It can be any object that can be pickled."""
    return all_gather(value)[0]


def all_gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks. They can be any objects that can be pickled."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_max(value: int) -> int:
    """Return the largest value of all ranks."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    largest = torch.tensor(value, device=PartialState().device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def all_reduce_sum(tensors: "Sequence[Tensor]") -> "list[Tensor]":
    """Return the sum of each tensor over all ranks. All ranks must pass tensors of the same shapes.

    The tensors are added in fp64, in one collective call.
    """
    if world_size() == 1:
        return list(tensors)
    import torch
    import torch.distributed as dist

    sums = torch.cat([tensor.double().flatten() for tensor in tensors])
    dist.all_reduce(sums)
    parts = sums.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def sum_of_lower_ranks(counts: "Int[Tensor, ' E']") -> "Int[Tensor, ' E']":
    """Return the sum of `counts` over all ranks below this one. On rank 0 it is 0."""
    if world_size() == 1:
        return counts.new_zeros(counts.shape)
    import torch
    import torch.distributed as dist

    gathered = [torch.empty_like(counts) for _ in range(world_size())]
    dist.all_gather(gathered, counts)
    return torch.stack(gathered)[: rank()].sum(0)
