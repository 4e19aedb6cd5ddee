"""Tests that the benchmarks run and measure what they claim to measure: `pytest -m bench`. None requires a speed."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from moe.analysis.studies.published import read_published
from moe.bench import analyze, dispatch, errors, footprint, jobs, suite
from moe.bench.analyze import write_runs
from moe.bench.dispatch import measure_dispatch
from moe.bench.growth import exponent, measure_point
from moe.bench.layer import layer_passes, least_saved_bytes
from moe.bench.profile import host_waits, profile_step
from moe.bench.questions import GRIDS, QUESTIONS, STEPS, Shape
from moe.bench.routers import router_speeds
from moe.bench.step import IN_TRAINING, bare_step, measure_steps
from moe.bench.timing import medians, product_flops, relative_table, time_in_turns
from moe.checks import ConfigError
from moe.config.schema import Config
from moe.config.sections import DataConfig, OptimizerConfig
from moe.options import OneLineParser
from moe.results.conditions import varied_factors
from moe.results.table import load_runs, read_event_tables

pytestmark = pytest.mark.bench

PUBLISHED_DROP_RATES = read_published("drop_rates").set_index(["num_experts", "k"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_variant_runs(dtype: torch.dtype) -> None:
    shape = Shape(4, 2, 16, 16, 32)
    passes = layer_passes(shape, dtype=dtype)
    seconds = time_in_turns([(name, layer_pass.forward_and_backward) for name, layer_pass in passes.items()], rounds=1)
    assert {"dense", "MoE", "Mixtral, grouped_mm"} <= set(seconds)
    assert all(value > 0 for value in seconds.values())
    assert all(layer_pass.saved_bytes() > least_saved_bytes(shape, dtype) for layer_pass in passes.values())


def test_saved_bytes_of_a_dense_layer_count_each_tensor_once_and_no_parameters() -> None:
    """A dense SwiGLU layer saves its input and four hidden vectors: gate, silu(gate), up and their product."""
    shape = Shape(4, 2, 16, 8, 32)
    dense = layer_passes(shape, dtype=torch.float32)["dense"]
    assert dense.saved_bytes() == 4 * (32 * 16 + 4 * 32 * 2 * 8)
    assert least_saved_bytes(shape, torch.float32) == 4 * (32 * 16 + 2 * 32 * 2 * 8)


def test_the_training_loop_and_bare_steps_are_timed_in_turns(small: list[str], tmp_path: Path) -> None:
    seconds, tokens, flops, dtype = measure_steps(
        [key for key in small if not key.startswith(("steps", "eval_every", "logger"))], rounds=1, folder=tmp_path
    )
    assert all(value > 0 for value in seconds.values())
    assert {IN_TRAINING, "dense", "MoE, bare loop", "part: Muon", "part: statistics"} <= set(seconds)
    assert seconds["part: statistics"] < seconds[IN_TRAINING]
    assert (tokens, dtype) == (4 * 32, torch.float32)
    assert flops > 0
    assert product_flops(dtype) > 0
    steps = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in steps]
    assert kinds == ["eval", *["train"] * 3]  # one measured round after two rounds of warm-up
    assert not list(tmp_path.glob("trace/*"))  # writing a trace would be timed as part of a step


def test_steps_of_routers_are_timed_in_pairs_with_top_k(small: list[str], tmp_path: Path) -> None:
    """Labels for an oracle and the training text for hashing are at hand. The ratio of a step to itself is about 1."""
    words = [key for key in small if not key.startswith(("steps", "eval_every", "logger", "router"))]
    words += ["model.num_experts=4"]
    speeds = router_speeds(["topk", "oracle", "hash"], words, rounds=5, folder=tmp_path)
    assert speeds["topk"] == pytest.approx(1, abs=0.3)
    assert speeds.keys() == {"topk", "oracle", "hash"}
    assert all(speed > 0 for speed in speeds.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("router", ["oracle", "hash"])
def test_bare_steps_run_with_routers_that_are_told_something(router: str, small: list[str], tmp_path: Path) -> None:
    words = [key for key in small if not key.startswith(("steps", "eval_every", "logger", "router"))]
    seconds, *_ = measure_steps([*words, f"router={router}", "model.num_experts=4"], rounds=1, folder=tmp_path)
    assert seconds["MoE, bare loop"] > 0


def test_the_profile_of_a_step_names_its_operators_and_their_times(small: list[str], tmp_path: Path) -> None:
    """The shares of all operators add up to 1, and no operator takes longer than the step."""
    found = profile_step([*small, "model.num_experts=4"], rounds=1, steps=1, folder=tmp_path)
    times = [row["ms / step"] for row in found.kernels]
    assert times == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(found.summary["ms in kernels, profiled"])
    assert sum(row["share"] for row in found.kernels) == pytest.approx(1)
    assert {"aten::mm", "aten::_log_softmax"} <= {row["kernel"] for row in found.kernels}
    assert found.summary["tokens / s"] == pytest.approx(4 * 32 / found.summary["ms / step"] * 1e3)
    assert found.waits == []
    assert not host_waits(lambda: None)


def test_a_bare_step_trains() -> None:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(vocab_size=2)
    model.device = torch.device("cpu")
    model.forward = lambda input_ids, labels: SimpleNamespace(loss=(model.weight - 3).square().mean())
    config = Config(batch_size=1, data=DataConfig(seq_len=2), optimizer=OptimizerConfig(muon_lr=None, adamw_lr=0.5))
    step = bare_step(model, config)
    before = (model.weight - 3).abs().sum()
    for _ in range(4):
        step()
    assert (model.weight - 3).abs().sum() < before - 1


def test_variants_are_timed_in_turns_and_the_first_rounds_do_not_count() -> None:
    order: list[str] = []
    variants = [(name, lambda name=name: order.append(name)) for name in "ab"]
    assert set(time_in_turns(variants, rounds=3)) == {"a", "b"}
    assert order == ["a", "b"] * 5
    assert medians({"a": [100.0, 100.0, 1.0, 2.0, 9.0]}) == {"a": 2.0}


def test_the_table_gives_each_time_relative_to_the_limit() -> None:
    table = relative_table("question", {"limit": 1.0, "MoE": 2.0}, to="limit")
    assert "| MoE | 2 | 0.5 |" in table.markdown()


def test_exponents_are_slopes_and_flops_grow_as_computed_by_hand() -> None:
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    small = {"experts": 4, "k": 1, "batch": 1, "seq_len": 8, "rounds": 1, "threads": 1, "dim": 16}
    base, double_batch = measure_point(**small), measure_point(**{**small, "batch": 2})
    double_experts = measure_point(**{**small, "experts": 8})
    assert base.seconds > 0
    assert base.gigabytes >= 0
    newton_schulz = 2 * base.flops - double_batch.flops  # the part that does not grow with the batch
    attention, expert, router = 30 * 16**3, 4 * 16**2 * 32 + 34 * 16**3, 4 * 4**2 * 16 + 34 * 4**3  # for one matrix
    assert newton_schulz == pytest.approx(4 * (4 * attention + 4 * 2 * expert + router))
    assert double_experts.flops > base.flops


def test_commands_are_timed_and_a_failed_command_raises(small: list[str], tmp_path: Path) -> None:
    settings = [*small, "steps=1"]
    assert 0 < jobs.seconds_to_first_step([*settings, f"out={tmp_path}"], tmp_path) < 300
    with pytest.raises(subprocess.CalledProcessError):
        jobs.time_training(["seed=abc"])


@pytest.mark.parametrize(("experts", "k"), PUBLISHED_DROP_RATES.index)
def test_published_drop_rates_are_reproduced_within_sampling_error(experts: int, k: int) -> None:
    """Measured drop rates differ from the published ones by at most four standard errors.

    Each of the two rates comes from one draw of 32,768 tokens, so their difference has sqrt(2) times the error of one.
    """
    tokens = 32_768
    for column, published in PUBLISHED_DROP_RATES.loc[(experts, k)].items():
        capacity = float(str(column).removeprefix("cf_"))
        row = measure_dispatch(experts=experts, k=k, capacity=capacity, tokens=tokens, dim=4, seed=0, iterations=1)
        load = tokens * k / experts
        error = math.sqrt(2 * (1 - k / experts) / load / experts)
        assert row["avg_drop_rate"] == pytest.approx(published, abs=4 * error), column


def test_the_sweep_writes_the_published_keys_and_figures(tmp_path: Path) -> None:
    """Lists are written with commas, as for train.py, and every combination of their values is measured."""
    command = f"--experts 4,8 --k 1,2 --capacity 1.0,1.25 --tokens 512 --dim 8 --iterations 1 --out {tmp_path}"
    parser = OneLineParser()
    QUESTIONS["dispatch"].options(parser)
    drops, _ = dispatch.answer(parser.read(command.split()))
    assert [row["E, K"] for row in drops.rows] == ["4, 1", "4, 2", "8, 1", "8, 2"]
    assert "| E, K | 1.0 | 1.25 |" in drops.markdown()
    rows = [json.loads(line) for line in (tmp_path / "capacity_cf_multi.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert drops.rows[0]["1.25"] == rows[1]["avg_drop_rate"]
    keys = "name num_experts top_k capacity_factor num_tokens hidden_dim dtype device avg_drop_rate avg_ms tokens_per_s"
    assert set(keys.split()) <= set(rows[0])
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["num_tokens"] / row["avg_ms"])
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "capacity_drop_rate_multi.png",
        "capacity_tokens_per_s_multi.png",
    ]


def test_more_experts_per_token_than_experts_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--k=8: must be at most 4, the smallest of --experts"):
        next(dispatch.answer(argparse.Namespace(k=[1, 8], experts=[4, 16])))


def test_made_up_run_folders_are_complete_and_their_analysis_is_measured(tmp_path: Path) -> None:
    write_runs(tmp_path / "experiment_a", runs=21, steps=20)
    runs = load_runs([tmp_path])
    assert (runs["status"] == "finished").all()
    assert varied_factors(runs) == ["router", "capacity", "seed"]
    assert len(runs) == 21
    evals, trains, problems = read_event_tables(runs["folder"], training=["train/loss"])
    assert (len(evals), len(trains), problems) == (21 * 11, 21 * 20, [])
    cost = analyze.measure_analysis(runs=2, steps=10)
    assert cost.cpu_seconds > 0
    assert 0.05 < cost.gigabytes < 4


def test_the_simulation_of_errors_counts_the_reports_that_name_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    null = errors.error_shares("experiment_c", 3, "a run missing", studies=2)
    assert set(null) == {"source claims", "own claims", "contrasts", "ANOVA", "anything"}
    made_up_runs = errors.null_runs

    def with_an_effect(*arguments: Any) -> pd.DataFrame:
        runs = made_up_runs(*arguments)
        return runs.assign(**{"val/perplexity": runs["val/perplexity"] + 9999 * (runs["router"] == "hash")})

    monkeypatch.setattr(errors, "null_runs", with_an_effect)
    found = errors.error_shares("experiment_c", 3, "equal", studies=1)
    assert found.pop("own claims") == 0  # the experiment has none
    assert set(found.values()) == {1.0}


def test_the_simulation_of_errors_takes_a_factor_of_two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no analysis of variance, because its contrast is the same test."""
    monkeypatch.setitem(GRIDS, "experiment_c", {"router": ["switch", "hash"]})
    assert errors.error_shares("experiment_c", 3, "equal", studies=2)["ANOVA"] == 0


