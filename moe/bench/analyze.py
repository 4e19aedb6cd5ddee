"""Measure the time and memory that `analyze.py` takes over many runs. The runs are synthetic; nothing is trained."""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.bench.timing import TimingTable
from moe.config.keys import flatten
from moe.metrics.catalog import ROUTING_METRICS
from moe.runs.record import Machine, MetricsRecord, Parameters, Ranks, RunFacts, RunRecord

ROUTERS, CAPACITIES = ("switch", "topk", "softk", "hash", "sinkhorn"), (None, 1.0, 1.25, 1.5)
LAYERS, EVALS = 12, 10


class Cost(NamedTuple):
    """Cost of a whole command: wall-clock seconds, CPU seconds, and peak resident memory in GB (10^9 bytes)."""

    seconds: float
    cpu_seconds: float
    gigabytes: float


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    cost = measure_analysis(runs=arguments.runs, steps=arguments.steps)
    row = {"folders": f"{arguments.runs} runs of {arguments.steps} steps", "seconds": cost.seconds}
    row |= {"CPU seconds": cost.cpu_seconds, "peak GB": cost.gigabytes, "load": os.getloadavg()[0]}
    yield TimingTable("analyze.py", [row])


def measure_analysis(*, runs: int, steps: int) -> Cost:
    """Run `analyze.py` over that many run folders in a temporary directory. Making the folders does not count."""
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder) / "experiment_a", runs=runs, steps=steps)
        command = [sys.executable, "-m", "moe", "analyze", folder, "--out", str(Path(folder) / "analysis")]
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, cpu_seconds, after.ru_maxrss * 1024 / 1e9)


def write_runs(sweep: Path, *, runs: int, steps: int) -> None:
    """Write folders of finished runs, router x capacity x seed, with as many metrics as a run of 12 layers has.

    The runs belong to experiment A, because the figures of A and C need the most data: they also read the training
    steps. Runs of one router share their training steps; evaluations differ from run to run.
    """
    rng = np.random.default_rng(0)
    training = [_training(steps, 0.1 * (1 + index), rng) for index in range(len(ROUTERS))]
    seeds = range(42, 42 + math.ceil(runs / len(ROUTERS) / len(CAPACITIES)))
    for seed, (index, router), capacity in islice(product(seeds, enumerate(ROUTERS), CAPACITIES), runs):
        folder = sweep / f"capacity={capacity},router={router},seed={seed}"
        folder.mkdir(parents=True)
        loss = 3 + 0.02 * index + 0.05 * (capacity or 2.0) + 0.02 * rng.normal()
        steps_of_evals = [steps * part // EVALS for part in range(EVALS + 1)]
        evals = [_evaluation(step, loss + _falling(step, steps), 0.1 * (1 + index), rng) for step in steps_of_evals]
        with open(folder / "events.jsonl", "w") as log:
            for start, event in zip([0, *steps_of_evals], evals, strict=False):
                log.writelines(training[index][start : event["step"]])
                log.write(json.dumps(event) + "\n")
        final = {name: value for name, value in evals[-1].items() if "/" in name}
        final["time/tokens_per_s"] = 1e3 / (1 + index) * (1 + 0.01 * rng.normal())
        MetricsRecord(final_metrics=final, history={}).write(folder / MetricsRecord.FILE)
        made_up_record(folder, router, capacity, seed).write(folder / RunRecord.FILE)


def _training(steps: int, load: float, rng: np.random.Generator) -> list[str]:
    """Return one line for each training step."""
    lines = []
    for step in range(1, steps + 1):
        values = {
            "train/loss": 3 + _falling(step, steps) + 0.02 * rng.normal(),
        }
        values |= _routing("train/", load, rng, layered=5)
        lines.append(json.dumps({"kind": "train", "step": step} | values) + "\n")
    return lines


def _evaluation(step: int, loss: float, load: float, rng: np.random.Generator) -> dict[str, Any]:
    """Return the event of one evaluation."""
    validation = {"val/loss": loss, "val/perplexity": math.exp(loss), "val/accuracy": 1 / loss}
    return {"kind": "eval", "step": step} | validation | _routing("", load, rng, layered=len(ROUTING_METRICS))


def _falling(step: int, steps: int) -> float:
    """Return a loss that falls during a run, above its final value."""
    return 4 * math.exp(-5 * step / steps)


def _routing(prefix: str, load: float, rng: np.random.Generator, *, layered: int) -> dict[str, float]:
    """Return a value for every metric of the catalog, and for the first `layered` of them one for each layer too."""
    noise = 0.01 * float(rng.normal())
    values = {f"{prefix}routing/load_cv/pooled": 0.9 * load + noise}
    for index, name in enumerate(ROUTING_METRICS):
        values[f"{prefix}{name}"] = load + noise
        if index < layered:
            values |= {f"{prefix}{name}/layer{i:02d}": load * (1 + 0.1 * i) + noise for i in range(LAYERS)}
    return values


def made_up_record(folder: Path, router: str, capacity: float | None, seed: int) -> RunRecord:
    """Return the record of a finished run in `folder`."""
    config: dict[str, Any] = {
        "seed": seed,
        "capacity": capacity,
        "router": {"_target_": f"moe.routers.{router}", "k": 2},
        "model": {"dim": 128, "layers": LAYERS, "num_experts": 8},
        "optimizer": {f"key{i}": 0.1 for i in range(60)},
    }
    domains = {name: {"train": {"tokens": 10**6}, "val": {"tokens": 10**5}} for name in ("speech", "docs", "python")}
    facts = RunFacts(
        parameters=Parameters(total=2 * 10**6, active=10**6, trainable=10**6),
        flops_per_token=10**6,
        seconds=2.0,
        train_seconds=1.0,
        peak_memory_gb=None,
        device="cpu",
        process={},
        ranks=Ranks(number=1, layout="single"),
        experts_kernel="loop",
        loss_kernel="chunks",
        data={"corpus_sha256": "0" * 64, "domains": domains},
        collapses=[],
    )
    return RunRecord(
        status="finished",
        error=None,
        experiment=folder.parent.name,
        name=folder.name,
        started="2026-01-01T00:00:00+00:00",
        choices={"router": router},
        causal=True,
        config=config,
        identity=flatten(config),
        versions={},
        machine=Machine(system="Linux", processor=None, cpus=2, gpus=[], driver=None),
        commit="0" * 40,
        plugins={},
        facts=facts,
    )
