"""Compare settings at equal cost: training FLOPs, seconds, active or total parameters.

FLOPs and seconds are read from the validation curve of each run: its loss at a cost is interpolated between two
evaluations, linearly in the log of the cost. Parameters need runs of several sizes, between which the final losses are
interpolated in the same way. Nothing is extrapolated. A run that is read before its last step still has a high
learning rate there, which makes it look worse than a run of that length: `Difference.share` says how early that is.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe.analysis.simultaneous import interval, over_time
from moe.analysis.statistics import comparisons
from moe.results.comparable import incomparable
from moe.results.table import read_event_tables

LOSS = "val/loss"
FLOPS, SECONDS, ACTIVE, TOTAL = "FLOPs", "seconds", "active parameters", "total parameters"
PARAMETERS = {ACTIVE: "parameters.active", TOTAL: "parameters.total"}
MEASURED = "measured"  # seconds of these runs, on a machine that the reader calls idle
CLOSE = 0.01  # costs that differ by this share are equal
SCALES = ("steps", "model", "batch_size", "grad_accum")  # factors that change the size of a run; and model....


class Difference(NamedTuple):
    """The difference of two settings at one cost: mean over paired seeds, with its 95 % t interval.

    share: where the side that is read earlier is read, as a share of its own training; 1 for parameters.
    note: why there is no difference, if there is none.
    """

    cost: float
    n: int
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    share: float = 1.0
    note: str = ""


Curves = dict[Any, pd.DataFrame]  # seed -> columns cost and loss, in rising order of cost


def is_scale(factor: str) -> bool:
    """Return whether a factor changes the size of a run."""
    return factor in SCALES or factor.startswith("model.")


def training_curves(
    runs: pd.DataFrame, evals: pd.DataFrame, *, metric: str = LOSS, seconds: float | str | None = None
) -> pd.DataFrame:
    """Return what each evaluation of a finished run had cost: columns folder, step, loss, FLOPs and seconds.

    A training step costs three times the forward FLOPs of its tokens (`moe.model.cost.flops_per_token`). seconds: the
    FLOPs per second that the machine is to reach, or `MEASURED`: the run's median speed of training steps. Without it
    the seconds are NaN. The evaluation before the first step cost nothing and is left out.
    """
    finished = runs[runs["status"] == "finished"].drop_duplicates("folder").set_index("folder")
    columns = ["folder", "step", "loss", FLOPS, SECONDS]
    if metric not in evals or finished.empty:
        return pd.DataFrame(columns=columns)
    keys = ["batch_size", "grad_accum", "data.seq_len"]
    number = finished.reindex(columns=[*keys, "flops_per_token", "time/tokens_per_s"]).apply(
        pd.to_numeric, errors="coerce"
    )
    tokens = number[keys].prod(axis=1, skipna=False)  # of a step
    flops = 3 * number["flops_per_token"] * tokens
    speed = tokens / number["time/tokens_per_s"] if seconds == MEASURED else flops / float(seconds or math.nan)
    table = evals.loc[evals["folder"].isin(finished.index) & (evals["step"] > 0), ["folder", "step", metric]]
    table = table.rename(columns={metric: "loss"}).astype({"loss": float})
    table = table.assign(**{FLOPS: table["step"] * table["folder"].map(flops)})
    table = table.assign(**{SECONDS: table["step"] * table["folder"].map(speed)})
    return table[np.isfinite(table["loss"])].sort_values(["folder", "step"])[columns]


def equal_cost(
    runs: pd.DataFrame, curves: pd.DataFrame, factors: list[str], references: dict[str, Any], cost: str
) -> pd.DataFrame:
    """Return each comparison of two levels at one cost: columns factor, level, reference, within, and `Difference`.

    The cost is the largest that every run of the comparison has reached. It has no row for sizes at equal parameters,
    and none if a side has no curve.
    """
    rows = []
    for names, treated, baseline in compared(runs, factors, references, cost):
        if reason := incomparable(LOSS, treated, baseline):
            rows.append(names | Difference(math.nan, 0, note=reason)._asdict())
            continue
        if found := differences(_curves(treated, curves, cost), _curves(baseline, curves, cost)):
            rows.append(names | found[0]._asdict())
    return pd.DataFrame(rows, columns=["factor", "level", "reference", "within", *Difference._fields])


def compared(
    runs: pd.DataFrame, factors: list[str], references: dict[str, Any], cost: str
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    """Yield the comparisons of finished runs; at equal parameters the runs of all sizes make one comparison.

    Numbers of steps are not compared: at equal cost a longer run is a run that has not ended.
    """
    finished = runs[runs["status"] == "finished"]
    kept = [factor for factor in factors if not (cost in PARAMETERS and is_scale(factor))]
    references = {factor: level for factor, level in references.items() if factor in kept}
    for names, treated, baseline in comparisons(finished, kept, references):
        if names["factor"] != "steps":
            yield names, treated, baseline


def differences(treated: Curves, baseline: Curves, shares: tuple[float, ...] = (1.0,)) -> list[Difference]:
    """Return the differences at shares of the largest common cost; none if no seed has both sides.

    With several shares, the intervals hold together (`moe.analysis.simultaneous.over_time`).
    """
    seeds = sorted(set(treated) & set(baseline))
    sides = [[side[seed] for seed in seeds] for side in (treated, baseline)]
    if not seeds:
        return []
    both = [curve["cost"] for side in sides for curve in side]
    least, most = max(cost.min() for cost in both), min(cost.max() for cost in both)
    if not most >= least * (1 - CLOSE):
        return [Difference(math.nan, 0, note="the two have no cost in common")]
    costs = [share * most for share in shares if share * most >= least] or [most]
    values = [np.array([at_cost(curve, costs) for curve in side]) for side in sides]
    gaps = values[0] - values[1]
    early = min(most / cost.max() for cost in both)
    factor = over_time(gaps) if len(costs) > 1 else None
    found = []
    for cost, column in zip(costs, gaps.T, strict=True):
        low, high = interval(column, factor)
        found.append(Difference(cost, len(seeds), float(column.mean()), low, high, early))
    return found


def at_cost(curve: pd.DataFrame, costs: list[float]) -> np.ndarray:
    """Return the loss at these costs, interpolated linearly in the log of the cost."""
    return np.interp(np.log(costs), np.log(curve["cost"].to_numpy()), curve["loss"].to_numpy())


def at_common_cost(runs: pd.DataFrame, metrics: list[str], cost: str) -> pd.DataFrame:
    """Return the runs with these metrics as they were at the largest cost that all of the finished runs have reached.

    They are NaN for a run without evaluations. Seconds are as measured.
    """
    finished = runs[runs["status"] == "finished"]
    evals = read_event_tables(finished["folder"].unique()).evals
    for metric in metrics:
        curves = training_curves(finished, evals, metric=metric, seconds=MEASURED).dropna(subset=[cost])
        most = [float(curves.groupby("folder")[cost].max().min())]
        found = {
            folder: at_cost(curve.rename(columns={cost: "cost"}), most)[0] for folder, curve in curves.groupby("folder")
        }
        runs = runs.assign(**{metric: runs["folder"].map(found).astype(float)})
    return runs


def _curves(side: pd.DataFrame, curves: pd.DataFrame, cost: str) -> Curves:
    """Return the curve of each seed: of its run over training, or of its runs over their sizes."""
    if cost in PARAMETERS:
        points = side.rename(columns={PARAMETERS[cost]: "cost", LOSS: "loss"})[["seed", "cost", "loss"]]
    else:
        seeds = side.drop_duplicates("folder").set_index("folder")["seed"]
        points = curves[curves["folder"].isin(seeds.index)].rename(columns={cost: "cost"})
        points = points.assign(seed=points["folder"].map(seeds))[["seed", "cost", "loss"]]
    points = points.astype({"cost": float, "loss": float}).dropna()
    return {seed: members.groupby("cost", as_index=False)["loss"].mean() for seed, members in points.groupby("seed")}


def points(runs: pd.DataFrame, curves: pd.DataFrame, *, last: bool) -> pd.DataFrame:
    """Return the points of the runs' curves, or only the last one of each: columns seed, FLOPs and loss."""
    seeds = runs.drop_duplicates("folder").set_index("folder")["seed"]
    found = curves[curves["folder"].isin(seeds.index)].dropna(subset=[FLOPS])
    found = found.drop_duplicates("folder", keep="last") if last else found
    return found.assign(seed=found["folder"].map(seeds))[["seed", FLOPS, "loss"]].reset_index(drop=True)
