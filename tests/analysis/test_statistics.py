"""Tests of the statistics: results for the 18 published runs of the noise study, and properties that always hold."""

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from moe.analysis.power import detectable_effect
from moe.analysis.report.html import cells
from moe.analysis.report.markdown import table_as_markdown, table_cells
from moe.analysis.sentences import contrast_sentence, levels_compared, p_equals, percent
from moe.analysis.statistics import (
    as_one_family,
    contrasts,
    corrected,
    divisors,
    false_discovery,
    margin_test,
    noise_floor,
    shares,
    sign_flip,
    with_intervals,
)
from moe.analysis.studies.published import read_published
from moe.results.conditions import STD, summary


@pytest.fixture
def runs() -> pd.DataFrame:
    table = read_published("noise_runs").rename(columns={"noise_std": "noise", "load_balancing_weight": "lb"})
    return table.rename(columns={"val_perplexity": "ppl", "expert_usage_cv": "cv"}).assign(folder="published")


def select_contrast(table: pd.DataFrame, factor: str, level: float, within: str) -> pd.Series:
    [row] = [
        row for _, row in table.iterrows() if (row["factor"], row["level"], row["within"]) == (factor, level, within)
    ]
    return row


@pytest.mark.parametrize(
    ("factor", "level", "within", "difference", "welch", "paired", "low", "high"),
    [
        ("noise", 0.1, "lb=0.01", 1.153, 0.302, 0.0014, 0.97, 1.34),
        ("noise", 0.1, "lb=0.0", 1.173, 0.328, 0.0166, 0.51, 1.83),
        ("noise", 0.5, "lb=0.01", 14.14, 0.0006, 0.0012, 12.0, 16.3),
        ("lb", 0.0, "noise=0.0", 0.307, 0.770, 0.582, -1.7, 2.3),
    ],
)
def test_contrasts_of_the_published_runs(
    runs: pd.DataFrame,
    factor: str,
    level: float,
    within: str,
    difference: float,
    welch: float,
    paired: float,
    low: float,
    high: float,
) -> None:
    row = select_contrast(contrasts(runs, "ppl", ["noise", "lb"], references={"lb": 0.01}), factor, level, within)
    assert row["difference"] == pytest.approx(difference, abs=0.005)
    assert row["p Welch"] == pytest.approx(welch, abs=0.0005)
    assert row["p"] == pytest.approx(paired, abs=0.0005)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), abs=0.05)
    assert row["n"] == 3


def test_a_level_has_one_spelling_whatever_the_levels_of_other_factors_are() -> None:
    """Levels that are all numbers do not become floats together."""
    rows = [
        {"router.k": k, "noise": noise, "seed": seed, "ppl": 10.0 + k + seed**k, "folder": ""}
        for k, noise, seed in product((1, 2), (0.0, 0.5), (1, 2, 3))
    ]
    table = contrasts(pd.DataFrame(rows), "ppl", ["router.k", "noise"])
    compared = ["router.k 2 vs 1 at noise=0.0", "router.k 2 vs 1 at noise=0.5"]
    compared += ["noise 0.5 vs 0.0 at router.k=1", "noise 0.5 vs 0.0 at router.k=2"]
    assert [levels_compared(row) for row in table.itertuples()] == compared
    assert [levels_compared(row) for _, row in table.iterrows()] == compared
    assert {tuple(row[:2]) for row in table_cells(table[["level", "reference"]])[1:]} == {("2", "1"), ("0.5", "0.0")}


@pytest.mark.parametrize(("shared", "narrower"), [(1.0, True), (0.0, False)])
def test_the_width_ratio_compares_the_paired_interval_with_that_of_independent_runs(
    shared: float, narrower: bool
) -> None:
    """Seeds that move both levels alike make the paired interval narrower."""
    rng = np.random.default_rng(0)
    seeds, common = np.arange(8), shared * rng.normal(size=8)
    a, b = (common + 0.2 * rng.normal(size=8) for _ in range(2))
    columns = {"seed": [*seeds, *seeds], "noise": [0.0] * 8 + [0.1] * 8, "val/loss": [*a, *b]}
    table = contrasts(pd.DataFrame(columns | {"causality": "yes"}), "val/loss", ["noise"])
    paired, independent = stats.ttest_rel(b, a), stats.ttest_ind(b, a, equal_var=False)
    low, high = paired.confidence_interval()
    wide_low, wide_high = independent.confidence_interval()
    assert table["width ratio"].item() == pytest.approx((high - low) / (wide_high - wide_low))
    assert (table["width ratio"].item() < 0.5) == narrower


