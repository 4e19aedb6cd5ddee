"""Tests of planned claims: only runs that recorded a claim judge it, and chance alone rarely decides it."""

import json
import math
import shutil
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_folders import change_record, write_metrics
from scipy import stats
from small_runs import OUT
from statsmodels.stats.multitest import multipletests

from moe.analysis.claims import contrasts_without_claim, evidence_sentence, judge, judge_planned, planned_claims
from moe.analysis.comparisons import as_spelled, compared
from moe.analysis.estimates import NO_SPREAD, ONE_SEED
from moe.analysis.power import Prediction, detectable_effect, seeds_for
from moe.analysis.report.judgments import judgments
from moe.analysis.sentences import contrast_sentence, p_equals
from moe.analysis.statistics import NOT_CLEAR, contrasts, corrected, noise_floor
from moe.analysis.studies.published import as_runs, experiment_claims, read_published
from moe.config.cell import Cell
from moe.config.claim import ClaimConfig
from moe.config.options import CONF, options
from moe.launch.command_line import read_cells
from moe.launch.run import write_run_record
from moe.metrics.catalog import lookup
from moe.results.conditions import varied_factors
from moe.results.table import load_runs

PPL = "val/perplexity"
WITH_CLAIMS = [
    *("capacity_factorial", "experiment_a", "experiment_c", "finetuning", "noise_lb_seed", "router_league"),
    "spectra_ablation",
    "spectra_scaling",
    *(f"spectra_sweep_{letter}" for letter in "abcde"),
    *("temperature_ablation", "temperature_best_long", "temperature_schedules"),
]
# Overrides that reduce large grids, because composing a cell takes a while. Every claim can still be judged.
NARROWED = {
    "router_league": [
        *("router=topk,balanced_random,oracle,shuffled_oracle,sigmoid_bias,quantile_balancing", "tune=null")
    ],
    "spectra_ablation": [
        "variant=spectra_full,spectra_no_expression,spectra_no_gru,spectra_no_repulsion,spectra_no_ortho,spectra_no_all,top1,top2"
    ],
    "spectra_sweep_a": ["router.expert_choice_capacity_factor=1.0,1.25"],
    "spectra_sweep_b": [
        *("router.sinkhorn_epsilon=0.03,0.2", "router.sinkhorn_iterations=2,8", "router.log_sinkhorn_enabled=true")
    ],
    "spectra_sweep_c": ["router.osr_repulsion_weight=0.0,1.0"],
    "spectra_sweep_d": ["router.router_entropy_coef=0.0,0.1"],
    "spectra_sweep_e": ["data.seq_len=128,512"],
}


def claim(kind: str, levels: list[Any], than: list[Any] | None = None, **extra: Any) -> ClaimConfig:
    return ClaimConfig(text=kind, metric=PPL, factor="noise", levels=levels, than=than or [], kind=kind, **extra)


def runs_with_means(
    means: dict[Any, float], *, seeds: int = 5, spread: float = 0.1, draw: int = 0, factor: str = "noise"
) -> pd.DataFrame:
    """Return made-up runs. `means` are the true means by level.

    All runs of a seed share one large random offset. `spread` is the standard deviation of the noise of each run.
    """
    rng = np.random.default_rng(draw)
    seed_offset = rng.normal(0, 5, seeds)
    rows = [
        {factor: level, "seed": seed, PPL: mean + seed_offset[seed] + rng.normal(0, spread)}
        for level, mean in means.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows).assign(status="finished", folder="made up", experiment="made up")


def read_experiment(name: str) -> str:
    return (CONF / "experiment" / f"{name}.yaml").read_text()


def judge_first(runs: pd.DataFrame, *claims: ClaimConfig) -> pd.Series:
    """Judge claims and return the judgment of the first one."""
    return judge(runs, list(claims)).iloc[0]


def test_two_levels_are_compared_by_a_paired_t_test_of_the_means_of_each_seed() -> None:
    runs = as_runs(read_published("noise_runs"))
    row = judge_first(runs, claim("higher", [0.1], [0.0]))
    by_seed = runs.groupby(["noise", "seed"])[PPL].mean()
    expected = stats.ttest_rel(by_seed[0.1], by_seed[0.0])
    assert row["n"] == 3
    assert row["difference"] == pytest.approx(by_seed[0.1].mean() - by_seed[0.0].mean())
    assert row["p"] == pytest.approx(expected.pvalue)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(expected.confidence_interval()))
    shifted = runs.assign(**{PPL: runs[PPL] + runs["seed"].map({42: 0.0, 43: 7.0, 44: -3.0})})
    assert judge_first(shifted, claim("higher", [0.1], [0.0]))["p"] == pytest.approx(row["p"]), "seeds are blocks"


@pytest.mark.parametrize("lb", [0.0, 0.01])
def test_the_published_contrast_is_reproduced(lb: float) -> None:
    runs = as_runs(read_published("noise_runs"))
    row = judge_first(runs[runs["lb"] == lb], claim("higher", [0.1], [0.0]))
    assert row["p"] == pytest.approx({0.0: 0.0166, 0.01: 0.0014}[lb], abs=5e-5)
    assert row["verdict"] == "supported"


@pytest.mark.parametrize(
    ("kind", "levels", "than", "means"),
    [
        ("higher", [0.5], [0.0], {0.0: 100, 0.5: 103}),
        ("lower", [0.5], [0.0], {0.0: 103, 0.5: 100}),
        ("higher", [0.5, 1.0], [0.0, 0.1], {0.0: 100, 0.1: 100, 0.5: 103, 1.0: 103}),
        ("lowest", [0.5], [], {0.0: 103, 0.1: 103, 0.5: 100}),
        ("highest", [0.5, 0.1], [], {0.0: 100, 0.1: 103, 0.5: 103}),
    ],
)
def test_mirrored_data_give_the_opposite_verdict(
    kind: str, levels: list[float], than: list[float], means: dict
) -> None:
    mirrored = {level: 203 - mean for level, mean in means.items()}
    assert judge_first(runs_with_means(means), claim(kind, levels, than))[["verdict", "estimates"]].tolist() == [
        *("supported", "as claimed")
    ]
    assert judge_first(runs_with_means(mirrored), claim(kind, levels, than))[["verdict", "estimates"]].tolist() == [
        *("contradicted", "against")
    ]


