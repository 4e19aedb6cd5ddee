"""What a planned claim compares: each level that it names with each rival, paired by seed. `claims.py` judges it."""

from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.equal_cost import (
    FLOPS,
    SECONDS,
    NoEqualCostError,
    at_common_cost,
    metric_curves,
    unknown_flops,
)
from moe.analysis.estimates import Comparison, Sides, as_change, in_all_runs, of_pairs, widened
from moe.analysis.looks import group_of, place_of
from moe.analysis.sentences import null_everywhere
from moe.analysis.statistics import name_cell
from moe.config.claim import DOMAIN, ClaimConfig
from moe.metrics.catalog import lookup
from moe.results.comparable import incomparable, is_timed, not_poolable
from moe.results.conditions import by_seed, conditions, levels, two_levels, varied_factors
from moe.results.table import level

BASE = "base/value"  # the metric at the first level of an interaction; "/" as in a metric
SECOND = "second/folder"  # of the run at the second level
COST_COLUMNS = {"flops": FLOPS, "seconds": SECONDS}  # by the value of a claim's key `at`


class Compared(NamedTuple):
    """The comparisons that a claim makes.

    pairs: for each of the levels `named`, a comparison with each of `rivals`. absent: what the runs lack for it; if
    they lack anything, there are no pairs.
    """

    named: list[Any]
    rivals: list[Any]
    pairs: list[list[Comparison]]
    absent: list[str]

    @property
    def runs(self) -> frozenset[str]:
        """The folders of the runs on which the test of the claim depends, for `moe.analysis.looks.Study`.

        A run that changes no number is not among them: its seed lacks the other side, or its combination of other
        factors has too few pairs. In a mixed model, a run at another level counts if it tells how the seeds differ.
        """
        return frozenset().union(*(pair.runs for line in self.pairs for pair in line))


def compared(claim: ClaimConfig, runs: pd.DataFrame, evals: pd.DataFrame | None = None) -> Compared:
    """Return what a claim compares. An interaction without a direction is taken to be "higher".

    evals: the evaluations of the runs, for a claim at equal cost; by default they are read from the run folders.
    """
    runs = _selected(claim, runs)
    named, rivals = _sides(claim, runs)
    absent = [
        f"{factor}={level(each)} is in no run"
        for factor, wanted in (claim.compared_levels | {claim.factor: [*named, *rivals]}).items()
        for each in wanted
        if factor not in runs or level(each) not in levels(runs[factor])
    ]
    absent += [] if rivals else [f"no other level of {claim.factor}"]
    absent += [f"no run has {metric}" for metric in _metrics(claim) if metric not in runs]
    absent += [
        f"{metric} is {null_everywhere(metric)}"
        for metric in _metrics(claim)
        if metric in runs and runs[metric].isna().all() and (entry := lookup(metric)) and entry.when_null
    ]
    if not absent and claim.kind == "interaction" and timed(claim):  # a change has no time of its own
        sides = runs[runs[claim.factor].isin([*named, *rivals])]
        absent += filter(None, [not_poolable(claim.metric, sides, timed=True)])
    if absent:
        return Compared(named, rivals, [], absent)
    if claim.at is None:
        return Compared(named, rivals, _pairs(claim, runs, named, rivals), [])
    try:
        return Compared(named, rivals, _pairs_at_cost(claim, runs, named, rivals, evals), [])
    except NoEqualCostError as error:
        return Compared(named, rivals, [], [str(error)])


def as_spelled(claim: ClaimConfig, runs: pd.DataFrame) -> ClaimConfig:
    """Return the claim with its levels as the runs have them: 0.0 for a 0 that a claim may write for it."""

    def spelled(factor: str, wanted: list[Any]) -> list[Any]:
        present = {each: each for each in levels(runs[factor])} if factor in runs else {}
        return [present.get(level(each), each) for each in wanted]

    named, than = (spelled(claim.factor, each) for each in (claim.levels, claim.than))
    within = {factor: spelled(factor, wanted) for factor, wanted in claim.within.items()}
    return replace(claim, levels=named, than=than, within=within)


def _sides(claim: ClaimConfig, runs: pd.DataFrame) -> tuple[list[Any], list[Any]]:
    """Return the levels that a claim names, and those with which it compares them."""
    present = levels(runs[claim.factor]) if claim.factor in runs else []
    named = [level(each) for each in claim.levels]
    return named, [level(each) for each in claim.than] or [each for each in present if each not in named]


def mean_compared_with(claim: ClaimConfig, runs: pd.DataFrame) -> float:
    """Return the mean of which a percentage of a claim's difference is a share: that of the levels it compares with.

    It is the mean of the metric in all these runs if they lack those levels.
    """
    members = _selected(claim, runs)
    reference = members[members[claim.factor].isin(_sides(claim, runs)[1])] if claim.factor in members else members[:0]
    known = reference[claim.metric].dropna()
    return float((known if len(known) else runs[claim.metric]).mean())


