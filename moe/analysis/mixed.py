"""The linear mixed model of claims of kind "mixed": a random effect of the seed, and one spread for all settings."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from moe.analysis.power import Freedom
from moe.analysis.statistics import has_no_spread


class Mixed(NamedTuple):
    """Settings (cells): means over their runs, and effects with the covariance of their estimates.

    Effects are free of the seeds, and only their differences have a meaning. The means are not: with missing runs,
    cells differ in their seeds.

    projection: keeps those weights of a contrast that seeds with several cells can tell. runs: their number.
    freedom: degrees of freedom of the spread within seeds. seeds: the number of seeds with several cells.
    """

    means: pd.Series
    effects: pd.Series
    covariance: Float[np.ndarray, "C C"]
    projection: Float[np.ndarray, "C C"]
    runs: int
    freedom: int
    seeds: int

    @property
    def freedom_by_seeds(self) -> Freedom:
        """The degrees of freedom of any number of seeds, if further ones have as many cells as these on average."""
        lost = round(float(np.trace(self.projection)))
        return Freedom((self.freedom + lost) / self.seeds, lost)

    def contrast(self, weights: pd.Series) -> tuple[float, float]:
        """Return the weighted sum of effects and its standard error; cells without a weight have weight 0.

        Raises ValueError if the seeds do not connect the cells, so that the difference could be one of seeds.
        """
        w = weights.reindex(self.effects.index).fillna(0.0).to_numpy()
        if not np.allclose(self.projection @ w, w, atol=1e-8):
            raise ValueError("the settings compared share no seed, not even through other settings")
        return float(w @ self.effects.to_numpy()), math.sqrt(max(0.0, float(w @ self.covariance @ w)))


def mixed(values: pd.Series) -> Mixed:
    """Estimate y = mean of the cell + effect of the seed + rest within seeds.

    values: one for each run, with the levels "cell" and "seed" in its index. Seeds need not have all cells. Taking each
    seed's mean from its runs removes the effect of the seed, whatever its spread is. So t of a contrast has exactly
    Student's distribution, also if runs are missing: this is the analysis of incomplete blocks within blocks (Searle,
    Casella and McCulloch 1992). With all cells it is the two-way analysis of variance. Raises ValueError if a seed has
    two runs of a cell, or if nothing is left to estimate the spread from.
    """
    if not values.index.is_unique:
        raise ValueError(f"two runs have the same setting and seed: {values.index[values.index.duplicated()][0]}")
    cells, cell = np.unique(values.index.get_level_values("cell").to_numpy(dtype=str), return_inverse=True)
    seeds, seed = np.unique(values.index.get_level_values("seed"), return_inverse=True)
    of_cell, of_seed = np.eye(len(cells))[cell], np.eye(len(seeds))[seed]
    counts, data = of_seed.sum(axis=0), values.to_numpy(dtype=float)
    x, y = (_without_means(columns, of_seed) for columns in (of_cell, data))
    information = x.T @ x
    inverse = np.linalg.pinv(information, rcond=1e-9, hermitian=True)
    projection = information @ inverse
    freedom = len(y) - len(seeds) - round(float(np.trace(projection)))
    if freedom < 1:
        raise ValueError(f"{len(y)} runs of {len(cells)} settings and {len(seeds)} seeds leave no spread")
    effects = inverse @ x.T @ y
    rest = y - x @ effects
    exact = has_no_spread(rest, scale=float(np.abs(data).max()))
    variance = 0.0 if exact else float((rest**2).sum()) / freedom
    means, several = pd.Series(of_cell.T @ data / of_cell.sum(axis=0), cells), int((counts > 1).sum())
    return Mixed(means, pd.Series(effects, cells), variance * inverse, projection, len(y), freedom, several)


def _without_means(columns: np.ndarray, of_seed: np.ndarray) -> np.ndarray:
    """Return values without the mean of their seed. of_seed: a column for each seed, 1 for its runs and 0 elsewhere."""
    return columns - (of_seed / of_seed.sum(axis=0)) @ (of_seed.T @ columns)


def range_p(effect: float, error: float, freedom: int | float, low: float, high: float) -> tuple[float, float]:
    """Return the p that the true effect is inside of two bounds (TOST), and the two-sided p that it is outside.

    These are those of `moe.analysis.statistics.range_test`, for any standard error. A bound may be infinite.
    """
    above, below = (effect - low) / error, (high - effect) / error
    inside = max(stats.t.sf(above, freedom), stats.t.sf(below, freedom))
    return float(inside), float(min(1, 2 * min(stats.t.sf(-above, freedom), stats.t.sf(-below, freedom))))
