"""Commands that train the runs of a report again, or the same settings with more seeds."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from moe.analysis.report.inputs import ReportInputs
from moe.config.cell import Grid
from moe.config.words import as_word, searched
from moe.files import shown
from moe.results.conditions import levels
from moe.runs.record import CommandsRecord, RecordError, SweepRecord

MOST_SEEDS = 40  # that a command lists
DEFAULT_PLACE = Path("multirun")
NO_OPTION = "variant"  # a group without a usual option; null cannot be chosen alone


def training_command(runs: pd.DataFrame, seeds: Sequence[int] | None = None) -> str:
    """Return the command that trains these runs, as the files of their sweep tell it; an empty text if there is none.

    seeds: those of the command; by default the seeds of the runs.
    """
    record, grid = _sweep_of(runs), grid_of(runs)
    if record is None or grid is None or grid.search:
        return ""
    sweep = Path(runs["folder"].iloc[0]).parent
    cells = [record.cells[Path(folder).name] for folder in runs["folder"]]
    experiment = grid.name.partition(": ")[0]
    words = [f"experiment={experiment}"] if experiment != "default" else []
    words += fixed_settings(grid)
    words += [f"out={shown(sweep.parent)}"] if sweep.name == experiment and shown(sweep.parent) != DEFAULT_PLACE else []
    words += _beside_settings(sweep, grid)
    for factor in (*grid.factors, "seed"):
        values = seeds if factor == "seed" and seeds is not None else [cell[factor] for cell in cells if factor in cell]
        given = dict.fromkeys(map(as_word, values))
        words += [f"{factor}={','.join(given)}"] if given else []
    return f"python train.py -m {shlex.join(words)}"


def _beside_settings(sweep: Path, grid: Grid) -> list[str]:
    """Return the words that name folders of options, and those of keys that change no result."""
    try:
        record = CommandsRecord.read(sweep / CommandsRecord.FILE)
    except RecordError:
        return []
    return searched(record.folders.get(grid.name, [])) + record.words.get(grid.name, [])


def grid_of(runs: pd.DataFrame) -> Grid | None:
    """Return the grid of runs that lie in one sweep folder, from its sweep.json; None if there is none."""
    record = _sweep_of(runs)
    return None if record is None else record.grid_with(*(Path(folder).name for folder in runs["folder"]))


def _sweep_of(runs: pd.DataFrame) -> SweepRecord | None:
    """Return the sweep.json of the one folder in which runs lie; None if there is none."""
    try:
        [parent] = {Path(folder).parent for folder in runs["folder"]}
        return SweepRecord.read(parent / SweepRecord.FILE)
    except (ValueError, RecordError):
        return None


def fixed_settings(grid: Grid) -> list[str]:
    """Return what a grid sets otherwise than its experiment, as words of a command."""
    return [f"{key}={as_word(value)}" for key, value in grid.fixed.items() if value is not None or key != NO_OPTION]


def command_for_more(inputs: ReportInputs, number: int) -> str:
    """Return the command that trains the settings with so many more seeds; an empty text if they are too many."""
    seeds = [seed for seed in levels(inputs.runs["seed"]) if isinstance(seed, int)] if "seed" in inputs.runs else []
    if not seeds or number > MOST_SEEDS:
        return ""
    seeds += [seed for seed in inputs.trials["seed"] if isinstance(seed, int)] if len(inputs.trials) else []
    return training_command(inputs.runs, range(max(seeds) + 1, max(seeds) + 1 + number))
