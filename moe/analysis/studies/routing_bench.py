"""Figures of the routing bench: quality against speed of routers and capacity factors, and its experiment B."""

from collections.abc import Iterator

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.figures.curves import CURVES_TITLE, draw_curves, range_since
from moe.analysis.figures.drawing import Drawing, drawing
from moe.analysis.figures.style import (
    DASHES,
    MARKER_SHAPES,
    PALETTE,
    RC,
    interval_reach,
    panel_height,
    shared_legend,
    y_label,
)
from moe.analysis.report.blocks import ReportBlock, figure_section
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.sections.cost import about_speeds
from moe.analysis.statistics import with_intervals
from moe.results.conditions import conditions, levels, summary, varied_factors
from moe.results.frontier import pareto_front, stem, with_training_means
from moe.results.table import EventTables
from moe.runs.events import WARM_UP

SPEED = {
    "tokens_per_s": "training speed, tokens per second (median over steps, higher is better)",
    "tflops": "training speed, TFLOP/s (3 x forward FLOPs, median over steps, higher is better)",
}


@matplotlib.rc_context(RC)
def frontier(runs: pd.DataFrame, x: str) -> Figure:
    """Draw perplexity against a speed, tokens_per_s or tflops: a color for each router, a marker for each capacity.

    `runs` are those of `moe.results.frontier.with_training_means`. A Pareto front joins the means that no other
    condition beats in both. Routers that are not causal have one of their own, because they see later tokens.
    """
    figure = Figure(figsize=(8.4, 1.2 + panel_height(len(runs.groupby(["router", "capacity"])))), layout="constrained")
    axes = figure.subplots()
    routers, capacities = levels(runs["router"]), levels(runs["capacity"])
    means = []
    for cell, members in conditions(runs, ["router", "capacity"]):
        color = PALETTE[routers.index(cell["router"]) % len(PALETTE)]
        marker = MARKER_SHAPES[capacities.index(cell["capacity"]) % len(MARKER_SHAPES)]
        axes.plot(members[x], members["val/perplexity"], marker, color=color, markersize=4, alpha=0.6)
        mean = with_intervals(summary(members, [], [x, "val/perplexity"])).set_index("metric")
        reach = interval_reach(mean)
        means.append(mean["mean"].to_dict() | {"causal": not (members["causal"] == False).any()})  # noqa: E712
        axes.errorbar(
            mean.loc[x, "mean"],
            mean.loc["val/perplexity", "mean"],
            xerr=reach[x],
            yerr=reach["val/perplexity"],
            fmt=marker,
            color=color,
            markersize=9,
            markeredgecolor="white",
            capsize=4,
            label=f"{cell['router']}, capacity {cell['capacity']} (n={mean['n'].min()})",
        )
    left, top = max(0.0, axes.get_xlim()[0]), axes.get_ylim()[1]  # a speed is never negative, even if its interval is
    for causal, points in pd.DataFrame(means).groupby("causal", sort=False):
        front = pareto_front(points[[x, "val/perplexity"]], x, "val/perplexity")
        corners = [(left, front["val/perplexity"].min()), *front.itertuples(index=False), (front[x].max(), top)]
        label, line = ("causal", "-") if causal else ("not causal", ":")
        along, across = zip(*corners, strict=True)
        axes.step(along, across, where="pre", color="black", linestyle=line, label=f"Pareto front, {label}", zorder=1)
    axes.set(xlim=(left, None), ylim=(None, top), xlabel=SPEED[x], ylabel="validation perplexity (lower is better)")
    shared_legend(figure, "small: one seed; large: mean over n seeds and its 95 % t intervals")
    return figure


