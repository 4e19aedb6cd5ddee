"""Draw the six figures of the temperature study, under the study's file names.

Seeds are thin lines or small points. Means are thick or large, those of curves with the 95 % t interval, and every
legend says how many seeds there are.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.figures.drawing import Drawing, drawing
from moe.analysis.figures.style import RC
from moe.analysis.studies.temperature.data import (
    TEMPERATURE,
    VALIDATION_LOSS,
    ablation,
    constant_runs,
    evaluation_curves,
    scheduled,
    with_every_temperature,
    with_training,
    with_utilization,
)
from moe.analysis.studies.temperature.panels import (
    draw_against_temperature,
    draw_curves,
    draw_heatmap,
    draw_legend,
    draw_schedules,
    draw_table,
    marks_explained,
    runs_explained,
    schedule_style,
    temperature_style,
)
from moe.analysis.studies.temperature.tables import ablation_statistics, condition_names, utilization_statistics

ACCURACY, LOAD_BALANCE = "val/accuracy", "train/load_balance"
ENTROPIES = {"routing/entropy": "at the router's T", "routing/entropy_t1": "at T = 1"}
CONFIDENCES = {"routing/confidence": "at the router's T", "routing/confidence_t1": "at T = 1"}
GINIS = {"routing/load_gini": "mean over layers", "routing/load_gini/worst": "worst layer"}
OTHER_EXPERTS = (
    "Expert i of one layer or seed is not expert i of another: means by index hide imbalance, "
    "means by rank and the Gini of single layers do not."
)
ENTROPY_NOTE = """\
Temperature divides the logits, so at the
router's temperature entropy grows and
confidence falls with T by definition.
At temperature 1 they show how training
changed the logits themselves.

