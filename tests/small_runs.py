"""Train a cell in this process, to its end or until a simulated SIGTERM, and read its events."""

import signal
from functools import cache
from pathlib import Path
from typing import Any

from moe.config.cell import Cell
from moe.launch import command_line
from moe.runs.events import RunListener, read_events
from moe.runs.signals import Signals
from moe.training.loop import train

OUT = Path("/out")  # the folder of cached cells; the fixture `cell` replaces it by the folder of the test


@cache
def read_small_cell(overrides: tuple[str, ...]) -> Cell:
    """Compose a cell whose folder is below `OUT`. Hydra takes half a second, so equal cells are composed only once."""
    cells = command_line.read_cells([f"out={OUT}", *overrides])
    assert cells is not None
    return cells[0]


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
