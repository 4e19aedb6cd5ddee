"""How every figure looks: one palette, one set of sizes, one label for every column."""

from typing import Any

from matplotlib.figure import Figure

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
MARKERS = ("o", "s", "^", "D")
MOST_LINES = len(PALETTE) * len(DASHES)  # beyond that, two conditions would look the same

RC: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}

# Columns that are no metrics of a run: factors, and what only one study computes.
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


def look(index: int) -> dict[str, str]:
    """Color, dash and marker of the index-th condition: color never has to tell two apart alone."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": DASHES[index // len(PALETTE) % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def legend(figure: Figure, caption: str) -> None:
    """One legend for all panels, below them, under a line that says what the marks are; in columns that fit."""
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for pair in drawn for handle, label in zip(*pair, strict=True)}
    inches = 0.6 + 0.075 * max(map(len, handles), default=0)  # of the longest entry
    columns = 2 if 2 * inches < figure.get_figwidth() else 1
    style = {"title": caption, "ncols": columns, "fontsize": "small", "title_fontsize": "small"}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", **style)
