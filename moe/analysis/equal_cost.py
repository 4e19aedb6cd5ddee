"""Compare settings at equal cost: training FLOPs, seconds, active or total parameters.

FLOPs and seconds are read from the validation curve of each run: its loss at a cost is interpolated between its
evaluations (`at_cost`). Parameters need runs of several sizes, between which the final losses are interpolated in the
same way, within each level of what else changes the model. Nothing is extrapolated. A run that is read before its last
step still has a high learning rate there, which makes it look worse than a run of that length: `Difference.share` says
how early that is.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from moe.analysis.sentences import enumerated
from moe.analysis.simultaneous import interval
from moe.analysis.statistics import NAMES, comparisons, name_cell, table_of_comparisons
from moe.results.comparable import LATER_TOKENS, TEXT, TOKENIZER, incomparable, other_causality
from moe.results.conditions import conditions
from moe.results.conditions import levels as levels_of
from moe.results.table import read_event_tables, values_without_limit
from moe.results.training_flops import CLOSE, SPENT, of_step_as_evaluated, tokens_of_step, training_flops

LOSS = "val/loss"
FLOPS, SECONDS, ACTIVE, TOTAL = "FLOPs", "seconds", "active parameters", "total parameters"
PARAMETERS = {ACTIVE: "parameters.active", TOTAL: "parameters.total"}
MEASURED = "measured"  # seconds of these runs, on a machine that the reader calls idle
OF_COMPARISONS = ("folder", "seed", "status", "causal", "place", LOSS, *PARAMETERS.values(), *TEXT, TOKENIZER)
NOTHING_IN_COMMON = "the two have no cost in common"
NO_EVALUATIONS = "no evaluation of these runs is known"
ONLY_AT_THE_END = "{metric} is known only at the end of training, so it cannot be read at equal cost"
NOT_RECORDED = """\
they are older than the record of training FLOPs, and their evaluation does not tell these FLOPs: a token may have had \
another number of experts in training, or a capacity limit may have dropped assignments"""
TOO_FEW = ": a run ends before the first evaluation of another"
OFTEN_ENOUGH = "train with eval_every={every}"
STEEPEST = 2.0  # see `bounds_at_cost`; docs/statistics.md says how curves of real runs compare with it
BUDGET = "variant"  # the arms budget_... change the number of steps
SCALES = ("steps", "batch_size", "grad_accum")  # factors that change the length of a run


class Difference(NamedTuple):
    """The difference of two settings at one cost: mean over paired seeds, with its 95 % t interval.

    share: where the side that is read earlier is read, as a share of its own training; 1 for parameters.
    gap: how far the losses of the two points differ between which a loss was interpolated, on average over the seeds,
    on the side where that is more. The error of interpolation is smaller if the loss falls steadily.
    note: why there is no difference, if there is none, or why the losses are not comparable. eval_every: the largest
    with which there would be one; 0 if the note has another reason.
    """

    cost: float
    n: int
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    share: float = 1.0
    gap: float = 0.0
    note: str = ""
    eval_every: int = 0


class NoEqualCostError(ValueError):
    """Tells why nothing can be compared at equal cost. reason, eval_every: see `Difference`."""

    def __init__(self, reason: str, eval_every: int = 0) -> None:
        super().__init__("; ".join([reason, *advice([eval_every])]))
        self.reason, self.eval_every = reason, eval_every


def advice(eval_every: Iterable[int]) -> list[str]:
    """Return what gives all differences a cost in common that have such an `eval_every`; nothing if none has."""
    known = [each for each in eval_every if each]
    return [OFTEN_ENOUGH.format(every=min(known))] if known else []


Curves = dict[Any, pd.DataFrame]  # seed -> columns cost and loss, in rising order of cost


def is_scale(factor: str) -> bool:
    """Return whether a factor changes the length of a run or the size of its model."""
    return factor in SCALES or _is_size_of_model(factor)


def _is_size_of_model(factor: str) -> bool:
    return factor == "model" or factor.startswith("model.")


def is_budget(runs: pd.DataFrame, factor: str) -> bool:
    """Return whether the levels of a factor are budgets of training compute."""
    return factor == BUDGET and bool(runs[factor].astype(str).str.startswith("budget_").all())


def training_curves(
    runs: pd.DataFrame, evals: pd.DataFrame, *, metric: str = LOSS, seconds: float | str | None = None
) -> pd.DataFrame:
    """Return what each evaluation of a finished run had cost: columns folder, step, loss, FLOPs and seconds.

    FLOPs are those that the training steps spent (`moe.results.training_flops`), and NaN if they are not known.
    seconds: the FLOPs per second that the machine is to reach, or `MEASURED`: the run's median speed of training steps.
    Without it the seconds are NaN. The evaluation before the first step cost nothing and is left out.
    """
    finished = runs[runs["status"] == "finished"].drop_duplicates("folder").set_index("folder")
    columns = ["folder", "step", "loss", FLOPS, SECONDS]
    if metric not in evals or finished.empty:
        return pd.DataFrame(columns=columns)
    table = evals[evals["folder"].isin(finished.index) & (evals["step"] > 0)]
    table = table.reindex(columns=["folder", "step", metric, SPENT]).rename(columns={metric: "loss"})
    table = table.astype({"loss": float, SPENT: float})
    flops = table[SPENT].fillna(table["step"] * table["folder"].map(of_step_as_evaluated(finished)))
    if seconds == MEASURED:
        speed = pd.to_numeric(finished.get("time/tokens_per_s", pd.Series(math.nan, finished.index)), errors="coerce")
        time = table["step"] * table["folder"].map(tokens_of_step(finished) / speed)
    else:
        time = flops / float(seconds or math.nan)
    table = table.assign(**{FLOPS: flops, SECONDS: time})
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
            note = LATER_TOKENS if found.n and other_causality(treated, baseline) else found.note
            rows.append(names | found._replace(share=share, note=note)._asdict())
    return table_of_comparisons(rows, [*NAMES, *Difference._fields])


def paired_sides(
    runs: pd.DataFrame, factors: list[str], references: dict[str, Any], cost: str
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    """Yield the comparisons of finished runs; at equal parameters the models of all `sizes` make one comparison.

    Numbers of steps and budgets are not compared: at equal cost a longer run is a run that has not ended. The runs have
    the columns that a comparison at equal cost needs, because it takes long to pick rows of a wide table. Those whose
    training FLOPs are not known are not compared at equal FLOPs.
    """
    columns = [column for column in runs if column in (*OF_COMPARISONS, *factors)]
    finished = runs.loc[runs["status"] == "finished", columns]
    known = training_flops(runs).notna() if cost == FLOPS else runs["folder"].notna()
    folders = set(runs.loc[known, "folder"])
    of_size = sizes(finished, factors, cost) if cost in PARAMETERS else []
    kept = [factor for factor in factors if factor not in of_size]
    lengths = (*SCALES, *filter(_is_size_of_model, factors)) if cost in PARAMETERS else ("steps",)
    references = {factor: level for factor, level in references.items() if factor in kept}
    for names, treated, baseline in comparisons(finished, kept, references):
        if names["factor"] not in lengths and not is_budget(runs, names["factor"]):
            sides = [side[side["folder"].isin(folders)] for side in (treated, baseline)]
            if all(map(len, sides)):
                yield names, *sides


def sizes(runs: pd.DataFrame, factors: list[str], cost: str) -> list[str]:
    """Return the factors over whose levels losses are interpolated at equal parameters.

    That is the factor of the model that changes the parameters most, with those that change only together with it.
    Other factors of the model, such as the number of experts beside the dimension, change the loss by another law, so
    their levels are no points of the same curve.
    """
    fixed = {"model.num_experts"} if cost == ACTIVE else set[str]()  # they hardly change the active parameters
    of_model = [factor for factor in factors if _is_size_of_model(factor) and factor not in fixed]
    means = {factor: runs.groupby(factor)[PARAMETERS[cost]].mean().dropna() for factor in of_model}
    change = {factor: (each.max() / each.min(), len(each)) for factor, each in means.items() if len(each) > 1}
    first = max(change, key=change.__getitem__, default=None)
    if first is None or change[first][0] == 1:
        return []
    return [factor for factor in of_model if (runs.groupby(first)[factor].nunique() == 1).all()]


def difference(treated: Curves, baseline: Curves) -> Difference | None:
    """Return the difference at the largest common cost; None if no seed has both sides."""
    seeds = sorted(set(treated) & set(baseline))
    sides = [[side[seed] for seed in seeds] for side in (treated, baseline)]
    if not seeds:
        return None
    try:
        most = _largest_common([curve for side in sides for curve in side])
    except NoEqualCostError as error:
        return Difference(math.nan, 0, note=error.reason, eval_every=error.eval_every)
    a, b = (np.array([at_cost(curve, most) for curve in side]) for side in sides)
    gap = max(float(np.mean([_gap(curve, most) for curve in side])) for side in sides)
    early = min(most / curve["cost"].max() for side in sides for curve in side)
    low, high = interval(a - b)
    return Difference(most, len(seeds), float((a - b).mean()), low, high, early, gap)


def _largest_common(curves: Sequence[pd.DataFrame], place: str = "") -> float:
    """Return the largest cost that every curve has reached.

    Raises NoEqualCostError, naming the place, if it lies before the start of one. If the curves know their steps,
    it also says which `eval_every` would give that one an earlier start.
    """
    late = max(curves, key=lambda curve: curve["cost"].min())
    first, end = late.iloc[int(late["cost"].argmin())], min(float(curve["cost"].max()) for curve in curves)
    if end >= first["cost"] * (1 - CLOSE):
        return end
    text = f"{NOTHING_IN_COMMON}, at {place}" if place else NOTHING_IN_COMMON
    every = math.floor(first.get("step", 0) * end / first["cost"])
    raise NoEqualCostError(text + TOO_FEW if every else text, every)


def at_cost(curve: pd.DataFrame, cost: float) -> float:
    """Return the loss at a cost, interpolated in the log of the cost.

    The interpolation is piecewise cubic and keeps the curve monotone between its points (Fritsch and Carlson 1980). A
    straight line lies above a loss that falls ever more slowly, which would favor the run that ends first. Between two
    points that are all there are, it is a straight line. At a point, it is exactly the loss there.
    """
    place, loss = _place(curve, cost), curve["loss"].to_numpy()
    if place == round(place):
        return float(loss[round(place)])
    known, beside = np.log(curve["cost"].to_numpy()), loss[math.floor(place) : math.ceil(place) + 1]
    return float(np.clip(PchipInterpolator(known, loss)(math.log(cost)), beside.min(), beside.max()))


def _place(curve: pd.DataFrame, cost: float) -> float:
    """Return at which point of a curve a cost lies, in the log of the cost, such as 1.5 halfway between the second two.

    Before the first point it is 0, and beyond the last one the number of that. Rounding is passed over.
    """
    known = np.log(curve["cost"].to_numpy())
    place = float(np.interp(math.log(cost), known, np.arange(len(known))))
    return float(round(place)) if math.isclose(place, round(place), abs_tol=1e-9) else place


def bounds_at_cost(curve: pd.DataFrame, cost: float) -> tuple[float, float, float]:
    """Return the loss of a curve at a cost (`at_cost`), and the least and the largest that it may have there.

    At a point, the three are equal. Between two points, the loss lies between those of the points. In the log of the
    cost, it changes at most `STEEPEST` times as fast as on average from one to the other.
    """
    place, loss, read = _place(curve, cost), curve["loss"].to_numpy(), at_cost(curve, cost)
    if place == round(place):
        return read, read, read
    first, second = loss[math.floor(place)], loss[math.ceil(place)]
    since, until = (STEEPEST * abs(first - second) * part for part in (place % 1, 1 - place % 1))
    least = max(min(first, second), first - since, second - until)
    most = min(max(first, second), first + since, second + until)
    return read, float(min(least, read)), float(max(most, read))


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

    Seconds are as measured. evals: the evaluations; by default they are read from the run folders. Raises
    NoEqualCostError if no run has a curve of a metric.
    """
    finished = runs[runs["status"] == "finished"]
    evals = read_event_tables(finished["folder"].unique()).evals if evals is None else evals
    if "capacity" in finished and len(evals):
        capacity = finished.drop_duplicates("folder").set_index("folder")["capacity"]
        evals = evals.assign(capacity=evals["folder"].map(capacity))
        evals = evals.assign(**values_without_limit(evals))
    found = {}
    for metric in metrics:
        _check_known_early(metric, evals[evals["folder"].isin(finished["folder"])] if len(evals) else evals)
        curves = training_curves(finished, evals, metric=metric, seconds=MEASURED).dropna(subset=[cost])
        found[metric] = dict(iter(curves.rename(columns={cost: "cost"}).groupby("folder")))
    return found


