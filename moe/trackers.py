"""The W&B mirror of events.jsonl: it may fail at any moment, and training neither stops nor changes."""

import logging
import os
from pathlib import Path
from typing import Any

from moe.config import Cell

log = logging.getLogger(__name__)

START_SECONDS, FINISH_SECONDS = 20, 60  # that a server may keep a run waiting


class Mirror:
    """Logs to W&B what it is given; the first error ends the mirroring with one warning.

    mode auto: online when an API key is set, else offline (`wandb sync` uploads later). A server that cannot be
    reached turns online into offline.
    """

    def __init__(self, cell: Cell) -> None:
        self._run: Any = None
        mode = cell.config.logger.mode
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        for attempt in {"online": ("online", "offline"), "offline": ("offline",), "disabled": ()}[mode]:
            try:
                self._run = _start(cell, attempt)
                return
            except Exception as error:  # whatever goes wrong in there is no reason to stop a study
                log.warning("W&B %s mode does not start: %s", attempt, _line(error))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the numbers among `values` at optimizer step `step`."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._try(lambda: self._run.log({**numbers, "step": step}))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary and end the W&B run."""
        numbers = {key: value for key, value in summary.items() if isinstance(value, int | float | str)}
        self._try(lambda: self._run.summary.update(numbers))
        self._try(lambda: self._run.finish())
        self._run = None

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # as above
            log.warning("W&B stops mirroring: %s", _line(error))
            self._run = None


def _start(cell: Cell, mode: str) -> Any:
    import wandb

    settings = wandb.Settings(
        init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS, silent=True, console="off", x_disable_stats=True
    )
    run = wandb.init(
        mode=mode,  # type: ignore[arg-type]
        project=cell.config.logger.project,
        entity=cell.config.logger.entity,
        group=cell.experiment,
        name=cell.folder.name,
        config={**cell.config.identity(), **{f"choice/{group}": name for group, name in cell.choices.items()}},
        dir=str(Path(cell.folder).absolute()),
        settings=settings,
        reinit="finish_previous",
    )
    for pattern in ("train/*", "val/*", "routing/*", "time/*", "temperature", "noise", "learning_rate", "grad_norm"):
        run.define_metric(pattern, step_metric="step")
    run.define_metric("val/loss", step_metric="step", summary="last")
    return run


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
