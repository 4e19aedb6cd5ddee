"""Carry out all cells of a command: check their folders before the first one trains, and report at the end."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moe.checks import ConfigError, first_line, printable
from moe.config.cell import Cell
from moe.config.keys import is_free
from moe.config.options import named_folders
from moe.distributed import ranks
from moe.files import shown, walk
from moe.launch.plans import kept_claims, not_comparable, record_plan
from moe.launch.revisions import pinned
from moe.launch.slurm import Refused
from moe.program import program
from moe.runs.folder import (
    delete_checkpoints,
    difference,
    finished,
    grid_name,
    locked,
    missing_copies,
    missing_models,
    status,
    stored_record,
    user,
)
from moe.runs.record import CommandsRecord, MetricsRecord, RecordError, SweepRecord

USUAL = "train.py"  # how a user starts training in a checkout
SAID = ("out", "tune", "tune_seeds")  # free keys that the place of the runs and their grid say


def carry_out(cells: list[Cell], launch: Callable[[], object], *, tables: bool = True) -> int:
    """Let `launch` train those of `cells` that are not finished, report on all of them, and return the exit status.

    tables: whether the report includes the tables of a sweep, and the command that analyzes the runs.

    The status is 1 if any cell is not finished afterwards, but 2 if all of these were given text or settings that
    cannot be used. If a run cannot be stored in its folder, raises ConfigError or RecordError, with a message of one
    line, before anything is written.
    """
    if not cells:
        launch()
        return 0
    ranks.start(timeout=cells[0].config.rank_timeout)
    if not ranks.is_first():  # the first rank checks the folders and reports
        if ranks.broadcast(None):
            launch()
        return 0
    for cell in cells:
        if cell.folder.is_symlink():  # even where nothing would be written, because an analysis does not follow links
            raise ConfigError(
                f"{shown(cell.folder)} is a link: delete it, because a run is never written through a link"
            )
    cells = [pinned(cell) for cell in cells]
    for cell in filter(finished, cells):
        delete_checkpoints(cell.folder)  # of a run that was killed right after it was finished
    if all(map(finished, cells)):
        _state_claims(cells)
        _record_grid(cells)
        ranks.broadcast(False)
        return _report(cells, ["finished"] * len(cells), tables=tables)
    for cell in cells:
        _check_folder(cell)
    _state_claims(cells)
    if line := not_comparable(cells):
        print(line, flush=True)
    before = [_state(cell) for cell in cells]
    _state_disk([cell for cell, state in zip(cells, before, strict=True) if state != "finished"])
    with _reserved(cells):
        ranks.broadcast(True)
        refusal = None
        try:
            launch()
        except Refused as refused:
            refusal = refused.reason
            print(f"{program(USUAL)}: {refusal}", file=sys.stderr, flush=True)
        except SystemExit as stop:
            if stop.code != 1:  # Hydra exits with 1 if a cell raised an error; the report below still follows then
                raise
        if len(cells) > 1:
            _wait(cells)
        status = _report(cells, before, refusal, tables=tables)
        return status if refusal is None else 2


def _check_folder(cell: Cell) -> None:
    """Raise ConfigError if a folder holds another run, cannot be written to, or has links that lead out of it."""
    if differences := difference(cell):
        raise ConfigError(
            f"{shown(cell.folder)} holds another run: {'; '.join(differences)}. "
            "Choose another out=DIR or delete the folder"
        )
    nearest = next(path for path in (cell.folder, *cell.folder.absolute().parents) if os.path.lexists(path))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ConfigError(f"{shown(cell.folder)} cannot be created: {nearest} is not a folder that can be written to")
    mirror = cell.folder / "wandb"  # W&B links to its own logs from the folders in it, and never writes to old ones
    for path in walk(cell.folder):
        if (
            path.is_symlink()
            and mirror not in path.parent.parents
            and not path.resolve().is_relative_to(cell.folder.resolve())
        ):
            raise ConfigError(f"{shown(path)} is a link that leads out of the run folder: delete it")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{shown(folder)} cannot be created: {error.strerror}") from error


@contextmanager
def _reserved(cells: list[Cell]) -> Iterator[None]:
    """Keep other sweeps out of the sweep folder until this one ends, and add its cells to sweep.json.

    Raises ConfigError if the folder is in use by another sweep, or if files there cannot be locked.
    """
    if len(cells) < 2:
        _make(cells[0].folder)
        with locked(cells[0].folder / "run.lock"):  # the process that trains the run locks it again
            pass
        _record_grid(cells)
        yield
        return
    sweep = cells[0].folder.parent
    _make(sweep)
    for path in sweep.iterdir():
        if path.is_symlink() and not (path.is_dir() and path.resolve().is_relative_to(sweep.resolve())):
            raise ConfigError(f"{shown(path)} is a link: delete it, or put the file there to which it leads")
    with locked(sweep / "sweep.lock") as owner:
        if owner is not None:
            raise ConfigError(
                f"{shown(sweep)} is in use by another sweep, process {owner}: wait for it, or choose out=DIR"
            )
        _record_grid(cells)
        record_plan(cells, grid_name(cells))
        _record_command(cells)
        yield


def _record_grid(cells: list[Cell]) -> None:
    """Add the cells of a sweep, and the grid that they form, to sweep.json, unless it has them."""
    grid = cells[0].grid
    if grid is None:
        return
    path = cells[0].folder.parent / SweepRecord.FILE
    asked = {cell.folder.name: cell.choices | cell.identity() for cell in cells}
    given = {word.partition("=")[0] for word in cells[0].overrides}

    def changed() -> SweepRecord | None:
        earlier = SweepRecord.read(path) if path.exists() else SweepRecord(cells={}, grids=[])
        record = earlier.joined(grid._replace(cells=list(asked)), asked, given)
        return None if record == earlier else record

    if changed() is None:
        return
    with ExitStack() as stack:  # other commands may add a single cell at the same time
        while stack.enter_context(locked(path.with_name("sweep.json.lock"))) is not None:
            stack.close()
            time.sleep(0.05)
        if (record := changed()) is not None:
            record.write(path)


def _record_command(cells: list[Cell]) -> None:
    """Write into commands.json what a command of the same runs needs beside their settings."""
    path = cells[0].folder.parent / CommandsRecord.FILE
    try:
        earlier = CommandsRecord.read(path)
    except RecordError:  # none, or a damaged one, which nothing else depends on
        earlier = CommandsRecord(words={}, folders={})
    keys = {word: word.partition("=")[0].lstrip("+") for word in cells[0].overrides}
    free = [word for word, key in keys.items() if is_free(key) and key not in SAID]
    name, folders = grid_name(cells), [str(folder) for folder in named_folders()]
    CommandsRecord(words=earlier.words | {name: free}, folders=earlier.folders | {name: folders}).write(path)


def _state_claims(cells: list[Cell]) -> None:
    """Print that some of these runs have other claims than this command, if that is so."""
    if line := kept_claims(cells):
        print(line, flush=True)


def _state_disk(cells: list[Cell]) -> None:
    """Print what these runs will occupy on disk. Raises ConfigError for a tokenizer that cannot be loaded."""
    from moe.training.disk import statement

    try:
        print(statement([cell.config for cell in cells]), flush=True)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def _state(cell: Cell) -> str:
    """Return the status in run.json, or a state that run.json cannot tell: killed, in use by a process, unreadable."""
    try:
        found = status(cell)
        if found == "running":
            owner = user(cell.folder)
            return "killed" if owner is None else f"in use by process {owner}"
        return found
    except RecordError:
        return "unreadable"


def _wait(cells: list[Cell]) -> None:
    """Wait for cells that other processes are still training.

    There are such cells if the process of one cell was killed, because a launcher then stops waiting for the others, or
    if an earlier sweep was killed.
    """
    announced = False
    while others := [cell.folder.name for cell in cells if _state(cell).startswith("in use")]:
        if not announced:
            print(f"waiting for cells that are still being trained: {', '.join(others)}", flush=True)
        announced = True
        time.sleep(1)


def _report(cells: list[Cell], before: list[str], refusal: str | None = None, *, tables: bool) -> int:
    """Print what became of each cell since `before`, and the sweep's tables; return the exit status.

    refusal: why no jobs were submitted, if that is so.
    """
    after = ["unreadable" if _lost_metrics(cell) else _state(cell) for cell in cells]
    sweep = cells[0].folder.parent
    single = len(cells) == 1
    if not single or set(before) == {"finished"} or set(after) != {"finished"}:
        print()
        for cell, old, new in zip(cells, before, after, strict=True):
            reason = f": {refusal}" if refusal and new == "missing" else _reason(cell, new)
            if old == new == "finished" and (lacks := missing_copies(cell)):
                reason += f", {lacks}"
            print(printable(f"{_outcome(old, new):<11} {cell.folder.name}{reason}"))
    if tables and len(cells) > 1 and sweep.is_dir():
        from moe.results import sweep_tables

        runs = sweep_tables.write_sweep_tables(sweep)
        table = sweep_tables.console_table(runs[runs["experiment"] == grid_name(cells)])
        print(f"\n{table}\n\ntable: {shown(sweep / 'results.csv')}; {_next_stage(cells) or next_step(sweep)}")
    elif tables and single and set(after) == {"finished"}:
        print(next_step(cells[0].folder))
    if tables and (command := _upload(cells)):
        print(f"W&B copies are offline; after `wandb login` this command uploads them: {command}")
    unfinished = [cell for cell, state in zip(cells, after, strict=True) if state != "finished"]
    return 2 if unfinished and all(map(_was_given_bad_input, unfinished)) else min(len(unfinished), 1)


def _next_stage(cells: list[Cell]) -> str:
    """Return what follows if these runs tune a key; an empty text if they do not."""
    grid = cells[0].grid
    if grid is None or grid.search is None or "tune" not in grid.fixed:
        return ""
    return "next: the same command again chooses the best value of each setting, and trains the seeds that judge it"


def next_step(folder: Path) -> str:
    """Return the command that analyzes the runs in a folder, as it works in the user's working folder."""
    script = os.path.join(os.path.dirname(sys.argv[0]), "analyze.py")
    typed = program(USUAL)
    in_checkout = typed == USUAL and os.path.isfile(script)
    caller = "moe" if typed == USUAL else typed.removesuffix(" train")
    analyze = f"python {shlex.quote(script)}" if in_checkout else f"{caller} analyze"
    return f"next: {analyze} {shlex.quote(str(shown(folder)))}"


