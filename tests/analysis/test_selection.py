"""Tests of the lead of a chosen setting, by simulation of settings that are all equal and of settings that differ."""

import math

import numpy as np
import pytest

from moe.analysis.selection import Lead, c4, expected_largest, first_alike, lead

SETTINGS, SEEDS, REPEATS = 8, 3, 1000


def simulated(*, effect: float = 0.0) -> np.ndarray:
    """Return the leads (R, 3) of many experiments. One setting is better by `effect`.

    A run has a deviation of 1 that validation and test share, because they evaluate the same model, and a smaller one
    of each text. A seed has an effect that all settings share.
    """
    draws = np.random.default_rng(7)
    found = []
    for _ in range(REPEATS):
        model = draws.normal(size=(SETTINGS, SEEDS)) + 3 * draws.normal(size=SEEDS)
        model[0] -= effect
        validation, test = (model + 0.2 * draws.normal(size=(SETTINGS, SEEDS)) for _ in range(2))
        found.append(lead(validation, test))
    return np.array(found)


def test_settings_are_the_same_if_all_seeds_in_common_have_equal_numbers_and_there_are_two() -> None:
    setting = {1: b"a", 2: b"b", 3: b"c"}
    others = [{1: b"a", 2: b"b", 3: b"d"}, {2: b"b", 3: b"c", 4: b"e"}, {1: b"a"}, {3: b"c", 2: b"b"}, {}]
    assert first_alike([setting, *others]) == [0, 1, 0, 3, 0, 5]


def test_the_best_of_eight_equal_settings_leads_by_luck_and_by_nothing_when_judged() -> None:
    """With three seeds it leads by 0.8 standard deviations of a run; other seeds and test text show no lead."""
    leads = simulated()
    chosen, luck, judged = leads.mean(0)
    assert chosen == pytest.approx(expected_largest(8) * math.hypot(1, 0.2) / math.sqrt(3), rel=0.03)
    assert 0.8 < chosen < 0.87
    assert luck == pytest.approx(chosen, rel=0.05)
    assert abs(judged) < 4 * leads.std(0)[2] / math.sqrt(REPEATS)


def test_a_setting_that_is_really_better_keeps_its_lead_when_judged() -> None:
    leads = simulated(effect=4.0)
    true_lead = 4.0 * (SETTINGS - 1) / SETTINGS
    assert leads[:, 2].mean() == pytest.approx(true_lead, rel=0.02)
    assert leads[:, 0].mean() > leads[:, 1].mean()


def test_the_mean_of_the_largest_has_its_closed_forms() -> None:
    """For two and three numbers it is 1 / sqrt(pi) and 3 / (2 sqrt(pi)) (order statistics of the normal)."""
    assert expected_largest(1) == pytest.approx(0, abs=1e-9)
    assert expected_largest(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert expected_largest(3) == pytest.approx(1.5 / math.sqrt(math.pi))


def test_the_luck_of_two_settings_and_two_seeds_is_right_on_average() -> None:
    """With one degree of freedom the mean of the standard deviation is sqrt(2 / pi) of the true one."""
    assert c4(1) == pytest.approx(math.sqrt(2 / math.pi))
    draws = np.random.default_rng(3).normal(size=(2000, 2, 2))
    lucks = [lead(values, values).luck for values in draws]
    assert np.mean(lucks) == pytest.approx(expected_largest(2) / math.sqrt(2), rel=0.05)


def test_a_lead_by_hand() -> None:
    values = np.array([[1.0, 2.0], [3.0, 3.0]])
    tests = np.array([[10.0, 10.0], [11.0, 14.0]])
    found = lead(values, tests)
    assert found.chosen == 0.75
    assert found.judged == (0.5 + 2.0) / 2
    assert found.luck == pytest.approx(expected_largest(2) * 0.5 / c4(1) / math.sqrt(2))
    assert isinstance(found, Lead)