def test_a_level_where_another_factor_does_not_apply_is_compared_with_each_of_its_levels() -> None:
    """Top-k has no temperature, so its runs stand beside those of the router with a temperature at both of them."""
    arms = {("topk", "absent"): 0.0, ("temperature", 1.0): 0.2, ("temperature", 2.0): 0.5}
    rows = [
        {
            "seed": seed,
            "router": router,
            "router.temp": temp,
            "val/loss": 4.0 + effect + 0.01 * seed * seed,
            "causality": "yes",
        }
        for (router, temp), effect in arms.items()
        for seed in (1, 2, 3)
    ]
    table = contrasts(pd.DataFrame(rows), "val/loss", ["router", "router.temp"], references={"router": "topk"})
    found = {row["within"]: row["difference"] for _, row in table[table["factor"] == "router"].iterrows()}
    assert found == {"router.temp=1.0": pytest.approx(0.2), "router.temp=2.0": pytest.approx(0.5)}


def test_noise_0_1_is_significant_after_holm_only_with_load_balancing(runs: pd.DataFrame) -> None:
    table = contrasts(runs, "ppl", ["noise", "lb"], references={"lb": 0.01})
    assert len(table) == 7
    assert select_contrast(table, "noise", 0.1, "lb=0.01")["p Holm"] == pytest.approx(0.008, abs=0.001)
    assert select_contrast(table, "noise", 0.1, "lb=0.0")["p Holm"] == pytest.approx(0.066, abs=0.001)
    assert (table["p Holm"] >= table["p"]).all()


def test_the_false_discovery_rate_is_that_of_benjamini_and_hochberg(runs: pd.DataFrame) -> None:
    table = contrasts(runs, "ppl", ["noise", "lb"])
    assert table["p BH"].tolist() == pytest.approx(stats.false_discovery_control(table["p"]).tolist())
    assert ((table["p"] <= table["p BH"]) & (table["p BH"] <= table["p Holm"])).all()
    with_gap = false_discovery(pd.Series([0.01, float("nan"), 0.04]))
    assert with_gap == pytest.approx([0.02, float("nan"), 0.04], nan_ok=True)


def test_holm_is_that_of_statsmodels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # multipletests calls it, and with torch loaded it takes half a second
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        p = rng.random(n) ** 3
        assert corrected(pd.Series(p)) == pytest.approx(multipletests(p, method="holm")[1])
    with_gap = corrected(pd.Series([0.04, float("nan"), 0.01]))
    assert with_gap == pytest.approx([0.04, float("nan"), 0.02], nan_ok=True)
    assert np.isnan(corrected(pd.Series([float("nan")]))).all()


def test_equivalence_is_two_one_sided_paired_tests(runs: pd.DataFrame) -> None:
    table = contrasts(runs, "ppl", ["noise", "lb"], references={"lb": 0.01}, margin="1%")
    row = select_contrast(table, "lb", 0.0, "noise=0.0")
    cell = runs[runs["noise"] == 0.0].pivot(index="seed", columns="lb", values="ppl")
    assert row["margin"] == pytest.approx(0.01 * cell[0.01].mean())
    assert row["p TOST"] == pytest.approx(margin_test(cell[0.0].to_numpy(), cell[0.01].to_numpy(), "1%").inside)
    assert row["p TOST"] == pytest.approx(0.085, abs=0.001)
    assert not table["equivalent"].any(), (
        "three seeds whose differences spread by 1.5 cannot show equivalence within 1.3"
    )
    in_units = contrasts(runs, "ppl", ["noise", "lb"], references={"lb": 0.01}, margin=row["margin"])
    expected = ttost_paired(cell[0.0].to_numpy(), cell[0.01].to_numpy(), -row["margin"], row["margin"])[0]
    assert select_contrast(in_units, "lb", 0.0, "noise=0.0")["p TOST"] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"margin 0\.0: must be positive"):
        contrasts(runs, "ppl", ["noise"], margin=0.0)
    with pytest.raises(ValueError, match="amount=1 percent: must be a finite number, or a text such as 5%"):
        contrasts(runs, "ppl", ["noise"], margin="1 percent")


