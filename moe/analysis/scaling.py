"""Scaling laws: how the loss falls with compute, size and tokens, fitted to runs, with intervals over seeds.

A law is L = floor + the sum over its terms of A times the product of x^-alpha over the term's variables. With one term
of compute it is L = L_inf + A C^-alpha. With a term of size and one of tokens it is the third approach of Hoffmann et
al. (2203.15556). No function extrapolates without saying so: `Fit.doubts` is for the reader.
Where the runs do not determine the law, there is no interval, and a doubt says why (`Fit.sure`).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from moe.analysis.simultaneous import interval
from moe.analysis.statistics import CONFIDENCE

LEAST_BUDGETS = 3  # L_inf, A and alpha need three points
RESAMPLES = 400
STEPS, CONVERGED = 100, 1e-6  # most steps of the optimizer, and the largest change of a log after which it stops
EXPONENTS = (0.01, 3.0)  # bounds of alpha; outside, a term is a constant or a cliff
EXPERT_EXPONENTS = (-1.0, 1.0)  # more experts may be worse
STARTS, EXPERT_STARTS = (0.1, 0.3, 0.8), (0.0, 0.3)
SIZE, EXPERTS, TOKENS = "active parameters", "experts", "tokens"
MOST_CONDITION = 1000.0  # of the scaled Jacobian; that of grids of 1:2:4 is below 600 for usual exponents
MOST_CORRELATION = 0.99  # of the logs of two variables, above which they grow in proportion
MOST_AT_BOUND = 0.02  # the share of resamples at a bound above which intervals are known to be too narrow
CLOSE = 0.02  # budgets that differ by this share are one
NARROW = 4.0  # three budgets within this factor give intervals that are too narrow


class Law(NamedTuple):
    """The variables of each term, such as (("active parameters",), ("tokens",))."""

    terms: tuple[tuple[str, ...], ...]

    @property
    def exponents(self) -> list[tuple[int, str]]:
        """The term and the variable of each exponent."""
        return [(number, name) for number, term in enumerate(self.terms) for name in term]

    @property
    def parameters(self) -> int:
        return 1 + len(self.terms) + len(self.exponents)


COMPUTE = Law((("FLOPs",),))


class Fit(NamedTuple):
    """A fitted law: rows of `theta` (R, P) are log floor, log A of each term, exponents. The first row is all seeds.

    The other rows are the resamples of the seeds. `center` are the means of log x, at which A is meant.
    `ranges` are the smallest and the largest value of each variable that the fit has seen.
    """

    law: Law
    theta: Float[np.ndarray, "R P"]
    center: dict[str, float]
    ranges: dict[str, tuple[float, float]]
    seeds: int
    doubts: list[str]
    sure: bool  # whether the runs determine the law, so that there are intervals

    def estimate(self, values: Float[np.ndarray, " R"], *, of: int = 1) -> "Estimate":
        """Return the first of these values of all rows, with its interval over seeds if the fit is sure.

        of: the number of estimates that are shown together.
        """
        return over_seeds(values, self.seeds if self.sure else 1, of=of)

    @property
    def floor(self) -> Float[np.ndarray, " R"]:
        return np.exp(self.theta[:, 0])

    def exponent(self, name: str) -> Float[np.ndarray, " R"]:
        """Return the exponent of a variable, which must occur in one term."""
        [place] = [number for number, (_, each) in enumerate(self.law.exponents) if each == name]
        return self.theta[:, 1 + len(self.law.terms) + place]

    def predict(self, **x: float) -> Float[np.ndarray, " R"]:
        """Return the loss at one point for each row of `theta`."""
        logs = _logs(self.law, {name: np.array([value]) for name, value in x.items()}, self.center)
        return _predict(self.law, self.theta, logs)[:, 0]

    def outside(self, **x: float) -> list[str]:
        """Return the variables whose value lies outside of what the fit has seen by more than 2 %, with how far."""
        found = []
        for name, value in x.items():
            low, high = self.ranges[name]
            times = max(value / high, low / value)
            found += [f"{name} {times:.3g} times beyond the runs"] if times > 1 + CLOSE else []
        return found


class Estimate(NamedTuple):
    """An estimate and its interval; the ends are NaN if there is one seed, or if the fit is not sure."""

    value: float
    low: float
    high: float


def over_seeds(values: Float[np.ndarray, " R"], seeds: int, *, of: int = 1) -> Estimate:
    """Return the first value, with a t interval whose standard error is the spread of the others, the resamples.

    In 95 % of cases the intervals of all `of` estimates contain the true values (Bonferroni's correction).

    The spread of resampled means is too small by sqrt((n - 1) / n), which is corrected, and t with n - 1 degrees of
    freedom stands for the unknown spread (Hesterberg 2015). Quantiles of resamples would be far too narrow: three seeds
    have ten different resamples. If a resample is infinite, so is that end of the interval.
    """
    value, resampled = float(values[0]), values[1:]
    if seeds < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)
    finite = resampled[np.isfinite(resampled)]
    error = finite.std() * math.sqrt(seeds / (seeds - 1)) if len(finite) else math.nan
    reach = stats.t.isf((1 - CONFIDENCE) / 2 / of, seeds - 1) * error
    low = -math.inf if (resampled == -math.inf).any() else value - reach
    return Estimate(value, low, math.inf if (resampled == math.inf).any() else value + reach)


def resampled_seeds(seeds: int, resamples: int = RESAMPLES) -> Float[np.ndarray, "R S"]:
    """Return how often each seed counts: once in the first row, as often as it was drawn in the others."""
    draws = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples if seeds > 1 else 0)
    return np.vstack([np.ones((1, seeds)), draws]).astype(float)


def fit(runs: pd.DataFrame, law: Law, *, resamples: int = RESAMPLES) -> Fit:
    """Fit a law to runs by least squares, once for all seeds and once for each resample of the seeds.

    runs: columns `seed`, `loss` and one for each variable of the law. Raises ValueError if the runs cannot carry the
    law: fewer different points than the law has parameters, or fewer than three different values of a variable. Values
    that differ by at most 2 % count as one.
    """
    names = list(dict.fromkeys(name for _, name in law.exponents))
    different = numbered(runs[names])
    points = len(different.drop_duplicates())
    if points < law.parameters:
        raise ValueError(f"{points} different points of {', '.join(names)}; the law needs at least {law.parameters}")
    for name in names:
        few = different[name].nunique() < (2 if name == EXPERTS else LEAST_BUDGETS)
        if few:
            raise ValueError(f"{name} has {different[name].nunique()} different values; the law needs more")
    x = {name: runs[name].to_numpy(dtype=float) for name in names}
    loss = runs["loss"].to_numpy(dtype=float)
    center = {name: float(np.log(values).mean()) for name, values in x.items()}
    logs = _logs(law, x, center)
    seeds, place = np.unique(runs["seed"], return_inverse=True)
    weights = resampled_seeds(len(seeds), resamples)[:, place]
    starts = _starts(law, logs, loss)
    fitted, cost = _least_squares(law, starts, logs, loss, np.ones((len(starts), len(loss))))
    best = fitted[[int(np.argmin(cost))]]
    theta = np.vstack([best, _least_squares(law, best.repeat(len(weights) - 1, 0), logs, loss, weights[1:])[0]])
    ranges = {name: (float(values.min()), float(values.max())) for name, values in x.items()}
    reasons = _reasons(law, theta[0], logs, loss, points)
    doubts = [f"no interval, because {reason}" for reason in reasons]
    if not reasons:
        doubts = _too_narrow(law, theta[1:], loss, points, ranges)
    return Fit(law, theta, center, ranges, len(seeds), doubts, sure=not reasons)


def _reasons(
    law: Law, theta: Float[np.ndarray, " P"], logs: Float[np.ndarray, "V N"], loss: Float[np.ndarray, " N"], points: int
) -> list[str]:
    """Return why the runs do not determine the law, if they do not."""
    low, high = _bounds(law, loss)
    names = ["L_inf", *(f"A of {' and '.join(term)}" for term in law.terms)]
    names += [f"the exponent of {name}" for _, name in law.exponents]
    found = [
        f"{name} is at a bound of the fit ({'its smallest' if value < (least + most) / 2 else 'its largest'} value)"
        for name, value, least, most, at_bound in zip(names, theta, low, high, _at_bound(law, theta, loss), strict=True)
        if at_bound
    ]
    if len(law.terms) > 1 and points <= law.parameters:
        found.append(f"{points} different points determine {law.parameters} numbers, so nothing checks the form")
    jacobian = _jacobian(law, theta[None], logs)[0]
    condition = np.linalg.cond(jacobian / np.linalg.norm(jacobian, axis=0))
    in_proportion = len(logs) > 1 and np.corrcoef(logs)[np.triu_indices(len(logs), 1)].max() > MOST_CORRELATION
    if len(law.terms) > 1 and (in_proportion or not condition <= MOST_CONDITION):
        known = f"{condition:.2g}" if condition <= MOST_CONDITION else f"above {MOST_CONDITION:,.0f}"
        found.append(
            "the runs do not tell the terms apart, as when tokens grow in proportion to size "
            f"(condition of the scaled Jacobian {known})"
        )
    return found


def _too_narrow(
    law: Law,
    resampled: Float[np.ndarray, "R P"],
    loss: Float[np.ndarray, " N"],
    points: int,
    ranges: dict[str, tuple[float, float]],
) -> list[str]:
    """Return why intervals may be wrong although there are some."""
    found = []
    share = _at_bound(law, resampled, loss).any(axis=-1).mean() if len(resampled) else 0.0
    if share > MOST_AT_BOUND:
        found.append(f"the interval is too narrow: {share:.0%} of the resamples reach a bound of the fit")
    if points <= law.parameters:
        found.append(f"{points} different points determine {law.parameters} numbers, so nothing checks the form")
        if any(most / least <= NARROW for least, most in ranges.values()):
            found.append(f"intervals from so few points within a factor of {NARROW:g} are known to be too narrow")
    return found


def _at_bound(law: Law, theta: Float[np.ndarray, "*R P"], loss: Float[np.ndarray, " N"]) -> Bool[np.ndarray, "*R P"]:
    """Return which parameters are within a thousandth of their range of a bound."""
    low, high = _bounds(law, loss)
    near = 1e-3 * (high - low)
    return (theta <= low + near) | (theta >= high - near)


def _bounds(law: Law, loss: Float[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest value of each parameter."""
    scale = math.log(loss.max())
    ends = [(scale - 7, math.log(loss.min())), *[(scale - 14, scale + 7)] * len(law.terms)]
    ends += [EXPERT_EXPONENTS if name == EXPERTS else EXPONENTS for _, name in law.exponents]
    low, high = np.array(ends).T
    return low, high


def _logs(law: Law, x: dict[str, np.ndarray], center: dict[str, float]) -> Float[np.ndarray, "V N"]:
    """Return the centered log of the variable of each exponent."""
    return np.stack([np.log(x[name]) - center[name] for _, name in law.exponents])


def _terms(law: Law, theta: Float[np.ndarray, "R P"], logs: Float[np.ndarray, "V N"]) -> Float[np.ndarray, "R K N"]:
    count = len(law.terms)
    member = np.array([[number == term for term, _ in law.exponents] for number in range(count)], dtype=float)
    power = np.einsum("kv,rv,vn->rkn", member, theta[:, 1 + count :], logs)
    return np.exp(np.clip(theta[:, 1 : 1 + count, None] - power, -60, 60))


def _predict(law: Law, theta: Float[np.ndarray, "R P"], logs: Float[np.ndarray, "V N"]) -> Float[np.ndarray, "R N"]:
    return np.exp(theta[:, :1]) + _terms(law, theta, logs).sum(axis=1)


def _starts(law: Law, logs: Float[np.ndarray, "V N"], loss: Float[np.ndarray, " N"]) -> Float[np.ndarray, "R P"]:
    """Return starting points: a grid of exponents, each with the floor and factors that linear least squares gives."""
    found = []
    grids = [EXPERT_STARTS if name == EXPERTS else STARTS for _, name in law.exponents]
    least = math.log(loss.min())
    for exponents in itertools.product(*grids):
        theta = np.array([[0.0] * (1 + len(law.terms)) + list(exponents)])
        design = np.vstack([np.ones(len(loss)), _terms(law, theta, logs)[0]]).T
        linear = np.linalg.lstsq(design, loss, rcond=None)[0]
        theta[0, : len(linear)] = np.log(np.clip(linear, 1e-3 * loss.min(), None))
        theta[0, 0] = min(theta[0, 0], least - 1e-3)
        found.append(theta[0])
    return np.array(found)


def _least_squares(
    law: Law,
    theta: Float[np.ndarray, "R P"],
    logs: Float[np.ndarray, "V N"],
    loss: Float[np.ndarray, " N"],
    weights: Float[np.ndarray, "R N"],
) -> tuple[Float[np.ndarray, "R P"], Float[np.ndarray, " R"]]:
    """Return the parameters of least weighted squares within bounds, and the sums of squares, for each row at once.

    This is Levenberg and Marquardt's method. A parameter at a bound that wants to go on does not move.
    """
    low, high = _bounds(law, loss)
    theta = np.clip(theta, low, high)
    damping = np.full(len(theta), 1e-2)
    cost = (weights * (_predict(law, theta, logs) - loss) ** 2).sum(axis=1)
    for _ in range(STEPS if len(theta) else 0):
        jacobian = _jacobian(law, theta, logs)
        residual = _predict(law, theta, logs) - loss
        gradient = np.einsum("rnp,rn->rp", jacobian, weights * residual)
        stuck = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
        step = _step(jacobian, weights, gradient, stuck, damping)
        if (np.abs(step) < CONVERGED).all():
            break
        moved = np.clip(theta - step, low, high)
        new = (weights * (_predict(law, moved, logs) - loss) ** 2).sum(axis=1)
        better = new < cost
        theta, cost = np.where(better[:, None], moved, theta), np.where(better, new, cost)
        damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-12, 1e9)
    return theta, cost


