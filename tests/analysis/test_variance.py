"""Tests of the analysis of variance: the numbers of the runs that ship with the docs, and its error rates."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.anova import AnovaRM

from moe.analysis.studies.published import as_runs, read_published
from moe.analysis.variance import anova
from moe.results.shipped import read_shipped

PPL = "val/perplexity"
STUDIES = Path(__file__).parents[2] / "docs" / "studies"


def shipped(experiment: str) -> pd.DataFrame:
    """Return the runs of a study that ships with the docs."""
    return read_shipped(STUDIES / experiment)[0]


def made_up(noise: int, lb: int, seeds: int, *, draw: int, seed_by_noise: float = 0.0) -> pd.DataFrame:
    """Return runs in which no factor has an effect on average. Every seed responds to noise in its own way."""
    rng = np.random.default_rng(draw)
    values = rng.normal(0, 1, (noise, lb, seeds)) + 5 * rng.normal(size=seeds)
    values += seed_by_noise * rng.normal(size=(noise, 1, seeds))
    grid = pd.MultiIndex.from_product([range(noise), range(lb), range(seeds)], names=["noise", "lb", "seed"])
    return pd.DataFrame({PPL: values.ravel()}, index=grid).reset_index().assign(folder="made up")


@pytest.mark.parametrize(
    ("experiment", "factors", "term", "f", "p", "p_gg"),
    [
        ("noise_lb_seed", ["noise", "lb"], "noise:lb", 5.184, 0.01667, 0.02727),
        ("temperature_schedules", ["schedule"], "schedule", 2.156, 0.1002, 0.1469),
        ("temperature_ablation", ["router.temp"], "router.temp", 6.391, 1.54e-5, 7.17e-4),
    ],
)
def test_the_shipped_runs(experiment: str, factors: list[str], term: str, f: float, p: float, p_gg: float) -> None:
    """The correction for unequal spreads makes p larger, here by up to 48 times."""
    table = anova(shipped(experiment), "test/loss", factors).set_index("term")
    assert table.loc[term, ["F", "p", "p GG"]].tolist() == pytest.approx([f, p, p_gg], rel=0.02)
    assert {"metric", "F", "p", "p GG"} <= set(table)


@pytest.mark.parametrize("metric", [PPL, "routing/load_cv/pooled"])
def test_balanced_runs_give_the_f_of_repeated_measures(metric: str) -> None:
    noise = as_runs(read_published("noise_runs"))
    three = [noise.assign(router="topk"), noise.assign(router="hash", **{metric: noise[metric] ** 1.01})]
    for runs, factors in ((noise, ["noise", "lb"]), (pd.concat(three), ["noise", "lb", "router"])):
        table = anova(runs, metric, factors).set_index("term").drop("seed")
        expected = AnovaRM(runs.rename(columns={metric: "y"}), "y", "seed", within=factors).fit().anova_table
        assert table.index.tolist() == expected.index.tolist()
        np.testing.assert_allclose(
            table[["df", "df error", "F", "p"]], expected[["Num DF", "Den DF", "F Value", "Pr > F"]]
        )


def test_a_factor_of_two_levels_has_the_p_of_the_paired_t_test() -> None:
    runs = as_runs(read_published("noise_runs"))
    by_seed = runs.groupby(["lb", "seed"])[PPL].mean()
    table = anova(runs, PPL, ["noise", "lb"]).set_index("term")
    assert table.loc["lb", "p GG"] == pytest.approx(stats.ttest_rel(by_seed[0.0], by_seed[0.01]).pvalue)
    assert table.loc["lb", "epsilon"] == 1


def test_epsilon_is_that_of_the_covariance_of_the_levels() -> None:
    """The textbook formula centers the covariance matrix of the levels (Greenhouse and Geisser 1959)."""
    runs = shipped("temperature_ablation")
    wide = runs.pivot(index="seed", columns="router.temp", values=PPL)
    levels = wide.shape[1]
    center = np.eye(levels) - 1 / levels
    covariance = center @ np.cov(wide.to_numpy().T) @ center
    expected = np.trace(covariance) ** 2 / ((levels - 1) * (covariance**2).sum())
    assert anova(runs, PPL, ["router.temp"])["epsilon"].iloc[0] == pytest.approx(expected)


def test_seeds_that_respond_differently_make_no_effect() -> None:
    """If seeds respond to noise in different ways, but not on average, noise is significant in at most 5 % of studies.

    With all interactions in the error, it was 23 %.
    """
    studies = 60
    p = [
        anova(made_up(3, 2, 3, draw=draw, seed_by_noise=2.0), PPL, ["noise", "lb"])["p GG"].iloc[0]
        for draw in range(studies)
    ]
    assert np.sum(np.array(p) <= 0.05) <= stats.binom.ppf(0.999, studies, 0.05)


def test_values_whose_squares_are_too_large_are_no_error() -> None:
    """A perplexity is such a value if the loss is above 355."""
    runs = made_up(3, 2, 3, draw=0)
    with np.errstate(over="ignore", invalid="ignore"):
        table = anova(runs.assign(**{PPL: runs[PPL] * 1e160}), PPL, ["noise", "lb"])
    assert table["p GG"].isna().all()


def test_seeds_that_lack_a_run_are_left_out() -> None:
    runs = shipped("noise_lb_seed").query("seed < 46")
    lost = (runs["noise"] == 0.5) & (runs["lb"] == 0.0) & (runs["seed"] == 44)
    complete = anova(runs.query("seed != 44"), PPL, ["noise", "lb"]).drop(columns="runs")
    for gap in (
        runs[~lost],
        runs.assign(**{PPL: runs[PPL].mask(lost)}),
        runs.assign(**{PPL: runs[PPL].mask(lost, np.inf)}),
    ):
        table = anova(gap, PPL, ["noise", "lb"])
        assert (table["runs"] == "18 of 24: the seeds that have all combinations, not 44").all()
        pd.testing.assert_frame_equal(table.drop(columns="runs"), complete)


@pytest.mark.parametrize("spread", [(1.0, 1.0, 1.0, 1.0), (4.0, 1.0, 1.0, 1.0)])
@pytest.mark.parametrize(("seeds", "lost"), [(3, 1), (5, 2)])
def test_missing_runs_do_not_raise_the_error(seeds: int, lost: int, spread: tuple[float, ...]) -> None:
    """The mixed model that was used before found an interaction in 10 to 31 % of such studies."""
    studies, rng = 300, np.random.default_rng(0)
    cells = pd.MultiIndex.from_product([range(seeds), (0.0, 0.1), (0.0, 0.01)], names=["seed", "noise", "lb"])
    index = cells.to_frame(index=False)
    found = np.zeros(3)
    for _ in range(studies):
        values = np.repeat(rng.normal(size=seeds), 4) + rng.normal(size=4 * seeds) * np.tile(spread, seeds)
        runs = index.assign(**{PPL: 10 + values}).drop(index=[5 * place for place in range(lost)])
        found += anova(runs, PPL, ["noise", "lb"])["p GG"].iloc[:3].to_numpy() <= 0.05
    assert (found <= stats.binom.ppf(0.999, studies, 0.05)).all(), found / studies


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda runs: runs[runs["seed"] == 0], "needs a varied factor and two seeds; varied: noise, lb; seeds: 0"),
        (lambda runs: runs[(runs["noise"] > 0) | (runs["lb"] > 0)], r"no seed has val/perplexity at noise=0, lb=0"),
        (lambda runs: runs.assign(**{PPL: 0.3}), "no spread between seeds"),
        (lambda runs: runs.assign(**{PPL: 0.1 * runs["seed"] + runs["noise"] + 0.3 * runs["lb"]}), "no spread"),
        (lambda runs: runs.assign(**{PPL: 0.1 * runs["seed"] + runs["noise"]}).drop(index=3), "no spread"),
    ],
)
def test_an_analysis_that_is_impossible_says_why(change, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        anova(change(made_up(3, 2, 3, draw=0)), PPL, ["noise", "lb"])