@matplotlib.rc_context(RC)
def overlay(events: pd.DataFrame, by: str) -> Figure:
    """Draw training loss, validation loss and perplexity against the step: each run thin, the means thick.

    The first quarter of training is left out, because its losses are so large that differences between conditions
    would be invisible. `events` are both kinds of events, joined with the column `by` of the runs.
    """
    figure = Figure(figsize=(8.4, 6.0 + panel_height(events[by].nunique())), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    quarter = events["step"].max() / 4
    for axes, column in zip(panels, ("train/loss", "val/loss", "val/perplexity"), strict=True):
        draw_curves(axes, events, column, by)
        axes.set(ylabel=y_label(column), xlim=(quarter, None), ylim=range_since(events, column, quarter))
    panels[-1].set_xlabel("optimizer step, without the first quarter")
    shared_legend(figure, CURVES_TITLE)
    return figure


@matplotlib.rc_context(RC)
def capacity_lines(rows: pd.DataFrame, column: str) -> Figure:
    """Draw a column, avg_drop_rate or tokens_per_s, against the capacity factor.

    There is a line for each combination of experts (color) and experts per token (dash).
    """
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    experts, ks = sorted(rows["num_experts"].unique()), sorted(rows["top_k"].unique())
    for (e, k), line in rows.groupby(["num_experts", "top_k"]):
        axes.plot(
            line["capacity_factor"],
            line[column],
            color=PALETTE[experts.index(e) % len(PALETTE)],
            linestyle=DASHES[ks.index(k) % len(DASHES)],
            marker=MARKER_SHAPES[ks.index(k) % len(MARKER_SHAPES)],
            markersize=4,
            label=f"E={e}, K={k}",
        )
    axes.set_xlabel("capacity factor")
    axes.set_ylabel(y_label(column))
    axes.set_ylim(bottom=0)
    shared_legend(figure, f"random routing of {rows['num_tokens'].iloc[0]:,} tokens, {rows['device'].iloc[0]}")
    return figure


def quality_against_speed(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield quality against speed for a sweep over routers or capacity factors."""
    yield from figure_section("Quality against speed", _drawings(inputs))


def _drawings(inputs: ReportInputs) -> Iterator[Drawing]:
    if name := stem(inputs.runs):
        yield from _frontier_drawings(inputs.runs, inputs.past, name)
        caption = "Training loss, validation loss and perplexity against the step."
        yield drawing(f"{name}_overlay", caption, inputs.too_many_lines() or _overlay(inputs))


def _frontier_drawings(runs: pd.DataFrame, past: EventTables, begin: str) -> Iterator[Drawing]:
    """Yield perplexity against both measures of speed, for runs that differ in router, capacity and seed alone.

    A key of the router, such as router.k, makes different routers of one name.
    """
    table = with_training_means(runs, past)
    factors = varied_factors(runs)
    keys = [factor for factor in factors if factor.startswith("router.")]
    if keys:
        arms = table[["router", *keys]].itertuples(index=False, name=None)
        named = ((router, *map("{} {}".format, keys, values)) for router, *values in arms)
        table = table.assign(router=[", ".join(parts) for parts in named])
    others = [factor for factor in factors if factor not in ("router", "capacity", "seed", *keys)]
    for name, x in ((f"{begin}_frontier", "tokens_per_s"), (f"{begin}_frontier_tflops", "tflops")):
        if others:
            result: Figure | str = f"{', '.join(others)} varies in addition to router and capacity"
        elif "val/perplexity" not in table or table[[x, "val/perplexity"]].dropna().empty:
            result = _missing(table)
        else:
            result = frontier(table, x)
        yield drawing(name, f"Perplexity against {SPEED[x].split(' (')[0]}. {about_speeds(runs)}".rstrip(), result)


def _missing(table: pd.DataFrame) -> str:
    """Return which metric of the figures of quality against speed no run has."""
    metrics = ("time/tokens_per_s", "val/perplexity")
    missing = [metric for metric in metrics if metric not in table or table[metric].isna().all()]
    if table.empty or not missing:
        return f"no finished run has both {' and '.join(metrics)}"
    speed = f"; speed needs more than {WARM_UP} steps" if metrics[0] in missing else ""
    return f"no finished run has {' or '.join(missing)}{speed}"


def _overlay(inputs: ReportInputs) -> Figure | str:
    columns = ["train/loss", "val/loss", "val/perplexity"]
    past = [events.filter(["folder", "step", *columns]) for events in (inputs.past.trains, inputs.past.evals)]
    events = inputs.with_condition(pd.concat(past))
    absent = [column for column in columns if column not in events]
    return f"no run has {', '.join(absent)}" if absent else overlay(events, "condition")
