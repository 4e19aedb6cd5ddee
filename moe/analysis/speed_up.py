"""Effective speed-up: how much compute a baseline needs for the loss of another setting, from a curve through it.

The fitted law is corrected by how far it is off at the baseline's own budgets, so that a setting with the baseline's
loss at the baseline's budget has a speed-up of exactly 1, in each resample too.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from moe.analysis.scaling import (
    CLOSE,
    COMPUTE,
    LEAST_BUDGETS,
    RESAMPLES,
    Estimate,
    Fit,
    budgets,
    by_budget,
    fit,
    resampled_seeds,
)
from moe.analysis.sentences import enumerated
from moe.results.comparable import NOT_COMPARABLE

SAVES, COSTS_MORE, NOT_APART = "saves compute", "costs more", "not told apart"
NOT_SHOWN = "not shown"  # no interval, or it leaves out 1, but no runs of the reference confirm it
NOT_REACHED = "no run of the reference has this loss, so nothing shows that the setting costs more"
NOT_CHECKED = "no run of the reference ended at this compute, so nothing shows that compute is saved"
STILL_TRAINED = """\
runs of the reference went on at this compute, and one that ends there has another loss, so nothing shows that compute \
is {what}"""
FEW_HERE = """\
too few of the seeds have runs of the reference that ended at this compute, so nothing shows that compute is {what}"""
TOO_SMALL = "the curve begins at more than this compute, so nothing shows that the setting costs more"
OTHERWISE = "the losses of the runs of the reference that ended at this compute say otherwise, so there is no verdict"
LEFT_OUT = "left out, as not both sides have them here: seeds {seeds}"
TOO_FEW = "left out, as the reference has fewer than three budgets of them: seeds {seeds}"
NO_POINT = "left out of the curve, as too few of the seeds have runs of the reference there: {budgets} FLOPs"
MOST_LOG = 700.0  # a larger log is one of an infinite number


class SpeedUp(NamedTuple):
    """How many times as much compute the baseline needs for an arm's loss, at one budget of the arm.

    of_training: whether the curve goes through the evaluations of the baseline's runs.
    checked: whether runs of the baseline ended at this budget, or, unless `of_training`, at smaller and larger ones. It
    is false, as `reached` is, if runs ended at this budget, but too few of the seeds have them.
    Otherwise the curve is extrapolated there, or goes through runs that were still trained, and does not show that an
    arm saves compute. reached: whether the baseline's runs reach this loss, and the curve has a point at this budget or
    at a smaller one; if `of_training`, whether runs that reach this loss ended at this budget or a smaller one.
    Otherwise nothing shows that an arm costs more.
    comparable: whether the losses of both sides are those of routers that see equally much.
    """

    budget: float
    loss: float
    needed: float
    times: Estimate
    doubts: list[str]
    of_training: bool
    checked: bool
    reached: bool
    comparable: bool = True

    @property
    def verdict(self) -> str:
        """What the interval says of the arm, if it is comparable.

        `NOT_SHOWN` if there is no interval, or if the baseline's runs do not show what it says.
        """
        if not self.comparable:
            return NOT_COMPARABLE
        if self.times.low > 1:
            return SAVES if self.checked else NOT_SHOWN
        if self.times.high < 1:
            return COSTS_MORE if self.reached else NOT_SHOWN
        return NOT_APART if self.times.low <= 1 <= self.times.high else NOT_SHOWN


class EndedRuns(NamedTuple):
    """Runs of the baseline that ended at one budget: their mean loss, and that of the arm, over the same seeds.

    times: how many times as much compute they had as the runs of the arm, on average over these seeds. If the two sides
    share no seed there, it is that of all their runs, and the losses are NaN.
    of_curve: whether the curve has a point at runs of their length.
    """

    times: float
    loss: float
    of_arm: float
    of_curve: bool


class Curve(NamedTuple):
    """A law fitted to the baseline, and its budgets as the law sees them: rows of (R, B), the first is all seeds.

    needed: log of the compute that the law gives the mean loss of each budget. off: that minus the log of the mean
    FLOPs of the same runs.
    """

    law: Fit
    needed: Float[np.ndarray, "R B"]
    off: Float[np.ndarray, "R B"]

    def compute(self, loss: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        """Return the log of the compute for these losses, each by its own row, corrected between the budgets."""
        found = np.log(_needed(self.law, loss))
        rows = zip(found, self.needed, self.off, strict=True)
        return np.array([each - _between(each, at[np.isfinite(at)], off[np.isfinite(at)]) for each, at, off in rows])


def speed_up(
    baseline: pd.DataFrame,
    arm: pd.DataFrame,
    *,
    evaluations: pd.DataFrame | None = None,
    of: int = 1,
    resamples: int = RESAMPLES,
    known: dict[bytes, Curve] | None = None,
) -> list[SpeedUp]:
    """Return the effective speed-up of an arm at each of its budgets, from a curve through the baseline's runs.

    The tables have the columns `seed`, `end` (the last step of the run), `step`, `FLOPs` (of training) and `loss`, of
    runs of one size (`equal_cost.points`). A budget of the arm is compared by the seeds that both have there, or that
    the baseline has anywhere if they share none there. The doubts say which seeds are left out. A resample draws the
    same seeds for both, so what all runs of a seed share cancels. It has the mean losses and FLOPs of its own runs.
    A few seeds carry no part of the curve alone: a budget of the baseline with too few of the seeds that both have is
    left out (`are_enough`), and so is a seed with runs of fewer than three budgets. evaluations: those of the
    baseline's runs (`equal_cost.training_points`). Where too few seeds have runs of three budgets, the curve goes
    through them too. A budget of the arm has no speed-up where they have fewer than three budgets either.
    of: the number of speed-ups that are shown together; their intervals hold together too. known: curves through
    earlier baselines, by their points; this call adds its own.
    """
    found = []
    known = {} if known is None else known
    for members in groups(arm):
        for between in (None,) if evaluations is None else (None, evaluations):
            shared = sorted({*baseline["seed"]} & {*members["seed"]})
            common = _seeds_at(_points(baseline, between, shared), members) or shared
            points = _points(baseline, between, common)
            number = points.groupby("seed")["budget"].agg(budgets)
            enough = [seed for seed in common if number.get(seed, 0) >= LEAST_BUDGETS]
            if not are_enough(len(enough), len(common)):
                continue
            alone = sorted({*baseline["seed"], *members["seed"]} - {*common})
            doubts = [(LEFT_OUT, alone), (TOO_FEW, [seed for seed in common if seed not in enough])]
            points = _with_budgets(points[points["seed"].isin(enough)]).sort_values(["budget", "end", "seed"])
            same = points[["seed", "budget", "FLOPs", "loss"]].to_numpy(dtype=float).tobytes()
            if same not in known:
                known[same] = _curve(points, enough, resamples)
            loss, flops = (_means(members, enough, resamples, name) for name in ("loss", "FLOPs"))
            of_curve = points[points["ended"]]
            ended = [_beside(each, members, of_curve) for each in (*groups(of_curve), *groups(baseline))]
            apart = groups(baseline[~baseline["end"].isin(of_curve["end"])])
            each = _speed_up(known[same], flops, loss, ended, of_training=between is not None, of=of)
            left_out = [text.format(seeds=enumerated(seeds)) for text, seeds in doubts if seeds]
            if apart:
                left_out.append(NO_POINT.format(budgets=enumerated([f"{each['budget'].mean():.3g}" for each in apart])))
            found.append(each._replace(doubts=[*left_out, *each.doubts]))
            break
    return found


def are_enough(seeds: int, of: int) -> bool:
    """Return whether some of the seeds stand for all: at least half of them, and at least two of several."""
    return 2 * seeds >= of and seeds >= min(2, of) > 0


def groups(points: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the points of each budget, in rising order. Budgets that differ by at most 2 % are one."""
    return [members for _, members in by_budget(_with_budgets(points), "budget")]