def _step(
    jacobian: Float[np.ndarray, "R N P"],
    weights: Float[np.ndarray, "R N"],
    gradient: Float[np.ndarray, "R P"],
    stuck: Bool[np.ndarray, "R P"],
    damping: Float[np.ndarray, " R"],
) -> Float[np.ndarray, "R P"]:
    free = ~stuck
    hessian = np.einsum("rnp,rn,rnq->rpq", jacobian, weights, jacobian) * (free[:, :, None] & free[:, None, :])
    diagonal = np.einsum("rpp->rp", hessian)
    size = diagonal.max(axis=1, keepdims=True)
    ridge = damping[:, None] * diagonal + 1e-14 * size + np.where(stuck, 1.0, 1e-300)
    hessian += ridge[:, :, None] * np.eye(ridge.shape[1])
    return np.linalg.solve(hessian, (gradient * free)[:, :, None])[:, :, 0]


def _jacobian(law: Law, theta: Float[np.ndarray, "R P"], logs: Float[np.ndarray, "V N"]) -> Float[np.ndarray, "R N P"]:
    terms = _terms(law, theta, logs)
    floor = np.broadcast_to(np.exp(theta[:, :1]), terms[:, 0].shape)
    slopes = [-terms[:, term] * logs[place] for place, (term, _) in enumerate(law.exponents)]
    return np.stack([floor, *(terms[:, term] for term in range(len(law.terms))), *slopes], axis=2)


