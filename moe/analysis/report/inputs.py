"""What a report is made of: everything its sections read, gathered once, before a single file is written."""

from collections.abc import Sequence
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
from moe.results.frontier import LATE
from moe.results.table import EventTables, read_event_tables

# Metrics that are always tested. Each is a family of its own for corrections; with metrics that a reader adds after
# seeing the results, all of them are one family.
TESTED = tuple(metric.headline for metric in select(shown="tested"))

# What is read of training steps: gradients and updates, losses, and what `moe.results.frontier` wants.
PULLS = tuple(metric.name for metric in select(shown="gradient figure"))
TRAINING = (*PULLS, "train/loss", "train/load_balance", *LATE)


class Wishes(NamedTuple):
    """What the reader asked for: the level of a factor that its others are compared with, per tested metric the margin,
    in its units or as text such as "1%", within which two levels count as equal, and final metrics to test as well."""

    references: dict[str, Any] = {}
    margins: dict[str, float | str] = {}
    metrics: tuple[str, ...] = ()


class ReportInputs(NamedTuple):
    """The runs and all that was asked about them; nothing here changes while sections read it."""

    loaded: pd.DataFrame  # as `load_runs` returned it
    runs: pd.DataFrame  # the same, with "(causal: yes|no)" beside every router's name
    factors: list[str]  # what varies, without the seed
    tied: dict[str, str]  # varied factor -> the one that fixes it
    condition: pd.Series  # per run, "lb=0.01, noise=0.1": the levels of the factors; absent where one is unknown
    metrics: list[str]  # the headline metrics and those wished for that some run has
    tested: list[str]  # the metrics of TESTED and those wished for that some run has
    claims: pd.DataFrame  # of `moe.analysis.claims.judge_planned`, one experiment only
    contrasts: pd.DataFrame  # of `moe.analysis.statistics.contrasts`, all tested metrics, one experiment only
    past: EventTables  # every evaluation, and the columns TRAINING of every training step

    def labeled(self, events: pd.DataFrame) -> pd.DataFrame:
        """Events of runs whose condition is known, with it as column "condition"."""
        labels = pd.DataFrame({"folder": self.runs["folder"], "condition": self.condition}).dropna()
        return events.merge(labels, on="folder") if len(events) else events

    def too_many(self) -> str:
        """Why a figure with a line a condition cannot be drawn; empty if it can."""
        count = self.condition.nunique()
        return f"{count} conditions are too many" if count > MOST_LINES else ""


def gather(loaded: pd.DataFrame, wishes: Wishes | None = None) -> list[ReportInputs]:
    """The evidence in a table of `load_runs`: of all runs and, if there are several experiments, of each.

    Runs are compared within an experiment, so that claims, contrasts and figures are about what it varies.
    ValueError for a reference, margin or metric that nothing has, and for a seed with two runs of one condition.
    """
    wishes = wishes or Wishes()
    past = read_event_tables(loaded.loc[loaded["status"] != "missing", "folder"], training=TRAINING)
    of = partial(_of, past=past, wished=wishes.metrics)
    whole, names = of(loaded), levels(loaded["experiment"])
    parts = [of(loaded[loaded["experiment"] == name]) for name in names] if len(names) > 1 else [whole]
    _check(wishes, parts)
    compared = [_compared(part, wishes) for part in parts]
    return [whole, *compared] if len(names) > 1 else compared


def _of(loaded: pd.DataFrame, *, past: EventTables, wished: tuple[str, ...]) -> ReportInputs:
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
        metrics=present(runs, (*HEADLINE, *wished)),
        tested=present(runs, (*TESTED, *wished)),
        claims=pd.DataFrame(),
        contrasts=pd.DataFrame(),
        past=EventTables(_only(past.evals, folders), _only(past.trains, folders), past.problems),
    )


def _only(events: pd.DataFrame, folders: pd.Series) -> pd.DataFrame:
    return events[events["folder"].isin(folders)] if len(events) else events


def _compared(part: ReportInputs, wishes: Wishes) -> ReportInputs:
    """The same with its claims judged and its levels compared."""
    references = _references(part, wishes)
    tables = [
        contrasts(part.runs, metric, part.factors, references=references, margin=wishes.margins.get(metric))
        for metric in part.tested
    ]
    table = stack(tables)
    return part._replace(
        claims=judge_planned(part.loaded),
        contrasts=table if set(part.tested) <= set(TESTED) else as_one_family(table),
    )


def _check(wishes: Wishes, parts: list[ReportInputs]) -> None:
    factors = sorted({factor for part in parts for factor in part.factors})
    for factor, level in wishes.references.items():
        if factor not in factors:
            raise ValueError(f"reference {factor}={level}: varied factors are {', '.join(factors) or 'none'}")
        if not any(factor in _references(part, wishes) for part in parts):
            known = levels(pd.concat([part.runs[factor] for part in parts if factor in part.factors]))
            raise ValueError(f"reference {factor}={level}: allowed are {', '.join(map(str, known))}")
    metrics = [column for column in parts[0].loaded if "/" in column]
    for metric in wishes.metrics:
        if metric not in metrics:
            raise unknown("metric", metric, metrics)
        if not any(metric in part.tested for part in parts):
            raise ValueError(f"metric {metric}: null in every run")
    tested = dict.fromkeys((*TESTED, *wishes.metrics))
    for metric, margin in wishes.margins.items():
        if metric not in tested:
            raise ValueError(f"margin {metric}={margin}: tested metrics are {', '.join(tested)}")


def stack(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables one below the other; no rows at all make an empty table."""
    tables = [table for table in tables if not table.empty]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _references(part: ReportInputs, wishes: Wishes) -> dict[str, Any]:
    """The wished references that are levels there, a router or arm as its runs name it: "topk (causal: yes)", where
    people write "topk"."""
    found = {}
    for factor, level in wishes.references.items():
        for name in levels(part.runs[factor]) if factor in part.factors else []:
            named = factor in NAMED_ROUTERS and str(name).startswith(f"{level} (causal: ")
            if name == level or named:
                found[factor] = name
    return found
