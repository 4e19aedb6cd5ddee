"""Power and type I error of ways to test the contrasts of one family, and of rules for adding seeds, by simulation.

A seed has an offset that all its runs share, with standard deviation 5, and each run a deviation of its own.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from moe.analysis.looks import share_of_look
from moe.analysis.power import SIGNIFICANCE, detectable_effect
from moe.bench.timing import TimingTable

LEVELS = 8  # the first of which is the reference of the others
OFFSET = 5.0  # standard deviation of the seeds' common offset
SEEDS = (3, 5, 8)

# How a run deviates from its setting and its seed: the median of these studies, and the mean for the bias. A test
# computes these numbers from the tables in docs/studies.
SPREADS_FROM = (
    *("capacity_factorial", "experiment_a", "experiment_c", "noise_lb_seed", "spectra_ablation"),
    *("temperature_ablation", "temperature_schedules"),
)
TEXT_SHARE = 0.44  # share of the variance of a run that is due to the validation text, and differs from run to run
TEXT_BIAS = 0.06  # how far the text moves a level in all runs alike, in standard deviations of a run
# Covariance of the deviations at the last evaluation, at the one before and at the third last.
EVALUATIONS = np.array([[1.0, 0.94, 0.47], [0.94, 1.25, 0.61], [0.47, 0.61, 0.92]])
TIMES = 4  # as much validation text

# The standard deviation of the runs at each level, and how far each seed shifts the last level on its own.
SPREADS: dict[str, tuple[np.ndarray, float]] = {
    "equal": (np.ones(LEVELS), 0.0),
    "one level x2": (np.array([*[1.0] * (LEVELS - 1), 2.0]), 0.0),
    "one level x4": (np.array([*[1.0] * (LEVELS - 1), 4.0]), 0.0),
    "interaction": (np.ones(LEVELS), 3.0),
}


class Values(NamedTuple):
    """Losses of simulated studies, (studies, n, LEVELS); the first level is the reference.

    last: at the last evaluation. more_text: the same on `TIMES` as much validation text. last_three: the mean of the
    last three evaluations.
    """

    last: np.ndarray
    more_text: np.ndarray
    last_three: np.ndarray

    def moved(self, shifts: np.ndarray, *, of_text: bool = False) -> "Values":
        """Return the values with a shift of each level; if it is one of the text, more text has less of it."""
        less = TIMES**-0.5 if of_text else 1.0
        return Values(self.last + shifts, self.more_text + less * shifts, self.last_three + shifts)


def variance_table(studies: int) -> TimingTable:
    """Return power and type I error of ways to test a contrast at 5 % by itself, in each pattern of spreads.

    error: of the contrast of the level whose spread is named with the reference. error in a family: the share of
    studies in which any of all contrasts is significant after Holm's correction. error on other text: as error, if the
    validation text favors some levels by chance. power: of a contrast of two levels with the usual spread, at an effect
    that the paired test of the last evaluation finds with power 0.8, and which is the same at each evaluation.
    """
    rows = []
    for n in SEEDS:
        effect = np.zeros(LEVELS)
        effect[1] = detectable_effect(n) * math.sqrt(2)
        for spread in SPREADS:
            values = simulated(n, spread, studies)
            bias = TEXT_BIAS * np.random.default_rng(0).normal(size=(studies, 1, LEVELS))
            cases = values, values.moved(bias, of_text=True), values.moved(effect)
            for name, test in TESTS.items():
                p, p_biased, p_shifted = (test(each) for each in cases)
                rows.append(
                    {
                        "seeds": n,
                        "spread": spread,
                        "test": name,
                        "error": float((p[:, -1] <= SIGNIFICANCE).mean()),
                        "error in a family": float((p.min(1) <= SIGNIFICANCE / p.shape[1]).mean()),
                        "error on other text": float((p_biased[:, -1] <= SIGNIFICANCE).mean()),
                        "power": float((p_shifted[:, 0] <= SIGNIFICANCE).mean()),
                    }
                )
    return TimingTable(f"ways to test the {LEVELS - 1} contrasts of a family, {studies} studies in each row", rows)


def simulated(n: int, spread: str, studies: int) -> Values:
    """Return the values of studies of n seeds, without an effect and without a shift of the text."""
    rng, (stds, slope) = np.random.default_rng(n), SPREADS[spread]
    runs = rng.normal(size=(studies, n, LEVELS))
    common = OFFSET * rng.normal(size=(studies, n, 1)) + np.zeros(LEVELS)
    common[:, :, -1] += slope * rng.normal(size=(studies, n))
    text = TEXT_SHARE * runs + math.sqrt(TEXT_SHARE * (1 - TEXT_SHARE)) * rng.normal(size=runs.shape)  # a part of runs
    earlier = np.linalg.cholesky(EVALUATIONS) @ np.stack([runs, *rng.normal(size=(2, *runs.shape))]).reshape(3, -1)
    deviations = runs, runs - (1 - TIMES**-0.5) * text, earlier.mean(0).reshape(runs.shape)
    return Values(*(common + stds * each for each in deviations))


def paired(values: np.ndarray) -> np.ndarray:
    """Return the two-sided p of the paired t test of each contrast, (studies, contrasts)."""
    return np.asarray(stats.ttest_1samp(_differences(values), 0, axis=1).pvalue)


def unpaired(values: np.ndarray) -> np.ndarray:
    """Return the two-sided p of Welch's test of each contrast, (studies, contrasts)."""
    return np.asarray(stats.ttest_ind(values[:, :, 1:], values[:, :, :1], axis=1, equal_var=False).pvalue)


