"""Reference routers as limits: the share of the distance from random to oracle routing that a router covers."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from moe.analysis.statistics import CONFIDENCE

RANDOM, ORACLE = "balanced_random", "oracle"


class Share(NamedTuple):
    """The share, and its 95 % interval; the ends are NaN if the data do not bound the share."""

    value: float
    low: float
    high: float
    clear: bool  # whether the distance itself is clear from zero


def covered(arm: Float[np.ndarray, " N"], random: Float[np.ndarray, " N"], oracle: Float[np.ndarray, " N"]) -> Share:
    """Return (random - arm) / (random - oracle) of losses by seed, with Fieller's interval (1954).

    The interval holds every share s at which random - arm - s (random - oracle) is not different from zero in a paired
    t test. If the distance random - oracle is itself not different from zero, these s have no bound on at least one
    side, and the ends are NaN. A share may be below 0, which is worse than random, and above 1.
    """
    gained, distance = random - arm, random - oracle
    seeds = len(arm)
    if seeds < 2:
        return Share(_ratio(gained.mean(), distance.mean()) if seeds else math.nan, math.nan, math.nan, False)
    factor = float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) ** 2 / seeds
    covariance = np.cov(gained, distance, ddof=1) * factor
    # (g - s d)^2 <= var(g) - 2 s cov + s^2 var(d) is a s^2 - 2 b s + c <= 0
    a = distance.mean() ** 2 - covariance[1, 1]
    b = gained.mean() * distance.mean() - covariance[0, 1]
    c = gained.mean() ** 2 - covariance[0, 0]
    value = _ratio(gained.mean(), distance.mean())
    if a <= 0:
        return Share(value, math.nan, math.nan, False)
    root = math.sqrt(max(0.0, b * b - a * c))
    return Share(value, (b - root) / a, (b + root) / a, True)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else math.nan
