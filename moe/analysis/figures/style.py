"""Colors, sizes and labels of all figures."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from moe.metrics.catalog import lookup

PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#7F7F7F",
)  # Okabe and Ito, 2008
DASHES = ("-", "--", ":", "-.")
MARKER_SHAPES = ("o", "s", "^", "D")
MAX_TICKS = 16  # layers that are all labeled
MOST_LINES = len(PALETTE) * len(DASHES)  # with more lines, two conditions would look the same

RC: dict[Any, Any] = {
    "figure.dpi": 100,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "text.parse_math": False,  # a name from a run may contain dollars
}

# Labels of columns that the catalog of metrics does not have: factors, and values that only one study computes.
OTHER_LABELS = {
    "lb": "load-balancing weight",
    "router.temp": "router temperature",
    "utilization/variance": "variance of load shares in a layer (ddof 0, mean)",
    "avg_drop_rate": "drop rate (share of assignments)",
    "tokens_per_s": "pack and combine (tokens per second)",
}


def axis_label(column: str) -> str:
    """Return the label of a metric, with its unit, or of a factor; the column's own name if neither is known."""
    metric = lookup(column)
    return metric.axis if metric else OTHER_LABELS.get(column, column)


def y_label(column: str) -> str:
    """Return `axis_label` in lines that fit beside a panel."""
    return textwrap.fill(axis_label(column), 40)


def line_style(index: int) -> dict[str, str]:
    """Return color, dash and marker of the index-th condition. Conditions never differ in color alone."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": DASHES[index // len(PALETTE) % len(DASHES)],
        "marker": MARKER_SHAPES[index % len(MARKER_SHAPES)],
    }


def plain_log_labels(axis: Axis) -> None:
    """Label the ticks of a logarithmic axis as 0.01 or 2e-05. By default they are formulas, and these are not drawn."""
    axis.set_major_formatter(_PlainLogFormatter())
    axis.set_minor_formatter(_PlainLogFormatter(labelOnlyBase=False))  # labels only if the range is small


class _PlainLogFormatter(LogFormatter):
    """A formatter that labels the same ticks, with as many digits as tell them apart."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.10g}" if super().__call__(x, pos) else ""


def label_layers(axes: Axes, layers: Sequence[int]) -> None:
    """Put ticks at layers, at all of them if they are few. A mark beside its tick shows the layer on the page."""
    axes.set_xticks(layers[:: math.ceil(len(layers) / MAX_TICKS)])


def begin_at_zero(axes: Axes, column: str) -> None:
    """Let the vertical axis begin at 0 if it would begin below, but the metric `column` is never below 0.

    A t interval of a small mean may reach below 0 nevertheless; that part is not drawn.
    """
    metric = lookup(column)
    if metric and metric.nonnegative and axes.get_ylim()[0] < 0:
        axes.set_ylim(bottom=0)


def shared_legend(figure: Figure, title: str) -> None:
    """Draw one legend for all panels below them. Its title says what the marks mean."""
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for pair in drawn for handle, label in zip(*pair, strict=True)}
    inches = 0.6 + 0.075 * max(map(len, handles), default=0)  # the width of the longest entry
    columns = 2 if 2 * inches < figure.get_figwidth() else 1
    style = {"title": title, "ncols": columns, "fontsize": "small", "title_fontsize": "small"}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", **style)


def panel_height(legend_entries: int) -> float:
    """Return the height of a figure in inches. It grows with the legend, so that the panels keep their height."""
    return 4.4 + 0.11 * legend_entries


def interval_reach(means: pd.DataFrame) -> pd.Series:
    """Return half the length of each mean's 95 % t interval; 0 for a single seed, which has no interval."""
    return (means["mean"] - means["ci_low"]).fillna(0)
