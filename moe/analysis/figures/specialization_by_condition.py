"""Figures of specialization by condition: what routing depends on, how stable it is, and the loss without an expert.

Every seed is a point. Intervals are 95 % t intervals of the mean over seeds.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.figures.expert_grids import MeasuredRun, to_array
from moe.analysis.figures.style import RC, interval_reach, label_layers, line_style, shared_legend
from moe.analysis.statistics import with_intervals
from moe.results.conditions import summary

REMOVALS = {"rerouted": "its tokens rerouted", "zeroed": "its output zeroed"}
SEEDS_TITLE = "small: one seed; large: mean over n seeds and its 95 % t interval; "


@matplotlib.rc_context(RC)
def specialization_information(runs: list[MeasuredRun]) -> Figure:
    """Draw by layer how much domain and token id tell about experts, compared with shuffled routing."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_by_layer(left, runs, lambda found: [_get(entry, "adjusted") for entry in found["domain"]])
    _draw_null(left, runs, lambda found: [_adjusted_null(entry) for entry in found["domain"]])
    _draw_by_layer(
        middle, runs, lambda found: [_get(entry, "id", "adjusted") for entry in found["vocabulary"]["input"]]
    )
    _draw_null(middle, runs, lambda found: [_adjusted_null(_get(e, "id")) for e in found["vocabulary"]["input"]])
    _draw_by_layer(right, runs, lambda found: _vocabulary_measure(found, "normalized"))
    _draw_null(right, runs, lambda found: _vocabulary_measure(found, "null_high"))
    left.set_ylabel("domain: share of the possible\ninformation, beyond chance")
    middle.set_ylabel("token id: share of the possible\ninformation, beyond chance")
    right.set_ylabel("vocabulary specialization (mean largest share)")
    shared_legend(figure, f"{_seeds_title(runs)}gray dash: 97.5 % quantile of shuffled routing")
    return figure


@matplotlib.rc_context(RC)
def specialization_stability(runs: list[MeasuredRun]) -> Figure:
    """Draw overlap with the final choices, changed choices between traces, and agreement of seeds, beyond chance."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_by_step(left, runs, "saturation")
    _draw_by_step(middle, runs, "churn")
    agreeing = [run for run in runs if run.found.get("seed_agreement")]
    _draw_by_pair(right, agreeing)
    left.set_ylabel("saturation: agreement with the last trace (κ)")
    middle.set_ylabel("churn: 1 - κ with the trace before")
    right.set_ylabel("agreement with other seeds, matched (κ)")
    if not agreeing:
        right.set_title("no two runs differ in their seed only", fontsize="small")
    left.set_ylim(None, 1.03)
    middle.set_ylim(0, None)
    right.set_ylim(min(0, right.get_ylim()[0]), None)
    scale = "κ = 1: the same choices; κ = 0: as after shuffling the tokens, with these loads"
    marks = "saturation and churn: mean over layers, thin: one run, thick: mean; "
    marks += "agreement: small: a pair of seeds, large: mean"
    shared_legend(figure, f"{scale};\n{marks}")
    return figure


@matplotlib.rc_context(RC)
def expert_importance(runs: list[MeasuredRun]) -> Figure:
    """Draw the rise of the loss without an expert against the expert's load. The legend gives the rank correlation."""

    def agreement(members: list[MeasuredRun], method: str) -> str:
        found = [run.found["knockout"][method] for run in members]
        rho, beyond = (_mean([entry[key] for entry in found]) for key in ("rho", "rho_excess"))
        return f"mean ρ {rho:.2f}, of the rise beyond the null {beyond:.2f}"

    note = "a point: an expert of a layer of a run; ρ: Spearman's within a layer, mean over layers and runs"
    return _rise_against("load", lambda found: found["load"], runs, agreement, note)


@matplotlib.rc_context(RC)
def expert_saliency(runs: list[MeasuredRun]) -> Figure:
    """Draw the rise of the loss without an expert against its saliency. The legend gives the rank correlation."""

    def agreement(members: list[MeasuredRun], method: str) -> str:
        return f"mean ρ {_mean([[run.found['saliency']['rho'][method]['all']['rho']] for run in members]):.2f}"

    note = "a point: an expert of a layer of a run; ρ: Spearman's within layers, joined over layers, mean over runs"
    return _rise_against("saliency", lambda found: found["saliency"]["values"], runs, agreement, note)


