"""Time the start of a run, and a sweep with N runs at a time compared with one run after another."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from moe.bench.timing import TimingTable
from moe.files import walk
from moe.launch.command_line import read_cells

TRAIN = [sys.executable, "-m", "moe", "train"]
SMALL_MODEL = "logger.mode=disabled model.dim=64 model.layers=2 model.heads=2 data.max_val_blocks=32".split()


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    settings = [*SMALL_MODEL, *arguments.overrides]
    seeds = ",".join(str(seed) for seed in range(arguments.seeds))
    grid = ["-m", *settings, f"steps={arguments.steps}", f"seed={seeds}", "lb=0.0,0.01"]
    with tempfile.TemporaryDirectory() as folder:
        read_cells([*grid, f"out={folder}"])  # Raises ConfigError for overrides that cannot be used.
        time_training([*settings, "steps=1", f"out={folder}/prepare"])  # Prepares the data, which does not count.
        first_step = seconds_to_first_step([*settings, "steps=1", f"out={folder}/start"], Path(folder) / "start")
        yield TimingTable("start", [{"from": "command to first training step", "seconds": first_step}])
        serial = time_training([*grid, f"out={folder}/serial"])
        parallel = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={arguments.jobs}"]
        together = time_training([*grid, *parallel, f"out={folder}/parallel"])
    rows = [("one after another", 1, serial), (f"{arguments.jobs} at a time", arguments.jobs, together)]
    yield TimingTable(
        f"{2 * arguments.seeds} runs of {arguments.steps} steps",
        [
            {"runs": name, "seconds": seconds, "speed-up": serial / seconds, "per job": serial / seconds / jobs}
            for name, jobs, seconds in rows
        ],
    )


def time_training(overrides: list[str]) -> float:
    """Return the seconds that a command of train.py takes. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    subprocess.run([*TRAIN, *overrides], check=True, capture_output=True)
    return time.perf_counter() - start


def seconds_to_first_step(overrides: list[str], out: Path) -> float:
    """Return the seconds until the first training step is in the event log, to a hundredth of a second."""
    start = time.perf_counter()
    with subprocess.Popen([*TRAIN, *overrides], stdout=subprocess.DEVNULL) as process:
        while not any('"train"' in log.read_text() for log in walk(out) if log.name == "events.jsonl"):
            if process.poll():
                raise subprocess.CalledProcessError(process.returncode, process.args)
            time.sleep(0.01)
        return time.perf_counter() - start
