"""Stop a run on a signal: at once before training, and after the present step, with a checkpoint, during training.

A second Ctrl-C stops it at once in any case.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Never

from moe.distributed import ranks

STOP = (signal.SIGTERM, signal.SIGINT)
REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)  # sent by batch systems; handled only if a handler is already installed
PR_SET_PDEATHSIG = 1  # as in linux/prctl.h


class Interrupted(BaseException):
    """A signal stopped the run: after the checkpoint of `step`, or before training if `step` is None.

    Like KeyboardInterrupt it is not an Exception, so that code which catches errors and goes on does not catch it.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        when = "before it trained" if step is None else f"after step {step}"
        super().__init__(f"stopped by {signal.Signals(number).name} {when}; the same command resumes it")
        self.number, self.exit_status = number, 128 + number

    def pass_on(self) -> None:
        """Raise the signal again for the batch system's own handler, which puts the job back into the queue."""
        if self.number in REQUEUE:
            signal.raise_signal(self.number)


class Signals:
    """Context manager that handles SIGTERM, SIGINT and the signals of batch systems.

    Before training a signal raises Interrupted. The training loop sets `training` when it has steps to save; from then
    on a signal only sets `received`, which the loop reads after each step. After the first signal another SIGTERM
    changes nothing, so that the end of the run can be written: Linux sends one for each thread of a killed parent.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python can set handlers only there
            numbers = [*STOP, *(n for n in REQUEUE if callable(signal.getsignal(n)))]
            self._before = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received not in REQUEUE:  # a batch system may send SIGTERM right after its own signal
            self.received = number
        if not self.training and not again:
            raise Interrupted(number)


_starter: int | None = None  # the process whose end is told by SIGTERM


def follow_parent() -> None:
    """In a worker process of a launcher, or in a rank, ask for SIGTERM when the parent process dies, even by SIGKILL.

    Works on Linux only. On other systems a worker whose parent died finishes its run; the lock of the run folder keeps
    other processes from training the same run.
    """
    global _starter
    parent = multiprocessing.parent_process()
    started_by = os.getppid() if parent is None and ranks.world_size() > 1 else getattr(parent, "pid", None)
    if started_by is None or sys.platform != "linux":
        return
    if _starter is None:
        _starter = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        os.kill(started_by, 0)
        dead = _is_orphan()
    except ProcessLookupError:  # it died before prctl was called
        dead = True
    if dead:
        os.kill(os.getpid(), signal.SIGTERM)


def leave(status: int) -> Never:
    """End this process with an exit status. A worker whose parent died ends at once.

    The pool of such a worker would catch SystemExit, and the worker would wait minutes for a job that nobody sends.
    """
    if _is_orphan():
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _is_orphan() -> bool:
    return _starter is not None and os.getppid() != _starter