def _pairs(claim: ClaimConfig, runs: pd.DataFrame, named: list[Any], rivals: list[Any]) -> list[list[Comparison]]:
    """Compare each of the levels `named` with each of `rivals`."""
    if claim.kind == "interaction":
        claim, runs = as_change(claim), _with_both_levels(claim, runs)
    else:
        runs = _with_mean_of_domains(claim, runs)
    others = _others(claim, runs)
    return [[_compare(claim, runs, others, a, b) for b in rivals] for a in named]


def _pairs_at_cost(
    claim: ClaimConfig, runs: pd.DataFrame, named: list[Any], rivals: list[Any], evals: pd.DataFrame | None
) -> list[list[Comparison]]:
    """Compare as `_pairs` does, at each combination of other factors at a cost that both sides have reached.

    A mixed model compares all levels at once, so these share it. A run that lacks a partner decides no cost of others.
    All runs that decide a cost are runs of the test. Raises NoEqualCostError if a combination has none, and if a cost
    or a metric is not known over training.
    """
    cost = COST_COLUMNS[claim.at or ""]
    for each in (*named, *rivals) if cost == FLOPS else ():
        if reason := unknown_flops(runs[runs[claim.factor] == each]):
            raise NoEqualCostError(f"{claim.factor}={each}: {reason}")
    curves = metric_curves(runs, _metrics(claim), cost, evals)
    if claim.kind == "mixed":
        found = _pairs_of_curves(claim, runs, curves, named, rivals)
        return [[pair._replace(runs=group_of(runs)) for pair in line] for line in found]
    runs = runs[runs[claim.factor].isin([*named, *rivals])]
    others = _others(claim, runs)

    def pair(a: Any, b: Any) -> Comparison:
        both = two_levels(runs, claim.factor, (a, b), others)
        sides = both.groupby([*others, "seed"], dropna=False)[claim.factor].transform("nunique")
        paired = {*both.loc[sides == 2, "folder"]}
        of_pairs = {
            metric: {folder: curve for folder, curve in known.items() if folder in paired}
            for metric, known in curves.items()
        }
        [[found]] = _pairs_of_curves(claim, both, of_pairs, [a], [b])
        return found._replace(runs=group_of(both[sides == 2]))

    return [[pair(a, b) for b in rivals] for a in named]


def _pairs_of_curves(
    claim: ClaimConfig,
    runs: pd.DataFrame,
    curves: dict[str, dict[str, pd.DataFrame]],
    named: list[Any],
    rivals: list[Any],
) -> list[list[Comparison]]:
    """Compare as `_pairs` does, with metrics that are read from curves at a common cost.

    Between two evaluations a metric is not known exactly. So the levels are also compared with the least values that
    one side may have and the largest ones of the other, and the other way round; see `widened`.
    """
    others = _others(claim, runs)
    read, least, most = at_common_cost(runs, others, curves)
    found = _pairs(claim, read, named, rivals)
    if least.equals(most):
        return found
    far = [
        _pairs(claim, _apart(claim, read, *ends, named, rivals), named, rivals)
        for ends in ((least, most), (most, least))
    ]
    return [[widened(*same) for same in zip(*lines, strict=True)] for lines in zip(found, *far, strict=True)]


def _apart(
    claim: ClaimConfig,
    runs: pd.DataFrame,
    of_named: pd.DataFrame,
    of_rivals: pd.DataFrame,
    named: list[Any],
    rivals: list[Any],
) -> pd.DataFrame:
    """Return the runs with the metrics of two tables: those of one at the levels `named`, of the other at `rivals`.

    At the first of the two levels of an interaction, it is the other way round, so that the change is as large, or as
    small, as it can be.
    """
    one, other = (runs[claim.factor].isin(levels) for levels in (named, rivals))
    moderator = claim.moderator if claim.kind == "interaction" else None
    moved = {}
    for metric in (metrics := _metrics(claim)):
        first = pd.Series(moderator == DOMAIN and metric == metrics[0], runs.index)
        if moderator not in (None, DOMAIN):
            first = runs[moderator] == level(claim.within[moderator][0])
        a, b = of_named[metric].mask(first, of_rivals[metric]), of_rivals[metric].mask(first, of_named[metric])
        moved[metric] = runs[metric].mask(one, a).mask(other, b)
    return runs.assign(**moved)


def timed(claim: ClaimConfig) -> bool:
    """Return whether a claim is about a time or a speed."""
    return claim.at == "seconds" or is_timed(claim.metric)


def _others(claim: ClaimConfig, runs: pd.DataFrame) -> list[str]:
    return [factor for factor in varied_factors(runs) if factor not in (claim.factor, "seed")]


