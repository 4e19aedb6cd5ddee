"""Run the cells of a sweep as Slurm jobs: check the settings, submit, say what the jobs do, wait for their end.

Only Slurm's queue says which jobs go on, so no accounting (`sacct`) is needed.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from moe.checks import ConfigError, require
from moe.files import read_text, write_json
from moe.runs.place import so_far
from moe.runs.record import RecordError, RunRecord

COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
STATES = ("queued", "running", "ended")
ENDED = set("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split())
USUAL = {"None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime"}  # reasons to wait that end by themselves
EARLIER = 60  # seconds that Slurm may send its signal before the time that was asked for
ROUNDS = 3  # times that a job may start from the same checkpoint


class Refused(SystemExit):
    """Slurm refuses the jobs of a sweep. `reason` is one line with Slurm's words. The exit status is 2."""

    def __init__(self, reason: str) -> None:
        super().__init__(2)
        self.reason = reason


class Job(NamedTuple):
    """A job in Slurm's queue: queued, running or ended, and Slurm's reason if it is an unusual one."""

    state: str
    reason: str


def check_times(settings: Any) -> None:
    """Raise ConfigError if a job with these settings (`hydra.launcher`) would have no time to train."""
    limit = 60 * settings.timeout_min - EARLIER
    allowed = (
        f"at least 0 and less than {limit}: hydra.launcher.timeout_min={settings.timeout_min}, "
        f"and Slurm sends the signal up to {EARLIER} s earlier than asked for"
    )
    require(0 <= settings.signal_delay_s < limit, "hydra.launcher.signal_delay_s", settings.signal_delay_s, allowed)


def prepare() -> None:
    """Let `_launch` take the place of the launcher's method.

    Raises ConfigError if a Slurm command is missing, or if Slurm does not answer.
    """
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    allowed = f"used on a machine of a Slurm cluster; this one lacks the commands {', '.join(missing)}"
    require(not missing, "hydra/launcher", "slurm", allowed)
    _queue()
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
    from submitit.slurm.slurm import SlurmJob

    submit = SlurmLauncher.launch
    SlurmJob.results = lambda job: [job]  # `submit` then returns the jobs, without waiting for them

    def launch(launcher: Any, job_overrides: Any, initial_job_idx: int) -> list[Any]:
        cells = [list(overrides) for overrides in job_overrides]
        compose = launcher.hydra_context.config_loader.load_sweep_config
        sweeps = [compose(launcher.config, cell).hydra.sweep for cell in cells]
        folders = [Path(sweep.dir, sweep.subdir) for sweep in sweeps]
        _launch(cells, folders, lambda unfinished: submit(launcher, unfinished, initial_job_idx))
        return []

    SlurmLauncher.launch = launch


def _launch(cells: list[Any], folders: list[Path], submit: Callable[[list[Any]], Any]) -> None:
    """Submit a job for each unfinished cell that is not in the queue yet, and wait until all of these jobs have ended.

    cells: the overrides of each cell. folders: their run folders. submit: submits jobs for such cells and returns the
    jobs. Raises Refused.
    """
    record = folders[0].parent / ".submitit" / "jobs.json"
    known = json.loads(read_text(record)) if record.exists() else {}
    queue = _queue()
    going = {job: name for name, job in known.items() if job in queue and queue[job].state != "ended"}
    going = {job: name for job, name in going.items() if name in {folder.name for folder in folders}}
    for job, name in going.items():
        print(f"job {job} of an earlier command goes on: {name}", flush=True)
    pairs = zip(folders, cells, strict=True)
    new = {folder.name: cell for folder, cell in pairs if folder.name not in going.values() and not _finished(folder)}
    if new:
        jobs = [job.job_id for job in _submit(submit, list(new.values()))]
        write_json(record, known | dict(zip(new, jobs, strict=True)))
        going |= dict(zip(jobs, new, strict=True))
    _watch(going, record.parent)


def _finished(folder: Path) -> bool:
    try:
        return RunRecord.read(folder / RunRecord.FILE).status == "finished"
    except RecordError:
        return False


