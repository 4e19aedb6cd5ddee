"""Tests of experiments A and C: the table in the routing bench's format, the Pareto front, and the figures."""

import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from run_folders import write_metrics, write_record

from moe.analysis.report.report import write_report
from moe.analysis.studies.routing_bench import frontier, overlay
from moe.launch.command_line import read_cells
from moe.results.frontier import LATE, bench_table, pareto_front, with_training_means
from moe.results.sweep_tables import write_sweep_tables
from moe.results.table import load_runs, read_event_tables

# router -> (final loss, tokens per second). Expert choice has no k and is not causal.
ROUTERS = {
    "switch": (4.50, 21_000.0),
    "topk_hard": (4.48, 16_500.0),
    "softk": (4.45, 15_000.0),
    "hash": (4.52, 17_500.0),
    "expert_choice": (4.40, 14_000.0),
}
FLOPS_PER_TOKEN = 2_000_000


def write_run(
    folder: Path, router: str, capacity: float, seed: int, *, status: str = "finished", ranks: int = 1
) -> Path:
    """Write a run of 40 steps that is evaluated every 10 steps. Its validation loss is lowest at step 30."""
    folder.mkdir(parents=True)
    loss, speed = ROUTERS[router]
    rng = np.random.default_rng(seed)
    loss += 0.02 * (1.25 - capacity) + 0.01 * rng.normal()
    speed *= 1 - 0.1 * (capacity - 1) + 0.01 * rng.normal()
    config = {
        "seed": seed,
        "capacity": capacity,
        "router": {"_target_": router} | ({} if router == "expert_choice" else {"k": 1 + (router != "switch")}),
        "model": {"dim": 128, "num_experts": 8},
    }
    write_record(
        folder,
        status=status,
        error=None if status == "finished" else "boom",
        causal=router != "expert_choice",
        choices={"router": router},
        config=config,
        flops_per_token=FLOPS_PER_TOKEN,
        ranks={"number": ranks, "layout": "replicated"},
    )
    final = {"val/loss": loss, "val/perplexity": math.exp(loss), "time/tokens_per_s": speed}
    write_metrics(folder, final)
    events = []
    for step in range(41):
        training_loss = loss + 4 * math.exp(-step / 4)
        if step:
            routing = {"train/routing/drop_rate": 1 / step, "train/routing/load_cv": 2 / step}
            train = {"train/loss": training_loss + 0.02 * rng.normal()} | routing
            events.append({"kind": "train", "step": step} | train)
        if step % 10 == 0:
            value = {10: loss + 0.3, 20: loss + 0.1, 30: loss - 0.01, 40: loss}.get(step, training_loss)
            evaluation = {"val/loss": value, "val/perplexity": math.exp(value)}
            events.append({"kind": "eval", "step": step} | evaluation)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def write_sweep(folder: Path, routers: list[str], capacities: list[float]) -> Path:
    for router in routers:
        for capacity in capacities:
            for seed in (42, 43, 44):
                write_run(folder / f"capacity={capacity},router={router},seed={seed}", router, capacity, seed)
    return folder


def load_with_training_means(folders: list[Path]) -> pd.DataFrame:
    runs = load_runs(folders)
    return with_training_means(runs, read_event_tables(runs["folder"], training=list(LATE)))


@pytest.fixture
def sweep_a(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "experiment_a", ["switch", "topk_hard", "softk"], [1.0, 1.25])


@pytest.fixture
def sweep_c(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "experiment_c", list(ROUTERS), [1.25])


def test_the_experiments_have_the_grids_of_the_routing_bench() -> None:
    a, c = (read_cells([f"experiment=experiment_{name}"]) or [] for name in "ac")
    assert len(a) == 18
    assert {(cell.choices["router"], cell.config.capacity) for cell in a} == {
        (router, capacity) for router in ("switch", "topk_hard", "softk") for capacity in (1.0, 1.25)
    }
    assert len(c) == 15
    assert {(cell.choices["router"], cell.config.capacity) for cell in c} == {
        (router, None if router == "expert_choice" else 1.25) for router in ROUTERS
    }
    limited = read_cells(["experiment=experiment_c", "capacity=1.0,1.25", "seed=42"]) or []
    assert len(limited) == 9  # expert_choice only once


