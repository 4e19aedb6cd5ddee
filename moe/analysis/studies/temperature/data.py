"""The temperature study: which runs belong to it, their curves, their utilization and their means over seeds.

Every selection is a table or, as text, the reason why there is none. A run is one seed of one condition in all of them.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from moe.analysis.statistics import contrasts, with_intervals
from moe.config.schema import is_free
from moe.results.conditions import STD, tied_factors, varied_factors
from moe.results.table import ABSENT, FACTS

TEMPERATURE, LOSS = "router.temp", "val/loss"


def ablation(runs: pd.DataFrame) -> pd.DataFrame | str:
    """The finished runs at constant temperatures, those of the commonest length (of two as common, the shorter)."""
    steady, _ = _by_schedule(runs)
    return _comparable(_commonest_length(steady), TEMPERATURE, none="no finished run has a constant temperature")


def constant_runs(runs: pd.DataFrame) -> pd.DataFrame | str:
    """The finished runs at constant temperatures, of every length."""
    steady, _ = _by_schedule(runs)
    return _comparable(steady, TEMPERATURE, "steps", none="no finished run has a constant temperature")


def scheduled(runs: pd.DataFrame) -> pd.DataFrame | str:
    """The finished runs whose temperature follows a schedule, those of the commonest length.

    Beside them the runs that stay all the time where the schedules end, if nothing else tells the two apart.
    """
    steady, moving = _by_schedule(runs)
    moving = _commonest_length(moving)
    beside = steady[steady[TEMPERATURE].isin(moving[TEMPERATURE]) & steady["steps"].isin(moving["steps"])]
    none = "no finished run has a schedule of its temperature"
    both = _comparable(pd.concat([moving, beside]), "schedule", none=none)
    alone = _comparable(moving, "schedule", none=none)
    return alone if isinstance(both, str) or isinstance(alone, str) else both


def curves(members: pd.DataFrame, events: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame | str:
    """One row a run of `members` and event: folder, seed, router.temp, schedule, steps, step, and `columns` as numbers.

    `events` is `read_event_tables(...).evals`, or a join of it on `folder`.
    """
    columns = list(columns)
    absent = [column for column in ("folder", "step", *columns) if column not in events]
    if not absent:
        table = members[["folder", "seed", TEMPERATURE, "schedule", "steps"]].merge(
            events[["folder", "step", *columns]], on="folder"
        )
        absent = [column for column in columns if table[column].isna().all()]
    if absent:
        return f"no run has {', '.join(absent)} in its events"
    return table.astype(dict.fromkeys(columns, float)).sort_values(["folder", "step"])


def with_training(evals: pd.DataFrame, trains: pd.DataFrame, column: str) -> pd.DataFrame:
    """The evaluations with the mean of a training column over the steps since the one before, if there is any."""
    if not ({"folder", "step"} <= set(evals) and {"folder", "step", column} <= set(trains)):
        return evals
    ends = evals[["folder", "step"]].assign(evaluation=evals["step"]).sort_values("step")
    steps = trains[["folder", "step", column]].astype({column: float}).sort_values("step")
    steps = pd.merge_asof(steps, ends, on="step", by="folder", direction="forward")
    means = steps.groupby(["folder", "evaluation"], as_index=False)[column].mean()
    return evals.merge(means.rename(columns={"evaluation": "step"}), on=["folder", "step"], how="left")


def utilization(members: pd.DataFrame, evals: pd.DataFrame) -> pd.DataFrame | str:
    """The runs of `members` with what the last evaluation says of the (L, E) shares of assignments per expert.

    `shares`, (E), is the mean over layers and `ranked`, (E), the same of each layer's shares sorted first, largest to
    smallest: the i-th expert of one layer is not that of another. `utilization/variance` and `/std` (ddof 0, over a
    layer's experts) are means over layers; `/min` and `/max` are the extremes of all layers.
    """
    if "routing/utilization" not in evals or evals["routing/utilization"].isna().all():
        return "no run has routing/utilization in its events"
    known = evals.dropna(subset=["routing/utilization"]).sort_values("step").drop_duplicates("folder", keep="last")
    rows = []
    for folder, layers in known[["folder", "routing/utilization"]].itertuples(index=False):
        shares = np.array(layers)
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
    """Per combination of `by`: n seeds with a finite value, their mean, sample deviation and 95 % t interval."""
    values = table[np.isfinite(table[column].astype(float))]
    means = values.groupby(by)[column].agg(n="count", mean="mean", **{STD: "std"}).reset_index()  # ddof=1
    return with_intervals(means)


def ranking(members: pd.DataFrame, by: str, metric: str = LOSS) -> pd.DataFrame:
    """The levels of `by` with their mean over seeds, lowest first; empty if no value is finite."""
    return seed_means(members, [by], metric).sort_values("mean", kind="stable", ignore_index=True)


def names(members: pd.DataFrame) -> pd.Series:
    """The study's name of each run's experiment, temp_1.0 or schedule_linear, with the steps if they are unusual."""
    usual = members["steps"].mode()[0]
    told = zip(members[TEMPERATURE], members["schedule"], members["steps"], strict=True)
    named = [
        (f"temp_{temperature}" if schedule == "constant" else f"schedule_{schedule}")
        + (f"_{steps}_steps" if steps != usual else "")
        for temperature, schedule, steps in told
    ]
    return pd.Series(named, members.index)


def compare(members: pd.DataFrame, by: str, reference: float | str, metric: str = LOSS) -> pd.DataFrame:
    """The levels of `by` against one of them, paired by seed, with whether the 95 % t interval decides the sign."""
    table = contrasts(members, metric, [by], references={by: reference})
    if table.empty:
        return table
    return table.assign(decided=(table["ci_low"] > 0) | (table["ci_high"] < 0))


def _by_schedule(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Finished runs of routers that have a temperature: it stays the same; it follows a schedule."""
    needed = [TEMPERATURE, "schedule", "schedule.knob", "steps", "seed", LOSS]
    runs = runs.reindex(columns=[*runs, *(column for column in needed if column not in runs)])
    runs = runs[(runs["status"] == "finished") & runs[TEMPERATURE].notna() & (runs[TEMPERATURE] != ABSENT)]
    runs = runs.astype({TEMPERATURE: float})
    steady = runs["schedule"] == "constant"
    return runs[steady], runs[~steady & (runs["schedule.knob"] != "noise")]


def _commonest_length(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs["steps"].isin(runs["steps"].mode()[:1])]


def _comparable(runs: pd.DataFrame, *factors: str, none: str) -> pd.DataFrame | str:
    """The runs if nothing but `factors`, the seed and the experiment's name varies; one configuration counts once."""
    if runs.empty:
        return none
    # `quick_demo` is a part of `temperature_ablation`: the same configurations, and so the same runs
    runs = runs.drop_duplicates([c for c in runs if "/" not in c and c not in FACTS and not is_free(c)])
    # What only follows a factor, such as `schedule.start`, belongs to it; what else follows it would share its effect.
    tied = {name: led for name, led in tied_factors(runs).items() if led != "steps" and not name.startswith(f"{led}.")}
    others = [name for name in (*varied_factors(runs), *tied) if name not in (*factors, "seed", "experiment")]
    return f"{', '.join(others)} varies beside {', '.join(factors)} and seed" if others else runs
