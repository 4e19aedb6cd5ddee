"""Runs of two ranks: one of them dies or freezes, all are asked to stop, and another number of them goes on."""

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
    """Two ranks of `train.py` with this job's arguments."""
    return job.spawn("-m", "accelerate.commands.launch", "--config_file", str(CONF / "launch" / f"{file}.yaml"))


def wait_for_step(job: TrainCommand, launcher: subprocess.Popen[bytes], step: int) -> list[int]:
    """Process ids of the ranks, in order, once `step` is in the events."""
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


def gone(pids: list[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.fixture(scope="module")
def calm(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process ends with, which two end with as well."""
    alone = TrainCommand(tmp_path_factory.mktemp("calm"), [*words, *STEP])
    assert alone.run() == 0, alone.output
    return result(alone.folder)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed(victim: int, job: Any, calm: dict[str, Any], survived: Any) -> None:
    one = job("a", *STEP)
    launcher = launch(one)
    pids = wait_for_step(one, launcher, 9)
    os.kill(pids[victim], signal.SIGKILL)
    assert launcher.wait(60) != 0
    assert gone(pids)
    assert one.record["status"] in ("failed", "running")
    assert one.steps() < 24
    assert launch(one).wait(LIMIT) == 0, one.output
    same(result(one.folder), calm)
    survived(23, f"SIGKILL of rank {victim} of two", 1, "the other stops; rerun exact")


def test_a_rank_is_frozen(job: Any, calm: dict[str, Any], survived: Any) -> None:
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
    assert gone(pids)
    assert launch(one).wait(LIMIT) == 0, one.output
    same(result(one.folder), calm)
    survived(23, "SIGSTOP of one rank of two", 1, "the other stops after rank_timeout; rerun exact")


def test_the_launcher_is_asked_to_stop_and_another_number_of_ranks_goes_on(
    job: Any, calm: dict[str, Any], survived: Any
) -> None:
    one = job("a", *STEP)
    launcher = launch(one)
    wait_for_step(one, launcher, 5)
    launcher.terminate()
    assert launcher.wait(60) != 0
    assert one.record["status"] == "interrupted", one.output
    process = one.start()  # by itself
    one.wait_for_step(process, 13)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert launch(one).wait(LIMIT) == 0, one.output
    same(result(one.folder), calm)
    survived(23, "SIGTERM of two ranks, then of one, then two to the end", 1, "checkpoint each time; exact")


def test_sharded_weights_go_on_in_other_layouts(
    job: Any, words: list[str], calm: dict[str, Any], survived: Any
) -> None:
    one = job("a", *STEP)
    for file, step in (("fsdp", 5), ("ddp", 13)):
        launcher = launch(one, file)
        wait_for_step(one, launcher, step)
        launcher.terminate()
        assert launcher.wait(60) != 0
        assert one.record["status"] == "interrupted", one.output
    assert launch(one, "fsdp").wait(LIMIT) == 0, one.output
    ours = result(one.folder)
    assert len(ours["events"]) == len(calm["events"])
    assert ours["final"]["val/loss"] == pytest.approx(calm["final"]["val/loss"], rel=1e-4)
    survived(23, "SIGTERM of sharded, then of replicated, then sharded ranks", 1, "checkpoint each time; to rounding")


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Weights to the last bit; sums over ranks are added in another order, so metrics to rounding."""
    assert ours["weights"] == theirs["weights"]
    assert [event["step"] for event in ours["events"]] == [event["step"] for event in theirs["events"]]
    for name, value in theirs["final"].items():
        if isinstance(value, float):
            assert ours["final"][name] == pytest.approx(value, rel=1e-2, abs=1e-6), name
