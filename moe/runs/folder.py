"""Find out which run a folder holds, how far that run came, and which process uses the folder."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe.checks import ConfigError
from moe.config import run_routers
from moe.config.cell import Cell, Grid
from moe.config.keys import DEFAULTED, OFF, fingerprint, is_free
from moe.config.options import CLASSES
from moe.config.schema import Config, without_defaults
from moe.files import open_file, open_unlinked
from moe.runs import csv_mirror, tensorboard_mirror
from moe.runs.record import RecordError, RunRecord, SweepRecord

LOCK = "run.lock"  # in a run folder; the process that trains the run holds it


def finished(cell: Cell) -> bool:
    """Return whether the folder holds exactly this run, complete."""
    return status(cell) == "finished" and not difference(cell)


def diverged(cell: Cell) -> bool:
    """Return whether the run of a cell failed because a loss or gradient was not finite. It would do so again."""
    record = stored_record(cell)
    return record is not None and record.diverged and not difference(cell)


def status(cell: Cell) -> str:
    """Return finished, failed, running, interrupted, or missing. Raises RecordError like `stored_record`."""
    record = stored_record(cell)
    return "missing" if record is None else record.status


def difference(cell: Cell) -> list[str]:
    """Return a text for each key in which the run in the folder differs from this cell.

    A key that the record lacks is newer, or the run ignored it. It had its default, and differs from that only if this
    cell does not ignore it.
    """
    record = stored_record(cell)
    return [] if record is None else _difference(cell, record)


def _difference(cell: Cell, record: RunRecord) -> list[str]:
    wanted = cell.identity()
    stored = json.loads(json.dumps(record.identity | record.values_of(wanted), default=repr))
    wanted = json.loads(json.dumps(wanted))
    keys = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if any(key not in record.identity and _may_not_apply(key) for key in keys):
        ignored = run_routers.ignored_keys(cell.config)
        keys = [key for key in keys if key in record.identity or key not in ignored]
    texts = [f"{key} is {stored.get(key)} in the folder, {wanted.get(key)} in this command" for key in keys]
    return texts or [
        f"the code of {name} has changed since that run began" for name in changed_code(record, cell.config)
    ]


def changed_code(record: RunRecord, config: Config, *keys: str) -> list[str]:
    """Return the packages whose code is not that with which the run began. keys: as in `Config.plugins`."""
    now = config.plugins(*keys)
    return [name for name, plugin in record.plugins.items() if name in now and now[name].sha256 != plugin.sha256]


def missing_models(cell: Cell) -> str:
    """Return a text that names the saved models that `save_model` asks for and the finished run lacks; "" if none.

    A run lacks them if it was trained, or a part of it, with another `save_model`.
    """
    config = cell.config
    names = [] if config.save_model == "none" else ["model"]
    if config.save_model == "all":
        from moe.runs.traces import milestones  # imports NumPy

        names += [f"milestones/step-{step:08d}" for step in sorted(milestones(config.steps) - {config.steps})]
    missing = [name for name in names if not (cell.folder / name).is_dir()]
    if not missing:
        return ""
    reason = f"save_model={config.save_model} was not set when they would have been saved"
    return f"without {', '.join(missing)}: {reason}; delete the folder to train the run again"


def missing_copies(cell: Cell) -> str:
    """Return a text that names the files of `logger.to` that the finished run lacks; "" if none. W&B may have none."""
    files = {"csv": csv_mirror.FILE, "tensorboard": tensorboard_mirror.FOLDER}
    missing = [files[place] for place in cell.config.logger.to if place in files]
    missing = [name for name in missing if not (cell.folder / name).exists()]
    return f"without {', '.join(missing)}: a finished run is not copied to a new place" if missing else ""


def same_run(cell: Cell) -> Path | None:
    """Return the run folder beside `cell.folder` that holds this run under another spelling, such as noise=0 and 0.0.

    None if there is no such folder, or if `cell.folder` itself holds a run.
    """
    if (cell.folder / RunRecord.FILE).exists() or not cell.folder.parent.is_dir():
        return None
    alike = _runs_by_content(cell.folder.parent).get(_content(cell.identity(), cell.choices), [])
    return next((folder for folder, record in alike if not _difference(cell, record)), None)


@lru_cache(maxsize=1)  # all cells of a sweep have the same parent
def _runs_by_content(parent: Path) -> dict[str, list[tuple[Path, RunRecord]]]:
    runs: dict[str, list[tuple[Path, RunRecord]]] = {}
    for path in sorted(parent.glob(f"*/{RunRecord.FILE}")):
        if path.parent.is_symlink():  # a short name that somebody gave to a run folder
            continue
        try:
            record = RunRecord.read(path)
        except RecordError:  # such a folder is reported if a cell has its name
            continue
        runs.setdefault(_content(record.identity, record.choices), []).append((path.parent, record))
    return runs


def _content(identity: dict[str, Any], choices: dict[str, str | None]) -> str:
    """Return a text that is equal for equal runs, and for runs that differ only in keys that may decide nothing.

    Such keys are those that may not apply, and free keys such as the choice of a logger. A missing key has its default.
    Only the class knows that of a key of a class, such as a schedule, so these keys are left out too.
    """

    def decides(key: str) -> bool:
        of_class = any(key.startswith(f"{node}.") for node in CLASSES)
        return not (of_class or _may_not_apply(key) or is_free(key))

    return fingerprint({key: value for key, value in (without_defaults(identity) | choices).items() if decides(key)})


def _may_not_apply(key: str) -> bool:
    """Return whether some runs ignore a key, so that their identity lacks it: see `run_routers.ignored_keys`."""
    return key in OFF or key in DEFAULTED or key.startswith("router.")


def stored_record(cell: Cell) -> RunRecord | None:
    """Return the run record in the folder; None if there is no run.

    Raises RecordError for a record that cannot be read, and for checkpoints without a record.
    """
    path = cell.folder / RunRecord.FILE
    if path.exists():
        return RunRecord.read(path)
    if (cell.folder / "checkpoints").exists():
        raise RecordError(f"{cell.folder} holds checkpoints, but no {RunRecord.FILE}: {RunRecord.ADVICE}")
    return None


def grid_name(cells: Sequence[Cell]) -> str:
    """Return the name of the smallest grid that has all of these cells of one folder; `single_runs` if none has.

    Raises RecordError for a sweep.json that cannot be read.
    """
    grid = recorded_grid(cells)
    return single_runs(cells[0].experiment) if grid is None else grid.name


def recorded_grid(cells: Sequence[Cell]) -> Grid | None:
    """Return the smallest grid in sweep.json that has all of these cells of one folder, or None, as for a single run.

    It is for a command that is about to train them, before there is a table. Raises RecordError as above.
    """
    path = cells[0].folder.parent / SweepRecord.FILE
    return SweepRecord.read(path).grid_with(*(cell.folder.name for cell in cells)) if path.exists() else None


def single_runs(experiment: str) -> str:
    """Return the name of the grid of all runs of an experiment that no sweep asked for."""
    return f"{experiment}: single runs"


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished run, which nobody needs any more."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def user(folder: Path) -> str | None:
    """Return the id of the process that trains the run in this folder, "unknown" if it cannot be told; None if none.

    Nothing is written, so that an analysis may ask too.
    """
    try:
        import fcntl

        with open_file(folder / LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read() or "unknown"
    except FileNotFoundError:
        return None
    except (OSError, ImportError):  # a platform or file system without locks
        return "unknown"
    return None


@contextmanager
def locked(path: Path) -> Iterator[str | None]:
    """Try to hold the lock file at `path`; yield None, or the process id of the owner if another process holds it.

    The system frees the lock when its owner dies. Raises ConfigError where files cannot be locked, and LinkError if a
    link is in its place.
    """
    try:
        import fcntl  # the analysis runs without it too
    except ImportError:
        raise ConfigError("training needs Linux or macOS; on Windows, use WSL (analyze.py runs everywhere)") from None
    with open_unlinked(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read() or "unknown"
            return
        except OSError as error:
            raise ConfigError(
                f"{path}: this file system cannot lock files ({error.strerror}), so that two processes could train one "
                "run: choose out=DIR on another file system, or mount this one with locks"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield None
