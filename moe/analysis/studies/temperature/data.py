"""Select the runs of the temperature study, and compute their curves, expert utilization and means over seeds.

Every selection is a table with a row for each run. If there are no such runs, it is the reason as text.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from moe.analysis.statistics import contrasts, with_intervals
from moe.config.keys import is_free
from moe.results.conditions import STD, tied_factors, varied_factors
from moe.results.table import ABSENT, FACTS

TEMPERATURE, VALIDATION_LOSS = "router.temp", "val/loss"
TEMPERATURE_NOW = "temperature"  # of a step or an evaluation, where a schedule changes it


def ablation(runs: pd.DataFrame) -> pd.DataFrame | str:
    """Return the finished runs at constant temperatures with the most common number of steps (of two, the smaller)."""
    constant, _ = _by_schedule(runs)
    return _comparable(_most_common_length(constant), TEMPERATURE, none="no finished run has a constant temperature")


def constant_runs(runs: pd.DataFrame) -> pd.DataFrame | str:
    """Return the finished runs at constant temperatures, of every length."""
    constant, _ = _by_schedule(runs)
    return _comparable(constant, TEMPERATURE, "steps", none="no finished run has a constant temperature")


def scheduled(runs: pd.DataFrame) -> pd.DataFrame | str:
    """Return the finished runs whose temperature follows a schedule and that have the most common number of steps.

    Runs whose temperature is constant at the value where the schedules end are included if they differ in nothing else.
    """
    constant, changing = _by_schedule(runs)
    changing = _most_common_length(changing)
    reference = constant[constant[TEMPERATURE].isin(changing[TEMPERATURE]) & constant["steps"].isin(changing["steps"])]
    none = "no finished run has a schedule of its temperature"
    both = _comparable(pd.concat([changing, reference]), "schedule", none=none)
    alone = _comparable(changing, "schedule", none=none)
    return alone if isinstance(both, str) or isinstance(alone, str) else both


def evaluation_curves(members: pd.DataFrame, events: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame | str:
    """Return the evaluations of `members`, with a row for each run and step.

    The table has the columns folder, seed, router.temp, schedule, steps and step, and `columns` as numbers. `events` is
    `moe.results.table.read_event_tables(...).evals`, or that table with more columns.
    """
    columns = list(columns)
    absent = [column for column in ("folder", "step", *columns) if column not in events]
    if not absent:
        table = members[["folder", "seed", TEMPERATURE, "schedule", "steps"]].merge(
            events[["folder", "step", *columns]], on="folder"
        )
        table = table.dropna(subset=columns, how="all")
        absent = [column for column in columns if table[column].isna().all()]
    if absent:
        return f"no run has {', '.join(absent)} in its events"
    return table.astype(dict.fromkeys(columns, float)).sort_values(["folder", "step"])


def with_training(evals: pd.DataFrame, trains: pd.DataFrame, column: str) -> pd.DataFrame:
    """Add to each evaluation the mean of a training column over the steps since the previous evaluation.

    If the training steps do not have the column, the evaluations are returned unchanged.
    """
    if not ({"folder", "step"} <= set(evals) and {"folder", "step", column} <= set(trains)):
        return evals
    ends = evals[["folder", "step"]].assign(evaluation=evals["step"]).sort_values("step")
    steps = trains[["folder", "step", column]].astype({column: float}).sort_values("step")
    steps = pd.merge_asof(steps, ends, on="step", by="folder", direction="forward")
    means = steps.groupby(["folder", "evaluation"], as_index=False)[column].mean()
    return evals.merge(means.rename(columns={"evaluation": "step"}), on=["folder", "step"], how="left")


def with_every_temperature(evals: pd.DataFrame, trains: pd.DataFrame) -> pd.DataFrame:
    """Add a row for every training step with the temperature of this step, which evaluations have only now and then.

    The temperature of the last evaluation of a run stays, and that of the others is left out. Training event n belongs
    to the optimizer step n - 1. If the events do not have temperatures, the evaluations are returned unchanged.
    """
    columns = ["folder", "step", TEMPERATURE_NOW]
    if not (set(columns) <= set(evals) and set(columns) <= set(trains)):
        return evals
    steps = trains[columns].dropna()
    steps = steps.assign(step=steps["step"] - 1)
    last = evals["step"] == evals.groupby("folder")["step"].transform("max")
    known = evals["folder"].isin(steps["folder"])
    kept = evals.assign(**{TEMPERATURE_NOW: evals[TEMPERATURE_NOW].where(last | ~known)})
    return pd.concat([kept, steps], ignore_index=True)


def with_utilization(members: pd.DataFrame, evals: pd.DataFrame) -> pd.DataFrame | str:
    """Add to each run how its last evaluation distributes assignments over experts, from shares of shape (L, E).

    `shares`, (E), is the mean over layers. `ranked`, (E), is the mean over layers after the shares of each layer were
    sorted from largest to smallest, because expert i of one layer has nothing to do with expert i of another.
    `utilization/variance` and `utilization/std` (ddof 0, over the experts of a layer) are means over layers.
    `utilization/min` and `utilization/max` are the extremes of all layers. Runs whose layers have different numbers of
    experts are left out.
    """
    if "routing/utilization" not in evals or evals["routing/utilization"].isna().all():
        return "no run has routing/utilization in its events"
    known = evals.dropna(subset=["routing/utilization"]).sort_values("step").drop_duplicates("folder", keep="last")
    known = known[[len({*map(len, layers)}) < 2 for layers in known["routing/utilization"]]]
    if known.empty:
        return "in each run, layers have different numbers of experts"
    rows = []
    for folder, layers in known[["folder", "routing/utilization"]].itertuples(index=False):
        shares = np.array(layers, dtype=float)  # null becomes NaN
        rows.append(
            {
                "folder": folder,
                "shares": shares.mean(0),
                "ranked": -np.sort(-shares).mean(0),
                "utilization/variance": shares.var(1).mean(),
                "utilization/std": shares.std(1).mean(),
                "utilization/min": shares.min(),
                "utilization/max": shares.max(),
            }
        )
    table = members.merge(pd.DataFrame(rows), on="folder")
    return table if len(table) else "no run has routing/utilization in its events"


def seed_means(table: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Return n (seeds with a finite value), mean, deviation and 95 % t interval for each combination of `by`."""
    values = table[np.isfinite(table[column].astype(float))]
    means = values.groupby(by)[column].agg(n="count", mean="mean", **{STD: "std"}).reset_index()  # ddof=1
    return with_intervals(means)


