"""The power of a claim: how often so many seeds decide it, how many it needs, and the smallest effect that they show.

Effects and bounds are in units of the spread: the standard error of a difference over n seeds, times the square root of
n. In a paired test this is the standard deviation of the paired differences.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.optimize import brentq
from scipy.special import ndtr

SIGNIFICANCE = 0.05  # the largest corrected p that counts as significant
POWER = 0.8
GRID = 2_000  # values that stand for the distribution of an estimated spread
UNCERTAIN = 60  # values that stand for what the true spread may be
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
    assumed of every comparison. tests: the number by which 5 % are divided. named, rivals: each of so many levels is
    compared with each of so many others, and the claim holds if every comparison holds. freedom: that of the spread of
    each comparison. best: whether the claim fails only if one rival beats all named levels (kinds lowest and highest).
    known_by: degrees of freedom of the spread whose unit the other numbers have; infinite if it is the true spread.
    """

    low: float
    high: float
    true: float
    tests: int | float = 1
    named: int = 1
    rivals: int = 1
    freedom: Freedom = PAIRED
    best: bool = False
    known_by: float = math.inf

    @property
    def level(self) -> float:
        """The level of each one-sided test. The two tests of a range with two ends have the whole level each."""
        ends = math.isfinite(self.low) + math.isfinite(self.high)
        return SIGNIFICANCE / self.tests * ends / 2

    def deciding(self) -> "Prediction":
        """Return what decides the claim: itself, or that it fails, if the assumed difference is not in its range.

        It fails if one of its comparisons does, at the level divided by their number; of a claim about the best levels,
        if all of them lose against one rival, at the level divided by the number of rivals. As long as no more is known
        of the other comparisons, they are taken not to fail.
        """
        if self.low < self.true < self.high:
            return self
        beyond = max(self.low - self.true, self.true - self.high)
        losers, ways = (self.named, self.rivals) if self.best else (1, self.named * self.rivals)
        return Prediction(
            0.0, math.inf, beyond, self.tests * ways, losers, freedom=self.freedom, known_by=self.known_by
        )


def power(prediction: Prediction, n: int) -> float:
    """Return the probability that n seeds support a claim, if every true difference is the assumed one.

    Differences are normal. A single comparison is computed, with an error below 0.002. Several comparisons that share
    levels are simulated, always with the same random numbers; the standard error is at most 0.008. Returns 0 if n
    seeds have no spread. If the spread is an estimate, the result is the mean of the power over the true spreads that
    explain it, as in O'Hagan, Stevens and Campbell (2005) with the prior 1/spread: the "assurance".
    """
    p, df = prediction, prediction.freedom.at(n)
    if math.isfinite(p.known_by):
        exact = p._replace(known_by=math.inf)
        ratios, weights = _spreads(p.known_by, UNCERTAIN)  # estimated / true spread
        ends = zip(p.low * ratios, p.high * ratios, p.true * ratios, strict=True)
        found = [power(exact._replace(low=low, high=high, true=true), n) for low, high, true in ends]
        return float(weights @ np.array(found))
    if df <= 0:
        return 0.0
    critical = stats.t.isf(p.level, df)
    to_low, to_high = (math.sqrt(n) * (end - p.true) for end in (p.low, p.high))
    if p.named * p.rivals == 1:
        spreads, weights = _spreads(df)
        reach = critical * spreads
        return float(weights @ np.maximum(ndtr(to_high - reach) - ndtr(to_low + reach), 0))
    means, spreads = _studies(p.named, p.rivals, df)
    reach = critical * spreads
    return float(((means - reach > to_low) & (means + reach < to_high)).all(axis=(1, 2)).mean())


def seeds_for(prediction: Prediction, *, power_wanted: float = POWER, most: int = 1000) -> int | None:
    """Return the smallest number of seeds that supports a claim with this power; None if `most` are not enough."""
    if not prediction.low < prediction.true < prediction.high:  # also for NaN
        return None
    single = prediction._replace(named=1, rivals=1)
    least = _first(lambda n: power(single, n) >= power_wanted, 2, most)
    if least is None or prediction == single:
        return least
    return _first(lambda n: power(prediction, n) >= power_wanted, least, most)  # more comparisons need more seeds


