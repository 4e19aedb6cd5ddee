"""The two JSON reports of the temperature study, under its keys, with n, intervals and sentences that follow from them.

A number `x` over seeds stands beside `x_interval`, the 95 % t interval of its mean (null below two seeds), and `x_n`,
the seeds with a finite value. What is not known is null.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from moe.analysis.statistics import with_intervals
from moe.analysis.studies.temperature.data import (
    LOSS,
    TEMPERATURE,
    ablation,
    compare,
    constant_runs,
    curves,
    names,
    ranking,
    scheduled,
    utilization,
)
from moe.results.conditions import STD, levels, unfinished

# What a sentence compares: metric -> its name, its unit, and what a rise and a fall of it mean.
MEANINGS = {
    LOSS: ("final validation loss", "nats per token", "worse", "better"),
    "val/accuracy": ("final validation accuracy", "of tokens", "better", "worse"),
    "routing/load_gini": ("Gini of expert load, mean over layers", "", "less balanced", "more balanced"),
    "routing/load_gini/worst": ("Gini of expert load, worst layer", "", "less balanced", "more balanced"),
    "routing/entropy_t1": ("router entropy at temperature 1", "nats per token", "less sharp logits", "sharper logits"),
}
QUALITY, SPECIALIZATION = list(MEANINGS)[:2], list(MEANINGS)[2:]
DEFINITIONS = {
    "final_loss": "validation loss in nats per token at the last evaluation; every choice and comparison uses it",
    "best_loss": "lowest over a run's evaluations: optimiztic, because it was chosen on what it is measured on",
    "losses": "final losses, means over seeds, in the order of the levels tested",
    "improvement": "100 (worst - best) / worst of the mean final losses; both were picked after seeing them",
    "not_told_from_best": "levels whose seed-paired difference from the best has a 95 % t interval with 0, or none",
    "expert_utilization": "shares of assignments at the last evaluation. distribution: mean over layers and seeds, by "
    "index, which hides imbalance because expert i of one layer is not that of another; ranked: each layer's shares "
    "from largest to smallest, then averaged; std (ddof 0) and gini: of a layer's experts, mean over layers; "
    "gini_worst_layer: of the worst; gini_layers_pooled: of the mean over layers, the study's own; min and max: over "
    "all layers' experts; of each the mean over seeds",
    "routing_entropy": "nats per token at the router's temperature, which it grows with by definition; _t1: of the "
    "same logits at temperature 1. initial and final: first and last evaluation; mean and std (ddof 0): over "
    "evaluations; of each the mean over seeds",
}


def summary_report(runs: pd.DataFrame, evals: pd.DataFrame) -> dict[str, Any]:
    """summary_report.json: what was run, the best temperature and schedule, and how sure one may be of them.

    `runs` is `load_runs` through `with_causality`; `evals` the evaluations of `read_event_tables`.
    """
    tempered, moving, steady = ablation(runs), scheduled(runs), constant_runs(runs)
    tables = [table for table in (tempered, steady, moving) if isinstance(table, pd.DataFrame)]
    told = list(dict.fromkeys(name for table in tables for name in names(table)))
    report: dict[str, Any] = {
        "experiment_overview": {
            "total_experiments": len(told),
            "experiment_names": told,
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
    if isinstance(tempered, pd.DataFrame):
        best["temperature_ablation"] = _best(tempered, TEMPERATURE, "temperature", evals)
        analysis = _analysis(tempered, TEMPERATURE, "temperature", evals)
        report["temperature_analysis"] = {"tested_temperatures": levels(tempered[TEMPERATURE])} | analysis
        report["insights"] += insights(tempered, TEMPERATURE, QUALITY)
    else:
        report["not_reported"]["temperature_ablation"] = tempered
    if isinstance(moving, pd.DataFrame):
        only = moving[moving["schedule"] != "constant"]
        best["temperature_schedule"] = _best(only, "schedule", "schedule_type", evals)
        analysis = _analysis(only, "schedule", "schedule", evals)
        report["schedule_analysis"] = {"schedules_tested": levels(only["schedule"])} | analysis
        report["insights"] += insights(moving, "schedule", QUALITY)
    else:
        report["not_reported"]["temperature_schedule"] = moving
    return report


def specialization_report(runs: pd.DataFrame, evals: pd.DataFrame) -> dict[str, Any]:
    """specialization_report.json: load and entropy of every constant temperature and length, and what temperature does.

    The best and the most balanced are looked for among runs of the usual length. Arguments as in `summary_report`.
    """
    report: dict[str, Any] = {
        "summary": {"best_temperature": None, "most_balanced_experts": None},
        "per_experiment": {},
        "insights": [],
        "not_reported": {},
        "definitions": DEFINITIONS,
    }
    tempered, steady = ablation(runs), constant_runs(runs)
    if isinstance(tempered, pd.DataFrame):
        report["summary"] = _extremes(tempered)
        report["insights"] = insights(tempered, TEMPERATURE, SPECIALIZATION)
    else:
        report["not_reported"]["summary"] = tempered
    table = steady if isinstance(steady, str) else utilization(steady, evals)
    if isinstance(table, pd.DataFrame):
        members = table.groupby(names(table), sort=False)
        report["per_experiment"] = {str(name): _experiment(runs_of, evals) for name, runs_of in members}
    else:
        report["not_reported"]["per_experiment"] = table
    return report


def insights(members: pd.DataFrame, by: str, metrics: list[str]) -> list[str]:
    """Which level of `by` has the lowest final loss, if asked, then every level against temperature 1 or no schedule.

    A sentence ends in its direction only if the 95 % t interval of the seed-paired difference excludes 0.
    """
    known = levels(members[by])
    reference = next((level for level in (1.0, "constant") if level in known), known[0])
    sentences = [_leader(members, by)] if LOSS in metrics else []
    for metric in metrics:
        if metric in members and len(known) > 1:
            compared = compare(members, by, reference, metric)
            sentences += [_sentence(contrast) for _, contrast in compared.iterrows()]
    return sentences


def _leader(members: pd.DataFrame, by: str) -> str:
    losses = ranking(members, by)
    if losses.empty:
        return "No run has a finite final loss."
    best = losses.iloc[0]
    text = f"Lowest mean final loss: {_level(by, best[by])}, {best['mean']:.4g} nats per token"
    if not math.isnan(best["ci_low"]):
        text += f" [{best['ci_low']:.4g}, {best['ci_high']:.4g}]"
    text += f", n={best['n']:.0f}, picked after seeing all {len(losses)}"
    rivals = _rivals(members, by, best[by])
    if rivals:
        return f"{text}: undecided against {', '.join(_level(by, rival) for rival in rivals)}."
    return f"{text}: better than every other." if len(losses) > 1 else f"{text}: there is no other to compare with."


def _sentence(contrast: pd.Series) -> str:
    c = contrast
    name, unit, up, down = MEANINGS[c["metric"]]
    claim = f"{name}, {_level(c['factor'], c['level'])} against {_level(c['factor'], c['reference'])}"
    if c["n"] == 0:
        return f"{claim}: undecided, no seed has both."
    claim = f"{claim}: {c['difference']:+.3g} {unit}".rstrip()
    if math.isnan(c["p"]):
        return f"{claim}, n={c['n']}: undecided, {c['note']}."
    evidence = f"[{c['ci_low']:.3g}, {c['ci_high']:.3g}], p={c['p']:.2g} (Holm {c['p Holm']:.2g}), n={c['n']}"
    note = f" ({c['note']})" if c["note"] else ""
    if not c["decided"]:
        seen = f"the smallest effect these seeds could have seen (power 0.8) is {c['detectable']:.2g}"
        return f"{claim} {evidence}: undecided, {seen}{note}."
    doubt = ", but not after Holm's correction" if c["p Holm"] > 0.05 else ""
    return f"{claim} {evidence}: {up if c['difference'] > 0 else down}{doubt}{note}."


def _level(by: str, level: Any) -> str:
    return f"temperature {level}" if by == TEMPERATURE else f"schedule {level}"


def _rivals(members: pd.DataFrame, by: str, best: Any) -> list[Any]:
    """The levels that the seeds cannot tell from the best."""
    compared = compare(members, by, best)
    return [] if compared.empty else compared.loc[~compared["decided"], "level"].tolist()


def _best(members: pd.DataFrame, by: str, key: str, evals: pd.DataFrame) -> dict[str, Any] | None:
    losses = ranking(members, by)
    if losses.empty:
        return None
    level = losses[by].iloc[0]
    best = members[members[by] == level]
    return {
        "experiment": names(best).iloc[0],
        key: level,
        "n_seeds": len(best),
        **_estimate("best_loss", _lowest(best, evals)),
        **_estimate("final_loss", best[LOSS]),
        **_estimate("final_accuracy", _column(best, "val/accuracy")),
    }


def _analysis(members: pd.DataFrame, by: str, key: str, evals: pd.DataFrame) -> dict[str, Any]:
    """The final losses of every level of `by`, best and worst level, and whether the seeds tell them apart."""
    cells = [members[members[by] == level] for level in levels(members[by])]
    finals = [_estimate("losses", cell[LOSS]) for cell in cells]
    report: dict[str, Any] = {name: [final[name] for final in finals] for name in finals[0]}
    report["best_losses"] = [_estimate("best", _lowest(cell, evals))["best"] for cell in cells]
    losses = ranking(members, by)
    if losses.empty:
        return report | {f"best_{key}": None, f"worst_{key}": None, "improvement": None, "not_told_from_best": []}
    best, worst = losses.iloc[0], losses.iloc[-1]
    return report | {
        f"best_{key}": best[by],
        f"worst_{key}": worst[by],
        "improvement": float(100 * (worst["mean"] - best["mean"]) / worst["mean"]),
        "not_told_from_best": _rivals(members, by, best[by]),
    }


def _extremes(members: pd.DataFrame) -> dict[str, Any]:
    """The temperatures with the lowest mean final loss and with the lowest mean Gini."""
    found: dict[str, Any] = {}
    wanted = {
        "best_temperature": (LOSS, "loss"),
        "most_balanced_experts": ("routing/load_gini", "gini_coefficient"),
    }
    for name, (metric, key) in wanted.items():
        order = ranking(members, TEMPERATURE, metric) if metric in members else pd.DataFrame()
        found[name] = None
        if len(order):
            cell = members[members[TEMPERATURE] == order[TEMPERATURE].iloc[0]]
            facts = {"experiment": names(cell).iloc[0], "temperature": order[TEMPERATURE].iloc[0]}
            found[name] = facts | _estimate(key, cell[metric])
    return found


def _experiment(members: pd.DataFrame, evals: pd.DataFrame) -> dict[str, Any]:
    """One condition: `members` are its seeds, as `utilization` returns them."""
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
        **_estimate("final_loss", members[LOSS]),
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
    table = curves(members, evals, [column])
    if isinstance(table, str):
        return None
    runs = table.groupby("folder")[column]
    values = {"initial": runs.first(), "final": runs.last(), "mean": runs.mean(), "std": runs.std(ddof=0)}
    return {key: value for name, series in values.items() for key, value in _estimate(name, series).items()}


def _lowest(members: pd.DataFrame, evals: pd.DataFrame) -> pd.Series:
    table = curves(members, evals, [LOSS])
    return pd.Series(dtype=float) if isinstance(table, str) else table.groupby("folder")[LOSS].min()


def _column(members: pd.DataFrame, column: str) -> pd.Series:
    return members[column] if column in members else pd.Series(dtype=float)


def _estimate(name: str, values: pd.Series) -> dict[str, Any]:
    """The mean over seeds, its interval and its n, under `name`."""
    values = values[np.isfinite(values.astype(float))]
    moments = {"n": len(values), "mean": values.mean(), STD: values.std(ddof=1)}
    row = with_intervals(pd.DataFrame([moments])).iloc[0]
    return {
        name: float(row["mean"]) if len(values) else None,
        f"{name}_interval": None if math.isnan(row["ci_low"]) else [float(row["ci_low"]), float(row["ci_high"])],
        f"{name}_n": len(values),
    }