def _upload(cells: list[Cell]) -> str:
    """Return the command that uploads the offline W&B runs of these cells; an empty text if there are none to upload.

    W&B puts a file `*.wandb.synced` beside the `*.wandb` file of a run that has been uploaded.
    """
    runs = [run for cell in cells for run in cell.folder.glob("wandb/offline-run-*")]
    if not any(list(run.glob("*.wandb")) and not list(run.glob("*.wandb.synced")) for run in runs):
        return ""
    folder = shlex.quote(str(shown(cells[0].folder if len(cells) == 1 else cells[0].folder.parent)))
    return f"wandb sync {folder}{'' if len(cells) == 1 else '/*'}/wandb/offline-run-*"


def _was_given_bad_input(cell: Cell) -> bool:
    """Return whether the run failed because of its text or its settings."""
    return _reason(cell, "failed").startswith(f": {ConfigError.__name__}: ")


def _outcome(before: str, after: str) -> str:
    if after != "finished":
        return after
    return {"finished": "skipped", "missing": "finished"}.get(before, "resumed")


def _reason(cell: Cell, state: str) -> str:
    """Return why a cell is not finished, or which of its models are missing.

    The worker process that printed the reason may run on another machine.
    """
    if state == "finished":
        return f", {lacks}" if (lacks := missing_models(cell)) else ""
    if state == "killed":
        return ": its process ended without a message"
    try:
        record = stored_record(cell)
    except RecordError as error:
        return f": {error}"
    if state == "unreadable":
        return f": {_lost_metrics(cell)}"
    return f": {record.error}" if record is not None and record.error else ""


def _lost_metrics(cell: Cell) -> str:
    """Return why the metrics of a finished run cannot be read; an empty text if they can, and for other runs."""
    try:
        if status(cell) == "finished":
            MetricsRecord.read(cell.folder / MetricsRecord.FILE)
    except RecordError as error:
        advice = MetricsRecord.ADVICE
        return str(error) if advice in str(error) else f"{error}; {advice}"
    return ""
