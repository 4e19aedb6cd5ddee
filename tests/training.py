"""A run in this process, to its end or to a signal."""

import signal
from typing import Any

from moe.config import Cell
from moe.loop import train
from moe.signals import Signals
from moe.trackers import Mirror


def run(cell: Cell, *, stop_after: int | None = None) -> None:
    """Train a cell; `stop_after`: pretend that SIGTERM arrives during that step."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    signals = Signals()

    class Watch(Mirror):
        def log(self, step: int, values: dict[str, Any]) -> None:
            if step == stop_after:
                signals.received = signal.SIGTERM

    train(cell.config, cell.folder, mirror=Watch(cell), signals=signals)
