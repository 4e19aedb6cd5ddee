"""Effective speed-up: how much compute a baseline needs for the loss of another setting, from a curve through it."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from moe.analysis.scaling import COMPUTE, RESAMPLES, Estimate, Fit, by_budget, fit, resampled_seeds

SAVES, COSTS_MORE, NOT_APART = "saves compute", "costs more", "not told apart"
MOST_LOG = 700.0  # a larger log is one of an infinite number


class SpeedUp(NamedTuple):
    """How many times as much compute the baseline needs for an arm's loss, at one budget of the arm.

    misfit: the largest such factor that the curve gives the baseline itself at one of its budgets, or 1 / it; the curve
    tells nothing apart that is closer to 1.
    """

    budget: float
    loss: float
    needed: float
    times: Estimate
    misfit: float
    doubts: list[str]

    @property
    def verdict(self) -> str:
        """Whether the arm saves compute, costs more, or is not told apart, by the interval and the curve's misfit."""
        if self.times.low > self.misfit:
            return SAVES
        return COSTS_MORE if self.times.high < 1 / self.misfit else NOT_APART


def speed_up(baseline: pd.DataFrame, arm: pd.DataFrame, *, resamples: int = RESAMPLES) -> list[SpeedUp]:
    """Return the effective speed-up of an arm at each of its budgets, from a curve through the baseline's runs.

    Both tables have the columns `seed`, `FLOPs` (training) and `loss`. A budget of the arm is compared by the seeds
    that both have there. A resample draws the same seeds for both, so what all runs of a seed share cancels. Raises
    ValueError if the baseline has fewer than three budgets.
    """
    found = []
    curves: dict[tuple[int, ...], tuple[Fit, float]] = {}  # by seeds
    for budget, members in by_budget(arm):
        common = sorted(set(baseline["seed"]) & set(members["seed"]))
        if not common:
            continue
        if tuple(common) not in curves:
            of_both = baseline[baseline["seed"].isin(common)]
            curve = fit(of_both, COMPUTE, resamples=resamples)
            curves[tuple(common)] = curve, _misfit(curve, of_both)
        of_seed = members.groupby("seed")["loss"].mean()[common].to_numpy()
        loss = resampled_seeds(len(common), resamples) @ of_seed / len(common)
        curve, misfit = curves[tuple(common)]
        found.append(_speed_up(curve, budget, loss, misfit))
    return found


def _misfit(curve: Fit, baseline: pd.DataFrame) -> float:
    """Return the largest factor by which the curve is off at a budget of the baseline itself."""
    of_budget = [(budget, members["loss"].mean()) for budget, members in by_budget(baseline)]
    logs = [abs(math.log(_needed(curve, np.array([loss]))[0] / budget)) for budget, loss in of_budget]
    return _exp(max(logs))


def _speed_up(curve: Fit, budget: float, loss: Float[np.ndarray, " R"], misfit: float) -> SpeedUp:
    needed = _needed(curve, loss)
    times = curve.estimate(np.log(needed / budget))
    doubts = list(curve.doubts)
    if not math.isfinite(needed[0]):
        doubts.append("its loss is below L_inf of the baseline's curve: no budget reaches it")
    else:
        doubts += curve.outside(FLOPs=float(needed[0]))
    return SpeedUp(budget, float(loss[0]), float(needed[0]), Estimate(*map(_exp, times)), misfit, doubts)


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
