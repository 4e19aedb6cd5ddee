"""What a run folder is: whether it holds this run, how far that came, and who works in it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.checks import ConfigError
from moe.config.schema import Cell


def finished(cell: Cell) -> bool:
    """Whether the folder holds this very run, complete."""
    return status(cell) == "finished" and not difference(cell)


def status(cell: Cell) -> str:
    """finished | failed | running | interrupted | missing."""
    return str(stored(cell).get("status", "missing"))


def difference(cell: Cell) -> list[str]:
    """The keys in which a folder's run differs from this cell, as "key: theirs, here ours"."""
    theirs = stored(cell).get("identity")
    if theirs is None:
        return []
    ours = json.loads(json.dumps(cell.config.identity()))
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return [f"{key} is {theirs.get(key)} there, {ours.get(key)} here" for key in keys]


def stored(cell: Cell) -> dict[str, Any]:
    """The folder's run.json; empty if there is no run. Raises ConfigError where it cannot be told what is there."""
    path = cell.folder / "run.json"
    if not path.exists():
        if (cell.folder / "checkpoints").exists():
            raise ConfigError(f"{cell.folder} holds checkpoints and no run.json that says of what: delete the folder")
        return {}
    try:
        content = json.loads(path.read_text())
        return {**content}
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete the folder, or choose another out=DIR") from None


@contextmanager
def locked(path: Path) -> Iterator[str | None]:
    """Hold the lock file at `path`, which the system frees when a process dies; yields None, or the pid of whoever
    has it."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read() or "unknown"
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield None
