"""Helpers for sharded tensors (DTensors). Each rank holds one part of such a tensor.

The helpers also accept ordinary tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def full_tensors(tree: Any) -> Any:
    """Return a tensor, or nested dicts and lists of tensors, with every sharded tensor replaced by the full one.

    All ranks call this together.
    """
    if isinstance(tree, dict):
        return {key: full_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full_tensors(value) for value in tree]
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """Return `value`, a full tensor that every rank has, sharded like `target`."""
    if not isinstance(target, DTensor):
        return value
    replicated = DTensor.from_local(value.to(target.device), target.device_mesh, run_check=False)
    return replicated.redistribute(placements=target.placements)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model in full tensors. All ranks call this together.

    Tied weights stay tied: names that refer to the same tensor in the model still do in the result.
    """
    by_identity: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in by_identity:
            by_identity[id(tensor)] = full_tensors(tensor.detach())
    return {name: by_identity[id(tensor)] for name, tensor in state.items()}


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor. Return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all elements of all tensors, as a tensor of shape ().

    For sharded tensors, the parts of all ranks count. All ranks call this together.
    """
    sharded = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    ordinary = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    norms = [full_tensors(nn.utils.get_total_norm(group)) for group in (sharded, ordinary) if group]
    return torch.stack(norms).norm() if norms else torch.zeros(())
