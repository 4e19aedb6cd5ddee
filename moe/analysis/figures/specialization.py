"""Figures of specialization by condition: what routing knows, how settled it is, what it is worth, how it is pulled.

They read what `python -m moe.specialization` wrote. Every seed is a point, intervals are 95 % t intervals over seeds.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe.analysis.figures import expert_grids
from moe.analysis.figures.expert_grids import Studied
from moe.analysis.figures.style import MOST_LINES, RC, legend, look
from moe.analysis.statistics import name_cell, with_intervals
from moe.metrics.catalog import select
from moe.results.conditions import conditions, summary, varied_factors

FILE = "specialization.json"
SEEDS_CAPTION = "small: one seed; large: mean over n seeds and its 95 % t interval"


def specialization_figures(runs: pd.DataFrame) -> Iterator[tuple[str, Figure | str]]:
    """Every figure by name, or why there is none; `runs` as `load_runs` returns them.

    Figures of single experts show the first seed of each condition.
    """
    every, reasons = _read(runs)
    if not every:
        yield "specialization", reasons or f"no run has a {FILE}: run python -m moe.specialization FOLDER"
        return
    first = [next(run for run in every if run.condition == name) for name in dict.fromkeys(r.condition for r in every)]
    first = [run for run in first if _shape(run) == _shape(first[0])]
    if len(first) > MOST_LINES:
        yield "specialization", f"{len(first)} conditions are too many"
        return
    several = [run for run in first if (run.found["coactivation_chance"][0] or 0) > 0]
    yield "expert_domains", expert_grids.domains(first)
    yield "specialization_information", information(every)
    yield "specialization_stability", stability(every)
    yield "expert_knockouts", expert_grids.knockouts(first)
    yield "expert_importance", importance(every)
    yield "route_regret", regret(every)
    moving = [run for run in every if run.found["landscape"]]
    yield "router_landscape", landscape(moving) if moving else "no router has weights to train"
    yield "expert_keywords", expert_grids.keywords(first[0])
    yield "expert_embeddings", expert_grids.embeddings(first[0])
    yield "expert_positions", expert_grids.positions(first)
    yield "expert_coactivation", expert_grids.coactivations(several) if several else "no token has more than one expert"


@matplotlib.rc_context(RC)
def information(runs: list[Studied]) -> Figure:
    """What domain and token id say about experts, by layer, beside what they say of shuffled routing."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _by_layer(left, runs, lambda found: [_get(entry, "adjusted") for entry in found["domain"]])
    _null(left, runs, lambda found: [_adjusted_null(entry) for entry in found["domain"]])
    _by_layer(middle, runs, lambda found: [_get(entry, "id", "adjusted") for entry in found["vocabulary"]["input"]])
    _null(middle, runs, lambda found: [_adjusted_null(_get(e, "id")) for e in found["vocabulary"]["input"]])
    _by_layer(right, runs, lambda found: _vocabulary(found, "normalized"))
    _null(right, runs, lambda found: _vocabulary(found, "null_high"))
    left.set_ylabel("domain: information / attainable, chance out")
    middle.set_ylabel("token id: information / attainable, chance out")
    right.set_ylabel("vocabulary specialization (mean largest share)")
    legend(figure, f"{SEEDS_CAPTION}; gray dash: 97.5 % quantile of shuffled routing")
    return figure


