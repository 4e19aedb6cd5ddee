"""Figures of routing by layer and by position in the sequence."""

import math
import re
from typing import Any

import matplotlib
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.figures.style import (
    RC,
    begin_at_zero,
    interval_reach,
    label_layers,
    line_style,
    shared_legend,
    y_label,
)
from moe.analysis.statistics import with_intervals
from moe.metrics.catalog import select
from moe.results.conditions import STD, levels, narrowed
from moe.routing.axes import DECILES

METRICS = {metric.name: metric.axis for metric in select(shown="layer figures")}
DROP_RATE = "val_capacity/drop_rate"
DROP_RATES = [f"{DROP_RATE}/decile{decile}" for decile in range(DECILES)]
MAX_PANELS = 12  # more panels would be too small


def layers_of(columns: pd.Index, metric: str) -> dict[int, str]:
    """Return {layer: the column with `metric` in that layer}, sorted by layer."""
    found = {column: re.fullmatch(rf"{re.escape(metric)}/layer(\d+)", column) for column in columns}
    return dict(sorted((int(match[1]), column) for column, match in found.items() if match))


def with_layer_values(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows (runs or events) with a value of `metric` in some layer, and of their metrics only these values.

    The values become numbers. To select rows of hundreds of columns would take long.
    """
    columns = list(layers_of(table.columns, metric).values())
    rows = narrowed(table, ("folder", "step", "condition", *columns)).astype(dict.fromkeys(columns, float))
    return rows.dropna(subset=columns, how="all") if columns else rows[:0]


@matplotlib.rc_context(RC)
def layer_trends(events: pd.DataFrame, metric: str) -> Figure:
    """Draw a metric against the step, with a panel for each condition and a line for each layer.

    A line is the mean over the seeds that reached the step. `events` are evaluations with a column "condition", which
    has at most `MAX_PANELS` different values.
    """
    layers, panels = layers_of(events.columns, metric), levels(events["condition"])
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = {1: 7.2, 2: 9.6, 3: 10.8}[columns]
    figure = Figure(figsize=(width, 1.0 + 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    colors = colormaps["viridis"]([0.3 + 0.55 * rank / max(1, len(layers) - 1) for rank in range(len(layers))])
    for axes, condition in zip(grid, panels, strict=False):
        members = events[events["condition"] == condition]
        for (layer, column), color in zip(layers.items(), colors, strict=True):
            mean = members.groupby("step")[column].mean()
            axes.plot(mean, color=color, marker="." if len(mean) < 30 else "", label=f"layer {layer}")
        axes.set_title(f"{_in_lines(condition)} (n={members['folder'].nunique()})", fontsize="medium")
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:  # panels with no panel below them
        axes.set_xlabel("optimizer step")
        axes.tick_params(labelbottom=True)
    figure.supylabel(METRICS[metric], fontsize="medium")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
    return figure


def _in_lines(condition: str) -> str:
    """Return a condition with a line for each factor. A level that is a list, in parentheses, stays in one line."""
    return re.sub(r", (?![^()]*\))", "\n", condition)


@matplotlib.rc_context(RC)
def layer_profile(runs: pd.DataFrame) -> Figure:
    """Draw the final values of those `METRICS` that some run has against the layer, a line for each condition."""
    found = {metric: layers_of(runs.columns, metric) for metric in METRICS if len(with_layer_values(runs, metric))}
    across, rows = min(3, len(found)), math.ceil(len(found) / 3)
    figure = Figure(figsize=(max(6.4, 3.6 * across), _height(runs) + 3.2 * (rows - 1)), layout="constrained")
    grid = figure.subplots(rows, across, squeeze=False).flatten()
    for axes in grid[len(found) :]:
        axes.remove()
    for axes, (metric, columns) in zip(grid, found.items(), strict=False):
        _draw_conditions(axes, runs, list(columns.values()), list(columns))
        axes.set(xlabel="layer", ylabel=METRICS[metric])
        begin_at_zero(axes, metric)
        label_layers(axes, list(columns))
    several = "small: one seed; large: mean over n seeds and its 95 % t interval"
    shared_legend(figure, several if len(runs) > 1 else "")
    return figure


@matplotlib.rc_context(RC)
def drop_by_position(runs: pd.DataFrame) -> Figure:
    """Draw the drop rate at the final evaluation with a capacity limit, by decile of the sequence and condition."""
    figure = Figure(figsize=(6.4, _height(runs)), layout="constrained")
    axes = figure.subplots()
    _draw_conditions(axes, runs, DROP_RATES, list(range(1, DECILES + 1)))
    axes.set(
        xticks=range(1, DECILES + 1),
        xlabel="decile of the position in the sequence",
        ylabel=y_label(DROP_RATE),
    )
    axes.set_ylim(bottom=0)
    shared_legend(figure, "small: one seed; large: mean over n seeds and its 95 % t interval")
    return figure


def _draw_conditions(axes: Axes, runs: pd.DataFrame, columns: list[str], x: list[int]) -> None:
    """Draw the means over seeds of `columns` at `x`, with intervals. The lines of the conditions lie side by side."""
    runs = narrowed(runs, ("condition", *columns))
    names = levels(runs["condition"])
    for index, name in enumerate(names):
        members, style = runs[runs["condition"] == name], dict[str, Any](line_style(index))
        finite = members[columns].astype(float).replace([math.inf, -math.inf], math.nan)
        means = with_intervals(pd.DataFrame({"n": finite.count(), "mean": finite.mean(), STD: finite.std(ddof=1)}))
        if not means["n"].any():
            continue
        places = [place + 0.3 * ((index + 0.5) / len(names) - 0.5) for place in x]
        seeds = finite.dropna(how="all")
        axes.plot(places * len(seeds), seeds.to_numpy().ravel(), ".", color=style["color"], markersize=3, alpha=0.5)
        label = f"{name} (n={means['n'].max()})"
        axes.errorbar(
            places, means["mean"], yerr=interval_reach(means), fmt="", capsize=2, markersize=5, label=label, **style
        )


def _height(runs: pd.DataFrame) -> float:
    return 3.8 + 0.22 * math.ceil(runs["condition"].nunique() / 2)
