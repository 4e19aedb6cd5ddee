"""Figures with a row for each estimate: a point, its interval, and lines that it is compared with."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.figures.marks import with_hover
from moe.analysis.figures.style import DASHES, PALETTE, RC, plain_log_labels, shared_legend
from moe.analysis.power import SIGNIFICANCE
from moe.analysis.sentences import levels_compared, p_equals

MOST_ROWS = 60
LONGEST = 90  # characters of a row's name
CLEAR = "filled: the interval leaves out 0; orange: higher, blue: lower, gray and open: undecided"
SIGNIFICANT_MARKS = "filled: p at most 0.05 after correction; open: not significant"


class Row(NamedTuple):
    """An estimate with its interval, whose ends are NaN if there is none and may be infinite.

    decided: whether the estimate is clear from no difference, so that the point has a color. text: what the page shows
    beside the point.
    """

    name: str
    value: float
    low: float
    high: float
    decided: bool
    text: str = ""


@matplotlib.rc_context(RC)
def forest(
    rows: Sequence[Row], label: str, marks: str, *, lines: Mapping[str, float] | None = None, zero: float = 0.0
) -> Figure:
    """Draw one row for each estimate, the first one on top.

    label: of the horizontal axis. marks: what the marks mean. lines: places of named vertical lines. zero: the place of
    no difference, which has a line too; at 1 the axis is logarithmic.
    """
    figure = Figure(figsize=(8.4, 1.6 + 0.28 * len(rows) + (0.4 if lines else 0)), layout="constrained")
    axes = figure.subplots()
    places = [end for row in rows for end in (row.value, row.low, row.high) if math.isfinite(end)]
    least, most = min([zero, *places]), max([zero, *places])
    if zero == 1:
        axes.set_xscale("log")
        plain_log_labels(axes.xaxis)
        least, most = least / 1.3, most * 1.3
    for number, row in enumerate(rows):
        color = PALETTE[1 if row.value > zero else 0] if row.decided else PALETTE[7]
        low, high = np.clip([row.low, row.high], least, most)  # NaN stays NaN
        if not math.isfinite(row.value):
            continue
        reach = [[row.value - low], [high - row.value]]
        look: dict[str, Any] = {"fmt": "o", "color": color, "markerfacecolor": color if row.decided else "white"}
        drawn = axes.errorbar([row.value], [number], xerr=reach, markersize=7, linewidth=2, **look)
        if text := "; ".join([*([row.name] if len(row.name) > LONGEST else []), *filter(None, [row.text])]):
            with_hover(drawn.lines[0], [text])
    axes.axvline(zero, color="black", linewidth=1)
    for index, (name, place) in enumerate((lines or {}).items()):
        axes.axvline(place, color=PALETTE[2 + index], linestyle=DASHES[1 + index], linewidth=1.5, label=name)
    names = short_names([row.name for row in rows])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    if lines:
        shared_legend(figure, marks)
    else:
        figure.supxlabel(marks, fontsize="small")
    return figure


def short_names(names: Sequence[str]) -> list[str]:
    """Return names cut in the middle to `LONGEST` characters, or whole in several lines if two would look the same."""
    half = (LONGEST - 3) // 2
    cut = {name: name if len(name) <= LONGEST else f"{name[:half]} … {name[-half:]}" for name in names}
    alike = Counter(cut.values())
    return [cut[name] if alike[cut[name]] == 1 else fill(name, LONGEST) for name in names]


def contrast_rows(contrasts: pd.DataFrame) -> list[Row]:
    """Return a row for each contrast, decided if p is at most 5 % after Holm's correction.

    contrasts: rows of `moe.analysis.statistics.contrasts` that have an interval.
    """
    return [
        Row(
            f"{levels_compared(each)} (n={each.n})",
            each.difference,
            each.ci_low,
            each.ci_high,
            row["p Holm"] <= SIGNIFICANCE,
            "not tested" if math.isnan(row["p Holm"]) else f"{p_equals(row['p Holm'])} after correction",
        )
        for (_, row), each in zip(contrasts.iterrows(), contrasts.itertuples(), strict=True)
    ]


def leaves_out(low: float, high: float) -> bool:
    """Return whether an interval leaves out 0."""
    return bool(low > 0 or high < 0)