def _selected(claim: ClaimConfig, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at those levels of other factors that the claim names."""
    for factor, wanted in claim.within.items():
        if factor in runs:
            runs = runs[runs[factor].isin([level(each) for each in wanted])]
    return runs


def _metrics(claim: ClaimConfig) -> list[str]:
    """Return the columns from which a claim is judged: the metric, or its variants for the domains of the text."""
    return [f"{claim.metric}/{domain}" for domain in claim.within.get(DOMAIN, [])] or [claim.metric]


def _with_mean_of_domains(claim: ClaimConfig, runs: pd.DataFrame) -> pd.DataFrame:
    return runs.assign(**{claim.metric: runs[_metrics(claim)].mean(axis=1, skipna=False)})


def _at_first_level(claim: ClaimConfig, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at the first of the two levels between which an interaction compares, with the metric there."""
    runs = runs.assign(**{claim.metric: runs[_metrics(claim)[0]]})
    factor = claim.moderator
    return runs if factor == DOMAIN else runs[runs[factor] == level(claim.within[factor][0])]


def _with_both_levels(claim: ClaimConfig, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at the first of the two levels of an interaction, with the metric at both.

    Its own column has the metric of the run at the second level that has all else in common. The one at the first level
    is in the column `BASE`.
    """
    first, factor = _at_first_level(claim, runs), claim.moderator
    first = first.rename(columns={claim.metric: BASE})
    if factor == DOMAIN:
        return first.assign(**{claim.metric: runs[_metrics(claim)[1]]})
    second = _with_mean_of_domains(claim, runs[runs[factor] == level(claim.within[factor][1])])
    keys = list(dict.fromkeys([claim.factor, "seed", *varied_factors(first), *varied_factors(second)]))
    return first.merge(second[[*keys, claim.metric, "folder"]].rename(columns={"folder": SECOND}), on=keys)


def _compare(claim: ClaimConfig, runs: pd.DataFrame, others: list[str], treated: Any, reference: Any) -> Comparison:
    """Compare two levels: the mean difference within seeds, over all combinations of the other factors that have both.

    Of an interaction, the two values that are compared are themselves such differences: at the second level of the
    other factor, and at the first.
    In a mixed model the runs at the other levels count too: where a run is missing, they tell how the seeds differ.
    """
    sides: dict[str, pd.DataFrame] = {}
    folders: dict[str, pd.DataFrame] = {}
    alone: dict[str, pd.DataFrame] = {}
    for cell, members in conditions(two_levels(runs, claim.factor, (treated, reference), others), others):
        both = [members[members[claim.factor] == side] for side in (treated, reference)]
        if all(map(len, both)):
            names = (f"{claim.factor}={treated}", f"{claim.factor}={reference}")
            if reason := incomparable(claim.metric, *both, timed=timed(claim), names=names):
                return Comparison(0, doubt=reason)
            a, b = (by_seed(rows, claim.metric) for rows in both)
            base = b
            if BASE in runs:
                first, base = (by_seed(rows, BASE) for rows in both)
                a, b = a - b, first - base
            sides[name_cell(cell)] = pd.DataFrame({"treated": a, "reference": b, "base": base})
            treated_runs, reference_runs = map(_folders, both)
            folders[name_cell(cell)] = pd.DataFrame({"treated": treated_runs, "reference": reference_runs})
        else:
            alone[name_cell(cell)] = members
    if not sides:
        return Comparison(0, doubt=f"no runs differ in {claim.factor} alone")
    table = pd.concat(sides, axis=1)  # a row for each seed; NaN where a run is missing
    of_side = {side: table.xs(side, axis=1, level=1) for side in ("treated", "reference", "base")}
    runs_of = pd.concat(folders, axis=1).reindex(table.index)
    of_side |= {f"{side}_runs": runs_of.xs(side, axis=1, level=1) for side in ("treated", "reference")}
    if claim.kind != "mixed":
        return of_pairs(claim, Sides(**of_side, alone=list(alone)))
    if reason := not_poolable(claim.metric, runs, timed=timed(claim)):
        return Comparison(0, doubt=reason)
    others_too = conditions(runs[~runs[claim.factor].isin([treated, reference])], [claim.factor, *others])
    rest = [members for _, members in others_too] + list(alone.values())
    values, runs_of_rest = [by_seed(members, claim.metric) for members in rest], [_folders(members) for members in rest]
    return in_all_runs(claim, Sides(**of_side, alone=list(alone)), values, runs_of_rest)


def _folders(runs: pd.DataFrame) -> pd.Series:
    """Return the folders of the runs by seed, each as a set; of a change, those of both runs."""
    columns = [column for column in ("folder", SECOND) if column in runs]
    sets = [frozenset(map(place_of, row)) for row in runs[columns].itertuples(index=False, name=None)]
    found = pd.Series(sets, index=runs["seed"], dtype=object)
    return found[~found.index.duplicated()]