def test_with_many_seeds_a_tiny_effect_is_both_significant_and_equivalent() -> None:
    rng = np.random.default_rng(0)
    seeds = np.arange(200)
    tables = [
        pd.DataFrame({"arm": arm, "seed": seeds, "ppl": 100 + shift + rng.normal(0, 0.1, 200), "folder": "made up"})
        for arm, shift in (("a", 0.0), ("b", 0.05))
    ]
    runs = pd.concat(tables, ignore_index=True)
    [row] = [row for _, row in contrasts(runs, "ppl", ["arm"], margin=0.2).iterrows()]
    assert row["p"] < 0.05
    assert row["equivalent"]
    noisy = runs.assign(ppl=50 * runs["ppl"])
    three_seeds = contrasts(noisy[noisy["seed"] < 3], "ppl", ["arm"], margin=0.2).iloc[0]
    assert three_seeds["p"] > 0.05
    assert not three_seeds["equivalent"], "a difference that is not significant does not show equivalence"
    smaller_margin = contrasts(runs, "ppl", ["arm"], margin=0.04).iloc[0]
    assert not smaller_margin["equivalent"]


def test_equivalence_is_unknown_without_spread_or_with_one_seed(runs: pd.DataFrame) -> None:
    for table in (runs[runs["seed"] == 42], runs.assign(ppl=1.0)):
        compared = contrasts(table, "ppl", ["noise", "lb"], margin="1%")
        assert compared["p TOST"].isna().all()
        assert not compared["equivalent"].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_margin_is_tested_at_both_ends_and_a_share_of_a_mean_as_what_it_is_of(sign: int) -> None:
    rng = np.random.default_rng(0)
    b = sign * rng.normal(10, 3, 6)
    a = b + rng.normal(0.05, 0.1, 6)
    ends = stats.ttest_1samp(a - b, -0.3, alternative="greater"), stats.ttest_1samp(a - b, 0.3, alternative="less")
    assert margin_test(a, b, 0.3).inside == pytest.approx(max(end.pvalue for end in ends))
    share = 0.03 * sign
    ends = (
        stats.ttest_1samp(a - (1 - share) * b, 0, alternative="greater"),
        stats.ttest_1samp(a - (1 + share) * b, 0, alternative="less"),
    )
    assert margin_test(a, b, "3%").inside == pytest.approx(max(end.pvalue for end in ends))
    two = np.array([5.0, 5.02])
    assert margin_test(two, two, "1%").inside < 0.1
    assert math.isnan(margin_test(two, two, 0.1).inside)
    larger = margin_test(2 * b, b, "3%")
    ends = stats.ttest_1samp(b - share * b, 0, alternative="greater" if sign > 0 else "less")
    assert larger.beyond == pytest.approx(2 * ends.pvalue)
    assert larger.inside > 0.99


def test_a_share_of_a_mean_keeps_the_error_of_a_margin() -> None:
    """The true difference is at the margin, 10 % of a mean that is known no better than from the same seeds."""
    rng, n, found = np.random.default_rng(1), 8, []
    for _ in range(1000):
        b = 10 + rng.normal(0, 2) * np.ones(n) + rng.normal(0, 2, n)
        found.append(margin_test(1.1 * b + rng.normal(0, 0.3, n), b, "10%").inside <= 0.05)
    assert np.mean(found) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0])