@pytest.mark.parametrize(
    "claim_about_noise",
    [
        claim("higher", [0.5], [0.0]),
        claim("lower", [0.1, 0.5], [0.0]),
        claim("lowest", [0.1, 0.5]),
        claim("highest", [0.0]),
    ],
    ids=lambda each: f"{each.kind} {each.levels}",
)
def test_chance_alone_decides_at_most_one_time_in_twenty(claim_about_noise: ClaimConfig) -> None:
    draws = 60
    verdicts = [
        judge_first(runs_with_means({0.0: 100, 0.1: 100, 0.5: 100}, draw=draw), claim_about_noise)["verdict"]
        for draw in range(draws)
    ]
    decided = sum(verdict != "undecided" for verdict in verdicts)
    assert decided <= stats.binom.ppf(0.999, draws, 0.05)


def test_a_difference_as_large_as_the_margin_is_rarely_called_equivalent() -> None:
    """If the difference equals the margin, "equivalent" is found about one time in twenty.

    A test that never errs there could never find equivalence at all, so the test has a lower bound too.
    """
    equivalence, draws = claim("equivalent", [0.1], [0.0], margin=0.2), 60
    found = sum(
        judge_first(runs_with_means({0.0: 100, 0.1: 100.2}, draw=draw), equivalence)["verdict"] == "supported"
        for draw in range(draws)
    )
    assert 1 <= found <= stats.binom.ppf(0.999, draws, 0.05)


def test_equivalence_needs_a_narrow_interval_not_a_large_p() -> None:
    equivalence = claim("equivalent", [0.1], [0.0], margin="1%")
    tiny_but_significant = runs_with_means({0.0: 100, 0.1: 100.05}, seeds=200)
    assert judge_first(tiny_but_significant, claim("higher", [0.1], [0.0]))["verdict"] == "supported"
    assert judge_first(tiny_but_significant, equivalence)["verdict"] == "supported", (
        "significant, and far smaller than the margin"
    )
    imprecise = judge_first(runs_with_means({0.0: 100, 0.1: 100}, seeds=3, spread=3), equivalence)
    assert imprecise["verdict"] == "undecided"
    assert "neither inside nor outside -1" in imprecise["reason"]
    for mean in (97, 103):
        assert judge_first(runs_with_means({0.0: 100, 0.1: mean}), equivalence)["verdict"] == "contradicted"


@pytest.mark.parametrize(
    ("rise", "margin", "side"), [(1.0, 0.96, "against"), (1.0, 1.6, "for"), (1.0, 3.0, "for"), (9.0, 1.0, "against")]
)
def test_a_p_says_whether_it_is_for_or_against_the_claim(rise: float, margin: float, side: str) -> None:
    """It is the smaller one of two: that the difference is inside the margin, or outside."""
    runs = runs_with_means({0.0: 100, 0.5: 100 + rise}, spread=0.3, seeds=8)
    row = judge_first(runs, claim("equivalent", [0.5], [0.0], margin=margin))
    values = runs.pivot(index="seed", columns="noise", values=PPL)
    difference = values[0.5] - values[0.0]
    outside = stats.ttest_1samp(difference, margin, alternative="greater").pvalue
    assert (row["side"], row["p"]) == (side, pytest.approx(2 * outside if side == "against" else 1 - outside, rel=1e-6))
    assert (f"{p_equals(row['p'])} against the claim (Holm " in evidence_sentence(row)) == (side == "against")


def test_a_margin_is_a_percentage_of_the_reference_or_a_number_in_units() -> None:
    runs = runs_with_means({0.0: 100, 0.1: 101.5})
    verdicts = {
        margin: judge_first(runs, claim("equivalent", [0.1], [0.0], margin=margin))["verdict"]
        for margin in ("2%", 2, "1%", 1)
    }
    assert verdicts == {"2%": "supported", 2: "supported", "1%": "contradicted", 1: "contradicted"}
    assert judge_first(runs.assign(**{PPL: runs[PPL] / 100}), claim("equivalent", [0.1], [0.0], margin="2%"))[
        "verdict"
    ] == ("supported")


@pytest.mark.parametrize(
    ("mean", "verdict"), [(110, "supported"), (101, "contradicted"), (125, "contradicted"), (90, "contradicted")]
)
def test_a_claimed_size_is_compared_with_the_confidence_interval(mean: float, verdict: str) -> None:
    assert (
        judge_first(runs_with_means({0.0: 100, 0.5: mean}), claim("higher", [0.5], [0.0], size=["5%", "15%"]))[
            "verdict"
        ]
        == verdict
    )
    mirrored = runs_with_means({0.0: 100, 0.5: 200 - mean})
    assert judge_first(mirrored, claim("lower", [0.5], [0.0], size=["5%", "15%"]))["verdict"] == verdict


def test_an_effect_at_the_end_of_the_claimed_size_is_undecided() -> None:
    row = judge_first(
        runs_with_means({0.0: 100, 0.5: 105}, spread=1), claim("higher", [0.5], [0.0], size=["5%", "15%"])
    )
    assert row["verdict"] == "undecided"


def test_a_claim_about_several_levels_is_as_strong_as_its_weakest_comparison() -> None:
    both_levels = claim("higher", [0.1, 0.5], [0.0])
    assert judge_first(runs_with_means({0.0: 100, 0.1: 103, 0.5: 103}), both_levels)["verdict"] == "supported"
    row = judge_first(runs_with_means({0.0: 100, 0.1: 100, 0.5: 103}), both_levels)
    assert row["verdict"] == "undecided"
    assert row["compared"] == "noise 0.1 vs 0.0"
    words = "one of 2 comparisons that must all hold: each of 0.1 and 0.5 with 0.0; "
    words += "shown is the comparison on which p depends"
    assert row["choice"] == words
    assert f", n=5; {words}; " in evidence_sentence(row)
    assert judge_first(runs_with_means({0.0: 100, 0.5: 103}), claim("higher", [0.5], [0.0]))["choice"] == ""
    assert judge_first(runs_with_means({0.0: 100, 0.1: 97, 0.5: 103}), both_levels)["verdict"] == "contradicted"
    p_of_each_level = [
        judge_first(runs_with_means({0.0: 100, 0.1: 101, 0.5: 103}), claim("higher", [level], [0.0]))["p"]
        for level in (0.1, 0.5)
    ]
    assert judge_first(runs_with_means({0.0: 100, 0.1: 101, 0.5: 103}), both_levels)["p"] == max(p_of_each_level)