def _submit(submit: Callable[[list[Any]], Any], cells: list[Any]) -> Any:
    """Submit the jobs. Raises Refused with the words of sbatch, which submitit also prints to standard error."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            return submit(cells)
    except (FailedJobError, FailedSubmissionError) as error:
        raise Refused(f"sbatch refused the jobs: {_one_line(str(error))}") from None


def _one_line(words: str) -> str:
    """Return what a Slurm command printed, without `sbatch: error: ` before each line, as one line."""
    return "; ".join(line.split("error: ")[-1] for line in words.strip().splitlines() if line.strip())


def _queue() -> dict[str, Job]:
    """Return this user's jobs by number; those of an array as NUMBER_TASK. Raises ConfigError if Slurm has no answer.

    Slurm forgets a job some minutes after its end (MinJobAge).
    """
    command = ["squeue", f"--user={os.getuid()}", "--array", "--states=all", "--noheader", "--format=%i|%T|%r"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise ConfigError(f"hydra/launcher=slurm: squeue says: {_one_line(answer.stderr)}")
    rows = [line.split("|") for line in answer.stdout.splitlines()]
    return {number: _job(state, reason) for number, state, reason in rows}


def _job(state: str, reason: str) -> Job:
    if state in ENDED:
        return Job("ended", "" if state == "COMPLETED" else state)
    if state in ("RUNNING", "COMPLETING", "SUSPENDED"):
        return Job("running", "" if state == "RUNNING" else state)
    return Job("queued", "" if reason in USUAL else reason)


def _watch(going: dict[str, str], logs: Path) -> None:
    """Wait until the jobs have ended, and print each change: queued, running, ended. going: cell name by job."""
    jobs = dict.fromkeys(going, Job("submitted", ""))
    began = changed = time.monotonic()
    answers = True
    with _told_on_interrupt(jobs):
        while left := _left(jobs):
            try:
                queue, answers = _queue(), True
            except ConfigError as error:
                if answers:
                    print(f"{error}; asking again until it answers", flush=True)
                answers = False
                time.sleep(5)
                continue
            changes = {job: now for job in left if (now := queue.get(job, Job("ended", ""))) != jobs[job]}
            jobs.update(changes)
            for job, now in changes.items():
                print(_line(job, going[job], now, logs))
            if changes:
                counts = Counter(job.state for job in jobs.values())
                line = f"jobs: {', '.join(f'{counts[state]} {state}' for state in STATES)}"
                if 0 < counts["ended"] < len(jobs):  # a job that is running counts as half done
                    done = counts["ended"] + counts["running"] / 2
                    line += f"; {so_far(time.monotonic() - began, done, len(jobs))}"
                print(line, flush=True)
                changed = time.monotonic()
            time.sleep(min(30, 1 + (time.monotonic() - changed) / 20))


def _left(jobs: dict[str, Job]) -> list[str]:
    return [number for number, job in jobs.items() if job.state != "ended"]


def _line(number: str, name: str, job: Job, logs: Path) -> str:
    reason = f" ({job.reason})" if job.reason else ""
    where = f", see {logs / number}" if job.state == "ended" and reason else ""
    return f"{job.state:<8} {number:<7} {name}{reason}{where}"


@contextmanager
def _told_on_interrupt(jobs: dict[str, Job]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, say that the jobs go on and how to cancel them, and end this process."""

    def stop(number: int, frame: FrameType | None) -> None:
        arrays = " ".join(sorted({job.split("_")[0] for job in _left(jobs)}))
        print(f"\nThe jobs go on. The same command waits for them. `scancel {arrays}` cancels them.", flush=True)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stalled(folder: Path) -> str | None:
    """Return why this Slurm job should not go on: it was started again and again from the same checkpoint; else None.

    rounds.json in the run folder holds the first of the job's rounds that began from the present checkpoint.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return None
    path, number = folder / "rounds.json", int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    newest = max((checkpoint.name for checkpoint in (folder / "checkpoints").glob("step-*")), default="none")
    first: dict[str, Any] = {"round": 0, "checkpoint": "none"}
    if path.exists():
        first = json.loads(read_text(path))
    if number == 0 or first["checkpoint"] != newest:
        write_json(path, {"round": number, "checkpoint": newest})
        return None
    rounds: int = number - first["round"]
    if rounds < ROUNDS:
        return None
    return (
        f"Slurm started this job {rounds} times in a row without a new checkpoint (the newest: {newest}): raise "
        "hydra.launcher.timeout_min, make hydra.launcher.signal_delay_s longer than a step, or lower save_every"
    )