def _with_budgets(points: pd.DataFrame) -> pd.DataFrame:
    """Return the points with the column `budget`: the mean FLOPs of the runs of one length after the same step.

    They vary with the seed where the number of experts does.
    """
    return points.assign(budget=points.groupby(["end", "step"])["FLOPs"].transform("mean"))


def _points(baseline: pd.DataFrame, evaluations: pd.DataFrame | None, seeds: list[int]) -> pd.DataFrame:
    """Return the points of a curve through the runs of these seeds, at the budgets that enough of them have.

    The ends of the runs come first (`ended`), because the loss of a run that is still trained is another one. Then come
    the evaluations that most seeds have, of the longest runs and from the last one down, as far as they differ by more
    than 2 % from the points before them.
    """
    found = _of_many_seeds(baseline.assign(ended=True), seeds)
    if evaluations is None:
        return found
    table = _with_budgets(evaluations[evaluations["seed"].isin(seeds)])
    steps = table.groupby(["end", "step"], as_index=False).agg(budget=("budget", "first"), seeds=("seed", "nunique"))
    steps = steps.sort_values(["seeds", "end", "step"], ascending=False)
    places, kept = np.log(found["budget"].unique()), list[tuple[int, int]]()
    for end, step, place in zip(steps["end"], steps["step"], np.log(steps["budget"]), strict=True):
        if (np.abs(places - place) > math.log1p(CLOSE)).all():
            kept.append((end, step))
            places = np.append(places, place)
    apart = table[pd.MultiIndex.from_frame(table[["end", "step"]]).isin(kept)]
    return _of_many_seeds(pd.concat([found, apart.assign(ended=False)]), seeds)


