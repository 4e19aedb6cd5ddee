"""Figures of curves over training: every run is a thin line, the mean over the runs of a condition a thick one."""

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.figures.marks import with_hover
from moe.analysis.figures.style import RC, line_style, panel_height, plain_log_labels, shared_legend, y_label
from moe.metrics.catalog import select
from moe.results.conditions import levels, narrowed

CURVES_TITLE = "thin: one run, thick: mean over n runs, up to the last step that all of them reached"


@matplotlib.rc_context(RC)
def learning_curves(events: pd.DataFrame, by: str) -> Figure:
    """Draw the validation loss against the step, and beside it the second half of training alone.

    A thick line is the mean at the steps that all runs of a condition reached. `events` is
    `moe.results.table.read_event_tables(...).evals` joined with the column `by` of the runs.
    """
    events = narrowed(events, ("folder", "seed", "step", by, "val/loss"))
    half = events["step"].max() / 2
    late = range_since(events, "val/loss", half)
    figure = Figure(figsize=(10.8, panel_height(events[by].nunique())), layout="constrained")
    all_steps, second_half = figure.subplots(1, 2)
    for axes in (all_steps, second_half):
        draw_curves(axes, events, "val/loss", by)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(y_label("val/loss"))
    if late:
        second_half.set(xlim=(half, None), ylim=late, title="second half of training")
    else:
        second_half.remove()
    shared_legend(figure, CURVES_TITLE)
    return figure


@matplotlib.rc_context(RC)
def gradient_norms(trains: pd.DataFrame) -> Figure | str:
    """Draw gradient norms and relative updates of routers and experts by step.

    `trains` are events of training steps with a column "condition". Returns the reason as text if none has a gradient
    norm.
    """
    columns = {metric.name: metric.axis for metric in select(shown="gradient figure")}
    columns = {column: label for column, label in columns.items() if column in trains and trains[column].notna().any()}
    if not columns:
        return "no train event has a gradient norm"
    figure = Figure(figsize=(10.4, 7.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (column, label) in zip(panels.flat, columns.items(), strict=False):
        draw_curves(axes, trains, column, "condition")
        axes.set(ylabel=label, yscale="log")
        plain_log_labels(axes.yaxis)
    for axes in panels[-1]:
        axes.set_xlabel("optimizer step")
    shared_legend(figure, "thin: one run, thick: mean over n runs; gradients before clipping, updates at evaluations")
    return figure


def draw_runs(axes: Axes, events: pd.DataFrame, column: str, look: dict[str, Any], *, x: str = "step") -> None:
    """Draw each run as a line that names its seed.

    All runs are one line with gaps, which is drawn faster than many lines.
    """
    known = events.dropna(subset=[column]).sort_values("step")
    run = pd.factorize(known["folder"])[0]
    by_run, ends = np.argsort(run, kind="stable"), np.bincount(run).cumsum()
    seed, seeds = pd.factorize(known["seed"])
    names = np.array([f"seed {each}" for each in seeds], dtype=object)[seed]
    places, values = (np.insert(known[name].to_numpy(dtype=float)[by_run], ends, math.nan) for name in (x, column))
    [line] = axes.plot(places, values, **look)
    with_hover(line, np.insert(names[by_run], ends, ""))


def draw_curves(axes: Axes, events: pd.DataFrame, column: str, by: str) -> None:
    """Draw a column of events against the step, in a style for each level of `by`: each run thin, their mean thick."""
    of_level = dict(iter(events.dropna(subset=[column]).groupby(by)))
    for index, level in enumerate(levels(events[by])):
        if level not in of_level:
            continue
        style, members = line_style(index), of_level[level]
        curves = members.pivot(index="step", columns="folder", values=column).astype(float)
        mean = curves.dropna().mean(axis=1)
        dot = "." if len(curves) < 30 else ""  # without a dot, a single evaluation would be invisible
        look = {"color": style["color"], "linewidth": 0.7, "alpha": 0.5, "marker": dot, "markersize": 4}
        draw_runs(axes, members, column, look)
        line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 2.2}
        axes.plot(mean, label=f"{level} (n={curves.shape[1]})", **line)


def range_since(events: pd.DataFrame, column: str, step: float) -> tuple[float, float] | None:
    """Return the range of the curves of a column from a step on, with a margin; None if all values are equal.

    A figure with this range leaves out earlier steps. Their losses are so much larger that the differences between
    conditions would be invisible.
    """
    known = narrowed(events, ("folder", "step", column)).astype({column: float})
    known = known[np.isfinite(known[column])].sort_values(["folder", "step"], kind="stable")
    ends = np.flatnonzero(known["folder"].to_numpy()[1:] != known["folder"].to_numpy()[:-1]) + 1
    runs = [np.split(known[name].to_numpy(dtype=float), ends) for name in ("step", column)]
    at_step = [  # where a line enters the panel, between two evaluations
        np.interp(step, steps, values) for steps, values in zip(*runs, strict=True) if steps.size and steps[-1] >= step
    ]
    late = pd.Series([*known.loc[known["step"] >= step, column], *at_step])
    margin = 0.05 * (late.max() - late.min())
    return (late.min() - margin, late.max() + margin) if late.nunique() > 1 else None