def test_the_suite_measures_every_variant_of_a_step_and_keeps_what_it_has_if_one_fails(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEPS, "compile=true", ["no_such_key=1"])
    parser = OneLineParser()
    QUESTIONS["suite"].options(parser)
    words = ["--parts", "steps,layer", "--rounds", "1", "--tokens", "64", "--words", "400", "--out", str(tmp_path)]
    chosen = [word for word in small if not word.startswith("data.")]
    steps = "as configured,precision=fp32,compile=true"
    arguments = parser.read([*words, "--steps", steps, *chosen, "model=tiny", "batch_size=2", "data.seq_len=32"])
    tables = dict(suite.answer(arguments))
    assert json.loads((tmp_path / "tables.json").read_text()).keys() == tables.keys()
    assert "no_such_key" in tables["compile=true failed"][0]["error"]
    [rows] = [rows for title, rows in tables.items() if title.startswith("training step")]
    assert [row["step"] for row in rows] == ["as configured", "precision=fp32"]
    assert all(row["tokens / s"] > 0 and row["kernels / step"] > 0 for row in rows)
    assert sum(title.startswith("layer") for title in tables) == 8
    assert (tmp_path / "profile-precision-fp32.md").read_text().startswith("**kernels**")


def test_the_footprint_of_a_command_counts_the_processes_that_it_starts() -> None:
    """A child that holds 300 MB while its parent waits counts, and a command that fails is no measurement."""
    child = "import time; held = bytearray(b'x') * 300_000_000; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    found = footprint.measure([sys.executable, "-c", parent])
    assert 0.3 < found.gigabytes < 0.4
    assert 0 < found.cpu_seconds < 5
    with pytest.raises(subprocess.CalledProcessError):
        footprint.measure([sys.executable, "-c", "raise SystemExit(3)"])