def _of_many_seeds(points: pd.DataFrame, seeds: list[int]) -> pd.DataFrame:
    """Return the points of these seeds at budgets that enough of them have, with their budgets."""
    points = _with_budgets(points[points["seed"].isin(seeds)])
    kept = [each for each in groups(points) if are_enough(each["seed"].nunique(), len(seeds))]
    return pd.concat(kept) if kept else points[:0]


def _seeds_at(points: pd.DataFrame, members: pd.DataFrame) -> list[int]:
    """Return the seeds that the reference has at this budget of the arm: where the FLOPs of these seeds are as many.

    A budget that few of the shared seeds have takes no seed from the comparison, as it is no point.
    """
    near = [{*each["seed"]} for each in groups(points) if _is_one(_beside(each, members, points).times)]
    return sorted(set().union(*near))


def _beside(ended: pd.DataFrame, members: pd.DataFrame, of_curve: pd.DataFrame) -> EndedRuns:
    """Return runs of the reference beside those of the arm with the same seeds. of_curve: the points of the curve."""
    seeds = {*ended["seed"]} & {*members["seed"]}
    sides = [side[side["seed"].isin(seeds)] if seeds else side for side in (ended, members)]
    (flops, loss), (flops_of_arm, of_arm) = (side.groupby("seed")[["FLOPs", "loss"]].mean().mean() for side in sides)
    if not seeds:
        loss = of_arm = math.nan
    return EndedRuns(flops / flops_of_arm, loss, of_arm, bool(ended["end"].isin(of_curve["end"]).any()))


def _is_one(times: float) -> bool:
    return 1 - CLOSE <= times <= 1 + CLOSE


def _curve(points: pd.DataFrame, seeds: list[int], resamples: int) -> Curve:
    """Fit a law to the budgets, and return how far it is off at each of them, in each resample by its own FLOPs."""
    law = fit(points[["seed", "loss"]].assign(FLOPs=points["budget"]), COMPUTE, resamples=resamples)
    of_budget = groups(points)
    loss, flops = ([_means(each, seeds, resamples, name) for each in of_budget] for name in ("loss", "FLOPs"))
    needed = np.stack([np.log(_needed(law, each)) for each in loss], axis=1)
    return Curve(law, needed, needed - np.log(np.stack(flops, axis=1)))


def _means(members: pd.DataFrame, seeds: list[int], resamples: int, name: str) -> Float[np.ndarray, " R"]:
    """Return the mean over all seeds, and over each resample of them; NaN where it has no seed with a run."""
    of_seed = members.groupby("seed")[name].mean().reindex(seeds).to_numpy(dtype=float)
    weights = resampled_seeds(len(seeds), resamples) * np.isfinite(of_seed)
    with np.errstate(invalid="ignore"):
        return weights @ np.nan_to_num(of_seed) / weights.sum(axis=1)


