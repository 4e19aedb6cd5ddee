"""Processes that measure or simulate for a benchmark, and end with it."""

import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context


@contextmanager
def workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """Yield so many new processes. If a signal stops the benchmark, they begin nothing more."""
    silent = signal.SIGINT, signal.SIG_DFL  # Ctrl-C reaches them too, and ends them without a traceback
    executor = ProcessPoolExecutor(number, mp_context=get_context("spawn"), initializer=signal.signal, initargs=silent)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
