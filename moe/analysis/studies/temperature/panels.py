"""Draw panels of the temperature study's figures: curves, values against temperature, heatmaps and tables.

Each function draws a table on axes. A `Style` maps each level of a factor to the color, dash and label of its lines.
"""

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from moe.analysis.figures.curves import draw_runs
from moe.analysis.figures.marks import with_hover
from moe.analysis.figures.style import axis_label, begin_at_zero, line_style, y_label
from moe.analysis.studies.temperature.data import TEMPERATURE, seed_means

Style = dict[Any, dict[str, Any]]


def temperature_style(runs: pd.DataFrame) -> Style:
    """Return the style of temperatures, from dark (low) to light (high); neighbors differ in dash too."""
    temperatures = sorted(runs[TEMPERATURE].unique())
    colors = matplotlib.colormaps["viridis"](
        np.linspace(0, 0.88, len(temperatures))
    )  # its yellow is invisible on white
    return {
        temperature: {"color": color, "linestyle": ("-", "--")[index % 2], "label": f"T = {temperature:g}"}
        for index, (temperature, color) in enumerate(zip(temperatures, colors, strict=True))
    }


def schedule_style(runs: pd.DataFrame) -> Style:
    """Return the style of schedules; the constant temperature, with which they are compared, is black."""
    names = sorted(set(runs["schedule"]) - {"constant"})
    style: Style = {name: {**line_style(index), "label": name} for index, name in enumerate(names)}
    if "constant" in set(runs["schedule"]):
        temperature = f"{runs[TEMPERATURE].iloc[0]:g}"
        style["constant"] = {"color": "black", "linestyle": "--", "marker": "D", "label": f"constant at {temperature}"}
    return style


def draw_curves(
    axes: Axes, events: pd.DataFrame, column: str, by: str, style: Style, *, x: str = "step", late: bool = False
) -> None:
    """Draw each run as a thin line, and the mean over seeds at each step as a thick line with a band.

    With `late`, only the second half of the steps is drawn. If `x` is not the step, a mean is drawn at the mean of x.
    """
    events = events.dropna(subset=[column])
    if late:
        events = events[events["step"] >= events["step"].max() / 2]
        axes.set_title("second half of the steps", fontsize="medium")
    for level, line in style.items():
        members = events[events[by] == level]
        color, n = line["color"], members["folder"].nunique()
        draw_runs(axes, members, column, {"color": color, "linewidth": 0.6, "alpha": 0.45}, x=x)
        means = seed_means(members, ["step"], column)
        means = means[means["n"] == n]  # a mean over fewer seeds would make the line jump
        places = means["step"].map(members.groupby("step")[x].mean())
        axes.fill_between(places, means["ci_low"], means["ci_high"], color=color, alpha=0.1, linewidth=0)
        axes.plot(
            places,
            means["mean"],
            color=color,
            linestyle=line["linestyle"],
            linewidth=2,
            marker="." if len(means) < 5 else "",
            label=f"{line['label']} (n={n})",
        )
    axes.set(xlabel="optimizer step", ylabel=y_label(column))


def draw_against_temperature(axes: Axes, runs: pd.DataFrame, metrics: dict[str, str]) -> None:
    """Draw final values against the temperature, a line for each seed. `metrics` maps columns to names in the legend.

    Runs of different lengths are separate series; they are never averaged. Means have no intervals: whether a
    temperature has an effect is a question about differences between runs of the same seed, as the thin lines show.
    """
    temperatures = sorted(runs[TEMPERATURE].unique())
    several = runs["steps"].nunique() > 1
    lengths = [(f"{steps} steps" if several else "", members) for steps, members in runs.groupby("steps")]
    series = [(metric, name, length, members) for length, members in lengths for metric, name in metrics.items()]
    for index, (metric, name, length, members) in enumerate(series):
        style, shift = line_style(index), 1.03**index  # series lie side by side
        for seed, run in members.sort_values(TEMPERATURE).groupby("seed"):
            look: dict[str, Any] = {"color": style["color"], "marker": style["marker"]}
            [line] = axes.plot(run[TEMPERATURE] * shift, run[metric], markersize=4, linewidth=0.7, alpha=0.5, **look)
            with_hover(line, [f"seed {seed}"] * len(run))
        means = seed_means(members, [TEMPERATURE], metric)
        label = ", ".join(filter(None, [name, length]))
        _draw_means(axes, means[TEMPERATURE] * shift, means, style, label)
    axes.set_xscale("log")
    axes.set_xticks(temperatures, [f"{temperature:g}" for temperature in temperatures])
    axes.minorticks_off()
    axes.set(xlabel="router temperature (log scale)", ylabel=f"final {axis_label(next(iter(metrics)))}")
    begin_at_zero(axes, next(iter(metrics)))
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="small", borderaxespad=0)


