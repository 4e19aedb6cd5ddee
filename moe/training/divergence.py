"""When a loss or gradient is not finite: stop before the optimizer step, and say where it comes from."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moe.distributed import ranks
from moe.distributed.sharding import full
from moe.routing.decision import Knobs


class Diverged(Exception):
    """Loss or gradient is not finite; the weights are still those before `step`."""

    def __init__(self, step: int, where: str) -> None:
        super().__init__(f"step {step}: {where} is not finite; lower the learning rate or see optimizer.clip")


def blame(
    model: nn.Module, ids: Int[Tensor, "B S"], knobs: Knobs, *, position_ids: Int[Tensor, "B S"] | None = None
) -> str:
    """The first thing that is not finite: a weight, else the output of a module in forward order, else a gradient.

    Experts are named one by one. Runs the model once more, with hooks: this is the only place that has any. All ranks
    call it together, each with blocks of its own.
    """
    weights = _first_bad({name: p.detach() for name, p in model.named_parameters()})
    gradients = _first_bad({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    if weights is not None:
        return f"weight {weights}"
    outputs: list[str] = []
    hooks = [m.register_forward_hook(_note_output(outputs, name)) for name, m in model.named_modules() if name]
    with torch.no_grad():
        model(ids, knobs=knobs, position_ids=position_ids)
    for hook in hooks:
        hook.remove()
    outputs = [output for found in ranks.all_gather(outputs) for output in found]
    if outputs:
        return f"output of {outputs[0]}"
    return "the loss" if gradients is None else f"gradient of {gradients}"


def _first_bad(tensors: dict[str, Tensor]) -> str | None:
    return next((_slice_name(name, t) for name, t in full(tensors).items() if not t.isfinite().all()), None)


def _note_output(found: list[str], name: str) -> Callable[[nn.Module, object, object], None]:
    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    return note


def _slice_name(name: str, tensor: Tensor) -> str:
    if tensor.ndim != 3:
        return name
    bad = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    return f"{name} (expert {', '.join(map(str, bad))})"
