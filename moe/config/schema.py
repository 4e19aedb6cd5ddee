"""The typed configuration of a run: keys, types, defaults, and allowed ranges."""

import contextlib
import importlib.util
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from omegaconf import MISSING

from moe.checks import ConfigError, describe, finite, one_of, require, unknown
from moe.config import dense_checkpoint, imported, saved
from moe.config.claim import ClaimConfig
from moe.config.classes import build, locate
from moe.config.plugins import Plugin, plugins
from moe.config.trainable import ALL, Trainable, normalized
from moe.data.limits import check_limits, check_train_domains
from moe.distributed import ranks
from moe.files import require_files
from moe.routing.loss_table import LOSSES

# Keys that are not part of a run's identity, so that they may change when a run is resumed. They do not influence what
# a run computes, with two exceptions: `threads` influences the last bits, and `expert_parallel` the random numbers of
# dropout. conf/config.yaml leaves the same keys out of folder names.
FREE_KEYS = (
    "out",
    "threads",
    "save_every",
    "save_model",
    "gradient_checkpointing",
    "expert_parallel",
    "rank_timeout",
    "logger",
    "data.cache",
    "model.offload",
    "claims",
    "question",
)

# Keys that not every run can use, each with the value that switches it off. A run whose router ignores a key has this
# value, and its record names no level of the key. `Config.ignored_keys` says which keys a run ignores.
OFF: dict[str, Any] = {
    "noise": 0.0,
    "capacity": None,
    "drop": "position",
    **{loss.weight: 0.0 for loss in LOSSES.values()},
}

# Such keys without a value that switches them off. A run that ignores them has their defaults.
RATES = frozenset(("optimizer.router_lr", "optimizer.experts_lr"))
DEFAULTED = RATES | {"optimizer.momentum", "optimizer.expert_step"}

# Sizes that a 32-bit floating-point number can have with full precision, apart from 0.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127

# Groups that decide nothing in a model without Mixture-of-Experts layers.
DENSE_IGNORES = ("router", "schedule")


