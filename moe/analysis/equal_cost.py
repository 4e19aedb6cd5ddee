"""Compare settings at equal cost: training FLOPs, seconds, active or total parameters.

FLOPs and seconds are read from the validation curve of each run: its loss at a cost is interpolated between its
evaluations (`at_cost`). Parameters need runs of several sizes, between which the final losses are interpolated in the
same way. Nothing is extrapolated. A run that is read before its last step still has a high learning rate there, which
makes it look worse than a run of that length: `Difference.share` says how early that is.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from moe.analysis.simultaneous import interval
from moe.analysis.statistics import comparisons, name_cell
from moe.results.comparable import TEXT, TOKENIZER, incomparable
from moe.results.conditions import conditions
from moe.results.table import read_event_tables

LOSS = "val/loss"
FLOPS, SECONDS, ACTIVE, TOTAL = "FLOPs", "seconds", "active parameters", "total parameters"
PARAMETERS = {ACTIVE: "parameters.active", TOTAL: "parameters.total"}
MEASURED = "measured"  # seconds of these runs, on a machine that the reader calls idle
OF_COMPARISONS = ("folder", "seed", "status", "causal", "place", LOSS, *PARAMETERS.values(), *TEXT, TOKENIZER)
CLOSE = 0.01  # costs that differ by this share are equal
NOTHING_IN_COMMON = "the two have no cost in common"
TOO_FEW = """\
: a run ends before the first evaluation of another, which is at step {step}; train with eval_every={every} or less"""
BUDGET = "variant"  # the arms budget_... change the number of steps
# Routers with more experts in training than in evaluation, so that their training FLOPs are higher than a record says.
MORE_IN_TRAINING = ("dense_mixer", "matryoshka")
SCALES = ("steps", "model", "batch_size", "grad_accum")  # factors that change the size of a run; and model....


class Difference(NamedTuple):
    """The difference of two settings at one cost: mean over paired seeds, with its 95 % t interval.

    share: where the side that is read earlier is read, as a share of its own training; 1 for parameters.
    gap: how far the losses of the two points differ between which a loss was interpolated, on average over the seeds,
    on the side where that is more. The error of interpolation is smaller if the loss falls steadily.
    note: why there is no difference, if there is none.
    """

    cost: float
    n: int
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    share: float = 1.0
    gap: float = 0.0
    note: str = ""


class NothingInCommonError(ValueError):
    """Tells that curves have no cost in common, so that nothing can be compared at equal cost."""


Curves = dict[Any, pd.DataFrame]  # seed -> columns cost and loss, in rising order of cost


def is_scale(factor: str) -> bool:
    """Return whether a factor changes the size of a run."""
    return factor in SCALES or factor.startswith("model.")


def is_budget(runs: pd.DataFrame, factor: str) -> bool:
    """Return whether the levels of a factor are budgets of training compute."""
    return factor == BUDGET and bool(runs[factor].astype(str).str.startswith("budget_").all())


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
    for names, treated, baseline in paired_sides(runs, factors, references, cost):
        if reason := incomparable(LOSS, treated, baseline):
            rows.append(names | Difference(math.nan, 0, note=reason)._asdict())
            continue
        if found := difference(_curves(treated, curves, cost), _curves(baseline, curves, cost)):
            share = 1.0 if cost in PARAMETERS else found.share
            rows.append(names | found._replace(share=share)._asdict())
    return pd.DataFrame(rows, columns=["factor", "level", "reference", "within", *Difference._fields])


def paired_sides(
    runs: pd.DataFrame, factors: list[str], references: dict[str, Any], cost: str
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    """Yield the comparisons of finished runs; at equal parameters the runs of all sizes make one comparison.

    Numbers of steps and budgets are not compared: at equal cost a longer run is a run that has not ended. The runs have
    the columns that a comparison at equal cost needs, because it takes long to pick rows of a wide table. Settings of
    `MORE_IN_TRAINING` are not compared at equal FLOPs.
    """
    columns = [column for column in runs if column in (*OF_COMPARISONS, *factors)]
    finished = runs.loc[runs["status"] == "finished", columns]
    if cost == FLOPS and "router" in finished:
        finished = finished[~finished["router"].isin(MORE_IN_TRAINING)]
    kept = [factor for factor in factors if not (cost in PARAMETERS and is_scale(factor))]
    references = {factor: level for factor, level in references.items() if factor in kept}
    for names, treated, baseline in comparisons(finished, kept, references):
        if names["factor"] != "steps" and not is_budget(runs, names["factor"]):
            yield names, treated, baseline


def difference(treated: Curves, baseline: Curves) -> Difference | None:
    """Return the difference at the largest common cost; None if no seed has both sides."""
    seeds = sorted(set(treated) & set(baseline))
    sides = [[side[seed] for seed in seeds] for side in (treated, baseline)]
    if not seeds:
        return None
    try:
        most = _largest_common([curve for side in sides for curve in side])
    except NothingInCommonError as error:
        return Difference(math.nan, 0, note=str(error))
    a, b = (np.array([at_cost(curve, most) for curve in side]) for side in sides)
    gap = max(float(np.mean([_gap(curve, most) for curve in side])) for side in sides)
    early = min(most / curve["cost"].max() for side in sides for curve in side)
    low, high = interval(a - b)
    return Difference(most, len(seeds), float((a - b).mean()), low, high, early, gap)


def _largest_common(curves: Sequence[pd.DataFrame], place: str = "") -> float:
    """Return the largest cost that every curve has reached.

    Raises NothingInCommonError, naming the place, if it lies before the start of one. If the curves know their steps,
    it also says which `eval_every` would give that one an earlier start.
    """
    late = max(curves, key=lambda curve: curve["cost"].min())
    first, end = late.iloc[int(late["cost"].argmin())], min(float(curve["cost"].max()) for curve in curves)
    if end >= first["cost"] * (1 - CLOSE):
        return end
    text = f"{NOTHING_IN_COMMON}, at {place}" if place else NOTHING_IN_COMMON
    if every := math.floor(first.get("step", 0) * end / first["cost"]):
        text += TOO_FEW.format(step=int(first["step"]), every=every)
    raise NothingInCommonError(text)


def at_cost(curve: pd.DataFrame, cost: float) -> float:
    """Return the loss at a cost, interpolated in the log of the cost.

    The interpolation is piecewise cubic and keeps the curve monotone between its points (Fritsch and Carlson 1980). A
    straight line lies above a loss that falls ever more slowly, which would favor the run that ends first. Between two
    points that are all there are, it is a straight line.
    """
    known, wanted = np.log(curve["cost"].to_numpy()), math.log(cost)
    if len(known) < 2:
        return float(curve["loss"].iloc[0])
    return float(PchipInterpolator(known, curve["loss"].to_numpy())(np.clip(wanted, known[0], known[-1])))


def _gap(curve: pd.DataFrame, cost: float) -> float:
    """Return how far the losses of a curve's neighboring points differ at a cost, and 0 at a point."""
    known, loss = curve["cost"].to_numpy(), curve["loss"].to_numpy()
    after = min(int(np.searchsorted(known, cost)), len(known) - 1)
    at_a_point = math.isclose(known[after], cost, rel_tol=1e-9)
    return 0.0 if at_a_point else float(abs(loss[max(after - 1, 0)] - loss[after]))


