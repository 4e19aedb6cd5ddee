"""A run folder is a run's identity: finished runs are skipped, interrupted ones resumed, different ones refused."""

import logging
import os
import platform
import subprocess
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe import files
from moe.config.schema import Cell
from moe.distributed import ranks
from moe.runs import events
from moe.runs.folder import difference, finished, locked, stored
from moe.runs.signals import STOP, Interrupted, Signals, follow_parent

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "hydra-core", "omegaconf", "numpy")


def run(cell: Cell) -> None:
    """Train one cell, or skip it if it is finished. What happened is in the folder's run.json; a failure is written
    there and printed, not raised, so that a sweep goes on.

    Of several ranks the first decides, and holds the lock; the others train with it, or not.
    """
    follow_parent()
    if not ranks.is_first():
        if ranks.broadcast(None):
            _train(cell)
    elif finished(cell):
        log.info("%s: finished before, skipped", cell.folder)
        ranks.broadcast(False)
    else:
        cell.folder.mkdir(parents=True, exist_ok=True)
        with locked(cell.folder / "run.lock") as owner:
            if ranks.broadcast(_is_ours(cell, owner)):
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


def _train(cell: Cell) -> None:
    from moe.runs.wandb_mirror import WandbMirror
    from moe.training.divergence import Diverged
    from moe.training.loop import train

    final: dict[str, Any] = {}
    try:
        _write(cell, "running")
        with Signals() as signals:
            mirror = WandbMirror(cell)
            try:
                facts = train(cell.config, cell.folder, signals=signals, listeners=[mirror])
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
                files.write_text(cell.folder / "traceback.txt", traceback.format_exc())
            _write(cell, "failed", error=reason)
        except OSError as second:
            log.error("%s: that cannot be written down: %s", cell.folder, second)
        if ranks.world_size() > 1 and not isinstance(error, Diverged):  # which is the same on all; else who knows
            sys.exit(1)


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError) or "out of memory" in line or "can't allocate memory" in line:
        line += "; a smaller batch_size with a larger grad_accum needs less memory"
    if ranks.world_size() > 1 and any(word in line for word in ("gloo", "NCCL")):
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
    files.write_json(cell.folder / "run.json", content)


def _write_metrics(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    from moe.metrics.agreement import consistency
    from moe.runs import traces

    logged = events.read_events(folder / "events.jsonl")
    last = [event for event in logged if event["kind"] == "eval"][-1]
    history = events.evaluation_series(logged)
    final = {key: value for key, value in last.items() if "/" in key and not key.startswith("time/")}
    final |= {"train/loss": history["train_losses"][-1], "time/train_seconds": facts["train_seconds"]}
    final["time/tokens_per_s"] = events.median_speed(logged)
    final |= consistency([trace.chosen for trace in traces.read_traces(folder / "trace")])
    files.write_json(folder / "metrics.json", {"final_metrics": final, "history": history})
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
