"""Group runs into conditions, and compute mean and spread over seeds for each condition.

A condition is one combination of levels of the factors that vary. The functions take the table that
`moe.results.table.load_runs` returns.
"""

import json
import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from moe.checks import first_line, plain
from moe.config import layer_experts, layer_routers
from moe.config.keys import DEFAULTED, OFF, is_free
from moe.config.layer_entries import in_words
from moe.metrics.catalog import lookup, select
from moe.results.table import ABSENT, DIGESTS, FACTS, PLUGINS, natural

HEADLINE = tuple(metric.headline for metric in select(shown="headline"))
ROUTING = tuple(dict.fromkeys(name for each in select(shown="conditions") for name in (each.name, each.headline)))
ADAPTER_ROUTING = tuple(name for each in ROUTING if lookup(name := f"adapter/{each}") is not None)
STD = "std (ddof=1)"
FACTOR_GROUPS = ("variant", "router", "schedule", "adapter", "model", "data", "optimizer")


def varied_factors(runs: pd.DataFrame) -> list[str]:
    """Return the factors with more than one level, without those in `tied_factors`. The seed comes last."""
    seed = ["seed"] if "seed" in runs and runs["seed"].nunique() > 1 else []
    return _free_and_tied(runs)[0] + seed


def tied_factors(runs: pd.DataFrame) -> dict[str, str]:
    """Return {factor: the other factor, or factors joined by "and", that determine its level in all these runs}.

    The effects of the two factors cannot be told apart.
    """
    return _free_and_tied(runs)[1]


def levels(column: pd.Series) -> list[Any]:
    """Return the distinct levels of a factor: numbers, sorted, and then texts in the order of their rows.

    The rows of `moe.results.table.load_runs` are in the order in which the user listed the levels. Texts that differ in
    numbers alone are sorted by these.
    """
    found = column.dropna().unique().tolist()
    texts = {each: natural(each) for each in found if isinstance(each, str)}
    places: dict[str | float, float] = {}
    for part in chain.from_iterable(texts.values()):
        places.setdefault(part, part if isinstance(part, float) else len(places))
    in_order = sorted(texts, key=lambda text: [places[part] for part in texts[text]])
    return sorted(each for each in found if each not in texts) + in_order


def reference_level(runs: pd.DataFrame, factor: str) -> Any:
    """Return the level that others are compared with.

    It is the first level in the order in which the user listed them, or in the order of `levels` if no sweep.json has
    the user's order. Routers that are not causal are passed over if there is a causal one, and so is `ABSENT` if there
    is another level. Adapters are compared with none.
    """
    runs = narrowed(runs, (factor, "causal", "place"))
    of_level = {level: runs[runs[factor] == level] for level in levels(runs[factor])}

    def key(level: Any) -> tuple[bool, bool, bool, float]:
        members = of_level[level]
        not_causal = "causal" in members and bool((members["causal"] == False).all())  # noqa: E712 (it may be unknown)
        place = members["place"].min() if "place" in members else math.nan
        an_adapter = factor == "adapter" and level != "none"
        return level == ABSENT, not_causal, an_adapter, math.inf if pd.isna(place) else float(place)

    return min(of_level, key=key)


