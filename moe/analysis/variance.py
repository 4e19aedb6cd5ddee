"""Analysis of variance with the seed as the unit: how much of a metric's spread is due to each factor.

Every seed trains all combinations of levels, so effects are measured within seeds. An effect that differs from seed to
seed is no effect of the factor. Each term is therefore tested against its own interaction with the seed, not against
what is left after all terms.
"""

import itertools
import math
import warnings
from collections.abc import Iterator
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.linalg import helmert
from statsmodels.regression.mixed_linear_model import MixedLM

from moe.analysis.statistics import completed, has_no_spread, name_cell
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

    If every seed has all combinations, these are the tests of repeated measures (Winer 1971, chapter 7). If runs are
    missing or have no finite value, a mixed model takes their place: all other runs count, and the seed and its
    interactions are random. It has no sums of squares. Its df are those of as many complete seeds as its runs amount
    to, and epsilon is the smallest possible, 1 / df, because incomplete seeds cannot tell it.

    Raises ValueError if no factor varies, if there is one seed only, if a combination has no finite value in any seed,
    if seeds do not differ, and if the mixed model cannot be estimated. Contrasts then compare what pairs there are.
    """
    table = _by_seed_and_cell(runs, metric, factors)
    values = table.to_numpy()
    if not factors or len(table) < 2:
        raise ValueError(
            f"an analysis of variance needs a varied factor and two seeds; varied: {', '.join(factors) or 'nothing'}; "
            f"seeds: {', '.join(map(str, table.index))}"
        )
    missing = np.isnan(values)
    if never := [name_cell(dict(zip(factors, cell, strict=True))) for cell in table.columns[missing.all(axis=0)]]:
        raise ValueError(f"unbalanced, no seed has {metric} at {'; '.join(never)}: only contrasts are tested")
    filled = completed(table).to_numpy()
    differences = filled - filled.mean(axis=1, keepdims=True)
    if has_no_spread(differences - differences.mean(axis=0), scale=np.abs(filled).max()):
        raise ValueError(f"{metric} has no spread between seeds: nothing to test its factors against")
    if missing.any():
        rows, used = _mixed(table), _used(table, factors)
    else:
        rows, used = tests_of_terms(values, _sizes(table)), f"all {values.size}"
    result = pd.DataFrame([{"term": _name(term, factors)} | row for term, row in rows])
    result.insert(0, "metric", metric)
    return result.assign(runs=used)


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


def _mixed(table: pd.DataFrame) -> Iterator[tuple[Term, dict[str, Any]]]:
    """Yield the test of every term in a linear mixed model.

    The seed and all its interactions are random, except the one with all factors, which is the residual.
    """
    factors = table.columns.nlevels
    long = table.stack(list(range(factors)), future_stack=True).dropna()
    names = [f"f{number}" for number in range(factors)]  # a formula would read router.temp as an attribute of router
    data = long.index.to_frame(index=False).set_axis(["seed", *names], axis=1)
    data = data.apply(lambda column: column.factorize()[0]).astype(str)  # a level "nan" would count as missing
    data["y"] = (long.to_numpy() - long.mean()) / long.std()  # the optimizer is at its best near 1
    components = {_name(term, names): f"0 + {':'.join(f'C({names[i]})' for i in term)}" for term in _terms(factors)}
    del components[_name(tuple(range(factors)), names)]
    formula = f"y ~ {' * '.join(f'C({name}, Sum)' for name in names)}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance estimated as 0 is a warning
        try:
            model = MixedLM.from_formula(formula, data, groups="seed", re_formula="1", vc_formula=components)
            fit = model.fit()
            tests = fit.wald_test_terms(scalar=True).table
        except (np.linalg.LinAlgError, ValueError) as error:
            raise ValueError(
                f"unbalanced, and a mixed model cannot be estimated ({error}): only contrasts are tested"
            ) from None
    seeds = len(long) / table.shape[1]
    for term in _terms(factors):
        row = tests.loc[":".join(f"C({names[number]}, Sum)" for number in term)]
        df = int(row["df_constraint"])
        yield term, _test(row["statistic"] / df, df, seeds, 1 / df)


def _used(table: pd.DataFrame, factors: list[str]) -> str:
    """Return which of the runs an unbalanced table has."""
    missing = [
        name_cell(dict(zip([*factors, "seed"], [*cell, seed], strict=True)))
        for cell, column in zip(table.columns, table.isna().to_numpy().T, strict=True)
        for seed in table.index[column]
    ]
    return f"unbalanced, mixed model of {table.size - len(missing)} of {table.size}, without {'; '.join(missing)}"