def test_lowest_is_contradicted_only_by_a_level_that_beats_all_claimed_levels() -> None:
    lowest = claim("lowest", [1.5, 2.0])
    not_beaten = judge_first(runs_with_means({1.0: 101, 1.5: 100, 2.0: 103}), lowest)
    assert (not_beaten["verdict"], not_beaten["estimates"]) == ("undecided", "mixed")
    beaten = judge_first(runs_with_means({0.5: 110, 1.0: 99, 1.5: 101, 2.0: 103}), lowest)
    assert (beaten["verdict"], beaten["estimates"]) == ("contradicted", "against")
    assert beaten["compared"] == "noise 1.5 vs 1.0", "the level of the claim that is surest to be the best of them"
    assert beaten["choice"] == (
        "one of 4 comparisons that must all hold: each of 1.5 and 2.0 with each of the 2 other levels; "
        "shown is the comparison on which p depends"
    )


@pytest.mark.parametrize("kind", ["lowest", "lower"])
def test_the_comparison_that_is_shown_is_the_one_whose_p_the_claim_has(kind: str) -> None:
    """The nearest rival is clearly worse; a farther one may be better, because it spreads more."""
    runs = runs_with_means({0.0: 100, 0.1: 101, 0.5: 102}, spread=0.01)
    runs.loc[runs["noise"] == 0.5, PPL] += np.array([-8.0, -4.0, 0.0, 4.0, 8.0])
    than = [] if kind == "lowest" else [0.1, 0.5]
    row, near, far = (
        judge_first(runs, each)
        for each in (claim(kind, [0.0], than), claim("lower", [0.0], [0.1]), claim("lower", [0.0], [0.5]))
    )
    assert near["verdict"] == "supported"
    shown = ["compared", "difference", "ci_low", "ci_high", "p", "verdict"]
    assert row[shown].tolist() == far[shown].tolist()


def test_a_comparison_that_could_not_be_tested_is_shown_with_its_own_reason() -> None:
    runs = runs_with_means({0.0: 100, 0.1: 101, 0.5: 110})
    runs = runs[(runs["noise"] != 0.5) | (runs["seed"] == 0)]
    row, far = (judge_first(runs, each) for each in (claim("lowest", [0.0]), claim("lower", [0.0], [0.5])))
    shown = ["compared", "n", "difference", "reason", "verdict"]
    assert row[shown].tolist() == far[shown].tolist()
    assert (row["verdict"], row["n"]) == ("not tested", 1)


def test_what_is_left_out_of_a_claim_does_not_tell_what_is_rounding() -> None:
    """The one pair at lb=1.0 has values so large that beside them the differences at lb=0.0 look all the same."""
    runs = runs_with_means({0.0: 100, 0.5: 103}).assign(lb=0.0)
    large = runs[runs["seed"] == 0].assign(lb=1.0, **{PPL: lambda table: table[PPL] * 1e15})
    row, alone = (judge_first(each, claim("higher", [0.5], [0.0])) for each in (pd.concat([runs, large]), runs))
    assert row["p"] == alone["p"] > 0
    assert "left out: lb=1.0: one pair" in row["reason"]


def test_the_claims_of_an_experiment_are_corrected_by_holm() -> None:
    runs = runs_with_means({0.0: 100, 0.1: 100, 0.5: 200, 1.0: 100})
    differences = runs["seed"].map(dict(enumerate([1.0, 2.0, 3.0, 0.5, 1.5])))  # p = 0.02
    runs[PPL] += differences.where(runs["noise"] == 0.1, 0)
    with_effect, without_effect = claim("higher", [0.1], [0.0]), claim("higher", [1.0], [0.0])
    uncorrected = judge_first(runs, with_effect)
    assert uncorrected["p"] == uncorrected["p Holm"]
    assert uncorrected["verdict"] == "supported"
    table = judge(runs, [with_effect, claim("higher", [0.5], [0.0]), *[without_effect] * 8])
    assert table["p Holm"].tolist() == pytest.approx(multipletests(table["p"], method="holm")[1].tolist())
    assert table["verdict"].tolist()[:2] == ["undecided", "supported"]
    assert table["reason"].iloc[0] == "supported before the correction for other tests and looks, not after it"


def test_our_own_claims_take_no_significance_from_those_of_a_source() -> None:
    """Holm's correction counts the claims of a source and our own claims apart."""
    runs = as_runs(read_published("noise_runs"))
    theirs = [each for each in experiment_claims("noise_lb_seed") if not each.source.startswith("our own")]
    both = judge(runs, experiment_claims("noise_lb_seed")).set_index("claim")
    alone = judge(runs, theirs).set_index("claim")
    assert len(both) > len(alone)
    assert both.loc[alone.index, "p Holm"].tolist() == alone["p Holm"].tolist()
    assert both.loc["Balance weight 0.01 lowers the load CV", "p Holm"] == pytest.approx(0.046, abs=5e-4)


def test_the_mean_of_a_level_that_is_always_zero_is_zero() -> None:
    """The difference is a mean of its own, so mean plus difference would leave what rounding makes of it."""
    loads = {0.0: [0.6335, 0.6127, 0.6419, 0.6331, 0.6174], 0.5: [0.0] * 5}
    rows = [{"noise": each, "seed": n, PPL: value} for each, values in loads.items() for n, value in enumerate(values)]
    runs = pd.DataFrame(rows).assign(status="finished", folder="made up", experiment="made up")
    for kind in ("lower", "mixed"):
        direction = {"direction": "lower"} if kind == "mixed" else {}
        judged = judge_first(runs, claim(kind, [0.5], [0.0], **direction))
        assert judged["mean"] == 0, kind
        assert judged["reference mean"] > 0.6


