"""Which parameters of a model are routers and which are experts."""

from torch import nn

from moe.model.layer import MoELayer

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
