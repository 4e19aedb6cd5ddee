"""Tuned keys: which runs chose their values, what they chose for each arm, and whether all arms had equal budgets.

An arm is a combination of levels of the factors that a sweep has beside seed and tuned keys.
"""

import json
from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.statistics import name_cell, with_intervals
from moe.results.comparable import search_goal
from moe.results.conditions import conditions, levels, summary, with_causality
from moe.results.table import ABSENT

CHOOSES = "val/loss"  # its mean over the seeds for tuning decides
ENDED = ("finished", "diverged")  # a run that diverged would do so again


class Arm(NamedTuple):
    """An arm: its name, the mean loss at each combination of tuned values, and the best of them.

    means: columns are the tuned keys, n, mean, ci_low and ci_high. best: {key: value}; empty if no combination has a
    finite loss with all seeds.
    """

    name: str
    means: pd.DataFrame
    best: dict[str, Any]


def tuned_keys(runs: pd.DataFrame) -> list[str]:
    """Return the keys that were tuned for each setting of these runs, or that these runs tune."""
    texts = runs["tuned"].dropna().unique() if "tuned" in runs else ()
    return list(dict.fromkeys(key for text in texts for key in json.loads(text)["tune"]))


def is_judged(runs: pd.DataFrame) -> bool:
    """Return whether these runs are trained at values that other runs chose."""
    return bool(tuned_keys(runs)) and search_goal(runs) is None


def trials_of(runs: pd.DataFrame, loaded: pd.DataFrame) -> pd.DataFrame:
    """Return those of all loaded runs that chose the tuned values of `runs`."""
    if not tuned_keys(runs):
        return loaded[:0]
    places = {*zip(_sweeps(runs), runs["tuned"], strict=True)}
    same = [place in places for place in zip(_sweeps(loaded), loaded["tuned"], strict=True)]
    return with_causality(loaded[pd.Series(same, index=loaded.index) & loaded["search"].notna()])


def values_of(runs: pd.DataFrame) -> pd.Series:
    """Return the values of the tuned keys of each run as a text."""
    keys = [key for key in tuned_keys(runs) if key in runs]
    rows = [{key: row[key] for key in keys if row[key] != ABSENT} for _, row in runs[keys].iterrows()]
    return pd.Series(list(map(name_cell, rows)), index=runs.index, dtype=object)


def arms_of(trials: pd.DataFrame) -> list[Arm]:
    """Return each arm of the runs of one tuning. Of equal means the smaller values are the best."""
    keys, factors = _keys_and_factors(trials)
    found = []
    for cell, members in conditions(trials, factors):
        applying = [key for key in keys if (members[key] != ABSENT).any()]
        means = with_intervals(summary(members[members["status"] == "finished"], applying, [CHOOSES]))
        whole = means[means["n"] == members["seed"].nunique()].sort_values(["mean", *applying])
        best = {key: whole[key].iloc[0] for key in applying} if len(whole) else {}
        found.append(Arm(name_cell(cell) or "the only arm", means, best))
    return found


def tuned_equally(trials: pd.DataFrame) -> str:
    """Return whether each arm of the runs of one tuning has ended runs at the same number of values, by seed."""
    keys, factors = _keys_and_factors(trials)
    trials = trials[(trials[keys] != ABSENT).all(axis=1)]
    ended = trials["status"].isin(ENDED)
    counts = pd.crosstab(
        [trials[name] for name in (*factors, "seed")], [trials[key] for key in keys], values=ended, aggfunc="sum"
    )
    names, arms = ", ".join(keys), ", ".join(factors) or "the sweep"
    if counts.empty or not (counts == 1).all(axis=None):
        return f"tuned equally: no, the settings of {arms} differ in how many runs ended by {names}"
    seeds = ", ".join(map(str, levels(trials["seed"])))
    number = f"the same {counts.shape[1]} values of {names}, with seeds {seeds}"
    return f"tuned equally: yes, each setting of {arms} has {number}, which judge nothing"


def _keys_and_factors(trials: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the keys that the runs of one tuning tune, and the factors that tell its arms apart."""
    [text] = trials["tuned"].unique()
    told = json.loads(text)
    return list(told["tune"]), [factor for factor in told["factors"] if factor in trials]


def _sweeps(runs: pd.DataFrame) -> list[str]:
    return [str(folder).rpartition("/")[0] for folder in runs["folder"]]