def test_a_share_of_a_mean_near_zero_keeps_the_error_of_a_margin(mean: float) -> None:
    """The mean is so many standard errors from 0, and the true difference is at the margin: 20 % of it."""
    rng, n, found = np.random.default_rng(2), 5, []
    for _ in range(1000):
        b = mean / math.sqrt(n) + rng.normal(size=n)
        tested = margin_test(b + 0.2 * mean / math.sqrt(n) + rng.normal(0, 0.001, n), b, "20%")
        found.append(tested.inside <= 0.05)
        assert bool(tested.note) == (stats.ttest_1samp(b, 0).pvalue > 0.01)
    assert np.mean(found) < 0.065


def test_the_noise_floor_is_the_spread_of_seeds(runs: pd.DataFrame) -> None:
    cell = runs.loc[(runs["noise"] == 0.0) & (runs["lb"] == 0.01), ["seed", "folder", "ppl"]]
    cell = cell.rename(columns={"ppl": "val/perplexity"}).assign(experiment="noise study")
    row = noise_floor(cell, ["val/perplexity"], seeds=(3, 8)).iloc[0]
    assert row["n"] == 3
    assert row[STD] == pytest.approx(0.94 * np.sqrt(3 / 2), abs=0.006)
    # Pearson and Hartley's table for 2 degrees of freedom: chi-square exceeds 0.0506 with probability 0.975, and 7.378
    # with probability 0.025.
    assert (row["std_low"], row["std_high"]) == pytest.approx(
        (row[STD] * np.sqrt(2 / 7.378), row[STD] * np.sqrt(2 / 0.0506)), rel=1e-3
    )
    for n in (3, 8):
        effect = row[f"detectable, {n} seeds a side"] / row[STD]
        critical_t, shift = stats.t.ppf(0.975, 2 * n - 2), effect * np.sqrt(n / 2)
        power = stats.nct.sf(critical_t, 2 * n - 2, shift) + stats.nct.cdf(-critical_t, 2 * n - 2, shift)
        assert power == pytest.approx(0.8, abs=1e-4)


def test_the_interval_of_the_noise_floor_covers_the_true_value_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    draws = pd.DataFrame(rng.normal(0, 2, (8, 400))).add_prefix("val/")
    floor = noise_floor(draws.assign(seed=range(8), folder="made up", experiment="made up"), list(draws.columns))
    covered = ((floor["std_low"] <= 2) & (floor["std_high"] >= 2)).sum()
    assert stats.binom.ppf(0.001, 400, 0.95) <= covered <= stats.binom.ppf(0.999, 400, 0.95)


def test_a_noise_floor_is_refused_if_more_than_the_seed_varies(runs: pd.DataFrame) -> None:
    table = runs[["noise", "lb", "seed", "folder"]].assign(**{"val/perplexity": runs["ppl"], "experiment": "x"})
    with pytest.raises(ValueError, match="in the seed alone, but noise, lb varies"):
        noise_floor(table, ["val/perplexity"])
    single_run = noise_floor(table[(table["noise"] == 0.1) & (table["lb"] == 0.0)].head(1), ["val/perplexity"]).iloc[0]
    assert single_run["n"] == 1
    assert single_run[[STD, "std_low", "std_high", "detectable, 3 seeds a side"]].isna().all()


def test_the_published_spread_is_the_population_standard_deviation(runs: pd.DataFrame) -> None:
    """The tutorial prints 130.23 ± 0.94, which is the standard deviation with ddof=0.

    This project uses ddof=1 and says so in the name of the column.
    """
    table = summary(runs, ["noise", "lb"], ["ppl"])
    first = table[(table["noise"] == 0.0) & (table["lb"] == 0.01)].iloc[0]
    assert first["mean"] == pytest.approx(130.23, abs=0.005)
    assert first[STD] * np.sqrt(2 / 3) == pytest.approx(0.94, abs=0.005)


def test_a_shift_of_all_runs_of_a_seed_changes_no_paired_contrast(runs: pd.DataFrame) -> None:
    shifted = runs.assign(ppl=runs["ppl"] + runs["seed"].map({42: 0.0, 43: 7.0, 44: -3.0}))
    columns = ["difference", "ci_low", "ci_high", "p", "d_z", "p sign-flip", "detectable"]
    before, after = (contrasts(table, "ppl", ["noise", "lb"]) for table in (runs, shifted))
    pd.testing.assert_frame_equal(before[columns], after[columns], rtol=1e-6)
    assert not np.allclose(before["p Welch"], after["p Welch"]), "Welch's test ignores the pairing"


