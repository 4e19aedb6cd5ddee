"""Judgments on claims and on comparisons, each with what its card and the answer of a report need to say about it."""

import math
from collections.abc import Callable
from textwrap import shorten
from typing import NamedTuple

import pandas as pd

from moe.analysis.estimates import BETWEEN, TOO_FAR_APART
from moe.analysis.learned import without_doubt
from moe.analysis.power import Prediction, seeds_for
from moe.analysis.report.blocks import Card, Interval, literal
from moe.analysis.sentences import (
    AGAINST,
    DETERMINISTIC,
    EQUIVALENT,
    SIGNIFICANT,
    UNDECIDED,
    UNTESTED,
    claimed_range,
    directions,
    is_equivalent,
    levels_compared,
    noun,
    p_equals,
    percent,
    standing,
    with_capital,
)
from moe.checks import plain

CERTAINTY = [SIGNIFICANT, EQUIVALENT, DETERMINISTIC, UNDECIDED, UNTESTED]
ALONE = "the interval alone would decide it, but not after the correction for all tests of the report and all looks"
SOME_FAIL = """\
more seeds would not decide it if the true differences are as estimated, because only some of them are as claimed"""
BEFORE = " (before it was changed)"  # follows a claim if a later one has the same words
LONGEST_CLAIM = 120  # characters of a claim that the answer quotes
OPEN = 0.1  # share of the axis of a picture beyond all values, in which a claim without an end goes on
EVALUATE = "evaluate"  # the outcome of a claim that evaluations which are too far apart leave open
OUTCOMES = {"as claimed": "support", "against": "contradict", "mixed": "", "": "", BETWEEN: EVALUATE}  # of more seeds
TONES = {
    **dict.fromkeys(("supported", "equivalent", "better", "more balanced"), "good"),
    **dict.fromkeys(("contradicted", "worse", "less balanced"), "bad"),
}


class Judgment(NamedTuple):
    """The verdict on a planned claim, or on a comparison that nobody planned, and its numbers.

    text: the claim; for a comparison, the levels that it compares.
    compared: which levels are compared. choice: of a claim that makes several comparisons, which ones, and which one of
        them is shown.
    kind: that of a claim, or "comparison".
    reference: the mean at the reference level; NaN if the difference as a share of it says nothing.
    margin: the difference that counts as none, if a claim or the reader of the report named one. It is shown that the
        true difference is smaller (`within`), that it is larger (`beyond`), or neither.
    claimed: the range that a claim gives the difference, if it has two ends.
    needed: the number of seeds that would decide it, NaN if it is above 1,000 or unknown; `outcome` is what they would
        do to it, if the true difference is the estimated one: "support", "contradict" or "decide"; or empty, if no
        number decides it because only some of its comparisons are estimated as claimed.
    row: of a claim, the number of its row in the table of claims. changed: whether a later command has another claim in
        the same words. against: whether p is that of the test that the claim does not hold.
    levels: of a comparison, the factor, its level, its reference, and the levels of the other factors.
    """

    text: str
    verdict: str
    compared: str
    kind: str
    unit: str
    n: int
    difference: float
    low: float
    high: float
    reference: float
    p: float
    deterministic: bool
    margin: float = math.nan
    claimed: tuple[float, float] = (-math.inf, math.inf)
    needed: float = math.nan
    outcome: str = "decide"
    reason: str = ""
    metric: str = ""
    within: bool = False
    beyond: bool = False
    row: int | None = None
    choice: str = ""
    changed: bool = False
    levels: tuple[object, ...] = ()
    against: bool = False

    @property
    def title(self) -> str:
        """The claim in words that tell it from the later one in the same words."""
        return f"{self.text}{BEFORE if self.changed else ''}"

    @property
    def quoted(self) -> str:
        """The title in quotation marks, shortened to `LONGEST_CLAIM` characters of the claim."""
        return f"“{shorten(self.text, LONGEST_CLAIM, placeholder=' …')}”{BEFORE if self.changed else ''}"

    @property
    def planned(self) -> bool:
        """Whether it is a judgment on a claim."""
        return self.kind != "comparison"

    @property
    def decided(self) -> bool:
        """Whether the verdict is an answer."""
        return self.verdict not in (UNDECIDED, UNTESTED)

    @property
    def amount(self) -> str:
        """The difference with its unit."""
        return plain(f"{self.difference:+.3g} {self.unit}")

    @property
    def share(self) -> float:
        """The difference as a share of the mean at the reference level; NaN if this says nothing."""
        return self.difference / self.reference

    @property
    def percent(self) -> str:
        """The difference as a share of the reference; empty if this says nothing."""
        return percent(self.share) if math.isfinite(self.share) else ""

    @property
    def more(self) -> int:
        """How many seeds are missing, if `needed` is known."""
        return max(1, int(self.needed) - self.n)

    @property
    def decided_alone(self) -> bool:
        """Whether the interval, which is for this difference alone, tells what the verdict leaves open."""
        least, most = self.claimed if self.planned else (0.0, math.inf)
        inside = (least, most) != (-math.inf, math.inf) and least <= self.low and self.high <= most
        return self.verdict == UNDECIDED and bool(inside or self.high < least or self.low > most)

    @property
    def advice(self) -> str:
        """What would decide the question, if the seeds leave it undecided; otherwise empty."""
        if self.verdict != UNDECIDED:
            return ""
        if not self.outcome:
            return SOME_FAIL
        if self.outcome == EVALUATE:
            return TOO_FAR_APART
        if math.isnan(self.needed):
            return "more than 1,000 seeds would be needed, if the true difference is the estimated one"
        seeds = "1 more seed" if self.more == 1 else f"{self.more} more seeds"
        several = bool(self.choice) and self.outcome == "support"
        assumed = "all comparisons are like the one shown" if several else "the true difference is the estimated one"
        return f"about {seeds} would {self.outcome} it, if {assumed}"


