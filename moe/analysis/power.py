"""How many seeds a test needs: the power of its t tests, at the level that a correction leaves.

Effects and bounds are in units of the spread: the standard error of a difference over n seeds, times the square root of
n. In a paired test this is the standard deviation of the paired differences.
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


class Freedom(NamedTuple):
    """Degrees of freedom of an estimated spread: so many `each` seed adds, less the `lost` ones."""

    each: int | float = 1
    lost: int | float = 1

    def at(self, n: int) -> int | float:
        """Return the degrees of freedom over n seeds; without a spread they are 0 or less."""
        return self.each * n - self.lost


PAIRED = Freedom()  # each comparison has a spread of its own, over its paired differences
UNPAIRED = Freedom(2, 2)  # two independent samples; the spread is sqrt(2) times that of a run


class Prediction(NamedTuple):
    """What a claim predicts, in units of the spread.

    low, high: the ends of the range in which every difference lies, which may be infinite. true: the difference that is
    assumed. tests: the number by which 5 % are divided. named, rivals: each of so many levels is compared with each of
    so many others, and the claim holds if every comparison holds. freedom: that of the spread of a single comparison;
    several comparisons have all runs.
    """

    low: float
    high: float
    true: float
    tests: int | float = 1
    named: int = 1
    rivals: int = 1
    freedom: Freedom = PAIRED

    @property
    def level(self) -> float:
        """The level of each one-sided test. The two tests of a range with two ends have the whole level each."""
        ends = math.isfinite(self.low) + math.isfinite(self.high)
        return SIGNIFICANCE / self.tests * ends / 2


def power(prediction: Prediction, n: int) -> float:
    """Return the probability that n seeds support a claim, if every true difference is the assumed one.

    Differences are normal. A single comparison is computed, with an error below 0.001. Several comparisons that share
    levels are simulated, always with the same random numbers; the standard error is at most 0.008. Returns 0 if n
    seeds have no spread.
    """
    df = prediction.freedom.at(n)
    if df <= 0:
        return 0.0
    if prediction.named * prediction.rivals > 1:
        return _simulated_power(prediction, n)
    reach = stats.t.isf(prediction.level, df) * _spreads(df)
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


@lru_cache(maxsize=256)
def _spreads(df: int | float) -> np.ndarray:
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
def detectable_effect(n: int, *, tests: int | float = 1, freedom: Freedom = PAIRED) -> float:
    """Return the smallest true difference that a two-sided t test finds with power 0.8; NaN if n seeds have no spread.

    It is in units of the spread; of a paired test, that of the paired differences (d_z). If the test is one of a family
    of `tests`, it must be significant after Holm's correction even if no other is: at 5 % / tests.
    """
    df = freedom.at(n)
    if df <= 0:
        return float("nan")
    critical = stats.t.ppf(1 - SIGNIFICANCE / tests / 2, df)

    def found(effect: float) -> float:
        shift = effect * math.sqrt(n)
        reach = critical * _spreads(df)
        return float((stats.norm.cdf(shift - reach) + stats.norm.cdf(-shift - reach)).mean())

    return float(brentq(lambda effect: found(effect) - POWER, 0.0, 10.0 * critical))


def seeds_needed(effect: float, *, tests: int | float = 1, freedom: Freedom = PAIRED, most: int = 1000) -> int | None:
    """Return how many seeds a two-sided t test needs to find an effect with power 0.8, at 5 % / `tests`.

    The effect is in units of the spread; of a paired test, that of the paired differences (d_z). Returns None if `most`
    seeds are not enough.
    """
    return seeds_for(Prediction(0.0, math.inf, abs(effect), tests, freedom=freedom), most=most)
