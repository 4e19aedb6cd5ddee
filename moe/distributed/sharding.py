"""Tensors of which every rank has a part (DTensors), beside ordinary ones, of which every rank has its own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def full(tree: Any) -> Any:
    """A tensor, or dicts and lists of them, with every sharded tensor put together; all ranks call this together."""
    if isinstance(tree, dict):
        return {key: full(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full(value) for value in tree]
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """`value`, which every rank has whole, sharded as `target` is."""
    if not isinstance(target, DTensor):
        return value
    copies = DTensor.from_local(value.to(target.device), target.device_mesh, run_check=False)
    return copies.redistribute(placements=target.placements)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state in whole tensors, which names that share one still share; all ranks call this together."""
    once: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in once:
            once[id(tensor)] = full(tensor.detach())
    return {name: once[id(tensor)] for name, tensor in state.items()}


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all numbers in `tensors`, on all ranks; 0-dim."""
    sharded = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    norms = [full(nn.utils.get_total_norm(some)) for some in (sharded, others) if some]
    return torch.stack(norms).norm() if norms else torch.zeros(())