def judgments(
    claims: pd.DataFrame, contrasts: pd.DataFrame, metric: str | None, *, tests_later: float | None = None
) -> list[Judgment]:
    """Return a judgment on every claim, the decided ones first.

    If there are no claims, return one on every contrast of `metric` that has a value, the most certain ones first.
    tests_later: the number by which 5 % are divided for a comparison in a later report with more seeds.
    """
    if len(claims):
        return sorted(
            (_on_claim(claims.iloc[row], row) for row in range(len(claims))), key=lambda each: not each.decided
        )
    if contrasts.empty:
        return []
    rows = contrasts[(contrasts["metric"] == metric) & (contrasts["n"] > 0)]
    order = [(CERTAINTY.index(standing(row)), row["p"]) for _, row in rows.iterrows()]
    return [on_contrast(rows.iloc[place], tests_later) for place in sorted(range(len(rows)), key=order.__getitem__)]


def _on_claim(row: pd.Series, number: int) -> Judgment:
    comparable = row["kind"] != "interaction" and bool(row["reference mean"])
    claimed = row["claimed_low"], row["claimed_high"]
    margin = claimed[1] if claimed[0] == -claimed[1] and math.isfinite(claimed[1]) else math.nan
    return Judgment(
        text=row["claim"],
        changed=bool(row["changed"]),
        verdict=row["verdict"],
        compared=row["compared"],
        kind=row["kind"],
        unit=noun(row["metric"]),
        n=int(row["n"]),
        difference=row["difference"],
        low=row["ci_low"],
        high=row["ci_high"],
        reference=row["reference mean"] if comparable else math.nan,
        p=row["p Holm"],
        against=row["side"] == "against",
        deterministic=row["deterministic"],
        margin=margin,
        claimed=claimed,
        needed=row["seeds needed"],
        outcome=OUTCOMES[row["estimates"]],
        reason=without_doubt(row["reason"]),
        metric=row["metric"],
        within=math.isfinite(margin) and row["verdict"] == "supported",
        beyond=math.isfinite(margin) and row["verdict"] == "contradicted",
        row=number,
        choice=row["choice"],
    )


