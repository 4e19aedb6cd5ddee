"""Differences of settings within seeds, and their standard errors by leaving out one seed at a time."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from moe.analysis.statistics import has_no_spread


class Estimator(NamedTuple):
    """How a weighted sum of settings is estimated from R runs, which are in the order of a table of seeds by settings.

    of_runs: weights of the runs in the estimate. changes: by how much they change if one of the n telling seeds is left
    out; NaN if the others cannot tell the sum. freedom: degrees of freedom of the standard error; NaN if changes are.
    telling: whether the estimate depends on the runs of a seed.
    """

    of_runs: Float[np.ndarray, " R"]
    changes: Float[np.ndarray, "n R"]
    freedom: float
    telling: Bool[np.ndarray, " N"]

    def errors(self, runs: Float[np.ndarray, "S R"]) -> Float[np.ndarray, " S"]:
        """Return the standard error of the estimate from each set of runs."""
        n = len(self.changes)
        return np.sqrt((n - 1) / n * ((runs @ self.changes.T) ** 2).sum(axis=-1))


class Contrast(NamedTuple):
    """An estimate. error: its standard error; 0 if all seeds tell the same, and NaN if one seed alone tells it."""

    effect: float
    error: float
    estimator: Estimator


def estimator(
    known: Bool[np.ndarray, "N C"],
    weights: Float[np.ndarray, " C"],
    *,
    seed_effects: bool = True,
    levels: Float[np.ndarray, " C"] | None = None,
) -> Estimator:
    """Return the estimator of a weighted sum of settings, in which each seed has an effect of its own on all its runs.

    known: which seed has a run of which setting. weights: of the settings; they sum to 0. seed_effects: False if the
    columns are already differences within seeds, whatever their weights sum to. levels: weights of the plain mean of
    each setting, which are added, as for a difference minus a share of a mean. By default 0.

    The estimate is that of least squares with an effect of each setting and each seed: the analysis of incomplete
    blocks within blocks (Searle, Casella and McCulloch 1992). Nothing is assumed of how the runs of a seed spread and
    depend on each other: the seeds are left out one at a time, and (n - 1) / n times the sum of the squared changes of
    the estimate is its variance. This is the cluster-robust estimate CR3 (Bell and McCaffrey 2002). The degrees of
    freedom are Satterthwaite's for runs that all spread alike. With all runs this is the paired t test, with n - 1.
    Raises ValueError if the seeds do not connect the settings.
    """
    seed, cell = np.nonzero(known)
    of_cell, of_seed = np.eye(known.shape[1])[cell], np.eye(len(known))[seed]
    within = of_cell
    if seed_effects:
        within = of_cell - of_seed @ (of_seed.T @ of_cell / np.maximum(known.sum(axis=1), 1)[:, None])

    def without(gone: int | None = None) -> Float[np.ndarray, " R"]:
        left = (seed != gone)[:, None]
        plain = 0.0 if levels is None else _least_squares(of_cell * left, levels)
        return _least_squares(within * left, weights) + plain

    of_runs = without()
    if np.isnan(of_runs).any():
        raise ValueError("the settings compared share no seed, not even through other settings")
    telling = of_seed.T @ np.abs(of_runs) > 1e-9
    changes = [of_runs - without(int(each)) for each in np.flatnonzero(telling)]
    products = np.array(changes) @ np.array(changes).T
    freedom = float(np.trace(products) ** 2 / (products**2).sum())
    return Estimator(of_runs, np.array(changes), round(freedom, 6), telling)


def contrast(
    values: Float[np.ndarray, "N C"],
    weights: Float[np.ndarray, " C"],
    *,
    seed_effects: bool = True,
    levels: Float[np.ndarray, " C"] | None = None,
    scale: float | None = None,
) -> Contrast:
    """Return the estimate of a weighted sum of settings from a row for each seed and a column for each setting.

    NaN is no run. seed_effects, levels: as in `estimator`. Raises ValueError as that does. Rounding neither makes an
    effect nor a spread: numbers are compared with `scale`, by default the largest of the values.
    """
    known = ~np.isnan(values)
    by, runs = estimator(known, weights, seed_effects=seed_effects, levels=levels), values[known]
    scale = float(np.abs(runs).max()) if scale is None else scale
    effect = float(by.of_runs @ runs)
    exact = has_no_spread((len(by.changes) - 1) * (by.changes @ runs), scale=scale)
    error = 0.0 if exact else float(by.errors(runs[None])[0])
    return Contrast(0.0 if abs(effect) <= 1e-12 * scale else effect, error, by)


def _least_squares(within: Float[np.ndarray, "R C"], weights: Float[np.ndarray, " C"]) -> Float[np.ndarray, " R"]:
    """Return the weights of runs in the estimate of a weighted sum of settings; NaN if the runs cannot tell it.

    within: 1 for the setting of a run and 0 elsewhere, without the mean over the runs of its seed.
    """
    of_runs = within @ np.linalg.pinv(within.T @ within, rcond=1e-9, hermitian=True) @ weights
    return of_runs if np.allclose(within.T @ of_runs, weights, atol=1e-8) else np.full(len(within), np.nan)
