"""Simultaneous intervals: of one difference at several times of training, and of many settings at once.

All intervals of a set contain their true values together in 95 % of cases. An interval of Student's t only promises
that for itself.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats
from scipy.optimize import brentq

from moe.analysis.statistics import CONFIDENCE, has_no_spread

DRAWS = 2000


def interval(values: Float[np.ndarray, "N"], factor: float | None = None) -> tuple[float, float]:
    """Return mean -/+ factor times its standard error; the factor is by default that of a 95 % t interval.

    The ends are NaN if there are fewer than two values, or if they do not differ.
    """
    n = len(values)
    if n < 2 or has_no_spread(values, scale=float(np.abs(values).max())):
        return math.nan, math.nan
    factor = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) if factor is None else factor
    reach = factor * float(values.std(ddof=1)) / math.sqrt(n)
    return float(values.mean()) - reach, float(values.mean()) + reach


def over_time(differences: Float[np.ndarray, "N T"]) -> float:
    """Return the factor for the standard errors of T means over n seeds that makes their intervals hold together.

    It is the 95 % quantile of the largest |t| of T correlated means (max-t), found by drawing seeds from a
    normal distribution. Its correlations are those of the differences, moved by 1/n toward 0, because few seeds
    overestimate what they have in common. The factor is never above that of Bonferroni's correction.
    """
    seeds, times = differences.shape
    if seeds < 2:
        return math.nan
    most = float(stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / times, seeds - 1))
    spread = differences.std(axis=0, ddof=1)
    if times < 2 or not (spread > 0).all():
        return most
    correlation = np.corrcoef(differences.T) * (1 - 1 / seeds) + np.eye(times) / seeds
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((DRAWS, seeds, times)) @ np.linalg.cholesky(correlation).T
    t = drawn.mean(axis=1) / drawn.std(axis=1, ddof=1) * math.sqrt(seeds)
    return min(most, float(np.quantile(np.abs(t).max(axis=1), CONFIDENCE)))


class Block(NamedTuple):
    """Settings that every seed has: their means, and the spread that they share.

    spread: standard deviation of one run after the effects of seed and setting, pooled over the settings, with
    (n - 1)(m - 1) degrees of freedom.
    """

    means: pd.Series
    seeds: int
    spread: float
    freedom: int

    @property
    def error(self) -> float:
        """The standard error of the difference of two means."""
        return self.spread * math.sqrt(2 / self.seeds)


def block(values: pd.DataFrame) -> Block:
    """Return the two-way layout of values, a row for each seed and a column for each setting, without gaps.

    This is a mixed model with a random effect of the seed; settings have one spread.
    """
    table = values.to_numpy(dtype=float)
    seeds, settings = table.shape
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    freedom = (seeds - 1) * (settings - 1)
    spread = math.sqrt((rest**2).sum() / freedom) if freedom else math.nan
    return Block(values.mean(), seeds, spread, freedom)


def to_reference(layout: Block, reference: object) -> pd.DataFrame:
    """Return each setting's difference from the reference with simultaneous intervals (Dunnett 1955)."""
    factor = dunnett(len(layout.means) - 1, layout.freedom) if layout.freedom else math.nan
    difference = layout.means - layout.means[reference]
    reach = (factor * layout.error) * (difference.index != reference)
    return pd.DataFrame({"difference": difference, "low": difference - reach, "high": difference + reach})


@lru_cache
def dunnett(comparisons: int, freedom: int) -> float:
    """Return the 95 % quantile of the largest |t| of comparisons with one common reference of the same size.

    Each difference is Z_i - Z_0 over sqrt(2) S, so that for given Z_0 and S they are independent. The two integrals are
    sums over quantiles of Z_0 and of S.
    """
    quantiles = (np.arange(400) + 0.5) / 400
    common = stats.norm.ppf(quantiles)[:, None]
    spread = np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)[None, :]

    def covered(factor: float) -> float:
        reach = factor * math.sqrt(2) * spread
        inside = stats.norm.cdf(common + reach) - stats.norm.cdf(common - reach)
        return float((inside**comparisons).mean())

    return float(brentq(lambda factor: covered(factor) - CONFIDENCE, 1.0, 200.0))


@lru_cache
def tukey(settings: int, freedom: int) -> float:
    """Return the 95 % quantile of the largest |t| of all differences of so many means (studentized range / sqrt(2))."""
    return float(stats.studentized_range.ppf(CONFIDENCE, settings, freedom) / math.sqrt(2))


def ranks(layout: Block) -> pd.DataFrame:
    """Return the rank of each setting by its mean, and an interval; all intervals hold together in 95 % of cases.

    Two settings are told apart if their difference exceeds the quantile of the studentized range (Tukey). The best rank
    of a setting is one more than the number of settings that are certainly better (Al Mohamad et al., 1708.02428).
    """
    values = layout.means.to_numpy()
    bound = tukey(len(values), layout.freedom) * layout.error if layout.freedom else math.inf
    gaps = values[:, None] - values[None, :]
    low, high = 1 + (gaps > bound).sum(axis=1), len(values) - (gaps < -bound).sum(axis=1)
    rank = layout.means.rank(method="min").astype(int)
    return pd.DataFrame({"rank": rank, "best rank": low, "worst rank": high}, index=layout.means.index)