def ranking(members: pd.DataFrame, by: str, metric: str = VALIDATION_LOSS) -> pd.DataFrame:
    """Return the levels of `by` with their mean over seeds, lowest first; an empty table if no value is finite."""
    return seed_means(members, [by], metric).sort_values("mean", kind="stable", ignore_index=True)


def experiment_names(members: pd.DataFrame) -> pd.Series:
    """Return the study's name for each run, such as temp_1.0 or schedule_linear.

    The number of steps is added if it is not the usual one.
    """
    usual = members["steps"].mode()[0]
    columns = zip(members[TEMPERATURE], members["schedule"], members["steps"], strict=True)
    named = [
        (f"temp_{temperature}" if schedule == "constant" else f"schedule_{schedule}")
        + (f"_{steps}_steps" if steps != usual else "")
        for temperature, schedule, steps in columns
    ]
    return pd.Series(named, members.index)


def against_best(members: pd.DataFrame, by: str, best: float | str) -> pd.DataFrame:
    """Return the contrasts of the final loss of every other level of `by` with the best one, paired by seed.

    They describe and test nothing: the best level was chosen because of these same losses.
    """
    return contrasts(members, VALIDATION_LOSS, [by], references={by: best})


def _by_schedule(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the finished runs whose router has a constant temperature, and those where it follows a schedule."""
    needed = [TEMPERATURE, "schedule", "schedule.knob", "steps", "seed", VALIDATION_LOSS]
    runs = runs.reindex(columns=[*runs, *(column for column in needed if column not in runs)])
    runs = runs[(runs["status"] == "finished") & runs[TEMPERATURE].notna() & (runs[TEMPERATURE] != ABSENT)]
    runs = runs.astype({TEMPERATURE: float})
    constant = runs["schedule"] == "constant"
    return runs[constant], runs[~constant & (runs["schedule.knob"] != "noise")]


def _most_common_length(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs["steps"].isin(runs["steps"].mode()[:1])]


def _comparable(runs: pd.DataFrame, *factors: str, none: str) -> pd.DataFrame | str:
    """Return the runs if they differ only in `factors`, seed and experiment; equal configurations count once."""
    if runs.empty:
        return none
    # `quick_demo` has some configurations of `temperature_ablation`, and so the same runs
    runs = runs.drop_duplicates([c for c in runs if "/" not in c and c not in FACTS and not is_free(c)])
    # A key below a factor, such as `schedule.start`, belongs to it. Any other key that changes with it is a confounder.
    tied = {name: led for name, led in tied_factors(runs).items() if led != "steps" and not name.startswith(f"{led}.")}
    others = [name for name in (*varied_factors(runs), *tied) if name not in (*factors, "seed", "experiment")]
    return f"{', '.join(others)} varies in addition to {', '.join(factors)} and seed" if others else runs
