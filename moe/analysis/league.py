"""Routers as a league: their means in order, with ranks, and differences from a reference that hold together."""

from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.power import SIGNIFICANCE
from moe.analysis.simultaneous import ranks, to_reference
from moe.results.conditions import by_seed, conditions, levels, narrowed

ROUTER, LEAST = "router", 3  # the factor, and the smallest number of its levels that make a league
PLAIN = "topk"  # the reference, unless the reader names another one
METRICS = ("test/loss", "val/loss")  # the first one that the runs have
BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"


class League(NamedTuple):
    """Routers in order; those that are not ranked, because they see later tokens, come last.

    table: a row for each router, with the mean over the seeds that all ranked routers have, n, rank, best rank, worst
    rank, difference, low and high; what a router that is not ranked lacks is NaN. values: the losses by seed of the
    ranked routers. level: how often one of the intervals of differences, or one of those of ranks, may be wrong.
    """

    table: pd.DataFrame
    values: pd.DataFrame
    level: float


def losses_by_seed(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the values of a metric, a row for each seed and a column for each router that has one."""
    runs = narrowed(runs, (ROUTER, metric, "seed", "folder"))
    table = pd.DataFrame({cell[ROUTER]: by_seed(members, metric) for cell, members in conditions(runs, [ROUTER])})
    return table.dropna(how="all", axis=1)


def league_of(runs: pd.DataFrame, metric: str, reference: Any, level: float = SIGNIFICANCE) -> League | None:
    """Return the league of finished runs that differ in router and seed alone.

    level: see `League`; with 0 there are no intervals, and nothing is told apart. None if fewer than three routers have
    a rank, if these have no seed in common, or if the reference has no rank.
    """
    values = losses_by_seed(runs, metric)
    complete = _complete(values, runs)
    if len(complete.columns) < LEAST or complete.empty or reference not in complete:
        return None
    rank = ranks(complete, level)
    order = [*rank.sort_values("rank").index, *(name for name in values if name not in complete)]
    table = (
        values.loc[complete.index]
        .agg(["mean", "count"])
        .T.rename(columns={"count": "n"})
        .astype({"n": int})
        .join(rank)
        .join(to_reference(complete, reference, level))
    )
    return League(table.loc[order], complete, level)


def _complete(values: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the losses by seed of the routers that can have a rank, for the seeds that all of them have."""
    later = set(runs.loc[runs["causal"] == False, ROUTER])  # noqa: E712
    return values[[name for name in values if name not in later]].dropna()


def compared_runs(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return those of some finished runs that a league compares."""
    complete = _complete(losses_by_seed(runs, metric), runs)
    return runs[runs[ROUTER].isin(complete.columns) & runs["seed"].isin(complete.index)]


def without_place(runs: pd.DataFrame, found: League, metric: str) -> list[str]:
    """Return which routers and seeds a league lacks, each with the reason.

    runs: those of the league, also the ones that did not finish.
    """
    finished = runs[runs["status"] == "finished"]
    lacking = []
    for router in levels(runs[ROUTER]):
        if router not in found.table.index:
            ended = runs.loc[runs[ROUTER] == router, "status"].value_counts()
            reason = f"no run with a finite {metric}: {', '.join(f'{n} {status}' for status, n in ended.items())}"
            lacking.append(f"{router} ({reason})")
    values = losses_by_seed(finished, metric)[found.values.columns]
    for seed in values.index.difference(found.values.index):
        lacking.append(
            f"seed {seed} (no finite {metric} of {', '.join(map(str, values.columns[values.loc[seed].isna()]))})"
        )
    return lacking


def verdict(low: float, high: float) -> str:
    """Return what the simultaneous interval of a difference of losses says; NaN: undecided."""
    return WORSE if low > 0 else BETTER if high < 0 else UNDECIDED
