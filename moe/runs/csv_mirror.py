"""Write the numbers of a run's events to metrics.csv, for `pandas.read_csv` and spreadsheets."""

import csv
import io
from collections.abc import Iterable
from typing import IO, Any

from moe.config.cell import Cell
from moe.files import open_file, open_unlinked, write_text
from moe.runs import events

FILE = "metrics.csv"


class CsvMirror(events.RunListener):
    """Run listener that appends a row for each event, at once: `step` and the event's numbers, without its lists.

    Training steps and evaluations have different columns, and a cell is empty where an event lacks the column. When a
    metric appears for the first time, the file is written again with the new column.
    """

    def __init__(self, cell: Cell) -> None:
        self._folder = cell.folder
        self._file: IO[str] | None = None
        self._columns: list[str] = []

    def begin(self, step: int) -> None:
        """Write the events that events.jsonl holds, so that a resumed run repeats no step and misses none."""
        self._write(_row(event["step"], event) for event in events.read_events(self._folder / events.FILE))

    def log(self, step: int, values: dict[str, Any]) -> None:
        row = _row(step, values)
        if row.keys() <= set(self._columns):
            assert self._file is not None
            csv.DictWriter(self._file, self._columns).writerow(row)
            return
        with open_file(self._folder / FILE, newline="") as file:
            earlier = list(csv.DictReader(file))
        self._write([*earlier, row])

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the file. metrics.json has the final metrics."""
        if self._file is not None:
            self._file.close()

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replace the file by one with these rows, and keep it open for more."""
        self.finish({})
        rows = list(rows)
        self._columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self._columns)
        table.writeheader()
        table.writerows(rows)
        write_text(self._folder / FILE, text.getvalue())
        self._file = open_unlinked(self._folder / FILE, "a", buffering=1, newline="", encoding="utf-8")


def _row(step: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"step": step} | {
        key: value for key, value in values.items() if value is None or isinstance(value, int | float)
    }