def runs_of_two_factors(effect: float, change: float, *, seeds: int = 5) -> pd.DataFrame:
    """Return made-up runs in which noise 0.5 costs `effect` at lb 0.0, and `change` more at lb 0.01."""
    parts = [runs_with_means({0.0: 100, 0.5: 100 + effect}, seeds=seeds).assign(lb=0.0)]
    parts += [runs_with_means({0.0: 90, 0.5: 90 + effect + change}, seeds=seeds, draw=1).assign(lb=0.01)]
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(
    "planned",
    [
        claim("higher", [0.5], [0.0]),
        claim("lower", [0.5], [0.0], within={"lb": [0.0]}),
        claim("higher", [0.5], [0.0], size=["1%", "5%"]),
        claim("highest", [0.5]),
        claim("lowest", [0.5, 0.1]),
        claim("equivalent", [0.5], [0.0, 0.1], margin="2%"),
        claim("interaction", [0.5], [0.0], within={"lb": [0.0, 0.01]}, direction="higher"),
        claim("interaction", [0.5], [0.0], within={"lb": [0.0, 0.01]}, margin="2%"),
        claim("mixed", [0.5], [0.0], direction="higher"),
        claim("mixed", [0.5], [0.0], margin="2%"),
    ],
    ids=lambda each: " ".join(filter(None, (each.kind, *map(str, each.within), *map(str, each.size), each.margin))),
)
def test_the_runs_of_a_claim_are_those_that_change_a_number_of_its_test(planned: ClaimConfig) -> None:
    """Seeds lack a run of one side, or of all but one setting; a combination has a single pair."""
    runs = pd.concat(
        [
            runs_with_means({0.0: 100, 0.1: 101, 0.5: 102}, draw=draw).assign(lb=lb)
            for draw, lb in enumerate((0.0, 0.01))
        ]
        + [runs_with_means({0.0: 100, 0.5: 102}, seeds=1, draw=2).assign(lb=0.1)],
        ignore_index=True,
    )
    noise, lb, seed = runs["noise"], runs["lb"], runs["seed"]
    runs = runs[~((noise == 0.5) & (lb == 0.0) & (seed == 1)) & ~((noise > 0) & (lb == 0.01) & (seed == 2))]
    runs = runs[(runs["seed"] != 4) | ((runs["noise"] == 0.5) & (runs["lb"] == 0.0))].reset_index(drop=True)
    runs = runs.assign(folder=[f"/runs/{number}" for number in runs.index])

    def numbers(table: pd.DataFrame) -> list[float]:
        return [each for line in compared(planned, table).pairs for pair in line for each in (pair.p_for, pair.favor)]

    before, changing = numbers(runs), set()
    for number in runs.index:
        changed = runs.copy()
        changed.loc[number, PPL] += 0.37
        if numbers(changed) != pytest.approx(before, rel=1e-7):
            changing.add(f"/runs/{number}")
    assert 0 < len(changing) < len(runs)
    assert compared(planned, runs).runs == changing


def test_a_claim_within_some_levels_is_judged_by_the_runs_at_these_levels_alone() -> None:
    runs = runs_of_two_factors(effect=-3, change=9)
    assert judge_first(runs, claim("higher", [0.5], [0.0]))["difference"] == pytest.approx(1.5, abs=0.2)
    at_zero = judge_first(runs, claim("higher", [0.5], [0.0], within={"lb": [0.0]}))
    alone = judge_first(runs[runs["lb"] == 0.0], claim("higher", [0.5], [0.0]))
    assert at_zero["verdict"] == "contradicted"
    assert at_zero["compared"] == "noise 0.5 vs 0.0 at lb=0.0"
    assert at_zero[["difference", "p", "n"]].tolist() == alone[["difference", "p", "n"]].tolist()
    absent = judge_first(runs, claim("higher", [0.5], [0.0], within={"lb": [0.0, 0.02]}))
    assert absent["reason"] == "lb=0.02 is in no run"


def test_an_interaction_is_a_paired_t_test_of_the_differences_of_differences() -> None:
    runs = runs_of_two_factors(effect=3, change=0.4)
    row = judge_first(runs, claim("interaction", [0.5], [0.0], within={"lb": [0.0, 0.01]}, direction="higher"))
    cells = runs.pivot(index="seed", columns=["lb", "noise"], values=PPL)
    changes = (cells[0.01, 0.5] - cells[0.01, 0.0]) - (cells[0.0, 0.5] - cells[0.0, 0.0])
    expected = stats.ttest_1samp(changes, 0)
    assert row["difference"] == pytest.approx(changes.mean())
    assert row["p"] == pytest.approx(expected.pvalue)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(expected.confidence_interval()))
    assert row["compared"] == "noise 0.5 vs 0.0, change from lb=0.0 to 0.01"
    costs = {lb: (cells[lb, 0.5] - cells[lb, 0.0]).mean() for lb in (0.0, 0.01)}
    assert (row["mean"], row["reference mean"]) == pytest.approx((costs[0.01], costs[0.0]))
    assert (row["level"], row["reference"]) == ("lb=0.01", "lb=0.0")
    means = f"{row['compared']}: validation perplexity {costs[0.01]:+.4g} at lb=0.01 vs {costs[0.0]:+.4g} at lb=0.0"
    assert evidence_sentence(row).startswith(f"{means}, difference {changes.mean():+.3g} [")


def test_the_evidence_of_a_claim_names_its_metric() -> None:
    runs = runs_with_means({0.0: 0.25, 0.5: 0.5}, spread=0).rename(columns={PPL: "routing/load_cv/pooled"})
    row = judge_first(runs, replace(claim("higher", [0.5], [0.0]), metric="routing/load_cv/pooled"))
    means = f"{row['mean']:.4g} vs {row['reference mean']:.4g}"
    assert evidence_sentence(row).startswith(f"noise 0.5 vs 0.0: load CV (layers pooled) {means} (")


@pytest.mark.parametrize(
    ("change", "extra", "verdict"),
    [
        (3, {"direction": "higher"}, "supported"),
        (3, {"direction": "lower"}, "contradicted"),
        (-3, {"direction": "lower"}, "supported"),
        (3, {}, "supported"),
        (-3, {}, "supported"),
        (0, {}, "undecided"),
        (0, {"margin": 1}, "supported"),
        (0, {"margin": "1%"}, "supported"),
        (3, {"margin": "1%"}, "contradicted"),
    ],
)
def test_an_interaction_has_a_direction_or_a_margin(change: float, extra: dict[str, Any], verdict: str) -> None:
    """A margin in percent is a share of the metric itself at the levels compared with, not of its change."""
    runs = runs_of_two_factors(effect=5, change=change)
    assert judge_first(runs, claim("interaction", [0.5], [0.0], within={"lb": [0.0, 0.01]}, **extra))["verdict"] == (
        verdict
    )


