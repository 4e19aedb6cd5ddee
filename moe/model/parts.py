"""The parameters of routers and of experts in a model."""

from torch import nn

from moe.model.layer import MoELayer

Parts = dict[str, list[nn.Parameter]]


def parts(model: nn.Module) -> Parts:
    """Return the trainable parameters of all routers and of all experts. A part without parameters is left out."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    found = {
        "router": [p for layer in layers for p in layer.router.parameters()],
        "experts": [p for layer in layers for p in layer.experts.parameters()],
    }
    unique = {name: dict.fromkeys(params) for name, params in found.items()}  # routers can share parameters
    trainable = {name: [p for p in params if p.requires_grad] for name, params in unique.items()}
    return {name: params for name, params in trainable.items() if params}
