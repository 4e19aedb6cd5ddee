"""What a sweep tells of its cells when its launcher is through, and whom it waits for."""

import fcntl
import threading
from pathlib import Path

import pytest

from moe.config.schema import Cell
from moe.launch.command_line import read_cells
from moe.launch.run import write_run_record
from moe.launch.sweep import carry_out


@pytest.fixture
def cells(small: list[str], tmp_path: Path) -> list[Cell]:
    """Six cells that differ in their seed."""
    found = read_cells(["-m", *small, "seed=1,2,3,4,5,6", f"out={tmp_path}"])
    assert found is not None
    return found


def leave(cell: Cell, status: str, error: str | None = None) -> None:
    """What a worker leaves in the folder of its cell."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_run_record(cell, status, error=error)


def test_what_became_of_each_cell_is_told_with_the_reason(cells: list[Cell], capsys: pytest.CaptureFixture) -> None:
    """From the folders alone, for a worker's own words are elsewhere; also if the launcher itself gave up."""
    skipped, resumed, finished, failed, killed, missing = cells
    leave(skipped, "finished")
    leave(resumed, "interrupted", "stopped by SIGTERM after step 3; the same command resumes it")

    def launch() -> None:
        leave(resumed, "finished")
        leave(finished, "finished")
        leave(failed, "failed", "ValueError: out of luck")
        leave(killed, "running")
        raise SystemExit(1)

    assert carry_out(cells, launch) == 1
    table = capsys.readouterr().out.splitlines()[1:7]
    assert table == [
        f"skipped     {skipped.folder.name}",
        f"resumed     {resumed.folder.name}",
        f"finished    {finished.folder.name}",
        f"failed      {failed.folder.name}: ValueError: out of luck",
        f"killed      {killed.folder.name}: its process ended without a message",
        f"missing     {missing.folder.name}",
    ]


def test_a_sweep_waits_for_cells_that_other_processes_train(
    cells: list[Cell], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their locks are held, by a process that an earlier sweep started or whose launcher gave up."""
    monkeypatch.setattr("time.sleep", lambda seconds: threading.Event().wait(0.01))
    *others, last = cells
    leave(last, "running")
    lock = (last.folder / "run.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def end() -> None:
        leave(last, "finished")
        lock.close()

    def launch() -> None:
        for cell in others:
            leave(cell, "finished")
        threading.Timer(0.5, end).start()

    assert carry_out(cells, launch) == 0
    said = capsys.readouterr().out
    assert said.count(f"waiting for cells that are still being trained: {last.folder.name}\n") == 1
    assert f"resumed     {last.folder.name}\n" in said