def on_contrast(row: pd.Series, tests_later: float | None = None) -> Judgment:
    """Return the judgment on a row of `moe.analysis.statistics.contrasts`. tests_later: see `judgments`."""
    known, (up, down) = standing(row), directions(row["metric"])
    predicted = Prediction(0.0, math.inf, abs(row["d_z"]), max(tests_later or row["tests"], 1))
    needed = seeds_for(predicted) if known == UNDECIDED else None
    margin, within, beyond = row.get("margin", math.nan), False, False
    if known == DETERMINISTIC:
        within, beyond = bool(abs(row["difference"]) < margin), bool(abs(row["difference"]) >= margin)
    elif math.isfinite(margin):
        within, beyond = is_equivalent(row), bool(row["beyond"])
    return Judgment(
        text=levels_compared(row),
        verdict=(up if row["difference"] > 0 else down) if known == SIGNIFICANT else known,
        compared=levels_compared(row),
        kind="comparison",
        unit=noun(row["metric"]),
        n=int(row["n"]),
        difference=row["difference"],
        low=row["ci_low"],
        high=row["ci_high"],
        reference=math.nan,
        p=row["p Holm"],
        deterministic=row["deterministic"],
        margin=margin,
        needed=math.nan if needed is None else needed,
        metric=row["metric"],
        within=within,
        beyond=beyond,
        levels=(row["factor"], row["level"], row["reference"], row["within"]),
    )


def cards(
    judged: list[Judgment],
    command_for_more: Callable[[Judgment], str] = lambda judged: "",
    price: Callable[[Judgment], str] = lambda judged: "",
) -> list[Card]:
    """Return a card for each judgment. Those with one unit have one scale.

    command_for_more: the command that trains the seeds that a judgment needs, or an empty text. price: a sentence about
    what they cost, or an empty text.
    """
    axes = {unit: _span([each for each in judged if each.unit == unit]) for unit in {each.unit for each in judged}}
    return [_card(each, axes[each.unit], _advice(each, command_for_more, price)) for each in judged]


def _advice(judged: Judgment, command_for_more: Callable[[Judgment], str], price: Callable[[Judgment], str]) -> str:
    """Return what would decide a question, with its command at the end; an empty text if there is no advice."""
    if not judged.advice:
        return ""
    advice = with_capital(judged.advice)
    if math.isnan(judged.needed):
        return f"{advice}."
    command, more = command_for_more(judged), price(judged)
    if not command or more:
        advice += f". {more}".rstrip()
    return f"{advice}{'' if more else ':'} `{command}`" if command else advice


def _card(judged: Judgment, axis: tuple[float, float], advice: str) -> Card:
    tone = TONES.get(judged.verdict, "idle")
    if judged.n == 0:
        return Card(literal(judged.title), judged.verdict, tone, literal(judged.reason))
    sized = all(map(math.isfinite, judged.claimed))
    effect = f"{literal(judged.compared)}: " if judged.planned else ""
    effect += "measured: " if sized else ""
    effect += f"**{judged.amount}**" + (f" ({judged.percent})" if judged.percent else "")
    effect += f"{_certainty(judged)}, n={judged.n}"
    if sized:
        effect += f"; claimed: {claimed_range(*judged.claimed, judged.reference, judged.unit)}"
    effect += f"; {ALONE}" if judged.decided_alone else ""
    effect += f"; {literal(judged.choice)}" if judged.choice else ""
    effect += f"; {literal(judged.reason)}" if judged.verdict == UNTESTED and judged.reason else ""
    claimed = judged.claimed if judged.planned else None
    low, high = (math.nan, math.nan) if judged.verdict == UNTESTED else (judged.low, judged.high)
    picture = Interval(judged.difference, low, high, *axis, claimed)
    return Card(literal(judged.title), judged.verdict, tone, plain(effect), advice, picture)


def _certainty(judged: Judgment) -> str:
    """Return the interval and the corrected p of a difference, as far as it has them."""
    if judged.deterministic:
        return f", {DETERMINISTIC}"
    if math.isnan(judged.p):
        return ""
    against = AGAINST if judged.against else ""
    return f" [{judged.low:.3g}, {judged.high:.3g}], {p_equals(judged.p)}{against} after correction"


def _span(judged: list[Judgment]) -> tuple[float, float]:
    """Return the ends of an axis that shows all differences, their intervals, the finite ends of claims, and 0.

    There is room beyond them for claims without an end.
    """
    ends = [end for each in judged for end in (each.difference, each.low, each.high, *each.claimed)]
    low, *_, high = sorted([0.0, 0.0, *filter(math.isfinite, ends)])
    if high == low:
        return low - 1, high + 1
    room = OPEN * (high - low)
    claimed = [each.claimed for each in judged if each.planned]
    left, right = (any(math.isinf(range_[side]) for range_ in claimed) for side in (0, 1))
    return low - room * left, high + room * right
