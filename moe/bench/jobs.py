"""Sweeps: seconds from a command to its first training step, and N runs at a time against one after another."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from moe.bench.timing import Table

TRAIN = Path(__file__).parents[2] / "train.py"
SETTINGS = "logger.mode=disabled model.dim=64 model.layers=2 model.heads=2 data.max_val_blocks=32".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="of every run, after those of a small model")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=4, help="how many seeds, beside two balance weights")


def answer(arguments: argparse.Namespace) -> Iterator[Table]:
    settings = [*SETTINGS, *arguments.overrides]
    with tempfile.TemporaryDirectory() as folder:
        train([*settings, "steps=1", f"out={folder}/prepare"])  # prepares the data, which does not count
        start = first_step([*settings, "steps=1", f"out={folder}/start"], Path(folder) / "start")
        yield Table("start", [{"from": "command to first training step", "seconds": start}])
        seeds = ",".join(str(seed) for seed in range(arguments.seeds))
        grid = ["-m", *settings, f"steps={arguments.steps}", f"seed={seeds}", "lb=0.0,0.01"]
        serial = train([*grid, f"out={folder}/serial"])
        parallel = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={arguments.jobs}"]
        together = train([*grid, *parallel, f"out={folder}/parallel"])
    rows = [("one after another", 1, serial), (f"{arguments.jobs} at a time", arguments.jobs, together)]
    yield Table(
        f"{2 * arguments.seeds} runs of {arguments.steps} steps",
        [
            {"runs": name, "seconds": seconds, "speed-up": serial / seconds, "per job": serial / seconds / jobs}
            for name, jobs, seconds in rows
        ],
    )


def train(overrides: list[str]) -> float:
    """Seconds of one command of train.py, which must succeed."""
    tick = time.perf_counter()
    subprocess.run([sys.executable, str(TRAIN), *overrides], check=True, capture_output=True)
    return time.perf_counter() - tick


def first_step(overrides: list[str], out: Path) -> float:
    """Seconds until the first training step is in the event log, to a hundredth."""
    tick = time.perf_counter()
    with subprocess.Popen([sys.executable, str(TRAIN), *overrides], stdout=subprocess.DEVNULL) as child:
        while not any('"train"' in log.read_text() for log in out.rglob("events.jsonl")):
            if child.poll():
                raise subprocess.CalledProcessError(child.returncode, child.args)
            time.sleep(0.01)
        return time.perf_counter() - tick
