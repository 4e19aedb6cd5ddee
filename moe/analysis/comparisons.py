"""What a planned claim compares: each level that it names with each rival, paired by seed. `claims.py` judges it."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from moe.analysis.equal_cost import FLOPS, SECONDS, NoEqualCostError, at_common_cost, metric_curves, unknown_flops
from moe.analysis.looks import group_of, place_of
from moe.analysis.power import PAIRED, SIGNIFICANCE, Freedom
from moe.analysis.sentences import null_everywhere
from moe.analysis.statistics import CONFIDENCE, NOT_CLEAR, mean_difference, name_cell, p_of_share
from moe.analysis.within_seeds import Contrast, contrast
from moe.config.claim import DOMAIN, Amount, ClaimConfig, amount_of
from moe.metrics.catalog import lookup
from moe.results.comparable import incomparable, is_timed, not_poolable
from moe.results.conditions import by_seed, conditions, levels, two_levels, varied_factors
from moe.results.table import level

NAN = float("nan")
BASE = "base/value"  # the metric before a change, of whose mean a margin may be a share; "/" as in a metric
SECOND = "second/folder"  # of the run after a change
ONE_SEED = "one seed tells no spread, so there is nothing to test the difference against"
ONE_SEED_CONNECTS = "without one of its seeds the others cannot tell the difference, so nothing can test it"
NO_WEIGHT = 1e-9  # of a run in an estimate, which rounding may give it
NO_SPREAD = "the difference is the same in every seed, so nothing tells how far chance could move it"
COST_COLUMNS = {"flops": FLOPS, "seconds": SECONDS}  # by the value of a claim's key `at`


# The estimate of so many times a difference minus a share of the mean of the values with which it is compared
Estimate = Callable[[float, float], Contrast]


class Comparison(NamedTuple):
    """Comparison of one level with one reference level, over n seeds.

    low, high: the 95 % t interval of the difference of the two means.
    p_for, p_against: p-value of the test that the claim holds, and of the test that it does not hold.
    favor: how far inside the claimed range the difference lies; negative if it lies outside.
    spread: the standard error times the square root of n; with all runs, the standard deviation of the paired
    differences. freedom: its degrees of freedom, by the number of seeds.
    claimed_low, claimed_high: the ends of the claimed range, which may be infinite.
    deterministic: whether the difference is the same in every seed. It is then tested only against a share of a mean.
    note: a remark for the reader, such as a run that is missing.
    doubt: why the comparison is undecided, if it is.
    runs: the folders of the runs on which the test depends.
    """

    n: int
    mean: float = NAN
    reference_mean: float = NAN
    low: float = NAN
    high: float = NAN
    p_for: float = NAN
    p_against: float = NAN
    favor: float = NAN
    spread: float = NAN
    freedom: Freedom = PAIRED
    claimed_low: float = NAN
    claimed_high: float = NAN
    deterministic: bool = False
    note: str = ""
    doubt: str = ""
    runs: frozenset[str] = frozenset()


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
        claim, runs = _as_change(claim), _changes(claim, runs)
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
        found = _pairs(claim, at_common_cost(runs, _others(claim, runs), curves), named, rivals)
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
        [[found]] = _pairs(claim, at_common_cost(both, others, of_pairs), [a], [b])
        return found._replace(runs=group_of(both[sides == 2]))

    return [[pair(a, b) for b in rivals] for a in named]


def timed(claim: ClaimConfig) -> bool:
    """Return whether a claim is about a time or a speed."""
    return claim.at == "seconds" or is_timed(claim.metric)


def _others(claim: ClaimConfig, runs: pd.DataFrame) -> list[str]:
    return [factor for factor in varied_factors(runs) if factor not in (claim.factor, "seed")]


def _tested(claim: ClaimConfig, found: Comparison, base: float, estimate: Estimate) -> Comparison:
    """Complete a comparison by its interval, and by a one-sided test of each end of the claimed range.

    base: the mean of which an end may be a share. As that mean is estimated from the same runs, the test is that of the
    difference minus this share of the values themselves (Fieller 1954), not of a bound that is taken to be known. The
    sign of the mean is estimated too, so the mean must be clear of zero (`p_of_share`).
    """
    difference, range_ = estimate(1.0, 0.0), claimed_range(claim)
    low, high = (end.at(base) for end in range_)
    found = found._replace(
        favor=min(difference.effect - low, high - difference.effect), claimed_low=low, claimed_high=high
    )
    sign = math.copysign(1.0, base)
    ends = [number for number, end in enumerate(range_) if math.isfinite(end.constant)]
    tests = {end: estimate(1.0, sign * range_[end].share) for end in ends}
    if any(math.isnan(test.error) for test in tests.values()):
        return found._replace(doubt=ONE_SEED if found.n == 1 else ONE_SEED_CONNECTS)
    if any(test.error == 0 for test in tests.values()):
        return found._replace(deterministic=difference.error == 0, doubt=NO_SPREAD)
    mean = estimate(0.0, -1.0)
    of_share = 0.0
    if any(range_[end].share for end in ends):
        of_share = p_of_share(mean.effect, mean.error, _freedom(mean, found.n).at(found.n))
    if of_share > SIGNIFICANCE:
        return found._replace(doubt=NOT_CLEAR)
    inward = {
        end: (test.effect - range_[end].constant) * (-1 if end else 1) / test.error for end, test in tests.items()
    }
    freedom = {end: _freedom(test, found.n) for end, test in tests.items()}
    inside = max(stats.t.sf(inward[end], freedom[end].at(found.n)) for end in ends)
    outside = min(stats.t.cdf(inward[end], freedom[end].at(found.n)) for end in ends)
    nearest = min(ends, key=inward.__getitem__)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, found.freedom.at(found.n)) * difference.error
    two_ends = len(ends) == 2
    return found._replace(
        low=difference.effect - reach,
        high=difference.effect + reach,
        p_for=max(of_share, float(inside if two_ends else min(1.0, 2 * inside))),
        p_against=float(min(1.0, 2 * outside)),
        spread=tests[nearest].error * math.sqrt(found.n),
        freedom=freedom[nearest],
        deterministic=difference.error == 0,
        doubt=f"the difference is shown neither inside nor outside {low:.3g} ... {high:.3g}" if two_ends else "",
    )


def _freedom(found: Contrast, n: int) -> Freedom:
    """Return the degrees of freedom of an estimate from n seeds, as they grow with n."""
    df = found.estimator.freedom
    return PAIRED if math.isnan(df) else Freedom((df + 1) / n, 1)


def _as_change(claim: ClaimConfig) -> ClaimConfig:
    """Return what an interaction or a mixed claim says about a difference: above or below zero, or close to it."""
    return replace(claim, kind=(claim.direction or "higher") if claim.margin is None else "equivalent")


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


def _changes(claim: ClaimConfig, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at the first of the two levels of an interaction.

    In place of the metric they have its change from there to the run at the second level that has all else in common.
    The metric itself is in the column `BASE`, of whose mean the claim's margin may be a share.
    """
    first, factor = _at_first_level(claim, runs), claim.moderator
    first = first.assign(**{BASE: first[claim.metric]})
    if factor == DOMAIN:
        return first.assign(**{claim.metric: runs[_metrics(claim)[1]] - first[claim.metric]})
    second = _with_mean_of_domains(claim, runs[runs[factor] == level(claim.within[factor][1])])
    keys = list(dict.fromkeys([claim.factor, "seed", *varied_factors(first), *varied_factors(second)]))
    second = second[[*keys, claim.metric, "folder"]].rename(columns={"folder": SECOND})
    pairs = first.merge(second, on=keys, suffixes=("", " at the second level"))
    return pairs.assign(**{claim.metric: pairs.pop(f"{claim.metric} at the second level") - pairs[claim.metric]})