def test_a_sweep_writes_the_table_of_the_routing_bench(sweep_a: Path, sweep_c: Path) -> None:
    write_run(sweep_a / "broken", "softk", 1.0, 45, status="failed")
    write_sweep_tables(sweep_a)
    write_sweep_tables(sweep_c)
    assert not (sweep_a / "expC_summary.csv").exists()
    a, c = pd.read_csv(sweep_a / "experiment_a_summary.csv"), pd.read_csv(sweep_c / "expC_summary.csv")
    for table in (a, c):
        assert ",".join(table.columns) == (
            "run,router,top_k,capacity_factor,num_experts,dim,world_size,final_val_ppl,final_val_loss,best_val_ppl,"
            "best_val_loss,best_step,median_tokens_per_s,median_eff_tflops,mean_drop_rate,mean_load_cv,log_path,"
            "seed,causal"
        )
    assert (len(a), len(c)) == (18, 15), "finished runs only"
    assert a.groupby("router")["top_k"].first().to_dict() == {"softk": 2, "switch": 1, "topk_hard": 2}
    expert_choice = c[c["router"] == "expert_choice"]
    assert expert_choice["top_k"].isna().all()
    assert not expert_choice["causal"].any()
    assert set(a["capacity_factor"]) == {1.0, 1.25}
    assert (a[["num_experts", "dim", "world_size"]] == [8, 128, 1]).all(axis=None)
    assert (a["best_step"] == 30).all()
    assert a["best_val_loss"].tolist() == pytest.approx((a["final_val_loss"] - 0.01).tolist())
    assert a["best_val_ppl"].tolist() == pytest.approx(a["best_val_loss"].map(math.exp).tolist())
    assert all(Path(path).is_file() for path in a["log_path"])


def test_flops_are_of_forward_and_backward_and_rates_of_the_second_half_of_training(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "experiment_a" / "seed=42", "softk", 1.0, 42, ranks=2)
    rates = dict.fromkeys(range(1, 5), 0.9) | {5: 0.1, 6: 0.2, 7: 0.3, 8: 0.4}
    events = [
        {"kind": "train", "step": step, "train/routing/drop_rate": rate, "train/routing/load_cv": 2 * rate}
        for step, rate in rates.items()
    ]
    events += [{"kind": "eval", "step": step, "val/loss": 1.0} for step in range(9)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_metrics(folder, {"time/tokens_per_s": 250.0})
    row = bench_table(load_with_training_means([folder])).iloc[0]
    assert row["world_size"] == 2
    assert row["median_tokens_per_s"] == 250.0
    assert row["median_eff_tflops"] == pytest.approx(3 * FLOPS_PER_TOKEN * 250.0 / 1e12, rel=1e-12)
    assert row["mean_drop_rate"] == pytest.approx(0.25), "steps 5 to 8"
    assert row["mean_load_cv"] == pytest.approx(0.5)


def test_the_pareto_front_has_the_points_that_no_other_point_beats() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 40):
        points = pd.DataFrame(rng.integers(0, 12, (size, 2)), columns=["speed", "loss"]).astype(float)
        front = pareto_front(pd.concat([points, pd.DataFrame({"speed": [99.0], "loss": [math.nan]})]), "speed", "loss")
        expected = {
            (p.speed, p.loss)
            for p in points.itertuples()
            if not any(
                q.speed >= p.speed and q.loss <= p.loss and (q.speed, q.loss) != (p.speed, p.loss)
                for q in points.itertuples()
            )
        }
        assert list(front.itertuples(index=False, name=None)) == sorted(expected)


def test_the_frontier_shows_every_seed_the_means_and_a_pareto_front_for_causal_routers_alone(sweep_c: Path) -> None:
    runs = load_with_training_means([sweep_c])
    axes = frontier(runs, "tokens_per_s").axes[0]
    seeds = [line for line in axes.lines if line.get_markersize() == 4]
    assert sorted(x for line in seeds for x in line.get_xdata()) == sorted(runs["tokens_per_s"])
    assert "lower is better" in axes.get_ylabel()
    fronts = {line.get_label(): line.get_xdata()[1:-1] for line in axes.lines if "Pareto" in str(line.get_label())}
    means = runs.groupby("router")[["tokens_per_s", "val/perplexity"]].mean()
    for label, best in (("causal", ["softk", "topk_hard", "switch"]), ("not causal", ["expert_choice"])):
        assert fronts[f"Pareto front, {label}"].tolist() == pytest.approx(means.loc[best, "tokens_per_s"].tolist())
    assert "softk, capacity 1.25 (n=3)" in axes.get_legend_handles_labels()[1]


