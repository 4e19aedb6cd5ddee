"""Copy the events of a run to the places that `logger.to` names: W&B, TensorBoard files, a CSV file.

No error of a copy stops or changes the training: events.jsonl has everything.
"""

import logging
from collections.abc import Callable
from typing import Any

from moe.checks import first_line
from moe.config.cell import Cell
from moe.distributed import ranks
from moe.runs.csv_mirror import CsvMirror
from moe.runs.events import RunListener
from moe.runs.tensorboard_mirror import TensorboardMirror
from moe.runs.wandb_mirror import WandbMirror

log = logging.getLogger(__name__)


MIRRORS: dict[str, tuple[str, Callable[[Cell], RunListener]]] = {  # the entries of `logger.to`
    "wandb": ("W&B", WandbMirror),
    "tensorboard": ("TensorBoard", TensorboardMirror),
    "csv": ("metrics.csv", CsvMirror),
}


class Mirrors(RunListener):
    """Run listener that copies to each place of `logger.to`, on the first rank.

    The first error of a place logs one warning and ends the copying to that place.
    """

    def __init__(self, cell: Cell) -> None:
        self._mirrors: dict[str, RunListener] = {}
        for name in cell.config.logger.to if ranks.is_first() else ():
            title, start = MIRRORS[name]
            try:
                self._mirrors[title] = start(cell)
            except Exception as error:  # no error of a copy is a reason to stop a study
                log.warning("events are not copied to %s: %s", title, first_line(error))

    def begin(self, step: int) -> None:
        """Prepare for the events after `step` optimizer steps; later events of an earlier start are dropped."""
        self._each(lambda mirror: mirror.begin(step))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Copy one event after `step` optimizer steps."""
        self._each(lambda mirror: mirror.log(step, values))

    def finish(self, summary: dict[str, Any]) -> None:
        """Copy the final metrics and close; they are empty if the run did not finish."""
        self._each(lambda mirror: mirror.finish(summary))
        self._mirrors = {}

    def _each(self, action: Callable[[RunListener], None]) -> None:
        for title, mirror in list(self._mirrors.items()):
            try:
                action(mirror)
            except Exception as error:  # as above
                log.warning("events are no longer copied to %s: %s", title, first_line(error))
                del self._mirrors[title]
