"""Commands that train the runs of a report again, or the same settings with more seeds."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moe.analysis.report.inputs import ReportInputs
from moe.config.cell import Grid
from moe.config.keys import flatten
from moe.files import shown
from moe.results.conditions import levels, without_causality
from moe.results.table import ABSENT
from moe.runs.record import RecordError, SweepRecord

MOST_SEEDS = 40  # that a command lists
DEFAULT_PLACE = Path("multirun")
KEPT = ("planned_seeds", "logger.mode")  # keys outside of a run's identity that a command keeps


def training_command(inputs: ReportInputs, seeds: Sequence[int] | None = None) -> str:
    """Return the command that trains these runs, as their sweep.json tells it; an empty text if there is none.

    seeds: those of the command; by default the seeds of the runs.
    """
    runs, grid = inputs.runs, grid_of(inputs.runs)
    if grid is None or grid.search:
        return ""
    experiment = grid.name.partition(": ")[0]
    words = [f"experiment={experiment}"] if experiment != "default" else []
    words += fixed_settings(grid)
    words += _kept(inputs, Path(runs["folder"].iloc[0]).parent, experiment)
    for factor in (*grid.factors, "seed"):
        values = [without_causality(level) for level in levels(runs[factor])] if factor in runs else []
        if factor == "seed" and seeds is not None:
            values = list(seeds)
        given = dict.fromkeys(str(value) for value in values if value != ABSENT)
        words += [f"{factor}={','.join(given)}"] if given else []
    return f"python train.py -m {shlex.join(words)}"


def grid_of(runs: pd.DataFrame) -> Grid | None:
    """Return the grid of runs that lie in one sweep folder, from its sweep.json; None if there is none."""
    try:
        [parent] = {Path(folder).parent for folder in runs["folder"]}
        record = SweepRecord.read(parent / SweepRecord.FILE)
    except (ValueError, RecordError):
        return None
    return record.grid_with(*(Path(folder).name for folder in runs["folder"]))


def fixed_settings(grid: Grid) -> list[str]:
    """Return what a grid sets otherwise than its experiment, as words of a command."""
    return [f"{key}={_word(value)}" for key, value in grid.fixed.items() if value is not None]


def _kept(inputs: ReportInputs, sweep: Path, experiment: str) -> list[str]:
    """Return the words that lead to the folder of the runs, and the keys of `KEPT` that the newest run has."""
    place = shown(sweep.parent)
    words = [f"out={place}"] if sweep.name == experiment and place != DEFAULT_PLACE else []
    of_runs = [inputs.records[folder] for folder in inputs.runs["folder"].unique() if folder in inputs.records]
    newest = max(of_runs, key=lambda record: record.started, default=None)
    config = flatten(newest.config) if newest else {}
    return words + [f"{key}={config[key]}" for key in KEPT if config.get(key) not in (None, "auto")]


def _word(value: Any) -> str:
    """Return a setting as a command has it, without quotes around keys, such as {optimizer.muon_lr:[0.01, 0.02]}."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_word(each)}' for key, each in value.items())}}}"
    return str(value)


def command_for_more(inputs: ReportInputs, number: int) -> str:
    """Return the command that trains the settings with so many more seeds; an empty text if they are too many."""
    seeds = [seed for seed in levels(inputs.runs["seed"]) if isinstance(seed, int)] if "seed" in inputs.runs else []
    if not seeds or number > MOST_SEEDS:
        return ""
    seeds += [seed for seed in inputs.trials["seed"] if isinstance(seed, int)] if len(inputs.trials) else []
    return training_command(inputs, range(max(seeds) + 1, max(seeds) + 1 + number))
