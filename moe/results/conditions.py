"""Summaries: runs grouped into conditions, each with its mean and spread over seeds; what a sweep writes and prints.

A condition is one combination of levels of the factors that vary. The functions take the table that
`moe.results.table.load_runs` returns.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from moe.config.schema import is_free
from moe.metrics.catalog import select
from moe.results.table import FACTS

HEADLINE = tuple(metric.headline for metric in select(shown="headline"))
ROUTING = tuple(metric.name for metric in select(shown="conditions"))
STD = "std (ddof=1)"
FACTOR_GROUPS = ("variant", "router", "schedule", "model", "data", "optimizer")


def varied_factors(runs: pd.DataFrame) -> list[str]:
    """Factors with more than one level, the seed last; those that only follow another one are in `tied_factors`."""
    seed = ["seed"] if "seed" in runs and runs["seed"].nunique() > 1 else []
    return _free_and_tied(runs)[0] + seed


def tied_factors(runs: pd.DataFrame) -> dict[str, str]:
    """Varied factor -> the factor that fixes its level in all these runs: their effects cannot be told apart."""
    return _free_and_tied(runs)[1]


def levels(column: pd.Series) -> list[Any]:
    """The distinct levels of a factor, sorted: numbers, then text. The first is the reference level of contrasts."""
    return sorted(column.dropna().unique().tolist(), key=lambda level: (isinstance(level, str), level))


def conditions(runs: pd.DataFrame, factors: list[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Every combination of levels that occurs, in sorted order, with its runs; all runs when there are no factors."""
    if not factors:
        yield {}, runs
        return
    for level in levels(runs[factors[0]]):
        for rest, members in conditions(runs[runs[factors[0]] == level], factors[1:]):
            yield {factors[0]: level, **rest}, members


def present(runs: pd.DataFrame, metrics: Iterable[str]) -> list[str]:
    """Those of `metrics` that some run has, each once, in their order."""
    return [metric for metric in dict.fromkeys(metrics) if metric in runs and runs[metric].notna().any()]


def by_seed(runs: pd.DataFrame, metric: str) -> pd.Series:
    """The finite values of `metric` in one condition, indexed by seed. ValueError when a seed has two runs."""
    values = runs.set_index("seed")[metric].astype(float)
    values = values[values.map(math.isfinite)].sort_index()
    if not values.index.is_unique:
        seed = values.index[values.index.duplicated()][0]
        folders = ", ".join(runs.loc[runs["seed"] == seed, "folder"])
        raise ValueError(f"seed {seed} has more than one run of the same condition, give one of them: {folders}")
    return values


def summary(runs: pd.DataFrame, factors: list[str], metrics: Iterable[str]) -> pd.DataFrame:
    """Per condition and metric: n seeds with a finite value, their mean and sample standard deviation (ddof=1)."""
    rows = []
    for condition, members in conditions(runs, factors):
        for metric in metrics:
            values = by_seed(members, metric)
            rows.append(
                condition | {"metric": metric, "n": len(values), "mean": values.mean(), STD: values.std(ddof=1)}
            )
    table = pd.DataFrame(rows, columns=[*factors, "metric", "n", "mean", STD])
    return table.astype({"n": int, "mean": float, STD: float})


def spread_table(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary with a row per condition and "mean ± std (ddof=1)" as text; a metric short of seeds names its own n."""
    factors = [column for column in summary if column not in ("metric", "n", "mean", STD)]
    rows = []
    for condition, members in conditions(summary, factors):
        n = members["n"].max()
        cells = {}
        for metric, seeds, mean, std in members[["metric", "n", "mean", STD]].itertuples(index=False):
            cells[metric] = _spread(mean, std) + (f" (n={seeds})" if seeds < n else "")
        rows.append(condition | cells | {"n seeds": n})
    return pd.DataFrame(rows)


NAMED_ROUTERS = ("router", "variant")  # columns whose levels say how tokens are routed


def with_causality(runs: pd.DataFrame) -> pd.DataFrame:
    """The same runs with "(causal: ...)" beside the name of every router and arm: yes, no, "by setting" where runs of
    one differ (as under drop=position,score), so that it stays one level of its factor, "unknown" if no run tells."""
    words = runs["causal"].map({True: "yes", False: "no"})
    named = [column for column in NAMED_ROUTERS if column in runs and not runs[column].isin(["none"]).all()]
    for column in named:
        by_name = words.groupby(runs[column])
        known = by_name.transform("first").where(by_name.transform("nunique") < 2, "by setting").fillna("unknown")
        runs = runs.assign(**{column: (runs[column] + " (causal: " + known + ")").where(runs[column].notna())})
    return runs


def unfinished(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that are not finished: run, status and the first line of the error."""
    rest = runs.loc[runs["status"] != "finished", ["experiment", "run", "status", "error"]]
    return rest.assign(error=[e.strip().split("\n")[0] if isinstance(e, str) else "" for e in rest["error"]])


def _free_and_tied(runs: pd.DataFrame) -> tuple[list[str], dict[str, str]]:
    """Split the varied factors; an arm (`variant`) leads what it fixes, and groups and root keys what lies below them,
    because `router` says more than `router._target_` does."""
    factors = [c for c in runs if "/" not in c and c not in (*FACTS, "seed") and not is_free(c)]
    factors.sort(
        key=lambda column: (
            FACTOR_GROUPS.index(column) if column in FACTOR_GROUPS else len(FACTOR_GROUPS),
            "." in column,
        )
    )
    free: list[str] = []
    tied: dict[str, str] = {}
    for factor in [*factors, "experiment"]:
        known = runs.dropna(subset=[factor])
        if known[factor].nunique() < 2 or ("seed" in runs and (known[factor] == known["seed"]).all()):
            continue  # data.seed=${seed} is the seed, not a factor
        leader = next((other for other in free if (runs.groupby(other, sort=False)[factor].nunique() < 2).all()), None)
        if leader is None:
            free.append(factor)
        else:
            tied[factor] = leader
    return free, tied


def _spread(mean: float, std: float) -> str:
    """Two significant digits of the spread, and the mean to the same decimal."""
    if not math.isfinite(mean):
        return "–"
    if not math.isfinite(std):
        return f"{mean:.5g} ± –"
    if std <= 1e-12 * abs(mean):  # rounding, where every seed has the same value
        return f"{mean:.5g} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"
