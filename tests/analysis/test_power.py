"""Tests of the power of paired tests: closed forms, slow simulation, and the smallest number of seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from moe.analysis.power import POWER, UNPAIRED, Freedom, Prediction, detectable_effect, power, seeds_for


@pytest.mark.parametrize(("n", "effect", "tests"), [(3, 3.0, 1), (8, 1.5, 4), (20, 0.8, 40)])
def test_the_power_of_one_comparison_is_that_of_the_noncentral_t_distribution(
    n: int, effect: float, tests: int
) -> None:
    expected = stats.nct.sf(stats.t.isf(0.025 / tests, n - 1), n - 1, effect * math.sqrt(n))
    assert power(Prediction(0, math.inf, effect, tests), n) == pytest.approx(expected, abs=0.001)
    assert power(Prediction(-math.inf, 0, -effect, tests), n) == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize(
    ("prediction", "n"),
    [
        (Prediction(-2.0, 2.0, 0.0, tests=3), 8),
        (Prediction(0.0, math.inf, 1.5, tests=2, named=1, rivals=4), 8),
        (Prediction(-math.inf, 0.0, -2.0, tests=2, named=2, rivals=3), 6),
    ],
)
def test_power_is_the_share_of_studies_in_which_every_comparison_holds(prediction: Prediction, n: int) -> None:
    p, rng, studies = prediction, np.random.default_rng(1), 600
    two_ends = math.isfinite(p.low) and math.isfinite(p.high)
    held = []
    for _ in range(studies):
        named, rivals = (rng.normal(0, math.sqrt(0.5), (n, number)) for number in (p.named, p.rivals))
        pairs = [p.true + a - b for a in named.T for b in rivals.T]
        ends = [(end, side) for end, side in ((p.low, "greater"), (p.high, "less")) if math.isfinite(end)]
        worst = max(stats.ttest_1samp(pair, end, alternative=side).pvalue for pair in pairs for end, side in ends)
        held.append((1 if two_ends else 2) * worst <= 0.05 / p.tests)
    error = math.sqrt(0.25 / studies)
    assert power(p, n) == pytest.approx(np.mean(held), abs=3 * error)


@pytest.mark.parametrize(("n", "named", "rivals"), [(4, 2, 6), (8, 4, 1), (6, 1, 2), (3, 3, 3)])
def test_every_comparison_of_a_claim_finds_the_detectable_effect_in_80_of_100_studies(
    n: int, named: int, rivals: int
) -> None:
    effect, tests, rng = detectable_effect(n, tests=5, named=named, rivals=rivals), 5, np.random.default_rng(1)
    levels = rng.normal(0, math.sqrt(0.5), (3000, n, named + rivals))
    pairs = effect + levels[:, :, :named, None] - levels[:, :, None, named:]
    p = stats.ttest_1samp(pairs, 0, axis=1).pvalue.max(axis=(1, 2))
    assert (p <= 0.05 / tests).mean() == pytest.approx(0.8, abs=0.03)
    assert effect > detectable_effect(n, tests=tests)


def test_a_claim_fails_if_one_comparison_does_or_if_one_rival_beats_all_the_best() -> None:
    claim = Prediction(0.0, 1.0, -0.5, tests=3, named=2, rivals=4)
    assert claim.deciding() == Prediction(0.0, math.inf, 0.5, tests=24)
    assert claim._replace(true=1.5).deciding() == claim.deciding()
    assert claim._replace(best=True).deciding() == Prediction(0.0, math.inf, 0.5, tests=12, named=2)
    assert claim._replace(true=0.5).deciding() == claim._replace(true=0.5)


def test_the_detectable_effect_of_other_degrees_of_freedom_is_that_of_the_noncentral_t_distribution() -> None:
    assert detectable_effect(10, freedom=UNPAIRED) * math.sqrt(2) == pytest.approx(1.325, abs=0.001)  # G*Power
    effect = detectable_effect(4, tests=5, freedom=Freedom(5, 5))
    assert stats.nct.sf(stats.t.isf(0.005, 15), 15, effect * 2) == pytest.approx(0.8, abs=0.001)


@pytest.mark.parametrize("prediction", [Prediction(0, math.inf, 1.2, 7), Prediction(-math.inf, 0, -1.2, 7, 2, 3)])
def test_the_number_of_seeds_is_the_smallest_with_the_power(prediction: Prediction) -> None:
    n = seeds_for(prediction)
    assert n is not None
    assert power(prediction, n - 1) < POWER <= power(prediction, n)
    assert seeds_for(prediction, most=n) == n
    assert seeds_for(prediction, most=n - 1) is None
    more = seeds_for(prediction, power_wanted=0.95)
    assert more is not None
    assert more > n


def test_no_number_of_seeds_supports_a_claim_whose_assumed_difference_is_not_claimed() -> None:
    assert seeds_for(Prediction(0, math.inf, -1.0)) is seeds_for(Prediction(-1.0, 1.0, 1.0)) is None
    assert seeds_for(Prediction(0, math.inf, math.nan)) is None


@pytest.mark.parametrize(("pilot", "true"), [(3, 1.0), (3, 2.0), (5, 1.0), (5, 2.0)])
def test_a_plan_from_an_estimated_spread_has_its_power_on_average(pilot: int, true: float) -> None:
    """Simulates pilots: each one estimates the spread, plans the seeds, and the study has the power of these seeds."""
    estimates = np.sqrt(stats.chi2.ppf((np.arange(40) + 0.5) / 40, pilot - 1) / (pilot - 1))
    real = {}
    for known_by in (math.inf, pilot - 1):
        plans = [Prediction(0.0, math.inf, true / each, 8, known_by=known_by) for each in estimates]
        seeds = [seeds_for(plan, most=400) or 400 for plan in plans]  # 400 seeds have a power of almost 1
        exact = Prediction(0.0, math.inf, true, 8)
        real[known_by] = float(np.mean([power(exact, n) for n in seeds]))
    assert 0.78 < real[pilot - 1] < 0.88
    assert (
        (0.55 if pilot == 3 else 0.6) < real[math.inf] < (0.67 if pilot == 3 else 0.79)
    )  # docs/statistics.md: about 0.6
