"""Tests of the table that a sweep prints about its cells at the end, and of waiting for other processes."""

import errno
import fcntl
import itertools
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_folders import FACTS, write_metrics

from moe.checks import ConfigError, parse
from moe.config.cell import Cell
from moe.launch import slurm
from moe.launch.command_line import read_cells
from moe.launch.run import write_run_record
from moe.launch.slurm import Refused, stalled
from moe.launch.sweep import carry_out
from moe.runs.record import RunFacts


@pytest.fixture
def cells(small: list[str], tmp_path: Path) -> list[Cell]:
    """Return six cells that differ in their seed."""
    found = read_cells(["-m", *small, "seed=1,2,3,4,5,6", f"out={tmp_path}"])
    assert found is not None
    return found


def leave_record(cell: Cell, status: str, error: str | None = None) -> None:
    """Write the run record that a worker leaves in the folder of its cell."""
    (cell.folder / "model").mkdir(parents=True, exist_ok=True)
    if status == "finished":
        write_metrics(cell.folder, {})  # before the record, as training does
    write_run_record(cell, status, parse(RunFacts, FACTS) if status == "finished" else None, error=error)


def test_the_outcome_of_each_cell_is_printed_with_its_reason(cells: list[Cell], capsys: pytest.CaptureFixture) -> None:
    """The outcomes come from the folders alone: a worker may print elsewhere, and the launcher may have given up."""
    skipped, resumed, finished, failed, killed, missing = cells
    leave_record(skipped, "finished")
    skipped.config.logger.to.append("csv")
    leave_record(resumed, "interrupted", "stopped by SIGTERM after step 3; the same command resumes it")

    def launch() -> None:
        leave_record(resumed, "finished")
        leave_record(finished, "finished")
        leave_record(failed, "failed", "ValueError: out of luck\x1b[2J")
        leave_record(killed, "running")
        raise SystemExit(1)

    assert carry_out(cells, launch) == 1
    table = capsys.readouterr().out.splitlines()[2:8]
    assert table == [
        f"skipped     {skipped.folder.name}, without metrics.csv: a finished run is not copied to a new place",
        f"resumed     {resumed.folder.name}",
        f"finished    {finished.folder.name}",
        f"failed      {failed.folder.name}: ValueError: out of luck\\x1b[2J",
        f"killed      {killed.folder.name}: its process ended without a message",
        f"missing     {missing.folder.name}",
    ]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("content", [None, "{"])
def test_a_finished_run_without_its_metrics_is_not_taken_as_one(
    cells: list[Cell], capsys: pytest.CaptureFixture, number: int, content: str | None
) -> None:
    first, *_ = chosen = cells[:number]
    for cell in chosen:
        leave_record(cell, "finished")
    path = first.folder / "metrics.json"
    path.unlink()
    if content:
        path.write_text(content)
    assert carry_out(chosen, lambda: pytest.fail("a cell was trained")) == 1
    said = capsys.readouterr().out
    assert f"unreadable  {first.folder.name}: {first.folder}" in said
    assert "delete the folder" in said
    assert said.count("unreadable  ") == 1


