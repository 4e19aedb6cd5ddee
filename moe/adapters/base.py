"""The interface that every adapter implements, and the files that a run leaves of one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.model.causal_lm import MoEForCausalLM
from moe.routers.base import Role


class Adapter:
    """Base class of all adapters: few new parameters of a model, which learn while its own weights are frozen.

    A subclass takes its settings as keyword-only arguments, with the values of the adapter's yaml file, and raises
    ConfigError for wrong ones. It must implement `attach`. Right after that, the model must return what it returned
    before, for every input.

    Where the default does not fit, a subclass may
    - set `stays = False`: a saved model has the adapter merged into its weights (`merged`), and no part of its own.
    - set `needs_experts = False`: it also fits a model in which no layer is a Mixture of Experts.
    - set `splits = True`: it works where ranks have different parts of the weights (FSDP, `expert_parallel`).
    - set `acts_on`: what in its own layer its parameters change, of "input" (what the router reads), "router" (also one
      of its own), "experts" (their matrices, while they run) and "outputs" (of the experts). The weight of a loss that
      reaches nothing that trains is refused, and `erc` where "experts" is among them. Default: all four.
    - set `muon`: whether Muon trains "matrices", or also "stacks" of several matrices; "" if neither.
    - implement `check`, which compares the settings with the sizes of the model, before anything is loaded.
    - implement `role`: how the optimizers treat a parameter.
    - implement `save`: the files in `RUN/adapter`.
    """

    stays: ClassVar[bool] = True
    needs_experts: ClassVar[bool] = True
    splits: ClassVar[bool] = True
    acts_on: frozenset[str] = frozenset(("input", "router", "experts", "outputs"))
    muon: str = "stacks"

    def check(self, *, dim: int) -> None:
        """Raise ConfigError if the settings do not fit a model of width `dim`. No model is there yet."""

    def attach(self, model: MoEForCausalLM, *, trusted: bool) -> None:
        """Add the new parameters to a model that has its weights. `trusted`: as in `MoEForCausalLM`."""
        raise NotImplementedError

    def role(self, name: str, p: nn.Parameter) -> Role:
        """Return how the optimizers treat the new parameter `name`, see `moe.routers.base.Role`.

        By default, Muon trains matrices and stacks of matrices. Routers inside of the adapter decide for themselves.
        `muon` must agree with it.
        """
        return "matrix" if p.ndim >= 2 else "scale"

    def merged(self, model: MoEForCausalLM, weights: dict[str, Tensor]) -> tuple[MoEForCausalLM, dict[str, Tensor]]:
        """Return the model to save and its weights. `weights`: all of `model`, in full tensors."""
        return model, weights

    def save(
        self, model: MoEForCausalLM, weights: Mapping[str, Tensor], folder: Path, *, base: str | None = None
    ) -> None:
        """Write the new parameters to `folder`, which is empty.

        weights: all of `model`, in full tensors. base: the folder or hub name of the model without the adapter. None:
        it is stored nowhere.

        By default these are adapter.safetensors, with the names that the parameters have in the model, and adapter.json
        with the class and its settings. PEFT has no such type of adapter.
        """
        own = {name: weights[name].contiguous() for name in sorted(model.adapter_names)}
        save_file(own, folder / "adapter.safetensors", {"format": "pt"})
        (folder / "adapter.json").write_text(json.dumps(model.config.adapter, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def at(cls, key: str) -> str:
        """Return the place of a setting in the configuration."""
        return f"adapter.{key}"


def renamed(error: ConfigError, names: Mapping[str, str]) -> ConfigError:
    """Return an error about a part of an adapter with the keys of that part replaced by those of the adapter."""
    text = str(error)
    for name, ours in names.items():
        text = text.replace(name, ours)
    return ConfigError(text)
