"""The tables that a sweep writes and prints at its end: of its runs, and of its conditions."""

from collections.abc import Iterable
from pathlib import Path

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
from moe.results.table import load_runs


def write_sweep_tables(sweep: Path) -> pd.DataFrame:
    """Write the results.csv of a sweep, one row per run and grid, and return it as a table."""
    runs = load_runs([sweep])
    write_text(sweep / "results.csv", runs.drop(columns="claims").to_csv(index=False))
    return runs


def console_table(runs: pd.DataFrame, metrics: Iterable[str] = ()) -> str:
    """Return as text: mean ± std of the headline metrics and of `metrics` by condition, and the unfinished runs.

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
