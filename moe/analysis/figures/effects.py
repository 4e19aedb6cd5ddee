"""Figures of experiments: every function takes a table and returns a matplotlib Figure; nothing global, nothing saved.

Every seed is a point, intervals are 95 % t intervals of the mean over seeds, and the legend says how many there are.
"""

import math
from textwrap import shorten

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.figures.style import DASHES, MARKERS, OTHER_LABELS, PALETTE, RC, axis_label, legend, look
from moe.analysis.statistics import with_intervals
from moe.results.conditions import by_seed, conditions, levels, summary
from moe.results.frontier import pareto_front


@matplotlib.rc_context(RC)
def noise_lb(runs: pd.DataFrame) -> Figure:
    """The noise study at a glance: perplexity and load CV against router noise, one color a load-balancing weight."""
    return _factor_panels(runs, "noise", "lb", ["val/perplexity", "routing/load_cv/pooled"])


@matplotlib.rc_context(RC)
def factor_plot(runs: pd.DataFrame, factor: str, hue: str, metric: str) -> Figure:
    """One metric against the levels of `factor`, evenly spaced, one color a level of `hue`."""
    return _factor_panels(runs, factor, hue, [metric])


@matplotlib.rc_context(RC)
def learning_curves(events: pd.DataFrame, by: str) -> Figure:
    """Validation loss against step: a thin line a run, a thick one their mean at the steps that all of them reached.

    `events` is `read_event_tables(...).evals` joined with the runs' column `by`.
    """
    half = events["step"].max() / 2
    late = _late(events, "val/loss", since=half)
    figure = Figure(figsize=(10.8, _height(events[by].nunique())), layout="constrained")
    whole, end = figure.subplots(1, 2)
    for axes in (whole, end):
        for index, level in enumerate(levels(events[by])):
            _draw_curves(axes, events[events[by] == level], "val/loss", f"{level}", look(index))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(axis_label("val/loss"))
    if late:
        end.set(xlim=(half, None), ylim=late, title="second half of training")
    else:
        end.remove()
    legend(figure, "thin: one run, thick: mean over n runs, as far as all of them got")
    return figure


