"""Tests of the replay of published studies: it reproduces tables and gives each sentence the verdict of its numbers."""

import math
from pathlib import Path

import pandas as pd
import pytest

from moe.analysis.studies.published import (
    TOKENS_PER_STEP,
    _hash_balance,
    _judged,
    _throughput,
    _with_corrected_speed,
    as_runs,
    drop_rates,
    experiment_claims,
    judge_drops,
    noise_conditions,
    read_published,
    replay,
)
from moe.bench.dispatch import measure_grid


@pytest.fixture(scope="module")
def sentences() -> pd.DataFrame:
    return replay().sentences.set_index("sentence")


def test_the_printed_means_and_deviations_are_reproduced_with_ddof_0() -> None:
    table = noise_conditions()
    assert len(table) == 6
    assert (table["n"] == 3).all()
    for column, printed, tolerance in (
        ("perplexity", "printed mean_ppl", 0.01),  # computed from rounded values of single runs
        ("std (ddof=0)", "printed std_ppl", 0.005),
        ("expert usage CV", "printed mean_cv", 0.00005),
    ):
        assert table[column].tolist() == pytest.approx(table[printed].tolist(), abs=tolerance + 1e-9), column
    assert ((table["std (ddof=1)"] - table["printed std_ppl"]).abs() > 0.1).all(), (
        "pandas' .std has ddof=1, so it differs"
    )


def test_the_published_tables_are_complete_and_consistent() -> None:
    noise, temperature = read_published("noise_runs"), read_published("temperature_runs")
    assert (len(noise), len(temperature)) == (18, 13)
    perplexity = noise["val_loss"].map(math.exp)
    assert noise["val_perplexity"].tolist() == pytest.approx(perplexity.tolist(), rel=1e-4)
    for name in ("experiment_a", "experiment_c"):
        bench = read_published(name).dropna(subset="val_loss")
        assert bench["val_ppl"].tolist() == pytest.approx(bench["val_loss"].map(math.exp).tolist(), rel=1e-4)


def test_every_sentence_has_a_verdict_and_numbers(sentences: pd.DataFrame) -> None:
    assert set(sentences["verdict"]) == {"supported", "contradicted", "undecided", "not judged"}
    assert sentences.index.is_unique
    assert sentences["evidence"].str.contains(r"\d").all()
    claimed = {
        claim.text
        for name in ("noise_lb_seed", "temperature_ablation", "temperature_schedules", "experiment_a", "experiment_c")
        for claim in experiment_claims(name)
    }
    assert claimed <= set(sentences.index)


@pytest.mark.parametrize(
    ("sentence", "verdict", "number"),
    [
        ("Deterministic routing has the best perplexity", "supported", "-1.16 [-1.58, -0.75]"),
        ("Noise 0.5 raises perplexity by about 10 % (+14)", "supported", "+10.7%"),
        ("Balance weight 0.01 lowers the load CV", "supported", "p=0.023 (Holm 0.046)"),
        ("Balance weight 0.01 slightly helps perplexity at noise 0 and 0.1", "undecided", "p=0.53"),
        ("Noise 0.5 costs more perplexity without load balancing than with it", "undecided", "-0.38 [-4.49, 3.73]"),
        ("The interaction of noise and balance weight is limited, within 1 %", "undecided", "-1.3 ... 1.3"),
        ("About 28.4% of the parameters are active", "contradicted", "46.3%"),
        ("hash has worse perplexity than every learned router", "not judged", "6.492 vs 6.69"),
        ("expert_choice matches the perplexity of softk, within 1 %", "not judged", "expert_choice (not causal)"),
        ("softk has the best perplexity", "not judged", "one seed"),
        ("Capacity factor 1.25 improves perplexity over 1.0", "not judged", "one seed"),
        ("Capacity factor 1.25 costs negligible throughput, within 1 %", "not judged", "-4.1%"),
        ("The ranking of noise levels is the same at both balance weights", "supported", "the largest p is 0.017"),
        ("Noise, not the balance weight, is the primary driver of the degradation", "supported", "+13.9"),
        ("The temperature can reduce the load-balancing loss", "not judged", "0.06003 to 0.06017"),
        ("Temperatures above 2 converge more slowly", "not judged", "24.15 at 1"),
        ("Temperature 10 specializes experts too little", "not judged", "Gini 0.0143 at 10"),
        ("topk_hard lies between top1 and softk", "not judged", "top1 9.34, topk_hard 9.16, softk 9.06"),
        ("Larger capacity factors show diminishing returns", "supported", "experts and k, up to 1: 0.81"),
        ("K dominates the speed", "not judged", "validation"),
        ("expert_choice is about as fast as softk", "not judged", "expert_choice 136,200"),
        ("expert_choice keeps a balanced load and few drops", "not judged", "expert_choice 0.30"),
        ("softk and expert_choice have a lower load CV than top1 and topk_hard", "not judged", "softk 0.29"),
        ("softk and expert_choice alone have gate entropy, top1 and topk_hard none", "not judged", "softk 0.46"),
        ("Capacity factor 1.05 collapses the drop rate to about 0, across experts and k", "contradicted", "1.38%"),
        ("Capacity factor 1.1 collapses the drop rate to about 0, across experts and k", "supported", "9 of 9"),
        ("hash has a drop rate and a load CV near zero", "supported", "load CV 0"),
    ],
)
def test_verdict_of_each_published_sentence(sentences: pd.DataFrame, sentence: str, verdict: str, number: str) -> None:
    row = sentences.loc[sentence]
    assert row["verdict"] == verdict
    assert number in row["evidence"]


