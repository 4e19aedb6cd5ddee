"""Asking a run to stop: at once before training, between two steps during it; a second Ctrl-C quits at once."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from moe.distributed import ranks

STOP = (signal.SIGTERM, signal.SIGINT)
REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)  # of batch systems, where whoever started the process handles them
PR_SET_PDEATHSIG = 1  # a name of linux/prctl.h


class Interrupted(BaseException):
    """A signal stopped the run after a checkpoint at `step`, or before training. Like KeyboardInterrupt no Exception:
    whoever survives errors must not survive this."""

    def __init__(self, number: int, step: int | None = None) -> None:
        when = "before it trained" if step is None else f"after step {step}"
        super().__init__(f"stopped by {signal.Signals(number).name} {when}; the same command resumes it")
        self.number, self.exit_status = number, 128 + number

    def pass_on(self) -> None:
        """Have a batch system's own handler put the job back into the queue, now that the run is saved."""
        if self.number in REQUEUE:
            signal.raise_signal(self.number)


class Signals:
    """Within `with Signals() as signals`, SIGTERM, SIGINT and a batch system's signal raise Interrupted, or, once
    `training` is set because there are steps to save, set `signals.received` for the loop to see between two steps."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python cannot set handlers
            numbers = [*STOP, *(n for n in REQUEUE if callable(signal.getsignal(n)))]
            self._before = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received not in REQUEUE:  # a batch system may send SIGTERM beside it
            self.received = number
        if not self.training:
            raise Interrupted(self.received)


def follow_parent() -> None:
    """In a launcher's worker process, or a rank, have SIGTERM sent when the process that started it dies, even by
    SIGKILL.

    Linux only; elsewhere an orphaned worker finishes its run, and the run's lock keeps others away from it.
    """
    parent = multiprocessing.parent_process()
    started_by = os.getppid() if parent is None and ranks.world_size() > 1 else getattr(parent, "pid", None)
    if started_by is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        os.kill(started_by, 0)
    except ProcessLookupError:  # it died before that call
        os.kill(os.getpid(), signal.SIGTERM)
