"""Tests of simultaneous intervals: together they hold in 95 % of cases, and single ones do not."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moe.analysis.simultaneous import block, dunnett, over_time, ranks, to_reference


@pytest.mark.parametrize("seeds", [3, 6])
def test_intervals_over_time_hold_together(seeds: int) -> None:
    correlation = 0.9 ** np.abs(np.subtract.outer(range(5), range(5)))
    root, rng, repeats = np.linalg.cholesky(correlation), np.random.default_rng(seeds), 80
    together = alone = 0
    for _ in range(repeats):
        drawn = rng.standard_normal((seeds, 5)) @ root.T
        largest = np.abs(stats.ttest_1samp(drawn, 0).statistic).max()
        together += largest <= over_time(drawn)
        alone += largest <= stats.t.ppf(0.975, seeds - 1)
    assert together / repeats >= 0.88, "95 % in the long run"
    assert alone < together, "single intervals do not hold together"


def test_the_factor_over_time_lies_between_student_and_bonferroni() -> None:
    rng = np.random.default_rng(0)
    common = rng.standard_normal((5, 1))
    alike, apart = common + 1e-6 * rng.standard_normal((5, 4)), rng.standard_normal((5, 4))
    student, bonferroni = stats.t.ppf(0.975, 4), stats.t.ppf(1 - 0.025 / 4, 4)
    assert student < over_time(alike) < over_time(apart) <= bonferroni
    assert over_time(apart[:, :1]) == pytest.approx(student)
    assert over_time(np.zeros((5, 4))) == pytest.approx(bonferroni), "without spread there is nothing to correlate"
    assert math.isnan(over_time(apart[:1]))


def test_dunnett_agrees_with_student_and_with_scipy() -> None:
    assert dunnett(1, 10) == pytest.approx(stats.t.ppf(0.975, 10), rel=2e-3)
    groups = np.random.default_rng(0).standard_normal((4, 4))
    interval = stats.dunnett(*groups[1:], control=groups[0], rng=np.random.default_rng(0)).confidence_interval()
    error = math.sqrt(groups.var(axis=1, ddof=1).mean() * 2 / 4)
    assert dunnett(3, 12) == pytest.approx((interval.high - interval.low)[0] / 2 / error, rel=5e-3)


def test_no_router_is_told_apart_from_others_of_the_same_mean() -> None:
    rng, repeats = np.random.default_rng(0), 150
    wrong_rank = wrong_difference = 0
    for _ in range(repeats):
        layout = block(pd.DataFrame(rng.normal(0, 1, (3, 6)) + rng.normal(0, 5, (3, 1)), columns=list("abcdef")))
        wrong_rank += bool((ranks(layout)[["best rank", "worst rank"]] != [1, 6]).any(axis=None))
        table = to_reference(layout, "a")
        wrong_difference += bool(((table["low"] > 0) | (table["high"] < 0)).any())
    assert max(wrong_rank, wrong_difference) / repeats <= 0.1, "5 % in the long run"


def test_ranks_follow_differences_that_are_clear() -> None:
    values = pd.DataFrame({"best": [1.0, 2.0, 3.0], "same": [1.001, 2.0, 2.999], "worst": [2.0, 3.001, 4.0]})
    table = ranks(block(values))
    assert table.loc["worst"].tolist() == [3, 3, 3]
    assert table.loc["best", ["best rank", "worst rank"]].tolist() == [1, 2]
    assert ranks(block(values[:1])).loc["worst"].tolist() == [3, 1, 3], "one seed tells nothing apart"
