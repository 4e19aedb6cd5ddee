"""Write a contrast as a sentence that ends with its verdict: a direction, equivalent, deterministic, or undecided."""

import pandas as pd

from moe.analysis.statistics import SIGNIFICANCE
from moe.checks import plain
from moe.results.comparable import NOT_COMPARABLE

SIGNIFICANT, DETERMINISTIC, UNDECIDED, UNTESTED = "significant", "deterministic", "undecided", "not tested"


def standing(contrast: pd.Series) -> str:
    """Return how certain the direction of a contrast is.

    `SIGNIFICANT`: p is at most 5 % after correction for other tests. `DETERMINISTIC`: the difference is the same in
    every seed, so chance has no part in it. `UNTESTED`: a test was impossible, as with one seed. `UNDECIDED`: anything
    else.
    """
    if contrast["deterministic"]:
        return DETERMINISTIC
    if pd.isna(contrast["p"]):
        return UNTESTED
    return SIGNIFICANT if contrast["p Holm"] <= SIGNIFICANCE else UNDECIDED


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
        text += f", p={c['p']:.2g} (Holm {c['p Holm']:.2g})" if up else ""
        text += f", n={c['n']}" + (f": {_verdict(c, up, down)}" if up else "")
    return plain(with_note(text, c["note"]))


def with_note(text: str, note: str) -> str:
    """Return a text with a note in parentheses at its end; if it ends with parentheses already, the note joins them."""
    if not note:
        return text
    return f"{text.removesuffix(')')}; {note})" if text.endswith(")") else f"{text} ({note})"


def detectable_note(effect: float, low: float, high: float, tests: int) -> str:
    """Return a text with the smallest effect that these seeds could have shown, and the uncertainty of that number."""
    correction = f", with 5 % divided by {tests}" if tests > 1 else ""
    numbers = f"{effect:.2g}, from {low:.2g} to {high:.2g}"
    return f"the smallest effect these seeds could have seen (power 0.8{correction}) is {numbers}"


def deterministic_verdict(difference: float, margin: float | None = None) -> str:
    """Return the verdict on a difference that is the same in every seed."""
    size = f"{'larger' if difference > 0 else 'smaller'} by {abs(difference):.3g}" if difference else "equal"
    within = f", within the margin of {margin:.3g}" if margin and abs(difference) < margin else ""
    return f"**deterministic**, {size} in every seed{within}"


def _verdict(contrast: pd.Series, up: str, down: str) -> str:
    c, significant = contrast, standing(contrast) == SIGNIFICANT
    direction = up if c["difference"] > 0 else down
    if pd.notna(c.get("p TOST Holm")) and c["equivalent"]:
        holm = f"(TOST, Holm {c['p TOST Holm']:.2g})"
        if significant:
            return f"**within the margin** of {c['margin']:.3g}, {direction} by less {holm}"
        return f"**equivalent** within {c['margin']:.3g} {holm}"
    if not significant:
        return f"**undecided**, {detectable_note(*c[['detectable', 'detectable_low', 'detectable_high', 'tests']])}"
    margin = c.get("margin")
    return f"**{direction}**" + (
        "" if pd.isna(margin) or c["beyond"] else f", not shown to exceed the margin of {margin:.3g}"
    )
