"""Figures of the effects of factors: a metric against the levels of a factor, and contrasts with their intervals.

Every seed is a point. Intervals are 95 % t intervals of the mean over seeds, and the legend says how many seeds.
"""

from collections.abc import Sequence
from textwrap import shorten

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.figures.style import (
    OTHER_LABELS,
    PALETTE,
    RC,
    axis_label,
    begin_at_zero,
    draw_means,
    line_style,
    panel_height,
    shared_legend,
)
from moe.analysis.statistics import SIGNIFICANCE, with_intervals
from moe.results.conditions import by_seed, conditions, levels, summary


@matplotlib.rc_context(RC)
def factor_plot(runs: pd.DataFrame, factor: str, hue: str, metric: str) -> Figure:
    """Draw one metric against the levels of `factor`, which are evenly spaced, with a color for each level of `hue`."""
    return factor_panels(runs, factor, hue, [metric])


@matplotlib.rc_context(RC)
def factor_panels(runs: pd.DataFrame, factor: str, hue: str, metrics: Sequence[str]) -> Figure:
    """Draw a panel like `factor_plot` for each metric."""
    hues = runs[hue].nunique()
    width = max(5.4, 0.25 * runs[factor].nunique() * hues)
    figure = Figure(figsize=(width * len(metrics), panel_height(hues)), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_levels(axes, runs, factor, hue, metric)
    shared_legend(figure, "small: one seed, lines join a seed; large: mean over n seeds and its 95 % t interval")
    return figure


def _draw_levels(axes: Axes, runs: pd.DataFrame, factor: str, hue: str, metric: str) -> None:
    """Draw seeds, means and intervals of one metric. The levels of `hue` lie side by side, so that all are visible."""
    places, hues = levels(runs[factor]), levels(runs[hue])
    step = min(0.24, 0.7 / len(hues))
    for index, (cell, members) in enumerate(conditions(runs, [hue])):
        style = line_style(index)
        x = [place + step * (index - (len(hues) - 1) / 2) for place in range(len(places))]
        seeds = pd.DataFrame({place: by_seed(members[members[factor] == place], metric) for place in places})
        for _, values in seeds.iterrows():
            axes.plot(x, values, color=style["color"], linewidth=0.7, alpha=0.6, marker=style["marker"], markersize=4)
        means = with_intervals(summary(members, [factor], [metric])).set_index(factor).reindex(places)
        beside = [place + 0.35 * step for place in x]  # not on top of the seeds
        draw_means(axes, beside, means, style, f"{OTHER_LABELS.get(hue, '')} {cell[hue]}")
    axes.set_xticks(range(len(places)), [str(place) for place in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    if max(len(str(place)) for place in places) * len(places) > 40:
        axes.tick_params(axis="x", rotation=25)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(axis_label(factor))
    axes.set_ylabel(axis_label(metric))
    begin_at_zero(axes, metric)


@matplotlib.rc_context(RC)
def forest(contrasts: pd.DataFrame, label: str) -> Figure:
    """Draw the difference of each contrast with its 95 % t interval, one row for each contrast.

    A row has a color and a filled point if p is at most 5 % after Holm's correction. `contrasts` are rows of
    `moe.analysis.statistics.contrasts` that have an interval, all of the metric named `label`.
    """
    names = [
        f"{c.factor} {c.level} vs {c.reference}" + (f" at {c.within}" if c.within else "") + f" (n={c.n})"
        for c in contrasts.itertuples()
    ]
    names = [shorten(name, 90, placeholder=" …") for name in names]
    figure = Figure(figsize=(8.4, 1.4 + 0.28 * len(contrasts)), layout="constrained")
    axes = figure.subplots()
    for row, (_, c) in enumerate(contrasts.iterrows()):
        significant = c["p Holm"] <= SIGNIFICANCE
        color = PALETTE[1 if c["difference"] > 0 else 0] if significant else PALETTE[7]
        fill = color if significant else "white"
        axes.plot([c["ci_low"], c["ci_high"]], [row, row], color=color, linewidth=2)
        axes.plot(c["difference"], row, "o", color=color, markerfacecolor=fill, markersize=7)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    figure.supxlabel(
        f"difference in {label}, with its 95 % t interval; filled: p <= 0.05 after Holm's correction", fontsize="medium"
    )
    return figure
