"""The first section of the report: the number of runs by status, and the runs that are not finished."""

import math
import re
from collections.abc import Iterator

import pandas as pd

from moe.analysis.report.blocks import (
    LIST_LENGTH,
    Details,
    Heading,
    Paragraph,
    ReportBlock,
    StatusBar,
    TableBlock,
    csv_file,
    literal,
    long_list,
)
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.tuned import tuned_equally
from moe.metrics.catalog import dead_layers
from moe.results.conditions import levels, unfinished

SHORTENED = """\
A name that ends with "…" and eight digits is shortened, and `layers` in it may stand for `model.layers`. The digits are
a checksum of the factors and of all settings of the command; Configuration below lists the settings."""
CUT_NAME = re.compile("… [0-9a-f]{8}$")  # the name of a grid that `moe.launch.grids` has shortened
# Status -> its color. Every status has a column in the table, so that the reader also sees that no run failed.
STATUSES = {
    "finished": "good",
    "missing": "idle",
    "failed": "bad",
    "diverged": "bad",
    "killed": "bad",
    "interrupted": "idle",
    "running": "idle",
    "unreadable": "bad",
}


def what_was_run(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the number of runs by status, experiment and condition, and the runs that no result below includes."""
    runs = inputs.runs
    once = runs.drop_duplicates("folder")  # a run has a row for each grid to which it belongs
    counts = once["status"].value_counts()
    yield Heading("What was run")
    yield StatusBar([(status, int(counts.get(status, 0)), tone) for status, tone in STATUSES.items()])
    yield TableBlock(_status_counts(runs, ["experiment"]))
    yield from _settings_of_grids(inputs)
    if inputs.factors:
        yield _condition_counts(inputs)
    facts = [f"factors: {', '.join(inputs.factors) or 'none varies'}; seeds: {_seeds(runs)}", _tuning(inputs)]
    problems = [*_confounded_factors(inputs.tied), *_values_left_out(inputs), *_dead_layers(inputs.loaded)]
    yield from long_list(problems if inputs.observed else [*facts, *problems])
    table = inputs.loaded.drop(columns="claims")
    yield csv_file("runs", table, "a row for each run: facts, factors and final metrics.")
    if len(once) < len(runs):
        yield Paragraph("Some runs belong to several grids. The tables count them in each of these.")
    failures = unfinished(once)
    if len(failures):
        yield Paragraph(f"{len(failures)} of {len(once)} runs did not finish. No result below includes them:")
        yield TableBlock(failures)
    if inputs.past.problems:
        yield Paragraph("These parts of the event logs are missing or could not be read:")
        yield from long_list([literal(problem) for problem in inputs.past.problems])


def _settings_of_grids(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the settings that tell grids with shortened names apart."""
    grids = inputs.runs.groupby("experiment", sort=False)
    if not any(CUT_NAME.search(str(name)) for name in grids.groups):
        return
    constant = [factor for factor in inputs.factors if (grids[factor].nunique(dropna=False) == 1).all()]
    telling = [factor for factor in constant if factor != "experiment"] if len(grids) > 1 else []
    yield Paragraph(SHORTENED + (" These tell the grids apart:" if telling else ""))
    if telling:
        yield TableBlock(grids[telling].first().astype(str).reset_index())


def _tuning(inputs: ReportInputs) -> str:
    """Return whether the arms were tuned equally, or that learning rates, batch size and data are the same for all."""
    if len(inputs.trials):
        return "; ".join(tuned_equally(runs) for _, runs in inputs.trials.groupby("tuned", sort=False))
    rates = [key for key in inputs.factors if key.startswith("optimizer.") and key.endswith("_lr")]
    if rates and len(rates) < len(inputs.factors):
        return _tuned_equally(inputs, rates)
    differing = [
        key
        for key in (*inputs.factors, *inputs.tied)
        if key in ("optimizer", "data", "batch_size", "grad_accum") or key.startswith(("optimizer.", "data."))
    ]
    exceptions = f" except {', '.join(differing)}" if differing else ""
    return f"learning rates, batch size and data: the same in all runs{exceptions}; not tuned per condition"


def _tuned_equally(inputs: ReportInputs, rates: list[str]) -> str:
    """Return whether each arm, a combination of the other factors, finished as many runs at each learning rate."""
    arms = [factor for factor in inputs.factors if factor not in rates]
    finished = inputs.runs[inputs.runs["status"] == "finished"]
    counts = pd.crosstab([finished[arm] for arm in arms], [finished[rate] for rate in rates])
    number, names = counts.shape[1], ", ".join(rates)
    if counts.empty or counts.to_numpy().min() != counts.to_numpy().max():
        return f"tuned equally: no, the settings of {', '.join(arms)} differ in how many runs finished by {names}"
    seeds = "no seed was kept apart: judge the best values with seeds that did not choose them"
    return f"tuned equally: yes, each setting of {', '.join(arms)} has the same {number} values of {names}; {seeds}"


def _condition_counts(inputs: ReportInputs) -> ReportBlock:
    """Return the number of runs of each condition by status."""
    runs = inputs.runs
    several = ["experiment"] if runs["experiment"].nunique() > 1 else []
    table = _status_counts(runs.assign(condition=inputs.condition.fillna("unknown")), [*several, "condition"])
    shown = TableBlock(table)
    if len(table) > LIST_LENGTH:
        return Details(f"The same for each of {len(table)} conditions", [shown])
    return shown


def _status_counts(runs: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Return a row for each combination of levels and a column for "finished" and for each other status of a run."""
    table = pd.crosstab([runs[column] for column in columns], runs["status"])
    others = [status for status in table if status not in STATUSES]
    named = [status for status in STATUSES if status == "finished" or status in table]
    return table.reindex(columns=[*named, *others], fill_value=0).reset_index()


def _seeds(runs: pd.DataFrame) -> str:
    return ", ".join(map(str, levels(runs["seed"]))) if "seed" in runs else "unknown"


def _confounded_factors(tied: dict[str, str]) -> list[str]:
    """Return a sentence for each factor that follows another one; experiments are not compared with each other."""
    return [
        f"{follower} changes only together with {leader}: their effects cannot be told apart"
        for follower, leader in tied.items()
        if not follower.startswith(f"{leader}.") and "experiment" not in (follower, leader)
    ]


def _dead_layers(runs: pd.DataFrame) -> list[str]:
    finished = runs[runs["status"] == "finished"].filter(regex="^run$|^routing/active_experts/")
    return [
        f"{literal(row['run'])}: no token takes an expert in {', '.join(dead)}"
        for row in finished.to_dict("records")
        if (dead := dead_layers(row))
    ]


def _values_left_out(inputs: ReportInputs) -> list[str]:
    finished = inputs.runs[inputs.runs["status"] == "finished"]
    return [
        f"{literal(run)}: finished, but its {metric} is not finite; left out of all results about this metric"
        for metric in inputs.metrics
        for run in finished.loc[~finished[metric].map(math.isfinite), "run"]
    ]
