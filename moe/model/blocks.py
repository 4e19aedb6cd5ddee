"""Find the Mixture-of-Experts blocks of a transformers model, and the MLPs of a dense one, by what they do."""

import inspect
from typing import NamedTuple

from torch import nn

from moe.checks import ConfigError


class Block(NamedTuple):
    """A Mixture-of-Experts block of a transformers model.

    name: in the model. module: the block. gate: the name of its router in the block, or None if none was found.
    """

    name: str
    module: nn.Module
    gate: str | None

    @property
    def experts(self) -> nn.Module:
        return self.module.experts  # type: ignore[return-value]


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the MoE blocks of a model, in the order in which they run.

    A block is a module with a part `experts` that is called with hidden states, the experts of each token and their
    weights. Its router is the other part that has a matrix or vector with an entry for each expert.
    """
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and _takes_decision(experts):
            number = count_experts(experts)
            gates = [part for part, child in module.named_children() if part != "experts" and _has_rows(child, number)]
            found.append(Block(name, module, gates[0] if gates else None))
    return found


def find_dense(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a dense model, in their order.

    Their part `mlp` computes down(act(gate x) * up x).
    """
    parts = {"gate_proj", "up_proj", "down_proj"}
    mlps = {module: getattr(module, "mlp", None) for module in model.modules()}
    return [module for module, mlp in mlps.items() if isinstance(mlp, nn.Module) and parts <= {*mlp._modules}]


def count_experts(experts: nn.Module) -> int:
    """Return the number of experts of a part `experts`."""
    number = getattr(experts, "num_experts", None)
    if isinstance(number, int):
        return number
    stacks = {len(p) for p in experts.parameters() if p.ndim == 3}
    if len(stacks) != 1:
        raise ConfigError(f"{type(experts).__name__}: its number of experts is unknown")
    return stacks.pop()


def _takes_decision(experts: nn.Module) -> bool:
    if type(experts).forward is nn.Module.forward or isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return False
    return len(inspect.signature(type(experts).forward).parameters) == 4  # self, hidden states, index, weights


def _has_rows(part: nn.Module, number: int) -> bool:
    return any(p.ndim in (1, 2) and len(p) == number for p in part.parameters())
