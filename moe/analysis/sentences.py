"""Write a contrast as a sentence that ends with its verdict: a direction, equivalent, deterministic, or undecided."""

import pandas as pd

from moe.analysis.statistics import SIGNIFICANCE
from moe.checks import plain
from moe.results.comparable import NOT_COMPARABLE

SIGNIFICANT, DETERMINISTIC, UNDECIDED, UNTESTED = "significant", "deterministic", "undecided", "not tested"


def standing(contrast: pd.Series) -> str:
    """Return how certain the direction of a contrast is.

    `SIGNIFICANT`: p is at most 5 % after Holm's correction. `DETERMINISTIC`: the difference is the same in every seed,
    so chance has no part in it. `UNTESTED`: a test was impossible, as with one seed. `UNDECIDED`: anything else.
    """
    if contrast["deterministic"]:
        return DETERMINISTIC
    if pd.isna(contrast["p"]):
        return UNTESTED
    return SIGNIFICANT if contrast["p Holm"] <= SIGNIFICANCE else UNDECIDED


def contrast_sentence(contrast: pd.Series, subject: str, *, unit: str, up: str, down: str) -> str:
    """Return a row of `moe.analysis.statistics.contrasts` as a sentence, with its verdict in bold.

    `subject` names the levels compared. `up` and `down` are words for a positive and for a negative difference.
    """
    c = contrast
    note = f" ({c['note']})" if c["note"] else ""
    if c["note"].startswith(NOT_COMPARABLE):
        return f"{subject}: **{NOT_COMPARABLE}**{c['note'].removeprefix(NOT_COMPARABLE)}"
    if c["n"] == 0:
        return f"{subject}: no seed has a value at both levels: **not tested**{note}"
    difference = f"{subject}: {c['difference']:+.3g} {unit}".rstrip()
    if c["deterministic"]:
        return plain(f"{difference}, n={c['n']}: {deterministic_verdict(c['difference'], c.get('margin'))}{note}")
    if pd.isna(c["p"]):
        return plain(f"{difference}, n={c['n']}: **not tested**{note}")
    numbers = f"[{c['ci_low']:.3g}, {c['ci_high']:.3g}], p={c['p']:.2g} (Holm {c['p Holm']:.2g}), n={c['n']}"
    return plain(f"{difference} {numbers}: {_verdict(c, up=up, down=down)}{note}")


def detectable_note(effect: float, low: float, high: float, tests: int) -> str:
    """Return a text with the smallest effect that these seeds could have shown, and the uncertainty of that number."""
    correction = f", after correction for {tests} tests" if tests > 1 else ""
    numbers = f"{effect:.2g} [{low:.2g}, {high:.2g}]"
    return f"the smallest effect these seeds could have seen (power 0.8{correction}) is {numbers}"


def deterministic_verdict(difference: float, margin: float | None = None) -> str:
    """Return the verdict on a difference that is the same in every seed."""
    size = f"{'larger' if difference > 0 else 'smaller'} by {abs(difference):.3g}" if difference else "equal"
    within = f", within the margin of {margin:.3g}" if margin and abs(difference) < margin else ""
    return f"**deterministic**, {size} in every seed{within}"


def _verdict(contrast: pd.Series, *, up: str, down: str) -> str:
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
    beyond = pd.isna(margin) or c["ci_low"] > margin or c["ci_high"] < -margin
    return f"**{direction}**" + ("" if beyond else f", not shown to exceed the margin of {margin:.3g}")
