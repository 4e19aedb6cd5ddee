"""Simultaneous intervals: of one difference at several times of training, and of many settings at once.

All intervals of a set contain their true values together in 95 % of cases, or with probability 1 - `level` where a
function has a level. An interval of Student's t only promises that for itself.
"""

import math

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from moe.analysis.power import SIGNIFICANCE
from moe.analysis.statistics import CONFIDENCE, has_no_spread

DRAWS = 2000


def interval(values: Float[np.ndarray, " N"], factor: float | None = None) -> tuple[float, float]:
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
    most = bonferroni(times, seeds)
    spread = differences.std(axis=0, ddof=1)
    if times < 2 or not (spread > 0).all():
        return most
    correlation = np.corrcoef(differences.T) * (1 - 1 / seeds) + np.eye(times) / seeds
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((DRAWS, seeds, times)) @ np.linalg.cholesky(correlation).T
    t = drawn.mean(axis=1) / drawn.std(axis=1, ddof=1) * math.sqrt(seeds)
    return min(most, float(np.quantile(np.abs(t).max(axis=1), CONFIDENCE)))


def to_reference(values: pd.DataFrame, reference: object, level: float = SIGNIFICANCE) -> pd.DataFrame:
    """Return each setting's difference from the reference, with intervals that hold together.

    values: a row for each seed and a column for each setting, without gaps.
    """
    differences = values.sub(values[reference], axis=0)
    difference, reach = differences.mean(), _reach(differences.to_numpy(dtype=float), values.shape[1] - 1, level)
    return pd.DataFrame({"difference": difference, "low": difference - reach, "high": difference + reach})


def ranks(values: pd.DataFrame, level: float = SIGNIFICANCE) -> pd.DataFrame:
    """Return the rank of each setting by its mean, and an interval; all these intervals hold together.

    values: as in `to_reference`. Two settings are told apart if the interval of their difference leaves out 0, among
    those of all pairs. The best rank of a setting is one more than the number of settings that are certainly lower (Al
    Mohamad et al., 1708.02428).
    """
    table, number = values.to_numpy(dtype=float), values.shape[1]
    pairs = table[:, :, None] - table[:, None, :]
    gaps, bound = pairs.mean(axis=0), np.nan_to_num(_reach(pairs, number * (number - 1) // 2, level), nan=math.inf)
    low, high = 1 + (gaps > bound).sum(axis=1), number - (gaps < -bound).sum(axis=1)
    rank = values.mean().rank(method="min").astype(int)
    return pd.DataFrame({"rank": rank, "best rank": low, "worst rank": high}, index=values.columns)


def _reach(differences: Float[np.ndarray, " N *M"], comparisons: int, level: float) -> Float[np.ndarray, "*M"]:
    """Return how far the intervals of so many comparisons reach, each by its spread; NaN for one seed or level 0."""
    seeds = len(differences)
    if seeds < 2 or not level:
        return np.full(differences.shape[1:], math.nan)
    return bonferroni(comparisons, seeds, level) * differences.std(axis=0, ddof=1) / math.sqrt(seeds)


def bonferroni(comparisons: int, seeds: int, level: float = SIGNIFICANCE) -> float:
    """Return the factor for the standard errors of so many means over n seeds that makes their intervals hold together.

    It holds for any spreads and correlations of the means.
    """
    return float(stats.t.isf(level / 2 / comparisons, seeds - 1))
