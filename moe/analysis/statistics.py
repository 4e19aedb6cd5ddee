"""Test whether differences may be due to chance: contrasts paired by seed, equivalence, corrections for many tests.

The unit of replication is the seed. Runs of the same seed share their data order and their initial weights, so
differences are taken between runs of the same seed before they are averaged. Functions take the table of runs
(`moe.results.table.load_runs`), the column of a metric and the factors without the seed, and return a table. No run is
left out without a note. `moe.analysis.variance` has the analysis of variance.
"""

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from moe.analysis.power import SIGNIFICANCE, UNPAIRED, detectable_effect
from moe.config.claim import amount_of
from moe.metrics.catalog import span
from moe.results.comparable import TEST_TEXT, TOKENIZER, WHEN, incomparable
from moe.results.conditions import (
    STD,
    by_seed,
    conditions,
    levels,
    narrowed,
    reference_level,
    two_levels,
    varied_factors,
)

CONFIDENCE = 0.95
EXACT_SEEDS = 16  # up to this number of seeds, a sign-flip test tries all patterns of signs
RANDOM_PATTERNS = 9_999  # for more seeds, it tries this many random patterns
CLEAR = 0.01  # the largest p of the test against zero with which a mean is clear of it
NOT_CLEAR = f"a percentage needs a mean that is told from zero with p <= {CLEAR:g}; more seeds may tell it"

