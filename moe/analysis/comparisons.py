"""What a planned claim compares: each level that it names with each rival, paired by seed. `claims.py` judges it."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from moe.analysis.equal_cost import FLOPS, SECONDS, NothingInCommonError, at_common_cost, metric_curves
from moe.analysis.power import PAIRED, Freedom
from moe.analysis.sentences import null_everywhere
from moe.analysis.statistics import CONFIDENCE, name_cell
from moe.analysis.within_seeds import Contrast, contrast, range_p
from moe.config.claim import DOMAIN, ClaimConfig, absolute
from moe.metrics.catalog import lookup
from moe.results.comparable import incomparable, is_timed, not_poolable
from moe.results.conditions import by_seed, conditions, levels, two_levels, varied_factors
from moe.results.table import level

NAN = float("nan")
COST_COLUMNS = {"flops": FLOPS, "seconds": SECONDS}  # by the value of a claim's key `at`


class Comparison(NamedTuple):
    """Comparison of one level with one reference level, over n seeds.

    low, high: the 95 % t interval of the difference of the two means.
    p_for, p_against: p-value of the test that the claim holds, and of the test that it does not hold.
    favor: how far inside the claimed range the difference lies; negative if it lies outside.
    spread: the standard error times the square root of n; with all runs, the standard deviation of the paired
    differences. freedom: its degrees of freedom, by the number of seeds.
    claimed_low, claimed_high: the ends of the claimed range, which may be infinite.
    deterministic: whether the difference is the same in every seed. Both p-values are then 0 or 1.
    note: a remark for the reader, such as a run that is missing.
    doubt: why the comparison is undecided, if it is.
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


class Compared(NamedTuple):
    """The comparisons that a claim makes.

    pairs: for each of the levels `named`, a comparison with each of `rivals`. absent: what the runs lack for it; if
    they lack anything, there are no pairs.
    """

    named: list[Any]
    rivals: list[Any]
    pairs: list[list[Comparison]]
    absent: list[str]


def compared(claim: ClaimConfig, runs: pd.DataFrame, evals: pd.DataFrame | None = None) -> Compared:
    """Return what a claim compares. An interaction without a direction is taken to be "higher".

    evals: the evaluations of the runs, for a claim at equal cost; by default they are read from the run folders.
    """
    runs = _selected(claim, runs)
    present = levels(runs[claim.factor]) if claim.factor in runs else []
    named = [level(each) for each in claim.levels]
    rivals = [level(each) for each in claim.than] or [each for each in present if each not in named]
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
    except NothingInCommonError as error:
        return Compared(named, rivals, [], [str(error)])


def _pairs(claim: ClaimConfig, runs: pd.DataFrame, named: list[Any], rivals: list[Any]) -> list[list[Comparison]]:
    """Compare each of the levels `named` with each of `rivals`."""
    if claim.kind == "interaction":
        claim, runs = _of_changes(claim, runs, rivals), _changes(claim, runs)
    else:
        runs = _with_mean_of_domains(claim, runs)
    others = _others(claim, runs)
    return [[_compare(claim, runs, others, a, b) for b in rivals] for a in named]


def _pairs_at_cost(
    claim: ClaimConfig, runs: pd.DataFrame, named: list[Any], rivals: list[Any], evals: pd.DataFrame | None
) -> list[list[Comparison]]:
    """Compare as `_pairs` does, at each combination of other factors at a cost that both sides have reached.

    A mixed model compares all levels at once, so these share it. Raises NothingInCommonError if a combination has none.
    """
    curves = metric_curves(runs, _metrics(claim), COST_COLUMNS[claim.at or ""], evals)
    if claim.kind == "mixed":
        return _pairs(claim, at_common_cost(runs, _others(claim, runs), curves), named, rivals)
    runs = runs[runs[claim.factor].isin([*named, *rivals])]
    others = _others(claim, runs)

    def pair(a: Any, b: Any) -> Comparison:
        both = at_common_cost(two_levels(runs, claim.factor, (a, b), others), others, curves)
        [[found]] = _pairs(claim, both, [a], [b])
        return found

    return [[pair(a, b) for b in rivals] for a in named]


def timed(claim: ClaimConfig) -> bool:
    """Return whether a claim is about a time or a speed."""
    return claim.at == "seconds" or is_timed(claim.metric)


