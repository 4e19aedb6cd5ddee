"""Tests of differences within seeds, behind all claims: other ways to the same numbers, and error rates."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols

from moe.analysis.claims import judge
from moe.analysis.comparisons import compared
from moe.analysis.estimates import NO_SPREAD, ONE_SEED_CONNECTS
from moe.analysis.power import PAIRED
from moe.analysis.within_seeds import contrast, estimator
from moe.config.claim import ClaimConfig

B_MINUS_A = np.array([-1.0, 1.0, 0.0, 0.0])


def drawn(rng: np.random.Generator, *, seeds: int = 3, cells: int = 6) -> np.ndarray:
    return 3 + rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 0.1, (seeds, cells))


def with_gaps() -> np.ndarray:
    table = drawn(np.random.default_rng(1), seeds=6, cells=4)
    table[0, 1] = table[3, 3] = table[4, 0] = math.nan
    return table


def made_up(table: np.ndarray) -> pd.DataFrame:
    """Return runs at levels 0, 1, ... of a factor; NaN is no run."""
    rows = [
        {"noise": float(cell), "seed": seed, "val/loss": table[seed, cell], "status": "finished", "folder": "made up"}
        for seed in range(len(table))
        for cell in range(table.shape[1])
        if not math.isnan(table[seed, cell])
    ]
    return pd.DataFrame(rows).assign(experiment="made up")


def rises(kind: str) -> ClaimConfig:
    words = {"text": "rises", "metric": "val/loss", "factor": "noise", "levels": [1.0], "than": [0.0], "kind": kind}
    return ClaimConfig(**words, direction="higher" if kind == "mixed" else None)


def judged(table: np.ndarray, kind: str) -> pd.Series:
    """Judge that level 1 is higher than level 0."""
    return judge(made_up(table), [rises(kind)]).iloc[0]


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_with_all_runs_it_is_the_paired_t_test_whatever_the_other_settings_are(seeds: int) -> None:
    table = drawn(np.random.default_rng(seeds), seeds=seeds, cells=4)
    found = contrast(table, B_MINUS_A)
    test = stats.ttest_rel(table[:, 1], table[:, 0])
    assert found.effect == pytest.approx((table[:, 1] - table[:, 0]).mean())
    assert found.effect / found.error == pytest.approx(test.statistic)
    assert found.estimator.freedom == seeds - 1
    model, paired = judged(table, "mixed"), judged(table, "higher")
    assert model["reason"].startswith(f"mixed model, which depends on {2 * seeds} of {4 * seeds} runs")
    same = ["n", "mean", "reference mean", "difference", "ci_low", "ci_high", "p", "verdict", "seeds needed"]
    assert model[same].tolist() == pytest.approx(paired[same].tolist(), nan_ok=True)
    assert [model["ci_low"], model["ci_high"]] == pytest.approx([*test.confidence_interval()])


def least_squares(table: np.ndarray) -> float:
    """Return the difference of the second and the first setting by least squares on settings and seeds."""
    long = pd.DataFrame(table, columns=list("abcd")).rename_axis("seed").melt(ignore_index=False, var_name="cell")
    fit = ols("value ~ C(cell) + C(seed)", long.dropna().reset_index()).fit()
    return float(fit.params["C(cell)[T.b]"])


def test_with_missing_runs_it_is_least_squares_without_each_seed_in_turn() -> None:
    table = with_gaps()
    found, n = contrast(table, B_MINUS_A), len(table)
    without = np.array([least_squares(np.delete(table, seed, axis=0)) for seed in range(n)])
    assert found.effect == pytest.approx(least_squares(table))
    assert found.error**2 == pytest.approx((n - 1) / n * ((without - found.effect) ** 2).sum())
    assert n - 2 < found.estimator.freedom < n - 1


def test_the_degrees_of_freedom_are_those_of_the_first_two_moments_of_the_variance() -> None:
    """Satterthwaite's number is twice the squared mean over the variance, for runs that all spread alike."""
    table = with_gaps()
    by = estimator(~np.isnan(table), B_MINUS_A)
    variances = by.errors(np.random.default_rng(0).normal(size=(40_000, by.of_runs.size))) ** 2
    assert 2 * variances.mean() ** 2 / variances.var() == pytest.approx(by.freedom, rel=0.05)


def test_two_settings_are_compared_only_if_seeds_connect_them() -> None:
    """Settings a and b have seeds of their own; only c, if it has both, can tell how the seeds differ."""
    table = drawn(np.random.default_rng(3), seeds=6, cells=4)
    table[:3, [1, 3]] = table[3:, [0, 2]] = math.nan  # seeds 0-2 have a and c, seeds 3-5 have b and d
    refused = judged(table, "mixed")
    assert (refused["verdict"], refused["n"]) == ("not tested", 0)
    connects = "the settings compared share no seed, not even through other settings"
    assert refused["reason"].startswith("mixed model of 12 runs; 6 of 6 pairs have no value on a side: seed 0; ")
    assert refused["reason"].endswith(connects)
    table[3:, 2] = 3.0 + np.arange(3)
    assert judged(table, "mixed")["n"] == 6
    assert judged(table, "higher")["n"] == 0


