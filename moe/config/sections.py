"""The sections `data`, `optimizer` and `logger` of the configuration."""

import importlib.util
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from moe.checks import ConfigError, finite, one_of, require, require_path
from moe.config.classes import build
from moe.data.limits import BlockSettings, check_train_domains
from moe.files import require_files


@dataclass
class DataConfig:
    """Settings of the data: the source of the text (a `_target_`), and how it becomes blocks of `seq_len` tokens."""

    source: Any = MISSING  # where the text comes from: a class as data.source._target_, and its settings
    tokenizer: str = MISSING  # bpe, which is trained on the training text, or a folder, or a name on the hub
    tokenizer_revision: str | None = None  # commit, branch or tag on the hub; null: the recorded commit, or the newest
    vocab_size: int | None = None  # tokens of a trained tokenizer; null for another one, which has its own number
    seq_len: int = MISSING  # tokens of a block, which is one sequence
    train_domains: list[str] | None = None  # domains whose text trains, all validate; null: all
    val_percent: int = 10  # percent of the characters of each domain that are used for validation
    max_val_blocks: int | None = None  # most validation blocks, evenly spaced; null, or more than there are: all
    test_percent: int = 10  # percent of the characters of each domain for the test at the end of a run; 0: no test
    max_test_blocks: int | None = None  # most test blocks, evenly spaced; null: max_val_blocks
    cache: str = MISSING  # folder that keeps the tokenized text for later runs

    def check(self) -> None:
        self.blocks.check()
        pin, tokenizer = self.tokenizer_revision, self.tokenizer
        allowed = f"null, because data.tokenizer={tokenizer} is not on the hub"
        require(pin is None or self.loads_tokenizer, "data.tokenizer_revision", pin, allowed)
        require_path("data.cache", self.cache)
        require(bool(self.tokenizer.strip()), "data.tokenizer", self.tokenizer, "bpe, a folder, or a name on the hub")
        try:
            require_files(Path(self.tokenizer))
        except OSError as error:
            raise ConfigError(f"data.tokenizer={self.tokenizer}: cannot be read ({error})") from None
        source = build(self.source, "data.source", trusted=True)
        if self.train_domains is not None:  # of other sources the domains are known when the text has been read
            known = source.present() if hasattr(source, "present") else self.train_domains
            check_train_domains(self.train_domains, known)

    @property
    def blocks(self) -> BlockSettings:
        """The keys that decide which blocks a text becomes."""
        return BlockSettings(**{each.name: getattr(self, each.name) for each in fields(BlockSettings)})

    @property
    def loads_tokenizer(self) -> bool:
        """Whether the tokenizer comes from the hub, not from a folder or from training."""
        return self.tokenizer != "bpe" and not Path(self.tokenizer).is_dir()


@dataclass
class OptimizerConfig:
    """Peak learning rates of Muon, for matrices, and AdamW, for the rest; if `muon_lr` is null, AdamW trains all."""

    muon_lr: float | None = MISSING  # peak learning rate of Muon, for matrices; null: AdamW trains them too
    adamw_lr: float = MISSING  # peak learning rate of AdamW, for all parameters that Muon does not train
    router_lr: float | None = None  # AdamW's rate for routers, with Muon too; null: that of other weights
    experts_lr: float | None = None  # AdamW's rate for routed experts; null: adamw_lr
    momentum: float = 0.95  # decay of the momentum of Muon in a step
    expert_step: str = "equal"  # how far Muon moves an expert: equal | gradient (less for an expert with few tokens)
    beta1: float = 0.9  # decay of AdamW's mean gradient in a step
    beta2: float = 0.95  # decay of AdamW's mean squared gradient in a step
    weight_decay: float = 0.1  # weight decay, in units of the learning rate, of what is trained with weight decay
    warmup: float = 0.1  # fraction of the optimizer steps in which the learning rate rises to its peak
    floor: float = 0.1  # last learning rate, as a fraction of the peak
    clip: float = 1.0  # largest allowed global gradient norm

    def check(self) -> None:
        for name in ("muon_lr", "adamw_lr", "router_lr", "experts_lr", "clip"):
            value = getattr(self, name)
            ok = value is None or (finite(value) and value > 0)
            require(ok, f"optimizer.{name}", value, "a finite number > 0")
        one_of("optimizer.expert_step", self.expert_step, ("equal", "gradient"))
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            require(finite(value) and 0 <= value < 1, f"optimizer.{name}", value, "in [0, 1)")
        for name in ("warmup", "floor"):
            value = getattr(self, name)
            require(finite(value) and 0 <= value <= 1, f"optimizer.{name}", value, "in [0, 1]")
        decay = self.weight_decay
        require(finite(decay) and decay >= 0, "optimizer.weight_decay", decay, "a finite number >= 0")


@dataclass
class LoggerConfig:
    """Settings of the copies of events.jsonl; `to` names the places. All other keys concern W&B.

    mode: "auto" means what WANDB_MODE says; without it, online if there is an API key, otherwise offline.
    """

    to: list[str] = field(default_factory=lambda: ["wandb"])  # where events are copied to: wandb | tensorboard | csv
    mode: str = "auto"  # how W&B is used: auto | online | offline | disabled
    project: str = "moe-routing"  # project on W&B
    entity: str | None = None  # user or team on W&B; null: the one of the API key
    log_model: bool = False  # whether W&B gets the saved model too, as an artifact

    @property
    def to_wandb(self) -> bool:
        """Whether events are copied to W&B, unless WANDB_MODE is "disabled"."""
        return "wandb" in self.to and self.mode != "disabled"

    def check(self) -> None:
        for place in self.to:
            one_of("logger.to", place, ("wandb", "tensorboard", "csv"))
        installed = "tensorboard" not in self.to or importlib.util.find_spec("tensorboard") is not None
        require(installed, "logger.to", "tensorboard", "wandb or csv, or else: pip install -e '.[tensorboard]'")
        modes = ("online", "offline", "disabled")
        one_of("logger.mode", self.mode, ("auto", *modes))
        if self.to_wandb:
            one_of("environment variable WANDB_MODE", os.environ.get("WANDB_MODE") or "online", modes)
            given = os.environ.get("WANDB_RUN_ID") or "none"
            allowed = "1 to 64 letters and digits without accents, - and _"
            require(is_wandb_id(given), "environment variable WANDB_RUN_ID", given, allowed)
        for key, name in (("project", self.project), ("entity", self.entity or "me")):
            ok = bool(name.strip()) and len(name) <= 128 and name.isprintable() and not set(name) & set("/\\#?%:")
            allowed = "a name of W&B: 1 to 128 characters, not only spaces, without / \\ # ? % :"
            require(ok, f"logger.{key}", name, allowed)
        used = self.to_wandb or self.mode in ("auto", "disabled")
        require(used, "logger.mode", self.mode, f"left out, because logger.to={','.join(self.to)} does not name wandb")
        require(
            self.to_wandb or not self.log_model, "logger.log_model", True, "false, because nothing is copied to W&B"
        )


def is_wandb_id(text: str) -> bool:
    """Return whether a text can be the id of a W&B run."""
    return re.fullmatch("[A-Za-z0-9_-]{1,64}", text) is not None