@matplotlib.rc_context(RC)
def stability(runs: list[Studied]) -> Figure:
    """Overlap with the final choices, choices that changed between traces, agreement of seeds; chance taken out."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _by_step(left, runs, "saturation")
    _by_step(middle, runs, "churn")
    agreeing = [run for run in runs if run.found.get("seed_agreement")]
    _by_pair(right, agreeing)
    left.set_ylabel("saturation: agreement with the last trace (κ)")
    middle.set_ylabel("churn: 1 - κ with the trace before")
    right.set_ylabel("agreement with other seeds, matched (κ)")
    if not agreeing:
        right.set_title("no two runs differ in their seed only", fontsize="small")
    left.set_ylim(None, 1.03)
    middle.set_ylim(0, None)
    right.set_ylim(min(0, right.get_ylim()[0]), None)
    scale = "κ: 1 the same, 0 as shuffled tokens with these loads"
    marks = "left, middle: mean over layers, thin a run, thick all; right: small a pair of seeds, large their mean"
    legend(figure, f"{scale};\n{marks}")
    return figure


@matplotlib.rc_context(RC)
def importance(runs: list[Studied]) -> Figure:
    """How much the loss rises without an expert against how much work it has, and their rank correlation."""
    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    panels = figure.subplots(1, 2)
    methods = {"rerouted": "its tokens re-routed", "zeroed": "its output zeroed"}
    for axes, (method, words) in zip(panels, methods.items(), strict=True):
        for style, name, members in _styled(runs):
            found = [run.found["knockout"][method] for run in members]
            load = np.concatenate([np.ravel(run.found["load"]) for run in members]) * len(members[0].found["load"][0])
            rise = np.concatenate([np.ravel(entry["delta"]["mean"]) for entry in found])
            rho, beyond = (_mean([entry[key] for entry in found]) for key in ("rho", "rho_excess"))
            label = f"{name} (n={len(members)}): mean ρ {rho:.2f}, of the rise beyond the null {beyond:.2f}"
            axes.scatter(load, rise, s=16, alpha=0.6, color=style["color"], marker=style["marker"], label=label)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel="load of the expert / mean load of its layer", ylabel=f"rise of the loss, {words} (nats)")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize="x-small")
    figure.supxlabel(
        "a point: an expert of a layer of a run; ρ: Spearman's within a layer, mean over layers and runs",
        fontsize="small",
    )
    return figure


@matplotlib.rc_context(RC)
def regret(runs: list[Studied]) -> Figure:
    """Next-token loss as chosen against other routes: regret by token, and whether the choice beats any choice."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for style, name, members in _styled(runs):
        values = np.sort(np.concatenate([layer["values"] for run in members for layer in run.found["regret"]]))
        share = np.arange(1, len(values) + 1) / len(values)
        left.step(values, share, where="post", color=style["color"], linestyle=style["linestyle"], label=name)
    left.set(xlabel="regret of a token (nats)", ylabel="share of sampled tokens with less", xlim=(0, None))
    left.set_xscale("symlog", linthresh=0.01)
    _by_layer(middle, runs, lambda found: [layer["regret"]["mean"] for layer in found["regret"]])
    _by_layer(right, runs, lambda found: [layer["advantage"]["mean"] for layer in found["regret"]])
    right.axhline(0, color="black", linewidth=0.6)
    routes = runs[0].found["regret"][0]["routes"]
    middle.set_ylabel(f"mean regret, best of {routes} routes (nats)")
    right.set_ylabel("mean loss of other routes - as chosen (nats)")
    legend(figure, f"left: all layers and seeds; {SEEDS_CAPTION}")
    return figure


