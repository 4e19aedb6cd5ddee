"""Find the source of a loss or gradient that is not finite. Training stops before the optimizer step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe.distributed import ranks
from moe.distributed.sharding import full_tensors
from moe.routing.decision import Knobs


class Diverged(Exception):
    """The loss or a gradient is not finite. The weights are still those from before `step`."""

    def __init__(self, step: int, where: str) -> None:
        super().__init__(f"step {step}: {where} is not finite; lower the learning rate or see optimizer.clip")


def locate_nonfinite(model: nn.Module, inputs: dict[str, Any], knobs: Knobs) -> str:
    """Return the name of the first tensor that is not finite, with the numbers of the experts concerned.

    inputs: the arguments of the model beside `knobs`, such as `Batch.inputs`.

    Searches the weights, then the outputs of the modules in forward order, then the gradients. For the outputs, the
    model runs once more with forward hooks. All ranks call this together, each with its own blocks.
    """
    weights = _first_not_finite({name: p.detach() for name, p in model.named_parameters()})
    gradients = _first_not_finite({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    if weights is not None:
        return f"weight {weights}"
    outputs: list[str] = []
    hooks = [m.register_forward_hook(_note_output(outputs, name)) for name, m in model.named_modules() if name]
    with torch.no_grad():
        model(**inputs, knobs=knobs)
    for hook in hooks:
        hook.remove()
    outputs = [output for found in ranks.all_gather(outputs) for output in found]
    if outputs:
        return f"output of {outputs[0]}"
    return "the loss" if gradients is None else f"gradient of {gradients}"


def _first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    full = full_tensors(tensors)
    return next((_with_experts(name, t) for name, t in full.items() if not t.isfinite().all()), None)


def _note_output(found: list[str], name: str) -> Callable[[nn.Module, object, object], None]:
    """Return a hook that appends `name` to `found` if the module's output is not finite."""

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    return note


def _with_experts(name: str, tensor: Tensor) -> str:
    """Return the name of a tensor. For a stack of experts (E, rows, cols), add which experts are not finite."""
    if tensor.ndim != 3:
        return name
    bad = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    return f"{name} (expert {', '.join(map(str, bad))})"