def by_budget(table: pd.DataFrame, compute: str = "FLOPs") -> list[tuple[float, pd.DataFrame]]:
    """Return the runs by budget, the mean of those whose compute differs by at most 2 %, in rising order.

    compute: the name of its column.
    """
    ordered = table.sort_values(compute, ignore_index=True)
    groups = ordered.groupby(numbered(ordered[[compute]])[compute])
    return [(float(members[compute].mean()), members) for _, members in groups]


def numbered(table: pd.DataFrame) -> pd.DataFrame:
    """Return a number in place of each value, in rising order: one number for those that differ by at most 2 %."""
    rising = [column.sort_values() for _, column in table.reset_index(drop=True).items()]
    return pd.concat([(each.pct_change().fillna(0) > CLOSE).cumsum().sort_index() for each in rising], axis=1)


def budgets(flops: Sequence[float] | pd.Series) -> int:
    """Return how many different budgets there are, if 2 % make no difference."""
    return len(by_budget(pd.DataFrame({"FLOPs": list(flops)})))


FOUND = ("best", "loss", "size", "inside", "low", "high")  # columns of the best size of a budget


def iso_flop_minima(points: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each budget at which a seed trained three sizes or more, for each number of experts.

    Only seeds that trained all sizes of a budget count: the mean of a size that lacks a seed is off by what this seed
    does to all sizes. A size that would leave less than half of the seeds does not count. points: columns seed,
    experts, FLOPs, loss and active parameters. In the rows, `left out` is how many sizes do not count, `best` is the
    size of the lowest mean loss and `loss` is that mean. `size` is where a parabola in the log of the size has its
    minimum (the second approach of Hoffmann et al., 2203.15556), and `inside` says whether it has one between the
    smallest and the largest size. `low` and `high` are the ends of a 95 % t interval over the minima of single seeds,
    or NaN if a seed has none there.
    """
    rows = []
    for number, of_number in points.groupby(EXPERTS):
        for budget, members in by_budget(of_number):
            trained = members[SIZE].nunique()
            by_seed = _complete(members.pivot_table("loss", "seed", SIZE))
            if by_seed.empty:
                continue
            members = members[members["seed"].isin(by_seed.index) & members[SIZE].isin(by_seed.columns)]
            means = by_seed.mean()
            ends = float(means.index.min()), float(means.index.max())
            of_seeds = np.array([_vertex(each[SIZE], each["loss"], ends) for _, each in members.groupby("seed")])
            low, high = np.exp(interval(np.log(of_seeds))) if np.isfinite(of_seeds).all() else (math.nan, math.nan)
            lowest = _vertex(members[SIZE], members["loss"], ends)
            sized = {"sizes": len(means), "left out": trained - len(means)}
            sized |= {"best": float(means.idxmin()), "loss": float(means.min())}
            found = {"size": lowest, "inside": math.isfinite(lowest), "low": float(low), "high": float(high)}
            rows.append({EXPERTS: number, "FLOPs": budget} | sized | found)
    return pd.DataFrame(rows, columns=[EXPERTS, "FLOPs", "sizes", "left out", *FOUND])


def _complete(by_seed: pd.DataFrame) -> pd.DataFrame:
    """Return the losses of the sizes that count, for the seeds that have all of them; empty if these are too few.

    by_seed: a row for each seed, and a column for each size.
    """
    by_seed = by_seed[by_seed.notna().sum(axis=1) >= LEAST_BUDGETS].dropna(axis=1, how="all")
    number = by_seed.notna().sum().sort_values(ascending=False, kind="stable")
    for sizes in range(len(number), LEAST_BUDGETS - 1, -1):
        complete = by_seed[sorted(number.index[:sizes])].dropna()
        if len(complete) and 2 * len(complete) >= len(by_seed):
            return complete
    return by_seed[:0]


def _vertex(sizes: pd.Series, losses: pd.Series, ends: tuple[float, float]) -> float:
    """Return the size at which a parabola in log size is lowest; NaN if it is not between the ends."""
    if sizes.nunique() < LEAST_BUDGETS:
        return math.nan
    x = np.log(sizes.to_numpy(dtype=float))
    curvature, slope, _ = np.polyfit(x - x.mean(), losses.to_numpy(dtype=float), 2)
    lowest = math.exp(x.mean() - slope / (2 * curvature)) if curvature > 0 else math.nan
    return lowest if ends[0] <= lowest <= ends[1] else math.nan
