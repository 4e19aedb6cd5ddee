"""Gradient norms of routers and experts, and how far an optimizer step moves them."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.distributed.sharding import global_norm
from moe.model.parts import Parts


def gradient_norms(parts: Parts) -> dict[str, Float[Tensor, ""]]:
    """Return `grad_norm/<part>`, the Euclidean norm of each part's gradients, as tensors on the device.

    Call it before clipping.
    """
    return {
        f"grad_norm/{name}": global_norm([p.grad for p in params if p.grad is not None])
        for name, params in parts.items()
    }


def copy_parameters(parts: Parts) -> dict[str, list[Tensor]]:
    """Return copies of all parameters of each part, for `relative_updates`."""
    return {name: [p.detach().clone() for p in params] for name, params in parts.items()}


@torch.no_grad()
def relative_updates(parts: Parts, before: dict[str, list[Tensor]]) -> dict[str, float]:
    """Return `update/<part>`: norm of the change by an optimizer step / norm of the parameters before it.

    This is the effective learning rate of each part. before: the result of `copy_parameters` before the step.
    """
    return {
        f"update/{name}": (
            global_norm([p - old for p, old in zip(params, before[name], strict=True)]) / global_norm(before[name])
        ).item()
        for name, params in parts.items()
    }
