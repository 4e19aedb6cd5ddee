"""Measure how step time and peak memory grow with experts, tokens, sequence length and experts per token."""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import nn

from moe.bench.step import bare_step
from moe.bench.timing import TimingTable, time_in_turns, timed_device
from moe.bench.workers import workers
from moe.config.model import ModelConfig
from moe.config.schema import Config
from moe.config.sections import DataConfig, OptimizerConfig
from moe.model.causal_lm import MoEForCausalLM
from moe.model.cost import flops_per_token, peak_memory_gb, reset_peak_memory
from moe.training import process
from moe.training.setup import build_model

BASE = {"experts": 8, "k": 2, "batch": 16, "seq_len": 128}
CURVES: dict[str, list[dict[str, int]]] = {
    "experts": [{"experts": experts} for experts in (8, 16, 32, 64, 128, 256)],
    "tokens": [{"batch": batch} for batch in (8, 16, 32, 64)],
    "sequence length, same tokens": [{"seq_len": 2048 // batch, "batch": batch} for batch in (32, 16, 8, 4)],
    "experts per token": [{"k": k} for k in (1, 2, 4, 8)],
}


class StepCost(NamedTuple):
    """Cost of one training step: seconds, FLOPs by formula, and peak memory in GB (10^9 bytes)."""

    seconds: float
    flops: float
    gigabytes: float


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    """Measure each point in a process of its own, because a process does not return memory to the system."""
    rows = []
    for name, settings in CURVES.items():
        points = []
        for setting in settings:
            with workers(1) as executor:
                settings_of_point = {**BASE, **setting, "rounds": arguments.rounds, "threads": arguments.threads}
                points.append(executor.submit(measure_point, **settings_of_point).result())
        sizes = [next(iter(setting.values())) for setting in settings]
        rows.append(
            {
                "growing": f"{name}: {sizes[0]} to {sizes[-1]}",
                "time exponent": exponent(sizes, [point.seconds for point in points]),
                "FLOPs exponent": exponent(sizes, [point.flops for point in points]),
                "memory exponent": exponent(sizes, [point.gigabytes for point in points]),
                "time, last / first": points[-1].seconds / points[0].seconds,
                "memory, last / first": points[-1].gigabytes / points[0].gigabytes,
            }
        )
    yield TimingTable("growth of a training step of model=tiny", rows)


def measure_point(
    *, experts: int, k: int, batch: int, seq_len: int, rounds: int, threads: int, dim: int = 128
) -> StepCost:
    """Measure a step of model=tiny with these sizes. Memory that the process used before building it does not count."""
    process.configure(threads=threads)
    sizes = ModelConfig(dim=dim, heads=4, layers=4, ffn=2 * dim, num_experts=experts, dense_ffn=4 * dim)
    config = Config(batch_size=batch, data=DataConfig(seq_len=seq_len), model=sizes)
    config.router = {"_target_": "moe.routers.topk.TopK", "k": k}
    config.optimizer = OptimizerConfig(muon_lr=0.02, adamw_lr=0.01)
    reset_peak_memory(timed_device())
    before = peak_memory_gb(timed_device()) or 0.0
    model = build_model(config, vocab_size=4096)
    nn.Module.to(model, timed_device())
    seconds = time_in_turns([("step", bare_step(model, config))], rounds=rounds)["step"]
    flops = 3 * flops_per_token(model, seq_len) * batch * seq_len + newton_schulz_flops(model)
    peak = peak_memory_gb(timed_device()) or float("nan")
    return StepCost(seconds, flops, max(peak - before, 0.0))  # the counters of Linux lag by some pages


def newton_schulz_flops(model: MoEForCausalLM) -> float:
    """Return the FLOPs of Muon's five iterations for all matrices (r, c) with r <= c. Matrix products cost 2 r^2 c or
    2 r^3; see `moe.training.optim`."""
    total = 0.0
    for name, p in model.named_parameters():
        if p.ndim >= 2 and "embed" not in name:
            short, long = sorted(p.shape[-2:])
            plain, on_gram = 20 * short**2 * long + 10 * short**3, 4 * short**2 * long + 34 * short**3
            total += p.numel() / (short * long) * (plain if p.is_cuda else min(plain, on_gram))
    return total


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of a line through log value against log size: 1 if twice the size costs twice as much."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
