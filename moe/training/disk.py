"""Compute what a run will occupy on disk at most, from the shapes of its model, before it is trained."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config.schema import Config
from moe.data.tokenizer import pretrained_tokenizer
from moe.metrics.catalog import ROUTING_METRICS, select
from moe.metrics.metric import Metric
from moe.model.architecture import MoEConfig
from moe.model.causal_lm import MoEForCausalLM
from moe.runs import checkpoint, traces
from moe.runs.events import SERIES
from moe.training import probe
from moe.training.optim import Muon, build_optimizers

# Sizes in bytes that were measured, because they do not follow from shapes.
TENSOR_IN_MODEL, TENSOR_IN_CHECKPOINT = 120, 450  # what a file needs for a tensor, beside its numbers
TOKEN = 64  # one token of a trained tokenizer: its entries in vocabulary and merges
NUMBER = 20  # a number in JSON
MODEL_FILES, RUN_JSON = 2_000, 16_000  # the configuration files beside a saved model; run.json
MIRROR = 100_000  # what W&B and TensorBoard write beside the numbers of events
DOCUMENTS = 2_000  # for validation, if the number of blocks is not limited
DOMAINS = 8  # domains of the text, if the configuration does not list them


class Disk(NamedTuple):
    """Bytes on disk. A finished run keeps `models` and `logs`; one that trains needs `checkpoints` in addition.

    models: the saved model and the models of milestones. logs: all other files. checkpoints: as many as can exist while
    the last one is being written.
    """

    models: int
    logs: int
    checkpoints: int


def needed(config: Config) -> Disk:
    """Return what a run occupies at most. Raises ValueError for a tokenizer that cannot be loaded."""
    shapes = _shapes(repr((config.model, config.router, config.optimizer.muon_lr, config.data)), Hidden(config))
    earlier = len(traces.milestones(config.steps) - {config.steps})
    models = {"none": 0, "last": 1, "all": 1 + earlier}[config.save_model]
    saved = (config.steps - 1) // config.save_every + (config.steps > 1)  # a signal adds one at any step
    return Disk(
        models=models * shapes.model,
        logs=_logs(config, layers=shapes.layers),
        checkpoints=max(0, min(saved, checkpoint.KEEP + 1)) * shapes.checkpoint,
    )


def statement(configs: Sequence[Config]) -> str:
    """Return a line that says what these runs will occupy on disk at most."""
    each = [needed(config) for config in configs]
    models, logs = sum(disk.models for disk in each), sum(disk.logs for disk in each)
    named = "saved models" if any(config.save_model != "none" for config in configs) else "no saved model"
    parts = f"{named} {_size(models)}, logs {_size(logs)}" if models else f"{named}, logs {_size(logs)}"
    who, one = ("this run keeps", "it") if len(each) == 1 else (f"these {len(each)} runs keep", "a run")
    checkpoints = max(disk.checkpoints for disk in each)
    more = f"; while {one} trains, its checkpoints need up to {_size(checkpoints)} more" if checkpoints else ""
    return f"disk: {who} at most {_size(models + logs)} ({parts}){more}"


class Hidden(NamedTuple):
    """A configuration, equal to every other one, so that a cache tells configurations apart by another argument."""

    config: Config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hidden)

    def __hash__(self) -> int:
        return 0


class _Shapes(NamedTuple):
    """Bytes of one saved model and of one checkpoint, and the number of MoE layers."""

    model: int
    checkpoint: int
    layers: int


@lru_cache
def _shapes(key: str, hidden: Hidden) -> _Shapes:
    config = hidden.config
    if config.data.vocab_size is not None:
        vocab_size = config.data.vocab_size
        tokenizer = TOKEN * vocab_size
    else:
        loaded = pretrained_tokenizer(config.data.tokenizer, config.data.tokenizer_revision)
        vocab_size, tokenizer = len(loaded), len(loaded.backend_tokenizer.to_str(pretty=True).encode())
    settings = MoEConfig.of(config.model, config.router, vocab_size=vocab_size, seq_len=config.data.seq_len)
    with torch.device("meta"):  # shapes without memory
        model = MoEForCausalLM(settings, trusted=True)
    weights = list({id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values())
    states = [p for optimizer in build_optimizers(model, config.optimizer) for p in _states(optimizer)]
    return _Shapes(
        _bytes(weights, TENSOR_IN_MODEL) + tokenizer + MODEL_FILES,
        _bytes([*weights, *states], TENSOR_IN_CHECKPOINT),
        len(model.moe_layers),
    )


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return tensors of the shapes that an optimizer stores after its first step."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, Muon):
        return params  # the momentum
    return [*params, *params, *(torch.empty(()) for _ in params)]  # two moments, and a count of steps


def _bytes(tensors: Sequence[Tensor], each: int) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + each * len(tensors)


def _logs(config: Config, *, layers: int) -> int:
    steps, evaluations = config.steps, config.steps // config.eval_every + 2
    experts = max(map(config.model.experts_of, config.model.moe_layers), default=0)
    groups = ["router loss"] + ["capacity limit"] * (config.capacity is None)
    step = [metric.name for metric in select(written="step") if metric.group not in groups]
    step += [f"train/{name}" for name in ROUTING_METRICS]
    at_evaluation = [metric for metric in select(written="evaluation") if metric.group not in groups]
    domains = len(config.data.source.get("domains", range(DOMAINS)))
    names = [name for metric in at_evaluation for name in _variants(metric, layers=layers, domains=domains)]
    numbers = NUMBER * (layers * experts + 10)  # the lists
    evaluation = _json(names) + numbers
    series = 2 * NUMBER * (len(SERIES) * (1 + layers) + (1 + layers) * experts + 4)  # a line for each number
    events = steps * _json(step) + evaluations * evaluation
    trace = layers * probe.BLOCKS * config.data.seq_len * experts // 8 + 1000
    documents = 2 * 8 * (config.data.max_val_blocks or DOCUMENTS) + 1000  # there are no more of them than blocks
    histograms = 2 * evaluations * numbers  # heights and edges
    copies = {"wandb": events + histograms + MIRROR, "tensorboard": 2 * events + MIRROR, "csv": events}
    if config.logger.mode == "disabled":
        del copies["wandb"]
    mirrors = sum(copies.get(place, 0) for place in config.logger.to)
    at_end = evaluation + evaluations * series + documents + RUN_JSON
    return events + mirrors + at_end + len(traces.milestones(steps)) * trace


def _variants(metric: Metric, *, layers: int, domains: int) -> list[str]:
    suffixes = {"layerNN": layers, "<domain>": domains, "decileN": 10}
    count = 1 + sum(suffixes.get(variant, 1) for variant in metric.variants)
    return [f"{metric.name}/layerNN"] * count


def _json(names: Iterable[str]) -> int:
    """Return the bytes of a JSON object that has a number for each name."""
    return sum(len(name) + NUMBER + len('"": , ') for name in names)


def _size(bytes: int) -> str:
    """Return a number of bytes with three significant digits."""
    value, unit = next(
        ((bytes / 10**n, name) for n, name in ((9, "GB"), (6, "MB")) if bytes >= 10**n), (bytes / 1e3, "kB")
    )
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
