"""Train a cell in this process, to its end or until a simulated SIGTERM, and read its events."""

import signal
from pathlib import Path
from typing import Any

from moe.config.schema import Cell
from moe.runs.events import read_events
from moe.runs.signals import Signals
from moe.training.loop import train
from moe.training.recorder import RunListener


class StopAfter(RunListener):
    """Listener that simulates a SIGTERM when step `stop_after` is recorded. If that is None, it does nothing."""

    def __init__(self, signals: Signals, stop_after: int | None) -> None:
        self.signals = signals
        self.stop_after = stop_after

    def log(self, step: int, values: dict[str, Any]) -> None:
        if step == self.stop_after:
            self.signals.received = signal.SIGTERM


def run(cell: Cell, *, stop_after: int | None = None) -> dict[str, Any]:
    """Train a cell and return facts about the run. After step `stop_after` a SIGTERM is simulated."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    signals = Signals()
    return train(cell.config, cell.folder, signals=signals, listeners=[StopAfter(signals, stop_after)])


def untimed(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run without times and durations."""
    events = read_events(folder / "events.jsonl")
    return [{key: value for key, value in e.items() if not key.startswith("time/")} for e in events]
