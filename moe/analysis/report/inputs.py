"""Collect everything that the sections of a report need. This is done once, before the first file is written."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.claims import judge_planned
from moe.analysis.figures.style import MOST_LINES
from moe.analysis.statistics import as_one_family, contrasts, name_cell
from moe.checks import unknown
from moe.metrics.catalog import select
from moe.results.conditions import (
    HEADLINE,
    NAMED_ROUTERS,
    conditions,
    levels,
    present,
    tied_factors,
    varied_factors,
    with_causality,
)
from moe.results.table import EventTables, read_event_tables

# The metrics that are always tested. p-values are corrected for each metric separately (each is a family of its own). A
# metric that the reader adds may have been chosen after seeing the results. Then p-values are corrected over all tested
# metrics together.
TESTED = tuple(metric.headline for metric in select(shown="tested"))

GRADIENT_METRICS = tuple(metric.name for metric in select(shown="gradient figure"))
TRAINING_METRICS = (*GRADIENT_METRICS, "train/loss")  # metrics of training steps that every report needs


class ReportOptions(NamedTuple):
    """Choices of the reader of a report, from the command line.

    references: factor -> the level that its other levels are compared with.
    margins: tested metric -> the largest difference that counts as equal, in its units or as text such as "1%".
    metrics: final metrics that are tested in addition to `TESTED`.
    """

    references: dict[str, Any] = {}
    margins: dict[str, int | float | str] = {}
    metrics: tuple[str, ...] = ()


class ReportInputs(NamedTuple):
    """The runs, and everything that is computed about them before the sections use it."""

    loaded: pd.DataFrame  # as `moe.results.table.load_runs` returned it
    runs: pd.DataFrame  # the same, with "(causal: yes|no)" beside every router's name
    factors: list[str]  # the factors that vary, without the seed
    tied: dict[str, str]  # a factor that varies -> the factor that determines its level in all runs
    condition: pd.Series  # of each run, such as "lb=0.01, noise=0.1"; no entry where a level is unknown
    metrics: list[str]  # those of the headline metrics and the metrics of the options that some run has
    tested: list[str]  # those of `TESTED` and the metrics of the options that some run has
    claims: pd.DataFrame  # from `moe.analysis.claims.judge_planned`; empty if there are several experiments
    contrasts: pd.DataFrame  # `moe.analysis.statistics.contrasts` of all tested metrics; empty in the same case
    past: EventTables  # every evaluation, and some metrics of every training step

    def with_condition(self, events: pd.DataFrame) -> pd.DataFrame:
        """Return the events of runs whose condition is known, with the condition as a column."""
        labels = pd.DataFrame({"folder": self.runs["folder"], "condition": self.condition}).dropna()
        return events.merge(labels, on="folder") if len(events) else events

    def too_many_lines(self) -> str:
        """Return why a figure with a line for each condition cannot be drawn; an empty text if it can."""
        count = self.condition.nunique()
        return f"{count} conditions are too many" if count > MOST_LINES else ""


def collect_inputs(
    loaded: pd.DataFrame, options: ReportOptions | None = None, *, training_columns: Iterable[str] = ()
) -> list[ReportInputs]:
    """Return the inputs of all runs together, followed by those of each experiment if there are several.

    Runs are compared within an experiment, so claims, contrasts and figures concern the factors that it varies.
    `loaded` is a table of `moe.results.table.load_runs`. `training_columns` are metrics of training steps to read in
    addition to `TRAINING_METRICS`. Raises ValueError for a reference, margin or metric that no run has, and for two
    runs with the same seed in one condition.
    """
    options = options or ReportOptions()
    columns = dict.fromkeys((*TRAINING_METRICS, *training_columns))
    past = read_event_tables(loaded.loc[loaded["status"] != "missing", "folder"], training=list(columns))
    describe = partial(_describe, past=past, extra_metrics=options.metrics)
    everything, names = describe(loaded), levels(loaded["experiment"])
    if len(names) < 2:
        _check(options, [everything])
        return [_with_comparisons(everything, options)]
    experiments = [describe(loaded[loaded["experiment"] == name]) for name in names]
    _check(options, experiments)
    return [everything, *(_with_comparisons(experiment, options) for experiment in experiments)]


def _describe(loaded: pd.DataFrame, *, past: EventTables, extra_metrics: tuple[str, ...]) -> ReportInputs:
    """Return the inputs of some runs, without claims and contrasts."""
    runs = with_causality(loaded)
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    names = {
        index: name_cell(cell) or "all runs" for cell, members in conditions(runs, factors) for index in members.index
    }
    folders = runs.loc[runs["status"] != "missing", "folder"]
    return ReportInputs(
        loaded=loaded,
        runs=runs,
        factors=factors,
        tied=tied_factors(runs),
        condition=pd.Series(names, index=runs.index, dtype=object),
        metrics=present(runs, (*HEADLINE, *extra_metrics)),
        tested=present(runs, (*TESTED, *extra_metrics)),
        claims=pd.DataFrame(),
        contrasts=pd.DataFrame(),
        past=EventTables(_events_of(past.evals, folders), _events_of(past.trains, folders), past.problems),
    )


def _events_of(events: pd.DataFrame, folders: pd.Series) -> pd.DataFrame:
    return events[events["folder"].isin(folders)] if len(events) else events


def _with_comparisons(inputs: ReportInputs, options: ReportOptions) -> ReportInputs:
    """Return the inputs with claims judged and levels compared."""
    references = _reference_levels(inputs, options)
    tables = [
        contrasts(inputs.runs, metric, inputs.factors, references=references, margin=options.margins.get(metric))
        for metric in inputs.tested
    ]
    table = stack(tables)
    return inputs._replace(
        claims=judge_planned(inputs.loaded),
        contrasts=table if set(inputs.tested) <= set(TESTED) else as_one_family(table),
    )


def _check(options: ReportOptions, experiments: list[ReportInputs]) -> None:
    """Raise ValueError for an option that names a factor, level or metric that no experiment has."""
    factors = sorted({factor for inputs in experiments for factor in inputs.factors})
    for factor, level in options.references.items():
        if factor not in factors:
            raise ValueError(f"reference {factor}={level}: varied factors are {', '.join(factors) or 'none'}")
        if not any(factor in _reference_levels(inputs, options) for inputs in experiments):
            known = levels(pd.concat([inputs.runs[factor] for inputs in experiments if factor in inputs.factors]))
            raise ValueError(f"reference {factor}={level}: allowed are {', '.join(map(str, known))}")
    metrics = [column for column in experiments[0].loaded if "/" in column]
    for metric in options.metrics:
        if metric not in metrics:
            raise unknown("metric", metric, metrics)
        if not any(metric in inputs.tested for inputs in experiments):
            raise ValueError(f"metric {metric}: null in every run")
    tested = dict.fromkeys((*TESTED, *options.metrics))
    for metric, margin in options.margins.items():
        if metric not in tested:
            raise ValueError(f"margin {metric}={margin}: tested metrics are {', '.join(tested)}")


def stack(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all tables in one table; an empty table if none has a row."""
    tables = [table for table in tables if not table.empty]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _reference_levels(inputs: ReportInputs, options: ReportOptions) -> dict[str, Any]:
    """Return those references of the options that are levels of these runs, with the level's full name.

    The full name of a router is, for example, "topk (causal: yes)". The reader writes only "topk".
    """
    found = {}
    for factor, level in options.references.items():
        for name in levels(inputs.runs[factor]) if factor in inputs.factors else []:
            named = factor in NAMED_ROUTERS and str(name).startswith(f"{level} (causal: ")
            if name == level or named:
                found[factor] = name
    return found