def _others(claim: ClaimConfig, runs: pd.DataFrame) -> list[str]:
    return [factor for factor in varied_factors(runs) if factor not in (claim.factor, "seed")]


def _tested(claim: ClaimConfig, found: Comparison, effect: float, error: float) -> Comparison:
    """Complete a comparison by what its tests say of an effect with this standard error; NaN: it has none."""
    low, high = claimed_range(claim, found.reference_mean)
    favor = min(effect - low, high - effect)
    found = found._replace(favor=favor, claimed_low=low, claimed_high=high)
    if math.isnan(error):
        return found._replace(doubt="one seed alone tells the difference: nothing to test it against")
    if error == 0:
        return found._replace(p_for=float(favor <= 0), p_against=float(favor > 0), deterministic=True)
    freedom = found.freedom.at(found.n)
    inside, outside = range_p(effect, error, freedom, low, high)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * error
    two_ends = math.isfinite(low) and math.isfinite(high)
    return found._replace(
        low=effect - reach,
        high=effect + reach,
        p_for=inside if two_ends else min(1.0, 2 * inside),
        p_against=outside,
        spread=error * math.sqrt(found.n),
        doubt=f"the interval is neither inside nor outside {low:.3g} ... {high:.3g}" if two_ends else "",
    )


def _of_changes(claim: ClaimConfig, runs: pd.DataFrame, rivals: list[Any]) -> ClaimConfig:
    """Return what an interaction claims about the change of the metric: above or below zero, or close to it."""
    first = _at_first_level(claim, runs)
    return _as_change(claim, first.loc[first[claim.factor].isin(rivals), claim.metric].mean())