# What a comparison reads beside factors and a metric.
SIDES = ("level", "reference")
NAMES = ["factor", *SIDES, "within"]  # the columns that name a comparison
COMPARED = (*WHEN, "folder", "place", "causal", *TEST_TEXT, TOKENIZER)


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

    The reference level is `moe.results.conditions.reference_level` unless `references` names another. The columns are:

    - `difference`: level minus reference in units of the metric, mean over paired seeds; `ci_low` and `ci_high` are its
      95 % t interval, `p` is that of the paired t test. These are NaN if the difference is `deterministic`, which means
      that it is the same in every seed.
    - `p Holm`, `p BH`: p corrected over all rows of the table (`corrected`, `false_discovery`). A report corrects them
      for all its tests.
    - `std of differences` (ddof=1), and `d_z`: the difference divided by it.
    - `p Welch`: p of a test that ignores the pairing. `width ratio`: the width of the 95 % interval, as a share of the
      width that it would have without the pairing (Welch's interval of the same seeds).
    - `p sign-flip`: exact up to 16 seeds; `smallest p sign-flip` is the smallest value it can take at this n.
    - `tests`: the number by which 5 % are divided before any test is significant (`divisors`).
    - `detectable`: the smallest true difference that would be significant at 5 % / `tests` with power 0.8, if this
      spread were the true one; `detectable_low` and `detectable_high`: the same for the ends of the spread's 95 %
      chi-square interval. It is infinite if the metric cannot change so much.
    - `note`: a remark for the reader, such as a seed that was left out.

    With a `margin`, in units of the metric or as text such as "1%" of the reference's mean, there are six more:
    `margin` in units, `p TOST` (two one-sided t tests that the true difference is smaller than the margin),
    `p beyond` (that it is larger), `p TOST Holm`, `equivalent`: whether the levels are equivalent at 5 %, and `beyond`:
    whether the difference exceeds the margin at 5 % / `tests`. (A difference that is not significant is no proof of
    equivalence.) Raises ValueError for a margin that is not positive and for an unknown reference.
    """
    if margin is not None and amount_of(margin).at(1.0) <= 0:
        raise ValueError(f"margin {margin}: must be positive, in units of {metric} or a text such as 1%")
    for factor, level in (references or {}).items():
        if factor not in factors:
            raise ValueError(f"reference {factor}={level}: varied factors are {', '.join(factors) or 'none'}")
        if level not in (known := levels(runs[factor])):
            raise ValueError(f"reference {factor}={level}: allowed are {', '.join(map(str, known))}")
    runs = narrowed(runs, (metric, *factors, *COMPARED))
    rows = [
        {"metric": metric} | names | _compare_runs(metric, treated, baseline, margin)
        for names, treated, baseline in comparisons(runs, factors, references or {})
    ]
    return as_one_family(_contrast_table(rows, margin))


def comparisons(
    runs: pd.DataFrame, factors: list[str], references: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    """Yield every level of every factor against its reference, for each combination of other factors that has both.

    The first part names the comparison by factor, level, reference and within; the others are the runs at the level and
    at the reference. A factor whose reference these runs lack is not compared: it may not have been trained yet.
    """
    for factor in factors:
        others, known = [other for other in factors if other != factor], levels(runs[factor])
        if not known:
            continue
        reference = references[factor] if factor in references else reference_level(runs, factor)
        if reference not in known:
            continue
        for level in known:
            if level == reference:
                continue
            for cell, members in conditions(two_levels(runs, factor, (level, reference), others), others):
                if not {level, reference} <= set(members[factor]):
                    continue  # this cell was not planned
                treated, baseline = (members[members[factor] == side] for side in (level, reference))
                names = {"factor": factor, "level": level, "reference": reference, "within": name_cell(cell)}
                yield names, treated, baseline


def table_of_comparisons(rows: list[dict[str, Any]], columns: list[str] | None = None) -> pd.DataFrame:
    """Return rows that begin with the names of `comparisons` as a table. Each level stays as it is: 2 and not 2.0."""
    table = pd.DataFrame(rows, columns=columns)
    sides = {side: pd.Series([row[side] for row in rows], index=table.index, dtype=object) for side in SIDES}
    return table.assign(**sides) if rows else table


def as_one_family(table: pd.DataFrame) -> pd.DataFrame:
    """Correct the p-values of contrasts, which may be of several metrics, over all rows of the table."""
    if "p" not in table:
        return table
    equivalence = corrected(table["p TOST"]) if "p TOST" in table else None
    p = table["p"]
    return with_correction(table, corrected(p), divisors(p), false_discovery(p), equivalence)


def with_correction(
    table: pd.DataFrame, holm: np.ndarray, tests: np.ndarray, bh: np.ndarray, equivalence: np.ndarray | None
) -> pd.DataFrame:
    """Set the columns of contrasts that depend on other tests.

    The arguments are what `corrected`, `divisors` and `false_discovery` return for these rows. equivalence: the
    corrected p of equivalence, which is another question than a difference and has 5 % of its own.
    """
    table = table.assign(**{"p Holm": holm, "p BH": bh, "tests": tests})
    spread = table["std of differences"]
    factor = [detectable_effect(n, tests=max(number, 1)) for n, number in table[["n", "tests"]].itertuples(index=False)]
    low, high = spread_interval(spread, table["n"] - 1)
    spreads = {"detectable": spread, "detectable_low": low, "detectable_high": high}
    effects = {name: (each * factor).where(table["p"].notna()) for name, each in spreads.items()}
    most = table["metric"].map(span).astype(float)
    table = table.assign(**{name: effect.mask(effect > most, math.inf) for name, effect in effects.items()})
    if "p TOST" in table:
        equivalence = table["p TOST"].to_numpy() if equivalence is None else equivalence
        equivalent = pd.Series(equivalence <= SIGNIFICANCE, index=table.index).where(table["margin"].notna())
        beyond = table["p beyond"] <= SIGNIFICANCE / table["tests"].clip(lower=1)
        table = table.assign(**{"p TOST Holm": equivalence, "equivalent": equivalent, "beyond": beyond})
    return table


def stack(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all tables in one table. If none has a row, it is the first table, with its columns."""
    filled = [table for table in tables if not table.empty]
    return pd.concat(filled, ignore_index=True) if filled else next(iter(tables), pd.DataFrame())


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
        low, high = spread_interval(std, n - 1)
        row = {"metric": metric, "n": n, "mean": values.mean(), STD: std, "std_low": low, "std_high": high}
        spread = math.sqrt(2) * std  # of a difference of two runs
        found = {k: spread * detectable_effect(k, freedom=UNPAIRED) for k in seeds}
        effects = {f"detectable, {k} seeds a side": math.inf if x > span(metric) else x for k, x in found.items()}
        rows.append(row | effects)
    return pd.DataFrame(rows)


def spread_interval(std: Any, freedom: Any) -> tuple[Any, Any]:
    """Return the 95 % chi-square interval of a standard deviation with these degrees of freedom; NaN without any."""
    tail = (1 - CONFIDENCE) / 2
    df = np.where(np.asarray(freedom) > 0, np.asarray(freedom, dtype=float), np.nan)
    return std * np.sqrt(df / stats.chi2.ppf(1 - tail, df)), std * np.sqrt(df / stats.chi2.ppf(tail, df))


def p_of_share(mean: float, error: float, freedom: int | float) -> float:
    """Return the p that a bound adds to a test if it is a share of a mean; above 5 % unless the mean is clear of 0.

    mean, error: an estimate and its standard error, with these degrees of freedom. The bound has the sign of the mean,
    which the same runs tell. So a test at a level would err at twice that level where the true mean is 0, half of it
    with each sign. It does not if the two-sided t test of the mean against 0 must reach a fifth of the level too: then
    the wrong sign adds a tenth of the level at most, and next to nothing where the right one errs at the whole level.
    """
    p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return min(1.0, p * SIGNIFICANCE / CLEAR)


class MarginTest(NamedTuple):
    """A margin in units, and the p of the claims that the mean difference lies `inside` and `beyond` it.

    note: why there is no p although the differences spread.
    """

    margin: float
    inside: float = math.nan
    beyond: float = math.nan
    note: str = ""


def margin_test(a: np.ndarray, b: np.ndarray, margin: int | float | str) -> MarginTest:
    """Return the tests that the mean of a - b lies between -margin and margin, and that it does not: one-sided t tests.

    Inside, both tests must hold (TOST), and beyond, one of the two. A margin may be a share of the mean of b, such as
    "1%". That mean is estimated from the same runs, so the test is of a - (1 - share) b and of a - (1 + share) b
    (Fieller 1954), not of a bound that is taken to be known; and of the mean itself (`p_of_share`). There must be at
    least two values. p is NaN if there is no spread.
    """
    amount, mean, n = amount_of(margin), float(b.mean()), len(b)
    found = MarginTest(amount.at(mean))
    bound = amount.constant + amount.share * math.copysign(1.0, mean) * b
    scale = float(np.abs([a, b]).max())
    inward = a - b + bound, bound - (a - b)
    if any(has_no_spread(each, scale=scale) for each in inward):
        return found
    error = 0.0 if has_no_spread(b, scale=scale) else float(b.std(ddof=1)) / math.sqrt(n)
    of_share = p_of_share(mean, error, n - 1) if amount.share else 0.0
    if of_share > SIGNIFICANCE:
        return found._replace(note=NOT_CLEAR)
    p = [float(stats.ttest_1samp(each, 0.0, alternative="greater").pvalue) for each in inward]
    return found._replace(inside=max(of_share, *p), beyond=min(1.0, 2 * (1 - max(p))))


def corrected(p: pd.Series, family: np.ndarray | None = None) -> np.ndarray:
    """Return p-values corrected by Holm's method, for tests of one or several families.

    If the tests with a result of at most 5 % are called significant, the probability that any of them is significant by
    chance is at most 5 % for all families together. The 5 % are divided by `shares`, in the order of the numbers in
    `family`. Within a family its share is divided evenly among the tests. A test that is significant drops out, and the
    5 % are divided again among the others, so that a family whose tests are all significant leaves its share to the
    other families (Bretz et al. 2009, sequentially rejective weighted procedures). With a single family this is Holm's
    method. NaN stands for a test that was impossible, and stays NaN.
    """
    values = p.to_numpy(dtype=float)
    tested = np.flatnonzero(~np.isnan(values))
    families = np.zeros(len(values), dtype=int) if family is None else family
    ordered = tested[np.argsort(values[tested], kind="stable")]
    queues = [deque(ordered[families[ordered] == each]) for each in np.unique(families[tested])]
    result, largest = np.full(len(values), np.nan), 0.0
    while queues:
        bounds = [
            len(queue) / share * values[queue[0]] for queue, share in zip(queues, shares(len(queues)), strict=True)
        ]
        smallest = int(np.argmin(bounds))
        largest = max(largest, bounds[smallest])
        result[queues[smallest].popleft()] = min(1.0, largest)
        queues = [queue for queue in queues if queue]
    return result


def shares(families: int) -> list[float]:
    """Return the share of 5 % that each family of tests gets: half of what is left, and the last one all of it."""
    return [0.5 ** min(number, families - 1) for number in range(1, families + 1)]


def divisors(p: pd.Series, family: np.ndarray | None = None) -> np.ndarray:
    """Return for each test the number by which 5 % are divided before any test is significant.

    It is the number of tests of the family, divided by the family's share. Tests with p = 0, which chance cannot
    explain, and tests that were impossible do not count.
    """
    values = p.to_numpy(dtype=float)
    families = np.zeros(len(values), dtype=int) if family is None else family
    present, sizes = np.unique(families[values > 0], return_counts=True)
    number = dict(zip(present, sizes / shares(len(present)), strict=True))
    return np.array([round(number.get(each, 0)) for each in families], dtype=int)


def false_discovery(p: pd.Series) -> np.ndarray:
    """Return p-values corrected for the false discovery rate (Benjamini and Hochberg); NaN stays NaN."""
    values = p.to_numpy(dtype=float, copy=True)
    tested = ~np.isnan(values)
    values[tested] = stats.false_discovery_control(values[tested]) if tested.any() else values[tested]
    return values


def sign_flip(differences: np.ndarray) -> float:
    """Return the two-sided p of the mean if every sign were random. No normal distribution is assumed."""
    if len(differences) < 2:
        return float("nan")
    sums = np.abs(_signs(len(differences)) @ differences)
    as_large = sums >= abs(differences.sum()) - 1e-12 * np.abs(differences).sum()  # equal up to rounding counts
    return float((as_large.sum() + (len(differences) > EXACT_SEEDS)) / (len(sums) + (len(differences) > EXACT_SEEDS)))


def smallest_sign_flip(seeds: int) -> float:
    """Return the smallest p that a sign-flip test can give, when all differences have one sign."""
    if seeds < 2:
        return float("nan")
    return 2.0 ** (1 - seeds) if seeds <= EXACT_SEEDS else 1 / (RANDOM_PATTERNS + 1)


@lru_cache(maxsize=4)
def _signs(seeds: int) -> np.ndarray:
    """Return the patterns of signs that a sign-flip test tries, (patterns, seeds): all of them, or random ones."""
    if seeds > EXACT_SEEDS:
        return np.random.default_rng(0).choice([-1.0, 1.0], (RANDOM_PATTERNS, seeds))
    return 1.0 - 2.0 * (np.arange(2**seeds)[:, None] >> np.arange(seeds) & 1)


def name_cell(cell: dict[str, Any]) -> str:
    """Return a combination of levels in the form of the command line: "lb=0.01, noise=0.1".

    A level of several words with punctuation is in parentheses: "model.routers=(layer 0: hash, k=2)".
    """
    levels = {factor: f"({level})" if re.search("[,:] ", str(level)) else level for factor, level in cell.items()}
    return ", ".join(f"{factor}={level}" for factor, level in levels.items())


def _contrast_table(rows: list[dict[str, Any]], margin: int | float | str | None = None) -> pd.DataFrame:
    """Return rows of contrasts as a table, which has its columns even if there is no row."""
    if rows:
        return table_of_comparisons(rows)
    names = dict.fromkeys(("metric", *NAMES), "")
    none = pd.Series(dtype=float)
    return pd.DataFrame([names | _compare(none, none, margin)])[:0]


def _compare_runs(
    metric: str, treated: pd.DataFrame, baseline: pd.DataFrame, margin: int | float | str | None
) -> dict[str, Any]:
    """Return one row of `contrasts` from the runs at the two levels. It has no number if they cannot be compared."""
    if reason := incomparable(metric, treated, baseline):
        treated, baseline = treated[:0], baseline[:0]
    row = _compare(by_seed(treated, metric), by_seed(baseline, metric), margin)
    return row | {"note": reason} if reason else row


def _compare(treated: pd.Series, baseline: pd.Series, margin: int | float | str | None) -> dict[str, Any]:
    """Return one row of `contrasts` from the values at the two levels, which are indexed by seed."""
    seeds = treated.index.intersection(baseline.index)
    unpaired = treated.index.symmetric_difference(baseline.index)
    a, b = treated[seeds].to_numpy(), baseline[seeds].to_numpy()
    differences, n = a - b, len(seeds)
    low = high = p = d_z = float("nan")
    scale = np.abs([a, b]).max() if n else 0.0
    deterministic = n > 1 and has_no_spread(differences, scale=scale)
    notes = [f"without a partner: seed {', '.join(map(str, unpaired))}"] if len(unpaired) else []
    if n < 2:
        notes.append("a test needs two paired seeds")
    elif not deterministic:
        test = stats.ttest_rel(a, b)
        (low, high), p = test.confidence_interval(CONFIDENCE), test.pvalue
        d_z = differences.mean() / differences.std(ddof=1)
    row = {
        "n": n,
        "difference": mean_difference(differences, scale=scale) if n else float("nan"),
        "ci_low": low,
        "ci_high": high,
        "p": p,
        "p Holm": float("nan"),  # `as_one_family` sets the columns that depend on all rows
        "p BH": float("nan"),
        "std of differences": differences.std(ddof=1) if n > 1 else float("nan"),
        "d_z": d_z,
        "p Welch": _welch(treated.to_numpy(), baseline.to_numpy()),
        "width ratio": (high - low) / _welch_width(a, b) if not math.isnan(p) else p,
        "p sign-flip": sign_flip(differences),
        "smallest p sign-flip": smallest_sign_flip(n),
        "tests": 0,
        "detectable": float("nan"),
        "detectable_low": float("nan"),
        "detectable_high": float("nan"),
        "deterministic": deterministic,
        "note": "; ".join(notes),
    }
    if margin is not None:
        mean = float(b.mean()) if n else float("nan")
        tested = MarginTest(amount_of(margin).at(mean)) if math.isnan(p) else margin_test(a, b, margin)
        row |= {"margin": tested.margin, "p TOST": tested.inside, "p beyond": tested.beyond}
        row["note"] = "; ".join(filter(None, [*notes, tested.note]))
    return row


def mean_difference(differences: np.ndarray, *, scale: float) -> float:
    """Return the mean of differences between values of this scale; exactly 0 if it is 0 up to rounding."""
    mean = float(differences.mean())
    return 0.0 if abs(mean) <= 1e-12 * scale else mean


def _welch(a: np.ndarray, b: np.ndarray) -> float:
    """Return the p of Welch's t test; NaN if there are too few values or no spread."""
    if min(len(a), len(b)) < 2 or (has_no_spread(a, scale=np.abs(a).max()) and has_no_spread(b, scale=np.abs(b).max())):
        return float("nan")
    moments = [moment for sample in (a, b) for moment in (sample.mean(), sample.std(ddof=1), len(sample))]
    return float(stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue)  # one of the two may have no spread


def _welch_width(a: np.ndarray, b: np.ndarray) -> float:
    """Return the width of Welch's 95 % interval of the difference of two means. One of the two must have a spread.

    The variance of each mean is v = s²/n, and the degrees of freedom are (v_a + v_b)² / (v_a²/(n_a-1) + v_b²/(n_b-1)).
    """
    variances = np.array([sample.var(ddof=1) / len(sample) for sample in (a, b)])
    freedom = variances.sum() ** 2 / (variances**2 / [len(a) - 1, len(b) - 1]).sum()
    return float(2 * stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variances.sum()))


def has_no_spread(values: np.ndarray, *, scale: float) -> bool:
    """Return whether the values are equal up to rounding at this scale. scipy would compute a p from the rounding."""
    return bool(np.ptp(values) <= 1e-12 * scale)
