"""The experts of an imported model: the modules of transformers, in which our kernels multiply.

Most of these modules ask transformers' registry of implementations what to run. Ours is registered there, so the
module's own `forward` runs, with whatever other libraries hang on it, and our kernels get the weights that it has then.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe.distributed.sharding import local_part
from moe.fused import uncompiled
from moe.model.blocks import count_experts
from moe.model.experts import Experts, Linear, Stacks, choose_kernel, run_experts

IMPLEMENTATION = "moe_routing"


class ImportedExperts(Experts):
    """The experts of an imported model: a module of transformers, or one that another library has put around it."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)  # its weights are those of the module
        self.module = module
        self.number = count_experts(module)

    @property
    def first(self) -> None:
        """None: the matrices of transformers' modules have several layouts."""
        return None

    def kernel(self, dtype: torch.dtype) -> str:
        """Return the name of one of our kernels, or `transformers` for the code of that library."""
        inner = _inner(self.module)
        if not _asks_registry(inner):
            return "transformers"
        matrices = inner.down_proj
        return choose_kernel(matrices.device.type, dtype, local_part(matrices).shape)  # type: ignore[arg-type]

    @uncompiled
    def forward(self, x: Float[Tensor, "R D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "R D"]:
        if _asks_registry(_inner(self.module)):
            outputs: Tensor = self.module(x, counts=counts)
            return outputs
        if not len(x):
            return x
        index = torch.arange(self.number, device=x.device).repeat_interleave(counts.to(x.device))[:, None]
        outputs = self.module(x, index, torch.ones_like(index, dtype=x.dtype))
        return outputs.view_as(x)

    def initialize(self, std: float, names: dict[Tensor, str]) -> None:
        """Do nothing: transformers initializes the module."""


def _inner(module: nn.Module) -> nn.Module:
    """Return the module of transformers inside of what peft has put around it."""
    while isinstance(inside := getattr(module, "base_layer", None), nn.Module):
        module = inside
    return module


def _asks_registry(module: nn.Module) -> bool:
    """Return whether `use_experts_implementation` has changed the class of a module, and its model runs ours."""
    config = getattr(module, "config", None)
    return hasattr(module, "is_transposed") and getattr(config, "_experts_implementation", None) == IMPLEMENTATION


def run_imported_experts(module: Any, x: Float[Tensor, "R D"], *, counts: Int[Tensor, " E"]) -> Float[Tensor, "R D"]:
    """Return the outputs of a module's experts for rows that are sorted by expert, `counts` rows for each expert.

    The other implementations get the experts of each token and their weights instead. Those have been dealt with
    here, by the dispatch of `MoELayer`. The code of transformers, which runs otherwise, takes E times as long for the
    gradient: for each expert one of the size of all.
    """
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    matrices = [getattr(module, name).mT if module.is_transposed else getattr(module, name) for name in names]
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in names]

    def expert(x: Tensor, linear: Linear, b1: Tensor | None, first: Tensor, b2: Tensor | None, last: Tensor) -> Tensor:
        hidden = linear(x, first) if b1 is None else linear(x, first) + b1
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        y = linear(hidden, last) if b2 is None else linear(hidden, last) + b2
        return module.post_expert_norm(y) if module.has_post_expert_norm else y

    stacks: Stacks = (biases[0], matrices[0], biases[1], matrices[1])
    return run_experts(x, counts, stacks, expert)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_imported_experts)
