"""What was run: every run is accounted for, whatever became of it."""

import math
from collections.abc import Iterator

import pandas as pd

from moe.analysis.report.blocks import Attachment, Block, Bullets, Details, Heading, Table, Tally, Text
from moe.analysis.report.inputs import ReportInputs
from moe.results.conditions import unfinished

# Status -> how it looks. All of them are columns of the table, because a zero is news too.
STATUSES = {
    "finished": "good",
    "missing": "idle",
    "failed": "bad",
    "diverged": "bad",
    "interrupted": "idle",
    "running": "idle",
    "unreadable": "bad",
}
SHORT = 20  # items of a list that are shown at once


def what_was_run(inputs: ReportInputs) -> Iterator[Block]:
    """How many runs of which condition came how far, and what counts nowhere below."""
    runs = inputs.runs
    counts = runs["status"].value_counts()
    yield Heading("What was run")
    yield Tally([(status, int(counts.get(status, 0)), tone) for status, tone in STATUSES.items()])
    yield Table(_by(runs, ["experiment"]))
    if inputs.factors:
        several = ["experiment"] if runs["experiment"].nunique() > 1 else []
        table = _by(runs.assign(condition=inputs.condition.fillna("unknown")), [*several, "condition"])
        seen = table.loc[:, [column == "finished" or table[column].any() for column in table]]
        many = len(table) > SHORT
        yield Details(f"The same for each of {len(table)} conditions", [Table(seen)]) if many else Table(seen)
    yield Bullets([f"factors: {', '.join(inputs.factors) or 'none varies'}; seeds: {_seeds(runs)}"])
    yield from listed([*_ties(inputs.tied), *_not_finite(inputs)])
    yield Attachment("runs.csv", inputs.loaded.to_csv(index=False), "a row per run: facts, factors, final metrics.")
    rest = unfinished(runs)
    if len(rest):
        yield Text(f"{len(rest)} of {len(runs)} runs did not finish and count nowhere below:")
        yield Table(rest)
    if inputs.past.problems:
        yield Text("Could not be read from the event logs:")
        yield from listed(inputs.past.problems)


def listed(items: list[str]) -> Iterator[Block]:
    """A list; what is beyond the first `SHORT` items waits behind a line that says how many more there are."""
    if items:
        yield Bullets(items[:SHORT])
    if items[SHORT:]:
        yield Details(f"and {len(items) - SHORT} more", [Bullets(items[SHORT:])])


def _by(runs: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """A row per combination of levels, a column per status."""
    table = pd.crosstab([runs[column] for column in columns], runs["status"])
    others = [status for status in table if status not in STATUSES]
    return table.reindex(columns=[*STATUSES, *others], fill_value=0).reset_index()


def _seeds(runs: pd.DataFrame) -> str:
    return ", ".join(map(str, sorted(runs["seed"].dropna().unique(), key=str))) if "seed" in runs else "unknown"


def _ties(tied: dict[str, str]) -> list[str]:
    return [
        f"{follower} changes only together with {leader}: their effects cannot be told apart"
        for follower, leader in tied.items()
        if not follower.startswith(f"{leader}.")
    ]


def _not_finite(inputs: ReportInputs) -> list[str]:
    finished = inputs.runs[inputs.runs["status"] == "finished"]
    return [
        f"{run}: finished, but its {metric} is not finite; left out of that metric"
        for metric in inputs.metrics
        for run in finished.loc[~finished[metric].map(math.isfinite), "run"]
    ]
