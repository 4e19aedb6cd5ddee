"""Time a training step, alone and in the training loop, beside a dense model and Mixtral, and time its parts."""

import argparse
import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGTERM
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from moe.bench.layer import mixtral_config
from moe.bench.questions import Shape
from moe.bench.timing import (
    UNCOUNTED,
    TimingTable,
    Variant,
    medians,
    now,
    product_flops,
    relative_table,
    time_call,
    timed_device,
)
from moe.checks import ConfigError, require
from moe.config import layer_experts
from moe.config.schema import Config
from moe.config.words import key_of, with_words
from moe.launch.command_line import read_cells
from moe.model.causal_lm import MoEForCausalLM
from moe.model.cost import flops_per_token
from moe.routing import losses
from moe.routing.decision import LABELS
from moe.routing.dispatch import dispatch
from moe.routing.measurement import collect_stats
from moe.runs.events import EventLog, RunListener
from moe.runs.signals import Interrupted, Signals
from moe.training.loop import train
from moe.training.objective import total_loss
from moe.training.optim import build_optimizers
from moe.training.precision import choose
from moe.training.setup import build_model, prepare_data, tell_text

SWIGLU = ("logger.mode=disabled", "model.expert=swiglu")
BEYOND_END = ("steps", "eval_every", "save_every")  # none of these happens while the steps are timed
IN_TRAINING = "MoE in training: Accelerate, clipping, metrics, event log"


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    if given := [word for word in arguments.overrides if key_of(word) in (*BEYOND_END, "out")]:
        raise ConfigError(f"{given[0]}: must be left out, because the benchmark sets it")
    with tempfile.TemporaryDirectory() as folder:
        seconds, tokens, flops, dtype = measure_steps(arguments.overrides, rounds=arguments.rounds, folder=Path(folder))
    parts = {name: seconds.pop(name) for name in list(seconds) if name.startswith("part: ")}
    run = ", ".join(arguments.overrides) or "model=tiny"
    yield relative_table(f"training step: {run}, SwiGLU", seconds, to="dense")
    shares = [{"part": name[6:], "share": value / seconds[IN_TRAINING]} for name, value in parts.items()]
    yield TimingTable("shares of that step in training", shares)
    flops_per_second = flops / seconds[IN_TRAINING]
    limit = product_flops(dtype)
    speed = {"tokens": tokens, "tokens / s": tokens / seconds[IN_TRAINING], "TFLOP / s": flops_per_second / 1e12}
    yield TimingTable(
        "speed in training, without Muon's FLOPs", [speed | {"of a large product": flops_per_second / limit}]
    )


class StepTimes(NamedTuple):
    """Times of a training step.

    seconds: the median of each variant. Names of parts of the step in training begin with "part: ".
    tokens, flops: the tokens of the step in training, and its FLOPs without Muon's.
    dtype: the type in which it multiplies matrices.
    """

    seconds: dict[str, float]
    tokens: int
    flops: float
    dtype: torch.dtype


def measure_steps(overrides: list[str], *, rounds: int, folder: Path) -> StepTimes:
    """Time the steps of a run with these overrides.

    The real training loop runs, and the other variants are timed whenever it reports a step. The configured run is 100
    times as long and is stopped early. Evaluations, traces and checkpoints then do not occur in between; they would be
    counted as steps.
    """
    steps = rounds + UNCOUNTED
    beyond_end = [f"{key}={100 * steps}" for key in BEYOND_END]
    cells = read_cells(with_words(with_words(SWIGLU, *overrides), *beyond_end, f"out={folder}"))
    assert cells is not None, overrides
    by_layer, allowed = (
        cells[0].config.model.experts_by_layer,
        "null, because Mixtral's layers have one number of experts",
    )
    require(by_layer is None, layer_experts.KEY, by_layer, allowed)
    config, _ = choose(cells[0].config, folder / "run")
    signals = Signals()
    with EventLog(folder / "parts.jsonl", step=0) as events, suppress(Interrupted):
        turns = Turns([*step_variants(config), *part_variants(config, events)], signals, stop_after=steps)
        train(config, folder, signals=signals, listeners=[turns])
    tokens = config.batch_size * config.grad_accum * config.data.seq_len
    flops = 3.0 * tokens * flops_per_token(_model(config), config.data.seq_len)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return StepTimes(medians(turns.seconds), tokens, flops, dtype)