def test_a_difference_of_differences_that_rounding_alone_makes_is_none() -> None:
    """The differences themselves are small beside the metric, whose rounding counts."""
    one = runs_with_means({0.0: 100}).assign(lb=0.0)
    both = pd.concat([one, one.assign(noise=0.5, **{PPL: one[PPL] + 1e-9})])
    runs = pd.concat([both, both.assign(lb=0.01, **{PPL: both[PPL] + 0.7})], ignore_index=True)
    row = judge_first(runs, claim("interaction", [0.5], [0.0], within={"lb": [0.0, 0.01]}))
    assert (row["difference"], row["deterministic"]) == (0, True)


def test_a_missing_run_leaves_the_interaction_to_the_other_seeds() -> None:
    runs = runs_of_two_factors(effect=3, change=3)
    lost = (runs["lb"] == 0.01) & (runs["noise"] == 0.0) & (runs["seed"] == 4)
    row = judge_first(runs[~lost], claim("interaction", [0.5], [0.0], within={"lb": [0.0, 0.01]}))
    assert (row["n"], row["verdict"]) == (4, "supported")


def test_an_interaction_with_the_domain_compares_losses_of_the_same_runs() -> None:
    runs = runs_with_means({0.0: 100, 0.5: 101}).rename(columns={PPL: "val/loss/speech"})
    runs["val/loss/python"] = runs["val/loss/speech"] - 5 * (runs["noise"] == 0.5) + runs["seed"] / 100
    gain = ClaimConfig(
        text="", metric="val/loss", factor="noise", levels=[0.5], than=[0.0], kind="interaction", direction="lower"
    )
    runs["val/loss/python"] += np.random.default_rng(0).normal(0, 0.1, len(runs))
    assert judge_first(runs, replace(gain, within={"domain": ["speech", "python"]}))["verdict"] == "supported"
    row = judge_first(runs, replace(gain, within={"domain": ["speech", "cpp"]}))
    assert row["reason"] == "no run has val/loss/cpp"


@pytest.mark.parametrize(
    ("untestable", "reason"),
    [
        (claim("higher", [0.7], [0.0]), "noise=0.7 is in no run"),
        (claim("higher", [0.5], [0.2]), "noise=0.2 is in no run"),
        (claim("lowest", [0.0, 0.1, 0.5]), "no other level of noise"),
        (ClaimConfig(text="", metric="val/loss", factor="noise", levels=[0.1], than=[0.0], kind="lower"), "no run has"),
        (
            ClaimConfig(text="", metric=PPL, factor="router", levels=["a"], than=["b"], kind="lower"),
            "router=a is in no",
        ),
    ],
)
def test_a_claim_about_missing_levels_or_metrics_is_not_tested(untestable: ClaimConfig, reason: str) -> None:
    table = judge(runs_with_means({0.0: 100, 0.1: 102, 0.5: 105}), [untestable, claim("higher", [0.5], [0.0])])
    assert table["verdict"].tolist() == ["not tested", "supported"]
    assert reason in table["reason"].iloc[0]
    assert table["n"].iloc[0] == 0
    assert reason in evidence_sentence(table.iloc[0])
    assert table["p Holm"].iloc[1] == table["p"].iloc[1], (
        "a claim that cannot be tested does not enter Holm's correction of the others"
    )


@pytest.mark.parametrize("kind", ["higher", "mixed"])
def test_a_metric_that_all_runs_lack_is_the_reason(kind: str) -> None:
    runs = runs_with_means({0.0: 100, 0.5: 105}).assign(**{"time/tokens_per_second": float("nan")})
    about = replace(claim("higher", [0.5], [0.0]), metric="time/tokens_per_second", kind=kind)
    row = judge_first(runs, about)
    assert row["verdict"] == "not tested"
    assert row["reason"] != "no seed is left"
    assert "has time/tokens_per_second" in row["reason"]


def test_a_claim_is_not_tested_if_another_factor_always_changes_too() -> None:
    runs = runs_with_means({0.0: 100, 0.1: 103}).assign(
        model=lambda table: table["noise"].map({0.0: "tiny", 0.1: "small"})
    )
    both_models = pd.concat([runs, runs.assign(noise=runs["noise"] + 1, model="base")])
    row = judge_first(both_models, claim("higher", [0.1], [0.0]))
    assert row["reason"] == "no runs differ in noise alone"
    assert row["verdict"] == "not tested"


@pytest.mark.parametrize("kind", ["equivalent", "mixed", "higher"])
def test_a_share_of_a_mean_that_is_not_clear_of_zero_tests_nothing(kind: str) -> None:
    runs = runs_with_means({0.0: 1.0, 0.5: 1.0}, spread=0.001)
    amount = {"size": ["5%", "10%"]} if kind == "higher" else {"margin": "5%"}
    row = judge_first(runs, claim(kind, [0.5], [0.0], **amount))
    assert row["verdict"] == "not tested"
    assert row["reason"].endswith(NOT_CLEAR)
    assert math.isnan(row["seeds needed"])
    clear = judge_first(runs.assign(**{PPL: runs[PPL] + 100}), claim(kind, [0.5], [0.0], **amount))
    assert clear["verdict"] == ("contradicted" if kind == "higher" else "supported")
    [note] = contrasts(runs, PPL, ["noise"], margin="5%")["note"]
    assert note == NOT_CLEAR


def test_one_seed_gives_a_direction_but_no_verdict() -> None:
    row = judge_first(runs_with_means({0.0: 100, 0.5: 150}, seeds=1), claim("lower", [0.5], [0.0]))
    assert (row["n"], row["verdict"], row["estimates"]) == (1, "not tested", "against")
    assert row["reason"] == ONE_SEED
    assert math.isnan(row["p"])


