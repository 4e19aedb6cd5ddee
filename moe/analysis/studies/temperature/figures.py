"""The six figures of the temperature study, under its file names: tables in, matplotlib Figures out.

Every seed is thin or small, every mean thick or large with its 95 % t interval, and every legend says how many seeds.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.figures.style import RC
from moe.analysis.studies.temperature.data import (
    LOSS,
    TEMPERATURE,
    ablation,
    compare,
    constant_runs,
    curves,
    ranking,
    scheduled,
    seed_means,
    utilization,
    with_training,
)
from moe.analysis.studies.temperature.panels import (
    draw_against_temperature,
    draw_curves,
    draw_heatmap,
    draw_legend,
    draw_schedules,
    draw_table,
    looks,
    marks,
    routers,
    shades,
)

ACCURACY, BALANCE = "val/accuracy", "train/load_balance"
ENTROPIES = {"routing/entropy": "at the router's T", "routing/entropy_t1": "at T = 1"}
CONFIDENCES = {"routing/confidence": "at the router's T", "routing/confidence_t1": "at T = 1"}
GINIS = {"routing/load_gini": "mean over layers", "routing/load_gini/worst": "worst layer"}
OTHER_EXPERTS = (
    "Expert i of one layer or seed is not expert i of another: means by index hide imbalance, "
    "means by rank and the Gini of single layers do not."
)
TAUTOLOGY = """\
Temperature divides the logits: at the
router's temperature, entropy grows and
confidence falls with T by definition.
At temperature 1 they tell how training
changed the logits themselves.

Load-balance loss: E Σ f P, unweighted,
mean over layers and over the training
steps since the evaluation before;
dashed: balanced."""


@matplotlib.rc_context(RC)
def temperature_ablation_comprehensive(runs: pd.DataFrame, events: pd.DataFrame) -> Figure:
    """Loss and accuracy over steps and minutes, their final values and the entropy against temperature, a table."""
    figure = Figure(figsize=(15, 13), layout="constrained")
    panels = figure.subplot_mosaic(
        [["loss", "late", "minutes"], ["final", "final accuracy", "entropy"], ["accuracy", "late accuracy", "table"]]
    )
    style = shades(runs)
    draw_curves(panels["loss"], events, LOSS, TEMPERATURE, style)
    draw_curves(panels["late"], events, LOSS, TEMPERATURE, style, late=True)
    minutes = events.assign(minutes=events["time/elapsed"] / 60)
    draw_curves(panels["minutes"], minutes, LOSS, TEMPERATURE, style, x="minutes")
    panels["minutes"].set_xlabel("minutes of wall clock, evaluations included")
    draw_curves(panels["accuracy"], events, ACCURACY, TEMPERATURE, style)
    draw_curves(panels["late accuracy"], events, ACCURACY, TEMPERATURE, style, late=True)
    draw_against_temperature(panels["final"], runs, {LOSS: ""})
    draw_against_temperature(panels["final accuracy"], runs, {ACCURACY: ""})
    draw_against_temperature(panels["entropy"], runs, ENTROPIES)
    draw_table(panels["table"], _statistics(runs), widths=[0.43, 0.57])
    draw_legend(figure, panels["loss"], runs)
    return figure


@matplotlib.rc_context(RC)
def routing_dynamics(runs: pd.DataFrame, events: pd.DataFrame) -> Figure:
    """Entropy and confidence, at the router's temperature and at 1, over steps and at the end; load-balance loss."""
    figure = Figure(figsize=(17, 8.8), layout="constrained")
    panels = figure.subplot_mosaic([[*ENTROPIES, "entropies", BALANCE], [*CONFIDENCES, "confidences", "note"]])
    style = shades(runs)
    for column in (*ENTROPIES, *CONFIDENCES, BALANCE):
        draw_curves(panels[column], events, column, TEMPERATURE, style)
    panels[BALANCE].axhline(1, color="black", linewidth=1, linestyle="--")
    draw_against_temperature(panels["entropies"], runs, ENTROPIES)
    draw_against_temperature(panels["confidences"], runs, CONFIDENCES)
    panels["note"].axis("off")
    panels["note"].text(0, 0.95, TAUTOLOGY, va="top", linespacing=1.5)
    draw_legend(figure, panels["routing/entropy"], runs)
    return figure


