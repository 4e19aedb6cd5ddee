"""Tests of the share of the distance from random to oracle routing: Fieller's interval covers the true share."""

import math

import numpy as np
import pytest
from scipy import stats

from moe.analysis.limits import covered


def losses(seeds: int, rng: np.random.Generator, *, distance: float = 0.1, share: float = 0.6) -> list[np.ndarray]:
    common = 3 + rng.normal(0, 0.05, seeds)
    return [common - gain + rng.normal(0, 0.01, seeds) for gain in (share * distance, 0.0, distance)]


def test_the_interval_covers_the_share() -> None:
    rng, repeats = np.random.default_rng(0), 1500
    found = [covered(*losses(4, rng)) for _ in range(repeats)]
    inside = np.mean([not each.clear or each.low <= 0.6 <= each.high for each in found])
    assert inside == pytest.approx(0.95, abs=0.015)
    assert np.mean([each.clear for each in found]) > 0.9


def test_the_ends_are_the_shares_that_a_paired_t_test_barely_accepts() -> None:
    arm, random, oracle = losses(5, np.random.default_rng(1))
    share = covered(arm, random, oracle)
    for end in (share.low, share.high):
        assert stats.ttest_1samp(random - arm - end * (random - oracle), 0).pvalue == pytest.approx(0.05)
    assert share.low < share.value < share.high


def test_a_distance_that_may_be_zero_bounds_nothing() -> None:
    share = covered(*losses(4, np.random.default_rng(2), distance=0.001))
    assert not share.clear
    assert math.isnan(share.low)
    assert math.isnan(covered(np.array([1.0]), np.array([2.0]), np.array([1.5])).low)
    assert covered(np.array([1.5]), np.array([2.0]), np.array([1.0])).value == pytest.approx(0.5)
