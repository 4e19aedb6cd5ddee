"""Processes to be killed: `train.py`, forked from a server that has imported everything, so that starts are fast."""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from small_runs import untimed

from moe.files import sha256
from moe.runs.events import read_events

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
LIMIT = 400  # seconds that any run here may take

Sabotage = Callable[[], None]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["moe.training.loop", "moe.runs.wandb_mirror", "moe.results.conditions", "hydra.main"])


class Job:
    """One command, to be started again and again: its runs lie below `root`, its output in `root/log`."""

    def __init__(self, root: Path, arguments: list[str]) -> None:
        self.root, self.log = root, root / "log"
        self.arguments = [*sorted(arguments, key="-m".__ne__), f"out={root / 'runs'}"]
        root.mkdir(parents=True, exist_ok=True)

    def start(self, sabotage: Sabotage | None = None) -> BaseProcess:
        """`train.py` with this job's arguments, in a process of its own; `sabotage()` is called in it first."""
        self.log.write_text("")
        ready = _SERVER.Event()
        process = _SERVER.Process(target=_train, args=(self.arguments, self.log, ready, sabotage))
        process.start()
        assert ready.wait(LIMIT)
        return process

    def spawn(self, *launcher: str) -> subprocess.Popen[bytes]:
        """`train.py` as a process that is no child of multiprocessing, started by Python or by a `launcher` of it."""
        with self.log.open("wb") as log:
            return subprocess.Popen([sys.executable, *launcher, str(TRAIN), *self.arguments], stdout=log, stderr=log)

    def run(self, sabotage: Sabotage | None = None) -> int:
        """Start it and wait for its end; returns the exit status, -N after signal N."""
        return ended(self.start(sabotage))

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def folder(self) -> Path:
        [folder] = (self.root / "runs").glob("*/*/")
        return folder

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "run.json").read_text()))

    def steps(self) -> int:
        """Optimizer steps that its events tell of, 0 before the first one."""
        events = [path for path in (self.root / "runs").glob("*/*/events.jsonl") if path.exists()]
        return max((event["step"] for path in events for event in read_events(path)), default=0)

    def wait_for_step(self, process: BaseProcess, step: int) -> None:
        """Return once `step` is in its events, or the process has ended."""
        deadline = time.monotonic() + LIMIT
        while self.steps() < step and process.is_alive():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.002)


def ended(process: BaseProcess) -> int:
    """Exit status of a process that ends by itself."""
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"still running after {LIMIT} s")
    assert process.exitcode is not None
    return process.exitcode


def result(folder: Path) -> dict[str, Any]:
    """All that must be equal, to the last bit, in an undisturbed and in a disturbed run: weights, events, metrics."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["history"].pop("elapsed_times")
    final = {key: value for key, value in metrics["final_metrics"].items() if not key.startswith("time/")}
    weights = sha256(folder / "model" / "model.safetensors")
    return {"weights": weights, "events": untimed(folder), "final": final, "history": metrics["history"]}


def _train(arguments: list[str], log: Path, ready: Event, sabotage: Sabotage | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a fork server ignores it, and so does a shell's `&`
    ready.set()
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [str(TRAIN), *arguments]
    if sabotage is not None:
        sabotage()
    runpy.run_path(str(TRAIN), run_name="__main__")


def die() -> None:
    """As the kernel's OOM killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def patch(module: str, name: str, make: Callable[[Any], Any]) -> None:
    """Replace `name` of an imported `module` by `make(what it was)`."""
    holder = sys.modules.get(module) or __import__(module, fromlist=["_"])
    setattr(holder, name, make(getattr(holder, name)))
