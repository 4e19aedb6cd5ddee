"""Show where a training step spends its time: milliseconds, kernels, waits of the host, and peak memory."""

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moe.bench.timing import UNCOUNTED, TimingTable, now, timed_device
from moe.config.words import with_words
from moe.launch.command_line import read_cells
from moe.model.cost import count_parameters, peak_memory_gb
from moe.training.setup import set_up
from moe.training.step import train_step

PROFILED = 3  # steps that the profiler observes; the numbers are means over them
LONGEST_NAME = 90  # characters of a kernel's name; C++ templates have hundreds


class Profile(NamedTuple):
    """What a training step costs.

    summary: one row of totals. On a CPU, the profiler adds to the time of each of its operators ("kernels"), so they
        can take longer together than the step without it.
    kernels: a row for each kernel (on a CPU: each operator), the longest first.
    waits: a row for each line of the program in which the host waits for a GPU.
    """

    summary: dict[str, Any]
    kernels: list[dict[str, Any]]
    waits: list[dict[str, Any]]


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    with tempfile.TemporaryDirectory() as folder:
        found = profile_step(arguments.overrides, rounds=arguments.rounds, folder=Path(folder))
    yield TimingTable(f"training step: {' '.join(arguments.overrides) or 'model=tiny'}", [found.summary])
    yield TimingTable("kernels of that step, the longest first", found.kernels[: arguments.top])
    if found.waits:
        yield TimingTable("where the host waits for the GPU in that step", found.waits)


def profile_step(overrides: list[str], *, rounds: int, folder: Path, steps: int = 10) -> Profile:
    """Profile the training step of a run with these overrides: the real step, without evaluation and event log.

    Times are wall-clock times over rounds of `steps` steps each, because the host works on a step while a GPU still
    works on the one before.
    """
    cells = read_cells(with_words(with_words(["logger.mode=disabled"], *overrides), f"out={folder}"))
    assert cells is not None, overrides
    config = cells[0].config
    training, numbers = set_up(config), count()
    for _ in range(UNCOUNTED):
        train_step(training, next(numbers))
    seconds = []
    for _ in range(rounds):
        start = now()
        for _ in range(steps):
            train_step(training, next(numbers))
        seconds.append((now() - start) / steps)
    peak = peak_memory_gb(timed_device())
    waits = host_waits(lambda: train_step(training, next(numbers)))
    activity = ProfilerActivity.CUDA if timed_device().type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(PROFILED):
            train_step(training, next(numbers))
        now()
    kernels = kernel_rows(profiler, steps=PROFILED)
    tokens = config.batch_size * config.grad_accum * config.data.seq_len
    summary = {
        "parameters": count_parameters(training.model).total,
        "ms / step": 1e3 * median(seconds),
        "tokens / s": tokens / median(seconds),
        "ms in kernels, profiled": sum(row["ms / step"] for row in kernels),
        "kernels / step": sum(row["calls / step"] for row in kernels),
        "waits / step": sum(waits.values()),
        "peak GB": peak,
    }
    return Profile(summary, kernels, [{"line": line, "waits / step": n} for line, n in waits.most_common()])


def host_waits(run: Callable[[], object]) -> Counter[str]:
    """Return how often each line of the program makes the host wait for the GPU. Empty without a GPU."""
    if timed_device().type != "cuda":
        return Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    return Counter(f"{'/'.join(Path(place.filename).parts[-3:])}:{place.lineno}" for place in places)


def kernel_rows(profiler: profile, *, steps: int) -> list[dict[str, Any]]:
    """Return a row for each kernel of the GPU, or for each operator of the CPU: time, share, calls. Longest first."""
    on_gpu = timed_device().type == "cuda"
    averages = [event for event in profiler.key_averages() if not event.is_user_annotation]  # they contain kernels
    events = [event for event in averages if (event.device_type == DeviceType.CUDA) == on_gpu]
    times = [event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events]
    whole = sum(times)
    rows = [
        {
            "kernel": event.key.removeprefix("void ").replace("|", "/")[:LONGEST_NAME],
            "ms / step": time / 1e3 / steps,
            "share": time / whole,
            "calls / step": event.count / steps,
        }
        for event, time in zip(events, times, strict=True)
        if time
    ]
    return sorted(rows, key=lambda row: -row["ms / step"])
