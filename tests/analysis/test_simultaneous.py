"""Tests of simultaneous intervals: together they hold in 95 % of cases, and single ones do not."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moe.analysis.looks import share_of_look
from moe.analysis.simultaneous import bonferroni, over_time, ranks, to_reference


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


@pytest.mark.parametrize("spread", ["equal", "x4", "seeds respond"])
@pytest.mark.parametrize("seeds", [3, 8])
def test_no_router_is_told_apart_from_others_of_the_same_mean(seeds: int, spread: str) -> None:
    rng, repeats = np.random.default_rng(0), 200
    wrong_rank = wrong_difference = 0
    for _ in range(repeats):
        values = rng.normal(0, [1, 1, 1, 1, 1, 4 if spread == "x4" else 1], (seeds, 6)) + rng.normal(0, 5, (seeds, 1))
        values += rng.normal(0, spread == "seeds respond", (seeds, 1)) * np.linspace(-2, 2, 6)
        table = pd.DataFrame(values, columns=list("abcdef"))
        wrong_rank += bool((ranks(table)[["best rank", "worst rank"]] != [1, 6]).any(axis=None))
        difference = to_reference(table, "a")
        wrong_difference += bool(((difference["low"] > 0) | (difference["high"] < 0)).any())
    assert max(wrong_rank, wrong_difference) <= stats.binom.ppf(0.999, repeats, 0.05), "5 % in the long run"


def test_the_differences_of_a_league_have_the_intervals_of_paired_t_tests_after_the_correction() -> None:
    values = pd.DataFrame(np.random.default_rng(0).normal(size=(4, 3)), columns=list("abc"))
    found = to_reference(values, "a").loc["c"]
    test = stats.ttest_rel(values["c"], values["a"]).confidence_interval(1 - 0.05 / 2)
    assert found.tolist() == pytest.approx([(values["c"] - values["a"]).mean(), test.low, test.high])
    assert to_reference(values, "a").loc["a"].tolist() == [0, 0, 0]
    assert to_reference(values[:1], "a").loc["c", ["low", "high"]].isna().all()


def test_ranks_follow_differences_that_are_clear() -> None:
    values = pd.DataFrame({"best": [1.0, 2.0, 3.0], "same": [1.001, 2.0, 2.999], "worst": [2.0, 3.001, 4.0]})
    table = ranks(values)
    assert table.loc["worst"].tolist() == [3, 3, 3]
    assert table.loc["best", ["best rank", "worst rank"]].tolist() == [1, 2]
    assert ranks(values[:1]).loc["worst"].tolist() == [3, 1, 3], "one seed tells nothing apart"


def test_a_league_to_which_no_level_is_left_tells_nothing_apart() -> None:
    values = pd.DataFrame({"a": [1.0, 2.0, 3.001], "b": [11.0, 12.0, 13.0], "c": [21.0, 22.002, 23.0]})
    assert ranks(values)["best rank"].tolist() == [1, 2, 3]
    assert ranks(values, 0.0)[["best rank", "worst rank"]].to_numpy().tolist() == [[1, 3]] * 3
    assert to_reference(values, "a", 0.0)[["low", "high"]].isna().all(axis=None)


def test_a_league_at_several_looks_keeps_its_error() -> None:
    """Eight equal routers are looked at with 3, 5 and 8 seeds, and eight are planned."""
    looks, studies = (3, 5, 8), 3000
    values = np.random.default_rng(0).normal(size=(studies, 8, 8))
    right = {name: np.full(studies, True) for name in ("ranks", "differences", "ranks at 5 % each")}
    for place, n in enumerate(looks):
        level = 0.05 * share_of_look(n, looks[:place], 8)
        pairs = np.stack([values[:, :n, a] - values[:, :n, b] for a in range(8) for b in range(a + 1, 8)], axis=-1)
        t = np.abs(pairs.mean(1)) / pairs.std(1, ddof=1) * math.sqrt(n)
        right["ranks"] &= (t <= bonferroni(28, n, level)).all(1)
        right["differences"] &= (t[:, :7] <= bonferroni(7, n, level)).all(1)  # those of the first router
        right["ranks at 5 % each"] &= (t <= bonferroni(28, n)).all(1)
    error = {name: 1 - float(each.mean()) for name, each in right.items()}
    assert max(error["ranks"], error["differences"]) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)
    assert error["ranks at 5 % each"] > 0.07