Load-balance loss: E Σ f P, unweighted,
mean over layers and over the training
steps since the previous evaluation;
dashed: balanced."""


@matplotlib.rc_context(RC)
def temperature_ablation_comprehensive(runs: pd.DataFrame, events: pd.DataFrame) -> Figure:
    """Draw loss and accuracy over steps and minutes, their final values and the entropy by temperature, and a table."""
    figure = Figure(figsize=(15, 13), layout="constrained")
    panels = figure.subplot_mosaic(
        [["loss", "late", "minutes"], ["final", "final accuracy", "entropy"], ["accuracy", "late accuracy", "table"]]
    )
    style = temperature_style(runs)
    draw_curves(panels["loss"], events, VALIDATION_LOSS, TEMPERATURE, style)
    draw_curves(panels["late"], events, VALIDATION_LOSS, TEMPERATURE, style, late=True)
    minutes = events.assign(minutes=events["time/elapsed"] / 60)
    draw_curves(panels["minutes"], minutes, VALIDATION_LOSS, TEMPERATURE, style, x="minutes")
    panels["minutes"].set_xlabel(
        "minutes of wall clock, evaluations included\n(they depend on what else the machine did)"
    )
    draw_curves(panels["accuracy"], events, ACCURACY, TEMPERATURE, style)
    draw_curves(panels["late accuracy"], events, ACCURACY, TEMPERATURE, style, late=True)
    draw_against_temperature(panels["final"], runs, {VALIDATION_LOSS: ""})
    draw_against_temperature(panels["final accuracy"], runs, {ACCURACY: ""})
    draw_against_temperature(panels["entropy"], runs, ENTROPIES)
    draw_table(panels["table"], ablation_statistics(runs), widths=[0.43, 0.57])
    draw_legend(figure, panels["loss"], runs)
    return figure


@matplotlib.rc_context(RC)
def routing_dynamics(runs: pd.DataFrame, events: pd.DataFrame) -> Figure:
    """Draw entropy and confidence over steps and at the end, at two temperatures, and the load-balance loss."""
    figure = Figure(figsize=(17, 8.8), layout="constrained")
    panels = figure.subplot_mosaic([[*ENTROPIES, "entropies", LOAD_BALANCE], [*CONFIDENCES, "confidences", "note"]])
    style = temperature_style(runs)
    for column in (*ENTROPIES, *CONFIDENCES, LOAD_BALANCE):
        draw_curves(panels[column], events, column, TEMPERATURE, style)
    panels[LOAD_BALANCE].axhline(1, color="black", linewidth=1, linestyle="--")
    draw_against_temperature(panels["entropies"], runs, ENTROPIES)
    draw_against_temperature(panels["confidences"], runs, CONFIDENCES)
    panels["note"].axis("off")
    panels["note"].text(0, 0.95, ENTROPY_NOTE, va="top", linespacing=1.5)
    draw_legend(figure, panels["routing/entropy"], runs)
    return figure


@matplotlib.rc_context(RC)
def expert_utilization(runs: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Draw every expert's share of assignments, mean over layers, with a panel for each temperature."""
    style, experts = temperature_style(table), len(table["shares"].iloc[0])
    columns = min(4, len(style))
    rows = math.ceil(len(style) / columns)
    figure = Figure(figsize=(max(9.0, 3.7 * columns), 1.2 + 3.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, (temperature, members) in zip(panels, table.groupby(TEMPERATURE), strict=False):
        shares = np.stack(members["shares"].tolist())
        axes.bar(range(experts), shares.mean(0), color=style[temperature]["color"], alpha=0.75)
        axes.plot(shares.T, "o", color="black", markersize=3, markeredgecolor="white", markeredgewidth=0.5)
        axes.axhline(1 / experts, color="black", linewidth=1, linestyle="--")
        gini, worst = (members[column].mean() for column in GINIS)
        axes.set_title(
            f"T = {temperature:g} (n={len(members)})\nGini of a layer: mean {gini:.3f}, worst {worst:.3f}", fontsize=9.5
        )
        axes.set_xticks(range(experts))
        axes.grid(visible=False, axis="x")
    for axes in panels[len(style) :]:
        axes.remove()
    figure.supxlabel(
        "expert (bar: mean over layers and n seeds; point: a seed, mean over layers; dashed: balance, 1/E)\n"
        f"{OTHER_EXPERTS}\n{runs_explained(runs)}",
        fontsize="small",
    )
    figure.supylabel("share of assignments, last evaluation", fontsize="medium")
    return figure


@matplotlib.rc_context(RC)
def schedule_comparison(runs: pd.DataFrame, events: pd.DataFrame) -> Figure:
    """Draw loss, temperature and accuracy over steps, and final loss and accuracy, with a color for each schedule.

    The temperature is drawn at every training step, and the others at every evaluation.
    """
    figure = Figure(figsize=(15, 9.4), layout="constrained")
    panels = figure.subplot_mosaic([[VALIDATION_LOSS, "late", "temperature"], [ACCURACY, "final", "final accuracy"]])
    style = schedule_style(runs)
    for column in (VALIDATION_LOSS, "temperature", ACCURACY):
        draw_curves(panels[column], events, column, "schedule", style)
    draw_curves(panels["late"], events, VALIDATION_LOSS, "schedule", style, late=True)
    draw_schedules(panels["final"], runs, VALIDATION_LOSS, style)
    draw_schedules(panels["final accuracy"], runs, ACCURACY, style)
    draw_legend(figure, panels[VALIDATION_LOSS], runs)
    return figure


@matplotlib.rc_context(RC)
def expert_utilization_analysis(runs: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Draw Gini and variance of the load by temperature, shares by expert and by rank, and a table of them."""
    cells = table.groupby([TEMPERATURE, "steps"])
    heights = [4.2, 1.1 + 0.34 * len(cells), 0.3 + 0.3 * len(cells)]
    figure = Figure(figsize=(13, sum(heights) + 1.4), layout="constrained")
    panels = figure.subplot_mosaic(
        [["gini", "variance"], ["shares", "ranked"], ["table", "table"]], height_ratios=heights
    )
    draw_against_temperature(panels["gini"], table, GINIS)
    draw_against_temperature(panels["variance"], table, {"utilization/variance": ""})
    largest = max(float(np.stack(table[kind].tolist()).max()) for kind in ("shares", "ranked"))
    names = condition_names(table)
    for kind, label in (
        ("shares", "expert\n(mean over layers and seeds, by index)"),
        ("ranked", "experts of each layer from most to least used\n(mean over layers and seeds, by rank)"),
    ):
        values = np.stack([np.stack(members[kind].tolist()).mean(0) for _, members in cells])
        draw_heatmap(panels[kind], values, list(names.values()), label, largest=largest)
    panels["ranked"].tick_params(labelleft=False)
    draw_table(panels["table"], utilization_statistics(table), widths=[0.15, 0.05, 0.2, 0.2, 0.2, 0.1, 0.1])
    figure.supxlabel(f"{marks_explained(runs)}\n{OTHER_EXPERTS}\n{runs_explained(runs)}", fontsize="small")
    return figure


@matplotlib.rc_context(RC)
def entropy_analysis(runs: pd.DataFrame, events: pd.DataFrame) -> Figure:
    """Draw entropy and its rate of change over steps, at the router's temperature and at temperature 1."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels, style = figure.subplots(2, 2), temperature_style(runs)
    for (left, right), column in zip(panels, ENTROPIES, strict=True):
        draw_curves(left, events, column, TEMPERATURE, style)
        draw_curves(right, _rates(events, column), "rate", TEMPERATURE, style)
        right.axhline(0, color="black", linewidth=1, linestyle="--")
        right.set_ylabel(f"rate of change, {ENTROPIES[column]}\n(nats per 100 steps, from evaluation to evaluation)")
    draw_legend(figure, panels[0, 0], runs)
    return figure


class FigureRecipe(NamedTuple):
    """Functions and metrics that make one figure.

    members: function that selects the runs.
    table: function that takes these runs and their evaluations, and returns the table to draw.
    final: final metrics that the runs must have.
    draw: function that draws the figure. The file gets the name of this function.
    """

    members: Callable[[pd.DataFrame], pd.DataFrame | str]
    table: Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame | str]
    final: tuple[str, ...]
    draw: Callable[[pd.DataFrame, pd.DataFrame], Figure]
    caption: str


def _curves_of(*columns: str) -> Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame | str]:
    return lambda members, evals: evaluation_curves(members, evals, columns)


RECIPES = [
    FigureRecipe(
        ablation,
        _curves_of(VALIDATION_LOSS, ACCURACY, "time/elapsed"),
        (VALIDATION_LOSS, ACCURACY, *ENTROPIES),
        temperature_ablation_comprehensive,
        "Loss, accuracy and router entropy by temperature, over training and at its end.",
    ),
    FigureRecipe(
        ablation,
        _curves_of(*ENTROPIES, *CONFIDENCES, LOAD_BALANCE),
        (*ENTROPIES, *CONFIDENCES),
        routing_dynamics,
        "Router entropy, confidence and balance over training, by temperature.",
    ),
    FigureRecipe(
        ablation,
        with_utilization,
        tuple(GINIS),
        expert_utilization,
        "Share of assignments of each expert, by temperature.",
    ),
    FigureRecipe(
        scheduled,
        _curves_of(VALIDATION_LOSS, ACCURACY, "temperature"),
        (VALIDATION_LOSS, ACCURACY),
        schedule_comparison,
        "Loss, accuracy and temperature over training, by temperature schedule.",
    ),
    FigureRecipe(
        constant_runs,
        with_utilization,
        tuple(GINIS),
        expert_utilization_analysis,
        "Inequality of the experts' load against temperature.",
    ),
    FigureRecipe(
        ablation,
        _curves_of(*ENTROPIES),
        (),
        entropy_analysis,
        "Router entropy over training, and how fast it changes.",
    ),
]


def temperature_drawings(runs: pd.DataFrame, evals: pd.DataFrame, trains: pd.DataFrame) -> Iterator[Drawing]:
    """Yield every figure under its file name, or the reason why it cannot be drawn.

    `runs` is a table of `moe.results.table.load_runs` after `with_causality`. `evals` and `trains` are the events of
    both kinds of `moe.results.table.read_event_tables`.
    """
    evals = with_every_temperature(with_training(evals, trains, LOAD_BALANCE), trains)
    for recipe in RECIPES:
        yield drawing(recipe.draw.__name__, recipe.caption, _figure_or_reason(recipe, runs, evals))


def _figure_or_reason(recipe: FigureRecipe, runs: pd.DataFrame, evals: pd.DataFrame) -> Figure | str:
    members = recipe.members(runs)
    if isinstance(members, str):
        return members
    absent = [column for column in recipe.final if column not in members or not np.isfinite(members[column]).any()]
    if absent:
        return f"no finished run has {', '.join(absent)}"
    table = recipe.table(members, evals)
    return table if isinstance(table, str) else recipe.draw(members, table)


def _rates(events: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the change per 100 steps between two evaluations of a run, at the step half-way between them."""
    runs = events.groupby("folder")
    between = runs["step"].diff()
    return events.assign(rate=100 * runs[column].diff() / between, step=events["step"] - between / 2).dropna(
        subset=["rate"]
    )