@dataclass
class ModelConfig:
    """Decoder-only transformer. `dim` is the width D, and `ffn` the hidden width F of one expert."""

    dim: int = MISSING  # width D of the hidden states
    heads: int = MISSING  # attention heads; D / heads must be even
    layers: int = MISSING  # decoder layers
    ffn: int = MISSING  # hidden width F of one expert
    num_experts: int = MISSING  # routed experts E of each MoE layer
    expert: str = "silu"  # form of an expert: silu | swiglu | geglu
    shared_experts: int = 0  # experts of the same width that every token uses, beside the routed ones
    first_k_dense_replace: int = 0  # number of first layers that are dense feed-forward instead of MoE
    dense_ffn: int = MISSING  # hidden width of those dense layers
    dropout: float = 0.0  # probability that training sets a hidden value to 0
    embed_scale: bool = True  # multiply embeddings by sqrt(D)
    neftune_noise_alpha: float = 0.0  # uniform noise on embeddings in training, before that factor (2310.05914: 5)
    attention: str = "sdpa"  # implementation of the attention: eager | sdpa | flash_attention_2
    dense: str | None = None  # dense checkpoint to start from, a folder or hub name (`moe.model.upcycle`)
    dense_digest: str | None = None  # its digest, and + those of upcycle_parents; filled in; a given one must match
    upcycle_noise: float = 0.0  # noise on each copied expert, as a share of the std of each matrix (2212.05055)
    upcycle_reset: float = 0.0  # share of each copied expert's hidden units that is drawn anew (2502.19261: 0.5)
    upcycle_split: int = 1  # parts into which each copied MLP is cut, one expert each (2410.07524)
    upcycle_parents: list[str] = field(default_factory=list)  # more like `dense`, for experts in turn (2403.07816)
    checkpoint: str | None = None  # Mixture of Experts to start from: of transformers, or a saved model of ours
    checkpoint_digest: str | None = None  # digest of that model; filled in automatically; a given one must match
    offload: str | None = None  # folder for its experts, read whenever they run: if it exceeds the memory; steps=0 only

    def check(self) -> None:
        one_of("model.expert", self.expert, ("silu", "swiglu", "geglu"))
        one_of("model.attention", self.attention, ("eager", "sdpa", "flash_attention_2"))
        usable = self.attention != "flash_attention_2" or importlib.util.find_spec("flash_attn") is not None
        require(usable, "model.attention", self.attention, "eager or sdpa, unless the package flash-attn is installed")
        for name in ("dim", "heads", "layers", "ffn", "num_experts", "dense_ffn"):
            value = getattr(self, name)
            require(1 <= value <= 10**6, f"model.{name}", value, "a whole number from 1 to 10^6")
        for key in ("dense", "checkpoint"):
            made = getattr(self, key) is not None or getattr(self, f"{key}_digest") is None
            require(made, f"model.{key}_digest", getattr(self, f"{key}_digest"), f"left out without model.{key}")
        one = self.dense is None or self.checkpoint is None
        require(one, "model.checkpoint", self.checkpoint, "left out with model.dense")
        if self.offload is not None:
            require(self.checkpoint is not None, "model.offload", self.offload, "null without model.checkpoint")
            _check_path("model.offload", self.offload)
        divides = self.dim % self.heads == 0 and (self.dim // self.heads) % 2 == 0
        require(
            divides or self.checkpoint is not None,
            "model.heads",
            self.heads,
            f"a divisor of model.dim={self.dim} leaving an even head width",
        )
        require(self.shared_experts >= 0, "model.shared_experts", self.shared_experts, ">= 0")
        dense, allowed = self.first_k_dense_replace, f"between 0 and model.layers={self.layers}"
        require(0 <= dense <= self.layers, "model.first_k_dense_replace", dense, allowed)
        require(finite(self.dropout) and 0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        alpha = self.neftune_noise_alpha
        require(finite(alpha) and alpha >= 0, "model.neftune_noise_alpha", alpha, "a finite number >= 0")
        self._check_upcycling()

    @property
    def continues(self) -> bool:
        """Whether the checkpoint is a saved model of this project."""
        return self.checkpoint is not None and saved.is_saved(self.checkpoint, self.checkpoint_digest)

    @property
    def parents(self) -> list[dense_checkpoint.Parent]:
        """The dense checkpoints to start from."""
        return [] if self.dense is None else dense_checkpoint.parents(vars(self))

    def _check_upcycling(self) -> None:
        off: Any
        for key, off in (("noise", 0), ("reset", 0), ("split", 1), ("parents", [])):
            value = getattr(self, f"upcycle_{key}")
            require(self.dense is not None or value == off, f"model.upcycle_{key}", value, f"{off} without model.dense")
        noise, reset, split = self.upcycle_noise, self.upcycle_reset, self.upcycle_split
        require(finite(noise) and noise >= 0, "model.upcycle_noise", noise, "a finite number >= 0")
        allowed = f"0, or from 1 / model.ffn = {1 / self.ffn:.2g} to 1"
        require(reset == 0 or 1 / self.ffn <= reset <= 1, "model.upcycle_reset", reset, allowed)
        for key in ("num_experts", "shared_experts"):
            allowed = f"a multiple of model.upcycle_split={split}, because a copy has so many experts"
            require(getattr(self, key) % split == 0, f"model.{key}", getattr(self, key), allowed)
        parents = max(1, len(self.parents))
        allowed = f"a multiple of {parents}, the number of dense checkpoints, times model.upcycle_split={split}"
        require(self.num_experts % (parents * split) == 0, "model.num_experts", self.num_experts, allowed)


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
    cache: str = MISSING  # folder that keeps the tokenized text for later runs

    def check(self) -> None:
        check_limits(
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            val_percent=self.val_percent,
            max_val_blocks=self.max_val_blocks,
        )
        pin, tokenizer = self.tokenizer_revision, self.tokenizer
        allowed = f"null, because data.tokenizer={tokenizer} is not on the hub"
        require(pin is None or self.loads_tokenizer, "data.tokenizer_revision", pin, allowed)
        _check_path("data.cache", self.cache)
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
    def loads_tokenizer(self) -> bool:
        """Whether the tokenizer comes from the hub, not from a folder or from training."""
        return self.tokenizer != "bpe" and not Path(self.tokenizer).is_dir()


@dataclass
class OptimizerConfig:
    """Peak learning rates of Muon, for matrices, and AdamW, for the rest; if `muon_lr` is null, AdamW trains all."""

    muon_lr: float | None = MISSING  # peak learning rate of Muon, for matrices; null: AdamW trains them too
    adamw_lr: float = MISSING  # peak learning rate of AdamW, for all parameters that Muon does not train
    router_lr: float | None = None  # AdamW's rate for routers; null: adamw_lr
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

    def check(self) -> None:
        for place in self.to:
            one_of("logger.to", place, ("wandb", "tensorboard", "csv"))
        installed = "tensorboard" not in self.to or importlib.util.find_spec("tensorboard") is not None
        require(installed, "logger.to", "tensorboard", "wandb or csv, or else: pip install -e '.[tensorboard]'")
        modes = ("online", "offline", "disabled")
        one_of("logger.mode", self.mode, ("auto", *modes))
        mirrored = "wandb" in self.to and self.mode != "disabled"
        if mirrored:
            one_of("environment variable WANDB_MODE", os.environ.get("WANDB_MODE") or "online", modes)
            given = os.environ.get("WANDB_RUN_ID") or "none"
            allowed = "1 to 64 letters and digits without accents, - and _"
            require(is_wandb_id(given), "environment variable WANDB_RUN_ID", given, allowed)
        for key, name in (("project", self.project), ("entity", self.entity or "me")):
            ok = bool(name.strip()) and len(name) <= 128 and name.isprintable() and not set(name) & set("/\\#?%:")
            allowed = "a name of W&B: 1 to 128 characters, not only spaces, without / \\ # ? % :"
            require(ok, f"logger.{key}", name, allowed)
        used = mirrored or self.mode in ("auto", "disabled")
        require(used, "logger.mode", self.mode, f"left out, because logger.to={','.join(self.to)} does not name wandb")
        require(mirrored or not self.log_model, "logger.log_model", True, "false, because nothing is copied to W&B")


@dataclass
class Config:
    """The whole configuration of a run. Equal configurations train bitwise equal models on one machine."""

    seed: int = 42  # decides initial weights, order of the training text, noise and dropout
    steps: int = 300  # length of the training, in optimizer steps; 0: only evaluate the model as it starts
    batch_size: int = 16  # sequences per micro-batch
    grad_accum: int = 1  # micro-batches per optimizer step
    noise: float = 0.0  # std of the Gaussian noise on router logits, training only
    lb: float = 0.01  # weight of the load-balance loss, summed over layers
    lb_sequence: float = 0.0  # weight of the load-balance loss of each sequence by itself
    lb_global: float = 0.0  # weight of the load-balance loss of the whole batch of an optimizer step
    lb_document: float = 0.0  # weight of the load-balance loss of each document (conversation) by itself
    importance: float = 0.0  # weight of the squared CV of the experts' summed probabilities
    mutual_information: float = 0.0  # weight of minus the mutual information of token and expert
    z: float = 0.0  # weight of the router z-loss; this loss and the following ones are summed over layers too
    router_entropy: float = 0.0  # weight of the mean entropy of a token's probabilities: makes routing sharper
    gate_variance: float = 0.0  # weight of minus the variance of probabilities over tokens
    simbal: float = 0.0  # weight of the distance of the router rows from orthonormal
    erc: float = 0.0  # weight of the coupling of router rows and experts: each row excites its own expert most
    output_orthogonality: float = 0.0  # weight of the squared cosine between the outputs of a token's experts
    capacity: float | None = field(  # places of an expert / its even share of the assignments; null: no limit
        default=None, metadata={"allowed": "a number > 0, or null for no limit"}
    )
    trainable: str | None = None  # parts and patterns of names that train, joined by +; null: the adapter, or else all
    drop: str = "position"  # which tokens a full expert keeps: by position | score | random; only position is causal
    eval_every: int = 100  # optimizer steps from one validation to the next
    save_every: int = 100  # optimizer steps from one checkpoint to the next
    save_model: str = "last"  # which models are kept: none | last | all (at 10, 25, 50 and 75 % of the steps too)
    threads: int = 1  # CPU threads of the run
    precision: str = "fp32"  # numbers of the forward pass in training: fp32 | bf16
    matmul_precision: str = "highest"  # exactness of fp32 products: highest | high (TF32 on a GPU) | medium (bf16)
    compile: bool = False  # compile the model with torch.compile: faster steps after a slow start
    cuda_graph: bool = False  # on a GPU, start all kernels of a pass at once, where the host need not wait in it
    gradient_checkpointing: bool = False  # compute layers again in the backward pass instead of storing them
    expert_parallel: bool = False  # divide the experts among the ranks instead of copying them
    rank_timeout: int = 600  # seconds that a rank waits for another one before it gives up
    out: str | None = None  # parent of the run folders; null: outputs/, or multirun/ in a sweep
    router: Any = MISSING  # how tokens are sent to experts: a class as router._target_, and its settings
    schedule: Any = MISSING  # how temperature or noise changes: a class as schedule._target_, and its settings
    adapter: Any = field(default_factory=dict)  # new parameters beside frozen ones: a class as adapter._target_
    model: ModelConfig = field(default_factory=ModelConfig)  # sizes of the model
    data: DataConfig = field(default_factory=DataConfig)  # the text, and how it becomes blocks of tokens
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # learning rates and their schedule
    logger: LoggerConfig = field(default_factory=LoggerConfig)  # where the events of a run are copied to
    question: str = ""  # what the experiment asks, in a sentence; the report begins with it
    claims: list[ClaimConfig] = field(default_factory=list)  # planned claims, which the analysis judges

    def __post_init__(self) -> None:
        if self.trainable is not None:
            self.trainable = normalized(self.trainable)

    def check(self) -> None:
        """Raise ConfigError, naming the key, its value and what is allowed, for a run that cannot be trained."""
        for key, value in flatten(self).items():
            fits = not isinstance(value, float) or not finite(value) or value == 0 or SMALLEST <= abs(value) <= LARGEST
            require(fits, key, value, f"0, or between {SMALLEST:.1e} and {LARGEST:.1e} in size, as 32-bit numbers are")
        if self.out is not None:
            _check_path("out", self.out)
        require(0 <= self.steps <= 10**9, "steps", self.steps, "a whole number from 0 to 10^9; 0 only evaluates")
        for name in ("batch_size", "grad_accum", "eval_every", "save_every", "threads", "rank_timeout"):
            require(1 <= getattr(self, name) <= 10**9, name, getattr(self, name), "a whole number from 1 to 10^9")
        require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2^32 - 1")
        for name in ("noise", *(loss.weight for loss in LOSSES.values())):
            value = getattr(self, name)
            require(finite(value) and value >= 0, name, value, "a finite number >= 0")
        ok = self.capacity is None or (finite(self.capacity) and self.capacity > 0)
        require(ok, "capacity", self.capacity, str(allowed_values("capacity")))
        one_of("drop", self.drop, ("position", "score", "random"))
        one_of("save_model", self.save_model, ("none", "last", "all"))
        one_of("precision", self.precision, ("fp32", "bf16"))
        one_of("matmul_precision", self.matmul_precision, ("highest", "high", "medium"))
        self.trains.check()
        allowed = "left out" if self.trains.frozen else f"adapter+{self.trainable}, or left out"
        allowed += ": the adapter would not train, and changes nothing"
        require(not self.adapter or self.trains.may_train("adapter"), "trainable", self.trainable, allowed)
        self._check_ranks()
        self.model.check()
        self.data.check()
        self.logger.check()
        saves = self.save_model != "none" or not self.logger.log_model
        require(saves, "logger.log_model", True, "false with save_model=none")
        self.optimizer.check()
        flash = self.model.attention == "flash_attention_2"
        require(not flash or self.precision == "bf16", "precision", self.precision, "bf16 with flash_attention_2")
        if self.model.dense is not None:
            name, digest = self.model.parents[0]
            dense_checkpoint.check_data(name, digest, tokenizer=self.data.tokenizer, seq_len=self.data.seq_len)
            kind = dense_checkpoint.kind(name, digest)
            for key, value in (("model.dropout", self.model.dropout), ("expert_parallel", self.expert_parallel)):
                allowed = f"left out, because a {kind} runs with the code of transformers"
                require(kind == dense_checkpoint.OURS or not value, key, value, allowed)
        if self.model.checkpoint is not None:
            name, digest = self.model.checkpoint, self.model.checkpoint_digest
            imported.check_data(name, digest, tokenizer=self.data.tokenizer, seq_len=self.data.seq_len)
            require(not self.expert_parallel, "expert_parallel", True, "false with model.checkpoint")
            allowed = "null with steps > 0, because experts on the disk cannot be trained"
            require(self.model.offload is None or self.steps == 0, "model.offload", self.model.offload, allowed)
            allowed = f"null, because {name} is a saved model of this project"
            require(
                self.model.offload is None or not self.model.continues, "model.offload", self.model.offload, allowed
            )
            allowed = "0 with model.checkpoint, whose experts are modules of transformers"
            require(not self.erc or self.model.continues, "erc", self.erc, allowed)
        build(self.schedule, "schedule", trusted=True)
        for number, claim in enumerate(self.claims):
            settings = {*vars(self), *flatten(self)}
            claim.check(f"claims[{number}]", ["variant", *(key for key in settings if not is_free(key))])

    def _check_ranks(self) -> None:
        """Raise ConfigError for a run that cannot be divided among the processes of this launch."""
        number = ranks.world_size()
        allowed = f"a multiple of the {number} processes of this launch, which share the micro-batches of a step"
        require(self.grad_accum % number == 0, "grad_accum", self.grad_accum, allowed)
        deepspeed, fsdp = map(ranks.launched_with, ("DEEPSPEED", "FSDP"))
        require(not deepspeed, "distributed_type", "DEEPSPEED", "MULTI_GPU or FSDP in the launch file")
        allowed = "0 where each rank has a part of each weight (FSDP or expert_parallel)"
        require(not self.erc or not (fsdp or self.expert_parallel), "erc", self.erc, allowed)
        if self.expert_parallel:
            experts, allowed = self.model.num_experts, f"a multiple of the {number} processes, with expert_parallel"
            require(experts % number == 0, "model.num_experts", experts, allowed)
            require(not fsdp, "expert_parallel", True, "false when the launch file says FSDP, which shards experts too")

    def check_router(self) -> None:
        """Raise ConfigError for wrong keys or ranges of the router, and for a schedule or data that do not fit it."""
        router = self.build_router()
        router.check_class()
        self.check_adapter()
        if getattr(locate(self.data.source["_target_"], "data.source", trusted=True), "conversations", False):
            router.require_documents_apart()
        source = self.build_source()
        if hasattr(source, "present"):  # of other sources the domains are known when the text has been read
            router.check_domains(source.present())
        settings = OFF.keys() | router.setting_keys()
        for key in (router.ignores | router.ignores_without_capacity) - settings:
            raise unknown(f"key in ignores of {type(router).__name__}", key, settings)
        if self.schedule.get("knob") == "noise" and "noise" in router.ignored_keys():
            raise ConfigError("schedule.knob=noise: this router ignores noise; use another router")
        if self.schedule.get("knob") == "temperature" and not router.schedulable:
            raise ConfigError(
                "schedule.knob=temperature: this router has no temperature; use router=temperature or router=gumbel"
            )
        if self.capacity is not None and not self.is_dense and "capacity" not in router.ignored_keys():
            most = self.model.num_experts / (router.fixed_k or 1)
            allowed = (
                f"null, or below {most:g}: from there on an expert has room for all tokens, so that none is dropped"
            )
            require(self.capacity < most, "capacity", self.capacity, allowed)
        schedule = build(self.schedule, "schedule", trusted=True)
        for knob, setting in (("temperature", self.temperature), ("noise", self.noise)):
            schedule(knob, setting, 0.0)

    def check_adapter(self) -> None:
        """Raise ConfigError for wrong keys or ranges of the adapter, and for a model that it does not fit."""
        if not self.adapter:
            return
        adapter, name = build(self.adapter, "adapter", trusted=True), self.adapter["_target_"]
        allowed = "left out, because no layer of this model is a Mixture of Experts"
        require(not (self.is_dense and adapter.needs_experts), "adapter._target_", name, allowed)
        whole = not self.expert_parallel and not ranks.launched_with("FSDP")
        allowed = "left out, because each rank has a part of each weight (FSDP or expert_parallel)"
        require(whole or adapter.splits, "adapter._target_", name, allowed)
        adapter.check(dim=self.model.dim)

    def ignored_keys(self) -> frozenset[str]:
        """Return the keys that change nothing in this run.

        These are the keys of `OFF` and of the router itself that the router ignores, such as router.gate, `drop` if
        there is no capacity limit, and those of `DEFAULTED` that this optimizer does not use, or that concern weights
        which this model does not have. If no layer is a Mixture of Experts, they are all keys of `OFF`, and the groups
        in `DENSE_IGNORES`. Otherwise this imports torch.
        """
        muon = self.optimizer.muon_lr is not None
        unused = set(RATES) if muon else {"optimizer.momentum", "optimizer.expert_step"}
        frozen = self.without_effect()
        unused |= frozen & DEFAULTED
        if self.is_dense:
            return frozenset((*OFF, *DENSE_IGNORES, *RATES, "optimizer.expert_step", *unused))
        if self.model.num_experts == 1:
            unused.add("optimizer.expert_step")
        router = self.build_router()
        if not any(p.requires_grad for p in router.parameters()) and not router.weights_elsewhere:
            unused.add("optimizer.router_lr")
        ignored = router.ignored_keys() | frozen
        if self.capacity is None or "capacity" in ignored:
            ignored |= {"drop"} | router.ignores_without_capacity
        return frozenset(ignored & {*OFF, *(f"router.{name}" for name in self.router)} | unused)

    def without_effect(self) -> frozenset[str]:
        """Return the keys that change nothing in this run because parameters are frozen (`trainable`)."""
        return self.trains.without_effect(layers=self.model.layers, dense_layers=self.model.first_k_dense_replace)

    def settings_in_effect(self) -> dict[str, Any]:
        """Return `identity`, with the values that mean the same as the given ones. This imports torch, unless dense."""
        same = {} if self.is_dense else self.build_router().same_as
        equivalent = {f"router.{name}": value for name, value in same.items()}
        return self.identity() | equivalent | {"trainable": str(self.trains)}

    def unused_keys(self) -> frozenset[str]:
        """Return the sizes of layers that this model does not have, and what the source of the text does not use.

        They change nothing in this run, and yet stay in its record, because another model or text uses them.
        """
        source = getattr(self.build_source(), "unused", ())
        unused = {f"data.source.{name}" for name in source}
        if self.is_dense:
            upcycling = (f"model.upcycle_{key}" for key in ("noise", "reset", "split"))
            return frozenset(("model.num_experts", "model.ffn", "model.shared_experts", *upcycling, *unused))
        return frozenset(unused if self.model.first_k_dense_replace else {"model.dense_ffn", *unused})

    def build_source(self) -> Any:
        """Return the source of the text, which reads nothing yet."""
        return _source(json.dumps(self.data.source))

    def without(self, ignored: frozenset[str]) -> "Config":
        """Return this configuration without these keys. Settings of router and optimizer get their defaults."""
        used = {name: value for name, value in self.router.items() if f"router.{name}" not in ignored}
        defaults: dict[str, Any] = {
            f.name: f.default for f in fields(OptimizerConfig) if f"optimizer.{f.name}" in ignored
        }
        off = {key: OFF[key] for key in OFF.keys() & ignored}
        return replace(self, router=used, optimizer=replace(self.optimizer, **defaults), **off)

    def build_router(self) -> Any:
        """Return the router of one layer, without memory for its parameters. This imports torch."""
        import torch

        with torch.device("meta"):
            return build(self.router, "router", self.model.dim, self.model.num_experts, trusted=True)

    def plugins(self, *keys: str) -> dict[str, Plugin]:
        """Return the code from outside of this project that this run needs, by package. See `foreign_classes`.

        These are the packages of the classes and of their base classes, with what they import from beside them. keys:
        those of the classes that are asked for; by default all.
        """
        found = {key: name for key, name in self.foreign_classes().items() if key in keys or not keys}
        bases = [base for key, name in found.items() for base in locate(name, key, trusted=True).__mro__]
        return plugins(name.partition(".")[0] for name in [*found.values(), *(base.__module__ for base in bases)])

    def foreign_classes(self) -> dict[str, str]:
        """Return the names of the classes of this run that are not of this project, by the key that names each."""
        specs = {"data.source": self.data.source}
        inner = self.adapter.get("router") if self.adapter else None
        specs |= {"adapter": self.adapter} if self.adapter else {}
        specs |= {"adapter.router": inner} if isinstance(inner, dict) else {}
        specs |= {} if self.is_dense else {"router": self.router, "schedule": self.schedule}
        names = {key: str(spec["_target_"]) for key, spec in specs.items() if "_target_" in spec}
        return {key: name for key, name in names.items() if not name.startswith("moe.")}

    def require_trust(self, way: str, *keys: str) -> None:
        """Raise ConfigError if a class at one of `keys` is not of this project. way: how the user trusts it."""
        for key, name in self.foreign_classes().items():
            if key in keys:
                what = "is not a class of this project, and its code runs only if you trust it"
                raise ConfigError(f"{key}._target_={name}: {what}: {way}; see docs/security.md")

    @property
    def trains(self) -> Trainable:
        """Which parameters train."""
        default = "adapter" if self.adapter else ALL
        return Trainable.of(default if self.trainable is None else self.trainable)

    @property
    def has_base(self) -> bool:
        """Whether training starts from a checkpoint, not from random weights."""
        return self.steps > 0 and (self.model.dense is not None or self.model.checkpoint is not None)

    @property
    def is_dense(self) -> bool:
        """Whether no layer is a Mixture of Experts."""
        return self.model.first_k_dense_replace == self.model.layers

    @property
    def temperature(self) -> float:
        """The router's own temperature, at which a temperature schedule ends."""
        return float(self.router.get("temp", 1.0))

    def identity(self) -> dict[str, Any]:
        """Return the keys that decide what a run computes, flat: {"model.dim": 128, ...}."""
        flat = {key: value for key, value in flatten(self).items() if not is_free(key)}
        unused = DENSE_IGNORES if self.is_dense else ()
        return {key: value for key, value in flat.items() if key.partition(".")[0] not in unused}


class Grid(NamedTuple):
    """Runs that belong together: all combinations of levels of some factors, with several seeds.

    name: the experiment, followed by what distinguishes the grid from the experiment's own. factors: the keys that it
    varies, without the seed. fixed: other settings that differ from those of the experiment. cells: the names of the
    run folders, in the order of the levels. search: such as "minimize val/loss", if results decided which combinations
    of levels there are; such runs are no factorial grid.
    """

    name: str
    factors: list[str]
    fixed: dict[str, Any]
    cells: list[str]
    search: str | None = None


class Cell(NamedTuple):
    """One cell of a sweep, or a single run.

    config: its configuration. folder: its run folder. choices: the option chosen from each group. ignored: the keys
    that do not apply to this run (`Config.ignored_keys`); they are switched off in `config`. overrides: the words from
    which a launcher composes this cell again. grid: all cells of the command; None for a single run.
    """

    config: Config
    folder: Path
    experiment: str
    choices: dict[str, str | None]
    ignored: frozenset[str] = frozenset()
    overrides: tuple[str, ...] = ()
    grid: Grid | None = None

    def identity(self) -> dict[str, Any]:
        """Return the keys that decide what the run computes, flat, without those that do not apply to it."""
        return {key: value for key, value in self.config.identity().items() if key not in self.ignored}


@lru_cache(maxsize=8)  # the cells of a sweep have the same few sources
def _source(spec: str) -> Any:
    return build(json.loads(spec), "data.source", trusted=True)


def _check_path(key: str, path: str) -> None:
    """Raise ConfigError for a path that cannot be one, or that begins with ~ where there is no home directory."""
    require(bool(path.strip()) and "\0" not in path, key, path, "a path")
    require("${" not in path, key, path, "a path without ${")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(os.path.expanduser(path))  # raises OSError for a name that is too long
    require(os.path.expanduser(path)[:1] != "~", key, path, "a path; there is no home for ~")


@cache
def allowed_values(key: str) -> str | None:
    """Return in words what a flat key such as "model.dim" may be; None if no field of `Config` has this name."""
    kind, _, name = key.rpartition(".")
    holder = get_type_hints(Config).get(kind, Config) if kind else Config
    found = next((f for f in fields(holder) if f.name == name), None) if is_dataclass(holder) else None
    if found is None:
        return None
    return str(found.metadata.get("allowed", describe(get_type_hints(holder)[name])))


def fingerprint(identity: dict[str, Any]) -> str:
    """Return a text that is equal for equal identities, however their numbers are written: 1 is 1.0."""

    def plain(value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps({key: plain(value) for key, value in sorted(identity.items())})


@cache
def is_free(key: str) -> bool:
    """Return whether a flat key is one of `FREE_KEYS` or lies below one."""
    return any(f"{key}.".startswith(f"{free}.") for free in FREE_KEYS)


def is_wandb_id(text: str) -> bool:
    """Return whether a text can be the id of a W&B run."""
    return re.fullmatch("[A-Za-z0-9_-]{1,64}", text) is not None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested dict, or a dataclass, as one dict with dotted keys: {"a": {"b": 1}} becomes {"a.b": 1}.

    Dataclasses in a list, such as claims, become dicts.
    """
    flat: dict[str, Any] = {}
    for key, value in (vars(tree) if is_dataclass(tree) else tree).items():
        if isinstance(value, dict) or is_dataclass(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            records = isinstance(value, list) and any(map(is_dataclass, value))
            flat[f"{prefix}{key}"] = [asdict(item) for item in value] if records else value
    return flat
