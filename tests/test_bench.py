"""The benchmark runs and times what it says; how fast anything is, is not tested."""

import json
import math
from pathlib import Path

import pytest

from moe.analysis.replay import read_published
from moe.bench import analyze
from moe.bench.analyze import write_runs
from moe.bench.compare import Shape, interleave, layer_variants, step_variants, table
from moe.bench.dispatch import measure, sweep
from moe.results import history, load
from moe.summaries import varied_factors

GOLDEN = read_published("drop_rates").set_index(["num_experts", "k"])


def test_every_layer_variant_runs_once_a_round() -> None:
    medians = interleave(layer_variants(Shape(4, 2, 16, 16, 32)), rounds=1)
    assert list(medians)[:2] == ["dense, equal active FLOPs", "ours"]
    assert all(seconds > 0 for seconds in medians.values())


def test_every_step_variant_trains() -> None:
    for name, step in step_variants(64, 2, 16):
        assert step() is None, name


def test_rounds_are_interleaved_and_the_first_two_do_not_count() -> None:
    order: list[str] = []
    variants = [(name, lambda name=name: order.append(name)) for name in "ab"]
    medians = interleave(variants, rounds=3)
    assert order == ["a", "b"] * 5
    assert set(medians) == {"a", "b"}


def test_the_table_relates_everything_to_the_limit() -> None:
    text = table("question", {"limit": 1.0, "ours": 2.0})
    assert "| ours | 2.00 | 0.50 |" in text


@pytest.mark.parametrize(("experts", "k"), GOLDEN.index)
def test_published_drop_rates_are_met_within_sampling_error(experts: int, k: int) -> None:
    """One draw of 32,768 tokens here and one there: two draws differ by sqrt(2) of one's error."""
    tokens = 32_768
    for column, published in GOLDEN.loc[(experts, k)].items():
        capacity = float(str(column).removeprefix("cf_"))
        row = measure(experts=experts, k=k, capacity=capacity, tokens=tokens, dim=4, seed=0, iterations=1)
        load = tokens * k / experts
        error = math.sqrt(2 * (1 - k / experts) / load / experts)
        assert row["avg_drop_rate"] == pytest.approx(published, abs=4 * error), column


def test_the_sweep_writes_the_sources_keys_and_figures(tmp_path: Path) -> None:
    sizes = {"tokens": 512, "dim": 8, "seed": 17, "iterations": 1}
    sweep(tmp_path, experts=[4, 8], ks=[1, 2], capacities=[1.0, 1.25], **sizes)
    rows = [json.loads(line) for line in (tmp_path / "capacity_cf_multi.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    keys = "name num_experts top_k capacity_factor num_tokens hidden_dim dtype device avg_drop_rate avg_ms tokens_per_s"
    assert set(keys.split()) <= set(rows[0])
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["num_tokens"] / row["avg_ms"])
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "capacity_drop_rate_multi.png",
        "capacity_tokens_per_s_multi.png",
    ]


def test_run_folders_for_the_analysis_are_whole_and_measured(tmp_path: Path) -> None:
    write_runs(tmp_path / "experiment_a", runs=21, steps=20)
    runs = load([tmp_path])
    assert (runs["status"] == "finished").all()
    assert varied_factors(runs) == ["router", "capacity", "seed"]
    assert len(runs) == 21
    evals, trains, problems = history(runs["folder"], training=["train/loss"])
    assert (len(evals), len(trains), problems) == (21 * 11, 21 * 20, [])
    cost = analyze.measure(runs=2, steps=10)
    assert cost.cpu_seconds > 0
    assert 0.05 < cost.gigabytes < 4