def moderated(values: np.ndarray) -> np.ndarray:
    """Return the two-sided p of the moderated t test of each contrast (Smyth 2004), (studies, contrasts).

    The variances of the contrasts of one study are shrunk towards a common one. Its value and its weight, which is a
    number of degrees of freedom, are estimated from the mean and the variance of their logarithms.
    """
    differences = _differences(values)
    n = differences.shape[1]
    df, variance = n - 1, differences.var(1, ddof=1)
    logs = np.log(variance) - special.digamma(df / 2) + math.log(df / 2)
    excess = logs.var(1, ddof=1) - special.polygamma(1, df / 2)
    prior = np.where(excess > 0, 2 * inverse_trigamma(np.maximum(excess, 1e-6)), np.inf)[:, None]
    mean_log = logs.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        common = np.where(
            np.isinf(prior), np.exp(mean_log), np.exp(mean_log + special.digamma(prior / 2) - np.log(prior / 2))
        )
        shrunk = np.where(np.isinf(prior), common, (prior * common + df * variance) / (prior + df))
    total = np.minimum(prior + df, df * variance.shape[1])
    return 2 * np.asarray(stats.t.sf(np.abs(differences.mean(1)) / np.sqrt(shrunk / n), total))


def _differences(values: np.ndarray) -> np.ndarray:
    """Return the differences from the reference, (studies, n, contrasts)."""
    return values[:, :, 1:] - values[:, :, :1]


def inverse_trigamma(values: np.ndarray) -> np.ndarray:
    """Return x with trigamma(x) = value, by Newton's method on the reciprocal, which is nearly linear."""
    x = 0.5 + 1 / values
    for _ in range(50):
        trigamma = special.polygamma(1, x)
        x = x + trigamma * (1 - trigamma / values) / special.polygamma(2, x)
    return x


TESTS: dict[str, Callable[[Values], np.ndarray]] = {
    "paired": lambda values: paired(values.last),
    "moderated": lambda values: moderated(values.last),
    "unpaired": lambda values: unpaired(values.last),
    "paired, more text": lambda values: paired(values.more_text),
    "paired, mean of three": lambda values: paired(values.last_three),
}


def looks_table(studies: int) -> TimingTable:
    """Return how often one of several looks at a growing number of seeds decides, without and with an effect."""
    rows = []
    for seeds in ((3, 8), (3, 5, 8), tuple(range(3, 13))):
        for effect in (0.0, detectable_effect(seeds[-1])):
            p = p_of_looks(seeds, effect, studies)
            row: dict[str, object] = {"looks at": ", ".join(map(str, seeds)), "effect": effect}
            rows.append(row | {name: float(rule(p, seeds).any(1).mean()) for name, rule in RULES.items()})
    return TimingTable(f"share of studies that any look decides, {studies} studies in each row", rows)


def p_of_looks(seeds: tuple[int, ...], effect: float, studies: int) -> np.ndarray:
    """Return the two-sided p of the paired test at each look, (studies, looks)."""
    differences = effect + np.random.default_rng(0).normal(size=(studies, seeds[-1]))
    return np.stack([stats.ttest_1samp(differences[:, :n], 0, axis=1).pvalue for n in seeds], axis=1)


def _shares(seeds: tuple[int, ...], planned: int | None) -> np.ndarray:
    return np.array([share_of_look(n, seeds[:place], planned) for place, n in enumerate(seeds)])


RULES: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "5 % at each look": lambda p, seeds: p <= SIGNIFICANCE,
    "not planned": lambda p, seeds: p <= SIGNIFICANCE * _shares(seeds, None),
    "planned": lambda p, seeds: p <= SIGNIFICANCE * _shares(seeds, seeds[-1]),
    "last look alone": lambda p, seeds: (p <= SIGNIFICANCE) & (np.arange(len(seeds)) == len(seeds) - 1),
}