def test_an_undecided_claim_states_the_smallest_detectable_effect() -> None:
    runs = runs_with_means({0.0: 100, 0.5: 100.1}, seeds=3, spread=1)
    row = judge_first(runs, claim("higher", [0.5], [0.0]))
    detectable = contrasts(runs, PPL, ["noise"])["detectable"].item()
    assert row["verdict"] == "undecided"
    assert row["reason"].endswith(") at the level 5 %")
    assert f"smallest detectable effect {detectable:.2g} validation perplexity (" in row["reason"]


def test_an_effect_that_a_share_cannot_have_is_not_said_to_be_detectable() -> None:
    """A share of tokens changes by 1 at most, and its change between two places by 2."""
    runs = runs_with_means({0.0: 0.5, 0.5: 0.5}, seeds=3, spread=0.4).rename(columns={PPL: "val/accuracy"})
    row = judge_first(runs, replace(claim("higher", [0.5], [0.0]), metric="val/accuracy"))
    [found] = [each for _, each in contrasts(runs, "val/accuracy", ["noise"]).iterrows()]
    words = "smallest detectable effect larger than validation accuracy can change, at the level 5 %"
    assert row["reason"] == words
    assert contrast_sentence(found, "", unit="validation accuracy", up="better", down="worse").endswith(words)
    assert found[["detectable", "detectable_high"]].tolist() == [math.inf, math.inf]
    smaller = runs.assign(**{"val/accuracy": runs["val/accuracy"] / 5})
    assert 0.1 < contrasts(smaller, "val/accuracy", ["noise"])["detectable"].item() < 1
    floor = noise_floor(smaller[smaller["noise"] == 0.0], ["val/accuracy"], seeds=(2, 100))
    assert floor.iloc[0, -2] == math.inf > floor.iloc[0, -1]


@pytest.mark.parametrize(("kind", "against"), [("higher", {"tests": 2}), ("lower", {"named": 2})])
def test_what_is_detectable_and_the_seeds_needed_count_all_comparisons_of_a_claim(
    kind: str, against: dict[str, int]
) -> None:
    """To support a claim, all comparisons must hold. To contradict it, one must fail, at the level divided by two."""
    runs = runs_with_means({0.0: 100, 0.1: 99.4, 0.5: 99.4}, seeds=8, spread=1, draw=1)
    row = judge_first(runs, claim(kind, [0.1, 0.5], [0.0]))
    values = runs.pivot_table(PPL, "seed", "noise")
    pairs = values[[0.1, 0.5]].sub(values[0.0], axis=0)
    sure = pairs.mean() / pairs.std()
    shown = pairs[sure.idxmin() if kind == "higher" else sure.idxmax()]
    assert row["difference"] == pytest.approx(shown.mean())
    effect = detectable_effect(8, named=2) * shown.std()
    assert f"smallest detectable effect {effect:.2g} validation perplexity (" in row["reason"]
    assert row["estimates"] == ("against" if kind == "higher" else "as claimed")
    expected = seeds_for(Prediction(0, math.inf, abs(shown.mean()) / shown.std(), **against))
    assert row["seeds needed"] == pytest.approx(expected, abs=1)  # several comparisons are simulated


def test_no_number_of_seeds_decides_a_claim_that_only_some_estimates_fit() -> None:
    runs = runs_with_means({0.0: 100, 0.1: 99.9, 0.5: 100.3}, seeds=6, spread=1)
    row = judge_first(runs, claim("lowest", [0.1, 0.5]))
    assert (row["estimates"], row["verdict"]) == ("mixed", "undecided")
    assert math.isnan(row["seeds needed"])


@pytest.mark.parametrize(("last", "margin"), [(0.0, 0.06), (0.13, 0.01)])  # supported, contradicted
def test_the_seeds_that_a_claim_with_a_margin_needs_reach_the_power(last: float, margin: float) -> None:
    """The power is simulated: of the two one-sided tests, or of the two-sided test that the difference is outside."""
    differences = np.array([-0.12, 0.1, -0.05, 0.08, last])
    rows = [(noise, seed, 3 + noise * differences[seed]) for noise in (0, 1) for seed in range(5)]
    runs = pd.DataFrame(rows, columns=["noise", "seed", PPL]).assign(experiment="x", status="finished", folder="")
    needed = int(judge_first(runs, claim("equivalent", [1], [0], margin=margin))["seeds needed"])

    def share(n: int) -> float:
        drawn = np.random.default_rng(0).normal(differences.mean(), differences.std(ddof=1), (1500, n))
        error = drawn.std(1, ddof=1) / math.sqrt(n)
        to_end = (drawn.mean(1) + margin) / error, (margin - drawn.mean(1)) / error
        inside = np.minimum(*to_end) > stats.t.isf(0.05, n - 1)
        outside = np.minimum(*to_end) < -stats.t.isf(0.025, n - 1)
        return float((inside if abs(differences.mean()) < margin else outside).mean())

    assert share(needed) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    ("means", "tested", "words"),
    [
        ({0.0: 100, 0.5: 100}, claim("higher", [0.5], [0.0]), "the same in every seed, no difference"),
        ({0.0: 100, 0.5: 100}, claim("equivalent", [0.5], [0.0], margin=1), "the same in every seed, no difference"),
        ({0.0: 0, 0.5: 0.0499}, claim("higher", [0.5], [0.0]), "the same in every seed, larger by 0.0499"),
        ({0.0: 0, 0.5: 0.0499}, claim("lower", [0.5], [0.0]), "the same in every seed, larger by 0.0499"),
    ],
)
def test_a_difference_that_is_the_same_in_every_seed_does_not_test_a_claim(
    means: dict[Any, float], tested: ClaimConfig, words: str
) -> None:
    """Nothing tells how far chance could move it: a metric with few values may be equal in all runs by chance."""
    runs = runs_with_means(means, spread=0)
    row = judge_first(runs, tested)
    assert row["verdict"] == "not tested"
    assert math.isnan(row["p"])
    assert words in evidence_sentence(row)
    assert NO_SPREAD in evidence_sentence(row)
    noisy = runs.assign(**{"val/loss": np.random.default_rng(0).normal(size=len(runs))})
    other = replace(claim("higher", [0.5], [0.0]), metric="val/loss")
    table = judge(noisy, [tested, other])
    assert table["p Holm"].iloc[1] == table["p"].iloc[1]


