"""The linear mixed model of claims of kind "mixed": a random effect of the seed, and one spread for all settings."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats
from scipy.optimize import minimize_scalar

from moe.analysis.statistics import has_no_spread


class Mixed(NamedTuple):
    """Means of the settings (cells) with the covariance of their estimates.

    freedom: degrees of freedom of the spread within seeds: runs - seeds - cells + 1. seeds: their number.
    """

    means: pd.Series
    covariance: Float[np.ndarray, "C C"]
    freedom: int
    seeds: int

    def contrast(self, weights: pd.Series) -> tuple[float, float]:
        """Return the weighted sum of means and its standard error; cells without a weight have weight 0."""
        w = weights.reindex(self.means.index).fillna(0.0).to_numpy()
        return float(w @ self.means.to_numpy()), math.sqrt(max(0.0, float(w @ self.covariance @ w)))


def mixed(values: pd.Series) -> Mixed:
    """Fit y = mean of the cell + effect of the seed + rest by restricted maximum likelihood (REML).

    values: one for each run, with the levels "cell" and "seed" in its index. Seeds need not have all cells. With all
    cells, the differences of cells and their errors are those of a two-way analysis of variance. The degrees of freedom
    are those of the containment method. Raises ValueError if nothing is left to estimate the spread from.
    """
    cells, cell = np.unique(values.index.get_level_values("cell").to_numpy(dtype=str), return_inverse=True)
    seeds, seed = np.unique(values.index.get_level_values("seed"), return_inverse=True)
    freedom = len(values) - len(seeds) - len(cells) + 1
    if freedom < 1:
        raise ValueError(f"{len(values)} runs of {len(cells)} settings and {len(seeds)} seeds leave no spread")
    y, design = values.to_numpy(dtype=float), np.eye(len(cells))[cell]
    center = y.mean()
    both = np.hstack([design, np.eye(len(seeds))[seed]])
    effects = np.linalg.lstsq(both, y, rcond=None)[0]
    if has_no_spread(y - both @ effects, scale=float(np.abs(y).max())):
        means = effects[: len(cells)] + effects[len(cells) :].mean()
        return Mixed(pd.Series(means, index=cells), np.zeros((len(cells), len(cells))), freedom, len(seeds))

    def solved(share: float) -> tuple[float, np.ndarray, np.ndarray]:
        return _least_squares(y - center, design, seed, share / (1 - share))

    best = minimize_scalar(lambda share: solved(share)[0], bounds=(0.0, 1 - 1e-9), method="bounded")
    _, means, covariance = min((solved(float(share)) for share in (0.0, best.x)), key=lambda found: found[0])
    return Mixed(pd.Series(means + center, index=cells), covariance, freedom, len(seeds))


def _least_squares(
    y: Float[np.ndarray, "N"], design: Float[np.ndarray, "N C"], seed: Int[np.ndarray, "N"], ratio: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return -2 log REML, the means and their covariance, if the seed's variance is `ratio` times that of the rest.

    The covariance of a seed's n runs, I + ratio 1 1', is whitened by taking a share 1 - 1 / sqrt(1 + n ratio) of the
    seed's mean from each of them.
    """
    counts = np.bincount(seed)
    theta = 1 - 1 / np.sqrt(1 + counts * ratio)

    def whitened(columns: np.ndarray) -> np.ndarray:
        means = np.zeros((len(counts), columns.shape[1]))
        np.add.at(means, seed, columns)
        return columns - (theta / counts)[seed, None] * means[seed]

    x, z = whitened(design), whitened(y[:, None])[:, 0]
    inverse = np.linalg.pinv(x.T @ x)
    means = inverse @ x.T @ z
    freedom = len(y) - x.shape[1]
    variance = float(((z - x @ means) ** 2).sum()) / freedom
    fit = freedom * math.log(variance) + np.log1p(counts * ratio).sum() + np.linalg.slogdet(x.T @ x)[1]
    return float(fit), means, variance * inverse


def range_p(effect: float, error: float, freedom: int, low: float, high: float) -> tuple[float, float]:
    """Return the p that the true effect is inside of two bounds (TOST), and the two-sided p that it is outside.

    These are those of `moe.analysis.statistics.range_test`, for any standard error. A bound may be infinite.
    """
    above, below = (effect - low) / error, (high - effect) / error
    inside = max(stats.t.sf(above, freedom), stats.t.sf(below, freedom))
    return float(inside), float(min(1, 2 * min(stats.t.sf(-above, freedom), stats.t.sf(-below, freedom))))
