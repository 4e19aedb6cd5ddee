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

from moe import record
from moe.checks import ConfigError
from moe.config import Cell

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "hydra-core", "omegaconf", "numpy")


def check_folders(cells: list[Cell]) -> None:
    """Refuse, before any cell starts, a folder that holds a run of another configuration; note what a sweep wants."""
    for cell in cells:
        difference = _difference(cell)
        if difference:
            raise ConfigError(
                f"{cell.folder} holds another run: {'; '.join(difference)}. Choose another out=DIR or delete the folder"
            )


def run(cell: Cell) -> None:
    """Train one cell, or skip it if it is finished. What happened is in the folder's run.json; a failure is written
    there and printed, not raised, so that a sweep goes on."""
    from moe.loop import train
    from moe.signals import Interrupted, Signals
    from moe.trackers import Mirror

    cell.folder.mkdir(parents=True, exist_ok=True)
    with _locked(cell.folder) as free:
        if difference := _difference(cell):
            log.error("%s holds another run: %s", cell.folder, "; ".join(difference))
            return
        if not free or status(cell) == "finished":
            log.info("%s: %s", cell.folder, "finished before, skipped" if free else "another process is training it")
            return
        _write(cell, "running")
        mirror = Mirror(cell)
        try:
            with Signals() as signals:
                facts = train(cell.config, cell.folder, mirror=mirror, signals=signals)
            final = _write_metrics(cell.folder, facts)
            mirror.finish(final)
            _write(cell, "finished", facts)
            log.info("%s: finished, val perplexity %.2f", cell.folder, final["val/perplexity"])
            if signals.received is not None:  # too late for this run, in time for the rest of a sweep
                sys.exit(128 + signals.received)
        except Interrupted as stop:
            mirror.finish({})
            _write(cell, "interrupted", error=str(stop))
            log.warning("%s: %s", cell.folder, stop)
            sys.exit(stop.exit_status)
        except Exception as error:  # recorded, so that the other cells of a sweep still run; `report` exits with 1
            mirror.finish({})
            reason = (str(error).strip().splitlines() or [""])[0]
            _write(cell, "failed", error=f"{type(error).__name__}: {reason}")
            log.error("%s failed: %s: %s", cell.folder, type(error).__name__, reason)
            (cell.folder / "traceback.txt").write_text(traceback.format_exc())


def status(cell: Cell) -> str:
    """finished | failed | running | interrupted | missing."""
    return str(_stored(cell).get("status", "missing"))


def report(cells: list[Cell]) -> int:
    """After a command's cells have run: the sweep's tables, and the exit status (1 if any cell is not finished)."""
    states = [status(cell) for cell in cells]
    sweep = cells[0].folder.parent
    if len(cells) > 1 and sweep.is_dir():
        from moe import summaries

        print(f"\n{summaries.console_table(summaries.write_sweep_tables(sweep))}\n\n{sweep / 'results.csv'}")
    return 0 if set(states) == {"finished"} else 1


def note_cells(cells: list[Cell]) -> None:
    """Write down which cells a sweep is to have, so that missing ones can be named later."""
    if len(cells) < 2:
        return
    sweep = cells[0].folder.parent
    sweep.mkdir(parents=True, exist_ok=True)
    path = sweep / "sweep.json"
    before = json.loads(path.read_text())["cells"] if path.exists() else []
    record.write_json(path, {"cells": sorted({*before, *(cell.folder.name for cell in cells)})})


def _stored(cell: Cell) -> dict[str, Any]:
    path = cell.folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _difference(cell: Cell) -> list[str]:
    """The keys in which a folder's run differs from this cell, as "key: theirs, here ours"."""
    stored = _stored(cell).get("identity")
    if stored is None:
        return []
    ours = json.loads(json.dumps(cell.config.identity()))
    keys = [key for key in {**stored, **ours} if stored.get(key) != ours.get(key)]
    return [f"{key} is {stored.get(key)} there, {ours.get(key)} here" for key in keys]


def _write(cell: Cell, state: str, facts: dict[str, Any] | None = None, *, error: str | None = None) -> None:
    causal = cell.config.build_router().causal
    config, before = asdict(cell.config), _stored(cell).get("config")
    if before is not None:  # on a resume too, claims are what was claimed before the first step
        config["claims"] = before.get("claims", [])
    content = {
        "status": state,
        "error": error,
        "experiment": cell.experiment,
        "name": cell.folder.name,
        "choices": cell.choices,
        "causal": causal and (cell.config.capacity is None or cell.config.drop == "position"),
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


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; False if another process has it. The system frees it when a process dies."""
    with open(folder / "run.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