class Turns(RunListener):
    """Listener of the training loop that times each of its steps, then times every variant once, and finally asks the
    loop to stop."""

    def __init__(self, variants: list[Variant], signals: Signals, *, stop_after: int) -> None:
        self.variants = variants
        self.signals = signals
        self.stop_after = stop_after
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.began = now()

    def log(self, step: int, values: dict[str, Any]) -> None:
        if "train/loss" in values:
            self.seconds[IN_TRAINING].append(now() - self.began)
            for name, run in self.variants:
                self.seconds[name].append(time_call(run))
        if step == self.stop_after:
            self.signals.received = SIGTERM
        self.began = now()


def step_variants(config: Config) -> list[Variant]:
    """Return bare steps (forward, backward, optimizers) on random tokens: of a dense model of equal active FLOPs, of
    the configured MoE model, and of Mixtral."""
    moe_model = _model(config)
    sizes = config.model
    k = fmean(layer.router.experts_per_token(config.data.seq_len) for layer in moe_model.moe_layers)
    dense = copy.deepcopy(config)
    dense.model.first_k_dense_replace = sizes.layers
    dense.model.dense_ffn = round(k * sizes.ffn)
    shape, domains = Shape(sizes.num_experts, round(k), sizes.dim, sizes.ffn, 0), len(prepare_data(config).domains)
    attention = {
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
    }
    mixtral = MixtralForCausalLM(
        mixtral_config(shape, "grouped_mm", vocab_size=moe_model.config.vocab_size, **attention)
    )
    nn.Module.to(mixtral, moe_model.device)
    return [
        ("dense", bare_step(_model(dense), config)),
        ("MoE, bare loop", bare_step(moe_model, config, domains=domains)),
        ("MoE, bare loop, all logits at once", bare_step(moe_model, config, domains=domains, all_logits=True)),
        ("Mixtral, grouped_mm, bare loop", bare_step(mixtral, config)),
    ]


def part_variants(config: Config, events: EventLog) -> list[Variant]:
    """Return functions that carry out one part of a training step each. Statistics and losses cover one batch."""
    model, domains = _model(config), len(prepare_data(config).domains)
    optimizers = build_optimizers(model, config.optimizer)
    step = bare_step(model, config, domains=domains)
    step()  # Leaves gradients for the optimizers.
    ids = _random_ids(model, config)
    with torch.no_grad():
        layers = model(ids, told=_random_labels(model, config, domains)).routing or []
    seq_len, experts = config.data.seq_len, config.model.num_experts
    routings = [routing for layer in layers for routing in layer]
    dispatches = [dispatch(routing, experts, capacity=config.capacity, seq_len=seq_len) for routing in routings]
    line = {f"train/routing/{i}": i / 7 for i in range(100)}
    both = list(zip(routings, dispatches, strict=True))
    return [
        *((f"part: {type(optimizer).__name__}", optimizer.step) for optimizer in optimizers),
        ("part: statistics", lambda: [collect_stats(r, d, ids.numel(), seq_len=seq_len) for r, d in both]),
        ("part: auxiliary losses", lambda: [losses.auxiliary(r, d.offered, seq_len=seq_len) for r, d in both]),
        (
            "part: dispatch",
            lambda: [dispatch(r, experts, capacity=config.capacity, seq_len=seq_len) for r in routings],
        ),
        ("part: a line of the event log", lambda: events.write("train", 1, line)),
    ]


def bare_step(model: nn.Module, config: Config, *, domains: int = 1, all_logits: bool = False) -> Callable[[], None]:
    """Return a function that runs forward, backward and optimizers, with the auxiliary losses if it is our model.

    domains: of so many the random texts are, for routers that are told the domain.
    all_logits: the loss is that of all logits at once, even if the model would compute it in chunks in training.

    Gradients stay until the next call.
    """
    optimizers = build_optimizers(model, config.optimizer)
    model.train()

    def run() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        ids = _random_ids(model, config)
        with torch.autocast(timed_device().type, torch.bfloat16, enabled=config.precision == "bf16"):
            if isinstance(model, MoEForCausalLM):
                told = _random_labels(model, config, domains)
                output = model(input_ids=ids, labels=ids, told=told, loss_only=not all_logits)
                loss = total_loss(config, [layer.router.loss_weights for layer in model.moe_layers], output)
            else:
                loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return run


def _model(config: Config) -> MoEForCausalLM:
    data = prepare_data(config)
    model = build_model(config, vocab_size=len(data.tokenizer))
    nn.Module.to(model, timed_device())
    tell_text([layer.router for layer in model.moe_layers], data)
    return model


def _random_ids(model: Any, config: Config) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (config.batch_size, config.data.seq_len), device=model.device)


def _random_labels(model: Any, config: Config, domains: int) -> torch.Tensor:
    return torch.randint(0, domains, (config.batch_size, len(LABELS)), device=model.device)
