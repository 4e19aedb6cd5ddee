"""How many seeds each claim needs, given the difference that matters and the spread of runs."""

import math
from itertools import chain
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe.analysis.comparisons import compared, mean_compared_with, timed
from moe.analysis.estimates import NO_SPREAD, claimed_range
from moe.analysis.power import Prediction, detectable_effect, seeds_for
from moe.analysis.statistics import spread_interval
from moe.config.claim import ClaimConfig
from moe.config.effect import UNIT, Effect
from moe.metrics.catalog import span
from moe.planning.report_ahead import Ahead
from moe.results.comparable import not_poolable
from moe.results.conditions import conditions, varied_factors


class Spread(NamedTuple):
    """The spread of a claim's comparisons (`moe.analysis.power`), with its 95 % interval, and how it is known.

    mean: that of the metric (`moe.analysis.comparisons.mean_compared_with`); NaN if the spread is not known. Its value
    is then 1. source: in words. freedom: its degrees of freedom; infinite if it is exact, or not known. off: how far
    the difference may be off, because it is read between evaluations (`moe.analysis.estimates.widened`).
    """

    value: float
    low: float
    high: float
    mean: float
    source: str
    freedom: float = math.inf
    off: float = 0.0


class Need(NamedTuple):
    """How many seeds a claim needs.

    effect: the distance from the assumed true difference to the nearest bound of what the claim allows, in units of the
    metric. The bound of a claim without a range is 0; of a claim with a range, this is half its width. seeds: None if
    it is out of reach, or if that is unknown. low, high: for the ends of the interval of the spread; None is more than
    the most seeds that were allowed. tests: the number by which 5 % are divided. reason: why the number is unknown.
    within_reach: the smallest effect that the most seeds support, in units of the metric; NaN unless an effect of this
    size or more would bring the claim within reach.
    """

    claim: ClaimConfig
    tests: int
    spread: Spread
    effect: float
    seeds: int | None
    low: int | None
    high: int | None
    reason: str = ""
    within_reach: float = math.nan


NOT_GIVEN = """\
`effect` is for metrics of quality, so say which difference in {metric} matters: --effect {metric}=SIZE"""
TOO_FAR_APART = """\
{compared_with} is no larger than the {off:.2g} by which a difference may be off that is read between evaluations as \
far apart as in these runs, so no number of seeds would tell it; a smaller eval_every would help"""
TAKE_TURNS = "; the runs of a pilot do if they are trained one after another"
NOT_TOLD = Spread(1.0, math.nan, math.nan, math.nan, "no runs tell the spread")
NOT_IN_PLAN = "the plan lacks what the claim compares: {absent}"

DESIGNS = (["setting"], ["setting", "seed"])
WITHIN_SEEDS = "other settings, without the effect of the seed"
BETWEEN_SEEDS = "runs that differ in the seed alone, without pairs, so it is rather too large"


def spread_of(claim: ClaimConfig, runs: pd.DataFrame, evals: pd.DataFrame | None = None) -> Spread:
    """Return the spread of a claim in runs, such as those of a pilot; `NOT_TOLD` if they do not tell it.

    It comes from the comparisons that the claim makes, pooled over them. If the runs lack a level, it is derived from
    their other settings, after the effects of setting and seed, as if no other factor were averaged over. If they have
    a single setting, the runs of a seed count as if they had nothing in common. Then it is rather too large. evals: as
    in `moe.analysis.comparisons.compared`.
    """
    if claim.metric not in runs or not (mean := mean_compared_with(claim, runs)) < math.inf:
        return NOT_TOLD
    if timed(claim) and not_poolable(claim.metric, runs, timed=True):
        return NOT_TOLD  # these runs did not take turns, so their spread would be that of the machine's load
    found = compared(claim, runs, evals)
    if claim.at is not None and found.absent:
        return NOT_TOLD._replace(source="; ".join(found.absent))
    pairs = [pair for pair in chain(*found.pairs) if pair.n > 1]
    if pairs and all(pair.deterministic for pair in pairs):
        return NOT_TOLD._replace(mean=mean, source=NO_SPREAD)
    if spreads := [pair.spread for pair in pairs if not math.isnan(pair.spread)]:
        least = min(pairs, key=lambda pair: pair.freedom.at(pair.n))
        value = math.sqrt(float(np.mean(np.square(spreads))))
        df = least.freedom.at(least.n) * _independent(len(spreads), len(claim.levels))
        low, high = map(float, spread_interval(value, df))
        off = max(pair.off for pair in pairs)
        return Spread(value, low, high, mean, f"paired differences of {least.n} seeds", df, off)
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    groups = [members[["seed", claim.metric]].dropna() for _, members in conditions(runs, factors)]
    values = pd.concat(groups, keys=range(len(groups)), names=["setting"]).reset_index("setting")
    y = values[claim.metric].to_numpy(dtype=float)
    settings, seeds_too = (pd.get_dummies(values[[*names]].astype(str)).to_numpy(dtype=float) for names in DESIGNS)
    for design, source in ((seeds_too, WITHIN_SEEDS), (settings, BETWEEN_SEEDS)):
        effects, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
        if df := len(y) - int(rank):
            runs_compared = 4 if claim.kind == "interaction" else 2
            value = math.sqrt(runs_compared * float(((y - design @ effects) ** 2).sum()) / df)
            low, high = map(float, spread_interval(value, df))
            return Spread(value, low, high, mean, source, df)
    return NOT_TOLD


