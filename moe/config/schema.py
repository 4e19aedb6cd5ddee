"""The typed configuration of a run: keys, types, defaults, and allowed ranges."""

import json
from collections.abc import Mapping
from dataclasses import MISSING as FIELD_MISSING
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any, get_type_hints

from omegaconf import MISSING

from moe.checks import ConfigError, describe, finite, one_of, require, require_path
from moe.config import layer_experts, layer_routers
from moe.config.checkpoints import dense as dense_checkpoint
from moe.config.checkpoints import imported
from moe.config.claim import ClaimConfig
from moe.config.classes import build, locate
from moe.config.effect import check_effects
from moe.config.keys import DENSE_IGNORES, OF_EXPERTS, OFF, flatten, is_free
from moe.config.model import ModelConfig
from moe.config.plugins import Plugin, plugins
from moe.config.question import parts_of
from moe.config.sections import DataConfig, LoggerConfig, OptimizerConfig
from moe.config.trainable import ALL, Trainable, normalized
from moe.distributed import ranks
from moe.routing.loss_table import LOSSES

# Sizes that a 32-bit floating-point number can have with full precision, apart from 0.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


@dataclass
class Config:
    """The whole configuration of a run. Equal configurations train bitwise equal models on one machine."""

    seed: int = 42  # decides initial weights, order of the training text, noise and dropout
    init_seed: int | None = None  # decides the initial weights alone; null: seed
    data_seed: int | None = None  # decides the order of the training text, noise and dropout alone; null: seed
    steps: int = 300  # length of the training, in optimizer steps; 0: only evaluate the model as it starts
    batch_size: int = 16  # sequences per micro-batch
    grad_accum: int = 1  # micro-batches per optimizer step
    noise: float = 0.0  # std of the Gaussian noise on router logits, training only
    lb: float = 0.01  # weight of the load-balance loss, summed over layers; 0 with routers that balance in another way
    lb_sequence: float = 0.0  # weight of the load-balance loss of each sequence by itself
    lb_global: float = 0.0  # weight of the load-balance loss of the whole batch of an optimizer step
    lb_document: float = 0.0  # weight of the load-balance loss of each document (conversation) by itself
    lb_first: float = 0.0  # weight of the load-balance loss of the most probable expert of each token
    importance: float = 0.0  # weight of the squared CV of the experts' summed probabilities
    load: float = 0.0  # weight of the squared CV of the experts' loads that are expected under `noise`
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
    precision: str = "fp32"  # numbers of the forward pass in training: fp32 | bf16 | auto (what a pass is faster in)
    matmul_precision: str = "highest"  # exactness of fp32 products: highest | high (TF32 on a GPU) | medium (bf16)
    compile: bool = False  # compile the model with torch.compile: faster steps after a slow start
    cuda_graph: bool = True  # on a GPU, start all kernels of a pass at once, where the host need not wait in it
    gradient_checkpointing: bool = False  # compute layers again in the backward pass instead of storing them
    expert_parallel: bool = False  # divide the experts among the ranks instead of copying them
    rank_timeout: int = 600  # seconds that a rank waits for another one before it gives up
    out: str | None = None  # parent of the run folders; null: outputs/, or multirun/ in a sweep
    results: str | None = None  # parent of sweeps whose results choose a value of this one; null: that of this one
    router: Any = MISSING  # how tokens are sent to experts: a class as router._target_, and its settings
    schedule: Any = MISSING  # how temperature or noise changes: a class as schedule._target_, and its settings
    adapter: Any = field(default_factory=dict)  # new parameters beside frozen ones: a class as adapter._target_
    model: ModelConfig = field(default_factory=ModelConfig)  # sizes of the model
    data: DataConfig = field(default_factory=DataConfig)  # the text, and how it becomes blocks of tokens
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # learning rates and their schedule
    logger: LoggerConfig = field(default_factory=LoggerConfig)  # where the events of a run are copied to
    question: Any = ""  # what the experiment asks: a sentence, or its parts, each with the claims that answer it
    planned_seeds: int | None = field(  # seeds after which the report decides; null: those of the first report
        default=None, metadata={"allowed": "a whole number from 2, or null"}
    )
    planned_effect: str | None = None  # smallest difference that matters, for which the seeds were planned
    claims: list[ClaimConfig] = field(default_factory=list)  # planned claims, which the analysis judges
    tune: Any = None  # keys that a sweep tunes for each setting, and their values: {optimizer.muon_lr: [0.01, 0.02]}
    tune_seeds: list[int] = field(default_factory=list)  # seeds that choose tuned values, or chose one before

    def __post_init__(self) -> None:
        if self.trainable is not None:
            self.trainable = normalized(self.trainable)

    def check(self) -> None:
        """Raise ConfigError, naming the key, its value and what is allowed, for a run that cannot be trained."""
        for key, value in flatten(self).items():
            fits = not isinstance(value, float) or not finite(value) or value == 0 or SMALLEST <= abs(value) <= LARGEST
            require(fits, key, value, f"0, or between {SMALLEST:.1e} and {LARGEST:.1e} in size, as 32-bit numbers are")
        for name in ("out", "results"):
            if (path := getattr(self, name)) is not None:
                require_path(name, path)
        require(0 <= self.steps <= 10**9, "steps", self.steps, "a whole number from 0 to 10^9; 0 only evaluates")
        for name in ("batch_size", "grad_accum", "eval_every", "save_every", "threads", "rank_timeout"):
            require(1 <= getattr(self, name) <= 10**9, name, getattr(self, name), "a whole number from 1 to 10^9")
        require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2^32 - 1")
        for name in ("init_seed", "data_seed"):
            value = getattr(self, name)
            allowed = "between 0 and 2^32 - 1, or null for the value of seed"
            require(value is None or 0 <= value < 2**32, name, value, allowed)
        for name in ("noise", *(loss.weight for loss in LOSSES.values())):
            value = getattr(self, name)
            require(finite(value) and value >= 0, name, value, "a finite number >= 0")
        ok = self.capacity is None or (finite(self.capacity) and self.capacity > 0)
        require(ok, "capacity", self.capacity, str(allowed_values("capacity")))
        noisy = self.noise > 0 or self.schedule.get("knob") == "noise"
        allowed = "0 without noise: it is about the load if the noise were drawn again, as with noise=0.1"
        require(not self.load or noisy, "load", self.load, allowed)
        one_of("drop", self.drop, ("position", "score", "random"))
        one_of("save_model", self.save_model, ("none", "last", "all"))
        one_of("precision", self.precision, ("fp32", "bf16", "auto"))
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
        same = self.model.latent_dim is None and self.model.router_input == "feed_forward"
        allowed = "0 unless routers and experts read the same vectors (model.latent_dim, model.router_input)"
        require(not self.erc or same, "erc", self.erc, allowed)
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
        enough = self.planned_seeds is None or 2 <= self.planned_seeds <= 10**6
        require(enough, "planned_seeds", self.planned_seeds, "a whole number from 2 to 10^6, or null")
        if self.planned_effect is not None:
            check_effects("planned_effect", self.planned_effect, (claim.metric for claim in self.claims))
        parts_of(self.question)
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
            allowed = f"a multiple of the {number} processes, with expert_parallel"
            require(self.model.num_experts % number == 0, "model.num_experts", self.model.num_experts, allowed)
            divides = all(experts % number == 0 for experts in self.model.experts_of_layers)
            require(divides, layer_experts.KEY, self.model.experts_by_layer, f"of numbers that are each {allowed}")
            require(not fsdp, "expert_parallel", True, "false when the launch file says FSDP, which shards experts too")

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

    def without_effect(self) -> frozenset[str]:
        """Return the keys that change nothing in this run because parameters are frozen (`trainable`).

        With an adapter that trains this imports torch.
        """
        acts_on, muon = frozenset[str](), ""
        if self.adapter and self.trains.may_train("adapter"):
            adapter = build(self.adapter, "adapter", trusted=True)
            acts_on, muon = adapter.acts_on, adapter.muon
        layers, dense_layers = self.model.layers, self.model.first_k_dense_replace
        return self.trains.without_effect(layers=layers, dense_layers=dense_layers, acts_on=acts_on, muon=muon)

    @property
    def seeds(self) -> tuple[int, int]:
        """The seed of the initial weights, and that of the order of the text, noise and dropout."""
        init, data = (self.seed if seed is None else seed for seed in (self.init_seed, self.data_seed))
        return init, data

    def unused_keys(self) -> frozenset[str]:
        """Return the sizes of layers that this model does not have, and what the source of the text does not use.

        They change nothing in this run, and yet stay in its record, because another model or text uses them.
        """
        source = getattr(self.build_source(), "unused", ())
        unused = {f"data.source.{name}" for name in source}
        if self.is_dense:
            upcycling = (f"model.upcycle_{key}" for key in ("noise", "reset", "split"))
            sizes = (f"model.{key}" for key in OF_EXPERTS)
            return frozenset((*sizes, *upcycling, *unused))
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
        """The temperature of the routers that have one, at which a temperature schedule ends."""
        return layer_routers.temperature(self.model.routers, self.router)

    def identity(self) -> dict[str, Any]:
        """Return the keys that decide what a run computes, flat: {"model.dim": 128, ...}.

        In `model.routers` and `model.experts_by_layer`, layers are left out that are like the others anyway.
        """
        flat, model = {key: value for key, value in flatten(self).items() if not is_free(key)}, self.model
        if model.routers is not None:
            flat["model.routers"] = layer_routers.in_effect(model.routers, self.router)
        if model.experts_by_layer is not None:
            flat[layer_experts.KEY] = layer_experts.in_effect(model.experts_by_layer, model.num_experts)
        unused = DENSE_IGNORES if self.is_dense else ()
        return {key: value for key, value in flat.items() if key.partition(".")[0] not in unused}


