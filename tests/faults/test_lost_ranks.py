"""Tests of runs on two ranks: one rank dies or freezes, all stop, and another number of ranks resumes the run."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from test_sweeps import children
from train_processes import LIMIT, TrainCommand, result

from moe.config.options import CONF

STEP = ("grad_accum=2", "save_every=4")


def launch(job: TrainCommand, file: str = "ddp") -> subprocess.Popen[bytes]:
    """Start two ranks of train.py with the arguments of this job."""
    return job.spawn("-m", "accelerate.commands.launch", "--config_file", str(CONF / "launch" / f"{file}.yaml"))


def wait_for_step(job: TrainCommand, launcher: subprocess.Popen[bytes], step: int) -> list[int]:
    """Wait until `step` is in the events, and return the process ids of the ranks in order."""
    deadline = time.monotonic() + LIMIT
    while job.steps() < step:
        assert launcher.poll() is None, job.output
        assert time.monotonic() < deadline, job.output
        time.sleep(0.002)
    pids = [pid for pid in children(launcher.pid) if b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]
    return sorted(pids, key=rank_of)


def rank_of(pid: int) -> int:
    settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(line[5:]) for line in settings if line.startswith(b"RANK="))


def all_ended(pids: list[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.fixture(scope="module")
def on_one_process(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result of the run on one process. Two ranks must have the same result."""
    alone = TrainCommand(tmp_path_factory.mktemp("calm"), [*words, *STEP])
    assert alone.run() == 0, alone.output
    return result(alone.folder)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_is_killed(killed: int, job: Any, on_one_process: dict[str, Any], survived: Any) -> None:
    one = job("a", *STEP)
    launcher = launch(one)
    pids = wait_for_step(one, launcher, 9)
    os.kill(pids[killed], signal.SIGKILL)
    assert launcher.wait(60) != 0
    assert all_ended(pids)
    assert one.record["status"] in ("failed", "running")
    assert one.steps() < 24
    assert launch(one).wait(LIMIT) == 0, one.output
    assert_same_result(result(one.folder), on_one_process)
    survived(23, f"SIGKILL of rank {killed} of two", 1, "the other rank stops; the same command again: exact")


@pytest.mark.long
def test_a_rank_is_frozen(job: Any, on_one_process: dict[str, Any], survived: Any) -> None:
    one = job("a", *STEP, "rank_timeout=10")
    launcher = launch(one)
    pids = wait_for_step(one, launcher, 9)
    os.kill(pids[1], signal.SIGSTOP)
    frozen = time.monotonic()
    while one.record["status"] == "running":
        assert time.monotonic() < frozen + 60, one.output
        time.sleep(0.05)
    assert one.record["status"] == "failed"
    assert "another rank died or was frozen: the same command resumes the run" in one.record["error"]
    assert launcher.wait(60) != 0
    assert all_ended(pids)
    assert launch(one).wait(LIMIT) == 0, one.output
    assert_same_result(result(one.folder), on_one_process)
    survived(
        23, "SIGSTOP of one rank of two", 1, "the other rank stops after rank_timeout; the same command again: exact"
    )


@pytest.mark.long
def test_a_stopped_run_resumes_on_another_number_of_ranks(
    job: Any, on_one_process: dict[str, Any], survived: Any
) -> None:
    one = job("a", *STEP)
    launcher = launch(one)
    wait_for_step(one, launcher, 5)
    launcher.terminate()
    assert launcher.wait(60) != 0
    assert one.record["status"] == "interrupted", one.output
    process = one.start()  # one process, without a launcher
    one.wait_for_step(process, 13)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert launch(one).wait(LIMIT) == 0, one.output
    assert_same_result(result(one.folder), on_one_process)
    survived(23, "SIGTERM of two ranks, then of one, then two to the end", 1, "a checkpoint each time; exact")


@pytest.mark.long
def test_a_sharded_run_resumes_replicated_and_sharded_again(
    job: Any, words: list[str], on_one_process: dict[str, Any], survived: Any
) -> None:
    one = job("a", *STEP)
    for file, step in (("fsdp", 5), ("ddp", 13)):
        launcher = launch(one, file)
        wait_for_step(one, launcher, step)
        launcher.terminate()
        assert launcher.wait(60) != 0
        assert one.record["status"] == "interrupted", one.output
    assert launch(one, "fsdp").wait(LIMIT) == 0, one.output
    found = result(one.folder)
    assert len(found["events"]) == len(on_one_process["events"])
    assert found["final"]["val/loss"] == pytest.approx(on_one_process["final"]["val/loss"], rel=1e-4)
    survived(
        23,
        "SIGTERM of sharded, then of replicated, then sharded ranks",
        1,
        "a checkpoint each time; equal up to rounding",
    )


def assert_same_result(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert equal weights, bit for bit, and metrics equal up to rounding, because ranks add sums in another order."""
    assert found["weights"] == expected["weights"]
    assert [event["step"] for event in found["events"]] == [event["step"] for event in expected["events"]]
    for name, value in expected["final"].items():
        if isinstance(value, float):
            assert found["final"][name] == pytest.approx(value, rel=1e-2, abs=1e-6), name
