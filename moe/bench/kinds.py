"""How often each kind of claim, the league and the analysis of variance find an effect where there is none."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from moe.analysis.power import SIGNIFICANCE
from moe.analysis.simultaneous import bonferroni
from moe.analysis.variance import tests_of_terms
from moe.analysis.within_seeds import estimator
from moe.bench.candidates import LEVELS, SEEDS, SPREADS, simulated
from moe.bench.timing import TimingTable

Values = Float[np.ndarray, "S n L"]
MARGIN = 3.0  # of a claim of equivalence, in standard deviations of a run
SLOWER = 10  # of so many studies, one has an analysis of variance


def kinds_table(studies: int) -> TimingTable:
    """Return the share of studies in which a test at 5 % errs, in each pattern of spreads."""
    rows = []
    for n in SEEDS:
        for spread in SPREADS:
            values = simulated(n, spread, studies).last
            row: dict[str, object] = {"seeds": n, "spread": spread}
            rows.append(row | {name: float(errs(values).mean()) for name, errs in KINDS.items()})
    return TimingTable(f"share of tests at 5 % that err, {studies} studies in each row", rows)


def t_values(
    values: Values, weights: list[float], *, of_differences: bool = False, without: int | None = None
) -> tuple[np.ndarray, float]:
    """Return Student's t of a weighted sum of levels in each study, and its degrees of freedom.

    of_differences: whether the values are already differences within seeds. without: a level of which the first seed
    has no run.
    """
    known = np.ones(values.shape[1:], dtype=bool)
    if without is not None:
        known[0, without] = False
    by, runs = estimator(known, np.array(weights), seed_effects=not of_differences), values[:, known]
    return runs @ by.of_runs / by.errors(runs), by.freedom


def _two_sided(
    weights: list[float], *, of_differences: bool = False, without: int | None = None
) -> Callable[[Values], Bool[np.ndarray, " S"]]:
    def errs(values: Values) -> Bool[np.ndarray, " S"]:
        t, freedom = t_values(values, weights, of_differences=of_differences, without=without)
        return 2 * stats.t.sf(np.abs(t), freedom) <= SIGNIFICANCE

    return errs


def _lowest(values: Values) -> Bool[np.ndarray, " S"]:
    """Return whether the last level is wrongly called the lowest, or wrongly not the lowest."""
    pairs = values[:, :, -1:] - values[:, :, :-1]
    p_lower = stats.ttest_1samp(pairs, 0, axis=1, alternative="less").pvalue
    holds, fails = 2 * p_lower.max(1), 2 * (LEVELS - 1) * (1 - p_lower).min(1)
    return np.minimum(holds, fails) <= SIGNIFICANCE


def _equivalent(values: Values) -> Bool[np.ndarray, " S"]:
    """Return whether two levels are wrongly called equivalent that differ by exactly the margin."""
    pairs = values[:, :, -1] - values[:, :, 0] + MARGIN
    above = stats.ttest_1samp(pairs, -MARGIN, axis=1, alternative="greater").pvalue
    below = stats.ttest_1samp(pairs, MARGIN, axis=1, alternative="less").pvalue
    return np.maximum(above, below) <= SIGNIFICANCE


def _together(first: int) -> Callable[[Values], Bool[np.ndarray, " S"]]:
    """Return whether any difference is found of the first levels, so many of them, to all that follow them."""
    one, other = np.triu_indices(LEVELS, 1)
    one, other = one[one < first], other[one < first]

    def errs(values: Values) -> Bool[np.ndarray, " S"]:
        pairs = values[:, :, other] - values[:, :, one]
        t = stats.ttest_1samp(pairs, 0, axis=1).statistic
        return np.abs(t).max(1) > bonferroni(len(one), values.shape[1])

    return errs


def _variance(values: Values) -> Bool[np.ndarray, " S"]:
    found = [next(tests_of_terms(study, [LEVELS]))[1]["p GG"] for study in values[::SLOWER]]
    return np.array(found) <= SIGNIFICANCE


REST = [0.0] * (LEVELS - 2)
KINDS: dict[str, Callable[[Values], Bool[np.ndarray, " S"]]] = {
    "higher": _two_sided([-1.0, *REST, 1.0]),
    "lowest": _lowest,
    "equivalent": _equivalent,
    "interaction": _two_sided([-1.0, 1.0, *REST[2:], -1.0, 1.0]),
    "higher, a run missing": lambda values: _two_sided([0.5, 0.5], of_differences=True, without=1)(
        values[:, :, -2:] - values[:, :, :2]
    ),
    "mixed, a run missing": _two_sided([-1.0, *REST, 1.0], without=LEVELS - 1),
    "league": _together(1),
    "ranks": _together(LEVELS - 1),
    "ANOVA": _variance,
}