def _as_change(claim: ClaimConfig, reference: float) -> ClaimConfig:
    if claim.margin is None:
        return replace(claim, kind=claim.direction or "higher")
    return replace(claim, kind="equivalent", margin=absolute(claim.margin, reference))


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
    """
    first, factor = _at_first_level(claim, runs), claim.moderator
    if factor == DOMAIN:
        return first.assign(**{claim.metric: runs[_metrics(claim)[1]] - first[claim.metric]})
    second = _with_mean_of_domains(claim, runs[runs[factor] == level(claim.within[factor][1])])
    keys = list(dict.fromkeys([claim.factor, "seed", *varied_factors(first), *varied_factors(second)]))
    pairs = first.merge(second[[*keys, claim.metric]], on=keys, suffixes=("", " at the second level"))
    return pairs.assign(**{claim.metric: pairs.pop(f"{claim.metric} at the second level") - pairs[claim.metric]})


def _compare(claim: ClaimConfig, runs: pd.DataFrame, others: list[str], treated: Any, reference: Any) -> Comparison:
    """Compare two levels: the mean difference within seeds, over all combinations of the other factors that have both.

    In a mixed model the runs at the other levels count too: where a run is missing, they tell how the seeds differ.
    """
    sides: dict[str, pd.DataFrame] = {}
    alone: list[str] = []
    for cell, members in conditions(two_levels(runs, claim.factor, (treated, reference), others), others):
        both = [members[members[claim.factor] == side] for side in (treated, reference)]
        if all(map(len, both)):
            names = (f"{claim.factor}={treated}", f"{claim.factor}={reference}")
            if reason := incomparable(claim.metric, *both, timed=timed(claim), names=names):
                return Comparison(0, doubt=reason)
            a, b = (by_seed(rows, claim.metric) for rows in both)
            sides[name_cell(cell)] = pd.DataFrame({"treated": a, "reference": b})
        else:
            alone.append(name_cell(cell))
    if not sides:
        return Comparison(0, doubt=f"no runs differ in {claim.factor} alone")
    table = pd.concat(sides, axis=1)  # a row for each seed; NaN where a run is missing
    both_sides = table.xs("treated", axis=1, level=1), table.xs("reference", axis=1, level=1)
    if claim.kind != "mixed":
        return _of_pairs(claim, *both_sides, alone)
    if reason := not_poolable(claim.metric, runs, timed=timed(claim)):
        return Comparison(0, doubt=reason)
    cells = conditions(runs[~runs[claim.factor].isin([treated, reference])], [claim.factor, *others])
    rest = pd.DataFrame({name_cell(cell): by_seed(members, claim.metric) for cell, members in cells})
    number = int(pd.concat([table, rest], axis=1).count().sum())
    return _in_all_runs(claim, *both_sides, rest, f"mixed model of {number} runs")


def _of_pairs(claim: ClaimConfig, treated: pd.DataFrame, reference: pd.DataFrame, alone: list[str]) -> Comparison:
    """Compare two levels by pairs of runs: the mean over combinations of the mean difference over their seeds.

    A row for each seed and a column for each combination of other factors, as in `_in_all_runs`. A combination with a
    single pair is left out if others have more. alone: combinations that have one of the two levels in no seed.
    """
    pairs = treated - reference
    counts = pairs.count()
    kept = counts >= min(2, counts.max())
    if not counts.any():
        return Comparison(0, note=_lost(pairs), doubt="no seed is left")
    left_out = [f"{cell}: a level has no run" for cell in alone]
    left_out += [f"{cell}: {'one pair' if counts[cell] else 'no pair'}" for cell in counts.index[~kept]]
    note = "; ".join(filter(None, (f"left out: {'; '.join(left_out)}" if left_out else "", _lost(pairs.loc[:, kept]))))
    values = pairs.loc[:, kept].to_numpy(dtype=float)
    compared_with = reference.loc[:, kept].where(pairs.loc[:, kept].notna())
    scale = float(np.nanmax(np.abs(compared_with.to_numpy(dtype=float))))
    found = contrast(values, np.full(kept.sum(), 1 / kept.sum()), seed_effects=False, scale=scale)
    return _estimated(claim, found, pairs.index, compared_with, note)


def _in_all_runs(
    claim: ClaimConfig, treated: pd.DataFrame, reference: pd.DataFrame, rest: pd.DataFrame, note: str
) -> Comparison:
    """Compare the values of two levels, a row for each seed and a column for each combination of other factors.

    rest: values of other settings, which tell how the seeds differ.
    """
    known = treated.notna().any() & reference.notna().any()
    treated, reference = treated.loc[:, known], reference.loc[:, known]
    if not known.any():
        return Comparison(0, note=note, doubt="no seed is left")
    values = pd.concat([treated, reference, rest], axis=1)
    weights = np.repeat([1 / known.sum(), -1 / known.sum(), 0.0], [known.sum(), known.sum(), rest.shape[1]])
    try:
        found = contrast(values.to_numpy(dtype=float), weights)
    except ValueError as error:
        return Comparison(0, note=note, doubt=str(error))
    return _estimated(claim, found, values.index, reference, note)


def _estimated(claim: ClaimConfig, found: Contrast, seeds: pd.Index, reference: pd.DataFrame, note: str) -> Comparison:
    """Return a comparison from its estimate. seeds: those of the rows from which it comes."""
    telling, df = found.estimator.telling, found.estimator.freedom
    n, mean = int(telling.sum()), float(reference.reindex(seeds[telling]).mean().mean())
    freedom = PAIRED if math.isnan(df) else Freedom((df + 1) / n, 1)
    if df < n - 1:
        note = "; ".join(filter(None, (note, f"{df:.2g} degrees of freedom")))
    comparison = Comparison(n, mean + found.effect, mean, freedom=freedom, note=note)
    return _tested(claim, comparison, found.effect, found.error)


def _lost(differences: pd.DataFrame) -> str:
    """Return which pairs of runs are missing from a table of seeds by combinations; an empty text if none is."""
    places = [
        f"seed {seed}" + (f" at {cell}" if cell else "")
        for cell, missing in differences.isna().items()
        for seed in differences.index[missing]
    ]
    return f"{len(places)} of {differences.size} pairs have no value on a side: {'; '.join(places)}" if places else ""


def claimed_range(claim: ClaimConfig, reference: float) -> tuple[float, float]:
    """Return the range in which the true difference lies according to the claim.

    reference: the mean of the metric, of which a size or a margin may be a share. Of an interaction, the difference is
    the change of the metric; without a direction, the range is that of "higher".
    """
    if claim.kind in ("interaction", "mixed"):
        claim = _as_change(claim, reference)
    if claim.kind == "equivalent":
        margin = absolute(claim.margin, reference)
        return -margin, margin
    least, most = [absolute(amount, reference) for amount in claim.size] or (0.0, math.inf)
    return (least, most) if claim.kind in ("higher", "highest") else (-most, -least)