def test_swapping_level_and_reference_flips_the_sign_only(runs: pd.DataFrame) -> None:
    up = select_contrast(contrasts(runs, "ppl", ["noise", "lb"]), "lb", 0.01, "noise=0.0")
    down = select_contrast(contrasts(runs, "ppl", ["noise", "lb"], references={"lb": 0.01}), "lb", 0.0, "noise=0.0")
    assert up["difference"] == pytest.approx(-down["difference"])
    assert (up["ci_low"], up["ci_high"]) == pytest.approx((-down["ci_high"], -down["ci_low"]))
    assert up["p"] == pytest.approx(down["p"])


def test_p_of_a_sign_flip_test_of_three_seeds_is_never_below_0_25(runs: pd.DataFrame) -> None:
    table = contrasts(runs, "ppl", ["noise", "lb"])
    assert (table["smallest p sign-flip"] == 0.25).all()
    assert table["p sign-flip"].min() == 0.25
    assert sign_flip(np.array([1.0, 2.0, 4.0, 8.0])) == 2 / 2**4


def test_a_sign_flip_test_is_the_permutation_test_of_scipy() -> None:
    for seeds in (2, 3, 6, 9):
        differences = np.random.default_rng(seeds).normal(0.5, 1, seeds)
        expected = stats.permutation_test((differences,), np.mean, permutation_type="samples", vectorized=True)
        assert sign_flip(differences) == pytest.approx(expected.pvalue)
    many = np.random.default_rng(0).normal(0.5, 1, 30)
    assert sign_flip(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.01)
    assert sign_flip(many + 10) == 1 / 10_000


def test_one_seed_gives_differences_and_notes_but_no_p(runs: pd.DataFrame) -> None:
    single = runs[runs["seed"] == 42]
    table = contrasts(single, "ppl", ["noise", "lb"])
    assert table["difference"].notna().all()
    assert table[["ci_low", "p", "p Holm", "d_z", "p Welch", "p sign-flip", "detectable"]].isna().all(axis=None)
    assert table["note"].str.contains("two paired seeds").all()
    assert with_intervals(summary(single, ["noise"], [])).empty
    assert with_intervals(summary(single, ["noise", "lb"], ["ppl"]))[["ci_low", "ci_high"]].isna().all(axis=None)


def test_a_difference_that_is_the_same_in_every_seed_has_no_p(runs: pd.DataFrame) -> None:
    """A difference without spread has no p, but it is no open question either."""
    # All seeds have the same difference, except for rounding.
    shifted = runs["seed"].astype(float).where(runs["noise"] == 0.0, runs["seed"] + 0.1)
    for values, size in ((0.0, 0.0), (0.3, 0.0), (shifted, 0.1)):
        table = contrasts(runs.assign(ppl=values), "ppl", ["noise", "lb"])
        assert table["p"].isna().all()
        assert table["deterministic"].all()
        row = select_contrast(table, "noise", 0.5, "lb=0.0")
        sentence = contrast_sentence(row, "noise", unit="", up="worse", down="better")
        assert sentence.endswith(f"**the same in every seed**, {f'larger by {size}' if size else 'no difference'}")
    row = select_contrast(
        contrasts(runs.assign(ppl=-shifted), "ppl", ["noise", "lb"], margin=0.2), "noise", 0.5, "lb=0.0"
    )
    sentence = contrast_sentence(row, "noise", unit="", up="worse", down="better")
    assert sentence.endswith("the same in every seed**, smaller by 0.1, within the margin of 0.2")


