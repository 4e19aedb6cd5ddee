"""Write a contrast as a sentence that ends with its verdict, such as a direction, equivalent, or undecided."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moe.analysis.power import SIGNIFICANCE
from moe.checks import plain
from moe.config.effect import UNIT
from moe.metrics.catalog import lookup, span
from moe.results.comparable import NOT_COMPARABLE

SIGNIFICANT, EQUIVALENT, DETERMINISTIC = "significant", "equivalent", "the same in every seed"
UNDECIDED, UNTESTED = "undecided", "not tested"
AGAINST = " against the claim"  # follows a p of the test that a claim does not hold
SMALLEST_P = 0.0001  # that is shown as a number
DETECTABLE = """\
After an undecided result, the **smallest detectable effect** is the true difference that so many seeds would have found
in 80 % of cases, at the level that the test has if no other test is significant. (Holm's correction leaves a test more
once others are.) A smaller one would often have been missed. A claim of several comparisons needs all of them, so it is
the true difference of each. In parentheses is the 95 % interval of this number, which is wide because few seeds tell
little about the spread."""


def standing(contrast: pd.Series) -> str:
    """Return what is known about a contrast.

    `SIGNIFICANT`: p is at most 5 % after correction for other tests. `EQUIVALENT`: the direction is not significant,
    but the difference is smaller than the margin. `DETERMINISTIC`: the difference is the same in every seed, so
    that nothing tells how far chance could move it. `UNTESTED`: a test was impossible, as with one seed. `UNDECIDED`:
    anything else.
    """
    if contrast["deterministic"]:
        return DETERMINISTIC
    if pd.isna(contrast["p"]):
        return UNTESTED
    if contrast["p Holm"] <= SIGNIFICANCE:
        return SIGNIFICANT
    return EQUIVALENT if is_equivalent(contrast) else UNDECIDED


def contrast_sentence(contrast: pd.Series, subject: str, *, unit: str, up: str = "", down: str = "") -> str:
    """Return a row of `moe.analysis.statistics.contrasts` as a sentence.

    `subject` names the levels compared. `up` and `down` are words for a positive and for a negative difference. With
    them the sentence ends with its verdict in bold. Without them it gives the difference, its interval and n alone.
    """
    c = contrast
    if c["note"].startswith(NOT_COMPARABLE):
        return f"{subject}: **{NOT_COMPARABLE}**{c['note'].removeprefix(NOT_COMPARABLE)}"
    if c["n"] == 0:
        return with_note(f"{subject}: no seed has a value at both levels: **not tested**", c["note"])
    text = f"{subject}: {c['difference']:+.3g} {unit}".rstrip()
    if c["deterministic"]:
        text += f", n={c['n']}: {deterministic_verdict(c['difference'], c.get('margin'))}"
    elif pd.isna(c["p"]):
        text += f", n={c['n']}: **not tested**"
    else:
        text += f" [{c['ci_low']:.3g}, {c['ci_high']:.3g}]"
        text += f", {p_equals(c['p'])} (Holm {p_text(c['p Holm'])})" if up else ""
        text += f", n={c['n']}" + (f": {_verdict(c, unit, up, down)}" if up else "")
    return plain(with_note(text, c["note"]))


def with_note(text: str, note: str) -> str:
    """Return a text with a note in parentheses at its end; if it ends with parentheses already, the note joins them."""
    if not note:
        return text
    return f"{text.removesuffix(')')}; {note})" if text.endswith(")") else f"{text} ({note})"


def detectable_note(
    effect: float, low: float, high: float, *, tests: int | float, unit: str, most: float = math.inf
) -> str:
    """Return the smallest detectable effect at the level 5 % / `tests`, with the 95 % interval of that number.

    `DETECTABLE` says what it is. most: how much the metric can change.
    """
    if effect > most:
        return f"smallest detectable effect larger than {unit} can change, at the level {level_text(tests)}"
    size = f"{effect:.2g} {unit}".rstrip()
    return f"smallest detectable effect {size} ({low:.2g} to {high:.2g}) at the level {level_text(tests)}"


def percent(share: float) -> str:
    """Return a share with its sign, such as "+1.2%"; one digit if that would be zero, such as "-0.007%"."""
    text = f"{share:+.1%}"
    return text if text.strip("+-") != "0.0%" else f"{round(100 * share, 6):+.1g}%" if abs(share) > 1e-6 else "0%"


def claimed_range(low: float, high: float, reference: float, unit: str = "") -> str:
    """Return the differences that a claim allows, such as "+6.57 to +19.7 perplexity (+5.0% to +15.0%)".

    reference: the mean that the percentages are of; NaN or 0 if they say nothing. unit: what follows the numbers.
    """
    shares = f"({percent(low / reference)} to {percent(high / reference)})" if abs(reference) > 0 else ""
    return " ".join(filter(None, (f"{low:+.3g} to {high:+.3g}", unit, shares)))


def p_text(p: float) -> str:
    """Return a p-value with two digits, such as "0.031"; or "< 0.0001", as its digits would say more than is known.

    It has more digits where it would be rounded to 0.05, such as "0.0496", because those decide.
    """
    texts = (f"{p:.{digits}g}" for digits in range(2, 18))
    exact = next(text for text in texts if p == SIGNIFICANCE or float(text) != SIGNIFICANCE)
    return f"< {SMALLEST_P:.4f}" if p < SMALLEST_P else exact


def p_equals(p: float) -> str:
    """Return a p-value with its letter, such as "p=0.031" or "p < 0.0001"."""
    return f"p {text}" if (text := p_text(p)).startswith("<") else f"p={text}"


def level_text(tests: int | float) -> str:
    """Return the level of a test to which 5 % / `tests` are left, such as "0.25 %"."""
    return f"{100 * SIGNIFICANCE / max(tests, 1):.3g} %"


def effects_in_words(effect: str, effects: Mapping[str, str]) -> str:
    """Return the smallest differences that matter, such as "10 % of the mean, but 0.02 nats for test/loss".

    effect: as `moe.config.effect.Effect` has it. effects: metric -> the effect on it.
    """
    others = enumerated([f"{_effect(size, metric)} for {metric}" for metric, size in effects.items()])
    return _effect(effect) + (f", but {others}" if others else "")


def _effect(size: str, metric: str = "") -> str:
    """Return an effect with its unit: that of the metric, % of its mean, or standard deviations of differences."""
    number, of_metric = size.removesuffix(UNIT).removesuffix("%"), lookup(metric)
    units = {"%": "% of the mean", UNIT: "standard deviations of the differences between runs of one seed"}
    unit = units.get(size[len(number) :], of_metric.unit.removesuffix(" per token") if of_metric else "")
    return f"{number.strip()} {unit}".rstrip()


def levels_compared(contrast: Any) -> str:
    """Return which levels a contrast compares, such as "noise 0.5 vs 0.0 at lb=0.01".

    `contrast` is a row of `moe.analysis.statistics.contrasts`, as a series or as a named tuple.
    """
    at = f" at {contrast.within}" if contrast.within else ""
    return f"{contrast.factor} {contrast.level} vs {contrast.reference}{at}"


def directions(name: str) -> tuple[str, str]:
    """Return the words for a rise and for a fall of a metric, such as "worse" and "better"."""
    metric = lookup(name)
    return (metric.rise, metric.fall) if metric else ("higher", "lower")


def noun(name: str) -> str:
    """Return the word for a metric in running text, as after a value of it."""
    metric = lookup(name)
    return (metric.noun or metric.label) if metric else name


def null_everywhere(name: str) -> str:
    """Return that no run has a value of a metric, and when it has none, as far as the catalog says."""
    metric = lookup(name)
    return ": ".join(filter(None, ["null in every run", metric.when_null if metric else ""]))


def decimals(value: float, low: float, high: float, *, least: int) -> int:
    """Return how many decimals show two significant digits of a value, and one of each end of its interval.

    So an end is shown as 0 only if it is 0. At least `least`, and at most 10. NaN: needs none.
    """
    digits = [
        known - math.floor(math.log10(abs(number)))
        for number, known in ((value, 1), (low, 0), (high, 0))
        if math.isfinite(number) and number
    ]
    return min(10, max([least, *digits]))


def with_interval(value: float, low: float, high: float, *, least: int, sign: str = "+") -> str:
    """Return a number and its interval, if it has one, with the decimals that both need, as "+0.015 [0.001, 0.029]".

    least: the smallest number of decimals. sign: "+" if the number is a difference, otherwise empty.
    """
    digits = decimals(value, low, high, least=least)
    interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else ""
    return plain(f"{value:{sign}.{digits}f}{interval}")


def deterministic_verdict(difference: float, margin: float | None = None) -> str:
    """Return the verdict on a difference that is the same in every seed."""
    size = f"{'larger' if difference > 0 else 'smaller'} by {abs(difference):.3g}" if difference else "no difference"
    within = f", within the margin of {margin:.3g}" if margin and abs(difference) < margin else ""
    return f"**{DETERMINISTIC}**, {size}{within}"


def is_equivalent(contrast: pd.Series) -> bool:
    """Return whether a contrast is shown to be smaller than its margin, significant or not."""
    return pd.notna(contrast.get("p TOST Holm")) and bool(contrast["equivalent"])


def _verdict(contrast: pd.Series, unit: str, up: str, down: str) -> str:
    c, significant = contrast, standing(contrast) == SIGNIFICANT
    direction = up if c["difference"] > 0 else down
    if is_equivalent(c):
        holm = f"(TOST, Holm {p_text(c['p TOST Holm'])})"
        if significant:
            return f"**within the margin** of {c['margin']:.3g}, {direction} by less {holm}"
        return f"**equivalent** within {c['margin']:.3g} {holm}"
    if not significant:
        effect = c[["detectable", "detectable_low", "detectable_high"]]
        return f"**undecided**, {detectable_note(*effect, tests=c['tests'], unit=unit, most=span(c['metric']))}"
    margin = c.get("margin")
    return f"**{direction}**" + (
        "" if pd.isna(margin) or c["beyond"] else f", not shown to exceed the margin of {margin:.3g}"
    )


def enumerated(items: Sequence[object]) -> str:
    """Return items as an enumeration in a sentence, such as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(map(str, items[:-1])), *map(str, items[-1:]))))


def with_capital(text: str) -> str:
    """Return a clause as the start of a sentence."""
    return text[:1].upper() + text[1:]


def numbers_in_words(numbers: list[int]) -> str:
    """Return whole numbers in rising order, with each row of neighbors as one range, such as "42, 45 to 47"."""
    rows: list[list[int]] = []
    for number in sorted(numbers):
        if rows and number == rows[-1][-1] + 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    return ", ".join(f"{row[0]} to {row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows)