def _check_known_early(metric: str, evals: pd.DataFrame) -> None:
    """Raise NoEqualCostError for a metric that only the last evaluations of runs have, or none."""
    trained = evals[evals["step"] > 0] if len(evals) else evals
    if trained.empty:
        raise NoEqualCostError(NO_EVALUATIONS)
    early = trained[trained["step"] < trained.groupby("folder")["step"].transform("max")]
    if metric not in trained or (len(early) and early[metric].isna().all()):
        raise NoEqualCostError(ONLY_AT_THE_END.format(metric=metric))


def unknown_flops(runs: pd.DataFrame) -> str:
    """Return which finished runs are left out at equal FLOPs and why; an empty text if there is none."""
    finished = runs[runs["status"] == "finished"].drop_duplicates("folder")
    unknown = finished[training_flops(finished).isna()]
    if unknown.empty:
        return ""
    routers = levels_of(unknown["router"]) if "router" in unknown else []
    of_routers = f" ({enumerated([f'`{name}`' for name in routers])})" if routers else ""
    return f"{len(unknown)} of {len(finished)} runs{of_routers} are left out at equal FLOPs: {NOT_RECORDED}."


def at_common_cost(
    runs: pd.DataFrame,
    others: list[str],
    curves: dict[str, dict[str, pd.DataFrame]],
) -> list[pd.DataFrame]:
    """Return the runs with these metrics as they were at the largest cost that all runs of their cell have reached.

    One table has the metrics as they are read, one the least values, and one the largest (`bounds_at_cost`). A cell
    is a combination of levels of the factors `others`. A metric is NaN for a run without a curve. Raises
    NoEqualCostError if the runs of a cell have no cost in common.
    """
    cells = []
    for levels, members in conditions(runs, others):
        tables = [members] * 3
        for metric, of_run in curves.items():
            known = {folder: of_run[folder] for folder in members["folder"] if folder in of_run}
            most = _largest_common([*known.values()], name_cell(levels)) if known else math.nan
            found = {folder: bounds_at_cost(curve, most) for folder, curve in known.items()}
            values = pd.DataFrame.from_dict(found, "index", float, range(3)).reindex(members["folder"]).to_numpy().T
            tables = [table.assign(**{metric: each}) for table, each in zip(tables, values, strict=True)]
        cells.append(tables)
    return [pd.concat(tables) for tables in zip(*cells, strict=True)] if cells else [runs] * 3


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


def points(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the last point of the curve of each run, with the columns of `training_points`."""
    found = training_points(runs, curves)
    return found[found["step"] == found["end"]].reset_index(drop=True)


def training_points(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the points of the runs' curves whose FLOPs are known: columns seed, end, step, FLOPs and loss.

    end: the last step of the run.
    """
    seeds = runs.drop_duplicates("folder").set_index("folder")["seed"]
    found = curves[curves["folder"].isin(seeds.index)].dropna(subset=[FLOPS])
    found = found.assign(seed=found["folder"].map(seeds), end=found.groupby("folder")["step"].transform("max"))
    return found[["seed", "end", "step", FLOPS, "loss"]].reset_index(drop=True)
