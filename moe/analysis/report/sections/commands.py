"""Commands that train the runs of a report again, or the same settings with more seeds."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from moe.analysis.claims import planned_claims
from moe.analysis.report.inputs import ReportInputs
from moe.config.cell import Grid
from moe.config.claim import ClaimConfig
from moe.config.words import as_word, searched
from moe.files import shown
from moe.program import train_command
from moe.results.conditions import levels
from moe.runs.planned import digest_of
from moe.runs.record import CommandsRecord, RecordError, SweepRecord

MOST_LISTED = 20  # seeds that a command names one by one
DEFAULT_PLACE = Path("multirun")
NO_OPTION = "variant"  # a group without a usual option; null cannot be chosen alone


def training_command(
    runs: pd.DataFrame, seeds: Sequence[int] | None = None, claims: Sequence[ClaimConfig] | None = None
) -> str:
    """Return the command that trains these runs, as the files of their sweep tell it; an empty text if there is none.

    seeds: those of the command; by default the seeds of the runs. claims: those of the command; by default the ones of
    the newest command.
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
    beside = _beside_settings(sweep, grid)
    if claims is not None:
        beside = [word for word in beside if not word.startswith("claims=")]
        beside += [f"claims={as_word([_named_fields(claim) for claim in claims])}"]
    words += beside
    for factor in (*grid.factors, "seed"):
        values = seeds if factor == "seed" and seeds is not None else [cell[factor] for cell in cells if factor in cell]
        given = grid.typed.get(factor) or dict.fromkeys(map(as_word, values))
        if isinstance(values, range) and len(values) > MOST_LISTED:
            given = [f"range({values.start},{values.stop})"]
        words += [f"{factor}={','.join(given)}"] if given else []
    return f"{train_command()} -m {shlex.join(words)}"


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


def _named_fields(claim: ClaimConfig) -> dict[str, Any]:
    """Return what a claim says beside the defaults."""
    defaults = asdict(ClaimConfig())
    return {name: value for name, value in asdict(claim).items() if value != defaults[name]}


def command_for_more(inputs: ReportInputs, number: int, row: int | None = None, *, n: int | None = None) -> str:
    """Return the command that trains the settings with so many more seeds; an empty text if no file tells it.

    Seeds that some settings lack come first: each counts as one more where it is lacked. row: that of the claim that
    needs the seeds, in the table of claims. If the newest command has no such claim, the command names all claims of
    the newest run that recorded it. n: the number of seeds that the comparison has; by default that of all seeds.
    """
    seeds = [seed for seed in levels(inputs.runs["seed"]) if isinstance(seed, int)] if "seed" in inputs.runs else []
    if not seeds:
        return ""
    lacking = [] if number > MOST_LISTED else [*seeds_to_complete(inputs)]
    completed = min(len(lacking), number, len(seeds) - n) if n is not None else 0
    seeds += [seed for seed in inputs.trials["seed"] if isinstance(seed, int)] if len(inputs.trials) else []
    claims = None if row is None else _claims_left_out(inputs, row)
    added = range(max(seeds) + 1, max(seeds) + 1 + number - completed)
    return training_command(inputs.runs, [*lacking, *added] if lacking else added, claims)


def seeds_to_complete(inputs: ReportInputs) -> dict[int, int]:
    """Return each seed that some settings have and others lack, with the number of settings that lack it."""
    settings = {run.setting for run in inputs.study.runs.values()}
    number = Counter(run.seed for run in inputs.study.runs.values() if run.ended)
    return {seed: len(settings) - have for seed, have in sorted(number.items()) if have < len(settings)}


def claims_of(inputs: ReportInputs) -> list[tuple[ClaimConfig, pd.DataFrame]]:
    """Return the claims of a report with the runs that recorded them, in the order of the table of claims."""
    return planned_claims(inputs.loaded[~inputs.loaded["folder"].isin(inputs.searched)])


def _claims_left_out(inputs: ReportInputs, row: int) -> list[ClaimConfig] | None:
    """Return the claims that were planned together with a claim; None if the newest command has this claim too."""
    claim, members = claims_of(inputs)[row]
    records = [inputs.records[folder] for folder in members["folder"] if folder in inputs.records]
    plans = inputs.study.plans
    if not records or not plans or digest_of(asdict(claim)) in map(digest_of, plans[-1].claims):
        return None
    return max(records, key=lambda record: record.started).claims()
