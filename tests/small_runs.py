"""A run in this process, to its end or to a signal; what a run folder tells."""

import signal
from pathlib import Path
from typing import Any

from moe.config.schema import Cell
from moe.runs.events import read_events
from moe.runs.signals import Signals
from moe.runs.wandb_mirror import Mirror
from moe.training.loop import train


def run(cell: Cell, *, stop_after: int | None = None) -> dict[str, Any]:
    """Train a cell, for facts about it; `stop_after`: pretend that SIGTERM arrives during that step."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    signals = Signals()

    class Watch(Mirror):
        def log(self, step: int, values: dict[str, Any]) -> None:
            if step == stop_after:
                signals.received = signal.SIGTERM

    return train(cell.config, cell.folder, mirror=Watch(cell), signals=signals)


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, without durations."""
    events = read_events(folder / "events.jsonl")
    return [{key: value for key, value in e.items() if not key.startswith("time/")} for e in events]