@matplotlib.rc_context(RC)
def landscape(runs: list[Studied]) -> Figure:
    """The loss around a model as its routers move at random or along the gradient, and the decisions that flip."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for style, name, members in _styled(runs):
        for axes, (kind, value) in zip(
            panels, (("random", "loss"), ("gradient", "loss"), ("random", "flipped")), strict=True
        ):
            curves = []
            for run in members:
                found = run.found["landscape"]
                chosen = [curve[value] for key, curve in found["curves"].items() if key.startswith(kind)]
                if chosen:
                    curve = np.mean(chosen, axis=0)
                    curves.append(curve - curve[found["distances"].index(0)])
            line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"]}
            for curve in curves:
                axes.plot(found["distances"], curve, color=style["color"], linewidth=0.7, alpha=0.5)
            if curves:
                label = f"{name} (n={len(curves)})"
                axes.plot(found["distances"], np.mean(curves, axis=0), linewidth=2.2, marker=".", label=label, **line)
    left, middle, right = panels
    left.set_ylabel("rise of the loss (nats), random directions")
    middle.set_ylabel("rise of the loss (nats), along the gradient")
    right.set_ylabel("share of choices flipped, random directions")
    for axes in panels:
        axes.set_xlabel("distance / norm of the weights")
    legend(figure, "all routers move at once; thin: one run (random: mean of 3 directions), thick: mean over n seeds")
    return figure


@matplotlib.rc_context(RC)
def gradients(trains: pd.DataFrame) -> Figure | str:
    """Gradient norms and relative updates of routers and experts by step, of train events that have a `condition`."""
    columns = {metric.name: metric.axis for metric in select(shown="gradient figure")}
    columns = {column: label for column, label in columns.items() if column in trains and trains[column].notna().any()}
    if not columns:
        return "no train event has a gradient norm"
    figure = Figure(figsize=(10.4, 7.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (column, label) in zip(panels.flat, columns.items(), strict=False):
        for index, (condition, members) in enumerate(trains.groupby("condition")):
            style = look(index)
            curves = members.pivot(index="step", columns="folder", values=column).astype(float).dropna(how="all")
            axes.plot(curves, color=style["color"], linewidth=0.6, alpha=0.45)
            mean = curves.dropna().mean(axis=1)
            line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"]}
            axes.plot(mean, linewidth=2, label=f"{condition} (n={curves.shape[1]})", **line)
        axes.set(ylabel=label, yscale="log")
    for axes in panels[-1]:
        axes.set_xlabel("optimizer step")
    legend(figure, "thin: one run, thick: mean over n runs; gradients before clipping, updates at evaluations")
    return figure


def _read(runs: pd.DataFrame) -> tuple[list[Studied], str]:
    """The studied runs in order of condition and seed, and why the others say nothing."""
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    every, reasons = [], []
    for cell, members in conditions(runs, factors):
        for folder, seed in sorted(zip(members["folder"], members["seed"], strict=True), key=lambda pair: pair[1]):
            path = Path(folder) / FILE
            found = json.loads(path.read_text()) if path.exists() else None
            if found is not None and found["reason"] is None:
                every.append(Studied(name_cell(cell) or "all runs", int(seed), found))
            elif found is not None:
                reasons.append(found["reason"])
    return every, "; ".join(sorted(set(reasons)))


def _shape(run: Studied) -> tuple[Any, ...]:
    """Layers, experts and domains: what the panels of a figure have to have in common."""
    return np.shape(run.found["load"]), tuple(run.found["domains"])


def _styled(runs: list[Studied]) -> Iterator[tuple[dict[str, str], str, list[Studied]]]:
    for index, name in enumerate(dict.fromkeys(run.condition for run in runs)):
        yield look(index), name, [run for run in runs if run.condition == name]


def _by_layer(axes: Axes, runs: list[Studied], value: Callable[[dict[str, Any]], list[float | None]]) -> None:
    """Seeds and means with t intervals of one number a layer; conditions stand a little apart."""
    styled = list(_styled(runs))
    for index, (style, name, members) in enumerate(styled):
        rows = [
            {"seed": run.seed, "folder": "", "layer": layer, "value": np.nan if number is None else number}
            for run in members
            for layer, number in enumerate(value(run.found))
        ]
        table = pd.DataFrame(rows)
        shift = 0.7 * ((index + 0.5) / len(styled) - 0.5)
        axes.plot(
            table["layer"] + shift, table["value"], style["marker"], color=style["color"], markersize=3, alpha=0.6
        )
        means = with_intervals(summary(table, ["layer"], ["value"]))
        reach = (means["mean"] - means["ci_low"]).fillna(0)  # below two seeds there is no interval
        look_of: dict[str, Any] = {
            "fmt": style["marker"],
            "color": style["color"],
            "markersize": 7,
            "markeredgecolor": "white",
        }
        label = f"{name} (n={means['n'].max()})"
        axes.errorbar(means["layer"] + shift, means["mean"], yerr=reach, capsize=3, label=label, **look_of)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")


def _mean(values: list[list[float | None]]) -> float:
    """The mean of what is there; NaN if nothing is."""
    known = np.array([number for row in values for number in row if number is not None])
    return float(known.mean()) if len(known) else float("nan")


def _null(axes: Axes, runs: list[Studied], value: Callable[[dict[str, Any]], list[float | None]]) -> None:
    """A gray dash where chance ends, of each condition and layer, the mean over seeds."""
    styled = list(_styled(runs))
    for index, (_, _, members) in enumerate(styled):
        nulls = np.array([value(run.found) for run in members], dtype=float).mean(0)
        shift = 0.7 * ((index + 0.5) / len(styled) - 0.5)
        axes.plot(np.arange(len(nulls)) + shift, nulls, "_", color="#606060", markersize=9, markeredgewidth=1.6)


def _by_step(axes: Axes, runs: list[Studied], name: str) -> None:
    for style, condition, members in _styled(runs):
        curves = {
            run.seed: pd.Series(
                {entry["step"]: np.mean(np.array(entry["kappa_shuffled"], dtype=float)) for entry in run.found[name]}
            )
            for run in members
            if run.found[name]
        }
        for curve in curves.values():
            axes.plot(curve, color=style["color"], linewidth=0.7, alpha=0.5)
        if curves:
            line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"], "marker": style["marker"]}
            label = f"{condition} (n={len(curves)})"
            axes.plot(pd.DataFrame(curves).mean(axis=1), linewidth=2, markersize=5, label=label, **line)
    axes.set_xlabel("optimizer step")


def _by_pair(axes: Axes, runs: list[Studied]) -> None:
    """κ of each pair of seeds, and their mean without an interval: pairs that share a seed are not independent."""
    styled = list(_styled(runs))
    for index, (style, _, members) in enumerate(styled):
        others = [other for run in members for other in run.found["seed_agreement"] if other["seed"] > run.seed]
        if not others:
            continue
        pairs = np.array([[layer["kappa"] for layer in other["layers"]] for other in others], dtype=float)
        x = np.arange(pairs.shape[-1]) + 0.7 * ((index + 0.5) / len(styled) - 0.5)
        axes.plot(x, pairs.T, style["marker"], color=style["color"], markersize=3, alpha=0.6)
        axes.plot(x, pairs.mean(0), style["marker"], color=style["color"], markersize=7, markeredgecolor="white")
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")


def _vocabulary(found: dict[str, Any], name: str) -> list[float | None]:
    return [_get(entry, "specialization", name) for entry in found["vocabulary"]["input"]]


def _adjusted_null(entry: dict[str, Any] | None) -> float | None:
    """Where chance ends (97.5 %), on the scale from which chance is taken out."""
    return None if entry is None else (entry["null_high"] - entry["null"]) / max(1 - entry["null"], 1e-12)


def _get(entry: dict[str, Any] | None, *keys: str) -> Any:
    """A field of what may be null."""
    for key in keys:
        entry = None if entry is None else entry[key]
    return entry
