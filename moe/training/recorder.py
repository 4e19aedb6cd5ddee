"""Record the events of a run: write them to events.jsonl, then pass them to the listeners of the run."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from moe.distributed import ranks
from moe.runs.events import EventLog, RunListener
from moe.training.state import Clock


class Recorder:
    """Writes the events of a run that continues after `step` optimizer steps; ranks other than the first do nothing."""

    def __init__(self, folder: Path, listeners: Sequence[RunListener], clock: Clock, *, step: int) -> None:
        self._events = EventLog(folder / "events.jsonl", step=step) if ranks.is_first() else None
        self._listeners = listeners
        self._clock = clock
        if self._events is not None:
            for listener in listeners:
                listener.begin(step)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations before `step`, in order; none on ranks other than the first."""
        return self._events.evaluations if self._events else []

    def record(self, kind: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Record an event of this kind, "train" or "eval"; return its values with the time."""
        values = values | {"time/elapsed": self._clock.elapsed()}
        if self._events is not None:
            self._events.write(kind, step, values)
            for listener in self._listeners:
                listener.log(step, values)
        return values

    def secure(self) -> None:
        """See `EventLog.secure`."""
        if self._events is not None:
            self._events.secure()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._events is not None:
            self._events.__exit__(kind, error, tb)