def draw_schedules(axes: Axes, runs: pd.DataFrame, metric: str, style: Style) -> None:
    """Draw final values of every schedule: each seed as points that a thin line joins, and the means."""
    table = runs.pivot_table(metric, "seed", "schedule", sort=False).reindex(columns=list(style))
    for seed, values in table.iterrows():
        [joined] = axes.plot(range(len(style)), values, color="gray", linewidth=0.7, alpha=0.5)
        with_hover(joined, [f"seed {seed}"] * len(style))
    for place, (name, line) in enumerate(style.items()):
        members = runs[runs["schedule"] == name]
        seeds = {"linestyle": "", "markersize": 4, "alpha": 0.6, "marker": line["marker"]}
        [points] = axes.plot([place] * len(members), members[metric], color=line["color"], **seeds)
        with_hover(points, members["seed"].map("seed {}".format))
        means = seed_means(members, ["schedule"], metric)
        _draw_means(axes, pd.Series(float(place), means.index), means, line, line["label"])
    axes.set_xticks(range(len(style)), [line["label"].replace(" at ", "\nat ") for line in style.values()])
    axes.set_xlim(-0.5, len(style) - 0.5)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(f"final {axis_label(metric)}")


def _draw_means(axes: Axes, x: pd.Series, means: pd.DataFrame, style: dict[str, Any], name: str) -> None:
    """Draw means over seeds as large marks at `x`. The label contains n; marks without a name have none."""
    counts = "–".join(map(str, sorted({int(n) for n in means["n"].dropna()})))
    look = {"color": style["color"], "marker": style["marker"], "markersize": 8, "markeredgecolor": "white"}
    [marks] = axes.plot(x, means["mean"], linestyle="", label=name and f"{name} (n={counts})", **look)
    with_hover(marks, [f"mean over {n} seeds" for n in means["n"]])


def draw_heatmap(axes: Axes, values: np.ndarray, rows: list[str], label: str, *, largest: float) -> None:
    """Draw shares of assignments, (conditions, E), with their numbers; the color scale goes from 0 to `largest`."""
    axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=largest)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.6 * largest else "black"
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(values.shape[1]))
    axes.grid(visible=False)
    axes.set_xlabel(label)


def draw_table(axes: Axes, table: pd.DataFrame, *, widths: list[float]) -> None:
    """Draw a table of text that fills the axes; `widths` are the columns' shares of the width."""
    axes.axis("off")
    cells = axes.table(
        table.to_numpy().tolist(), colLabels=table.columns.tolist(), colWidths=widths, cellLoc="left", bbox=Bbox.unit()
    )
    cells.auto_set_font_size(False)
    cells.set_fontsize(9)
    for (row, _), cell in cells.get_celld().items():
        cell.set(edgecolor="#cccccc", facecolor="#f2f2f2" if row == 0 else "white")
        cell.PAD = 0.03


def draw_legend(figure: Figure, axes: Axes, runs: pd.DataFrame) -> None:
    """Draw one legend below all panels; its title says what the marks mean and which runs are drawn."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), 4)
    style: dict[str, Any] = {"ncols": columns, "fontsize": "small", "title_fontsize": "small", "handlelength": 3.2}
    figure.legend(
        handles, labels, loc="outside lower center", title=f"{marks_explained(runs)};\n{runs_explained(runs)}", **style
    )


def marks_explained(runs: pd.DataFrame) -> str:
    """Return what thin and thick, small and large mean; with a single seed, also that there is no interval."""
    one = "" if runs["seed"].nunique() > 1 else " (n=1: a single seed, so there is no band)"
    return f"thin or small: one seed; thick or large: mean over n seeds; band: 95 % t interval of the mean{one}"


def runs_explained(runs: pd.DataFrame) -> str:
    """Return which routers the runs have, with their causality, and how many steps."""
    names, steps = (", ".join(map(str, sorted(runs[column].unique()))) for column in ("router", "steps"))
    return f"router: {names}; steps: {steps}"