@lru_cache
def detectable_effect(
    n: int,
    *,
    tests: int | float = 1,
    named: int = 1,
    rivals: int = 1,
    freedom: Freedom = PAIRED,
    known_by: float = math.inf,
    power_wanted: float = POWER,
) -> float:
    """Return the smallest true difference that n seeds find with this power; NaN if they have no spread.

    It is in units of the spread; of a paired test, that of the paired differences (d_z). If each of `named` levels is
    compared with each of `rivals`, it is the true difference of every comparison, and all must find it. A test that is
    one of a family of `tests` must be significant after Holm's correction even if no other is: at 5 % / tests.
    known_by: see `Prediction`.
    """
    if freedom.at(n) <= 0:
        return math.nan
    highest = 10 * float(stats.t.isf(SIGNIFICANCE / tests / 2, freedom.at(n)))
    claim = Prediction(0.0, math.inf, 0.0, tests, named, rivals, freedom, known_by=known_by)

    def excess(effect: float) -> float:
        return power(claim._replace(true=effect), n) - power_wanted

    while excess(highest) < 0:
        highest *= 2
    return float(brentq(excess, 0.0, highest))


def _first(holds: Callable[[int], bool], least: int, most: int) -> int | None:
    """Return the first number from `least` to `most` for which a rising condition holds."""
    below = least
    while not holds(min(least, most)):  # large numbers take long, so they are tried last
        if least >= most:
            return None
        below, least = least + 1, 2 * least
    return below + bisect_left(range(below, min(least, most)), True, key=holds)


@lru_cache(maxsize=256)
def _spreads(df: int | float, number: int = GRID) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Return values of an estimated standard deviation whose true value is 1, and their probabilities.

    The values are evenly spaced in the log, where the density is v^df exp(-df v^2 / 2) up to a factor. (scipy's
    noncentral t distribution fails for the large effects that few seeds need.)
    """
    width = 8 / math.sqrt(2 * df)
    logs = np.linspace(-width - 12 / df, math.log1p(width), number)
    weights = np.exp(df * (logs - np.expm1(2 * logs) / 2))
    return np.exp(logs), weights / weights.sum()


@lru_cache(maxsize=16)
def _studies(named: int, rivals: int, df: int | float) -> tuple[Float[np.ndarray, "R A B"], Float[np.ndarray, "R A B"]]:
    """Return simulated means and estimated spreads of each of `named` levels less each of `rivals`.

    The true spread is 1, and a mean is in units of its standard error. Each level of each seed has a deviation of its
    own, so that comparisons with a common level depend on each other. The sums of products of the deviations follow a
    Wishart distribution, which is drawn by its triangular factor (Bartlett 1933), whatever the number of seeds.
    """
    levels = named + rivals
    means, normal = _deviations(levels)
    factor, rng = normal.copy(), np.random.default_rng(1)
    for row in range(levels):
        factor[:, row, row] = np.sqrt(rng.chisquare(df - row if row < df else 1, SIMULATED))
        factor[:, row] *= row < df  # with fewer degrees of freedom than levels, it has fewer rows
    products = factor.transpose(0, 2, 1) @ factor / (2 * df)
    own = np.diagonal(products, axis1=1, axis2=2)
    variances = own[:, :named, None] + own[:, None, named:] - 2 * products[:, :named, named:]
    return means[:, :named, None] - means[:, None, named:], np.sqrt(np.maximum(variances, 0))


@lru_cache(maxsize=4)
def _deviations(levels: int) -> tuple[Float[np.ndarray, "R L"], Float[np.ndarray, "R L L"]]:
    """Return the random numbers of `_studies`: means of the levels, and the part above the diagonal of the factor."""
    rng = np.random.default_rng(0)
    means = rng.normal(scale=math.sqrt(0.5), size=(SIMULATED, levels))
    return means, np.triu(rng.normal(size=(SIMULATED, levels, levels)), 1)
