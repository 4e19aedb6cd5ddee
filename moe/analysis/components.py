"""Where the spread between runs comes from: the initial weights, the order of the data, or both together."""

import math
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from moe.analysis.statistics import CONFIDENCE, spread_interval
from moe.results.conditions import conditions, varied_factors

INIT, DATA = "init_seed", "data_seed"
SOURCES = {
    INIT: "initial weights",
    DATA: "order of the data, noise and dropout",
    "both": "both together, beyond the sum of the two",
}


def is_crossed(runs: pd.DataFrame) -> bool:
    """Return whether the runs have several seeds of both kinds."""
    return all(name in runs and runs[name].nunique() > 1 for name in (INIT, DATA))


def variance_components(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a row for each of `SOURCES` with its part of the variance of a metric between runs of one setting.

    The columns: `variance`, an unbiased estimate, which chance can make negative; `std`, its root, 0 if it is negative;
    `std_low` and `std_high`, the 95 % interval of the latter (`of_difference`), as if all settings moved together and
    had the smallest of their tables; `share` of the sum of all that are positive; `levels`, the number of seeds. The
    runs of each setting are a two-way table with random rows and columns and one run in each cell, whose mean squares
    are averaged over settings (Searle, Casella and McCulloch 1992, chapter 4). A setting that lacks a run, or a finite
    value, counts with the largest complete table that has all its seeds of initial weights.

    Raises ValueError if no setting has a complete table of two seeds of each kind.
    """
    squares, shapes = [], []
    others = [factor for factor in varied_factors(runs) if factor not in (INIT, DATA, "seed")]
    for _, members in conditions(runs[runs["status"] == "finished"], others):
        table = members.pivot_table(metric, INIT, DATA).replace([np.inf, -np.inf], np.nan).dropna(axis=1)
        if min(table.shape) > 1:
            squares.append(mean_squares(table.to_numpy(dtype=float)))
            shapes.append(table.shape)
    if not squares:
        raise ValueError(f"{metric} has no setting with all combinations of two values of {INIT} and of {DATA}")
    estimates = [
        [(init - both) / columns, (data - both) / rows, both]
        for (init, data, both), (rows, columns) in zip(squares, shapes, strict=True)
    ]
    variance = np.mean(estimates, axis=0)
    positive = np.clip(variance, 0, None)
    a, b = np.min(shapes, axis=0) - 1  # degrees of freedom
    (of_init, in_init), (of_data, in_data), (of_both, _) = np.mean(
        [
            [(init / columns, both / columns), (data / rows, both / rows), (both, 0.0)]
            for (init, data, both), (rows, columns) in zip(squares, shapes, strict=True)
        ],
        axis=0,
    )
    ends = [
        of_difference(of_init, in_init, int(a), int(a * b)),
        of_difference(of_data, in_data, int(b), int(a * b)),
        spread_interval(math.sqrt(of_both), int(a * b)),
    ]
    rows, columns = np.max(shapes, axis=0)
    found: dict[str, Any] = {
        "spread due to": list(SOURCES.values()),
        "variance": variance,
        "std": np.sqrt(positive),
        "std_low": [float(low) for low, _ in ends],
        "std_high": [float(high) for _, high in ends],
        "share": positive / positive.sum() if positive.sum() else np.nan,
        "levels": [rows, columns, rows * columns],
    }
    return pd.DataFrame(found)


def of_difference(first: float, second: float, a: int, b: int) -> tuple[float, float]:
    """Return the 95 % interval of the root of the difference of two mean squares, with a and b degrees of freedom.

    It is the modified large-sample interval (Ting, Burdick, Graybill, Jeyaratnam and Lu 1990; Burdick and Graybill
    1992). A negative end is 0.
    """
    tail = (1 - CONFIDENCE) / 2
    f_low, f_high = stats.f.isf([1 - tail, tail], a, b)
    g1, h1 = abs(1 - a / stats.chi2.isf([tail, 1 - tail], a))
    g2, h2 = abs(1 - b / stats.chi2.isf([tail, 1 - tail], b))
    below = (g1 * first) ** 2 + (h2 * second) ** 2
    below += ((f_high - 1) ** 2 - (g1 * f_high) ** 2 - h2**2) / f_high * first * second
    above = (h1 * first) ** 2 + (g2 * second) ** 2
    above += ((1 - f_low) ** 2 - (h1 * f_low) ** 2 - g2**2) / f_low * first * second
    low, high = first - second - math.sqrt(max(below, 0.0)), first - second + math.sqrt(max(above, 0.0))
    return math.sqrt(max(low, 0.0)), math.sqrt(max(high, 0.0))


def mean_squares(table: Float[np.ndarray, "I J"]) -> tuple[float, float, float]:
    """Return the mean squares of rows, of columns, and of what is left in a two-way table with one value in a cell."""
    rows, columns = table.shape
    of_rows, of_columns = table.mean(1) - table.mean(), table.mean(0) - table.mean()
    left = table - table.mean() - of_rows[:, None] - of_columns
    return (
        float(columns * (of_rows**2).sum() / (rows - 1)),
        float(rows * (of_columns**2).sum() / (columns - 1)),
        float((left**2).sum() / ((rows - 1) * (columns - 1))),
    )