def test_equal_runs_whose_level_varies_are_equivalent_within_a_share_of_it() -> None:
    same = runs_with_means({0.0: 100}, spread=3)
    both = pd.concat([same, same.assign(noise=0.5)], ignore_index=True)
    row = judge_first(both, claim("equivalent", [0.5], [0.0], margin="1%"))
    assert row["verdict"] == "supported"
    assert 0 < row["p"] < 0.05


def test_a_missing_run_costs_one_pair_and_is_named() -> None:
    runs = as_runs(read_published("noise_runs"))
    lost = (runs["noise"] == 0.5) & (runs["lb"] == 0.0) & (runs["seed"] == 44)
    row = judge_first(runs.assign(**{PPL: runs[PPL].mask(lost)}), claim("higher", [0.5], [0.0]))
    assert row["n"] == 3
    assert row["reason"] == "1 of 6 pairs have no value on a side: seed 44 at lb=0.0; 1.4 degrees of freedom"
    complete = judge_first(runs, claim("higher", [0.5], [0.0]))
    assert row["difference"] == pytest.approx(complete["difference"], rel=0.05)
    assert row["verdict"] == complete["verdict"] == "supported"


def test_three_unusable_runs_of_twenty_four_leave_all_seeds() -> None:
    """One missing, one failed and one NaN run once left a claim with a single seed."""
    runs = [
        runs_with_means({0.0: 100, 0.1: 103}, seeds=3, draw=draw).assign(
            lb=draw, **{PPL: lambda t, d=draw: t[PPL] + 9 * d}
        )
        for draw in range(4)
    ]
    table = pd.concat(runs, ignore_index=True)
    assert len(table) == 24
    table.loc[7, PPL] = math.nan
    table.loc[16, "status"], table.loc[16, PPL] = "failed", math.nan
    row = judge_first(table.drop(index=0), claim("higher", [0.1], [0.0]))
    assert (row["n"], row["verdict"]) == (3, "supported")
    assert row["reason"].startswith("3 of 12 pairs have no value on a side: seed 0 at lb=0; ")


def test_missing_runs_do_not_shift_a_claim() -> None:
    """The interval covers the true difference 95 times in 100, though the effect depends on what is missing."""
    rng, studies, covered = np.random.default_rng(0), 100, 0
    for draw in range(studies):
        parts = []
        for lb, effect in ((0.0, 0.0), (0.1, 1.0), (0.2, 5.0)):
            part = runs_with_means({0.0: 100, 0.5: 100 + effect}, seeds=5, draw=10 * draw + int(10 * lb), spread=1)
            parts.append(part.assign(lb=lb))
        runs = pd.concat(parts, ignore_index=True)
        runs = runs.drop(index=rng.choice(runs.index[runs["lb"] == 0.2], 2, replace=False))
        row = judge_first(runs, claim("higher", [0.5], [0.0]))
        covered += row["ci_low"] <= 2.0 <= row["ci_high"]
    assert covered >= stats.binom.ppf(0.001, studies, 0.95)


def test_compared_routers_are_labeled_causal_or_not() -> None:
    runs = runs_with_means({"softk": 100, "expert_choice": 100}, factor="router")
    runs = runs.assign(causal=runs["router"] != "expert_choice")
    [equivalence] = [each for each in experiment_claims("experiment_c") if each.kind == "equivalent"]
    assert judge_first(runs, equivalence)["compared"] == "router expert_choice (not causal) vs softk"


def test_a_claim_has_the_spelling_of_levels_that_the_runs_have() -> None:
    """A report says 0.0 everywhere, also if a claim says 0. Contrasts within the levels of a claim are found too."""
    runs = pd.concat(
        [runs_with_means({0.0: 100, 0.5: 103}, draw=each).assign(lb=lb) for each, lb in enumerate((0.0, 1.0))]
    )
    claimed = claim("higher", [0.5], [0], within={"lb": [0]})
    assert judge_first(runs, claimed)["compared"] == "noise 0.5 vs 0.0 at lb=0.0"
    table = contrasts(runs, PPL, ["noise", "lb"])
    left = contrasts_without_claim(table, [as_spelled(claimed, runs)])
    assert "lb=0.0" not in [*left.loc[left["factor"] == "noise", "within"]]
    assert len(left) == len(table) - 1


def test_contrasts_without_a_claim_are_post_hoc() -> None:
    runs = as_runs(read_published("noise_runs"))
    table = contrasts(runs, PPL, ["noise", "lb"])
    post_hoc = contrasts_without_claim(table, [claim("higher", [0.5], [0.0])])
    assert set(zip(post_hoc["factor"], post_hoc["level"], strict=True)) == {("noise", 0.1), ("lb", 0.01)}
    assert contrasts_without_claim(table, [claim("lowest", [0.0])])["factor"].unique().tolist() == ["lb"]
    assert len(contrasts_without_claim(table.assign(metric="val/loss"), [claim("lowest", [0.0])])) == len(table)
    routers = pd.DataFrame([{"metric": PPL, "factor": "router", "level": "b (not causal)", "reference": "a"}])
    claim_about_routers = ClaimConfig(text="", metric=PPL, factor="router", levels=["a"], than=["b"], kind="lower")
    assert contrasts_without_claim(routers, [claim_about_routers]).empty


def test_a_claim_that_keeps_its_words_is_told_from_the_earlier_one() -> None:
    """Seeds 4 to 6 were added on another day with the opposite claim."""
    planned = [replace(claim(kind, [0.5], [0.0]), text="a") for kind in ("higher", "lower")]
    rng, rows = np.random.default_rng(0), []
    for seed, noise in product(range(1, 7), (0.0, 0.5)):
        later = seed > 3
        row = {"folder": f"{seed} {noise}", "seed": seed, "noise": noise, PPL: 100 + 9 * noise + rng.normal()}
        rows.append(row | {"claims": json.dumps([asdict(planned[later])]), "started": f"2026-01-0{1 + later}"})
    runs = pd.DataFrame(rows).assign(experiment="e", status="finished")
    table = judge_planned(runs)
    assert table["claim"].nunique() == 1
    assert table["changed"].tolist() == [True, False]
    before, after = sorted(judgments(table, pd.DataFrame(), PPL), key=lambda each: each.row or 0)
    assert before.title == f"{after.title} (before it was changed)"
    assert not judge_planned(runs[runs["seed"] < 4])["changed"].any()


