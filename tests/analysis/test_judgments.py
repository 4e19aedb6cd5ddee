"""Tests of what a card says about a judgment."""

import math

import pytest

from moe.analysis.report.judgments import ALONE, Judgment, cards

CHANGE = Judgment("lb 1 vs 0", "undecided", "lb 1 vs 0", "comparison", "loss", 3, 0.2, 0.1, 0.3, 0.1, 0.2, False)
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
