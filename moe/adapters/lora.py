"""LoRA (2106.09685) by the package peft: low-rank changes of frozen matrices, which can be merged into these."""

import copy
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from moe.adapters.base import Adapter
from moe.checks import ConfigError, finite, one_of, require
from moe.model.causal_lm import MoEForCausalLM
from moe.model.imported import plain_name
from moe.routers.base import Role
from moe.routers.seeding import seeded

ACTS_ON = {"attention": frozenset(("input",)), "experts": frozenset(("experts", "outputs"))}
VARIANTS = ("lora", "rslora", "dora")
NAME = "default"  # of the adapter in peft


class Lora(Adapter):
    """LoRA: W becomes W + scale * B A, with A of shape (rank, in) and B of shape (out, rank). B starts at zero.

    In a stack of experts, each expert has an A and a B of its own for each matrix.

    parts: whose matrices change: attention, experts (the routed ones), or both.
    rank: rank of the change of a matrix; of an expert's matrix too.
    alpha: scale of the change: alpha / rank.
    variant: lora; rslora, whose scale is alpha / sqrt(rank) (2312.03732); dora, which also learns the length of each
        row (2402.09353), not for experts.
    dropout: probability that training sets an input of A to 0; not for experts.
    """

    stays = False
    needs_experts = False
    splits = False
    muon = ""

    def __init__(
        self, *, parts: list[str], rank: int, alpha: float, variant: str = "lora", dropout: float = 0.0
    ) -> None:
        require(bool(parts) and len({*parts}) == len(parts), "adapter.parts", parts, f"some of {', '.join(ACTS_ON)}")
        for part in parts:
            one_of("adapter.parts", part, ACTS_ON)
        require(1 <= rank <= 10**6, "adapter.rank", rank, "a whole number from 1 to 10^6")
        require(finite(alpha) and alpha > 0, "adapter.alpha", alpha, "a finite number > 0")
        require(finite(dropout) and 0 <= dropout < 1, "adapter.dropout", dropout, "in [0, 1)")
        one_of("adapter.variant", variant, VARIANTS)
        stacked = "experts" in parts
        require(not stacked or not dropout, "adapter.dropout", dropout, "0 for experts: peft has none for a stack")
        require(not stacked or variant != "dora", "adapter.variant", variant, "lora or rslora for experts, as in peft")
        installed = importlib.util.find_spec("peft") is not None
        require(installed, "adapter", "lora", "another one, or else: pip install -e '.[finetune]'")
        self.parts, self.rank, self.alpha, self.variant, self.dropout = parts, rank, alpha, variant, dropout
        self.needs_experts = stacked  # type: ignore[misc]
        self.acts_on = frozenset().union(*(ACTS_ON[part] for part in parts))
        self.tuner: Any = None

    def attach(self, model: MoEForCausalLM, *, trusted: bool) -> None:
        from peft import LoraConfig, LoraModel

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            target_modules=attention_of(model) if "attention" in self.parts else [],
            target_parameters=stacks_of(model) if "experts" in self.parts else None,
            task_type="CAUSAL_LM",
        )
        with seeded("adapter"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ways to use peft that are not used here
            self.tuner = LoraModel(model, config, NAME)

    def role(self, name: str, p: nn.Parameter) -> Role:
        """Return that AdamW trains all parameters: A and B of all experts are one matrix, which Muon would mix."""
        return "other" if p.ndim >= 2 else "scale"

    def merged(self, model: MoEForCausalLM, weights: dict[str, Tensor]) -> tuple[MoEForCausalLM, dict[str, Tensor]]:
        """Return a copy of the model with B A added to its matrices. It has the names of a model without adapter."""
        twin = copy.deepcopy(self.tuner)
        model = twin.merge_and_unload()
        model.adapter, model.adapter_names = None, frozenset()
        return model, model.state_dict()

    def save(
        self, model: MoEForCausalLM, weights: Mapping[str, Tensor], folder: Path, *, base: str | None = None
    ) -> None:
        """Write adapter_config.json and adapter_model.safetensors as peft does, with the names of the base model."""
        from peft import get_peft_model_state_dict

        named = {f"model.{name}": tensor for name, tensor in weights.items()}
        own = get_peft_model_state_dict(self.tuner, state_dict=named, adapter_name=NAME)
        plain = {plain_name(name.removeprefix("model.")): tensor.contiguous() for name, tensor in own.items()}
        tensors = {f"base_model.model.{name}": tensor for name, tensor in plain.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config = copy.copy(self.tuner.peft_config[NAME])
        config.inference_mode = True
        config.target_modules = _short(config.target_modules or [], [name for name, _ in model.named_modules()])
        config.target_parameters = _endings(map(plain_name, config.target_parameters or [])) or None
        config.base_model_name_or_path = base
        config.save_pretrained(str(folder))


def attention_of(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of the attention. Raises ConfigError if there are none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in names if any("attn" in part or "attention" in part for part in name.split(".")[:-1])]
    if not found:
        raise ConfigError("adapter.parts=attention: this model has no attention with linear layers")
    return found


def stacks_of(model: MoEForCausalLM) -> list[str]:
    """Return the names of the stacks of matrices of the routed experts."""
    stacks = {p for layer in model.moe_layers for p in layer.experts.parameters() if p.ndim == 3}
    return [name for name, p in model.named_parameters() if p in stacks]


def _endings(names: Any) -> list[str]:
    """Return the names without the part up to the number of the layer, each once: mlp.experts.down_proj."""
    return sorted({_without_layer(name) for name in names})


def _without_layer(name: str) -> str:
    words = name.split(".")
    number = next((place for place, word in enumerate(words) if word.isdigit()), -1)
    return ".".join(words[number + 1 :])


def _short(targets: Any, modules: list[str]) -> list[str]:
    """Return the last words of the names `targets`, such as q_proj, if no other module ends with one of them."""
    last = {name.rpartition(".")[2] for name in targets}
    others = {name for name in modules if name.rpartition(".")[2] in last} - {*targets}
    return sorted(last) if not others else _endings(map(plain_name, targets))