@cache
def grid(experiment: str, *overrides: str) -> list[Cell]:
    """Return the cells of an experiment at one seed. Hydra takes long, so equal grids are composed only once."""
    return read_cells([f"experiment={experiment}", f"out={OUT}", "seed=0", *overrides]) or []


@pytest.fixture
def sweep(tmp_path: Path, finished_ablation: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes the records of an experiment's cells, with made-up results."""
    results = finished_ablation / "temperature_ablation" / "results.csv"
    monkeypatch.setattr("moe.launch.resolvers.results_of", lambda *_: str(results))

    def write(experiment: str, *overrides: str, seeds: tuple[int, ...] = (42, 43)) -> pd.DataFrame:
        cells = [
            cell._replace(
                config=replace(cell.config, seed=seed), folder=tmp_path / cell.folder.relative_to(OUT) / str(seed)
            )
            for cell in grid(experiment, *overrides)
            for seed in seeds
        ]
        rng = np.random.default_rng(0)
        claims = [each for cell in cells for each in cell.config.claims]
        domains = {domain for each in claims for domain in each.within.get("domain", [])}
        names = {each.metric for each in claims} | {f"test/loss/{domain}" for domain in domains}
        for cell in cells:
            cell.folder.mkdir(parents=True, exist_ok=True)
            write_run_record(cell, "running")
            at_once = {"started": "2026-01-01T00:00:00+00:00", "seconds": 1.0}  # so that speeds can be compared
            change_record(cell.folder, status="finished", **at_once)
            final = {name: rng.normal(100, 1) for name in names}
            write_metrics(cell.folder, final)
        return load_runs([tmp_path])

    return write


@pytest.mark.parametrize("experiment", [name for name in WITH_CLAIMS if name != "finetuning"])  # needs a checkpoint
def test_every_experiment_can_judge_all_its_claims(experiment: str, sweep) -> None:
    narrowed = NARROWED.get(experiment, [])
    runs = sweep(experiment, *narrowed, seeds=(42, 43, 44))
    cell = grid(experiment, *narrowed)[0]
    planned = [(each, len(members)) for each, members in planned_claims(runs)]
    assert planned == [(each, len(runs)) for each in cell.config.claims]
    table = judge_planned(runs)
    assert table["claim"].tolist() == [each.text for each in experiment_claims(experiment)]
    assert (table["experiment"] == experiment).all()
    assert (table["n"] == 3).all()
    assert table["p Holm"].notna().all()


def test_claimed_metrics_exist_and_experiments_with_claims_are_known() -> None:
    claimed = {each.metric for name in WITH_CLAIMS for each in experiment_claims(name)}
    assert all(lookup(metric) for metric in claimed)
    assert [name for name in options("experiment") if "\nclaims:" in read_experiment(name)] == WITH_CLAIMS


def test_claims_about_stability_use_agreement_beyond_chance() -> None:
    """Claims about stability use agreement beyond chance, because an uneven load alone makes choices agree."""
    claimed_metrics = {
        each.metric for name in ("spectra_ablation", "spectra_sweep_e") for each in experiment_claims(name)
    }
    assert "routing/consistency_kappa" in claimed_metrics
    assert "routing/consistency" not in claimed_metrics


def test_a_claim_added_later_is_judged_by_later_runs_only(sweep) -> None:
    override = "claims=[{text: new, metric: val/perplexity, factor: noise, levels: [0.5], than: [0.0], kind: higher}]"
    sweep("noise_lb_seed", "lb=0.01", seeds=(42, 43, 44))
    runs = sweep("noise_lb_seed", "lb=0.01", override, seeds=(45, 46))
    table = judge_planned(runs).set_index("claim")
    assert table.loc["new", "n"] == 2
    assert table.loc["Noise 0.5 raises perplexity", "n"] == 3
    assert len(runs) == 15


def test_all_experiments_are_corrected_together_and_runs_without_claims_judge_none(sweep) -> None:
    """All claims of a report share 5 %, and runs that recorded no claim judge none."""
    part_of_the_grid = ["noise=0.0,0.5", "lb=0.0,0.01"]
    runs = sweep("noise_lb_seed", "claims=[]", *part_of_the_grid)
    assert planned_claims(runs) == []
    assert planned_claims(sweep("noise_lb_seed", *part_of_the_grid)) == [], (
        "claims are recorded when a run starts, and never added later"
    )
    assert judge_planned(runs).empty
    runs = sweep("temperature_schedules")
    assert set(judge_planned(runs)["experiment"]) == {"temperature_schedules"}
    shutil.rmtree(Path(runs.loc[runs["experiment"] == "noise_lb_seed", "folder"].iloc[0]).parent.parent)
    runs = sweep("noise_lb_seed", *part_of_the_grid)
    table = judge_planned(runs)
    assert set(table["experiment"]) == {"noise_lb_seed", "temperature_schedules"}
    own = table["source"].str.startswith("our own")
    assert 0 < own.sum() < len(own)
    together = corrected(table["p"], own.to_numpy(dtype=int))
    assert table["p Holm"].tolist() == pytest.approx(together.tolist(), nan_ok=True)


def test_the_claims_of_runs_are_a_fact_and_no_factor(sweep) -> None:
    runs = sweep("noise_lb_seed", "lb=0.0", "noise=0.0")
    runs["claims"] = [f"[{number}]" for number in range(len(runs))]
    assert "claims" not in varied_factors(runs)


@pytest.mark.parametrize(
    ("metric", "when"),
    [
        ("val/loss_last_3", "there are fewer than three"),
        ("routing/load_cv/pooled", "layers differ in their number of experts"),
    ],
)
def test_a_claim_about_a_metric_without_values_says_when_it_has_none(metric: str, when: str) -> None:
    runs = runs_with_means({0.0: 1.0, 0.5: 2.0}).assign(**{metric: math.nan})
    row = judge_first(runs, replace(claim("higher", [0.5], [0.0]), metric=metric))
    assert row["verdict"] == "not tested"
    assert row["reason"].startswith(f"{metric} is null in every run: null if {when}")
