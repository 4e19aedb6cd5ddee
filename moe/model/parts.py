"""The parts of a model: which of its parameters belong to routers, experts, attention and so on, and which train."""

from collections.abc import Iterator

from torch import Tensor, nn

from moe.checks import ConfigError
from moe.config.trainable import Trainable
from moe.model.decoder import DenseFFN
from moe.model.imported import ImportedModel, RoutedExperts, plain_name
from moe.model.layer import MoELayer
from moe.routers.base import Router

Parts = dict[str, list[nn.Parameter]]


def parts(model: nn.Module) -> Parts:
    """Return the trainable parameters of all routers and of all experts. A part without parameters is left out."""
    found: Parts = {"router": [], "experts": []}
    part = part_of(model)
    for p in model.parameters():
        if p.requires_grad and part[p] in found:
            found[part[p]].append(p)
    return {name: params for name, params in found.items() if params}


def part_of(model: nn.Module) -> dict[Tensor, str]:
    """Return the part of every parameter, a key of `moe.config.trainable.PARTS`, and that of the buffers of routers.

    What no rule below claims is "attention": also convolutions, state spaces and connections between layers.
    """
    found: dict[Tensor, str] = {}
    for part, module in _claims(model):
        tensors = [*module.parameters(), *(module.buffers() if part in ("router", "adapter") else ())]
        found = dict.fromkeys(tensors, part) | found  # the first claim counts
    added: frozenset[str] = getattr(model, "adapter_names", frozenset())
    found |= {p: "adapter" for name, p in model.named_parameters() if name in added}
    return dict.fromkeys(model.parameters(), "attention") | found


def _claims(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules with their part. A module inside of another one comes first if it has another part."""
    modules = [*model.modules()]
    layers = [module for module in modules if isinstance(module, MoELayer)]
    yield from (("adapter", layer.beside) for layer in layers if layer.beside is not None)
    for module in modules:
        if isinstance(module, Router):
            yield "router", module
        elif isinstance(experts := getattr(module, "experts", None), RoutedExperts) and experts.gate is not None:
            yield "router", module.get_submodule(experts.gate)
    yield from (("experts", layer.experts) for layer in layers)
    yield from (("embeddings", module) for module in modules if isinstance(module, nn.Embedding))
    for module in modules:
        output = _output_matrix(module)
        if output is not None:
            yield "embeddings", output
    leaves = (module for module in modules if not any(True for _ in module.children()))
    yield from (("norms", module) for module in leaves if "norm" in type(module).__name__.lower())
    for module in modules:
        if isinstance(module, MoELayer):
            around = (module.shared, module.shared_gate, module.latent)
            yield from (("shared", part) for part in around if part is not None)
        elif _is_feed_forward(module):
            yield "shared", module


def _is_feed_forward(module: nn.Module) -> bool:
    """Return whether a module is a dense feed-forward network, or a block of an imported model with routed experts."""
    named = type(module).__name__.lower().endswith(("mlp", "ffn", "feedforward"))
    return named or isinstance(module, DenseFFN) or isinstance(getattr(module, "experts", None), RoutedExperts)


def _output_matrix(module: nn.Module) -> nn.Module | None:
    """Return the output matrix of our decoder, or of an imported model."""
    if isinstance(module, ImportedModel):
        return module.causal_lm.get_output_embeddings()
    output = getattr(module, "lm_head", None)
    return output if isinstance(output, nn.Module) else None


def names_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model, and the buffers of its routers, by the names that patterns match.

    These are the names of `named_parameters`, without the wrappers of an imported model. Shared ones have one name.
    """
    part = part_of(model)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {plain_name(name): tensor for name, tensor in named if tensor in part}


def trained_tensors(model: nn.Module, trainable: str) -> set[Tensor]:
    """Return the parameters of a model that train with a value of the key `trainable`, and such buffers of routers.

    Raises ConfigError for a value that does not fit the model (`Trainable.selects`).
    """
    names, part = names_of(model), part_of(model)
    chosen = Trainable.of(trainable).selects({name: part[tensor] for name, tensor in names.items()})
    return {names[name] for name in chosen}


def freeze(model: nn.Module, trainable: str) -> None:
    """Turn gradients off for all parameters that do not train. Raises ConfigError as `trained_tensors` does.

    It also does so if all the parameters that are left have no gradient in this model anyway.
    """
    chosen = trained_tensors(model, trainable)
    if not any(p.requires_grad and p in chosen for p in model.parameters()):
        raise ConfigError(f"trainable={trainable}: these parts of this model have nothing that gradients train")
    for p in model.parameters():
        if p not in chosen:
            p.requires_grad_(False)


def learning_routers(model: nn.Module, routers: list[Router], trainable: str) -> frozenset[Router]:
    """Return which of these routers of a model learn without a gradient, in `Router.after_step`.

    A router learns in its buffers. It does so if at least one of them trains, or one of its parameters if it has none.
    """
    chosen = trained_tensors(model, trainable)
    learned = {router: [*router.buffers()] or [*router.parameters()] for router in routers}
    return frozenset(router for router, tensors in learned.items() if any(tensor in chosen for tensor in tensors))
