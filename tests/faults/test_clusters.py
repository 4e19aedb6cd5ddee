"""Tests of launcher presets on one machine: submitit with local processes, Slurm played by four scripts, and Ray."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_sweeps import files, finished, results
from train_processes import LIMIT, TrainCommand

from moe.runs.events import read_events

pytestmark = pytest.mark.clusters

GRID = ("-m", "noise=0.0,0.1,0.5", "lb=0.0,0.01", "seed=42,43,44", "steps=6", "eval_every=6")
THREE = ("-m", "seed=1,2,3", "steps=100", "eval_every=50")
SUBMITIT = ("hydra/launcher=slurm_local",)
RAY = ("hydra/launcher=ray_local", "hydra.launcher.ray.init.num_cpus=2")

SBATCH = """#!/bin/bash
# Runs the tasks of an array, as many at once as it says; one that asked for it runs again.
last=$(sed -n 's/.*--array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
limit=$(sed -n 's/.*--array=.*%\\([0-9]*\\).*/\\1/p' "$1")
cp "$1" "$SLURM_FAKE/script"
export SLURM_ARRAY_JOB_ID=7 SLURM_JOB_ID=7 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0
export SLURM_LOCALID=0
seq 0 "$last" | SCRIPT="$1" xargs -P "$limit" -I @ env SLURM_ARRAY_TASK_ID=@ bash -c '
  while bash "$SCRIPT"; [ -e "$SLURM_FAKE/requeue-7_@" ]; do rm "$SLURM_FAKE/requeue-7_@"; done
  touch "$SLURM_FAKE/ended-@"' > /dev/null 2>&1 &
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
# srun --unbuffered --output FILE --error FILE COMMAND
exec "${@:6}" >> "$SLURM_FAKE/log-$SLURM_ARRAY_TASK_ID" 2>&1
"""
SCONTROL = """#!/bin/bash
touch "$SLURM_FAKE/requeue-$2"
"""
SQUEUE = """#!/bin/bash
for task in 0 1 2; do
  [ -e "$SLURM_FAKE/ended-$task" ] && echo "7_$task|COMPLETED|None" || echo "7_$task|RUNNING|None"
done
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a folder of scripts that behave like Slurm's commands first in the search path, and return the folder."""
    place = tmp_path / "slurm"
    place.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_FAKE", str(place))
    return place


@pytest.fixture(scope="module")
def serial(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function: `serial(*THREE)` is the result of these cells when they train one after the other."""
    known: dict[tuple[str, ...], Any] = {}

    def run(*grid: str) -> Any:
        if grid not in known:
            one = TrainCommand(tmp_path_factory.mktemp("serial"), [*settings(words, grid), *grid])
            assert one.run() == 0, one.output
            known[grid] = results(one)
        return known[grid]

    return run


@pytest.fixture
def sweep(words: list[str], tmp_path: Path) -> Callable[..., TrainCommand]:
    return lambda *arguments: TrainCommand(tmp_path / "job", [*settings(words, arguments), *arguments])


def settings(words: list[str], swept: tuple[str, ...]) -> list[str]:
    keys = {word.split("=")[0] for word in swept}
    return [word for word in words if word.split("=")[0] not in keys]


def run(one: TrainCommand) -> int:
    return one.spawn().wait(2 * LIMIT)  # eighteen processes that import torch


def training(one: TrainCommand, seed: int, step: int, sweep: subprocess.Popen[bytes]) -> int:
    """Wait until the cell of `seed` has done `step` steps, and return the id of its process."""
    deadline = time.monotonic() + LIMIT
    while True:
        for folder in (one.root / "runs" / "default").glob("*/"):
            events = folder / "events.jsonl"
            if f'"seed": {seed},' in record(folder) and events.exists() and len(read_events(events)) > step:
                return int((folder / "run.lock").read_text())
        assert sweep.poll() is None, one.output
        assert time.monotonic() < deadline, one.output
        time.sleep(0.02)


def record(folder: Path) -> str:
    path = folder / "run.json"
    return path.read_text() if path.exists() else ""


def lines_of(one: TrainCommand, outcome: str) -> list[str]:
    """Return the lines of the table of cells that begin with `outcome`."""
    return [line for line in one.output.splitlines() if line.startswith(f"{outcome} ")]


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [((*SUBMITIT, "hydra.sweeper.max_batch_size=6"), 18), (RAY, 2)],
    ids=["submitit", "ray"],
)
def test_the_users_factorial_ends_as_the_serial_one(launcher: Any, processes: int, sweep: Any, serial: Any) -> None:
    """Ray trains many cells in each of two processes. Submitit has one process for each cell, here six at once."""
    one = sweep(*GRID, *launcher)
    assert run(one) == 0, one.output
    assert len(lines_of(one, "finished")) == 18
    assert results(one) == serial(*GRID)
    assert len({path.read_text() for path in (one.root / "runs").rglob("run.lock")}) == processes


def test_one_cell_of_three_is_killed(sweep: Any, serial: Any) -> None:
    one = sweep(*THREE, *SUBMITIT)
    process = one.spawn()
    os.kill(training(one, 1, 10, process), signal.SIGKILL)
    assert process.wait(LIMIT) == 1
    [killed] = lines_of(one, "killed")
    assert killed.endswith(": its process ended without a message")
    assert len(lines_of(one, "finished")) == 2
    before = {path: value for folder in finished(one) for path, value in files(folder).items()}
    assert len(finished(one)) == 2
    assert run(one) == 0, one.output
    assert len(lines_of(one, "skipped")) == 2
    assert len(lines_of(one, "resumed")) == 1
    assert results(one) == serial(*THREE)
    assert all(files(path.parent)[path] == value for path, value in before.items() if path.name != "run.lock")


def test_a_second_sweep_in_the_same_folder_is_refused(sweep: Any, serial: Any) -> None:
    one = sweep(*THREE, *SUBMITIT)
    process = one.spawn()
    cell = training(one, 1, 1, process)
    os.kill(cell, signal.SIGSTOP)
    second = TrainCommand(one.root, one.arguments[:-1])
    second.log = one.root / "second"
    assert run(second) == 2
    assert f"is in use by another sweep, process {process.pid}" in second.output
    assert second.output.count("\n") == 1
    os.kill(cell, signal.SIGCONT)
    assert process.wait(LIMIT) == 0, one.output
    assert results(one) == serial(*THREE)


def test_a_sweep_that_is_killed_leaves_cells_that_the_next_one_waits_for(sweep: Any, serial: Any) -> None:
    one = sweep(*THREE, *SUBMITIT)
    process = one.spawn()
    orphan = training(one, 1, 1, process)
    os.kill(orphan, signal.SIGSTOP)
    process.kill()
    process.wait()
    again = one.spawn()
    while "waiting for cells that are still being trained" not in one.output:
        assert again.poll() is None, one.output
        time.sleep(0.1)
    os.kill(orphan, signal.SIGCONT)
    assert again.wait(LIMIT) == 0, one.output
    assert results(one) == serial(*THREE)


def test_a_time_limit_saves_and_puts_the_cell_back_into_the_queue(sweep: Any, serial: Any) -> None:
    """Submitit's own signal handler would lose the steps since the last checkpoint."""
    one = sweep(*THREE, *SUBMITIT, "save_every=1000")
    process = one.spawn()
    os.kill(training(one, 2, 30, process), signal.SIGUSR2)
    assert process.wait(LIMIT) == 0, one.output
    logs = "".join(path.read_text() for path in (one.root / "runs").rglob("*_log.out"))
    assert logs.count("stopped by SIGUSR2 after step") == 1
    assert logs.count("resumed after step") == 1
    assert results(one) == serial(*THREE)


def test_slurm_from_submission_to_requeue(slurm: Path, sweep: Any, serial: Any) -> None:
    """Two jobs run at a time. SIGTERM comes before the signal of the time limit, as when a job is preempted."""
    one = sweep(*THREE, "hydra/launcher=slurm", "hydra.launcher.array_parallelism=2", "save_every=1000")
    process = one.spawn()
    cell = training(one, 1, 30, process)
    os.kill(cell, signal.SIGTERM)
    os.kill(cell, signal.SIGUSR2)
    assert process.wait(LIMIT) == 0, one.output
    assert results(one) == serial(*THREE)
    logs = [path.read_text() for path in sorted(slurm.glob("log-*"))]
    assert [log.count("resumed after step") for log in logs] == [1, 0, 0]
    script = (slurm / "script").read_text()
    options = "array=0-2%2 time=240 mem=32GB cpus-per-task=4 gpus-per-node=1 signal=USR2@120 requeue".split()
    assert {f"#SBATCH --{option}" for option in options} <= set(script.splitlines())


def test_ray_resumes_a_cell_whose_worker_was_killed(sweep: Any, serial: Any) -> None:
    one = sweep(*THREE, *RAY)
    process = one.spawn()
    os.kill(training(one, 1, 10, process), signal.SIGKILL)
    assert process.wait(LIMIT) == 0, one.output
    assert len(lines_of(one, "finished")) == 3
    assert results(one) == serial(*THREE)