@lru_cache(maxsize=8)  # the cells of a sweep have the same few sources
def _source(spec: str) -> Any:
    return build(json.loads(spec), "data.source", trusted=True)


@cache
def allowed_values(key: str) -> str | None:
    """Return in words what a flat key such as "model.dim" may be; None if no field of `Config` has this name."""
    kind, _, name = key.rpartition(".")
    holder = get_type_hints(Config).get(kind, Config) if kind else Config
    found = next((f for f in fields(holder) if f.name == name), None) if is_dataclass(holder) else None
    if found is None:
        return None
    return str(found.metadata.get("allowed", describe(get_type_hints(holder)[name])))


@cache
def defaults(holder: Any = Config, prefix: str = "") -> Mapping[str, Any]:
    """Return the default of each key of the configuration, or of another dataclass, flat, if it has one.

    The values are shared between callers, who must not change them.
    """
    types, found = get_type_hints(holder), dict[str, Any]()
    for each in fields(holder):
        if is_dataclass(types[each.name]):
            found |= defaults(types[each.name], f"{prefix}{each.name}.")
        elif each.default_factory is not FIELD_MISSING:
            found[f"{prefix}{each.name}"] = each.default_factory()
        elif each.default not in (FIELD_MISSING, MISSING):
            found[f"{prefix}{each.name}"] = each.default
    return MappingProxyType(found)


def without_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity without free keys and without keys that have their default.

    So it stays the same when a key is added to the configuration or becomes free.
    """
    default = defaults()
    return {
        key: value
        for key, value in identity.items()
        if not is_free(key) and not (key in default and default[key] == value)
    }