@matplotlib.rc_context(RC)
def expert_utilization(runs: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """A panel per temperature: every expert's share of assignments, mean over layers, beside balance, 1/E."""
    style, experts = shades(table), len(table["shares"].iloc[0])
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
        f"{OTHER_EXPERTS}\n{routers(runs)}",
        fontsize="small",
    )
    figure.supylabel("share of assignments, last evaluation", fontsize="medium")
    return figure


@matplotlib.rc_context(RC)
def schedule_comparison(runs: pd.DataFrame, events: pd.DataFrame) -> Figure:
    """Loss, temperature and accuracy over steps, and final loss and accuracy, a color a schedule."""
    figure = Figure(figsize=(15, 9.4), layout="constrained")
    panels = figure.subplot_mosaic([[LOSS, "late", "temperature"], [ACCURACY, "final", "final accuracy"]])
    style = looks(runs)
    for column in (LOSS, "temperature", ACCURACY):
        draw_curves(panels[column], events, column, "schedule", style)
    draw_curves(panels["late"], events, LOSS, "schedule", style, late=True)
    draw_schedules(panels["final"], runs, LOSS, style)
    draw_schedules(panels["final accuracy"], runs, ACCURACY, style)
    draw_legend(figure, panels[LOSS], runs)
    return figure


@matplotlib.rc_context(RC)
def expert_utilization_analysis(runs: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Gini and variance of the load against temperature, shares by expert and by rank, and all of it as a table."""
    cells = table.groupby([TEMPERATURE, "steps"])
    heights = [4.2, 1.1 + 0.34 * len(cells), 0.3 + 0.3 * len(cells)]
    figure = Figure(figsize=(13, sum(heights) + 1.4), layout="constrained")
    panels = figure.subplot_mosaic(
        [["gini", "variance"], ["shares", "ranked"], ["table", "table"]], height_ratios=heights
    )
    draw_against_temperature(panels["gini"], table, GINIS)
    draw_against_temperature(panels["variance"], table, {"utilization/variance": ""})
    largest = max(float(np.stack(table[kind].tolist()).max()) for kind in ("shares", "ranked"))
    names = _names(table)
    for kind, label in (
        ("shares", "expert\n(mean over layers and seeds, by index)"),
        ("ranked", "experts of each layer from most to least used\n(mean over layers and seeds, by rank)"),
    ):
        values = np.stack([np.stack(members[kind].tolist()).mean(0) for _, members in cells])
        draw_heatmap(panels[kind], values, list(names.values()), label, largest=largest)
    panels["ranked"].tick_params(labelleft=False)
    draw_table(panels["table"], _utilization_statistics(table), widths=[0.15, 0.05, 0.2, 0.2, 0.2, 0.1, 0.1])
    figure.supxlabel(f"{marks(runs)}\n{OTHER_EXPERTS}\n{routers(runs)}", fontsize="small")
    return figure


@matplotlib.rc_context(RC)
def entropy_analysis(runs: pd.DataFrame, events: pd.DataFrame) -> Figure:
    """Entropy over steps and its rate of change, at the router's temperature and at temperature 1."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels, style = figure.subplots(2, 2), shades(runs)
    for (left, right), column in zip(panels, ENTROPIES, strict=True):
        draw_curves(left, events, column, TEMPERATURE, style)
        draw_curves(right, _rates(events, column), "rate", TEMPERATURE, style)
        right.axhline(0, color="black", linewidth=1, linestyle="--")
        right.set_ylabel(f"rate of change, {ENTROPIES[column]}\n(nats per 100 steps, from evaluation to evaluation)")
    draw_legend(figure, panels[0, 0], runs)
    return figure


class Sheet(NamedTuple):
    """A figure: its runs, the table made of their events, the final metrics that it needs, and who draws it."""

    members: Callable[[pd.DataFrame], pd.DataFrame | str]
    table: Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame | str]
    final: tuple[str, ...]
    draw: Callable[[pd.DataFrame, pd.DataFrame], Figure]


def _reading(*columns: str) -> Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame | str]:
    return lambda members, evals: curves(members, evals, columns)


SHEETS = [
    Sheet(
        ablation,
        _reading(LOSS, ACCURACY, "time/elapsed"),
        (LOSS, ACCURACY, *ENTROPIES),
        temperature_ablation_comprehensive,
    ),
    Sheet(ablation, _reading(*ENTROPIES, *CONFIDENCES, BALANCE), (*ENTROPIES, *CONFIDENCES), routing_dynamics),
    Sheet(ablation, utilization, tuple(GINIS), expert_utilization),
    Sheet(scheduled, _reading(LOSS, ACCURACY, "temperature"), (LOSS, ACCURACY), schedule_comparison),
    Sheet(constant_runs, utilization, tuple(GINIS), expert_utilization_analysis),
    Sheet(ablation, _reading(*ENTROPIES), (), entropy_analysis),
]


