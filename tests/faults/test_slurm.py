"""Tests of sweeps on a real Slurm of one node without accounting, which the tests start: `pytest -m slurm`."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_node
from test_sweeps import results
from train_processes import LIMIT, TrainCommand, read_record

from moe.launch.slurm import ROUNDS

pytestmark = pytest.mark.slurm

LAUNCHER = (
    "hydra/launcher=slurm",
    "hydra.launcher.gpus_per_node=0",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
    "hydra.launcher.timeout_min=10",
)
TWO = ("-m", "seed=1,2", "steps=100", "eval_every=50", "save_every=1000")


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start Slurm, and name its configuration in the environment."""
    if reason := slurm_node.missing():
        pytest.skip(reason)
    with slurm_node.running(tmp_path_factory.mktemp("slurm")) as conf, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        yield conf


@pytest.fixture
def sweep(words: list[str], tmp_path: Path) -> Iterator[Any]:
    """Return a function that makes a sweep on Slurm; its jobs are canceled after the test."""
    yield lambda *more: TrainCommand(tmp_path / "job", [*_without(words, more), *LAUNCHER, *more])
    subprocess.run(["scancel", "--user", "root"], check=True)
    while subprocess.check_output(["squeue", "--noheader"]):
        time.sleep(0.5)


def _without(words: list[str], swept: tuple[str, ...]) -> list[str]:
    keys = {word.split("=")[0] for word in swept}
    return [word for word in words if word.split("=")[0] not in keys]


def serial(one: TrainCommand, place: Path) -> Any:
    """Return the results of the same cells when they train here, one after the other."""
    settings = [word for word in one.arguments if not word.startswith(("hydra", "out="))]
    alone = TrainCommand(place, settings)
    assert alone.run() == 0, alone.output
    return results(alone)


def wait_for(one: TrainCommand, process: Any, happened: Any) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert process.poll() is None, one.output
        assert time.monotonic() < deadline, one.output
        time.sleep(0.1)


def folder_of(one: TrainCommand, seed: int) -> Path:
    """Return the run folder of the cell of `seed`."""
    [sweep] = (one.root / "runs").glob("*/sweep.json")
    cells = json.loads(sweep.read_text())["cells"]
    return sweep.parent / next(name for name, factors in cells.items() if factors["seed"] == seed)


def job_of(one: TrainCommand, seed: int) -> str:
    """Return the number of the Slurm job that trains the cell of `seed`."""
    folder = folder_of(one, seed)
    return str(json.loads((folder.parent / ".submitit" / "jobs.json").read_text())[folder.name])


def steps(one: TrainCommand, seed: int) -> int:
    """Return how many lines of events the cell of `seed` has written."""
    if not list((one.root / "runs").glob("*/sweep.json")):
        return 0
    events = folder_of(one, seed) / "events.jsonl"
    return events.read_text().count("\n") if events.exists() else 0


def trainer(one: TrainCommand) -> str:
    """Return the number of the process that trains the only cell, or that did so last; "" before the first one."""
    return "".join(path.read_text() for path in (one.root / "runs").glob("*/*/run.lock"))


def logs(one: TrainCommand) -> str:
    return "".join(path.read_text() for path in (one.root / "runs").rglob("*_log.out"))


def test_a_factorial_ends_as_the_serial_one(sweep: Any, tmp_path: Path) -> None:
    """Cells that train as Slurm jobs have bitwise the results of a serial sweep, and each change of a job is said."""
    one = sweep("-m", "noise=0.0,0.5", "seed=1,2", "steps=6", "eval_every=6")
    assert one.spawn().wait(LIMIT) == 0, one.output
    assert results(one) == serial(one, tmp_path / "serial")
    lines = one.output.splitlines()
    assert sum(line.startswith("ended ") for line in lines) == 4
    assert any(line.startswith("queued ") for line in lines)
    assert any(line.startswith("running ") for line in lines)
    assert "jobs: 0 queued, 0 running, 4 ended" in lines


def test_the_signal_of_a_time_limit_requeues_the_cell(sweep: Any, tmp_path: Path) -> None:
    """A job that Slurm signals before its limit saves, goes back into the queue, and ends as an undisturbed one.

    Limits are whole minutes, so the run is frozen; otherwise it would be done before. Slurm wakes it with its signal.
    """
    one = sweep(*TWO, "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=59")
    process = one.spawn()
    wait_for(one, process, lambda: steps(one, 1) > 5)
    os.kill(int((folder_of(one, 1) / "run.lock").read_text()), signal.SIGSTOP)
    assert process.wait(LIMIT) == 0, one.output
    assert "stopped by SIGUSR2 after step" in logs(one)
    assert "resumed after step" in logs(one)
    assert results(one) == serial(one, tmp_path / "serial")


