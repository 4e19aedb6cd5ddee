"""Tests of the agreement of two routings beyond chance."""

import numpy as np
import pytest

from moe.metrics.agreement import overlap


@pytest.mark.parametrize("numbers", [[2], [1, 4], [0, 1, 8]])
def test_the_overlap_by_chance_is_that_of_shuffled_tokens_also_if_k_varies(numbers: list[int]) -> None:
    """The chance level behind `kappa_shuffled` is the mean overlap over many shuffles of the tokens of one side.

    Both sides give a token equally many experts. After a shuffle they do not, and the larger number counts as k.
    """
    rng = np.random.default_rng(0)
    active = np.resize(numbers, 400)
    skew = np.linspace(0, 1, 8)  # loads are uneven
    a, b = (((rng.random((400, 8)) + skew).argsort(1).argsort(1) >= 8 - active[:, None])[None] for _ in range(2))
    found = overlap(a, b)
    kappa, observed = found["kappa_shuffled"][0], found["overlap"][0]
    chance = (observed - kappa) / (1 - kappa)
    shuffles = [overlap(a, b[:, rng.permutation(400)])["overlap"][0] for _ in range(300)]
    assert chance == pytest.approx(np.mean(shuffles), rel=0.01)