def _independent(pairs: int, levels: int) -> float:
    """Return how many independent comparisons tell a spread as well as all pairs of some levels with their rivals.

    The mean of the squared spreads is taken as a chi-square variable with the same mean and variance (Satterthwaite
    1946). Differences that share a level have the correlation 1/2, and so their squared spreads 1/4.
    """
    rivals = pairs / levels
    return 4 * pairs / (levels + rivals + 2) if rivals >= 1 else 1.0


def has_range(claim: ClaimConfig) -> bool:
    """Return whether a claim has a margin or a size, so that it says itself how large its difference is."""
    return claim.margin is not None or bool(claim.size)


def need(claim: ClaimConfig, ahead: Ahead, spread: Spread, effect: Effect | None, *, power: float, most: int) -> Need:
    """Return how many seeds a claim needs for this power, on average over the true spreads that the runs leave open.

    Of a claim with a range (a margin, or a size), the true difference is assumed to be the middle of the range, and the
    effect plays no part. ahead: what is known of the claim's test in the planned report. effect: None if nobody said
    which difference in this metric matters.
    """
    ranged = has_range(claim)
    in_spreads = effect is not None and effect.text.endswith(UNIT) and not ranged  # whatever the true spread is
    compared_with = "its range" if ranged else f"an effect of {effect.text}" if effect else "an effect"
    known_by = math.inf if in_spreads else spread.freedom
    tests, named, rivals = ahead.tests, len(claim.levels), ahead.rivals

    def least_effect() -> float:
        effect = detectable_effect(most, tests=tests, named=named, rivals=rivals, known_by=known_by, power_wanted=power)
        return spread.value * effect + spread.off

    unknown = ""
    if math.isnan(spread.mean) and not in_spreads:
        unknown = f"{compared_with} can be compared only with a spread, and no runs tell that of {claim.metric}"
        unknown += TAKE_TURNS if timed(claim) else ""
        unknown += f" ({spread.source})" if claim.at is not None and spread.source != NOT_TOLD.source else ""
    if not math.isnan(spread.mean) and math.isnan(spread.low):
        unknown = NO_SPREAD
    if absent := "; ".join(ahead.absent):
        spread = NOT_TOLD._replace(source=NOT_IN_PLAN.format(absent=absent))
    if reason := absent or unknown:
        return Need(claim, ahead.tests, spread, math.nan, None, None, None, reason)
    if effect is None and not ranged:
        reason = NOT_GIVEN.format(metric=claim.metric)
        return Need(claim, ahead.tests, spread, math.nan, None, None, None, reason, within_reach=least_effect())
    low, high = (end.at(spread.mean) for end in claimed_range(claim))
    effect_size = (high - low) / 2 if effect is None or ranged else effect.in_units(spread.mean, spread.value)
    if effect_size > (widest := span(claim.metric)):
        reason = f"{compared_with} is larger than {claim.metric} can change, which is {widest:g}"
        return Need(claim, ahead.tests, spread, effect_size, None, None, None, reason)

    if spread.off >= effect_size:
        reason = TOO_FAR_APART.format(compared_with=compared_with, off=spread.off)
        return Need(claim, ahead.tests, spread, effect_size, None, None, None, reason)

    def seeds(of_spread: float, known_by: float = math.inf) -> int | None:
        true = (low + high) / 2 if ranged else math.copysign(effect_size, -1 if math.isinf(low) else 1)
        ends = (low + spread.off) / of_spread, (high - spread.off) / of_spread, true / of_spread
        prediction = Prediction(*ends, tests, named, rivals, known_by=known_by)
        return seeds_for(prediction, power_wanted=power, most=most)

    least, most_seeds = (None if math.isnan(end) else seeds(end) for end in (spread.low, spread.high))
    wanted = seeds(spread.value, known_by)
    reach = least_effect() if wanted is None and not ranged else math.nan
    return Need(claim, ahead.tests, spread, effect_size, wanted, least, most_seeds, within_reach=reach)