def test_sentences_of_the_temperature_study_have_no_evidence(sentences: pd.DataFrame) -> None:
    rows = sentences[sentences["source"].str.match("temperature study, (expected|key)")]
    assert len(rows) == 7
    assert (rows["verdict"] == "not judged").all()
    assert rows["evidence"].str.contains("train loss at most 0.0003, val loss up from 10.73 to at least 22.98").all()


def test_changed_numbers_change_the_verdicts() -> None:
    c = read_published("experiment_c").query("capacity_factor == 1.25")

    def verdict_on_hash(perplexity: float) -> str:
        changed = c.assign(val_ppl=c["val_ppl"].where(c["router"] != "hash", perplexity))
        [hash_sentence] = [each for each in _judged(as_runs(changed), "experiment_c") if "worse" in each.sentence]
        return hash_sentence.verdict

    assert verdict_on_hash(6.6) == verdict_on_hash(6.8) == "not judged", "one seed decides nothing"
    assert _hash_balance(c.assign(load_cv=0.1)).verdict == "undecided"
    rates = drop_rates()
    assert [each.verdict for each in judge_drops(rates.assign(avg_drop_rate=0.001))] == ["supported"] * 2
    assert [each.verdict for each in judge_drops(rates.assign(avg_drop_rate=0.02))] == ["contradicted"] * 2
    assert [each.verdict for each in judge_drops(rates.query("capacity_factor > 1.2"))] == ["undecided"] * 2


def test_drop_rates_of_this_projects_dispatcher_are_judged_too(tmp_path: Path) -> None:
    measure_grid(
        tmp_path, experts=[64, 256], ks=[1], capacities=[1.0, 1.05, 1.1], tokens=32_768, dim=2, seed=0, iterations=1
    )
    rates = pd.read_json(tmp_path / "capacity_cf_multi.jsonl", lines=True)
    low, high = judge_drops(rates)
    assert (low.verdict, high.verdict) == ("contradicted", "supported")
    assert "1 of 2" in low.evidence
    assert "(E=256, k=1)" in low.evidence


def test_the_share_of_time_in_validation_follows_from_two_evaluation_intervals() -> None:
    """Runs with two evaluation intervals give two equations for the times of a step and of an evaluation.

    Here a step takes 20 ms and an evaluation 36 s. One evaluation in 200 steps then takes 0.18 s of 0.2 s per step.
    """

    def made_up_log(interval: int) -> pd.DataFrame:
        logged_speed = interval * TOKENS_PER_STEP / (0.020 + 36 / interval)
        row = {
            "router": "softk",
            "capacity_factor": 1.25,
            "eval_interval": interval,
            "median_tokens_per_s": logged_speed,
        }
        return _with_corrected_speed(pd.DataFrame([row]))

    sentence = _throughput(made_up_log(100), made_up_log(200))
    assert "90% or more" in sentence.evidence
    assert f"to {TOKENS_PER_STEP / 0.2:,.0f}" in sentence.evidence


def test_the_published_throughput_mostly_measured_validation(sentences: pd.DataFrame) -> None:
    [row] = [row for name, row in sentences.iterrows() if str(name).startswith("Throughput")]
    assert row["verdict"] == "contradicted"
    assert "inflated 100 and 200 times: it is 74,420 to 183,520, and 93% or more" in row["evidence"]