def test_a_significant_difference_inside_the_margin_is_within_the_margin() -> None:
    """A significant difference is called better or worse only if it may be larger than the margin."""
    seeds = np.arange(6)
    values = 100 + 5.0 * seeds
    small = pd.DataFrame({"arm": "b", "seed": seeds, "ppl": values + 0.5 + 0.05 * (-1) ** seeds})
    runs = pd.concat([pd.DataFrame({"arm": "a", "seed": seeds, "ppl": values}), small], ignore_index=True)
    endings = {}
    for margin in (1.0, 0.5, 0.1, None):
        row = contrasts(runs.assign(folder=""), "ppl", ["arm"], margin=margin).iloc[0]
        assert row["p Holm"] < 0.05
        endings[margin] = contrast_sentence(row, "arm", unit="", up="worse", down="better").split(": ")[-1]
    assert endings[1.0].startswith("**within the margin** of 1, worse by less (TOST")
    assert endings[0.5] == "**worse**, not shown to exceed the margin of 0.5"
    assert endings[0.1] == endings[None] == "**worse**"


def test_a_seed_without_a_partner_is_named(runs: pd.DataFrame) -> None:
    missing = (runs["noise"] == 0.5) & (runs["lb"] == 0.0) & (runs["seed"] == 44)
    for table in (
        runs[~missing],
        runs.assign(ppl=runs["ppl"].mask(missing)),
        runs.assign(ppl=runs["ppl"].mask(missing, np.inf)),
    ):
        row = select_contrast(contrasts(table, "ppl", ["noise", "lb"]), "noise", 0.5, "lb=0.0")
        assert row["n"] == 2
        assert row["note"] == "without a partner: seed 44"


def test_two_runs_of_one_seed_in_a_condition_are_refused(runs: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="seed 42 has more than one run"):
        summary(pd.concat([runs, runs[runs["seed"] == 42]]), ["noise", "lb"], ["ppl"])


@pytest.mark.parametrize("references", [{"lb": 0.5}, {"router": "topk"}])
def test_an_unknown_reference_is_refused(runs: pd.DataFrame, references: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match=r"reference (lb=0.5: allowed are 0.0, 0.01|router=topk: varied factors are noise, lb)"
    ):
        contrasts(runs, "ppl", ["noise", "lb"], references=references)


def test_the_detectable_effect_falls_with_the_number_of_seeds() -> None:
    effects = [detectable_effect(n) for n in (2, 3, 5, 10)]
    assert effects == sorted(effects, reverse=True)
    assert detectable_effect(10) == pytest.approx(0.996, abs=0.001)  # G*Power, paired t test, alpha 0.05, power 0.8
    assert np.isnan(detectable_effect(1))


@pytest.mark.parametrize(
    ("n", "tests", "effect"), [(3, 1, 3.26), (5, 1, 1.68), (3, 7, 8.66), (5, 7, 2.87), (3, 10, 10.36), (5, 10, 3.155)]
)
def test_the_detectable_effect_of_a_family_is_found_after_correction(n: int, tests: int, effect: float) -> None:
    """A true effect of the size that is printed is significant after correction in 80 of 100 studies."""
    assert detectable_effect(n, tests=tests) == pytest.approx(effect, abs=0.005)
    draws = np.random.default_rng(0).normal(effect, 1, (20_000, n))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue <= 0.05 / tests
    assert found.mean() == pytest.approx(0.8, abs=0.012)


def test_what_is_detectable_has_the_uncertainty_of_the_spread(runs: pd.DataFrame) -> None:
    """Over samples of three differences, the interval of the detectable effect holds the true one 95 times in 100."""
    row = select_contrast(contrasts(runs, "ppl", ["noise", "lb"], references={"lb": 0.01}), "lb", 0.0, "noise=0.0")
    assert row["tests"] == 7
    assert row["detectable"] == pytest.approx(8.6626 * row["std of differences"], rel=1e-3)
    sentence = contrast_sentence(row, "lb", unit="points", up="worse", down="better")
    assert sentence.endswith("smallest detectable effect 7.1 points (3.7 to 44) at the level 0.714 %")
    rng = np.random.default_rng(0)
    draws = [
        pd.DataFrame(
            {"metric": "ppl", "n": 3, "p": 0.5, "std of differences": rng.normal(0, 2, 3).std(ddof=1)}, index=[0]
        )
    ]
    draws += [draws[0].assign(**{"std of differences": rng.normal(0, 2, 3).std(ddof=1)}) for _ in range(399)]
    table = as_one_family(pd.concat(draws))
    true = 2 * detectable_effect(3, tests=400)
    covered = ((table["detectable_low"] <= true) & (true <= table["detectable_high"])).sum()
    assert stats.binom.ppf(0.001, 400, 0.95) <= covered <= stats.binom.ppf(0.999, 400, 0.95)


