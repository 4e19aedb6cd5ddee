"""Tell where a run stands among the runs of its command: its number, and how long all of them will still take.

A launcher may start each run in a process of its own, on this machine. An environment variable tells these processes
what they need to know. They share an empty folder, in which a run leaves a file for each thing that is known: that it
began, that it ended, and what has been said.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_VARIABLE = "MOE_PLACE"


class Place(NamedTuple):
    """The place of a run among the runs of its command.

    number: which of them it is, from 1. total: how many the command asks for. unfinished: those that were not finished
    when the command began, at `began` (seconds since 1970). process: the one that carries out the command. folder: the
    one that all runs share; None if there is only this run.
    """

    number: int = 1
    total: int = 1
    unfinished: int = 1
    began: float = 0.0
    process: int = 0
    folder: str | None = None

    @staticmethod
    def of(number: int) -> "Place":
        """Return the place of run `number` of the command to which this process belongs."""
        settings = json.loads(os.environ.get(_VARIABLE, "{}"))
        return Place(number, **settings) if settings else Place()

    @property
    def in_sweep(self) -> bool:
        """Whether the run is one of a sweep."""
        return self.folder is not None

    @property
    def prefix(self) -> str:
        """How the lines of this run begin, such as "run 4 of 18: ". It is empty for a run outside of a sweep."""
        return f"run {self.number} of {self.total}: " if self.in_sweep else ""

    @property
    def has_terminal(self) -> bool:
        """Whether no other run can write to the terminal meanwhile. Only such a run shows progress bars."""
        return not self.in_sweep or self.process == os.getpid()

    def first_to_say(self, line: str) -> bool:
        """Return whether no run of this command asked the same before."""
        return self._leave(f"said-{hashlib.sha256(line.encode()).hexdigest()[:16]}")

    def begin(self) -> None:
        """Tell the other runs that this one began."""
        self._leave(f"began-{self.number}")

    def end(self) -> None:
        """Tell the other runs that this one ended."""
        self._leave(f"ended-{self.number}")

    def ended(self) -> int:
        """Return how many runs have ended since the command began."""
        return self._count("ended")

    def standing(self, part: float = 0.0) -> str:
        """Return such as "3 of 18 ended after 12 min, about 60 min left".

        part: what is done of this run, between 0 and 1. Other runs that are going on count as half done.
        """
        ended, elapsed = self.ended(), time.time() - self.began
        going_on = self._count("began") - ended - (part > 0)
        done = ended + part + going_on / 2
        skipped = self.total - self.unfinished
        return f"{skipped + ended} of {self.total} ended {so_far(elapsed, done, self.unfinished)}"

    def _leave(self, name: str) -> bool:
        """Return whether the shared folder had no file of this name before; it has one now."""
        if self.folder is None:
            return True
        try:
            Path(self.folder, name).touch(exist_ok=False)
        except OSError:  # the file exists; or the folder was deleted, because the command was killed
            return False
        return True

    def _count(self, kind: str) -> int:
        return len(list(Path(self.folder).glob(f"{kind}-*"))) if self.folder is not None else 0


@contextmanager
def command(total: int, unfinished: int) -> Iterator[None]:
    """Tell all processes that this one starts meanwhile that they carry out a sweep of `total` runs."""
    with tempfile.TemporaryDirectory(prefix="moe-", ignore_cleanup_errors=True) as folder:
        place = Place(0, total, unfinished, time.time(), os.getpid(), folder)._asdict()
        del place["number"]
        os.environ[_VARIABLE] = json.dumps(place)
        try:
            yield
        finally:
            del os.environ[_VARIABLE]


def so_far(elapsed: float, done: float, total: int) -> str:
    """Return such as "after 12 min, about 60 min left", given the seconds in which `done` of `total` runs were done."""
    left = f", about {duration(elapsed / done * (total - done))} left" if 0 < done < total else ""
    return f"after {duration(elapsed)}{left}"


def duration(seconds: float) -> str:
    """Return a time in words, such as "45 s", "12 min" or "2.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
