"""Real processes of train.py and analyze.py that start fast: a server that has imported everything forks them."""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from small_runs import untimed

from moe.files import sha256
from moe.runs.events import read_events

ROOT = Path(__file__).resolve().parents[1]
TRAIN, ANALYZE = ROOT / "train.py", ROOT / "analyze.py"
LIMIT = 400  # seconds that one process may take

Sabotage = Callable[[], None]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    "hydra.main moe.training.loop moe.runs.wandb_mirror moe.results.sweep_tables moe.analysis.report.report".split()
)


def run_script(script: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script of this project in a new process, and return its exit status and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        status = wait_for_end(_fork(script, arguments, outputs, cwd=cwd))
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in outputs))


def run_ranks(environments: list[dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run train.py in a process for each of these environments, as the ranks of one run.

    The exit status is that of the first process that failed, and the output is that of all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        processes = [_fork(TRAIN, arguments, outputs, environment=each) for each in environments]
        statuses = [wait_for_end(each) for each in processes]
        status = next((each for each in statuses if each), 0)
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in outputs))


class TrainCommand:
    """One train.py command that can be started again and again: runs below `root/runs`, output in `root/log`."""

    def __init__(self, root: Path, arguments: list[str]) -> None:
        self.root, self.log = root, root / "log"
        last_of_each_key = {word.partition("=")[0]: word for word in arguments}.values()
        self.arguments = [*sorted(last_of_each_key, key="-m".__ne__), f"out={root / 'runs'}"]
        root.mkdir(parents=True, exist_ok=True)

    def start(self, sabotage: Sabotage | None = None) -> BaseProcess:
        """Start train.py in a new process; `sabotage()` is called in it first."""
        self.log.write_text("")
        return _fork(TRAIN, self.arguments, (self.log, self.log), sabotage=sabotage)

    def spawn(self, *launcher: str) -> subprocess.Popen[bytes]:
        """Start train.py as a process that is no child of multiprocessing, by Python or by a `launcher` module."""
        with self.log.open("wb") as log:
            return subprocess.Popen([sys.executable, *launcher, str(TRAIN), *self.arguments], stdout=log, stderr=log)

    def run(self, sabotage: Sabotage | None = None) -> int:
        """Start it, wait for its end and return the exit status, -N after signal N."""
        return wait_for_end(self.start(sabotage))

    @property
    def output(self) -> str:
        """Return what the command printed, without the lines that announce the disk it needs and the text it reads."""
        lines = self.log.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith(("disk: ", "reading and tokenizing ")))

    @property
    def folder(self) -> Path:
        [folder] = (self.root / "runs").glob("*/*/")
        return folder

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))

    @property
    def record(self) -> dict[str, Any]:
        return read_record(self.folder)

    def steps(self) -> int:
        """Return the last optimizer step in its events, 0 before the first one."""
        events = [path for path in (self.root / "runs").glob("*/*/events.jsonl") if path.exists()]
        return max((event["step"] for path in events for event in read_events(path)), default=0)

    def wait_for_step(self, process: BaseProcess, step: int) -> None:
        """Return once `step` is in its events, or the process has ended."""
        deadline = time.monotonic() + LIMIT
        while self.steps() < step and process.is_alive():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.002)


def wait_for_end(process: BaseProcess) -> int:
    """Return the exit status of a process that ends by itself, -N after signal N."""
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running after {LIMIT} s")
    assert process.exitcode is not None
    return process.exitcode


def read_record(folder: Path) -> dict[str, Any]:
    """Return run.json as it stands."""
    return dict(json.loads((folder / "run.json").read_text()))


def result(folder: Path) -> dict[str, Any]:
    """Return what a disturbed and an undisturbed run have in common, bit for bit: weights, events, metrics."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["history"].pop("elapsed_times")
    final = {key: value for key, value in metrics["final_metrics"].items() if not key.startswith("time/")}
    weights = sha256(folder / "model" / "model.safetensors")
    return {"weights": weights, "events": untimed(folder), "final": final, "history": metrics["history"]}


def _fork(
    script: Path,
    arguments: Any,
    outputs: tuple[Path, Path],
    *,
    cwd: Path | None = None,
    sabotage: Sabotage | None = None,
    environment: dict[str, str] | None = None,
) -> BaseProcess:
    """Start a script in a process whose standard output and error go to these files; return once it runs.

    environment: the variables of the new process; by default, those of this one.
    """
    ready = _SERVER.Event()
    variables = {**os.environ} if environment is None else environment
    process = _SERVER.Process(
        target=_main, args=(script, list(arguments), outputs, Path(cwd or "."), ready, sabotage, variables)
    )
    process.start()
    assert ready.wait(LIMIT)
    return process


def _main(
    script: Path,
    arguments: list[str],
    outputs: tuple[Path, Path],
    cwd: Path,
    ready: Event,
    sabotage: Sabotage | None,
    environment: dict[str, str],
) -> None:
    os.environ.clear()  # the server has the variables of the first test that started a process
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the server ignores it, and so does a shell's `&`
    ready.set()
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), number)
    os.chdir(cwd)
    sys.argv = [str(script), *arguments]
    if sabotage is not None:
        sabotage()
    runpy.run_path(str(script), run_name="__main__")


def die() -> None:
    """End this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def patch(module: str, name: str, make: Callable[[Any], Any]) -> None:
    """Replace `name` of a module by `make(its present value)`."""
    holder = sys.modules.get(module) or __import__(module, fromlist=["_"])
    setattr(holder, name, make(getattr(holder, name)))