def _rise_against(
    word: str,
    values: Callable[[dict[str, Any]], list[list[float | None]]],
    runs: list[MeasuredRun],
    agreement: Callable[[list[MeasuredRun], str], str],
    note: str,
) -> Figure:
    """Draw the rise of the loss without each expert against a value of it, relative to the mean of its layer.

    word: what the value is. values: returns it by layer and expert. agreement: says how a condition's values and rises
    agree, for one kind of removal.
    """
    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    for axes, (method, words) in zip(figure.subplots(1, 2), REMOVALS.items(), strict=True):
        for style, name, members in _by_condition(runs):
            x = [_relative(of_layer) for run in members for of_layer in values(run.found)]
            y = [to_array(layer) for run in members for layer in run.found["knockout"][method]["delta"]["mean"]]
            look = {"s": 16, "alpha": 0.6, "color": style["color"], "marker": style["marker"]}
            label = f"{name} (n={len(members)}): {agreement(members, method)}"
            axes.scatter(np.concatenate(x), np.concatenate(y), label=label, **look)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel=f"{word} of the expert / mean of its layer", ylabel=f"rise of the loss, {words} (nats)")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize="x-small")
    figure.supxlabel(note, fontsize="small")
    return figure


def _relative(layer: list[float | None]) -> np.ndarray:
    """Return the values of the experts of a layer divided by their mean."""
    values = to_array(layer)
    return values / np.nanmean(values)


@matplotlib.rc_context(RC)
def next_layer(runs: list[MeasuredRun]) -> Figure:
    """Draw by layer how well the experts of the next layer are predicted beyond chance, in two ways."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    panels = zip(figure.subplots(1, 2, sharey=True), ("by_choice", "by_state"), strict=True)
    words = {"by_choice": "from the experts here", "by_state": "from the hidden state here,\nby the next router"}
    for axes, way in panels:
        _draw_by_layer(axes, runs, partial(_predicted, way=way))
        axes.set_ylabel(f"agreement with the next layer (κ),\n{words[way]}")
    shared_legend(figure, f"{_seeds_title(runs)}κ = 1: always right; κ = 0: as after shuffling the tokens")
    return figure


def _predicted(found: dict[str, Any], way: str) -> list[float | None]:
    return [_get(entry[way], "kappa") for entry in found["next_layer"]]


@matplotlib.rc_context(RC)
def regret_by_route(runs: list[MeasuredRun]) -> Figure:
    """Draw the regret of tokens, its mean by layer, and how much better the chosen route is than other routes."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for style, name, members in _by_condition(runs):
        values = np.sort(
            to_array([number for run in members for layer in run.found["regret"] for number in layer["values"]])
        )
        share = np.arange(1, len(values) + 1) / len(values)
        left.step(values, share, where="post", color=style["color"], linestyle=style["linestyle"], label=name)
    left.set(xlabel="regret of a token (nats)", ylabel="share of sampled tokens with less", xlim=(0, None))
    left.set_xscale("symlog", linthresh=0.01)
    left.xaxis.set_major_formatter("{x:g}")  # by default a formula, which is not drawn
    _draw_by_layer(middle, runs, lambda found: [layer["regret"]["mean"] for layer in found["regret"]])
    _draw_by_layer(right, runs, lambda found: [layer["advantage"]["mean"] for layer in found["regret"]])
    right.axhline(0, color="black", linewidth=0.6)
    numbers = sorted({layer["routes"] for run in runs for layer in run.found["regret"]})
    routes = " or ".join(map(str, numbers))
    middle.set_ylabel(f"mean regret, best of {routes} routes (nats)")
    right.set_ylabel("mean loss of other routes - as chosen (nats)")
    shared_legend(figure, f"{_seeds_title(runs)}regret of a token: all layers{' and seeds' if runs[1:] else ''}")
    return figure


@matplotlib.rc_context(RC)
def loss_by_k(runs: list[MeasuredRun]) -> Figure:
    """Draw how the loss changes with the number of experts per token in evaluation, for each run.

    The difference from the loss with the run's own number is paired by block. There is no band without an interval,
    which takes four documents.
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    ax, banded = figure.subplots(), False
    for style, name, members in _by_condition(runs):
        for run in members:
            rows = run.found["loss_by_k"]
            k = [row["k"] for row in rows]
            mean, low, high = (to_array([row["difference"][part] for row in rows]) for part in ("mean", "low", "high"))
            banded |= bool(np.isfinite([low, high]).any())
            color, line = style["color"], style["linestyle"]
            ax.fill_between(k, low, high, color=color, alpha=0.15, linewidth=0)
            ax.plot(k, mean, color=color, linestyle=line, marker="o", label=name if run is members[0] else None)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xscale("log", base=2)
    numbers = sorted({row["k"] for run in runs for row in run.found["loss_by_k"]})
    ax.set_xticks(numbers, [str(k) for k in numbers])
    ax.minorticks_off()
    ax.set(xlabel="experts per token in evaluation", ylabel="loss - loss as trained (nats per token)")
    band = "band: 95 % bootstrap interval over documents" if banded else "no band: there are fewer than four documents"
    shared_legend(figure, f"each line: one run; {band}")
    return figure


@matplotlib.rc_context(RC)
def router_landscape(runs: list[MeasuredRun]) -> Figure:
    """Draw the loss and the share of changed choices when the routers' weights move at random or along the gradient."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for style, name, members in _by_condition(runs):
        for axes, (kind, value) in zip(
            panels, (("random", "loss"), ("gradient", "loss"), ("random", "flipped")), strict=True
        ):
            curves = []
            for run in members:
                found = run.found["landscape"]
                chosen = [to_array(curve[value]) for key, curve in found["curves"].items() if key.startswith(kind)]
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
    shared_legend(
        figure, "all routers move at once; thin: one run (random: mean of 3 directions), thick: mean over n seeds"
    )
    return figure