def test_one_seed_that_alone_tells_a_difference_does_not_test_it() -> None:
    """Without seed 0, nothing connects a and b; the other seeds tell nothing of their difference."""
    table = drawn(np.random.default_rng(3), seeds=4, cells=4)
    table[1:, 0] = math.nan
    row = judged(table, "mixed")
    assert (row["verdict"], row["n"]) == ("not tested", 4)
    assert row["reason"].endswith(ONE_SEED_CONNECTS)
    alone = judged(table[:1], "higher")
    assert (alone["verdict"], alone["n"]) == ("not tested", 1)
    assert row["difference"] != pytest.approx(alone["difference"])
    assert alone["difference"] == pytest.approx(table[0, 1] - table[0, 0])


def test_a_run_that_was_copied_is_refused() -> None:
    with pytest.raises(ValueError, match="seed 1 has more than one run of the same condition"):
        judge(pd.concat([made_up(with_gaps())] * 2), [rises("mixed")])


def sized(kind: str, *, margin: float | str | None = None, size: tuple[float | str, ...] = ()) -> ClaimConfig:
    return replace(rises(kind), margin=margin, size=list(size), direction=None)


@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize(
    ("claim", "low", "high"),
    [
        (sized("equivalent", margin=0.2), -0.2, 0.2),
        (sized("higher", size=(0.1, 0.2)), 0.1, 0.2),
        (sized("lower", size=(0.1, 0.2)), -0.2, -0.1),
        (sized("equivalent", margin="5%"), "-5%", "5%"),
        (sized("mixed", margin="5%"), "-5%", "5%"),
        (sized("higher", size=("2%", "4%")), "2%", "4%"),
        (sized("lower", size=("2%", "4%")), "-4%", "-2%"),
        (sized("lower", size=("2%", 0.2)), -0.2, "-2%"),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_p_is_that_of_t_tests_at_both_ends_of_a_range(
    claim: ClaimConfig, low: float | str, high: float | str, seeds: int, sign: int
) -> None:
    """A share of a mean is a share of the values themselves: a - (1 + share) b."""
    table = sign * (300 + drawn(np.random.default_rng(seeds), seeds=seeds, cells=3))
    b, a = table[:, 0], table[:, 1]
    ends = [float(end[:-1]) / 100 * np.abs(b) if isinstance(end, str) else end for end in (low, high)]
    tests = [stats.ttest_1samp(a - b - ends[0], 0, alternative="greater")]
    tests += [stats.ttest_1samp(a - b - ends[1], 0, alternative="less")]
    [[pair]] = compared(claim, made_up(table)).pairs
    of_mean = stats.ttest_1samp(b, 0).pvalue if "%" in f"{low}{high}" else 0.0
    assert pair.p_for == pytest.approx(max(5 * of_mean, *(test.pvalue for test in tests)))
    assert pair.p_against == pytest.approx(min(1, 2 * min(1 - test.pvalue for test in tests)))


def test_an_undecided_claim_with_missing_runs_names_its_degrees_of_freedom_and_counts_on_as_many_for_each_seed() -> (
    None
):
    table = with_gaps()
    table[:, 1] += 0.02 - contrast(table, B_MINUS_A).effect
    [[pair]] = compared(rises("mixed"), made_up(table)).pairs
    df = contrast(table, B_MINUS_A).estimator.freedom
    assert pair.freedom.at(6) == pytest.approx(df)
    assert pair.freedom.at(12) == pytest.approx(2 * df + 1)
    row = judged(table, "mixed")
    assert row["verdict"] == "undecided"
    assert row["reason"].startswith("mixed model of 21 runs; 2 of 6 pairs have no value on a side: seed 0; seed 4; ")
    assert f"; {df:.2g} degrees of freedom; " in row["reason"]
    [[complete]] = compared(rises("mixed"), made_up(table[[1, 2, 5]])).pairs
    assert complete.freedom == PAIRED


COMPLETE, ONE_MISSING = ["abcdef"] * 3, ["acdef", *["abcdef"] * 4]
SCATTERED = ["abcd", "cdef", "abef", "acef", "bdef", "bcf", "adef", "abce"]


@pytest.mark.parametrize("present", [COMPLETE, ONE_MISSING, SCATTERED], ids=["complete", "one missing", "scattered"])
@pytest.mark.parametrize("spreads", ["equal", "b x4", "a and b x4", "others x4", "seeds respond"])
def test_error_rates(present: list[str], spreads: str) -> None:
    """Without an effect, a difference of a and b is found in about 5 % of studies, whatever spreads how much."""
    cells, studies, rng = "abcdef", 10_000, np.random.default_rng(1)
    known = np.array([[cell in names for cell in cells] for names in present])
    by = estimator(known, np.array([1.0, -1, 0, 0, 0, 0]))
    stds = {"b x4": [1, 4, 1, 1, 1, 1], "a and b x4": [4, 4, 1, 1, 1, 1], "others x4": [1, 1, 4, 4, 4, 4]}
    y = rng.normal(0, stds.get(spreads, [1] * 6), (studies, len(present), 6)) + rng.normal(
        0, 9, (studies, len(present), 1)
    )
    if spreads == "seeds respond":
        y += rng.normal(size=(studies, len(present), 1)) * np.linspace(-2, 2, 6)
    runs = y[:, known]
    rate = (2 * stats.t.sf(np.abs(runs @ by.of_runs) / by.errors(runs), by.freedom) <= 0.05).mean()
    assert rate <= 0.05 + 0.009
    if present == COMPLETE:
        assert rate == pytest.approx(0.05, abs=0.007)


def test_a_model_with_one_seed_decides_nothing_and_so_do_equal_differences() -> None:
    alone = judged(drawn(np.random.default_rng(0), seeds=1, cells=3), "mixed")
    assert (alone["verdict"], alone["n"]) == ("not tested", 1)
    exact = judged(np.arange(3.0)[:, None] + np.array([0.0, 1.0, 2.0]), "mixed")
    assert (exact["verdict"], exact["deterministic"]) == ("not tested", True)
    assert NO_SPREAD in exact["reason"]


def test_equal_values_decide_nothing() -> None:
    """A metric that is 0 in most runs, such as a share of unused experts, is so in both settings by chance."""
    values = np.where(np.random.default_rng(0).random((200, 3, 2)) < 0.3, 0.25, 0.0)
    tables, counts = np.unique(values, axis=0, return_counts=True)  # at most 64 differ
    decides = [judged(table, "higher")["verdict"] in ("supported", "contradicted") for table in tables]
    decided = counts[decides].sum()
    assert decided <= 0.05 * 200 + 6


def at_two_weights(table: np.ndarray) -> pd.DataFrame:
    """Return runs at noise 0 and 1 for two balance weights: the columns are (0, 0), (1, 0), (0, 0.1), (1, 0.1)."""
    runs = [made_up(table[:, :2]).assign(lb=0.0), made_up(table[:, 2:]).assign(lb=0.1)]
    return pd.concat(runs, ignore_index=True)


def test_a_missing_pair_changes_neither_the_other_pairs_nor_what_they_are_compared_with() -> None:
    """The mean over combinations of the mean difference of pairs; the seeds may differ by any amount."""
    table = drawn(np.random.default_rng(5), seeds=4, cells=4)
    table[:, 2:] += 100 * np.random.default_rng(6).normal(size=(4, 1))  # seeds respond to the weight
    table[1, 3] = math.nan
    row = judge(at_two_weights(table), [rises("higher")]).iloc[0]
    differences = np.stack([table[:, 1] - table[:, 0], table[:, 3] - table[:, 2]], axis=1)
    assert row["difference"] == pytest.approx(np.nanmean(differences, axis=0).mean())
    [[pair]] = compared(rises("higher"), at_two_weights(table)).pairs
    assert pair.high - pair.low < 1
    assert "1 of 8 pairs have no value on a side: seed 1 at lb=0.1" in row["reason"]


def test_a_combination_that_cannot_be_judged_is_left_out_and_named() -> None:
    table = drawn(np.random.default_rng(7), seeds=4, cells=4)
    table[1:, 3] = math.nan
    one = judge(at_two_weights(table), [rises("higher")]).iloc[0]
    table[0, 3] = math.nan
    none = judge(at_two_weights(table), [rises("higher")]).iloc[0]
    assert one["difference"] == none["difference"] == pytest.approx((table[:, 1] - table[:, 0]).mean())
    assert one["verdict"] == none["verdict"] != "not tested"
    assert one["reason"].startswith("left out: lb=0.1: one pair")
    assert none["reason"].startswith("left out: lb=0.1: a level has no run")


def test_what_a_mixed_claim_leaves_out_is_named_and_still_tells_how_the_seeds_differ() -> None:
    """One run of a level is left out as a pair is; another setting may have seeds of its own."""
    table = drawn(np.random.default_rng(7), seeds=5, cells=4)
    table[1:, 3] = math.nan
    runs = pd.concat([at_two_weights(table), made_up(table + 1)[lambda t: t["noise"] == 2.0].assign(lb=0.0, seed=9)])
    runs = runs.drop_duplicates(["noise", "lb", "seed"])
    for claim in (rises("mixed"), sized("mixed", margin="90%")):
        row = judge(runs, [claim]).iloc[0]
        assert row["n"] == 5
        assert row["difference"] == pytest.approx((table[:, 1] - table[:, 0]).mean())
        assert f" of {len(runs)} runs; left out: lb=0.1: one run of a level" in row["reason"]
    gone = judge(runs[(runs["lb"] == 0.0) | (runs["noise"] != 1.0)], [rises("mixed")]).iloc[0]
    assert "left out: lb=0.1: a level has no run" in gone["reason"]
