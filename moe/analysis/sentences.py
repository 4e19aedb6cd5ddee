"""Write a contrast as a sentence that ends with its verdict: a direction, equivalent, or undecided."""

import math

import pandas as pd

WITH_CORRECTION, UNTIL_CORRECTED, UNDECIDED = "with correction", "until corrected", "undecided"
SIGNIFICANCE = 0.05  # largest p that counts as significant


def standing(contrast: pd.Series) -> str:
    """Return how certain the direction of a contrast is.

    `UNDECIDED`: the 95 % t interval contains 0, or there is none. `UNTIL_CORRECTED`: it excludes 0, but p exceeds 5 %
    after Holm's correction. `WITH_CORRECTION`: the direction holds after Holm's correction too.
    """
    if math.isnan(contrast["p"]) or contrast["ci_low"] <= 0 <= contrast["ci_high"]:
        return UNDECIDED
    return UNTIL_CORRECTED if contrast["p Holm"] > SIGNIFICANCE else WITH_CORRECTION


def contrast_sentence(contrast: pd.Series, subject: str, *, unit: str, up: str, down: str) -> str:
    """Return a row of `moe.analysis.statistics.contrasts` as a sentence, with its verdict in bold.

    `subject` names the levels compared. `up` and `down` are words for a positive and for a negative difference.
    """
    c = contrast
    note = f" ({c['note']})" if c["note"] else ""
    if c["n"] == 0:
        return f"{subject}: no seed has a value at both levels: **undecided**{note}"
    difference = f"{subject}: {c['difference']:+.3g} {unit}".rstrip()
    if math.isnan(c["p"]):
        return f"{difference}, n={c['n']}: **undecided**{note}"
    numbers = f"[{c['ci_low']:.3g}, {c['ci_high']:.3g}], p={c['p']:.2g} (Holm {c['p Holm']:.2g}), n={c['n']}"
    return f"{difference} {numbers}: {_verdict(c, up=up, down=down)}{note}"


def detectable_note(effect: float) -> str:
    """Return a text with the smallest effect that these seeds could have shown."""
    return f"the smallest effect these seeds could have seen (power 0.8) is {effect:.2g}"


def _verdict(contrast: pd.Series, *, up: str, down: str) -> str:
    c, certainty = contrast, standing(contrast)
    if certainty == UNDECIDED and pd.notna(c.get("p TOST Holm")) and c["equivalent"]:
        return f"**equivalent** within {c['margin']:.3g} (TOST, Holm {c['p TOST Holm']:.2g})"
    if certainty == UNDECIDED:
        return f"**undecided**, {detectable_note(c['detectable'])}"
    direction = f"**{up if c['difference'] > 0 else down}**"
    return direction + (", but not after Holm's correction" if certainty == UNTIL_CORRECTED else "")