def test_the_only_cell_of_a_sweep_is_told_unless_it_finishes(
    cells: list[Cell], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker may have printed the reason on another machine; after a success the next command is told.

    The status is 2 if the text or the settings cannot be used.
    """
    monkeypatch.setattr(sys, "argv", ["moe train"])
    cell = cells[0]

    def outcome(*record: str) -> tuple[int, list[str]]:
        status = carry_out([cell], lambda: leave_record(cell, *record))
        disk, *told = capsys.readouterr().out.splitlines()
        assert disk.startswith("disk: ")
        return status, told

    for error, status in (("ValueError: out of luck", 1), ("ConfigError: data.source.paths=a: cannot be read", 2)):
        assert outcome("failed", error) == (status, ["", f"failed      {cell.folder.name}: {error}"])
    folder = shlex.quote(str(cell.folder))
    assert outcome("finished") == (0, [f"next: moe analyze {folder}"])


@pytest.mark.parametrize(("number", "places"), [(1, ""), (2, "/*")])
def test_the_command_that_uploads_offline_wandb_runs_is_told_until_they_are_uploaded(
    cells: list[Cell], capsys: pytest.CaptureFixture, number: int, places: str
) -> None:
    written = cells[number - 1].folder / "wandb" / "offline-run-20261129_120000-a1" / "run-a1.wandb"

    def told() -> list[str]:
        carry_out(cells[:number], lambda: [leave_record(cell, "finished") for cell in cells[:number]] and None)
        return [line for line in capsys.readouterr().out.splitlines() if "wandb sync" in line]

    assert told() == []
    written.parent.mkdir(parents=True)
    written.touch()
    [line] = told()
    folder = cells[0].folder if number == 1 else cells[0].folder.parent
    assert line.endswith(f": wandb sync {shlex.quote(str(folder))}{places}/wandb/offline-run-*")
    assert subprocess.run(f"ls {line.partition('wandb sync ')[2]}", shell=True).returncode == 0
    written.with_name("run-a1.wandb.synced").touch()
    assert told() == []


def test_a_sweep_waits_for_cells_that_other_processes_train(
    cells: list[Cell], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A held lock means that a process trains the cell: an earlier sweep started it, or its launcher gave up."""
    monkeypatch.setattr("time.sleep", lambda seconds: threading.Event().wait(0.01))
    *others, last = cells
    leave_record(last, "running")
    lock = (last.folder / "run.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def end() -> None:
        leave_record(last, "finished")
        lock.close()

    def launch() -> None:
        for cell in others:
            leave_record(cell, "finished")
        threading.Timer(0.5, end).start()

    assert carry_out(cells, launch) == 0
    said = capsys.readouterr().out
    assert said.count(f"waiting for cells that are still being trained: {last.folder.name}\n") == 1
    assert f"resumed     {last.folder.name}\n" in said


@pytest.mark.parametrize("number", [1, 6])
def test_a_file_system_without_locks_is_refused_in_one_line(
    cells: list[Cell], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some network file systems answer that they cannot lock files; no cell is trained there."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ConfigError, match=r"\.lock: this file system cannot lock files \(Function not implemented\)"):
        carry_out(cells[:number], lambda: pytest.fail("a cell was trained"))


@pytest.mark.parametrize("number", [1, 6])
def test_a_platform_without_locks_is_refused_in_one_line(
    cells: list[Cell], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Python on Windows has no module fcntl; no cell is trained there."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ConfigError, match="training needs Linux or macOS"):
        carry_out(cells[:number], lambda: pytest.fail("a cell was trained"))


def test_what_slurm_refuses_is_said_once_and_beside_each_cell(cells: list[Cell], capsys: pytest.CaptureFixture) -> None:
    """A sweep whose jobs are refused ends with exit status 2 and the reason; a finished cell keeps its own outcome."""
    leave_record(cells[0], "finished")

    def launch() -> None:
        raise Refused("sbatch refused the jobs: no such partition")

    assert carry_out(cells, launch) == 2
    printed = capsys.readouterr()
    assert printed.err == "train.py: sbatch refused the jobs: no such partition\n"
    missing = [f"missing     {cell.folder.name}: sbatch refused the jobs: no such partition" for cell in cells[1:]]
    assert printed.out.splitlines()[2:8] == [f"skipped     {cells[0].folder.name}", *missing]


def test_a_job_that_slurm_starts_again_and_again_without_progress_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth start from the same checkpoint is refused; a new checkpoint, or a new job, starts the count again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def start(number: int) -> str | None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        return stalled(tmp_path)

    assert [start(number) for number in (0, 1, 2)] == [None] * 3
    assert "3 times in a row without a new checkpoint (the newest: none)" in str(start(3))
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert [start(number) for number in (4, 5, 6)] == [None] * 3
    assert "3 times in a row without a new checkpoint (the newest: step-00000004)" in str(start(7))
    assert start(0) is None


def test_slurm_jobs_say_how_long_the_others_take(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate comes from the jobs that have ended; one that is running counts as half done."""
    states = iter([("running", "queued"), ("ended", "running"), ("ended", "ended")])
    monkeypatch.setattr(slurm, "_queue", lambda: {n: slurm.Job(s, "") for n, s in zip("12", next(states), strict=True)})
    minutes = itertools.count(0.0, 60.0)
    monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=lambda: next(minutes), sleep=lambda seconds: None))
    slurm._watch({"1": "seed=1", "2": "seed=2"}, tmp_path)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("jobs: ")] == [
        "jobs: 1 queued, 1 running, 0 ended",
        "jobs: 0 queued, 1 running, 1 ended; after 3 min, about 60 s left",
        "jobs: 0 queued, 0 running, 2 ended",
    ]


def test_outside_of_slurm_no_rounds_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is not a Slurm job never stalls and gets no file."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert stalled(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=1,2"]])
def test_a_folder_that_the_system_does_not_make_is_refused_in_one_line(sweep: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^/proc/moe\S* cannot be created: [^\n]+$"):
        carry_out(read_cells(["out=/proc/moe", "logger.mode=disabled", *sweep]), lambda: None)
