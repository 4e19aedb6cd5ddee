"""The tables that a sweep writes and prints at its end."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from moe.checks import printable
from moe.files import write_text
from moe.results.comparable import shown_together
from moe.results.conditions import (
    HEADLINE,
    present,
    spread_table,
    summary,
    unfinished,
    varied_factors,
    with_readable_levels,
)
from moe.results.frontier import LATE, bench_table, stem, with_training_means
from moe.results.learned import learned_little
from moe.results.table import as_csv, load_runs, read_event_tables

NOISE_STUDY = "moe_routing_noise_experiment_results"  # name of the file
# Column in the noise study's table -> column in the table of runs. `_noise_study` adds the two columns
# training_time_minutes and best_val_perplexity.
NOISE_STUDY_COLUMNS = {
    "seed": "seed",
    "noise_std": "noise",
    "load_balancing_weight": "lb",
    "val_loss": "val/loss",
    "val_accuracy": "val/accuracy",
    "val_perplexity": "val/perplexity",
    "training_time_minutes": "training_time_minutes",
    "peak_memory_gb": "peak_memory_gb",
    "best_val_perplexity": "best_val_perplexity",
    "expert_usage_cv": "routing/load_cv/pooled",
}


def write_sweep_tables(sweep: Path) -> pd.DataFrame:
    """Write the results.csv of a sweep, one row per run and grid, and return it as a table.

    For each grid over noise, lb and seed alone, also write a table in the format of the noise study, whose columns tell
    no other settings apart. For each grid over routers or capacity, also write one in the format of the routing bench.
    The names of the files of the grid with the shortest name do not name the grid.
    """
    runs = load_runs([sweep])
    write_text(sweep / "results.csv", as_csv(runs.drop(columns="claims")))
    written = set()
    for grid, members in sorted(runs.groupby("experiment"), key=lambda group: len(group[0])):
        tables = {}
        if {"noise", "lb"} == set(varied_factors(members)) - {"seed"}:
            tables[NOISE_STUDY] = _noise_study(members)
        if name := stem(members):
            past = read_event_tables(members["folder"], training=list(LATE))
            tables[f"{name}_summary"] = bench_table(with_training_means(members, past))
        for name, table in tables.items():
            suffix = re.sub(r"[^\w.,=+-]+", "_", f"_{grid.partition(': ')[2]}") if name in written else ""
            write_text(sweep / f"{name}{suffix}.csv", as_csv(table))
            written.add(name)
    return runs


def console_table(runs: pd.DataFrame, metrics: Iterable[str] = ()) -> str:
    """Return as text: mean ± std of the headline metrics and of `metrics` by condition, and the unfinished runs.

    It ends with whether the models of an experiment learned too little for a verdict.

    Each experiment, and each grid of an experiment, has a table of its own.
    """
    lines = []
    experiments = runs.groupby("experiment")
    for experiment, members in experiments:
        table = _condition_table(with_readable_levels(members), metrics)
        lines += [f"{experiment}\n{table}\n" if len(experiments) > 1 else table] if table else []
    runs = runs.drop_duplicates("folder")
    failures = unfinished(runs)
    lines.append(f"{len(runs) - len(failures)} of {len(runs)} runs finished")
    lines += [f"  {row.status}: {row.run}" + (f": {row.error}" if row.error else "") for row in failures.itertuples()]
    lines += dict.fromkeys(filter(None, (learned_little(members) for _, members in experiments)))
    return "\n".join(printable(line) for text in lines for line in text.splitlines())


def _condition_table(runs: pd.DataFrame, metrics: Iterable[str]) -> str:
    """Return the table of conditions as text; an empty text if no run has one of the metrics."""
    shown = present(runs, (*shown_together(runs, HEADLINE), *metrics))
    if not shown:
        return ""
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    try:
        table = spread_table(summary(runs, factors, shown)).to_string(index=False)
    except ValueError as error:  # a copied run folder repeats a seed; a finished sweep must not fail because of it
        table = f"not shown: {error}"
    return f"per condition: mean ± sample standard deviation (ddof=1) over n seeds\n{table}"


def _noise_study(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the finished runs with the column names of the noise study.

    As in that study, "best" is the best evaluation of a run.
    """
    runs = runs[runs["status"] == "finished"]
    evals = read_event_tables(runs["folder"]).evals.reindex(columns=["folder", "val/loss"])
    best = runs["folder"].map(evals.groupby("folder")["val/loss"].min()).astype(float)
    with np.errstate(over="ignore"):  # a diverged run has an infinite perplexity
        perplexity = np.exp(best)
    runs = runs.assign(best_val_perplexity=perplexity, training_time_minutes=runs["train_seconds"] / 60)
    return runs.reindex(columns=list(NOISE_STUDY_COLUMNS.values())).set_axis(list(NOISE_STUDY_COLUMNS), axis=1)
