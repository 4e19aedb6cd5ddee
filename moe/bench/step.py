"""A training step: ours bare and as training runs it, beside a dense model and Mixtral, and what it is made of."""

import argparse
import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGTERM
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from moe.bench.layer import Shape, mixtral_config
from moe.bench.timing import UNCOUNTED, Table, Variant, clock, device, medians, now, product_flops, relative
from moe.config.schema import Config
from moe.launch.command_line import read_cells
from moe.model.cost import flops_per_token
from moe.model.decoder import MoEForCausalLM
from moe.routing import losses
from moe.routing.dispatch import dispatch
from moe.routing.measurement import measure
from moe.runs.events import EventLog
from moe.runs.signals import Interrupted, Signals
from moe.runs.wandb_mirror import Mirror
from moe.training.loop import train
from moe.training.optim import build_optimizers
from moe.training.setup import build_model, prepare_data

SETTINGS = ("logger.mode=disabled", "model.expert=swiglu")
TRAINING = "ours in training: Accelerate, clipping, statistics read out, event log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="of the run, as train.py takes them: model=small batch_size=32")
    parser.add_argument("--rounds", type=int, default=15)


def answer(arguments: argparse.Namespace) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as folder:
        seconds, tokens, flops, dtype = measure_steps(arguments.overrides, rounds=arguments.rounds, folder=Path(folder))
    parts = {name: seconds.pop(name) for name in list(seconds) if name.startswith("part: ")}
    run = ", ".join(arguments.overrides) or "model=tiny"
    yield relative(f"training step: {run}, SwiGLU", seconds, to="dense")
    shares = [{"part": name[6:], "share": value / seconds[TRAINING]} for name, value in parts.items()]
    yield Table("of that step in training", shares)
    reached = flops / seconds[TRAINING]
    limit = product_flops(dtype)
    speed = {"tokens": tokens, "tokens / s": tokens / seconds[TRAINING], "TFLOP / s": reached / 1e12}
    yield Table("speed in training, Muon's FLOPs apart", [speed | {"of a large product's": reached / limit}])


class Measured(NamedTuple):
    """Median seconds by variant, where names of parts of our step begin with "part: "; of our step in training its
    tokens, its FLOPs without Muon's, and what it multiplies in."""

    seconds: dict[str, float]
    tokens: int
    flops: float
    dtype: torch.dtype


def measure_steps(overrides: list[str], *, rounds: int, folder: Path) -> Measured:
    """Time steps of that run.

    The real training loop sets the pace: the others take their turn when it reports a step. Its run is cut off at 1 %,
    because evaluations, traces and checkpoints, which belong to longer runs, would be counted as steps.
    """
    steps = rounds + UNCOUNTED
    late = [f"{key}={100 * steps}" for key in ("steps", "eval_every", "save_every")]
    cells = read_cells([*SETTINGS, *overrides, *late, f"out={folder}"])
    assert cells is not None, overrides
    config = cells[0].config
    with Signals() as signals, EventLog(folder / "parts.jsonl", step=0) as events, suppress(Interrupted):
        turns = Turns([*step_variants(config), *part_variants(config, events)], signals, stop_after=steps)
        train(config, folder, mirror=turns, signals=signals)
    tokens = config.batch_size * config.grad_accum * config.data.seq_len
    flops = 3.0 * tokens * flops_per_token(_model(config), config.data.seq_len)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return Measured(medians(turns.seconds), tokens, flops, dtype)


class Turns(Mirror):
    """Notes how long the training loop took since it last had the word, then lets the variants have their turn; asks it
    to stop after some steps."""

    def __init__(self, variants: list[Variant], signals: Signals, *, stop_after: int) -> None:
        self.variants = variants
        self.signals = signals
        self.stop_after = stop_after
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.began = now()

    def log(self, step: int, values: dict[str, Any]) -> None:
        if "train/loss" in values:
            self.seconds[TRAINING].append(now() - self.began)
            for name, run in self.variants:
                self.seconds[name].append(clock(run))
        if step == self.stop_after:
            self.signals.received = SIGTERM
        self.began = now()


def step_variants(config: Config) -> list[Variant]:
    """Bare steps (forward, backward, optimizers) on random tokens: dense of equal active FLOPs, ours, Mixtral."""
    ours = _model(config)
    sizes, k = config.model, ours.moe_layers[0].router.experts_per_token(config.data.seq_len)
    dense = copy.deepcopy(config)
    dense.model.first_k_dense_replace = sizes.layers
    dense.model.dense_ffn = round(k * sizes.ffn)
    shape = Shape(sizes.num_experts, round(k), sizes.dim, sizes.ffn, 0)
    rest = {"num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.heads}
    mixtral = MixtralForCausalLM(mixtral_config(shape, "grouped_mm", vocab_size=ours.config.vocab_size, **rest))
    nn.Module.to(mixtral, ours.device)
    return [
        ("dense", bare_step(_model(dense), config)),
        ("ours, bare loop", bare_step(ours, config)),
        ("Mixtral, grouped_mm, bare loop", bare_step(mixtral, config)),
    ]


def part_variants(config: Config, events: EventLog) -> list[Variant]:
    """What the whole model spends on its parts in a step; the statistics and losses are of one batch."""
    model = _model(config)
    optimizers = build_optimizers(model, config.optimizer)
    step = bare_step(model, config)
    step()  # leaves gradients
    ids = _random_ids(model, config)
    with torch.no_grad():
        layers = model(ids).routing or []
    seq_len, experts = config.data.seq_len, config.model.num_experts
    routings = [routing for layer in layers for routing in layer]
    plans = [dispatch(routing, experts, capacity=config.capacity, seq_len=seq_len) for routing in routings]
    line = {f"train/routing/{i}": i / 7 for i in range(100)}
    both = list(zip(routings, plans, strict=True))
    return [
        *((f"part: {type(optimizer).__name__}", optimizer.step) for optimizer in optimizers),
        ("part: statistics", lambda: [measure(r, p, ids.numel(), seq_len=seq_len) for r, p in both]),
        ("part: auxiliary losses", lambda: [losses.auxiliary(r, p.offered, seq_len=seq_len) for r, p in both]),
        (
            "part: dispatch plan",
            lambda: [dispatch(r, experts, capacity=config.capacity, seq_len=seq_len) for r in routings],
        ),
        ("part: a line of the event log", lambda: events.write("train", 1, line)),
    ]


def bare_step(model: nn.Module, config: Config) -> Callable[[], None]:
    """Forward, backward and optimizers, with the balance loss where there is one; gradients stay until the next."""
    optimizers = build_optimizers(model, config.optimizer)
    model.train()

    def run() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        ids = _random_ids(model, config)
        with torch.autocast(device().type, torch.bfloat16, enabled=config.precision == "bf16"):
            output = model(input_ids=ids, labels=ids)
        balance = output.aux["load_balance"].sum() if getattr(output, "aux", None) else 0.0
        (output.loss + config.lb * balance).backward()
        for optimizer in optimizers:
            optimizer.step()

    return run


def _model(config: Config) -> MoEForCausalLM:
    model = build_model(config, vocab_size=len(prepare_data(config).tokenizer))
    nn.Module.to(model, device())
    return model


def _random_ids(model: Any, config: Config) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (config.batch_size, config.data.seq_len), device=model.device)
