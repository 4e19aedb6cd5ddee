"""Figures of the effects of factors: a metric against the levels of a factor, and against the values of a tuned key.

Every seed is a point, and lines join a seed. Means of factors have no intervals, because these may overlap although
every seed shows the same difference. `moe.analysis.figures.forest` draws the differences with theirs.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.figures.marks import in_group, with_hover
from moe.analysis.figures.style import (
    OTHER_LABELS,
    PALETTE,
    RC,
    axis_label,
    begin_at_zero,
    line_style,
    panel_height,
    shared_legend,
    y_label,
)
from moe.analysis.tuned import Arm
from moe.results.conditions import by_seed, conditions, levels


class Axis(NamedTuple):
    """Places of the levels of a factor on an axis. Numbers have their own scale, other levels are evenly spaced."""

    places: dict[Any, float]
    step: float  # between neighbors, which bounds how far the marks of one level may lie apart
    label: str


def level_axis(runs: pd.DataFrame, factor: str) -> Axis:
    """Return the axis of a factor: linear, logarithmic for positive numbers that span a factor of ten, or even steps.

    Numbers that include 0 and otherwise span a factor of ten would overlap on both scales, so they are evenly spaced.
    """
    names, label = levels(runs[factor]), axis_label(factor)
    numbers = [float(name) for name in names if isinstance(name, int | float) and math.isfinite(name)]
    positive = [number for number in numbers if number > 0]
    wide = len(positive) > 1 and max(positive) / min(positive) >= 10
    if len(numbers) < max(2, len(names)) or (wide and len(positive) < len(numbers)):
        return Axis({name: float(place) for place, name in enumerate(names)}, 1.0, label)
    places = {name: math.log10(name) if wide else float(name) for name in names}
    step = min(b - a for a, b in pairwise(sorted(places.values())))
    return Axis(places, step, f"{label} (log scale)" if wide else label)


@matplotlib.rc_context(RC)
def factor_panels(runs: pd.DataFrame, factor: str, hue: str, metrics: Sequence[str]) -> Figure:
    """Draw a panel for each metric, with the metric against the levels of `factor` and a color for each `hue`."""
    hues = runs[hue].nunique()
    width = max(5.4, 0.25 * runs[factor].nunique() * hues)
    figure = Figure(figsize=(width * len(metrics), panel_height(hues)), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_levels(axes, runs, factor, hue, metric)
    shared_legend(figure, "small: one seed, lines join a seed; large: mean over n seeds")
    return figure


def _draw_levels(axes: Axes, runs: pd.DataFrame, factor: str, hue: str, metric: str) -> None:
    """Draw seeds and means of one metric. The levels of `hue` lie side by side."""
    axis, hues = level_axis(runs, factor), levels(runs[hue])
    for index, (cell, members) in enumerate(conditions(runs, [hue])):
        style, shift = line_style(index), _shift(axis, index, len(hues))
        seeds = pd.DataFrame({level: by_seed(members[members[factor] == level], metric) for level in axis.places})
        x = [place + shift for place in axis.places.values()]
        for seed, values in seeds.iterrows():
            look: dict[str, Any] = {"color": style["color"], "marker": style["marker"]}
            [line] = axes.plot(x, values, linewidth=0.7, alpha=0.6, markersize=4, **look)
            with_hover(line, [f"seed {seed}"] * len(x))
        counts = "–".join(map(str, sorted({int(n) for n in seeds.count() if n})))
        label = f"{OTHER_LABELS.get(hue, '')} {cell[hue]} (n={counts})".lstrip()
        mean: dict[str, Any] = {"marker": style["marker"], "markersize": 9, "markeredgecolor": "white", "linestyle": ""}
        [means] = axes.plot(x, seeds.mean(), label=label, color=style["color"], **mean)
        with_hover(means, [f"mean over {n} seeds" for n in seeds.count()])
    _label_levels(axes, axis)
    axes.set_ylabel(y_label(metric))
    begin_at_zero(axes, metric)


def _shift(axis: Axis, index: int, count: int) -> float:
    """Return how far the marks of one of `count` colors lie from their level."""
    return min(0.16, 0.6 / count) * axis.step * (index - (count - 1) / 2)


def _label_levels(axes: Axes, axis: Axis) -> None:
    """Label the levels of a factor along x. Long names are turned."""
    places = list(axis.places.values())
    axes.set_xticks(places, [str(level) for level in axis.places])
    margin = max(0.5 * axis.step, 0.06 * (max(places) - min(places)))
    axes.set_xlim(min(places) - margin, max(places) + margin)
    if max(len(str(level)) for level in axis.places) * len(places) > 40:
        axes.tick_params(axis="x", rotation=25)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(axis.label)


@matplotlib.rc_context(RC)
def tuning_curves(arms: list[Arm], key: str, metric: str) -> Figure:
    """Draw the mean of a metric and its interval against the values of a tuned key, a line for each arm.

    Of several tuned keys, the others have the best values of the arm. A circle marks the best value. A panel has at
    most eight arms.
    """
    panels = math.ceil(len(arms) / len(PALETTE))
    figure = Figure(figsize=(max(6.0, 4.4 * panels), panel_height(len(arms))), layout="constrained")
    axis = level_axis(pd.concat([arm.means for arm in arms], ignore_index=True), key)
    for number, axes in enumerate(figure.subplots(1, panels, sharey=True, squeeze=False)[0]):
        shown = arms[number * len(PALETTE) : (number + 1) * len(PALETTE)]
        for index, arm in enumerate(shown):
            others = {name: value for name, value in arm.best.items() if name != key}
            rows = arm.means[(arm.means[[*others]] == pd.Series(others, dtype=object)).all(axis=1)].sort_values(key)
            x = [axis.places[value] + _shift(axis, index, len(shown)) / 2 for value in rows[key]]
            style: dict[str, Any] = {"color": line_style(index)["color"], "marker": line_style(index)["marker"]}
            reach = [(rows["mean"] - rows["ci_low"]).fillna(0), (rows["ci_high"] - rows["mean"]).fillna(0)]
            axes.errorbar(x, rows["mean"], yerr=reach, label=arm.name, markersize=5, capsize=3, **style)
            best = [
                (place, mean)
                for place, mean, value in zip(x, rows["mean"], rows[key], strict=True)
                if value == arm.best[key]
            ]
            [ring] = axes.plot(*zip(*best, strict=True), "o", markersize=12, fillstyle="none", color=style["color"])
            in_group(ring, arm.name)
        _label_levels(axes, axis)
        axes.set_ylabel(y_label(metric))
    shared_legend(figure, "mean and 95 % t interval over the seeds for tuning; circle: the chosen value")
    return figure
