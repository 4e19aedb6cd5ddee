"""How many seeds a test needs: the power of t tests of paired differences, at the level that a correction leaves.

Effects and bounds are in standard deviations of the paired differences.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq

SIGNIFICANCE = 0.05  # the largest corrected p that counts as significant
POWER = 0.8
GRID = 10_000  # values of equal probability that stand for the distribution of an estimated spread
SIMULATED = 4_000  # studies from which the power of several comparisons together is estimated


class Prediction(NamedTuple):
    """What a claim predicts, in standard deviations of the paired differences.

    low, high: the ends of the range in which every difference lies, which may be infinite. true: the difference that is
    assumed. tests: the number by which 5 % are divided. named, rivals: each of so many levels is compared with each of
    so many others, and the claim holds if every comparison holds.
    """

    low: float
    high: float
    true: float
    tests: int | float = 1
    named: int = 1
    rivals: int = 1

    @property
    def level(self) -> float:
        """The level of each one-sided test. The two tests of a range with two ends have the whole level each."""
        ends = math.isfinite(self.low) + math.isfinite(self.high)
        return SIGNIFICANCE / self.tests * ends / 2


def power(prediction: Prediction, n: int) -> float:
    """Return the probability that n seeds support a claim, if every true difference is the assumed one.

    Differences are normal. A single comparison is computed, with an error below 0.001. Several comparisons that share
    levels are simulated, always with the same random numbers; the standard error is at most 0.008. Returns 0 below two
    seeds.
    """
    if n < 2:
        return 0.0
    if prediction.named * prediction.rivals > 1:
        return _simulated_power(prediction, n)
    reach = stats.t.isf(prediction.level, n - 1) * _spreads(n - 1)
    to_low, to_high = (math.sqrt(n) * (end - prediction.true) for end in (prediction.low, prediction.high))
    return float(np.maximum(stats.norm.cdf(to_high - reach) - stats.norm.cdf(to_low + reach), 0).mean())


def seeds_for(prediction: Prediction, *, power_wanted: float = POWER, most: int = 1000) -> int | None:
    """Return the smallest number of seeds that supports a claim with this power; None if `most` are not enough."""
    if not prediction.low < prediction.true < prediction.high:  # also for NaN
        return None
    single = prediction._replace(named=1, rivals=1)
    least = _first(lambda n: power(single, n) >= power_wanted, 2, most)
    if least is None or prediction == single:
        return least
    return _first(lambda n: power(prediction, n) >= power_wanted, least, most)  # more comparisons need more seeds


def _first(holds: Callable[[int], bool], least: int, most: int) -> int | None:
    """Return the first number from `least` to `most` for which a rising condition holds."""
    below = least
    while not holds(min(least, most)):  # large numbers take long, so they are tried last
        if least >= most:
            return None
        below, least = least + 1, 2 * least
    return below + bisect_left(range(below, min(least, most)), True, key=holds)


@lru_cache(maxsize=64)
def _spreads(df: int) -> np.ndarray:
    """Return values of equal probability of an estimated standard deviation whose true value is 1.

    (scipy's noncentral t distribution fails for the large effects that few seeds need.)
    """
    return np.sqrt(stats.chi2.ppf((np.arange(GRID) + 0.5) / GRID, df) / df)


def _simulated_power(prediction: Prediction, n: int) -> float:
    """Return the share of simulated studies of n seeds in which every comparison holds.

    Each level of each seed has a deviation of its own, so that comparisons with a common level depend on each other.
    """
    p, rng = prediction, np.random.default_rng(0)
    held, part = [], max(1, 2_000_000 // (n * (p.named + p.rivals)))
    for start in range(0, SIMULATED, part):
        levels = rng.normal(scale=math.sqrt(0.5), size=(min(part, SIMULATED - start), n, p.named + p.rivals))
        pairs = p.true + levels[:, :, : p.named, None] - levels[:, :, None, p.named :]
        mean, reach = pairs.mean(1), stats.t.isf(p.level, n - 1) * pairs.std(1, ddof=1) / math.sqrt(n)
        held.append(((mean - reach > p.low) & (mean + reach < p.high)).all((1, 2)))
    return float(np.concatenate(held).mean())


@lru_cache
def detectable_effect(n: int, *, tests: int | float = 1, paired: bool = True) -> float:
    """Return the smallest true difference that a two-sided t test finds with power 0.8; NaN below two seeds.

    A paired test has n pairs, and the result is in standard deviations of the paired differences (d_z). An unpaired
    test has n seeds on each side, and the result is in standard deviations of a single run. If the test is one of a
    family of `tests`, it must be significant after Holm's correction even if no other is: at 5 % / tests.
    """
    if n < 2:
        return float("nan")
    df, information = (n - 1, n) if paired else (2 * n - 2, n / 2)
    critical = stats.t.ppf(1 - SIGNIFICANCE / tests / 2, df)

    def found(effect: float) -> float:
        shift = effect * math.sqrt(information)
        reach = critical * _spreads(df)
        return float((stats.norm.cdf(shift - reach) + stats.norm.cdf(-shift - reach)).mean())

    return float(brentq(lambda effect: found(effect) - POWER, 0.0, 10.0 * critical))


def seeds_needed(effect: float, *, tests: int | float = 1, most: int = 1000) -> int | None:
    """Return how many seeds a paired two-sided t test needs to find an effect with power 0.8, at 5 % / `tests`.

    The effect is in standard deviations of the paired differences (d_z). Returns None if `most` seeds are not enough.
    """
    return seeds_for(Prediction(0.0, math.inf, abs(effect), tests), most=most)
