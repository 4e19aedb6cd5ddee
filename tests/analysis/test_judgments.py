"""Tests of what a card says about a judgment."""

import math

import pytest

from moe.analysis.report.judgments import ALONE, Judgment, cards

CHANGE = Judgment("lb 1 vs 0", "undecided", "lb 1 vs 0", "comparison", "loss", 3, 0.2, 0.1, 0.3, 2.0, 0.2, False)
LOWER, WITHIN = (-math.inf, 0.0), (-0.5, 0.5)


@pytest.mark.parametrize(
    ("judged", "alone"),
    [
        (CHANGE, True),
        (CHANGE._replace(low=-0.1), False),
        (CHANGE._replace(verdict="worse"), False),
        (CHANGE._replace(kind="lower", claimed=LOWER), True),
        (CHANGE._replace(kind="lower", claimed=LOWER, low=-0.1), False),
        (CHANGE._replace(kind="equivalent", claimed=WITHIN), True),
        (CHANGE._replace(kind="equivalent", claimed=WITHIN, high=0.6), False),
        (CHANGE._replace(kind="equivalent", claimed=WITHIN, low=0.55, high=0.6), True),
        (CHANGE._replace(low=math.nan, high=math.nan, p=math.nan), False),
    ],
)
def test_a_card_says_when_its_interval_alone_would_decide_what_its_verdict_leaves_open(
    judged: Judgment, alone: bool
) -> None:
    [card] = cards([judged])
    assert (ALONE in card.effect) == alone


def test_more_seeds_do_not_decide_a_claim_that_only_some_differences_fit() -> None:
    advice = CHANGE._replace(outcome="").advice
    assert advice.startswith("more seeds would not decide it if the true differences are as estimated, because only ")


def test_a_card_gives_what_was_measured_and_what_was_claimed_in_the_same_units() -> None:
    """Both have the unit of the metric and a percentage of the same mean; without such a mean, the unit alone."""
    claim = CHANGE._replace(kind="higher", claimed=(0.1, 0.3))
    [card] = cards([claim])
    assert "measured: **+0.2 loss** (+10.0%) [0.1, 0.3], " in card.effect
    assert "; claimed: +0.1 to +0.3 loss (+5.0% to +15.0%)" in card.effect
    [card] = cards([claim._replace(reference=math.nan)])
    assert f"; claimed: +0.1 to +0.3 loss; {ALONE}" in card.effect
    [card] = cards([claim._replace(claimed=LOWER)])
    assert "measured" not in card.effect
    assert "claimed" not in card.effect
