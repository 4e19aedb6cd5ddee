"""Make the two JSON reports of the temperature study, with the keys of the study, and n and intervals in addition.

For every mean `x` over seeds, `x_interval` is its 95 % t interval (null below two seeds) and `x_n` the number of seeds
with a finite value. Unknown values are null.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from moe.analysis.sentences import contrast_sentence
from moe.analysis.statistics import contrasts, with_intervals
from moe.analysis.studies.temperature.data import (
    TEMPERATURE,
    VALIDATION_LOSS,
    ablation,
    against_best,
    constant_runs,
    evaluation_curves,
    experiment_names,
    ranking,
    scheduled,
    with_utilization,
)
from moe.metrics.catalog import lookup
from moe.results.conditions import STD, levels, unfinished

# The metrics about which `insights` writes sentences.
QUALITY = [VALIDATION_LOSS, "val/accuracy"]
SPECIALIZATION = ["routing/load_gini", "routing/load_gini/worst", "routing/entropy_t1"]
DEFINITIONS = {
    "final_loss": "validation loss in nats per token at the last evaluation; every choice and comparison uses it",
    "best_loss": "lowest over a run's evaluations: optimistic, because the evaluation was chosen by its own loss",
    "losses": "final losses, means over seeds, in the order of the tested levels",
    "improvement": "100 (worst - best) / worst of the mean final losses; both were chosen after seeing the losses",
    "differences_from_best": "final loss minus that of the best level, paired by seed, in the order of the tested "
    "levels; the best was chosen after seeing the losses, so these differences look larger than they are",
    "insights": "differences with 95 % t intervals, paired by seed; they describe, and the verdicts are in the report",
    "expert_utilization": "shares of assignments at the last evaluation. distribution: mean over layers and seeds, by "
    "index, which hides imbalance, because expert i of one layer has nothing to do with expert i of another; ranked: "
    "the shares of each layer sorted from largest to smallest, then averaged; std (ddof 0) and gini: of a layer's "
    "experts, mean over layers; gini_worst_layer: of the least balanced layer; gini_layers_pooled: of the mean over "
    "layers, as in the study; min and max: over the experts of all layers; all are means over seeds",
    "routing_entropy": "nats per token at the router's temperature, with which it grows by definition; _t1: of the "
    "same logits at temperature 1. initial and final: first and last evaluation; mean and std (ddof 0): over "
    "evaluations; all are means over seeds",
}


def summary_report(runs: pd.DataFrame, evals: pd.DataFrame) -> dict[str, Any]:
    """Return summary_report.json: what was run, and the best temperature and schedule with their uncertainty.

    `runs` is a table of `moe.results.table.load_runs` after `with_causality`. `evals` are the evaluations of
    `moe.results.table.read_event_tables`.
    """
    constant, with_schedule, of_any_length = ablation(runs), scheduled(runs), constant_runs(runs)
    tables = [table for table in (constant, of_any_length, with_schedule) if isinstance(table, pd.DataFrame)]
    experiments = list(dict.fromkeys(name for table in tables for name in experiment_names(table)))
    report: dict[str, Any] = {
        "experiment_overview": {
            "total_experiments": len(experiments),
            "experiment_names": experiments,
            "seeds": sorted({int(seed) for table in tables for seed in table["seed"]}),
            "routers": sorted({router for table in tables for router in table["router"]}),
            "unfinished_runs": len(unfinished(runs)),
        },
        "best_results": {"temperature_ablation": None, "temperature_schedule": None},
        "temperature_analysis": None,
        "schedule_analysis": None,
        "insights": [],
        "not_reported": {},
        "definitions": DEFINITIONS,
    }
    best = report["best_results"]
    if isinstance(constant, pd.DataFrame):
        best["temperature_ablation"] = _best(constant, TEMPERATURE, "temperature", evals)
        analysis = _analysis(constant, TEMPERATURE, "temperature", evals)
        report["temperature_analysis"] = {"tested_temperatures": levels(constant[TEMPERATURE])} | analysis
    else:
        report["not_reported"]["temperature_ablation"] = constant
    if isinstance(with_schedule, pd.DataFrame):
        changing = with_schedule[with_schedule["schedule"] != "constant"]
        best["temperature_schedule"] = _best(changing, "schedule", "schedule_type", evals)
        analysis = _analysis(changing, "schedule", "schedule", evals)
        report["schedule_analysis"] = {"schedules_tested": levels(changing["schedule"])} | analysis
    else:
        report["not_reported"]["temperature_schedule"] = with_schedule
    parts = {TEMPERATURE: constant, "schedule": with_schedule}
    report["insights"] = insights(
        {by: table for by, table in parts.items() if isinstance(table, pd.DataFrame)}, QUALITY
    )
    return report


def specialization_report(runs: pd.DataFrame, evals: pd.DataFrame) -> dict[str, Any]:
    """Return specialization_report.json: load and entropy by constant temperature, and the effects of temperature.

    The best and the most balanced temperature are chosen among runs of the usual length. The arguments are those of
    `summary_report`.
    """
    report: dict[str, Any] = {
        "summary": {"best_temperature": None, "most_balanced_experts": None},
        "per_experiment": {},
        "insights": [],
        "not_reported": {},
        "definitions": DEFINITIONS,
    }
    constant, of_any_length = ablation(runs), constant_runs(runs)
    if isinstance(constant, pd.DataFrame):
        report["summary"] = _extremes(constant)
        report["insights"] = insights({TEMPERATURE: constant}, SPECIALIZATION)
    else:
        report["not_reported"]["summary"] = constant
    table = of_any_length if isinstance(of_any_length, str) else with_utilization(of_any_length, evals)
    if isinstance(table, pd.DataFrame):
        experiments = table.groupby(experiment_names(table), sort=False)
        report["per_experiment"] = {str(name): _experiment(members, evals) for name, members in experiments}
    else:
        report["not_reported"]["per_experiment"] = table
    return report


def insights(parts: dict[str, pd.DataFrame], metrics: list[str]) -> list[str]:
    """Return sentences that compare the levels of each factor with temperature 1, or with a constant temperature.

    `parts` has the runs by factor. If the loss is among the metrics, the first sentence about a factor names the level
    with the lowest final loss. Sentences give differences with their intervals. Verdicts are left to the report, whose
    correction covers all of its tests.
    """
    sentences = []
    for by, members in parts.items():
        known = levels(members[by])
        reference = next((level for level in (1.0, "constant") if level in known), known[0])
        sentences += [_lowest_loss(members, by)] if VALIDATION_LOSS in metrics else []
        for metric in [metric for metric in metrics if metric in members]:
            compared = contrasts(members, metric, [by], references={by: reference})
            sentences += [_sentence(contrast) for _, contrast in compared.iterrows()]
    return sentences


def _lowest_loss(members: pd.DataFrame, by: str) -> str:
    """Return the sentence about the level with the lowest mean final loss."""
    losses = ranking(members, by)
    if losses.empty:
        return "No run has a finite final loss."
    best = losses.iloc[0]
    text = f"Lowest mean final loss: {_level_name(by, best[by])}, {best['mean']:.4g} nats per token"
    if not math.isnan(best["ci_low"]):
        text += f" [{best['ci_low']:.4g}, {best['ci_high']:.4g}]"
    chosen = f", chosen after seeing all {len(losses)}" if len(losses) > 1 else ""
    return f"{text}, n={best['n']:.0f}{chosen}."


def _sentence(contrast: pd.Series) -> str:
    metric = lookup(contrast["metric"])
    assert metric is not None
    level, reference = (_level_name(contrast["factor"], contrast[side]) for side in ("level", "reference"))
    subject = f"final {metric.label}, {level} against {reference}"
    return contrast_sentence(contrast, subject, unit=metric.unit).replace("**", "") + "."


def _level_name(by: str, level: Any) -> str:
    return f"temperature {level}" if by == TEMPERATURE else f"schedule {level}"


def _best(members: pd.DataFrame, by: str, key: str, evals: pd.DataFrame) -> dict[str, Any] | None:
    """Return the level with the lowest mean final loss, with its losses and accuracy; None if no loss is finite."""
    losses = ranking(members, by)
    if losses.empty:
        return None
    level = losses[by].iloc[0]
    best = members[members[by] == level]
    return {
        "experiment": experiment_names(best).iloc[0],
        key: level,
        "n_seeds": len(best),
        **_estimate("best_loss", _lowest_evaluation(best, evals)),
        **_estimate("final_loss", best[VALIDATION_LOSS]),
        **_estimate("final_accuracy", _column(best, "val/accuracy")),
    }


def _analysis(members: pd.DataFrame, by: str, key: str, evals: pd.DataFrame) -> dict[str, Any]:
    """Return the final losses of every level of `by`, the best and the worst level, and which are undecided."""
    cells = [members[members[by] == level] for level in levels(members[by])]
    finals = [_estimate("losses", cell[VALIDATION_LOSS]) for cell in cells]
    report: dict[str, Any] = {name: [final[name] for final in finals] for name in finals[0]}
    report["best_losses"] = [_estimate("best", _lowest_evaluation(cell, evals))["best"] for cell in cells]
    losses = ranking(members, by)
    if losses.empty:
        return report | {f"best_{key}": None, f"worst_{key}": None, "improvement": None}
    best, worst = losses.iloc[0], losses.iloc[-1]
    compared = against_best(members, by, best[by]).set_index("level")
    differences = [compared.loc[level] if level in compared.index else None for level in levels(members[by])]
    return report | {
        f"best_{key}": best[by],
        f"worst_{key}": worst[by],
        "improvement": float(100 * (worst["mean"] - best["mean"]) / worst["mean"]),
        "differences_from_best": [None if each is None else _number(each["difference"]) for each in differences],
        "differences_from_best_interval": [
            None if each is None or math.isnan(each["ci_low"]) else [each["ci_low"], each["ci_high"]]
            for each in differences
        ],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _extremes(members: pd.DataFrame) -> dict[str, Any]:
    """Return the temperatures with the lowest mean final loss and with the lowest mean Gini coefficient."""
    found: dict[str, Any] = {}
    wanted = {
        "best_temperature": (VALIDATION_LOSS, "loss"),
        "most_balanced_experts": ("routing/load_gini", "gini_coefficient"),
    }
    for name, (metric, key) in wanted.items():
        order = ranking(members, TEMPERATURE, metric) if metric in members else pd.DataFrame()
        found[name] = None
        if len(order):
            cell = members[members[TEMPERATURE] == order[TEMPERATURE].iloc[0]]
            facts = {"experiment": experiment_names(cell).iloc[0], "temperature": order[TEMPERATURE].iloc[0]}
            found[name] = facts | _estimate(key, cell[metric])
    return found


def _experiment(members: pd.DataFrame, evals: pd.DataFrame) -> dict[str, Any]:
    """Return load and entropy of one condition; `members` are its seeds in a table of `with_utilization`."""
    load = _estimate("std", members["utilization/std"]) | {
        **_estimate("min", members["utilization/min"]),
        **_estimate("max", members["utilization/max"]),
        **_estimate("gini", _column(members, "routing/load_gini")),
        **_estimate("gini_worst_layer", _column(members, "routing/load_gini/worst")),
        **_estimate("gini_layers_pooled", _column(members, "routing/load_gini/pooled")),
    }
    shares, ranked = (np.stack(members[kind].tolist()).mean(0) for kind in ("shares", "ranked"))
    return {
        "temperature": float(members[TEMPERATURE].iloc[0]),
        "steps": int(members["steps"].iloc[0]),
        "n_seeds": len(members),
        **_estimate("final_loss", members[VALIDATION_LOSS]),
        **_estimate("final_test_loss", _column(members, "test/loss")),
        **_estimate("final_accuracy", _column(members, "val/accuracy")),
        "expert_utilization": {
            "distribution": shares.tolist(),
            "ranked": ranked.tolist(),
            "mean": float(shares.mean()),
            **load,
        },
        "routing_entropy": _entropy(members, evals, "routing/entropy"),
        "routing_entropy_t1": _entropy(members, evals, "routing/entropy_t1"),
    }


def _entropy(members: pd.DataFrame, evals: pd.DataFrame, column: str) -> dict[str, Any] | None:
    table = evaluation_curves(members, evals, [column])
    if isinstance(table, str):
        return None
    runs = table.groupby("folder")[column]
    values = {"initial": runs.first(), "final": runs.last(), "mean": runs.mean(), "std": runs.std(ddof=0)}
    return {key: value for name, series in values.items() for key, value in _estimate(name, series).items()}


def _lowest_evaluation(members: pd.DataFrame, evals: pd.DataFrame) -> pd.Series:
    table = evaluation_curves(members, evals, [VALIDATION_LOSS])
    return pd.Series(dtype=float) if isinstance(table, str) else table.groupby("folder")[VALIDATION_LOSS].min()


def _column(members: pd.DataFrame, column: str) -> pd.Series:
    """Return a column, or an empty one if the table lacks it."""
    return members[column] if column in members else pd.Series(dtype=float)


def _estimate(name: str, values: pd.Series) -> dict[str, Any]:
    """Return the mean over seeds, its interval and its n, under `name`."""
    values = values[np.isfinite(values.astype(float))]
    moments = {"n": len(values), "mean": values.mean(), STD: values.std(ddof=1)}
    row = with_intervals(pd.DataFrame([moments])).iloc[0]
    return {
        name: float(row["mean"]) if len(values) else None,
        f"{name}_interval": None if math.isnan(row["ci_low"]) else [float(row["ci_low"]), float(row["ci_high"])],
        f"{name}_n": len(values),
    }
