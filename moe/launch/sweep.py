"""All cells of a command together: what is refused before the first one trains, and what is told after the last."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe import files
from moe.checks import ConfigError
from moe.config.schema import Cell
from moe.distributed import ranks
from moe.runs.folder import difference, finished, locked, status, stored


def carry_out(cells: list[Cell], launch: Callable[[], object]) -> int:
    """Have `launch` train what is not finished of `cells`, tell what became of them, and return the exit status: 1 if
    any is not finished then.

    Raises ConfigError, with a message of one line, before anything is written, if a folder cannot take its run.
    """
    if not cells:
        launch()
        return 0
    ranks.start(timeout=cells[0].config.rank_timeout)
    if not ranks.is_first():  # the first looks at the folders, and tells what became of the cells
        if ranks.broadcast(None):
            launch()
        return 0
    if all(map(finished, cells)):
        ranks.broadcast(False)
        return _report(cells, ["finished"] * len(cells))
    for cell in cells:
        _check_folder(cell)
    before = [_state(cell) for cell in cells]
    with _reserved(cells):
        ranks.broadcast(True)
        try:
            launch()
        except SystemExit as stop:
            if stop.code != 1:  # which is Hydra's for a cell that raised; the others are there to be reported
                raise
        if len(cells) > 1:
            _wait(cells)
        return _report(cells, before)


def _check_folder(cell: Cell) -> None:
    """Refuse a folder that holds a run of another configuration, cannot be written to, or has links out of it."""
    if differences := difference(cell):
        raise ConfigError(
            f"{cell.folder} holds another run: {'; '.join(differences)}. Choose another out=DIR or delete the folder"
        )
    there = next(path for path in (cell.folder, *cell.folder.absolute().parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError(f"{cell.folder} cannot be made: {there} is no folder that can be written to")
    mirror = cell.folder / "wandb"  # in there W&B links to its own logs, and nobody else writes
    for path in cell.folder.rglob("*"):
        if (
            path.is_symlink()
            and mirror not in path.parents
            and not path.resolve().is_relative_to(cell.folder.resolve())
        ):
            raise ConfigError(f"{path} is a link that leads out of the run folder: delete it")


@contextmanager
def _reserved(cells: list[Cell]) -> Iterator[None]:
    """Keep other sweeps out of a sweep's folder until this one ends or dies; note which cells it is to have, and their
    factors."""
    if len(cells) < 2:
        yield
        return
    sweep = cells[0].folder.parent
    sweep.mkdir(parents=True, exist_ok=True)
    with locked(sweep / "sweep.lock") as owner:
        if owner is not None:
            raise ConfigError(f"{sweep} is in use by another sweep, process {owner}: wait for it, or choose out=DIR")
        asked = {cell.folder.name: cell.choices | cell.config.identity() for cell in cells}
        files.write_json(sweep / "sweep.json", {"cells": _notes(sweep).get("cells", {}) | asked})
        yield


def _notes(sweep: Path) -> dict[str, Any]:
    path = sweep / "sweep.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _state(cell: Cell) -> str:
    """The status in run.json, with what it cannot say of itself: that the process died, or is another one."""
    if status(cell) == "running":
        with locked(cell.folder / "run.lock") as owner:
            return "killed" if owner is None else f"in use by process {owner}"
    return "finished" if finished(cell) else status(cell)


def _wait(cells: list[Cell]) -> None:
    """Let cells that other processes train come to their end: those that a launcher left alone when it gave up at one
    whose process was killed, and those of an earlier sweep that was killed itself."""
    told = False
    while others := [cell.folder.name for cell in cells if _state(cell).startswith("in use")]:
        if not told:
            print(f"waiting for cells that are still trained: {', '.join(others)}", flush=True)
        told = True
        time.sleep(1)


def _report(cells: list[Cell], before: list[str]) -> int:
    """Print what became of each cell since `before`, and the sweep's tables; returns the exit status."""
    after = [_state(cell) for cell in cells]
    sweep = cells[0].folder.parent
    if set(before) == {"finished"} or len(cells) > 1:
        print()
        for cell, old, new in zip(cells, before, after, strict=True):
            print(f"{_outcome(old, new):<11} {cell.folder.name}{_reason(cell, new)}")
    if len(cells) > 1 and sweep.is_dir():
        from moe.results import sweep_tables

        table = sweep_tables.console_table(sweep_tables.write_sweep_tables(sweep))
        print(f"\n{table}\n\n{sweep / 'results.csv'}")
    return 0 if set(after) <= {"finished"} else 1


def _outcome(before: str, after: str) -> str:
    if after != "finished":
        return after
    return {"finished": "skipped", "missing": "finished"}.get(before, "resumed")


def _reason(cell: Cell, state: str) -> str:
    """Why a cell is not finished: the first line of its error, wherever it was printed."""
    error = "its process ended without a word" if state == "killed" else stored(cell).get("error")
    return f": {error}" if error else ""
