"""Copy the events of a run to W&B."""

import hashlib
import json
import logging
import netrc
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np

from moe.checks import first_line
from moe.config.cell import Cell
from moe.config.sections import LoggerConfig, is_wandb_id
from moe.files import read_text, write_text
from moe.runs.events import RunListener
from moe.runs.folder import grid_name

log = logging.getLogger(__name__)

START_SECONDS, FINISH_SECONDS = 20, 60  # how long a run waits for the W&B server at its start and at its end
UPLOAD_SECONDS = 600  # how long it waits at its end if it uploads its model
STEP = "step"  # optimizer steps done; the horizontal axis of all charts
FINAL = "final"  # prefix of the final metrics in a W&B summary; an unfinished run has none
ID_FILE = "wandb_id.txt"  # in a run folder: the id of its online W&B run
CONDITION = "condition"  # the config key by which dashboards group runs


def condition(cell: Cell) -> str:
    """Return a name that is the same for all cells that differ only in their seed, and different for all others.

    It consists of the folder's name without the seed, for people, and a checksum of the configuration without the seed.
    """
    seedless = {key: value for key, value in cell.identity().items() if key != "seed"}
    digest = hashlib.sha256(json.dumps(seedless, sort_keys=True).encode()).hexdigest()[:6]
    overrides = re.sub("-[0-9a-f]{8}$", "", cell.folder.name).split(",")  # cut off a checksum, which includes the seed
    readable = ",".join(override for override in overrides if not override.startswith("seed="))
    return f"{readable[:100] or 'base'} {digest}"


class WandbMirror(RunListener):
    """Run listener that copies events and final metrics to W&B, and the saved model if `logger.log_model` asks for it.

    logger.mode=auto is what WANDB_MODE says. Without it, it is online if there is an API key, and otherwise offline
    (`wandb sync` uploads later). If the server cannot be reached, online becomes offline.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._run = start_in(mode_of(cell.config.logger), lambda attempt: _start(cell, attempt))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log after `step` optimizer steps those of `values` that are numbers, and lists of numbers as histograms."""
        if self._run is not None:
            numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
            self._run.log({**numbers, **_histograms(values), STEP: step})

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the final metrics to the W&B summary, log the saved model, and end the W&B run."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            numbers = {f"{FINAL}/{key}": value for key, value in summary.items() if isinstance(value, int | float)}
            run.summary.update(numbers)
            if numbers and self._cell.config.logger.log_model:
                _log_model(run, self._cell)
        finally:
            run.finish()


def start_in(mode: str, start: Callable[[str], Any]) -> Any:
    """Return the W&B run that `start(mode)` starts, offline if online fails; None if it is disabled or both fail.

    Environment variables of W&B that are set but empty are removed, because W&B refuses them.
    """
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]
    for attempt in {"online": ("online", "offline"), "offline": ("offline",), "disabled": ()}[mode]:
        try:
            return start(attempt)
        except Exception as error:  # the errors of W&B have no other common class
            log.warning(
                "W&B cannot start in %s mode: %s", attempt, " ".join(str(error).split())[:300] or first_line(error)
            )
    return None


def mode_of(logger: LoggerConfig) -> str:
    """Return the mode that a configuration asks for: "disabled", "offline", or "online"."""
    if not logger.to_wandb:
        return "disabled"
    return mode_of_environment() if logger.mode == "auto" else logger.mode


def mode_of_environment() -> str:
    """Return the mode that WANDB_MODE asks for; otherwise online if W&B finds a key, as from `wandb login`."""
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("online", "offline", "disabled"):
        return asked
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
        logins = netrc.netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc"))
    except (OSError, ValueError, netrc.NetrcParseError):  # ValueError: no address, or a file that is no text
        return "offline"
    return "online" if host and host in logins.hosts else "offline"


def _histograms(values: dict[str, Any]) -> dict[str, Any]:
    """Return each list of an event as a W&B histogram with one bin per entry, and a list of lists as one per layer.

    The bins of routing/utilization are the experts, and their heights the shares. A list with a gap or with more
    entries than a histogram can have is left out.
    """
    from wandb import Histogram

    lists: dict[str, list[Any]] = {}
    for key, value in values.items():
        if isinstance(value, list) and value:
            nested = isinstance(value[0], list)
            lists |= {f"{key}/layer{n:02d}": each for n, each in enumerate(value)} if nested else {key: value}
    return {
        key: Histogram(np_histogram=(np.array(entries), np.arange(len(entries) + 1)))
        for key, entries in lists.items()
        if None not in entries and 0 < len(entries) <= Histogram.MAX_LENGTH
    }


def _log_model(run: Any, cell: Cell) -> None:
    from wandb import Artifact

    artifact = Artifact(
        f"model-{run.id}", type="model", metadata={CONDITION: condition(cell), "seed": cell.config.seed}
    )
    artifact.add_dir(str(cell.folder / "model"), policy="immutable")  # without a second copy on this disk
    run.log_artifact(artifact)


def _online_id(cell: Cell) -> str:
    """Return the id of the online W&B run of a cell, chosen at the first start. A resumed run continues that run.

    An agent of a W&B sweep gives the id for a single run in `WANDB_RUN_ID`. The cells of a grid need one each, and so
    do several single runs of one shell: the first run of these settings keeps the id.
    """
    path = cell.folder / ID_FILE
    given = os.environ.get("WANDB_RUN_ID", "") if cell.grid is None else ""
    others = cell.folder.parent.parent.glob(f"*/*/{ID_FILE}")
    if given and given in (_stored_id(other) for other in others if other != path):
        log.warning("WANDB_RUN_ID=%s is the id of another run, so that this run gets an id of its own", given)
        given = ""
    chosen = _stored_id(path) or given or _new_id()
    write_text(path, chosen + "\n")
    return chosen


def _stored_id(path: Path) -> str:
    """Return the id in a file; "" if there is no file, or no id of W&B in it."""
    stored = read_text(path).strip() if path.exists() else ""
    return stored if is_wandb_id(stored) else ""


def _new_id() -> str:
    return secrets.token_hex(8)


def settings(*, finish_seconds: int = FINISH_SECONDS) -> Any:
    """Return the settings of every W&B run of this project: quiet, and never waiting long for the server."""
    import wandb

    return wandb.Settings(
        init_timeout=START_SECONDS, finish_timeout=finish_seconds, silent=True, console="off", x_disable_stats=True
    )


def _start(cell: Cell, mode: str) -> Any:
    import wandb

    logger = cell.config.logger
    # Offline runs are never continued. One id for several would let `wandb sync` keep only one of them.
    identity = {"id": _online_id(cell), "resume": "allow"} if mode == "online" else {"id": _new_id()}
    run = wandb.init(
        mode=mode,  # type: ignore[arg-type]
        **identity,  # type: ignore[arg-type]
        project=logger.project,
        entity=logger.entity,
        group=grid_name([cell]),
        name=cell.folder.name,
        config={**asdict(cell.config), "choices": cell.choices, CONDITION: condition(cell)},
        dir=str(Path(cell.folder).absolute()),
        settings=settings(finish_seconds=UPLOAD_SECONDS if logger.log_model else FINISH_SECONDS),
        reinit="finish_previous",
    )
    run.define_metric("*", step_metric=STEP)
    return run