def conditions(runs: pd.DataFrame, factors: list[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield each combination of levels that occurs, and its runs. The combinations are in the order of `levels`.

    Without factors there is one combination, which is empty, and it has all runs.
    """
    for cell, rows in _rows_of_conditions(runs[factors].reset_index(drop=True), factors):
        yield cell, runs.iloc[rows] if factors else runs


def _rows_of_conditions(known: pd.DataFrame, factors: list[str]) -> Iterator[tuple[dict[str, Any], pd.Index]]:
    """Yield each combination and the numbers of its rows. To pick rows of these few columns alone is fast."""
    if not factors:
        yield {}, known.index
        return
    for level in levels(known[factors[0]]):
        for other_levels, rows in _rows_of_conditions(known[known[factors[0]] == level], factors[1:]):
            yield {factors[0]: level, **other_levels}, rows


def present(runs: pd.DataFrame, metrics: Iterable[str]) -> list[str]:
    """Return those of `metrics` that some run has, in their order, without repetition."""
    return [metric for metric in dict.fromkeys(metrics) if metric in runs and runs[metric].notna().any()]


def by_seed(runs: pd.DataFrame, metric: str) -> pd.Series:
    """Return the finite values of `metric` in one condition by seed. Raises ValueError if a seed has two runs."""
    values = pd.Series(runs[metric].to_numpy(dtype=float), index=runs["seed"])
    values = values[values.map(math.isfinite)].sort_index()
    if not values.index.is_unique:
        seed = values.index[values.index.duplicated()][0]
        folders = ", ".join(map('"{}"'.format, runs.loc[runs["seed"] == seed, "folder"]))
        raise ValueError(f"seed {seed} has more than one run of the same condition, pass only one of them: {folders}")
    return values


def summary(runs: pd.DataFrame, factors: list[str], metrics: Iterable[str]) -> pd.DataFrame:
    """Return n, mean and sample standard deviation (ddof=1) of the finite values, by condition and metric."""
    rows = []
    metrics = list(metrics)
    runs = narrowed(runs, (*factors, *metrics, "seed", "folder"))
    for condition, members in conditions(runs, factors):
        for metric in metrics:
            values = by_seed(members, metric)
            rows.append(
                condition | {"metric": metric, "n": len(values), "mean": values.mean(), STD: values.std(ddof=1)}
            )
    table = pd.DataFrame(rows, columns=[*factors, "metric", "n", "mean", STD])
    return table.astype({"n": int, "mean": float, STD: float})


def narrowed(runs: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Return the table with only those of `columns` that it has: to select rows of a hundred columns takes long."""
    return runs[[column for column in dict.fromkeys(columns) if column in runs]]


def spread_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return a summary as text, "mean ± std (ddof=1)", with a row per condition. Levels are as the user writes them.

    If a metric has fewer seeds than the other metrics of the condition, its n is added.
    """
    factors = [column for column in summary if column not in ("metric", "n", "mean", STD)]
    rows = []
    for condition, members in conditions(summary, factors):
        n = members["n"].max()
        cells = {}
        for metric, seeds, mean, std in members[["metric", "n", "mean", STD]].itertuples(index=False):
            cells[metric] = _spread(mean, std) + (f" (n={seeds})" if seeds < n else "")
        rows.append({factor: str(level) for factor, level in condition.items()} | cells | {"n seeds": n})
    return pd.DataFrame(rows)


BY_LAYER = (layer_routers.KEY, layer_experts.KEY)  # columns whose levels are entries for layers
NAMED_ROUTERS = ("router", "variant")  # columns whose levels say how tokens are routed
MARKED = (*NAMED_ROUTERS, "drop")  # columns whose levels `with_causality` marks


def two_levels(runs: pd.DataFrame, factor: str, pair: tuple[Any, Any], others: list[str]) -> pd.DataFrame:
    """Return the runs at two levels of a factor, prepared so that they can be paired by the levels of `others`.

    Another factor may not apply at one of the two levels, such as the temperature of a router that has none: it is
    `ABSENT` there. The runs of that side are then repeated, once with each level that the factor has on the other side.
    """
    sides = [runs[runs[factor] == each] for each in pair]
    for other in others:
        for here, there in ((0, 1), (1, 0)):
            missing, known = sides[here][other] == ABSENT, sides[there][other]
            if missing.all() and not (known == ABSENT).any():
                sides[here] = pd.concat(
                    [sides[here].assign(**{other: each}) for each in levels(known)] or [sides[here]]
                )
    return pd.concat(sides)


# What follows the name of a router whose losses are not comparable with those of causal routers, or may not be.
NOT_CAUSAL, CAUSAL_BY_SETTING, CAUSALITY_UNKNOWN = " (not causal)", " (causal by setting)", " (causality unknown)"


def with_causality(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the same runs with a mark after the name of every router and arm that is not causal.

    The mark is `CAUSALITY_UNKNOWN` if no run of the name has the information, and `CAUSAL_BY_SETTING` if the runs of
    one name differ, as with drop=position,score. In this way each name stays one level of its factor. A level of `drop`
    other than `position` and `ABSENT` gets the first mark if no run that has it is causal.
    """
    words = runs["causal"].map({True: "", False: NOT_CAUSAL})
    known_columns = [column for column in NAMED_ROUTERS if column in runs]
    named = [column for column in known_columns if not (runs[column].isna() | (runs[column] == "none")).all()]
    for column in named:
        by_name = words.groupby(runs[column])
        mark = by_name.transform("first").where(by_name.transform("nunique") < 2, CAUSAL_BY_SETTING)
        runs = runs.assign(**{column: (runs[column] + mark.fillna(CAUSALITY_UNKNOWN)).where(runs[column].notna())})
    if "drop" in runs:
        causal = (runs["causal"] != False).groupby(runs["drop"]).transform("any")  # noqa: E712 (it may be unknown)
        policy = runs["drop"].notna() & ~runs["drop"].isin(["position", ABSENT])
        marked = policy & ~causal.fillna(True).astype(bool)
        runs = runs.assign(drop=runs["drop"].where(~marked, runs["drop"].astype(str) + NOT_CAUSAL))
    return runs


def with_readable_levels(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the same runs with causality marked, and with levels that have entries for layers in words.

    The columns of one type are one array, as in `moe.results.table.table_of`.
    """
    columns = {column: runs[column].map(partial(readable_level, column)) for column in BY_LAYER if column in runs}
    return with_causality(runs.assign(**columns)).copy()


def readable_level(factor: str, level: Any) -> Any:
    """Return a level, in words if it has entries for layers (`moe.config.layer_entries.in_words`)."""
    return in_words(level) if factor in BY_LAYER and isinstance(level, str) else level


def without_causality(level: Any) -> Any:
    """Return a level without the mark that `with_causality` adds."""
    for mark in (NOT_CAUSAL, CAUSAL_BY_SETTING, CAUSALITY_UNKNOWN):
        level = level.removesuffix(mark) if isinstance(level, str) else level
    return level


def unfinished(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that are not finished: experiment, run, status, and the first line of the error."""
    table = runs.loc[runs["status"] != "finished", ["experiment", "run", "status", "error"]]
    return table.assign(error=[first_line(e) if isinstance(e, str) and e else "" for e in table["error"]])


def _free_and_tied(runs: pd.DataFrame) -> tuple[list[str], dict[str, str]]:
    """Return the varied factors, and a dictionary from each tied factor to the one that determines its level.

    If two factors change together, one of them counts as varied and the other as tied. An arm (`variant`) counts before
    the keys that it sets, and a group such as `router` before a key below it, such as `router._target_`. What the grids
    of the runs did not vary counts last. Several factors may determine it together: a budget of FLOPs gives each size
    of the model a number of steps of its own. The checksum of the text is a factor if runs with equal settings read
    different text, because files changed. A condition then has runs with one text only. The same holds for the code of
    a package from outside of this project.
    """
    factors = [c for c in runs if "/" not in c and c not in (*FACTS, "seed") and not is_free(c)]
    asked = _factors_of_grids(runs)
    factors.sort(
        key=lambda column: (
            bool(asked) and column not in asked,
            FACTOR_GROUPS.index(column) if column in FACTOR_GROUPS else len(FACTOR_GROUPS),
            "." in column,
        )
    )
    data = [c for c in factors if (c == "data" or c.startswith("data.")) and c not in DIGESTS]
    seeds = runs.get("seed")
    free: dict[str, np.ndarray] = {}
    tied: dict[str, str] = {}
    for factor in [*factors, "experiment"]:
        numbers, found = pd.factorize(runs[factor])
        if len(found) < 2:
            continue
        if seeds is not None and (runs[factor] == seeds)[numbers >= 0].all():
            continue  # data.seed=${seed} is the seed, not a factor
        only_where_it_applies = factor in OFF or factor in DEFAULTED or factor.startswith(f"{PLUGINS}.")
        if only_where_it_applies and len([level for level in found if level != ABSENT]) < 2:
            continue  # the same wherever it applies; whether it applies depends on the router
        if factor in DIGESTS and data and (runs.groupby(data, dropna=False)[factor].nunique() < 2).all():
            continue  # runs with equal settings of the data read the same text
        leader = next((other for other, leading in free.items() if _determines(leading, numbers)), None)
        if leader is None and asked and factor not in (*asked, "experiment"):
            leader = _joint_leader(free, numbers)
        if leader is None:
            free[factor] = numbers
        else:
            tied[factor] = leader
    return list(free), tied


def _factors_of_grids(runs: pd.DataFrame) -> set[str]:
    """Return the factors of the grids of these runs; none if some run belongs to no known grid.

    A table of runs knows its grids from the sweep.json of each run: see `moe.results.table.load_runs`.
    """
    if "varied" not in runs or runs["varied"].isna().any():
        return set()
    return {factor for grid in runs["varied"].unique() for factor in json.loads(grid)}


def _joint_leader(free: dict[str, np.ndarray], numbers: np.ndarray) -> str | None:
    """Return the names of the factors that determine a level only together, such as "variant and model.dim", or None.

    Factors that they do not need are left out.
    """
    names = list(free)
    for name in (None, *free):
        rest = [other for other in names if other != name]
        if rest and _determines(pd.factorize(pd.MultiIndex.from_arrays([free[each] for each in rest]))[0], numbers):
            names = rest
        elif name is None:
            return None
    return " and ".join(names) or None


def _determines(leading: np.ndarray, factor: np.ndarray) -> bool:
    """Return whether all runs with the same level of one factor have the same level of another one.

    Levels are numbers from 0, one for each run; runs with an unknown level, -1, do not count.
    """
    known = (leading >= 0) & (factor >= 0)
    pairs = leading[known] * len(factor) + factor[known]  # there are at most as many levels as runs
    return len(np.unique(pairs)) == len(np.unique(leading[known]))


def _spread(mean: float, std: float) -> str:
    """Return the spread with two significant digits, and the mean with the same number of decimals."""
    if not math.isfinite(mean):
        return "–"
    if not math.isfinite(std):
        return plain(f"{mean:.5g} ± –")
    if std <= 1e-12 * abs(mean):  # every seed has the same value, up to rounding
        return plain(f"{mean:.5g} ± 0")
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"
