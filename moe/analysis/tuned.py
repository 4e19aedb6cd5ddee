"""Tuned keys: which runs chose their values, what they chose for each arm, and whether all arms had equal budgets.

An arm is a combination of levels of the factors that a sweep has beside seed and tuned keys.
"""

import json
import math
from collections import Counter
from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.statistics import name_cell, with_intervals
from moe.config.cell import CHOOSES
from moe.results.comparable import search_goal
from moe.results.conditions import conditions, levels, narrowed, summary, with_readable_levels
from moe.results.table import ABSENT

NAMED = 3  # arms, at most, to which a tuned key does not apply
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
    return with_readable_levels(loaded[pd.Series(same, index=loaded.index) & loaded["search"].notna()])


def values_of(runs: pd.DataFrame) -> pd.Series:
    """Return the values of the tuned keys of each run as a text."""
    keys = [key for key in tuned_keys(runs) if key in runs]
    rows = [{key: row[key] for key in keys if row[key] != ABSENT} for _, row in runs[keys].iterrows()]
    return pd.Series(list(map(name_cell, rows)), index=runs.index, dtype=object)


def arms_of(trials: pd.DataFrame) -> list[Arm]:
    """Return each arm of the runs of one tuning. Of equal means the smaller values are the best."""
    keys, factors = _keys_and_factors(trials)
    found = []
    for cell, members in conditions(_for_each_arm(trials), factors):
        applying = _applying(members, keys)
        means = with_intervals(summary(members[members["status"] == "finished"], applying, [CHOOSES]))
        whole = means[means["n"] == members["seed"].nunique()]
        whole = whole.sort_values(["mean", *applying], key=lambda column: column.replace(ABSENT, math.inf))
        best = {key: value for key in applying if len(whole) and (value := whole[key].iloc[0]) != ABSENT}
        found.append(Arm(name_cell(cell) or "the only arm", means, best))
    return found


def tuned_equally(trials: pd.DataFrame) -> str:
    """Return whether all arms of one tuning to which the same keys apply have ended runs at the same values, by seed.

    An arm to which fewer keys apply than to others is named.
    """
    keys, factors = _keys_and_factors(trials)
    seeds = levels(trials["seed"])
    alike: dict[tuple[str, ...], dict[str, list[tuple[Any, ...]]]] = {}
    for cell, members in conditions(_for_each_arm(trials), factors):
        applying = tuple(_applying(members, keys))
        ended = members.loc[members["status"].isin(ENDED), ["seed", *applying]]
        alike.setdefault(applying, {})[name_cell(cell)] = [*ended.itertuples(index=False, name=None)]
    names, arms, number = ", ".join(keys), ", ".join(factors) or "the sweep", 0
    for budgets in alike.values():
        values = {run[1:] for runs in budgets.values() for run in runs}
        wanted = Counter((seed, *each) for seed in seeds for each in values)
        if not values or any(Counter(runs) != wanted for runs in budgets.values()):
            return f"tuned equally: no, the settings of {arms} differ in how many runs ended by {names}"
        number = max(number, len(values))
    fewer = [arm for applying, budgets in alike.items() if len(applying) < len(keys) for arm in budgets]
    told = ", ".join(fewer) if len(fewer) <= NAMED else f"{len(fewer)} settings"
    but = f"; {names} {'do not all' if keys[1:] else 'does not'} apply to {told}" if fewer else ""
    listed = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    idle = f"with {listed}, which judge{'s' * (len(seeds) == 1)} nothing"
    return f"tuned equally: yes, each setting of {arms} has the same {number} values of {names}, {idle}{but}"


def _keys_and_factors(trials: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the keys that the runs of one tuning tune, and the factors that tell its arms apart."""
    [text] = trials["tuned"].unique()
    told = json.loads(text)
    return list(told["tune"]), [factor for factor in told["factors"] if factor in trials]


def _applying(runs: pd.DataFrame, keys: list[str]) -> list[str]:
    return [key for key in keys if (runs[key] != ABSENT).any()]


def _for_each_arm(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of one tuning with a row for each arm that has the run.

    At some values of the tuned keys a factor may not apply, such as the weight of a loss that one expert per token does
    not have. Then arms that differ only in this factor have the run in common.
    """
    keys, factors = _keys_and_factors(trials)
    trials = narrowed(trials, (*keys, *factors, "seed", "status", "folder", CHOOSES))
    trials = trials.assign(**{name: trials[name].fillna(ABSENT) for name in (*keys, *factors)})
    cells = {tuple(row) for row in trials[factors].itertuples(index=False)}

    def is_part(cell: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
        return cell != other and all(here in (there, ABSENT) for here, there in zip(cell, other, strict=True))

    arms = [cell for cell in cells if not any(is_part(cell, other) for other in cells)]
    found = []
    for cell, members in trials.groupby(factors, sort=False) if factors else [((), trials)]:
        having = [arm for arm in arms if is_part(cell, arm)] or [cell]
        found += [members.assign(**dict(zip(factors, arm, strict=True))) for arm in having]
    return pd.concat(found)


def _sweeps(runs: pd.DataFrame) -> list[str]:
    return [str(folder).rpartition("/")[0] for folder in runs["folder"]]