def test_a_canceled_cell_ends_the_command(sweep: Any, tmp_path: Path) -> None:
    """`scancel` of a running and of a queued cell ends the wait, and the same command trains both to the end."""
    one = sweep(*TWO, "hydra.launcher.array_parallelism=1")
    process = one.spawn()
    wait_for(one, process, lambda: steps(one, 1) > 5)
    subprocess.run(["scancel", job_of(one, 1), job_of(one, 2)], check=True)
    assert process.wait(LIMIT) == 1, one.output
    assert one.output.count("(CANCELLED)") == 2
    assert "interrupted " in one.output
    assert "missing " in one.output
    assert one.spawn().wait(LIMIT) == 0, one.output
    assert results(one) == serial(one, tmp_path / "serial")


def test_jobs_of_an_interrupted_command_go_on_and_the_next_one_waits_for_them(sweep: Any, tmp_path: Path) -> None:
    """Ctrl-C says how to cancel the jobs; the same command submits no second job for a cell that is queued."""
    one = sweep(*TWO, "hydra.launcher.array_parallelism=1")
    process = one.spawn()
    wait_for(one, process, lambda: "running " in one.output)
    first, second = job_of(one, 1), job_of(one, 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 128 + signal.SIGINT
    assert f"`scancel {first.split('_')[0]}` cancels them" in one.output
    assert one.spawn().wait(LIMIT) == 0, one.output
    assert one.output.count("of an earlier command goes on") == 2
    assert (job_of(one, 1), job_of(one, 2)) == (first, second)
    assert results(one) == serial(one, tmp_path / "serial")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("hydra.launcher.gpus_per_node=1", "Invalid generic resource (gres) specification"),
        ("hydra.launcher.mem_gb=900", "Requested node configuration is not available"),
        ("hydra.launcher.partition=nix", "invalid partition specified: nix"),
    ],
)
def test_what_sbatch_refuses_is_one_line_and_in_the_table(sweep: Any, setting: str, said: str) -> None:
    """The words of sbatch are printed once and beside each cell, with exit status 2 and without a traceback."""
    one = sweep(*TWO)
    one.arguments = [word for word in one.arguments if not word.startswith(setting.split("=")[0])] + [setting]
    assert one.spawn().wait(LIMIT) == 2, one.output
    lines = [line for line in one.output.splitlines() if said in line]
    assert len([line for line in lines if line.startswith("train.py: sbatch refused the jobs: ")]) == 1
    assert len([line for line in lines if line.startswith("missing ")]) == 2
    assert len(lines) == 3
    assert "Traceback" not in one.output


def test_rounds_without_progress_end(sweep: Any) -> None:
    """A job whose node fails again and again before the first checkpoint ends with advice."""
    one = sweep("-m", "seed=1", "steps=100000", "eval_every=100000", "save_every=100000")
    process = one.spawn()
    seen = {"", str(process.pid)}  # the command itself holds the lock for a moment
    for _ in range(ROUNDS):
        wait_for(one, process, lambda: trainer(one) not in seen)
        seen.add(trainer(one))
        for state in ("down", "resume"):
            subprocess.run(["scontrol", "update", "nodename=one", f"state={state}", "reason=test"], check=True)
    assert process.wait(LIMIT) == 1, one.output
    [failed] = [line for line in one.output.splitlines() if line.startswith("failed ")]
    assert f"Slurm started this job {ROUNDS} times in a row without a new checkpoint" in failed


def test_a_delay_that_leaves_no_time_is_refused(sweep: Any) -> None:
    """A signal that would come at the start of a job is refused in one line, before a job is submitted."""
    one = sweep(*TWO, "hydra.launcher.timeout_min=3")
    one.arguments = [word for word in one.arguments if word != "hydra.launcher.timeout_min=10"]
    assert one.spawn().wait(LIMIT) == 2
    assert "hydra.launcher.signal_delay_s=120: must be at least 0 and less than 120" in one.output
    assert one.output.count("\n") == 1


def test_a_sweep_of_one_cell_is_one_job(sweep: Any) -> None:
    """Slurm gives a single job a number without a task."""
    one = sweep("-m", "seed=1", "steps=6", "eval_every=6")
    assert one.spawn().wait(LIMIT) == 0, one.output
    [jobs] = (one.root / "runs").glob("*/.submitit/jobs.json")
    [(name, number)] = json.loads(jobs.read_text()).items()
    assert number.isdecimal()
    assert read_record(jobs.parents[1] / name)["status"] == "finished"
