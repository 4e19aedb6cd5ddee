"""Test whether differences may be due to chance: contrasts paired by seed, equivalence, analysis of variance.

The unit of replication is the seed. Runs of the same seed share their data order and their initial weights, so
differences are taken between runs of the same seed before they are averaged. Functions take the table of runs
(`moe.results.table.load_runs`), the column of a metric and the factors without the seed, and return a table. No run is
left out without a note. The tests are those of scipy and statsmodels.
"""

import itertools
import math
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from moe.config.claim import absolute
from moe.results.conditions import STD, by_seed, conditions, levels, varied_factors

CONFIDENCE, POWER = 0.95, 0.8
EXACT_SEEDS = 16  # up to this number of seeds, a sign-flip test tries all patterns of signs
RANDOM_PATTERNS = 9_999  # for more seeds, it tries this many random patterns


def with_intervals(summary: pd.DataFrame) -> pd.DataFrame:
    """Add the 95 % t interval of every mean over seeds as `ci_low` and `ci_high`; they are NaN without a spread."""
    enough = summary["n"] > 1
    error = (summary[STD] / np.sqrt(summary["n"].where(enough))).where(enough & (summary[STD] > 0))
    low, high = stats.t.interval(CONFIDENCE, (summary["n"] - 1).clip(lower=1), loc=summary["mean"], scale=error)
    return summary.assign(ci_low=low, ci_high=high)


def contrasts(
    runs: pd.DataFrame,
    metric: str,
    factors: list[str],
    *,
    references: dict[str, Any] | None = None,
    margin: int | float | str | None = None,
) -> pd.DataFrame:
    """Compare every level of every factor with the factor's reference level, for each combination of other factors.

    The reference level is the first in sorted order unless `references` names another. The columns are:

    - `difference`: level minus reference in units of the metric, mean over paired seeds; `ci_low` and `ci_high` are its
      95 % t interval, `p` is that of the paired t test.
    - `p Holm`, `p BH`: p corrected over all rows of the table (Holm; Benjamini-Hochberg, the false discovery rate).
    - `d_z`: the difference divided by the standard deviation (ddof=1) of the paired differences.
    - `p Welch`: p of a test that ignores the pairing.
    - `p sign-flip`: exact up to 16 seeds; `smallest p sign-flip` is the smallest value it can take at this n.
    - `detectable`: the smallest true difference that a paired t test would find with power 0.8, given this spread.
    - `note`: a remark for the reader, such as a seed that was left out.

    With a `margin`, in units of the metric or as text such as "1%" of the reference's mean, there are four more:
    `margin` in units, `p TOST` (two one-sided t tests that the true difference is smaller than the margin),
    `p TOST Holm`, and `equivalent`: whether the levels are equivalent at 5 %. (A difference that is not significant is
    no proof of equivalence.) Raises ValueError for a margin that is not positive and for an unknown reference.
    """
    if margin is not None and absolute(margin, 1.0) <= 0:
        raise ValueError(f"margin {margin}: must be positive, in units of {metric} or a text such as 1%")
    references = references or {}
    for factor in references.keys() - set(factors):
        raise ValueError(f"reference {factor}={references[factor]}: varied factors are {', '.join(factors) or 'none'}")
    rows = []
    for factor in factors:
        others = [other for other in factors if other != factor]
        reference = references.get(factor, levels(runs[factor])[0])
        if reference not in levels(runs[factor]):
            raise ValueError(f"reference {factor}={reference}: allowed are {', '.join(map(str, levels(runs[factor])))}")
        for level in levels(runs[factor]):
            if level == reference:
                continue
            for cell, members in conditions(runs, others):
                if not {level, reference} <= set(members[factor]):
                    continue  # this cell was not planned, such as the temperature of a router that has none
                treated = by_seed(members[members[factor] == level], metric)
                baseline = by_seed(members[members[factor] == reference], metric)
                names = {"factor": factor, "level": level, "reference": reference, "within": name_cell(cell)}
                rows.append({"metric": metric} | names | _compare(treated, baseline, margin))
    return as_one_family(pd.DataFrame(rows))


def as_one_family(table: pd.DataFrame) -> pd.DataFrame:
    """Correct the p-values of contrasts, which may be of several metrics, over all rows of the table."""
    if table.empty:
        return table
    table = table.assign(**{"p Holm": corrected(table["p"], "holm"), "p BH": corrected(table["p"], "fdr_bh")})
    if "p TOST" in table:
        holm = corrected(table["p TOST"], "holm")
        equivalent = pd.Series(holm <= 1 - CONFIDENCE, index=table.index).where(table["margin"].notna())
        table = table.assign(**{"p TOST Holm": holm, "equivalent": equivalent})
    return table


