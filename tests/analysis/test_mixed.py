"""Tests of the mixed model behind claims of kind "mixed": other ways to the same numbers, and error rates."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols

from moe.analysis.claims import judge
from moe.analysis.mixed import mixed, range_p
from moe.analysis.simultaneous import block
from moe.analysis.statistics import range_test
from moe.config.claim import ClaimConfig


def values(table: np.ndarray) -> pd.Series:
    frame = pd.DataFrame(table, columns=list("abcdefgh")[: table.shape[1]])
    frame.index.name, frame.columns.name = "seed", "cell"
    return frame.T.stack().dropna()


def drawn(rng: np.random.Generator, *, seeds: int = 3, cells: int = 6) -> np.ndarray:
    return 3 + rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 0.1, (seeds, cells))


def difference(cells: str) -> pd.Series:
    return pd.Series([1.0, -1.0], index=list(cells))


def test_with_all_runs_it_is_the_two_way_analysis_of_variance() -> None:
    table = drawn(np.random.default_rng(0))
    model = mixed(values(table))
    layout = block(pd.DataFrame(table))
    effect, error = model.contrast(difference("ca"))
    assert effect == pytest.approx(table[:, 2].mean() - table[:, 0].mean())
    assert error == pytest.approx(layout.error, rel=1e-4)
    assert model.freedom == layout.freedom == 10


def test_it_is_the_two_way_analysis_also_if_seeds_differ_less_than_the_rest_does() -> None:
    """Restricted maximum likelihood would pool the two spreads here, but not their degrees of freedom."""
    table = np.array([[1.0, 2.0, 4.0], [3.0, 1.0, 3.0], [2.0, 3.0, 2.0]])
    assert mixed(values(table)).contrast(difference("ab"))[1] == pytest.approx(block(pd.DataFrame(table)).error)


def test_with_missing_runs_it_agrees_with_least_squares_on_settings_and_seeds() -> None:
    table = drawn(np.random.default_rng(1), seeds=6, cells=4)
    table[0, 1] = table[3, 3] = table[4, 0] = math.nan
    long = values(table)
    model = mixed(long)
    effect, error = model.contrast(difference("ba"))
    fit = ols("y ~ C(cell) + C(seed)", long.rename("y").reset_index()).fit()
    assert effect == pytest.approx(fit.params["C(cell)[T.b]"])
    assert error == pytest.approx(fit.bse["C(cell)[T.b]"])
    assert (model.runs, model.freedom) == (21, fit.df_resid)
    with pytest.raises(ValueError, match="leave no spread"):
        mixed(values(table[:1]))


def test_two_settings_are_compared_only_if_seeds_connect_them() -> None:
    """Settings a and b have seeds of their own; only c, if it has both, can tell how the seeds differ."""
    table = drawn(np.random.default_rng(3), seeds=6, cells=4)
    table[:3, [1, 3]] = table[3:, [0, 2]] = math.nan  # seeds 0-2 have a and c, seeds 3-5 have b and d
    refused = judged(table, "mixed")
    assert (refused["verdict"], refused["n"]) == ("not tested", 0)
    assert refused["reason"] == "the settings compared share no seed, not even through other settings"
    assert mixed(values(table)).contrast(difference("ac"))[1] > 0
    table[3:, 2] = 3.0 + np.arange(3)
    assert judged(table, "mixed")["n"] == 6


def test_a_run_that_was_copied_is_refused() -> None:
    table = drawn(np.random.default_rng(0))
    twice = pd.concat([values(table)] * 2)
    with pytest.raises(ValueError, match=r"two runs have the same setting and seed: \('a', 0\)"):
        mixed(twice)
    with pytest.raises(ValueError, match="seed 0 has more than one run of the same condition"):
        judged(table, "mixed", copies=2)


def test_p_is_that_of_the_tests_of_a_range() -> None:
    sample = np.random.default_rng(2).normal(0.3, 1, 9)
    error = sample.std(ddof=1) / 3
    for low, high in ((0.0, math.inf), (-math.inf, 0.0), (-0.5, 0.5), (0.5, 2.0)):
        assert range_p(sample.mean(), error, 8, low, high) == pytest.approx(range_test(sample, low, high))


def judged(table: np.ndarray, kind: str, copies: int = 1) -> pd.Series:
    """Judge that level 1 is higher than level 0, from runs at levels 0, 1, ... of a factor; NaN is no run."""
    rows = [
        {"noise": float(cell), "seed": seed, "val/loss": table[seed, cell], "status": "finished", "folder": "made up"}
        for seed in range(len(table))
        for cell in range(table.shape[1])
        if not math.isnan(table[seed, cell])
    ] * copies
    words = {"direction": "higher"} if kind == "mixed" else {}
    claim = ClaimConfig(text="rises", metric="val/loss", factor="noise", levels=[1.0], than=[0.0], kind=kind, **words)
    return judge(pd.DataFrame(rows).assign(experiment="made up"), [claim]).iloc[0]


def test_few_seeds_find_more_than_paired_differences() -> None:
    rng, repeats = np.random.default_rng(0), 5
    found = {"mixed": 0, "higher": 0}
    for _ in range(repeats):
        table = drawn(rng)
        table[:, 1] += 0.4
        for kind in found:
            found[kind] += judged(table, kind)["verdict"] == "supported"
    assert found["mixed"] >= 4
    assert found["mixed"] > found["higher"]


def share_found(difference: float, spread: float, *, seeds: int, cells: int = 6, studies: int = 4000) -> float:
    """Return how often a two-sided test of the complete two-way analysis finds a true difference.

    spread: the standard deviation of the difference of two runs of a seed.
    """
    y = np.random.default_rng(0).normal(0, spread / math.sqrt(2), (studies, seeds, cells))
    rest = y - y.mean(1, keepdims=True) - y.mean(2, keepdims=True) + y.mean((1, 2), keepdims=True)
    freedom = (cells - 1) * (seeds - 1)
    error = np.sqrt(2 * (rest**2).sum((1, 2)) / freedom / seeds)
    found = difference + y[:, :, 1].mean(1) - y[:, :, 0].mean(1)
    return float((2 * stats.t.sf(np.abs(found) / error, freedom) <= 0.05).mean())


def test_an_undecided_claim_names_the_effect_and_the_seeds_of_its_model() -> None:
    """With three seeds and six settings, a paired test would need more seeds and detect only larger effects."""
    table = drawn(np.random.default_rng(6))
    table[:, 1] += 0.08 - (table[:, 1] - table[:, 0]).mean()
    row = judged(table, "mixed")
    assert row["verdict"] == "undecided"
    spread = mixed(values(table)).contrast(difference("ba"))[1] * math.sqrt(3)
    needed = int(row["seeds needed"])
    assert share_found(0.08, spread, seeds=needed) >= 0.8 - 0.02
    assert share_found(0.08, spread, seeds=needed - 1) < 0.8 + 0.02
    detectable, _, rest = row["reason"].partition("smallest detectable effect ")[2].partition(" validation loss (")
    assert share_found(float(detectable), spread, seeds=3) == pytest.approx(0.8, abs=0.04)
    low, _, high = rest.partition(")")[0].partition(" to ")
    ends = 10 / stats.chi2.ppf([0.975, 0.025], 10)  # of the variance, with (6 - 1) (3 - 1) degrees of freedom
    assert [float(low), float(high)] == pytest.approx(float(detectable) * np.sqrt(ends), rel=0.05)


def test_the_degrees_of_freedom_grow_with_the_seeds() -> None:
    table = drawn(np.random.default_rng(1), seeds=6, cells=4)
    assert mixed(values(table)).freedom_by_seeds == (3, 3)
    table[0, 1] = table[3, 3] = table[4, 0] = math.nan
    model = mixed(values(table))
    assert model.freedom_by_seeds.at(6) == pytest.approx(model.freedom)
    assert model.freedom_by_seeds == (15 / 6, 3)


def error_rate(spreads: list[float], *, present: list[str], of_seeds: float = 1.0, repeats: int = 500) -> float:
    """Return how often the model finds a difference of settings a and b, where there is none.

    present: the settings that each seed has. of_seeds: the standard deviation of seeds.
    """
    rng, errors = np.random.default_rng(1), 0
    places = [(name, seed) for seed, names in enumerate(present) for name in names]
    index = pd.MultiIndex.from_tuples(places, names=["cell", "seed"])
    scale = np.array([spreads["abcdefgh".index(name)] for name, _ in places])
    seeds = index.get_level_values("seed")
    for _ in range(repeats):
        y = rng.normal(0, of_seeds, len(present))[seeds] + rng.normal(0, scale)
        model = mixed(pd.Series(y, index))
        effect, error = model.contrast(difference("ab"))
        errors += 2 * stats.t.sf(abs(effect) / error, model.freedom) <= 0.05
    return errors / repeats


@pytest.mark.parametrize(
    "present",
    [["abcdef"] * 3, ["abc", "ab", "ac", "bc"], ["ac", "ac", "acd", "bcd", "bd", "bd"]],
    ids=["complete", "some missing", "levels without a common seed"],
)
def test_error_rates(present: list[str]) -> None:
    """The rate is 5 % if all settings spread alike, whichever runs are missing and however little seeds differ."""
    assert error_rate([0.1] * 6, present=present, of_seeds=0.05) == pytest.approx(0.05, abs=0.018)


def test_settings_that_spread_more_than_the_others_err_too_often() -> None:
    rate = error_rate([0.4, 0.4, 0.1, 0.1, 0.1, 0.1], present=["abcdef"] * 3)
    assert rate > 0.1, "docs/statistics.md warns of this"


def test_a_claim_says_that_the_compared_settings_spread_more_with_the_interval_of_their_differences() -> None:
    table = drawn(np.random.default_rng(0), seeds=5)
    assert "spread" not in judged(table, "mixed")["reason"]
    table[:, 1] += [0.9, -0.9, 0.6, -0.6, 0.3]
    row, pairs = judged(table, "mixed"), table[:, 1] - table[:, 0]
    low, high = stats.ttest_1samp(pairs, 0).confidence_interval()
    ratio = pairs.std(ddof=1) / (mixed(values(table)).contrast(difference("ba"))[1] * math.sqrt(5))
    assert f"; these levels spread {ratio:.2g} times as much as the model assumes" in row["reason"]
    assert f"is too narrow: by their own spread it is [{low:.3g}, {high:.3g}]" in row["reason"]


def other_errors(spreads: list[float], *, seeds: int, studies: int = 4000) -> tuple[float, float]:
    """Return how often two other estimates find a difference of the first two settings, where there is none.

    First with errors clustered by seed, then with a variance for each setting and Satterthwaite's degrees of freedom.
    """
    cells, w = len(spreads), np.array([1.0, -1.0] + [0.0] * (len(spreads) - 2))
    y = np.random.default_rng(0).normal(0, spreads, (studies, seeds, cells))
    effect, center = (y @ w).mean(1), np.eye(cells) - 1 / cells
    rest = y @ center - (y @ center).mean(1, keepdims=True)
    scatter = np.einsum("rni,rnj->rij", rest, rest) / (seeds - 1)
    clustered = np.einsum("i,rij,j->r", w, scatter, w) / seeds
    own = np.einsum("rii->ri", scatter)  # its mean is (1 - 2 / C) of a setting's variance, and the sum of all over C²
    own = (cells / (cells - 2) * (own - own.sum(1, keepdims=True) / (cells * (cells - 1)))).clip(0)
    a = cells / (cells - 2) * (w**2 - w @ w / (cells * (cells - 1)))
    form = a[:, None] * np.einsum("ik,rk,kj->rij", center, own, center)
    freedom = (seeds - 1) * np.einsum("rii->r", form) ** 2 / np.einsum("rij,rji->r", form, form)
    rates = []
    for variance, degrees in ((clustered, seeds - 1), (own @ w**2 / seeds, freedom.clip(1))):
        t = np.abs(effect) / np.sqrt(variance.clip(1e-300))
        rates.append(float((2 * stats.t.sf(t, degrees) <= 0.05).mean()))
    return rates[0], rates[1]


@pytest.mark.parametrize("seeds", [3, 8])
def test_errors_clustered_by_seed_hold_five_percent_and_variances_of_single_settings_do_not(seeds: int) -> None:
    """The page about statistics says so. Clustered errors are those of the paired differences, so they gain nothing."""
    for spreads in ([1.0] * 6, [2, 1, 1, 1, 1, 1], [2, 2, 1, 1, 1, 1], [4, 4, 1, 1, 1, 1], [1, 1, 4, 4, 4, 4]):
        clustered, _ = other_errors(spreads, seeds=seeds)
        assert clustered == pytest.approx(0.05, abs=0.012)
    assert other_errors([1, 1, 4, 4, 4, 4], seeds=seeds)[1] > 0.1


def test_a_model_with_nothing_to_estimate_decides_nothing_and_equal_differences_are_deterministic() -> None:
    alone = judged(drawn(np.random.default_rng(0), seeds=1, cells=3), "mixed")
    assert (alone["verdict"], alone["n"]) == ("not tested", 0)
    assert "leave no spread" in alone["reason"]
    exact = judged(np.arange(3.0)[:, None] + np.array([0.0, 1.0, 2.0]), "mixed")
    assert (exact["verdict"], exact["deterministic"]) == ("supported", True)
