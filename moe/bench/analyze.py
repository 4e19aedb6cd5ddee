"""How long `analyze.py` takes over many runs, and how much memory: folders are made here, nothing is trained."""

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

from moe.bench.timing import Table
from moe.metrics.catalog import ROUTING

ANALYZE = Path(__file__).parents[2] / "analyze.py"
ROUTERS, CAPACITIES = ("switch", "topk", "softk", "hash", "sinkhorn"), (None, 1.0, 1.25, 1.5)
LAYERS, EVALS = 12, 10


class Cost(NamedTuple):
    """Of the whole command: `seconds` by the clock and of CPU time, and its largest resident memory in GB (10^9)."""

    seconds: float
    cpu_seconds: float
    gigabytes: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=500)


def answer(arguments: argparse.Namespace) -> Iterator[Table]:
    cost = measure(runs=arguments.runs, steps=arguments.steps)
    row = {"folders": f"{arguments.runs} runs of {arguments.steps} steps", "seconds": cost.seconds}
    row |= {"seconds on a CPU": cost.cpu_seconds, "GB at its peak": cost.gigabytes, "load": os.getloadavg()[0]}
    yield Table("analyze.py", [row])


def measure(*, runs: int, steps: int) -> Cost:
    """Run `analyze.py` over that many folders in a temporary directory; the time to make them does not count."""
    with tempfile.TemporaryDirectory() as place:
        write_runs(Path(place) / "experiment_a", runs=runs, steps=steps)
        command = [sys.executable, str(ANALYZE), place, "--out", str(Path(place) / "analysis")]
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, cpu_seconds, after.ru_maxrss * 1024 / 1e9)


def write_runs(sweep: Path, *, runs: int, steps: int) -> None:
    """Folders of finished runs, router x capacity x seed, with as many metrics as a run of 12 layers writes.

    The experiment is the one whose figures need most: those of A and C read the training steps too. Training steps
    are those of the router, evaluations those of the run.
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
        (folder / "metrics.json").write_text(json.dumps({"final_metrics": final, "history": {}}, indent=1))
        (folder / "run.json").write_text(json.dumps(_record(folder, router, capacity, seed), indent=1))


def _training(steps: int, load: float, rng: np.random.Generator) -> list[str]:
    """A line a training step."""
    lines = []
    for step in range(1, steps + 1):
        values = {
            "train/loss": 3 + _falling(step, steps) + 0.02 * rng.normal(),
        }
        values |= _routing("train/", load, rng, layered=5)
        lines.append(json.dumps({"kind": "train", "step": step} | values) + "\n")
    return lines


def _evaluation(step: int, loss: float, load: float, rng: np.random.Generator) -> dict[str, Any]:
    validation = {"val/loss": loss, "val/perplexity": math.exp(loss), "val/accuracy": 1 / loss}
    return {"kind": "eval", "step": step} | validation | _routing("", load, rng, layered=len(ROUTING))


def _falling(step: int, steps: int) -> float:
    return 4 * math.exp(-5 * step / steps)


def _routing(prefix: str, load: float, rng: np.random.Generator, *, layered: int) -> dict[str, float]:
    """Every metric of the catalog, all alike; the first `layered` of them by layer too."""
    luck = 0.01 * float(rng.normal())
    values = {f"{prefix}routing/load_cv/pooled": 0.9 * load + luck}
    for rank, name in enumerate(ROUTING):
        values[f"{prefix}{name}"] = load + luck
        if rank < layered:
            values |= {f"{prefix}{name}/layer{i:02d}": load * (1 + 0.1 * i) + luck for i in range(LAYERS)}
    return values


def _record(folder: Path, router: str, capacity: float | None, seed: int) -> dict[str, Any]:
    model = {"dim": 128, "layers": LAYERS, "num_experts": 8}
    config: dict[str, Any] = {
        "seed": seed,
        "capacity": capacity,
        "router": {"_target_": f"moe.routers.{router}", "k": 2},
    }
    config |= {"model": model, "optimizer": {f"key{i}": 0.1 for i in range(60)}}
    domains = {name: {"train": {"tokens": 10**6}, "val": {"tokens": 10**5}} for name in ("speech", "docs", "python")}
    record: dict[str, Any] = {
        "status": "finished",
        "experiment": folder.parent.name,
        "name": folder.name,
        "causal": True,
    }
    record |= {"choices": {"router": router}, "config": config, "parameters": {"total": 2 * 10**6, "active": 10**6}}
    record |= {"flops_per_token": 10**6, "seconds": 2.0, "train_seconds": 1.0, "commit": "0" * 40, "device": "cpu"}
    return record | {"data": {"corpus_sha256": "0" * 64, "domains": domains}}
