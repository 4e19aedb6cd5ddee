"""The figure of a scaling law: the loss against the size at equal training FLOPs, with the law that was fitted."""

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.equal_cost import ACTIVE
from moe.analysis.figures.marks import in_group
from moe.analysis.figures.style import RC, line_style, panel_height, shared_legend
from moe.analysis.scaling import EXPERTS, TOKENS, Fit, by_budget
from moe.analysis.simultaneous import interval

LEAST_SIZES = 2  # of one budget, which make a curve
BEYOND = 1.6  # how much smaller and larger the sizes are between which a curve is drawn
PLACES = 33
MARKS = """\
points: mean over seeds with its 95 % t interval; line: the law, dashed where it extrapolates;
band: 95 % interval of the law over seeds"""


@matplotlib.rc_context(RC)
def iso_flop_curves(points: pd.DataFrame, found: Fit, further: float) -> Figure | str:
    """Draw a curve for each budget of training FLOPs, in a panel for each number of experts.

    points: columns seed, active parameters, tokens, experts, FLOPs and loss. further: a budget that is so many times
    the largest one gets a curve too. Returns the reason as text if no two sizes share a budget.
    """
    numbers = sorted(points[EXPERTS].unique())
    figure = Figure(figsize=(max(6.4, 4.6 * len(numbers)), panel_height(6)), layout="constrained")
    drawn = 0
    for axes, number in zip(figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0], numbers, strict=True):
        budgets = [
            (budget, members)
            for budget, members in by_budget(points[points[EXPERTS] == number])
            if members[ACTIVE].nunique() >= LEAST_SIZES
        ]
        for index, (budget, members) in enumerate(budgets):
            label = f"{budget:.2g} FLOPs"
            _points(axes, members, line_style(index), label)
            _curve(axes, members, found, line_style(index), label)
        if budgets:
            budget, members = budgets[-1]
            label = f"{further:g} times the largest budget"
            _curve(axes, members, found, line_style(len(budgets)), label, times=further)
        axes.set(xscale="log", xlabel="active parameters", title=f"{number:g} experts" if len(numbers) > 1 else "")
        axes.set_ylabel("validation loss (nats per token)")
        sizes = sorted(points[ACTIVE].unique())
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes.minorticks_off()
        drawn += len(budgets)
    if not drawn:
        return "no two sizes have the same training FLOPs"
    shared_legend(figure, MARKS)
    return figure


def _points(axes: Axes, members: pd.DataFrame, style: dict[str, str], label: str) -> None:
    of_size = members.groupby(ACTIVE)["loss"]
    mean = of_size.mean()
    ends = np.array([interval(losses.to_numpy()) for _, losses in of_size]).T
    look: dict[str, Any] = {"fmt": style["marker"], "color": style["color"], "markersize": 6, "capsize": 3}
    drawn = axes.errorbar(mean.index, mean, yerr=np.nan_to_num(np.abs(ends - mean.to_numpy())), **look)
    in_group(drawn.lines[0], label)


def _curve(
    axes: Axes, members: pd.DataFrame, found: Fit, style: dict[str, str], label: str, *, times: float = 1.0
) -> None:
    """Draw the law along the sizes of one budget, or of one that is `times` as large: solid within the runs."""
    known = members[ACTIVE].min(), members[ACTIVE].max()
    size = np.geomspace(known[0] / BEYOND, known[1] * BEYOND, PLACES)
    tokens = times * tokens_along(members, size)
    x = {ACTIVE: size, TOKENS: tokens, EXPERTS: np.full(PLACES, members[EXPERTS].iloc[0])}
    names = {name for _, name in found.law.exponents}
    values = [
        found.estimate(found.predict(**{name: float(x[name][place]) for name in names})) for place in range(PLACES)
    ]
    mean, low, high = np.array(values).T
    inside = (size >= known[0]) & (size <= known[1]) & (times == 1)
    color = style["color"]
    if np.isfinite(low).all():
        in_group(axes.fill_between(size, low, high, color=color, alpha=0.12, linewidth=0), label)
    [dashed] = axes.plot(size, mean, color=color, linestyle="--", linewidth=1.2, label=None if inside.any() else label)
    in_group(dashed, label)
    if inside.any():
        axes.plot(size[inside], mean[inside], color=color, linewidth=2, label=label)


def tokens_along(members: pd.DataFrame, size: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Return the tokens of runs of these sizes that cost as much as the members of a budget.

    What a token costs is known at their sizes. Between and beyond them, log tokens is a line or a parabola in log size.
    """
    known = members.groupby(ACTIVE)[TOKENS].mean()
    center = math.log(known.index.to_numpy(dtype=float).mean())
    x = np.log(known.index.to_numpy(dtype=float)) - center
    curve = np.polyfit(x, np.log(known.to_numpy()), min(2, len(known) - 1))
    return np.exp(np.polyval(curve, np.log(size) - center))
