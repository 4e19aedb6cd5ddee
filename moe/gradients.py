"""How strongly routers and experts are pulled, and how far a step moves them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.layer import MoELayer
from moe.sharding import norm

Parts = dict[str, list[nn.Parameter]]


def parts(model: nn.Module) -> Parts:
    """The trainable parameters of all routers and of all experts; a part without any is left out."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    whole = {
        "router": [p for layer in layers for p in layer.router.parameters()],
        "experts": [p for layer in layers for p in layer.experts.parameters()],
    }
    once = {name: dict.fromkeys(params) for name, params in whole.items()}  # routers of several layers may share some
    trainable = {name: [p for p in params if p.requires_grad] for name, params in once.items()}
    return {name: params for name, params in trainable.items() if params}


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
