"""The W&B mirror of events.jsonl: it may fail at any moment, and training neither stops nor changes."""

import hashlib
import json
import logging
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe.config.schema import Cell
from moe.distributed import ranks

log = logging.getLogger(__name__)

START_SECONDS, FINISH_SECONDS = 20, 60  # that a server may keep a run waiting
STEP = "step"  # optimizer steps done: the horizontal axis of everything
FINAL = "final"  # prefix of the final metrics in a W&B summary, where those of an unfinished run are missing
CONDITION = "condition"  # the config key to group by


def condition(cell: Cell) -> str:
    """One name for all cells that differ in their seed alone: what the folder's name says without it, for people, and
    a digest of the configuration without it, which tells apart whatever is not the same."""
    rest = {key: value for key, value in cell.config.identity().items() if key != "seed"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:6]
    overrides = re.sub("-[0-9a-f]{8}$", "", cell.folder.name).split(",")  # that digest knows the seed
    told = ",".join(part for part in overrides if not part.startswith("seed="))
    return f"{told[:100] or 'base'} {digest}"


class Mirror:
    """Logs to W&B what it is given; the first error ends the mirroring with one warning.

    mode auto: online when an API key is set, else offline (`wandb sync` uploads later). A server that cannot be
    reached turns online into offline.
    """

    def __init__(self, cell: Cell) -> None:
        self._run: Any = None
        mode = cell.config.logger.mode if ranks.is_first() else "disabled"
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        for attempt in {"online": ("online", "offline"), "offline": ("offline",), "disabled": ()}[mode]:
            try:
                self._run = _start(cell, attempt)
                return
            except Exception as error:  # whatever goes wrong in there is no reason to stop a study
                log.warning("W&B %s mode does not start: %s", attempt, first_line(error))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the numbers among `values` at optimizer step `step`."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._try(lambda: self._run.log({**numbers, STEP: step}))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the final metrics of a run, none if it did not finish, and end the W&B run."""
        numbers = {f"{FINAL}/{key}": value for key, value in summary.items() if isinstance(value, int | float)}
        self._try(lambda: self._run.summary.update(numbers))
        self._try(lambda: self._run.finish())
        self._run = None

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # as above
            log.warning("W&B stops mirroring: %s", first_line(error))
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
        config={**asdict(cell.config), "choices": cell.choices, CONDITION: condition(cell)},
        dir=str(Path(cell.folder).absolute()),
        settings=settings,
        reinit="finish_previous",
    )
    run.define_metric("*", step_metric=STEP)
    return run


def first_line(error: Exception) -> str:
    """What an error of W&B says, short enough for a terminal."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