@matplotlib.rc_context(RC)
def overlay(events: pd.DataFrame, by: str) -> Figure:
    """Training loss, validation loss and perplexity against step: a thin line a run, a thick one their mean.

    The first quarter is left out: it would dwarf what the conditions differ in. `events` are those of both kinds of
    `read_event_tables`, joined with the runs' column `by`.
    """
    figure = Figure(figsize=(8.4, 6.0 + _height(events[by].nunique())), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    quarter = events["step"].max() / 4
    for axes, column in zip(panels, ("train/loss", "val/loss", "val/perplexity"), strict=True):
        for index, level in enumerate(levels(events[by])):
            curves = events[events[by] == level].dropna(subset=[column])
            if len(curves):
                _draw_curves(axes, curves, column, f"{level}", look(index))
        axes.set(ylabel=axis_label(column), xlim=(quarter, None), ylim=_late(events, column, since=quarter))
    panels[-1].set_xlabel("optimizer step, without the first quarter")
    legend(figure, "thin: one run, thick: mean over n runs, as far as all of them got")
    return figure


SPEED = {
    "tokens_per_s": "training speed, tokens per second (median over steps, higher is better)",
    "tflops": "training speed, TFLOP/s (3 x forward FLOPs, median over steps, higher is better)",
}


@matplotlib.rc_context(RC)
def frontier(runs: pd.DataFrame, x: str) -> Figure:
    """Experiments A and C: perplexity against `x` (tokens_per_s, tflops), a color a router, a marker a capacity.

    `runs` are those of `moe.results.frontier.measured`. The front is that of the means: what no condition beats in
    both.
    """
    figure = Figure(figsize=(8.4, 1.2 + _height(len(runs.groupby(["router", "capacity"])))), layout="constrained")
    axes = figure.subplots()
    routers, capacities = levels(runs["router"]), levels(runs["capacity"])
    means = []
    for cell, members in conditions(runs, ["router", "capacity"]):
        color = PALETTE[routers.index(cell["router"]) % len(PALETTE)]
        marker = MARKERS[capacities.index(cell["capacity"]) % len(MARKERS)]
        axes.plot(members[x], members["val/perplexity"], marker, color=color, markersize=4, alpha=0.6)
        mean = with_intervals(summary(members, [], [x, "val/perplexity"])).set_index("metric")
        reach = (mean["mean"] - mean["ci_low"]).fillna(0)  # below two seeds there is no interval
        means.append(mean["mean"])
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
    left, top = max(0.0, axes.get_xlim()[0]), axes.get_ylim()[1]  # no speed is negative, even if an interval is
    front = pareto_front(pd.DataFrame(means), x, "val/perplexity")
    corners = [(left, front["val/perplexity"].min()), *front.itertuples(index=False), (front[x].max(), top)]
    axes.step(*zip(*corners, strict=True), where="pre", color="black", linewidth=1, zorder=1, label="Pareto front")
    axes.set(xlim=(left, None), ylim=(None, top), xlabel=SPEED[x], ylabel="validation perplexity (lower is better)")
    legend(figure, "small: one seed; large: mean over n seeds and its 95 % t intervals")
    return figure


@matplotlib.rc_context(RC)
def capacity_lines(rows: pd.DataFrame, column: str) -> Figure:
    """Experiment B: `column` (avg_drop_rate, tokens_per_s) against capacity factor, a line per (E, K).

    Color tells the number of experts, dash the experts per token.
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
            marker=MARKERS[ks.index(k) % len(MARKERS)],
            markersize=4,
            label=f"E={e}, K={k}",
        )
    axes.set_xlabel("capacity factor")
    axes.set_ylabel(axis_label(column))
    axes.set_ylim(bottom=0)
    legend(figure, f"random routing of {rows['num_tokens'].iloc[0]:,} tokens, {rows['device'].iloc[0]}")
    return figure


@matplotlib.rc_context(RC)
def forest(contrasts: pd.DataFrame, label: str) -> Figure:
    """Differences of contrasts with their 95 % t intervals, a row each; filled where Holm's correction leaves p < 0.05.

    `contrasts` are rows of `moe.analysis.statistics.contrasts` with an interval, all of the metric named `label`.
    """
    names = [
        f"{c.factor} {c.level} vs {c.reference}" + (f" at {c.within}" if c.within else "") + f" (n={c.n})"
        for c in contrasts.itertuples()
    ]
    names = [shorten(name, 90, placeholder=" …") for name in names]
    figure = Figure(figsize=(8.4, 1.4 + 0.28 * len(contrasts)), layout="constrained")
    axes = figure.subplots()
    for row, (_, c) in enumerate(contrasts.iterrows()):
        clear = c["ci_low"] > 0 or c["ci_high"] < 0
        color = PALETTE[1 if c["difference"] > 0 else 0] if clear else PALETTE[7]
        fill = color if c["p Holm"] < 0.05 else "white"
        axes.plot([c["ci_low"], c["ci_high"]], [row, row], color=color, linewidth=2)
        axes.plot(c["difference"], row, "o", color=color, markerfacecolor=fill, markersize=7)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    figure.supxlabel(
        f"difference in {label}, with its 95 % t interval; filled: p < 0.05 after Holm's correction", fontsize="medium"
    )
    return figure


BREAK = pd.Series([math.nan], index=[math.nan])  # between two runs: one broken line is drawn sooner than many


def _draw_curves(axes: Axes, events: pd.DataFrame, column: str, label: str, style: dict[str, str]) -> None:
    curves = events.pivot(index="step", columns="folder", values=column).astype(float)
    mean = curves.dropna().mean(axis=1)
    dot = "." if len(curves) < 30 else ""  # a single evaluation draws no line
    runs = pd.concat([pd.concat([curves[folder].dropna(), BREAK]) for folder in curves])
    axes.plot(runs, color=style["color"], linewidth=0.7, alpha=0.5, marker=dot, markersize=4)
    axes.plot(
        mean, color=style["color"], linestyle=style["linestyle"], linewidth=2.2, label=f"{label} (n={curves.shape[1]})"
    )


def _late(events: pd.DataFrame, column: str, *, since: float) -> tuple[float, float] | None:
    """The range of a column from step `since` on, with a margin: the steps before dwarf what conditions differ in."""
    late = events.loc[events["step"] >= since, column].astype(float)
    late = late[late.map(math.isfinite)]
    margin = 0.05 * (late.max() - late.min())
    return (late.min() - margin, late.max() + margin) if late.nunique() > 1 else None


def _factor_panels(runs: pd.DataFrame, factor: str, hue: str, metrics: list[str]) -> Figure:
    hues = runs[hue].nunique()
    width = max(5.4, 0.25 * runs[factor].nunique() * hues)
    figure = Figure(figsize=(width * len(metrics), _height(hues)), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        _draw(axes, runs, factor, hue, metric)
    legend(figure, "small: one seed, lines join a seed; large: mean over n seeds and its 95 % t interval")
    return figure


def _draw(axes: Axes, runs: pd.DataFrame, factor: str, hue: str, metric: str) -> None:
    """Seeds, means and intervals of one metric; the hues stand a little apart, so that equal values stay visible."""
    places, hues = levels(runs[factor]), levels(runs[hue])
    step = min(0.24, 0.7 / len(hues))
    for index, (cell, members) in enumerate(conditions(runs, [hue])):
        style = look(index)
        x = [place + step * (index - (len(hues) - 1) / 2) for place in range(len(places))]
        seeds = pd.DataFrame({place: by_seed(members[members[factor] == place], metric) for place in places})
        for _, values in seeds.iterrows():
            axes.plot(x, values, color=style["color"], linewidth=0.7, alpha=0.6, marker=style["marker"], markersize=4)
        means = with_intervals(summary(members, [factor], [metric])).set_index(factor).reindex(places)
        reach = (means["mean"] - means["ci_low"]).fillna(0)  # below two seeds there is no interval
        counts = sorted({int(n) for n in means["n"].dropna()})
        axes.errorbar(
            [place + 0.35 * step for place in x],  # beside its seeds, not on top of them
            means["mean"],
            yerr=reach,
            fmt=style["marker"],
            color=style["color"],
            markersize=8,
            markeredgecolor="white",
            capsize=4,
            label=f"{OTHER_LABELS.get(hue, '')} {cell[hue]} (n={'–'.join(map(str, counts))})".lstrip(),
        )
    axes.set_xticks(range(len(places)), [str(place) for place in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    if max(len(str(place)) for place in places) * len(places) > 40:
        axes.tick_params(axis="x", rotation=25)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(axis_label(factor))
    axes.set_ylabel(axis_label(metric))


def _height(legend_entries: int) -> float:
    """Inches: the panels keep their height however long the legend below them gets."""
    return 4.4 + 0.11 * legend_entries
