"""How strongly routers and experts are pulled, and how far a step moves them."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.distributed.sharding import norm
from moe.model.parts import Parts


def gradient_norms(of: Parts) -> dict[str, Float[Tensor, ""]]:
    """`grad_norm/<part>`: Euclidean norm of the gradient, before clipping; left on the device."""
    return {f"grad_norm/{name}": norm([p.grad for p in params if p.grad is not None]) for name, params in of.items()}


@torch.no_grad()
def relative_updates(of: Parts, before: dict[str, list[Tensor]]) -> dict[str, float]:
    """`update/<part>`: norm of what an optimizer step changed / norm of what was there, the effective learning rate.

    before: copies of the parameters from before the step.
    """
    return {
        f"update/{name}": (
            norm([p - old for p, old in zip(params, before[name], strict=True)]) / norm(before[name])
        ).item()
        for name, params in of.items()
    }
