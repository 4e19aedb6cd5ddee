"""Train one cell in its run folder: skip a finished run, resume an interrupted one, refuse a different one."""

import logging
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe import files
from moe.checks import ConfigError, first_line, parse
from moe.config import run_routers
from moe.config.cell import Cell
from moe.distributed import ranks
from moe.files import shown
from moe.launch import slurm
from moe.launch.plans import record_end
from moe.runs import events
from moe.runs.card import write_cards
from moe.runs.folder import LOCK, delete_checkpoints, difference, finished, locked, recorded_grid, stored_record
from moe.runs.place import Place
from moe.runs.record import Machine, MetricsRecord, RecordError, RunFacts, RunRecord, Status
from moe.runs.signals import STOP, Interrupted, Signals, follow_parent, leave

log = logging.getLogger(__name__)

LIBRARIES = (
    "moe-routing",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "hydra-core",
    "omegaconf",
    "numpy",
)


def run(cell: Cell, place: Place | None = None) -> None:
    """Train one cell, or skip it if it is finished.

    place: where the run stands among the runs of its command. In a sweep, each line names the run.

    The outcome is written to run.json in the folder. A failure is written there and printed, but not raised, so that a
    sweep goes on. If there are several ranks, the first one decides whether to train and holds the lock.
    """
    follow_parent()
    if not ranks.is_first():
        if ranks.broadcast(None):
            _train(cell, Place())
        return
    place = place or Place()
    with _named(place.prefix):
        _run(cell, place)


def _run(cell: Cell, place: Place) -> None:
    name = shown(cell.folder)
    try:
        already_finished = finished(cell)
    except RecordError as error:
        log.error("%s", error)
        ranks.broadcast(False)
        return
    if already_finished:
        log.info("%s: skipped, because it is finished", name)
        ranks.broadcast(False)
        return
    cell.folder.mkdir(parents=True, exist_ok=True)
    with locked(cell.folder / LOCK) as owner:
        if ranks.broadcast(_may_train(cell, owner)):
            log.info("%s: %s", name, "training" if cell.config.steps else "evaluating")
            place.begin()
            _train(cell, place)


