"""What the panels of the temperature study's figures are made of: curves, values against temperature, heatmaps, tables.

Functions draw a table on axes. A style maps each level of a factor to the color, dash and label of its lines.
"""

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from moe.analysis.figures.style import axis_label, look
from moe.analysis.studies.temperature.data import TEMPERATURE, seed_means

Style = dict[Any, dict[str, Any]]


def shades(runs: pd.DataFrame) -> Style:
    """Temperatures from cold and dark to hot and light; neighbors differ in dash too."""
    temperatures = sorted(runs[TEMPERATURE].unique())
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(temperatures)))  # its yellow is lost on white
    return {
        temperature: {"color": color, "linestyle": ("-", "--")[index % 2], "label": f"T = {temperature:g}"}
        for index, (temperature, color) in enumerate(zip(temperatures, colors, strict=True))
    }


def looks(runs: pd.DataFrame) -> Style:
    """Schedules, in the colors of other conditions; what is compared with them, the constant temperature, is black."""
    names = sorted(set(runs["schedule"]) - {"constant"})
    style: Style = {name: {**look(index), "label": name} for index, name in enumerate(names)}
    if "constant" in set(runs["schedule"]):
        temperature = f"{runs[TEMPERATURE].iloc[0]:g}"
        style["constant"] = {"color": "black", "linestyle": "--", "marker": "D", "label": f"constant at {temperature}"}
    return style


def draw_curves(
    axes: Axes, events: pd.DataFrame, column: str, by: str, style: Style, *, x: str = "step", late: bool = False
) -> None:
    """A thin line a run, a thick one and a band the mean over seeds at each step; `late`: the second half of steps.

    Along another x than the step, the mean of x over seeds stands under the mean of the column.
    """
    if late:
        events = events[events["step"] >= events["step"].max() / 2]
        axes.set_title("second half of the steps", fontsize="medium")
    for level, look_of in style.items():
        members = events[events[by] == level]
        color, n = look_of["color"], members["folder"].nunique()
        for _, run in members.groupby("folder"):
            axes.plot(run[x], run[column], color=color, linewidth=0.6, alpha=0.45)
        means = seed_means(members, ["step"], column)
        means = means[means["n"] == n]  # a mean over fewer seeds would jump
        places = means["step"].map(members.groupby("step")[x].mean())
        axes.fill_between(places, means["ci_low"], means["ci_high"], color=color, alpha=0.1, linewidth=0)
        axes.plot(
            places,
            means["mean"],
            color=color,
            linestyle=look_of["linestyle"],
            linewidth=2,
            marker="." if len(means) < 5 else "",
            label=f"{look_of['label']} (n={n})",
        )
    axes.set(xlabel="optimizer step", ylabel=axis_label(column))


def draw_against_temperature(axes: Axes, runs: pd.DataFrame, metrics: dict[str, str]) -> None:
    """Final values against the temperature, a line a seed; `metrics`: column -> what tells it from the others.

    Runs of another length are another series: their values are not averaged with those of the first.
    """
    temperatures = sorted(runs[TEMPERATURE].unique())
    several = runs["steps"].nunique() > 1
    lengths = [(f"{steps} steps" if several else "", members) for steps, members in runs.groupby("steps")]
    series = [(metric, name, length, members) for length, members in lengths for metric, name in metrics.items()]
    for index, (metric, name, length, members) in enumerate(series):
        style, shift = look(index), 1.03**index  # side by side, and means beside their seeds
        for _, seed in members.sort_values(TEMPERATURE).groupby("seed"):
            place, color = seed[TEMPERATURE] * shift, style["color"]
            axes.plot(place, seed[metric], color=color, marker=style["marker"], markersize=4, linewidth=0.7, alpha=0.5)
        means = seed_means(members, [TEMPERATURE], metric)
        label = ", ".join(filter(None, [name, length]))
        _draw_means(axes, means[TEMPERATURE] * shift * 1.02, means, style, label)
    axes.set_xscale("log")
    axes.set_xticks(temperatures, [f"{temperature:g}" for temperature in temperatures])
    axes.minorticks_off()
    axes.set(xlabel="router temperature (log scale)", ylabel=f"final {axis_label(next(iter(metrics)))}")
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="small", borderaxespad=0)


def draw_schedules(axes: Axes, runs: pd.DataFrame, metric: str, style: Style) -> None:
    """Final values of every schedule: seeds as points, their mean and interval beside them."""
    for place, (name, look_of) in enumerate(style.items()):
        members = runs[runs["schedule"] == name]
        seeds = {"linestyle": "", "markersize": 4, "alpha": 0.6, "marker": look_of["marker"]}
        axes.plot([place] * len(members), members[metric], color=look_of["color"], **seeds)
        means = seed_means(members, ["schedule"], metric)
        _draw_means(axes, pd.Series(place + 0.15, means.index), means, look_of, name)
    axes.set_xticks(range(len(style)), [look_of["label"].replace(" at ", "\nat ") for look_of in style.values()])
    axes.set_xlim(-0.5, len(style) - 0.5)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(f"final {axis_label(metric)}")


def draw_heatmap(axes: Axes, values: np.ndarray, rows: list[str], label: str, *, largest: float) -> None:
    """Shares of assignments, (conditions, E), written into their cells; the color scale goes from 0 to `largest`."""
    axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=largest)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.6 * largest else "black"
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(values.shape[1]))
    axes.grid(visible=False)
    axes.set_xlabel(label)


def draw_table(axes: Axes, table: pd.DataFrame, *, widths: list[float]) -> None:
    """A table of text that fills the axes; `widths` are shares of them, a column each."""
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
    """The legend of all panels, below them, under lines that say what the marks and the runs are."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), 4)
    style: dict[str, Any] = {"ncols": columns, "fontsize": "small", "title_fontsize": "small", "handlelength": 3.2}
    figure.legend(handles, labels, loc="outside lower center", title=f"{marks(runs)}\n{routers(runs)}", **style)


def marks(runs: pd.DataFrame) -> str:
    """What is drawn thin and thick, small and large, and that there is no interval if there is a single seed."""
    one = "" if runs["seed"].nunique() > 1 else " (n=1: a single seed, so there is no interval)"
    return f"thin or small: one seed; thick or large: mean over n seeds; band or bar: its 95 % t interval{one}"


def routers(runs: pd.DataFrame) -> str:
    """Which routers the runs have, with their causality, and how many steps."""
    names, steps = (", ".join(map(str, sorted(runs[column].unique()))) for column in ("router", "steps"))
    return f"router: {names}; steps: {steps}"


def _draw_means(axes: Axes, places: pd.Series, means: pd.DataFrame, style: dict[str, Any], name: str) -> None:
    counts = "–".join(map(str, sorted(means["n"].unique())))
    axes.errorbar(
        places,
        means["mean"],
        yerr=(means["mean"] - means["ci_low"]).fillna(0),  # below two seeds there is no interval
        fmt=style["marker"],
        color=style["color"],
        markersize=8,
        markeredgecolor="white",
        capsize=4,
        label=f"{name} (n={counts})".lstrip(),
    )