def test_the_overlay_draws_every_run_and_the_mean_of_each_arm() -> None:
    events = pd.DataFrame(
        {"kind": kind, "step": step, "folder": folder, "seed": 42, "arm": folder[0]}
        | ({"train/loss": 3.0 - step} if kind == "train" else {"val/loss": 3.0 - step, "val/perplexity": 9.0 - step})
        for folder in ("a1", "a2", "b1")
        for step in (1, 2)
        for kind in ("train", "eval")
    )
    panels = overlay(events, "arm").axes
    runs, mean = panels[0].lines[:2]
    assert runs.get_ydata()[[0, 1, 3, 4]].tolist() == [2, 1, 2, 1]
    assert np.isnan(runs.get_ydata()[[2, 5]]).all(), "a gap separates two runs"
    assert mean.get_ydata().tolist() == [2, 1]
    assert [len(axes.lines) for axes in panels] == [2 * 2] * 3
    assert panels[0].get_legend_handles_labels()[1] == ["a (n=2)", "b (n=1)"]
    assert [axes.get_ylabel().split(" (")[0] for axes in panels] == [
        *("training loss", "validation loss", "validation perplexity")
    ]


@pytest.mark.parametrize(("sweep", "stem"), [("sweep_a", "experiment_a"), ("sweep_c", "expC")])
def test_the_report_names_the_figures_as_the_routing_bench_does(
    sweep: str, stem: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = write_report(load_runs([request.getfixturevalue(sweep)]), tmp_path / "out").read_text()
    for name in (f"{stem}_frontier", f"{stem}_frontier_tflops", f"{stem}_overlay"):
        assert f"![{name}]({name}.png)" in text
        pixels = matplotlib.image.imread(tmp_path / "out" / f"{name}.png")
        assert pixels.std() > 0.05, "something is drawn"
        edge = (pixels[0, :, :3], pixels[-1, :, :3], pixels[:, 0, :3], pixels[:, -1, :3])
        assert all((side == 1).all() for side in edge), "nothing is cut off at the border"
    assert "(not causal)" in text or stem == "experiment_a"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["default", "capacity_factorial"])
def test_any_sweep_over_routers_or_capacity_has_the_table_and_the_figures(name: str, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / name, ["softk"], [1.0, 1.25])
    write_sweep_tables(sweep)
    assert len(pd.read_csv(sweep / f"{name}_summary.csv")) == 6
    text = write_report(load_runs([sweep]), tmp_path / "out").read_text()
    assert all(f"![{name}_{kind}]" in text for kind in ("frontier", "frontier_tflops", "overlay"))
    seeds_alone = write_sweep(tmp_path / "noise_floor", ["softk"], [1.0])
    assert "frontier" not in write_report(load_runs([seeds_alone]), tmp_path / "out").read_text()


@pytest.mark.usefixtures("undrawn")
def test_the_report_says_why_a_figure_is_not_drawn(sweep_a: Path, tmp_path: Path) -> None:
    for folder in sweep_a.iterdir():
        (folder / "events.jsonl").unlink()
        write_metrics(folder, {"val/perplexity": 2.0})
    text = write_report(load_runs([sweep_a]), tmp_path / "out").read_text()
    for column in ("tokens_per_s", "tflops"):
        name = "experiment_a_frontier" + ("_tflops" if column == "tflops" else "")
        reason = "no finished run has time/tokens_per_s; speed needs more than 5 steps"
        assert f"- {name}: not drawn, {reason}" in text
    assert "- experiment_a_overlay: not drawn, no run has train/loss, val/loss, val/perplexity" in text


@pytest.mark.usefixtures("undrawn")
def test_the_frontier_is_not_drawn_with_another_factor_or_without_finished_runs(sweep_a: Path, tmp_path: Path) -> None:
    for folder in list(sweep_a.iterdir()):
        record = json.loads((folder / "run.json").read_text())
        record["config"]["lb"] = record["identity"]["lb"] = 0.1 * (record["config"]["seed"] == 44)
        (folder / "run.json").write_text(json.dumps(record))
    text = write_report(load_runs([sweep_a]), tmp_path / "out").read_text()
    assert "- experiment_a_frontier: not drawn, lb varies in addition to router and capacity" in text
    write_run(tmp_path / "none" / "experiment_c" / "seed=1", "hash", 1.25, 1, status="failed")
    runs = write_sweep_tables(tmp_path / "none" / "experiment_c")
    assert pd.read_csv(tmp_path / "none" / "experiment_c" / "expC_summary.csv").empty
    assert "expC_frontier: not drawn, no finished run" in write_report(runs, tmp_path / "out").read_text()
