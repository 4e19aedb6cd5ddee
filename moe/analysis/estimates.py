"""Estimate how two levels of a factor differ, from the values of their runs, and test a claim about the difference."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from moe.analysis.power import PAIRED, SIGNIFICANCE, Freedom
from moe.analysis.statistics import CONFIDENCE, NOT_CLEAR, p_of_share
from moe.analysis.within_seeds import Contrast, contrast
from moe.config.claim import Amount, ClaimConfig, amount_of

NAN = float("nan")
ONE_SEED = "one seed tells no spread, so there is nothing to test the difference against"
ONE_SEED_CONNECTS = "without one of its seeds the others cannot tell the difference, so nothing can test it"
NO_WEIGHT = 1e-9  # of a run in an estimate, which rounding may give it
NO_SPREAD = "the difference is the same in every seed, so nothing tells how far chance could move it"

BETWEEN = "between evaluations"  # the estimates of a claim for which `TOO_FAR_APART` holds
TOO_FAR_APART = """\
the evaluations beside the common cost are too far apart to decide it, with any number of seeds; a smaller eval_every \
may"""

# The estimate of so many times a difference minus a share of the mean of the values with which it is compared
Estimate = Callable[[float, float], Contrast]


class Comparison(NamedTuple):
    """Comparison of one level with one reference level, over n seeds.

    low, high: the 95 % t interval of the difference of the two means.
    p_for, p_against: p-value of the test that the claim holds, and of the test that it does not hold.
    outside: the one-sided p-values of the tests that the difference lies below the claimed range, and above it.
    favor: how far inside the claimed range the difference lies; negative if it lies outside.
    spread: the standard error times the square root of n; with all runs, the standard deviation of the paired
    differences. freedom: its degrees of freedom, by the number of seeds.
    claimed_low, claimed_high: the ends of the claimed range, which may be infinite.
    deterministic: whether the difference is the same in every seed. It is then tested only against a share of a mean.
    note: a remark for the reader, such as a run that is missing.
    doubt: why the comparison is undecided, if it is.
    off: by how much the difference may be nearer to the end of the claimed range, or beyond it, because it is read
    between evaluations; see `widened`.
    runs: the folders of the runs on which the test depends.
    """

    n: int
    mean: float = NAN
    reference_mean: float = NAN
    low: float = NAN
    high: float = NAN
    p_for: float = NAN
    p_against: float = NAN
    outside: tuple[float, float] = (1.0, 1.0)
    favor: float = NAN
    spread: float = NAN
    freedom: Freedom = PAIRED
    claimed_low: float = NAN
    claimed_high: float = NAN
    deterministic: bool = False
    note: str = ""
    doubt: str = ""
    off: float = 0.0
    runs: frozenset[str] = frozenset()

    @property
    def difference(self) -> float:
        """The difference of the two means."""
        return self.mean - self.reference_mean


class Sides(NamedTuple):
    """The values of two levels: a row for each seed, and a column for each combination of other factors.

    base: the values of whose mean the claimed range may be a share; of an interaction, `treated` and `reference` are
    differences, and these are values of the metric itself. treated_runs, reference_runs: the folders of the
    runs, in the same places. alone: combinations that have one of the two levels in no seed.
    """

    treated: pd.DataFrame
    reference: pd.DataFrame
    base: pd.DataFrame
    treated_runs: pd.DataFrame
    reference_runs: pd.DataFrame
    alone: list[str]


def claimed_range(claim: ClaimConfig) -> tuple[Amount, Amount]:
    """Return the range in which the true difference lies according to the claim.

    A share is one of the mean with which the claim compares. Of an interaction, the difference is the change of the
    metric; without a direction, the range is that of "higher".
    """
    if claim.kind in ("interaction", "mixed"):
        claim = as_change(claim)
    if claim.kind == "equivalent":
        margin = amount_of(claim.margin)
        return -margin, margin
    least, most = map(amount_of, claim.size) if claim.size else (Amount(0.0), Amount(math.inf))
    return (least, most) if claim.kind in ("higher", "highest") else (-most, -least)


def as_change(claim: ClaimConfig) -> ClaimConfig:
    """Return what an interaction or a mixed claim says about a difference: above or below zero, or close to it."""
    return replace(claim, kind=(claim.direction or "higher") if claim.margin is None else "equivalent")


def of_pairs(claim: ClaimConfig, sides: Sides) -> Comparison:
    """Compare two levels by pairs of runs: the mean over combinations of the mean difference over their seeds."""
    treated, reference, base, treated_runs, reference_runs, alone = sides
    pairs = treated - reference
    kept, note = _judged(pairs.count(), "pair", pairs, alone)
    if kept.empty:
        return Comparison(0, note=note, doubt=_without_pair(claim, sides))
    pairs = pairs[kept]
    reference, base = (table[kept].where(pairs.notna()) for table in (reference, base))
    scale = float(np.nanmax(np.abs(base.to_numpy(dtype=float))))
    weights = np.full(len(kept), 1 / len(kept))

    @cache
    def estimate(times: float, share: float) -> Contrast:
        values = (times * pairs - share * base).to_numpy(dtype=float)
        return contrast(values, weights, seed_effects=False, scale=scale)

    used = [_used(each[kept], pairs.notna().to_numpy()) for each in (treated_runs, reference_runs)]
    return _estimated(claim, estimate, reference, base, note)._replace(runs=used[0] | used[1])


def widened(found: Comparison, *extremes: Comparison) -> Comparison:
    """Return a comparison that holds also if the true values are those of the extremes.

    Its interval contains theirs, and each of its tests has the largest p-value. So a claim about values that are read
    between two evaluations is decided only if every reading decides it alike.
    """
    if math.isnan(found.p_for):
        return found
    every = [found, *(each if each.p_for <= 1 else _untested(each) for each in extremes)]
    p_for, *outside = (max(column) for column in zip(*((each.p_for, *each.outside) for each in every), strict=True))
    apart = max(abs(each.difference - found.difference) for each in every)
    if not apart:
        return found
    note = f"read between evaluations, so that the difference may be off by {apart:.2g}"
    favors = [each.favor for each in every]
    off = found.favor - min(favors) if found.favor > 0 else max(favors) - found.favor
    places = {(each.difference < each.claimed_low, each.difference > each.claimed_high) for each in every}
    if len(places) > 1:  # below, in and above the range
        off = max(off, abs(found.favor))
    return found._replace(
        low=min(each.low for each in every),
        high=max(each.high for each in every),
        p_for=p_for,
        p_against=min(1.0, 2 * min(outside)),
        outside=(outside[0], outside[1]),
        note="; ".join(filter(None, (found.note, note))),
        spread=max((each.spread for each in every if not math.isnan(each.spread)), default=NAN),
        doubt=TOO_FAR_APART if len(places) > 1 else found.doubt,
        off=off,
    )


def _untested(found: Comparison) -> Comparison:
    """Return a comparison without a test, such as one without spread, as one that decides nothing."""
    return found._replace(low=found.difference, high=found.difference, p_for=1.0)


def in_all_runs(claim: ClaimConfig, sides: Sides, rest: list[pd.Series], rest_runs: list[pd.Series]) -> Comparison:
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
        return Comparison(0, note=note, doubt=_without_pair(claim, sides))
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
    treated, mean = (0.0 if abs(each) <= 1e-12 * abs(of_base) else each for each in (mean + found.effect, mean))
    comparison = Comparison(n, treated, mean, freedom=freedom, note=note)
    return _tested(claim, comparison, of_base, estimate)


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
    below, above = (float(stats.t.cdf(inward[end], freedom[end].at(found.n))) if end in ends else 1.0 for end in (0, 1))
    nearest = min(ends, key=inward.__getitem__)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, found.freedom.at(found.n)) * difference.error
    two_ends = len(ends) == 2
    return found._replace(
        low=difference.effect - reach,
        high=difference.effect + reach,
        p_for=max(of_share, float(inside if two_ends else min(1.0, 2 * inside))),
        p_against=min(1.0, 2 * min(below, above)),
        outside=(below, above),
        spread=tests[nearest].error * math.sqrt(found.n),
        freedom=freedom[nearest],
        deterministic=difference.error == 0,
        doubt=f"the difference is shown neither inside nor outside {low:.3g} ... {high:.3g}" if two_ends else "",
    )


def _freedom(found: Contrast, n: int) -> Freedom:
    """Return the degrees of freedom of an estimate from n seeds, as they grow with n."""
    df = found.estimator.freedom
    return PAIRED if math.isnan(df) else Freedom((df + 1) / n, 1)


def _judged(counts: pd.Series, unit: str, pairs: pd.DataFrame, alone: list[str]) -> tuple[pd.Index, str]:
    """Return the combinations of other factors in which a claim is judged, and a note of what they lack.

    counts: of what each combination has to compare, in words `unit`. One with a single such is left out if others have
    more, because one seed alone tells no spread. pairs: the differences. alone: see `Sides`.
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


def _used(folders: pd.DataFrame, uses: np.ndarray) -> frozenset[str]:
    """Return the folders in a table of seeds by settings, of those cells that a test uses."""
    sets = folders.to_numpy(dtype=object)[uses]
    return frozenset().union(*(each for each in sets if isinstance(each, frozenset)))


def _without_pair(claim: ClaimConfig, sides: Sides) -> str:
    """Return why two levels have no pair of values: no run has the metric, or no seed has it on both sides."""
    anywhere = any(table.notna().any(axis=None) for table in (sides.treated, sides.reference, sides.base))
    return "no seed is left" if anywhere else f"no run of these levels has {claim.metric}"


def _lost(differences: pd.DataFrame) -> str:
    """Return which pairs of runs are missing from a table of seeds by combinations; an empty text if none is."""
    places = [
        f"seed {seed}" + (f" at {cell}" if cell else "")
        for cell, missing in differences.isna().items()
        for seed in differences.index[missing]
    ]
    return f"{len(places)} of {differences.size} pairs have no value on a side: {'; '.join(places)}" if places else ""