def _between(place: float, places: Float[np.ndarray, " B"], values: Float[np.ndarray, " B"]) -> float:
    """Return the value at a place, between the nearest places on a line, and that of the last one beyond them."""
    order = np.argsort(places)
    return float(np.interp(place, places[order], values[order])) if len(order) else 0.0


def _speed_up(
    curve: Curve,
    flops: Float[np.ndarray, " R"],
    loss: Float[np.ndarray, " R"],
    ended: list[EndedRuns],
    *,
    of_training: bool,
    of: int,
) -> SpeedUp:
    """Return the speed-up at a budget.

    A curve need not fall through evaluations, and need not be right between its points. So no verdict contradicts the
    losses of runs that ended at the budget, however few. There is none either if the curve has no point there for want
    of seeds. A curve through evaluations shows that the arm costs more only if runs ended at the budget or before with
    the arm's loss, up to what 2 % of the compute change.
    """
    budget, (least, most) = float(flops[0]), curve.law.ranges["FLOPs"]
    here = [each for each in ended if _is_one(each.times)]
    before = [each for each in ended if each.of_curve and each.times <= 1 + CLOSE]
    few = bool(here) and not any(each.of_curve for each in here)
    checked = not few and (bool(here) if of_training else least * (1 - CLOSE) <= budget <= most * (1 + CLOSE))
    logs = curve.compute(loss)
    needed, times = _exp(logs[0]), curve.law.estimate(logs - np.log(flops), of=of)
    doubts = list(curve.law.doubts)
    if not math.isfinite(needed):
        doubts.append("its loss is below L_inf of the baseline's curve: no budget reaches it")
    else:
        doubts += curve.law.outside(FLOPs=needed)
    too_small, reached = budget < least * (1 - CLOSE), needed <= most * (1 + CLOSE)
    confirmed = not of_training or any(_reaches(curve.law, each) for each in before)
    shown = not few and reached and not too_small and confirmed
    better = any(each.loss < each.of_arm for each in here)
    worse = any(each.loss > each.of_arm for each in here)
    if few and (times.low > 0 or times.high < 0):
        doubts.append(FEW_HERE.format(what="saved" if times.low > 0 else "wasted"))
    elif times.low > 0 and not checked:
        doubts.append(STILL_TRAINED.format(what="saved") if of_training and budget < most else NOT_CHECKED)
    elif (times.low > 0 and better) or (times.high < 0 and reached and not too_small and worse):
        doubts.append(OTHERWISE)
        checked = shown = False
    elif times.high < 0 and not shown:
        still = STILL_TRAINED.format(what="wasted") if reached and budget < most else NOT_REACHED
        doubts.append(TOO_SMALL if too_small else still)
    estimate = Estimate(*map(_exp, times))
    return SpeedUp(budget, float(loss[0]), needed, estimate, doubts, of_training, checked, bool(shown))


def _reaches(law: Fit, ended: EndedRuns) -> bool:
    """Return whether ended runs have the arm's loss or a lower one, up to what 2 % more compute change by the law."""
    own, of_arm = (float(_needed(law, np.array([loss]))[0]) for loss in (ended.loss, ended.of_arm))
    return of_arm <= own * (1 + CLOSE)


def _exp(log: float) -> float:
    """Return e to this power, which is infinite where it is more than a float holds."""
    return math.exp(log) if not log > MOST_LOG else math.inf


def _needed(curve: Fit, loss: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Return the compute at which the curve has these losses, each by its own row; infinite below its floor."""
    factor, alpha = curve.theta[: len(loss), 1:].T
    gap = loss - curve.floor[: len(loss)]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = (factor - np.log(gap)) / alpha + curve.center["FLOPs"]
    return np.where((gap > 0) & (logs < MOST_LOG), np.exp(np.clip(logs, -MOST_LOG, MOST_LOG)), np.inf)