def _compare(claim: ClaimConfig, runs: pd.DataFrame, others: list[str], treated: Any, reference: Any) -> Comparison:
    """Compare two levels: the mean difference within seeds, over all combinations of the other factors that have both.

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
            base = by_seed(both[1], BASE) if BASE in runs else b
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
        return _of_pairs(claim, _Sides(**of_side, alone=list(alone)))
    if reason := not_poolable(claim.metric, runs, timed=timed(claim)):
        return Comparison(0, doubt=reason)
    others_too = conditions(runs[~runs[claim.factor].isin([treated, reference])], [claim.factor, *others])
    rest = [members for _, members in others_too] + list(alone.values())
    values, runs_of_rest = [by_seed(members, claim.metric) for members in rest], [_folders(members) for members in rest]
    return _in_all_runs(claim, _Sides(**of_side, alone=list(alone)), values, runs_of_rest)


def _folders(runs: pd.DataFrame) -> pd.Series:
    """Return the folders of the runs by seed, each as a set; of a change, those of both runs."""
    columns = [column for column in ("folder", SECOND) if column in runs]
    sets = [frozenset(map(place_of, row)) for row in runs[columns].itertuples(index=False, name=None)]
    found = pd.Series(sets, index=runs["seed"], dtype=object)
    return found[~found.index.duplicated()]


def _used(folders: pd.DataFrame, uses: np.ndarray) -> frozenset[str]:
    """Return the folders in a table of seeds by settings, of those cells that a test uses."""
    sets = folders.to_numpy(dtype=object)[uses]
    return frozenset().union(*(each for each in sets if isinstance(each, frozenset)))


class _Sides(NamedTuple):
    """The values of two levels: a row for each seed, and a column for each combination of other factors.

    base: the values of whose mean the claimed range may be a share. treated_runs, reference_runs: the folders of the
    runs, in the same places. alone: combinations that have one of the two levels in no seed.
    """

    treated: pd.DataFrame
    reference: pd.DataFrame
    base: pd.DataFrame
    treated_runs: pd.DataFrame
    reference_runs: pd.DataFrame
    alone: list[str]


def _of_pairs(claim: ClaimConfig, sides: _Sides) -> Comparison:
    """Compare two levels by pairs of runs: the mean over combinations of the mean difference over their seeds."""
    treated, reference, base, treated_runs, reference_runs, alone = sides
    pairs = treated - reference
    kept, note = _judged(pairs.count(), "pair", pairs, alone)
    if kept.empty:
        return Comparison(0, note=note, doubt=_without_pair(claim, treated, reference))
    pairs = pairs[kept]
    reference, base = (table[kept].where(pairs.notna()) for table in (reference, base))
    scale = float(np.nanmax(np.abs(reference.to_numpy(dtype=float))))
    weights = np.full(len(kept), 1 / len(kept))

    @cache
    def estimate(times: float, share: float) -> Contrast:
        values = (times * pairs - share * base).to_numpy(dtype=float)
        return contrast(values, weights, seed_effects=False, scale=scale)

    used = [_used(each[kept], pairs.notna().to_numpy()) for each in (treated_runs, reference_runs)]
    return _estimated(claim, estimate, reference, base, note)._replace(runs=used[0] | used[1])


def _in_all_runs(claim: ClaimConfig, sides: _Sides, rest: list[pd.Series], rest_runs: list[pd.Series]) -> Comparison:
    """Compare two levels by a model of all runs.

    rest: values of other settings by seed. They tell how the seeds differ, and so do the runs of combinations that are
    left out of the comparison. rest_runs: their folders.
    """
    treated, reference, base, treated_runs, reference_runs, alone = sides
    counts = pd.concat([treated.count(), reference.count()], axis=1).min(axis=1)
    kept, lacks = _judged(counts, "run of a level", treated - reference, alone)

    def in_order(treated: pd.DataFrame, reference: pd.DataFrame, rest: list[pd.Series]) -> pd.DataFrame:
        both = treated, reference
        return pd.concat([*(each[kept] for each in both), *(each.drop(columns=kept) for each in both), *rest], axis=1)

    table = in_order(treated, reference, rest)
    folders = in_order(treated_runs, reference_runs, rest_runs).reindex(table.index)
    total = int(table.count().sum())
    note = "; ".join(filter(None, (f"mixed model of {total} runs", lacks)))
    if kept.empty:
        return Comparison(0, note=note, doubt=_without_pair(claim, treated, reference))
    values = table.to_numpy(dtype=float)
    weights, of_reference = np.zeros(table.shape[1]), np.zeros(table.shape[1])
    weights[: len(kept)], weights[len(kept) : 2 * len(kept)] = 1 / len(kept), -1 / len(kept)
    of_reference[len(kept) : 2 * len(kept)] = 1 / len(kept)

    @cache
    def estimate(times: float, share: float) -> Contrast:
        return contrast(values, times * weights, levels=-share * of_reference if share else None)

    reference, base = (each[kept].reindex(table.index) for each in (reference, base))
    try:
        by = [estimate(1.0, share).estimator for share in (0.0, *(end.share for end in claimed_range(claim)))]
        uses = ~np.isnan(values)
        uses[uses] = (np.abs([row for each in by for row in (each.of_runs, *each.changes)]) > NO_WEIGHT).any(axis=0)
        if uses.sum() < total:
            note = "; ".join(filter(None, (f"mixed model, which depends on {uses.sum()} of {total} runs", lacks)))
        return _estimated(claim, estimate, reference, base, note)._replace(runs=_used(folders, uses))
    except ValueError as error:
        return Comparison(0, note=note, doubt=str(error))


def _judged(counts: pd.Series, unit: str, pairs: pd.DataFrame, alone: list[str]) -> tuple[pd.Index, str]:
    """Return the combinations of other factors in which a claim is judged, and a note of what they lack.

    counts: of what each combination has to compare, in words `unit`. One with a single such is left out if others have
    more, because one seed alone tells no spread. pairs: the differences. alone: see `_Sides`.
    """
    kept = counts.index[counts >= max(1, min(2, counts.max()))]
    if kept.empty:
        return kept, _lost(pairs)
    left_out = [f"{cell}: a level has no run" for cell in alone]
    left_out += [
        f"{cell}: {'one' if counts[cell] else 'no'} {unit}" for cell in counts.index.difference(kept, sort=False)
    ]
    notes = f"left out: {'; '.join(left_out)}" if left_out else "", _lost(pairs[kept])
    return kept, "; ".join(filter(None, notes))


def _estimated(
    claim: ClaimConfig, estimate: Estimate, reference: pd.DataFrame, base: pd.DataFrame, note: str
) -> Comparison:
    """Return a comparison from the estimate of its difference, and of that minus a share of the mean of `base`."""
    found = estimate(1.0, 0.0)
    telling = found.estimator.telling
    n, (mean, of_base) = int(telling.sum()), (float(each[telling].mean().mean()) for each in (reference, base))
    freedom = _freedom(found, n)
    if found.estimator.freedom < n - 1:
        note = "; ".join(filter(None, (note, f"{found.estimator.freedom:.2g} degrees of freedom")))
    treated = mean_difference(np.array([mean + found.effect]), scale=abs(mean))  # 0, not what rounding leaves of it
    comparison = Comparison(n, treated, mean, freedom=freedom, note=note)
    return _tested(claim, comparison, of_base, estimate)


def _without_pair(claim: ClaimConfig, treated: pd.DataFrame, reference: pd.DataFrame) -> str:
    """Return why two levels have no pair of values: no run has the metric, or no seed has it on both sides."""
    anywhere = treated.notna().any(axis=None) or reference.notna().any(axis=None)
    return "no seed is left" if anywhere else f"no run of these levels has {claim.metric}"


def _lost(differences: pd.DataFrame) -> str:
    """Return which pairs of runs are missing from a table of seeds by combinations; an empty text if none is."""
    places = [
        f"seed {seed}" + (f" at {cell}" if cell else "")
        for cell, missing in differences.isna().items()
        for seed in differences.index[missing]
    ]
    return f"{len(places)} of {differences.size} pairs have no value on a side: {'; '.join(places)}" if places else ""


def claimed_range(claim: ClaimConfig) -> tuple[Amount, Amount]:
    """Return the range in which the true difference lies according to the claim.

    A share is one of the mean with which the claim compares. Of an interaction, the difference is the change of the
    metric; without a direction, the range is that of "higher".
    """
    if claim.kind in ("interaction", "mixed"):
        claim = _as_change(claim)
    if claim.kind == "equivalent":
        margin = amount_of(claim.margin)
        return -margin, margin
    least, most = map(amount_of, claim.size) if claim.size else (Amount(0.0), Amount(math.inf))
    return (least, most) if claim.kind in ("higher", "highest") else (-most, -least)