@contextmanager
def _named(prefix: str) -> Iterator[None]:
    """Begin each message that is logged meanwhile with `prefix`."""
    before = logging.getLogRecordFactory()

    def named(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        record.msg = f"{prefix}{record.msg}"
        return record

    logging.setLogRecordFactory(named if prefix else before)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


def _may_train(cell: Cell, owner: str | None) -> bool:
    """Return whether this process should train the cell. If not, log why.

    owner: the process that holds the lock of the folder; None if this process holds it.

    The folder is checked again, because another process may have written to it since the last check.
    """
    if owner is not None:
        log.info("%s: another process is training it (%s)", shown(cell.folder), owner)
        return False
    try:
        if differences := difference(cell):
            log.error("%s holds another run: %s", shown(cell.folder), "; ".join(differences))
            return False
        if finished(cell):
            return False
    except RecordError as error:
        log.error("%s", error)
        return False
    if reason := slurm.stalled(cell.folder):
        log.error("%s: %s", shown(cell.folder), reason)
        _write_end(cell, "failed", reason)
        return False
    return True


def _train(cell: Cell, place: Place) -> None:
    """Train a cell, and write how it ended. If a signal stopped the run or the sweep, end this process."""
    stop: Interrupted | None = None
    with Signals() as signals:
        try:
            _train_to_end(cell, place, signals)
        except Interrupted as error:
            stop = error
            _write_end(cell, "interrupted", str(stop))
            log.warning("%s: %s", shown(cell.folder), stop)
        except Exception as error:  # record it: the other cells of a sweep go on, and the command exits with 1
            _write_failure(cell, place, error)
    if stop:
        stop.pass_on()
        leave(stop.exit_status)
    if signals.received in STOP:  # this run has ended, but the rest of a sweep must stop
        leave(128 + signals.received)


def _train_to_end(cell: Cell, place: Place, signals: Signals) -> None:
    """Train a cell, and write the files of a finished run on the first rank."""
    from moe.runs.mirrors import Mirrors
    from moe.training.loop import train

    final: dict[str, Any] = {}
    grid = recorded_grid([cell])
    write_run_record(cell, "running")
    mirrors = Mirrors(cell)
    try:
        facts = parse(RunFacts, train(cell.config, cell.folder, signals=signals, listeners=[mirrors], place=place))
        if ranks.is_first():
            final = _write_metrics(cell.folder, facts)
            write_cards(cell.folder, run_record(cell, "finished", facts))
    finally:
        mirrors.finish(final)
    write_run_record(cell, "finished", facts)
    if ranks.is_first():
        delete_checkpoints(cell.folder)  # not earlier, so that a run that is killed at its end can be resumed
        _say_finished(place, final, tested=grid is None or grid.search is None)


def _say_finished(place: Place, final: dict[str, Any], *, tested: bool) -> None:
    """Log the perplexities of a finished run, and in a sweep how many runs are left.

    tested: whether that on the test text is logged. It is not before results of these runs have chosen settings.
    """
    place.end()
    standing = f"; {place.standing()}" if place.in_sweep else ""
    texts = [name for name in ("val", "test")[: 1 + tested] if f"{name}/perplexity" in final]
    perplexities = ", ".join(f"{name} perplexity {final[f'{name}/perplexity']:.2f}" for name in texts)
    log.info("finished, %s%s", perplexities, standing)


def _write_failure(cell: Cell, place: Place, error: Exception) -> None:
    """Log and write the error that is being handled. If only this rank may have it, end this process."""
    from moe.training.divergence import Diverged

    reason = f"{type(error).__name__}: {_reason(error)}"
    if not isinstance(error, (ConfigError, Diverged)):  # these say all that there is to know
        reason += f"; see {shown(cell.folder / 'traceback.txt')}"
    log.error("%s failed: %s", shown(cell.folder), reason)
    place.end()
    _write_end(cell, "failed", reason, details=traceback.format_exc())
    if ranks.world_size() > 1 and not isinstance(error, Diverged):  # all ranks see a divergence, no other error
        sys.exit(1)


def _write_end(cell: Cell, status: Status, error: str, *, details: str | None = None) -> None:
    """Write why a run ended early. If even this fails, for example on a full disk, log it instead."""
    try:
        if details is not None and ranks.is_first():
            files.write_text(cell.folder / "traceback.txt", details)
        write_run_record(cell, status, error=error)
    except (OSError, ValueError) as second:
        log.error("%s: the error cannot be written to the folder: %s", shown(cell.folder), first_line(second))


def _reason(error: Exception) -> str:
    """Return the first line of an error, with advice for the common cases."""
    line = first_line(error) if str(error).strip() else ""
    if isinstance(error, MemoryError) or "out of memory" in line or "can't allocate memory" in line:
        line += "; a smaller batch_size with a larger grad_accum needs less memory"
    if ranks.world_size() > 1 and any(word in line for word in ("gloo", "NCCL")):
        line += "; another rank died or was frozen: the same command resumes the run"
    return line


def write_run_record(cell: Cell, status: Status, facts: RunFacts | None = None, *, error: str | None = None) -> None:
    """Write the run record of a cell, on the first rank, and after it into the sweep folder if the run has ended.

    A run that is killed between both is written down by the next command (`moe.launch.plans.record_plan`).
    """
    if ranks.is_first():
        record = run_record(cell, status, facts, error=error)
        record.write(cell.folder / RunRecord.FILE)
        if record.ended:
            record_end(cell, record)


def run_record(cell: Cell, status: Status, facts: RunFacts | None = None, *, error: str | None = None) -> RunRecord:
    """Return what is known about the run of a cell."""
    config, before = cell.config, stored_record(cell)
    if before is not None:  # claims count as planned only if they were recorded before the first step
        seeds, effect = (before.config.get(key) for key in ("planned_seeds", "planned_effect"))
        config = replace(config, claims=before.claims(), planned_seeds=seeds, planned_effect=effect)
    return RunRecord(
        status=status,
        error=error,
        experiment=cell.experiment,
        name=cell.folder.name,
        started=before.started if before else datetime.now(UTC).isoformat(timespec="seconds"),
        choices=cell.choices,
        causal=run_routers.is_causal(config),
        config=asdict(config),
        identity=cell.identity(),
        versions={"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        machine=_machine(),
        commit=_commit(),
        plugins=config.plugins(),
        facts=facts,
    )


def _write_metrics(folder: Path, facts: RunFacts) -> dict[str, Any]:
    """Write metrics.json from the event log and the traces of a run; return the final metrics."""
    from moe.metrics.agreement import consistency
    from moe.runs import traces

    logged = events.read_events(folder / events.FILE)
    last = [event for event in logged if event["kind"] == "eval"][-1]
    history = events.evaluation_series(logged)
    final = {key: value for key, value in last.items() if "/" in key and not key.startswith("time/")}
    final |= {"train/loss": history["train_losses"][-1], "time/train_seconds": facts.train_seconds}
    final["time/tokens_per_s"] = events.median_speed(logged)
    final[events.LAST_MEAN] = events.last_mean(logged, "val/loss")
    final["train/routing/drop_rate"] = events.late_mean(logged, "train/routing/drop_rate")
    final |= consistency([trace.chosen for trace in traces.read_traces(folder / "trace")])
    MetricsRecord(final_metrics=final, history=history).write(folder / MetricsRecord.FILE)
    return final


@cache
def _machine() -> Machine:
    """Return what this process runs on; the version of the driver is asked from the tool that comes with it."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    driver = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else []
    return Machine(
        system=platform.platform(),
        processor=processor(),
        cpus=os.cpu_count(),
        gpus=gpus,
        driver=driver[0] if driver else None,
    )


def processor() -> str | None:
    """Return the name of the processor; None if the system does not tell it."""
    if platform.system() == "Darwin":
        lines = _printed("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        lines = [line.partition(":")[2].strip() for line in _printed("lscpu") if line.startswith("Model name")]
    return next(iter(lines), None) or platform.processor() or None


def _printed(*command: str) -> list[str]:
    """Return the lines that a command prints; none if it is not installed or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []


@cache
def _version(package: str) -> str:
    """Return the version of an installed package, "unknown" for one that is imported without being installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@cache  # the code of this process was imported at its start
def _commit() -> str | None:
    """Return the commit of this project's checkout; None if this is no checkout, or if git is missing.

    It is marked "-dirty" if the code or a yaml differs from the commit, or is not part of it.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed package, perhaps within the repository of something else
        return None
    command = ["git", "status", "--porcelain=v2", "--branch", "--", "moe", "conf", "train.py"]
    try:
        lines = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return None
    head = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), None)
    changes = [line for line in lines if not line.startswith("#")]
    return head + ("-dirty" if changes else "") if head else None