@pytest.mark.parametrize("sizes", [(1, 2, 20), (5, 5, 40)])
def test_chance_makes_a_test_of_any_family_significant_in_at_most_5_percent_of_reports(sizes: tuple[int, ...]) -> None:
    """All families of a report share 5 %, whatever their sizes, and they use most of it.

    If each family had 5 % of its own, 14 % of these reports would name an effect that does not exist.
    """
    rng, reports = np.random.default_rng(0), 1000
    family = np.repeat(range(len(sizes)), sizes)
    draws = rng.random((reports, len(family)))
    together = np.mean([corrected(pd.Series(p), family).min() <= 0.05 for p in draws])
    apart = np.mean(np.any([draws[:, family == each].min(axis=1) * size <= 0.05 for each, size in enumerate(sizes)], 0))
    low, high = stats.binom.ppf([0.0005, 0.9995], reports, 0.05) / reports
    assert 0.9 * low <= together <= high < apart


def test_families_get_shares_in_order_and_pass_on_what_they_no_longer_need() -> None:
    """Half of 5 % goes to the first family, half of the rest to the second; the last family gets what is left."""
    assert [shares(n) for n in (1, 2, 3)] == [[1.0], [0.5, 0.5], [0.5, 0.25, 0.25]]
    p = pd.Series([0.9, 0.004, 0.9, float("nan"), 0.9, 0.01, 0.001])
    family = np.array([0, 0, 1, 1, 2, 2, 2])
    result = corrected(p, family)
    expected = [1, 0.004 * 2 / 0.5, 1, float("nan"), 1, 0.01 * 2 / 0.25, 0.001 * 3 / 0.25]
    assert result == pytest.approx(expected, nan_ok=True)
    assert divisors(p, family).tolist() == [4, 4, 4, 4, 12, 12, 12]
    without_own = corrected(p.mask(family == 1), family)
    assert without_own[:2] == pytest.approx(result[:2]), "our own claims take nothing from those of a source"
    assert without_own[5:] == pytest.approx([0.01 * 2 / 0.5, 0.001 * 3 / 0.5])
    all_significant = corrected(pd.Series([0.001, 0.004, 0.03]), np.array([0, 0, 1]))
    assert all_significant == pytest.approx([0.004, 0.008, 0.03]), "the second family has 5 % once the first is done"


def test_a_small_share_is_not_a_signed_zero() -> None:
    assert [percent(share) for share in (0.0123, -0.0004, -0.00007, 0.0, -3e-7)] == [
        *("+1.2%", "-0.04%", "-0.007%", "0%", "0%")
    ]


def test_a_tiny_p_has_no_digits_in_sentences_and_tables_but_tables_sort_by_it() -> None:
    assert [p_equals(p) for p in (0.5, 0.0312, 0.0001, 0.00009999, 4.7e-134)] == [
        *("p=0.5", "p=0.031", "p=0.0001", "p < 0.0001", "p < 0.0001")
    ]
    close = (0.0496, 0.0504, 0.05, 0.04999999)  # to the level, which decides
    assert [p_equals(p) for p in close] == ["p=0.0496", "p=0.0504", "p=0.05", "p=0.04999999"]
    table = pd.DataFrame({"p Holm": [0.25, 3e-9, 4.7e-134], "ppl": [1.0, 3e-9, 2.0]})
    assert table_as_markdown(table).count("| &lt; 0.0001 | ") == 2
    _, rows = cells(table)
    assert [(row[0].text, row[0].value) for row in rows] == [
        *(("0.25", None), ("< 0.0001", 3e-9), ("< 0.0001", 4.7e-134))
    ]
    assert [row[1].value for row in rows] == [None] * 3