def metric_curves(
    runs: pd.DataFrame, metrics: list[str], cost: str, evals: pd.DataFrame | None = None
) -> dict[str, dict[str, pd.DataFrame]]:
    """Return the curve of each metric in each finished run that has one: {metric: {folder: columns cost and loss}}.

    Seconds are as measured. evals: the evaluations; by default they are read from the run folders.
    """
    finished = runs[runs["status"] == "finished"]
    evals = read_event_tables(finished["folder"].unique()).evals if evals is None else evals
    found = {}
    for metric in metrics:
        curves = training_curves(finished, evals, metric=metric, seconds=MEASURED).dropna(subset=[cost])
        found[metric] = dict(iter(curves.rename(columns={cost: "cost"}).groupby("folder")))
    return found


def at_common_cost(runs: pd.DataFrame, others: list[str], curves: dict[str, dict[str, pd.DataFrame]]) -> pd.DataFrame:
    """Return the runs with these metrics as they were at the largest cost that all runs of their cell have reached.

    A cell is a combination of levels of the factors `others`. A metric is NaN for a run without a curve. Raises
    NothingInCommonError if the runs of a cell have no cost in common.
    """
    cells = []
    for levels, members in conditions(runs, others):
        for metric, of_run in curves.items():
            known = {folder: of_run[folder] for folder in members["folder"] if folder in of_run}
            most = _largest_common([*known.values()], name_cell(levels)) if known else math.nan
            found = {folder: at_cost(curve, most) for folder, curve in known.items()}
            members = members.assign(**{metric: members["folder"].map(found).astype(float)})
        cells.append(members)
    return pd.concat(cells) if cells else runs


def _curves(side: pd.DataFrame, curves: pd.DataFrame, cost: str) -> Curves:
    """Return the curve of each seed: of its run over training, or of its runs over their sizes."""
    if cost in PARAMETERS:
        points = side.rename(columns={PARAMETERS[cost]: "cost", LOSS: "loss"})[["seed", "cost", "loss"]]
    else:
        seeds = side.drop_duplicates("folder").set_index("folder")["seed"]
        points = curves[curves["folder"].isin(seeds.index)].rename(columns={cost: "cost"})
        points = points.assign(seed=points["folder"].map(seeds))[["seed", "cost", "loss", "step"]]
    points = points.astype({"cost": float, "loss": float}).dropna()
    means = points.groupby(["seed", "cost"], as_index=False).mean()
    return {seed: members.drop(columns="seed") for seed, members in means.groupby("seed")}


def points(runs: pd.DataFrame, curves: pd.DataFrame, *, last: bool) -> pd.DataFrame:
    """Return the points of the runs' curves, or only the last one of each: columns seed, FLOPs and loss."""
    seeds = runs.drop_duplicates("folder").set_index("folder")["seed"]
    found = curves[curves["folder"].isin(seeds.index)].dropna(subset=[FLOPS])
    found = found.drop_duplicates("folder", keep="last") if last else found
    return found.assign(seed=found["folder"].map(seeds))[["seed", FLOPS, "loss"]].reset_index(drop=True)
