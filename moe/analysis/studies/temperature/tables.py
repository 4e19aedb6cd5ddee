"""Make the tables inside the temperature study's figures, as text."""

import math
from typing import Any

import pandas as pd

from moe.analysis.studies.temperature.data import TEMPERATURE, against_best, ranking, seed_means
from moe.checks import plain


def ablation_statistics(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a table of the best and worst temperature by mean final loss, and of their difference within seeds."""
    losses = ranking(runs, TEMPERATURE)
    best, worst = losses.iloc[0], losses.iloc[-1]
    compared = against_best(runs, TEMPERATURE, best[TEMPERATURE])
    lines = {
        "best temperature": f"{best[TEMPERATURE]:g}",
        "its final loss": f"{_interval(best, '.4g')}, n={int(best['n'])}",
        "worst temperature": f"{worst[TEMPERATURE]:g}",
        "its final loss ": f"{_interval(worst, '.4g')}, n={int(worst['n'])}",
        "improvement": f"{100 * (1 - best['mean'] / worst['mean']):.3g} %",
    }
    if len(compared):
        pair = compared[compared["level"] == worst[TEMPERATURE]].iloc[0]
        lines["worst − best, paired"] = f"{_interval(pair.rename({'difference': 'mean'}), '.3g')}, n={pair['n']}"
    lines["temperatures tested"] = f"{len(losses)}"
    lines["interval"] = "95 % t over n seeds"
    return pd.DataFrame(lines.items(), columns=["final validation loss", "nats per token"])


def utilization_statistics(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of the experts' load, with a row for each temperature and number of steps."""
    metrics = {
        "Gini, mean over layers": "routing/load_gini",
        "Gini, worst layer": "routing/load_gini/worst",
        "variance, mean over layers": "utilization/variance",
    }
    rows, names = [], condition_names(table)
    for cell, members in table.groupby([TEMPERATURE, "steps"]):
        row = {"condition": names[cell], "n": f"{len(members)}"}
        for name, metric in metrics.items():
            row[name] = _interval(seed_means(members, ["steps"], metric).iloc[0], ".3g")
        row |= {f"{end} share": f"{members[f'utilization/{end}'].mean():.3f}" for end in ("min", "max")}
        rows.append(row)
    return pd.DataFrame(rows)


def condition_names(table: pd.DataFrame) -> dict[Any, str]:
    """Return {(temperature, steps): name of the condition}. The name contains the steps if they vary."""
    length = ", {} steps" if table["steps"].nunique() > 1 else ""
    return {cell: f"T = {cell[0]:g}{length.format(cell[1])}" for cell in table.groupby([TEMPERATURE, "steps"]).groups}


def _interval(row: pd.Series, digits: str) -> str:
    """Return a mean with its interval, if it has one, as text."""
    if math.isnan(row["ci_low"]):
        return plain(f"{row['mean']:{digits}}")
    return plain(f"{row['mean']:{digits}} [{row['ci_low']:{digits}}, {row['ci_high']:{digits}}]")