def anova(runs: pd.DataFrame, metric: str, factors: list[str]) -> pd.DataFrame:
    """Return the factorial analysis of variance with all interactions and the seed as block.

    Columns: sum of squares, df, F, p and partial eta². Raises ValueError if a combination of levels and seed has no
    finite value (the message lists them), if there is one seed only, or if seeds do not differ.
    """
    cells: dict[tuple[Any, ...], float] = {}
    for cell, members in conditions(runs, factors):
        cells |= {(*cell.values(), seed): value for seed, value in by_seed(members, metric).items()}
    seeds = sorted({key[-1] for key in cells})
    grid = list(itertools.product(*(levels(runs[factor]) for factor in factors), seeds))
    missing = [name_cell(dict(zip([*factors, "seed"], key, strict=True))) for key in grid if key not in cells]
    if not factors or len(seeds) < 2:
        raise ValueError(
            f"an analysis of variance needs a varied factor and two seeds; varied: {', '.join(factors) or 'nothing'}; "
            f"seeds: {', '.join(map(str, seeds))}"
        )
    if missing:
        raise ValueError(f"unbalanced, {len(missing)} of {len(grid)} cells have no {metric}: {'; '.join(missing)}")
    # A formula would read router.temp as an attribute of router, so factors have other names in it.
    names = [f"f{i}" for i in range(len(factors))]
    table = pd.DataFrame(grid, columns=[*names, "seed"]).astype(str)
    table["y"] = [cells[key] for key in grid]
    fit = ols(f"y ~ {' * '.join(f'C({name})' for name in names)} + C(seed)", table).fit()
    if fit.ssr <= 1e-20 * (table["y"] ** 2).sum():
        raise ValueError(f"{metric} has no spread between seeds: nothing to test its factors against")
    result = anova_lm(fit, typ=2).rename(columns={"sum_sq": "sum of squares", "PR(>F)": "p"})
    result.index = [_term(term, dict(zip(names, factors, strict=True))) for term in result.index]
    effects = result.index != "error"
    share = result["sum of squares"] / (result["sum of squares"] + result.loc["error", "sum of squares"])
    result["partial eta²"] = share.where(effects)
    result.insert(0, "metric", metric)
    return result.rename_axis("term").reset_index()


def noise_floor(runs: pd.DataFrame, metrics: list[str], *, seeds: tuple[int, ...] = (3, 5, 8)) -> pd.DataFrame:
    """Return how much runs differ if only the seed differs, with a row for each metric.

    Columns: `n`, `mean`, the sample standard deviation (ddof=1) with its 95 % chi-square interval `std_low` and
    `std_high`, and for each of `seeds` the smallest true difference that an unpaired two-sided t test over that many
    seeds on each side finds with power 0.8. A test paired by seed can find smaller ones, because runs of the same seed
    have much in common. Raises ValueError if a factor varies.
    """
    if factors := [factor for factor in varied_factors(runs) if factor != "seed"]:
        raise ValueError(f"a noise floor needs runs that differ in the seed alone, but {', '.join(factors)} varies")
    rows = []
    for metric in metrics:
        values = by_seed(runs, metric)
        n, std = len(values), values.std(ddof=1)
        tail = (1 - CONFIDENCE) / 2
        low, high = std * np.sqrt((n - 1) / stats.chi2.ppf([1 - tail, tail], n - 1)) if n > 1 else (np.nan, np.nan)
        row = {"metric": metric, "n": n, "mean": values.mean(), STD: std, "std_low": low, "std_high": high}
        effects = {f"detectable, {k} seeds a side": std * detectable_effect(k, paired=False) for k in seeds}
        rows.append(row | effects)
    return pd.DataFrame(rows)


@lru_cache
def detectable_effect(n: int, *, paired: bool = True) -> float:
    """Return the smallest true difference that a two-sided t test finds with power 0.8; NaN below two seeds.

    A paired test has n pairs, and the result is in standard deviations of the paired differences (d_z). An unpaired
    test has n seeds on each side, and the result is in standard deviations of a single run.
    """
    if n < 2:
        return float("nan")
    known = {"nobs": n} if paired else {"nobs1": n}
    return float((TTestPower() if paired else TTestIndPower()).solve_power(alpha=1 - CONFIDENCE, power=POWER, **known))