def _by_condition(runs: list[MeasuredRun]) -> Iterator[tuple[dict[str, str], str, list[MeasuredRun]]]:
    """Yield the line style, the name and the runs of each condition."""
    for index, name in enumerate(dict.fromkeys(run.condition for run in runs)):
        yield line_style(index), name, [run for run in runs if run.condition == name]


def _draw_by_layer(axes: Axes, runs: list[MeasuredRun], value: Callable[[dict[str, Any]], list[float | None]]) -> None:
    """Draw one number for each layer: seeds, and means with t intervals. Conditions lie side by side."""
    styled = list(_by_condition(runs))
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
        look: dict[str, Any] = {
            "fmt": style["marker"],
            "color": style["color"],
            "markersize": 7,
            "markeredgecolor": "white",
        }
        label = f"{name} (n={means['n'].max()})"
        axes.errorbar(means["layer"] + shift, means["mean"], yerr=interval_reach(means), capsize=3, label=label, **look)
    axes.set_xlabel("layer")
    label_layers(axes, range(len(value(runs[0].found))))
    axes.grid(visible=False, axis="x")


def _seeds_title(runs: list[MeasuredRun]) -> str:
    """Return what small and large points are, as the beginning of a title; nothing for a single run."""
    return SEEDS_TITLE if runs[1:] else ""


def _mean(values: list[list[float | None]]) -> float:
    """Return the mean of the values that are not null; NaN if all are."""
    known = np.array([number for row in values for number in row if number is not None])
    return float(known.mean()) if len(known) else float("nan")


def _draw_null(axes: Axes, runs: list[MeasuredRun], value: Callable[[dict[str, Any]], list[float | None]]) -> None:
    """Draw a gray dash at the upper end of chance for each condition and layer, as the mean over seeds."""
    styled = list(_by_condition(runs))
    for index, (_, _, members) in enumerate(styled):
        nulls = np.array([value(run.found) for run in members], dtype=float).mean(0)
        shift = 0.7 * ((index + 0.5) / len(styled) - 0.5)
        axes.plot(np.arange(len(nulls)) + shift, nulls, "_", color="#606060", markersize=9, markeredgewidth=1.6)


def _draw_by_step(axes: Axes, runs: list[MeasuredRun], name: str) -> None:
    """Draw κ of traces against the step: each run thin, the mean of a condition thick."""
    for style, condition, members in _by_condition(runs):
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


def _draw_by_pair(axes: Axes, runs: list[MeasuredRun]) -> None:
    """Draw κ of each pair of seeds, and the mean. It has no interval, because pairs that share a seed are dependent."""
    styled = list(_by_condition(runs))
    for index, (style, _, members) in enumerate(styled):
        others = [other for run in members for other in run.found["seed_agreement"] if other["seed"] > run.seed]
        if not others:
            continue
        pairs = np.array([[layer["kappa"] for layer in other["layers"]] for other in others], dtype=float)
        x = np.arange(pairs.shape[-1]) + 0.7 * ((index + 0.5) / len(styled) - 0.5)
        axes.plot(x, pairs.T, style["marker"], color=style["color"], markersize=3, alpha=0.6)
        axes.plot(x, pairs.mean(0), style["marker"], color=style["color"], markersize=7, markeredgecolor="white")
    axes.set_xlabel("layer")
    if runs:
        label_layers(axes, range(len(runs[0].found["load"])))
    axes.grid(visible=False, axis="x")


def _vocabulary_measure(found: dict[str, Any], name: str) -> list[float | None]:
    return [_get(entry, "specialization", name) for entry in found["vocabulary"]["input"]]


def _adjusted_null(entry: dict[str, Any] | None) -> float | None:
    """Return the 97.5 % quantile of chance, on the scale from which chance is subtracted."""
    return None if entry is None else (entry["null_high"] - entry["null"]) / max(1 - entry["null"], 1e-12)


def _get(entry: dict[str, Any] | None, *keys: str) -> Any:
    """Return a field of a nested object; None if the object or a part of it is null."""
    for key in keys:
        entry = None if entry is None else entry[key]
    return entry