def temperature_figures(
    runs: pd.DataFrame, evals: pd.DataFrame, trains: pd.DataFrame
) -> Iterator[tuple[str, Figure | str]]:
    """Every figure by its file stem, or the reason why it cannot be drawn.

    `runs` is `load_runs` through `with_causality`; `evals` and `trains` are the events of both kinds of
    `read_event_tables`.
    """
    evals = with_training(evals, trains, BALANCE)
    for sheet in SHEETS:
        yield sheet.draw.__name__, _drawn(sheet, runs, evals)


def _drawn(sheet: Sheet, runs: pd.DataFrame, evals: pd.DataFrame) -> Figure | str:
    members = sheet.members(runs)
    if isinstance(members, str):
        return members
    absent = [column for column in sheet.final if column not in members or not np.isfinite(members[column]).any()]
    if absent:
        return f"no finished run has {', '.join(absent)}"
    table = sheet.table(members, evals)
    return table if isinstance(table, str) else sheet.draw(members, table)


def _rates(events: pd.DataFrame, column: str) -> pd.DataFrame:
    """Change per 100 steps between a run's evaluations, half-way between them."""
    runs = events.groupby("folder")
    between = runs["step"].diff()
    return events.assign(rate=100 * runs[column].diff() / between, step=events["step"] - between / 2).dropna(
        subset=["rate"]
    )


def _statistics(runs: pd.DataFrame) -> pd.DataFrame:
    """The ablation in nine lines: best and worst by the mean final loss, and whether they can be told apart."""
    losses = ranking(runs, TEMPERATURE)
    best, worst = losses.iloc[0], losses.iloc[-1]
    rivals = compare(runs, TEMPERATURE, best[TEMPERATURE])
    lines = {
        "best temperature": f"{best[TEMPERATURE]:g}",
        "its final loss": f"{_interval(best, '.4g')}, n={int(best['n'])}",
        "worst temperature": f"{worst[TEMPERATURE]:g}",
        "its final loss ": f"{_interval(worst, '.4g')}, n={int(worst['n'])}",
        "improvement": f"{100 * (1 - best['mean'] / worst['mean']):.3g} %",
    }
    if len(rivals):
        pair = rivals[rivals["level"] == worst[TEMPERATURE]].iloc[0]
        undecided = ", ".join(f"{level:g}" for level in rivals.loc[~rivals["decided"], "level"])
        lines["worst − best, paired"] = f"{_interval(pair.rename({'difference': 'mean'}), '.3g')}, n={pair['n']}"
        lines["not told from the best"] = undecided or "none"
    lines["temperatures tested"] = f"{len(losses)}"
    lines["interval"] = "95 % t over n seeds"
    return pd.DataFrame(lines.items(), columns=["final validation loss", "nats per token"])


def _utilization_statistics(table: pd.DataFrame) -> pd.DataFrame:
    metrics = {
        "Gini, mean over layers": "routing/load_gini",
        "Gini, worst layer": "routing/load_gini/worst",
        "variance, mean over layers": "utilization/variance",
    }
    rows, names = [], _names(table)
    for cell, members in table.groupby([TEMPERATURE, "steps"]):
        row = {"condition": names[cell], "n": f"{len(members)}"}
        for name, metric in metrics.items():
            row[name] = _interval(seed_means(members, ["steps"], metric).iloc[0], ".3g")
        row |= {f"{end} share": f"{members[f'utilization/{end}'].mean():.3f}" for end in ("min", "max")}
        rows.append(row)
    return pd.DataFrame(rows)


def _names(table: pd.DataFrame) -> dict[Any, str]:
    """Temperature and steps of every condition -> its name, which says the steps if they vary."""
    length = ", {} steps" if table["steps"].nunique() > 1 else ""
    return {cell: f"T = {cell[0]:g}{length.format(cell[1])}" for cell in table.groupby([TEMPERATURE, "steps"]).groups}


def _interval(row: pd.Series, digits: str) -> str:
    if math.isnan(row["ci_low"]):
        return f"{row['mean']:{digits}}"
    return f"{row['mean']:{digits}} [{row['ci_low']:{digits}}, {row['ci_high']:{digits}}]"
