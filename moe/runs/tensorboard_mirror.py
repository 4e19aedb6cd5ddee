"""Write the numbers of a run's events as TensorBoard files: `tensorboard --logdir multirun` shows all runs."""

from typing import Any

from moe.config.cell import Cell
from moe.runs import events

FOLDER = "tensorboard"  # in a run folder


class TensorboardMirror(events.RunListener):
    """Run listener that writes each number of an event as a scalar, and the final metrics with the configuration.

    The tab HPARAMS compares finished runs by configuration and `final/...`. Needs the extra `tensorboard`.
    """

    def __init__(self, cell: Cell) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes half a second

        self._cell = cell
        self._open = SummaryWriter
        self._writer: Any = None
        self._step = 0

    def begin(self, step: int) -> None:
        """Open a file that tells TensorBoard to drop the later events of an earlier start.

        If there is no earlier file, the events before `step` are copied from events.jsonl.
        """
        folder = self._cell.folder / FOLDER
        is_new = not folder.exists()
        self._writer = self._open(str(folder), purge_step=step + 1 if step else 0)
        if is_new:
            for event in events.read_events(self._cell.folder / events.FILE):
                self.log(event["step"], {key: value for key, value in event.items() if key != "step"})

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._step = step
        for key, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)
        self._writer.flush()  # a killed run has lost nothing that it will not repeat

    def finish(self, summary: dict[str, Any]) -> None:
        """Write configuration and final metrics, if the run finished, and close the file."""
        if self._writer is None:
            return
        final = {f"final/{key}": value for key, value in summary.items() if isinstance(value, int | float)}
        if final:
            settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in self._cell.identity().items()}
            self._writer.add_hparams(settings, final, run_name=".", global_step=self._step)
        self._writer.close()
