"""A run folder is a run's identity: finished runs are skipped, interrupted ones resumed, different ones refused."""

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe import ranks, record
from moe.checks import ConfigError
from moe.config import Cell
from moe.signals import STOP, Interrupted, Signals, follow_parent

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "hydra-core", "omegaconf", "numpy")


def run(cell: Cell) -> None:
    """Train one cell, or skip it if it is finished. What happened is in the folder's run.json; a failure is written
    there and printed, not raised, so that a sweep goes on.

    Of several ranks the first decides, and holds the lock; the others train with it, or not.
    """
    follow_parent()
    if not ranks.is_first():
        if ranks.told(None):
            _train(cell)
    elif finished(cell):
        log.info("%s: finished before, skipped", cell.folder)
        ranks.told(False)
    else:
        cell.folder.mkdir(parents=True, exist_ok=True)
        with locked(cell.folder / "run.lock") as owner:
            if ranks.told(_is_ours(cell, owner)):
                _train(cell)


def _is_ours(cell: Cell, owner: str | None) -> bool:
    """Whether this process, if it holds the lock that `owner` has otherwise, is to train the cell; says why not."""
    if owner is not None:
        log.info("%s: another process is training it (%s)", cell.folder, owner)
        return False
    if differences := difference(cell):
        log.error("%s holds another run: %s", cell.folder, "; ".join(differences))
        return False
    return not finished(cell)  # by another process, since it was last asked


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


def _train(cell: Cell) -> None:
    from moe.divergence import Diverged
    from moe.loop import train
    from moe.trackers import Mirror

    final: dict[str, Any] = {}
    try:
        _write(cell, "running")
        with Signals() as signals:
            mirror = Mirror(cell)
            try:
                facts = train(cell.config, cell.folder, mirror=mirror, signals=signals)
                final = _write_metrics(cell.folder, facts) if ranks.is_first() else {}
            finally:
                mirror.finish(final)
        _write(cell, "finished", facts)
        if final:
            log.info("%s: finished, val perplexity %.2f", cell.folder, final["val/perplexity"])
        if signals.received in STOP:  # too late for this run, in time for the rest of a sweep
            sys.exit(128 + signals.received)
    except Interrupted as stop:
        _write(cell, "interrupted", error=str(stop))
        log.warning("%s: %s", cell.folder, stop)
        stop.pass_on()
        sys.exit(stop.exit_status)
    except Exception as error:  # recorded, so that the other cells of a sweep still run, and the command exits with 1
        reason = f"{type(error).__name__}: {_first_line(error)}"
        log.error("%s failed: %s", cell.folder, reason)
        try:
            if ranks.is_first():
                record.write_text(cell.folder / "traceback.txt", traceback.format_exc())
            _write(cell, "failed", error=reason)
        except OSError as second:
            log.error("%s: that cannot be written down: %s", cell.folder, second)
        if ranks.number() > 1 and not isinstance(error, Diverged):  # which is the same on all; else who knows
            sys.exit(1)


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError) or "out of memory" in line or "can't allocate memory" in line:
        line += "; a smaller batch_size with a larger grad_accum needs less memory"
    if ranks.number() > 1 and any(word in line for word in ("gloo", "NCCL")):
        line += "; another rank died or was frozen: the same command resumes the run"
    return line


def _write(cell: Cell, state: str, facts: dict[str, Any] | None = None, *, error: str | None = None) -> None:
    if not ranks.is_first():
        return
    config, before = asdict(cell.config), stored(cell).get("config")
    if before is not None:  # on a resume too, claims are what was claimed before the first step
        config["claims"] = before.get("claims", [])
    content = {
        "status": state,
        "error": error,
        "experiment": cell.experiment,
        "name": cell.folder.name,
        "choices": cell.choices,
        "causal": cell.config.build_router().is_causal(capacity=cell.config.capacity, drop=cell.config.drop),
        "config": config,
        "identity": cell.config.identity(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "commit": _commit(),
        **(facts or {}),
    }
    record.write_json(cell.folder / "run.json", content)


def _write_metrics(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    from moe import trace

    events = record.read_events(folder / "events.jsonl")
    last = [event for event in events if event["kind"] == "eval"][-1]
    history = record.history(events)
    final = {key: value for key, value in last.items() if "/" in key and not key.startswith("time/")}
    final |= {"train/loss": history["train_losses"][-1], "time/train_seconds": facts["train_seconds"]}
    final["time/tokens_per_s"] = record.median_speed(events)
    final |= trace.consistency(trace.read(folder / "trace"))
    record.write_json(folder / "metrics.json", {"final_metrics": final, "history": history})
    return final


def _commit() -> str | None:
    """The commit of this framework's checkout, with a mark if files differ from it."""
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None