def range_test(differences: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Return the p of the claim that the mean lies between two bounds (two one-sided t tests, TOST), and the two-sided
    p of the claim that it lies outside.

    A bound may be infinite. There must be at least two differences, and they must differ.
    """
    within, (_, above_low, _), (_, below_high, _) = DescrStatsW(differences).ttost_mean(low, high)
    return float(within), float(min(1, 2 * (1 - max(above_low, below_high))))


def corrected(p: pd.Series, method: str) -> np.ndarray:
    """Return p-values corrected by "holm" or "fdr_bh". NaN stands for a test that was impossible, and stays NaN."""
    values = np.full(len(p), np.nan)
    tested = p.notna().to_numpy()
    if tested.any():
        values[tested] = multipletests(p[tested], method=method)[1]
    return values


def sign_flip(differences: np.ndarray) -> float:
    """Return the two-sided p of the mean if every sign were random. No normal distribution is assumed."""
    if len(differences) < 2:
        return float("nan")
    resamples = _patterns(len(differences))
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=resamples, vectorized=True, rng=0
    )
    return float(test.pvalue)


def _patterns(seeds: int) -> int:
    """Return how many patterns of signs a sign-flip test tries."""
    return 2**seeds if seeds <= EXACT_SEEDS else RANDOM_PATTERNS


def name_cell(cell: dict[str, Any]) -> str:
    """Return a combination of levels in the form of the command line: "lb=0.01, noise=0.1"."""
    return ", ".join(f"{factor}={level}" for factor, level in cell.items())


def _compare(treated: pd.Series, baseline: pd.Series, margin: int | float | str | None) -> dict[str, Any]:
    """Return one row of `contrasts` from the values at the two levels, which are indexed by seed."""
    seeds = treated.index.intersection(baseline.index)
    unpaired = treated.index.symmetric_difference(baseline.index)
    a, b = treated[seeds].to_numpy(), baseline[seeds].to_numpy()
    differences, n = a - b, len(seeds)
    low = high = p = d_z = detectable = float("nan")
    notes = [f"without a partner: seed {', '.join(map(str, unpaired))}"] if len(unpaired) else []
    if n < 2:
        notes.append("a test needs two paired seeds")
    elif has_no_spread(differences, scale=np.abs([a, b]).max()):
        notes.append("the same difference in every seed: no spread to test against")
    else:
        test = stats.ttest_rel(a, b)
        (low, high), p = test.confidence_interval(CONFIDENCE), test.pvalue
        d_z = differences.mean() / differences.std(ddof=1)
        detectable = detectable_effect(n) * differences.std(ddof=1)
    row = {
        "n": n,
        "difference": differences.mean() if n else float("nan"),
        "ci_low": low,
        "ci_high": high,
        "p": p,
        "p Holm": float("nan"),  # `as_one_family` sets p Holm and p BH when all rows exist
        "p BH": float("nan"),
        "d_z": d_z,
        "p Welch": _welch(treated.to_numpy(), baseline.to_numpy()),
        "p sign-flip": sign_flip(differences),
        "smallest p sign-flip": 2 / (_patterns(n) + (n > EXACT_SEEDS)) if n > 1 else float("nan"),
        "detectable": detectable,
        "note": "; ".join(notes),
    }
    if margin is not None:
        bound = absolute(margin, b.mean()) if n else float("nan")
        row |= {"margin": bound, "p TOST": range_test(differences, -bound, bound)[0] if not math.isnan(p) else p}
    return row


def _welch(a: np.ndarray, b: np.ndarray) -> float:
    """Return the p of Welch's t test; NaN if there are too few values or no spread."""
    if min(len(a), len(b)) < 2 or (has_no_spread(a, scale=np.abs(a).max()) and has_no_spread(b, scale=np.abs(b).max())):
        return float("nan")
    moments = [moment for sample in (a, b) for moment in (sample.mean(), sample.std(ddof=1), len(sample))]
    return float(stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue)  # one of the two may have no spread


def has_no_spread(values: np.ndarray, *, scale: float) -> bool:
    """Return whether the values are equal up to rounding at this scale. scipy would compute a p from the rounding."""
    return bool(np.ptp(values) <= 1e-12 * scale)


def _term(term: str, factors: dict[str, str]) -> str:
    """Return a term with the names of the factors, such as `noise:lb` for `C(f0):C(f1)`."""
    if term == "Residual":
        return "error"
    names = [part.removeprefix("C(").removesuffix(")") for part in term.split(":")]
    return ":".join(factors.get(name, name) for name in names)
