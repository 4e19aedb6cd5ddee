"""Analysis of variance with the seed as the unit: how much of a metric's spread is due to each factor.

Every seed trains all combinations of levels, so effects are measured within seeds. An effect that differs from seed to
seed is no effect of the factor. Each term is therefore tested against its own interaction with the seed, not against
what is left after all terms.
"""

import itertools
import math
from collections.abc import Iterator
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.linalg import helmert

from moe.analysis.sentences import enumerated
from moe.analysis.statistics import has_no_spread, name_cell
from moe.results.conditions import by_seed, conditions, levels

Term = tuple[int, ...]  # the numbers of the factors that interact; a main effect has one


def anova(runs: pd.DataFrame, metric: str, factors: list[str]) -> pd.DataFrame:
    """Return the factorial analysis of variance with all interactions: a row for each term, and one for the seed.

    The arguments are those of `moe.analysis.statistics.contrasts`. The columns are:

    - `df`, `df error`, `F`, `p`: the F test of the term against its interaction with the seed.
    - `epsilon`, `p GG`: Greenhouse and Geisser's estimate of how unequal the differences between levels spread, between
      1 / df and 1 (equal), and p with both df multiplied by it. It is 1 for a term with one df. A term is judged by
      `p GG`: with three levels or more, `p` alone is too small if seeds differ in their response to the factor.
    - `sum of squares`; `partial eta²`: that of the term as a share of itself and of its interaction with the seed.
    - `runs`: which runs were used.

    These are the tests of repeated measures (Winer 1971, chapter 7). Only seeds that have a finite value at every
    combination are used, so that the tests are exact if runs are missing, too. A linear mixed model of all runs errs
    several times as often if there are few seeds.

    Raises ValueError if no factor varies, if there is one seed only, if a combination has no finite value in any seed,
    if fewer than two seeds have all combinations, and if seeds do not differ. Contrasts then compare what pairs there
    are.
    """
    table = _by_seed_and_cell(runs, metric, factors)
    if not factors or len(table) < 2:
        raise ValueError(
            f"an analysis of variance needs a varied factor and two seeds; varied: {', '.join(factors) or 'nothing'}; "
            f"seeds: {', '.join(map(str, table.index))}"
        )
    missing = table.isna().to_numpy()
    if never := [name_cell(dict(zip(factors, cell, strict=True))) for cell in table.columns[missing.all(axis=0)]]:
        raise ValueError(f"unbalanced, no seed has {metric} at {'; '.join(never)}: only contrasts are tested")
    complete = table.dropna()
    if len(complete) < 2:
        have = "only one seed has" if len(complete) else "no seed has"
        raise ValueError(f"{have} {metric} at all {table.shape[1]} combinations, and two are needed")
    values = complete.to_numpy()
    differences = values - values.mean(axis=1, keepdims=True)
    if has_no_spread(differences - differences.mean(axis=0), scale=np.abs(values).max()):
        raise ValueError(f"{metric} has no spread between seeds: nothing to test its factors against")
    rows = tests_of_terms(values, _sizes(table))
    result = pd.DataFrame([{"term": _name(term, factors)} | row for term, row in rows])
    result.insert(0, "metric", metric)
    return result.assign(runs=_used(table, complete))


def complete_seeds(runs: pd.DataFrame, metric: str, factors: list[str]) -> list[int]:
    """Return the seeds that have a finite value at every combination of levels: those that `anova` uses."""
    return [*_by_seed_and_cell(runs, metric, factors).dropna().index]


def _by_seed_and_cell(runs: pd.DataFrame, metric: str, factors: list[str]) -> pd.DataFrame:
    """Return the finite values with a row for each seed and a column for each combination of levels, NaN if missing."""
    found = {tuple(cell.values()): by_seed(members, metric) for cell, members in conditions(runs, factors)}
    grid = list(itertools.product(*(levels(runs[factor]) for factor in factors)))
    table = pd.DataFrame({number: found.get(cell, pd.Series(dtype=float)) for number, cell in enumerate(grid)})
    table.columns = pd.MultiIndex.from_tuples(grid) if factors else table.columns
    return table.dropna(how="all").astype(float)


def _sizes(table: pd.DataFrame) -> list[int]:
    """Return the number of levels of each factor."""
    return [len(level) for level in table.columns.levels]


def _terms(factors: int) -> Iterator[Term]:
    """Yield all terms: main effects first, then interactions of two factors, and so on."""
    for order in range(1, factors + 1):
        yield from itertools.combinations(range(factors), order)


def _name(term: Term, factors: list[str]) -> str:
    return ":".join(factors[number] for number in term) or "seed"


def _scale(values: np.ndarray) -> np.float64:
    return np.float64(np.nanmax(np.abs(values)))


def tests_of_terms(values: np.ndarray, sizes: list[int]) -> Iterator[tuple[Term, dict[str, Any]]]:
    """Yield the test of every term from values (seeds, cells), and the row of the seed as the empty term.

    The columns of a term's basis are orthonormal contrasts of the cells. One value per seed and contrast then holds
    everything about the term: their means are the effect, and their spread over seeds is its error.
    """
    seeds = len(values)
    for term in _terms(len(sizes)):
        sides = [
            helmert(size) if number in term else np.full((1, size), size**-0.5) for number, size in enumerate(sizes)
        ]
        contrast = values @ reduce(np.kron, sides).T  # (seeds, df)
        df = contrast.shape[1]
        spread = contrast - contrast.mean(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):  # squares above 1e308 are infinite, and give no p
            effect, error = seeds * (contrast.mean(axis=0) ** 2).sum(), (spread**2).sum()
            covariance = spread.T @ spread
            epsilon = float(np.trace(covariance) ** 2 / (df * (covariance**2).sum())) if error > 0 else math.nan
            known = error > 1e-20 * seeds * np.square(_scale(values))
            f = effect / error * (seeds - 1) if known else math.nan
            sums = {"sum of squares": effect, "partial eta²": effect / (effect + error) if known else math.nan}
        yield term, _test(f, df, seeds, epsilon) | sums
    yield (), {"df": seeds - 1, "sum of squares": values.shape[1] * values.mean(axis=1).var() * seeds}


def _test(f: float, df: int, seeds: int | float, epsilon: float) -> dict[str, Any]:
    """Return the columns of an F test with the df of a term and of its interaction with the seed."""
    error = df * (seeds - 1)
    corrected = stats.f.sf(f, epsilon * df, epsilon * error)
    return {"df": df, "df error": error, "F": f, "p": stats.f.sf(f, df, error), "epsilon": epsilon, "p GG": corrected}


def _used(table: pd.DataFrame, complete: pd.DataFrame) -> str:
    """Return which of the runs of a table are used: those of the complete seeds."""
    if len(complete) == len(table):
        return f"all {table.size}"
    others = enumerated([str(seed) for seed in table.index.difference(complete.index)])
    return f"{complete.size} of {table.size}: the seeds that have all combinations, not {others}"
