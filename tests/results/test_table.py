"""Tests of the table of runs: every run has a row, whatever the state of its folder."""

import json
import math
import os
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from run_folders import change_record, write_cells, write_metrics, write_record

from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportOptions
from moe.analysis.report.report import write_report
from moe.config.keys import flatten
from moe.results.conditions import (
    levels,
    reference_level,
    spread_table,
    summary,
    tied_factors,
    varied_factors,
    with_causality,
    with_readable_levels,
    without_causality,
)
from moe.results.sweep_tables import console_table, write_sweep_tables
from moe.results.table import ABSENT, as_csv, load_runs, read_event_tables
from moe.runs import record
from moe.runs.record import MetricsRecord


def write_run(
    folder: Path,
    *,
    status: str = "finished",
    router: str = "topk",
    variant: str | None = None,
    loss: float = 2.0,
    **config: Any,
) -> Path:
    """Write a run folder as training leaves it. The second of its three evaluations is the best."""
    folder.mkdir(parents=True)
    keys = {"seed": 42, "steps": 30, "noise": 0.0, "lb": 0.01, "capacity": None, "threads": 1} | config
    write_record(
        folder,
        status=status,
        error=None if status == "finished" else "CUDA out of memory\nsecond line",
        config=keys | {"router": {"_target_": f"moe.{router}", "k": 2}, "data": {"seed": keys["seed"], "cache": "c"}},
        choices={"router": router, "schedule": "constant", "model": "tiny", "data": "embedded", "variant": variant},
        causal=router != "expert_choice",
        commit="abc1234",
        seconds=100.0,
        train_seconds=90.0,
        peak_memory_gb=None,
        parameters={"total": 1000, "active": 500, "trainable": 250},
    )
    metrics = {
        "val/loss": loss,
        "val/perplexity": math.exp(loss),
        "val/accuracy": 0.5,
        "val/loss/prose": None,
        "routing/load_cv/pooled": 0.1,
        "routing/utilization": [[0.5, 0.5]],
    }
    write_metrics(folder, metrics)
    losses = [("eval", 10, 3.0), ("train", 15, 0.1), ("eval", 20, loss - 0.5), ("eval", 30, loss)]
    lines = [json.dumps({"kind": kind, "step": step, "val/loss": value}) for kind, step, value in losses]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Return a sweep over noise, balance weight and 2 seeds. Its folder also has the files of the sweep itself."""
    folder = tmp_path / "multirun" / "noise_lb"
    for noise in (0.0, 0.1):
        for lb in (0.0, 0.01):
            for seed in (42, 43):
                name = f"lb={lb},noise={noise},seed={seed}"
                write_run(folder / name, noise=noise, lb=lb, seed=seed, loss=2.0 + noise + 0.01 * (seed - 42))
    (folder / "multirun.yaml").write_text("{}")
    (folder / "results.csv").write_text("old")
    write_cells(folder, {path.name: {} for path in folder.iterdir() if path.is_dir()})
    return folder


def test_any_mix_of_folders_finds_every_run_once(sweep: Path) -> None:
    run = sweep / "lb=0.0,noise=0.0,seed=42"
    all_runs = sorted(str(path) for path in sweep.iterdir() if path.is_dir())
    assert sorted(load_runs([sweep.parent])["folder"]) == all_runs
    assert str(run) in load_runs([run, sweep, sweep.parent])["folder"].tolist()
    assert len(load_runs([run, sweep, sweep.parent])) == 8


def test_a_row_holds_facts_factors_and_final_metrics(sweep: Path) -> None:
    row = load_runs([sweep]).set_index("run").loc["lb=0.01,noise=0.1,seed=43"]
    assert row[["noise", "lb", "seed", "router", "router.k", "capacity", "variant"]].tolist() == [
        *(0.1, 0.01, 43, "topk", 2, "none", "none")
    ]
    assert row["causal"]
    assert row["parameters.active"] == 500
    assert row["parameters.trainable"] == 250
    assert row["val/loss"] == pytest.approx(2.11), "the last evaluation, not the best"
    assert math.isnan(row["val/loss/prose"])


def test_columns_of_one_type_are_one_array(sweep: Path) -> None:
    """With an array for each column of texts, a report on many runs takes half as long again."""
    loaded = load_runs([sweep])
    for table in (loaded, with_readable_levels(loaded.drop(columns=["threads", "data.cache"]))):
        assert {str(table[name].dtype) for name in ("folder", "status", "error")} == {"object"}
        assert table._mgr.nblocks == len({*map(str, table.dtypes)})


def test_names_of_columns_are_objects_and_no_arrays_of_pyarrow(sweep: Path) -> None:
    """With arrays of pyarrow, a report takes half as long again, although it says the same."""
    for names in (load_runs([sweep]).columns, pd.Index(["made", "later"])):
        assert getattr(names.dtype, "storage", "python") == "python"


def test_every_unfinished_run_has_a_row(sweep: Path) -> None:
    write_run(sweep / "lb=0.0,noise=0.5,seed=42", status="failed", noise=0.5, lb=0.0)
    (sweep / "lb=0.0,noise=0.5,seed=43").mkdir()
    (sweep / "lb=0.0,noise=0.5,seed=43" / "run.json").write_text('{"status": "fin')
    (sweep / "lb=0.0,noise=0.5,seed=44").mkdir()
    (sweep / "lb=0.0,noise=0.5,seed=44" / "events.jsonl").write_text("")
    (write_run(sweep / "lb=0.0,noise=0.5,seed=45", noise=0.5, seed=45) / "metrics.json").unlink()
    (write_run(sweep / "lb=0.0,noise=0.5,seed=46", noise=0.5, seed=46) / "run.json").write_text("[]")
    cells = json.loads((sweep / "sweep.json").read_text())["cells"] | {"lb=0.0,noise=0.9,seed=42": {}}
    write_cells(sweep, cells)

    runs = load_runs([sweep]).set_index("run")
    unfinished = runs[runs["status"] != "finished"].sort_index()
    assert unfinished["status"].to_dict() == {
        "lb=0.0,noise=0.5,seed=42": "failed",
        "lb=0.0,noise=0.5,seed=43": "unreadable",
        "lb=0.0,noise=0.5,seed=44": "unreadable",
        "lb=0.0,noise=0.5,seed=45": "unreadable",
        "lb=0.0,noise=0.5,seed=46": "unreadable",
        "lb=0.0,noise=0.9,seed=42": "missing",
    }
    assert unfinished["val/loss"].isna().all()
    assert unfinished["noise"].tolist() == [0.5] * 5 + [0.9], "the factors of the cell are read from the folder name"
    assert runs["seed"].map(type).eq(int).all()
    assert "no run.json" in unfinished["error"].iloc[2]
    assert "no metrics.json" in unfinished["error"].iloc[3]

    text = console_table(load_runs([sweep]))
    assert "8 of 14 runs finished" in text
    assert "failed: lb=0.0,noise=0.5,seed=42: CUDA out of memory" in text
    assert "missing: lb=0.0,noise=0.9,seed=42" in text
    assert "second line" not in text


def test_a_cell_with_a_shortened_folder_name_has_its_factors_from_the_cell_list(tmp_path: Path) -> None:
    """The digest at the end of a shortened folder name does not become a level of the last factor."""
    sweep = tmp_path / "x"
    names = {seed: f"data.source.paths=_a_,seed={seed}-0123456{seed % 10}" for seed in (42, 43, 44)}
    write_run(sweep / names[42], seed=42)
    (sweep / names[43]).mkdir()
    (sweep / names[43] / "run.json").write_text("{")
    cells = {name: {"seed": seed, "capacity": None, "router": "topk"} for seed, name in names.items()}
    write_cells(sweep, cells)
    runs = load_runs([sweep])
    assert runs["status"].tolist() == ["finished", "unreadable", "missing"]
    assert runs["seed"].tolist() == [42, 43, 44]
    assert (runs["capacity"] == "none").all()
    assert varied_factors(runs) == ["seed"]
    assert load_runs([sweep / names[43]])["status"].tolist() == ["unreadable"]


def test_an_unreadable_cell_list_is_reported(sweep: Path) -> None:
    (sweep / "sweep.json").write_text('{"cells": [')
    unfinished = load_runs([sweep]).query("status != 'finished'")
    assert unfinished["status"].tolist() == ["unreadable"]
    assert "sweep.json" in unfinished["error"].item()


def test_the_error_about_a_wrong_folder_names_the_nearest_folder(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sweep.parent / "noise_b").mkdir()  # more similar, but without runs
    with pytest.raises(ValueError, match=r"no folder .*noise_bl; the nearest is .*noise_lb$"):
        load_runs([sweep.parent / "noise_bl"])
    monkeypatch.setattr("moe.results.table.USUAL_PLACE", sweep.parent)
    with pytest.raises(ValueError, match=r"no folder noise_lb; the nearest is .*noise_lb$"):
        load_runs([Path("noise_lb")])
    with pytest.raises(ValueError, match=r"no folder .*noise_bb$"):
        load_runs([sweep / "noise_b" / "noise_bb"])
    (sweep.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no run in .*empty: a run folder holds a run\.json"):
        load_runs([sweep.parent / "empty"])


def test_incomplete_lines_are_skipped_and_the_last_event_of_a_repeated_step_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "seed=1")
    with (run / "events.jsonl").open("a") as log:
        log.write('{"kind": "eval", "step": 20, "val/loss": 1.25}\n[]\n{"kind": "eval", "st')
    empty = write_run(tmp_path / "seed=2")
    (empty / "events.jsonl").unlink()
    events, _, problems = read_event_tables([run, empty])
    assert events["step"].tolist() == [10, 20, 30]
    assert events["val/loss"].tolist() == [3.0, 1.25, 2.0]
    assert problems == [
        f"{run}/events.jsonl: line 6 skipped, incomplete or not an event",
        f"{run}/events.jsonl: line 7 skipped, incomplete or not an event",
        f"{empty}: no events.jsonl",
    ]
    assert read_event_tables([run], training=["train/loss"]).trains["step"].tolist() == [15]
    assert read_event_tables([run]).trains.empty


def test_selected_columns_equal_those_of_fully_parsed_lines_and_incomplete_lines_are_reported(tmp_path: Path) -> None:
    lines = [
        '{"kind": "train", "step": 1, "train/loss": NaN, "x": [[1, 2], [3, 4]], "train/loss/prose": 5}',
        '{"kind": "train", "step": 2, "train/loss/prose": null, "x": [], "train/loss": 1e-07}',
        '{"step": 3, "train/loss": 7.5, "kind": "train"}',
        '{"kind": "eval", "step": 3, "train/loss": -Infinity}',
        '{"kind": "train", "step": 4, "train/l{"kind": "eval", "step": 4, "train/loss": 4.0}',
        '{"kind": "train", "step": 5, "train/loss": 4.0',
        '{"kind": "eval", "st',
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    all_columns = pd.DataFrame([json.loads(line) for line in lines[:3]]).assign(folder=str(tmp_path))
    for columns in (["train/loss"], ["train/loss", "train/loss/prose"], ["x", "train/loss"], ["nothing"]):
        evals, trains, problems = read_event_tables([tmp_path], training=columns)
        expected_columns = [column for column in ("kind", "step", *columns, "folder") if column in all_columns]
        pd.testing.assert_frame_equal(trains[expected_columns], all_columns[expected_columns], check_dtype=False)
        assert set(trains) == set(expected_columns)
        assert evals["train/loss"].tolist() == [-math.inf]
        assert [problem.split(": ")[1] for problem in problems] == [
            f"line {number} skipped, incomplete or not an event" for number in (5, 6, 7)
        ]


def test_a_diverged_run_and_a_folder_without_read_permission_have_a_status(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged = sweep / "lb=0.0,noise=0.0,seed=42"
    change_record(diverged, status="failed", error="Diverged: step 7: loss is not finite")
    forbidden = sweep / "lb=0.0,noise=0.0,seed=43"
    scandir, read_text = os.scandir, record.read_text
    monkeypatch.setattr(os, "scandir", lambda path: _refuse(path) if Path(path) == forbidden else scandir(path))
    monkeypatch.setattr(
        record, "read_text", lambda path: _refuse(path) if path.parent == forbidden else read_text(path)
    )
    runs = load_runs([sweep]).set_index("run")
    assert len(runs) == 8
    assert runs["status"].value_counts().to_dict() == {"finished": 6, "diverged": 1, "unreadable": 1}
    assert "Permission denied" in runs.loc[forbidden.name, "error"]


def _refuse(path: Path | str) -> Any:
    raise PermissionError(13, "Permission denied", str(path))


def test_varied_factors_leave_out_copies_of_the_seed_free_settings_and_tied_factors(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "a", seed=1, router="topk", threads=1, z=0.1)
    b = write_run(tmp_path / "x" / "b", seed=2, router="hash", threads=2, router_rate=8, z=0.0)
    change_record(b, identity={"seed": 2})  # z does not apply to it
    write_run(tmp_path / "x" / "c", seed=2, router="topk", threads=2, z=0.1)
    runs = load_runs([tmp_path])
    assert varied_factors(runs) == ["router", "seed"]
    assert tied_factors(runs) == {"router_rate": "router", "router._target_": "router"}
    assert levels(runs["router_rate"]) == [8, "absent"]
    assert levels(runs["z"]) == [0.1, "absent"]


def test_a_key_from_after_a_run_was_recorded_has_its_default(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "old", seed=1)
    write_run(tmp_path / "x" / "new", seed=2, lb_sequence=0.0, capacity=None)
    runs = load_runs([tmp_path])
    assert runs["lb_sequence"].tolist() == [0.0, 0.0]
    assert runs["capacity"].tolist() == ["none", "none"]


@pytest.mark.usefixtures("undrawn")
def test_the_report_says_that_a_key_without_effect_follows_the_router(tmp_path: Path) -> None:
    for router, seed in product(("topk", "hash"), (1, 2)):
        folder = write_run(tmp_path / "x" / f"{router},{seed}", router=router, seed=seed)
        change_record(folder, identity={"seed": seed} | ({"noise": 0.0, "lb": 0.01} if router == "topk" else {}))
    text = write_report(load_runs([tmp_path / "x"]), tmp_path / "out").read_text()
    assert "| noise | 0.0 (×2), absent (×2) | follows router |" in text
    assert "| data.seed | 1 (×2), 2 (×2) | follows seed |" in text


def test_an_arm_stands_for_the_factors_that_it_fixes(tmp_path: Path) -> None:
    for variant, router in (("top1", "topk"), ("top2", "topk"), ("hash", "hash")):
        write_run(tmp_path / "x" / variant, router=router, variant=variant)
    runs = load_runs([tmp_path])
    assert varied_factors(runs) == ["variant"]
    assert tied_factors(runs)["router"] == "variant"


def test_a_router_that_is_causal_under_some_settings_stays_one_level(tmp_path: Path) -> None:
    """A router that is causal with drop=position but not with drop=score keeps one name.

    With two names, no two runs would differ in `drop` alone.
    """
    for drop, seed in product(("position", "score"), (1, 2)):
        folder = write_run(tmp_path / "x" / f"drop={drop},seed={seed}", drop=drop, seed=seed)
        change_record(folder, causal=drop == "position")
    runs = with_causality(load_runs([tmp_path]))
    assert runs["router"].unique().tolist() == ["topk (causal by setting)"]
    assert sorted(runs["drop"].unique()) == ["position", "score (not causal)"]
    assert without_causality("score (not causal)") == "score"
    assert varied_factors(runs) == ["drop", "seed"]


def test_an_absent_drop_policy_is_not_marked_as_not_causal(tmp_path: Path) -> None:
    """Expert choice ignores `drop`. Its level must stay `ABSENT`, so that it is compared with routers that have one."""
    for router, seed in product(("topk", "expert_choice"), (1, 2)):
        folder = write_run(tmp_path / "x" / f"router={router},seed={seed}", router=router, seed=seed)
        change_record(folder, causal=router == "topk")
    runs = load_runs([tmp_path])
    runs["drop"] = runs["router"].map({"topk": "position", "expert_choice": ABSENT})
    assert with_causality(runs)["drop"].tolist() == runs["drop"].tolist()
    assert varied_factors(with_causality(runs)) == varied_factors(runs)


def test_experiments_with_equal_cells_are_not_mixed(tmp_path: Path) -> None:
    write_run(tmp_path / "first" / "seed=42")
    write_run(tmp_path / "second" / "seed=42")
    assert varied_factors(load_runs([tmp_path])) == ["experiment"]


def test_the_summary_counts_seeds_and_names_its_ddof(sweep: Path) -> None:
    table = summary(load_runs([sweep]), ["noise", "lb"], ["val/loss"])
    assert table.columns.tolist() == ["noise", "lb", "metric", "n", "mean", "std (ddof=1)"]
    assert table["n"].tolist() == [2, 2, 2, 2]
    assert table["mean"].tolist() == pytest.approx([2.005, 2.005, 2.105, 2.105])
    assert table["std (ddof=1)"].tolist() == pytest.approx([0.01 / math.sqrt(2)] * 4)
    assert spread_table(table)["val/loss"].tolist() == ["2.0050 ± 0.0071"] * 2 + ["2.1050 ± 0.0071"] * 2
    assert "(ddof=1)" in console_table(load_runs([sweep]))


def test_the_table_shows_a_single_seed_and_a_condition_without_finite_values(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "seed=42", noise=0.0)
    write_run(tmp_path / "x" / "seed=43", noise=0.1, loss=math.nan)
    table = summary(load_runs([tmp_path]), ["noise"], ["val/loss", "val/accuracy"])
    cells = spread_table(table)
    assert cells["val/loss"].tolist() == ["2 ± –", "– (n=0)"]
    assert cells["n seeds"].tolist() == [1, 1]


def test_a_run_without_a_limit_has_the_metrics_under_a_limit_beside_runs_with_one(tmp_path: Path) -> None:
    """Without a limit, evaluation with the limit of training is evaluation without one, so nothing is missing."""
    limited = {"loss": 2.5, "perplexity": math.exp(2.5), "drop_rate": 0.2, "unrouted_rate": 0.1}
    for capacity, seed in product((1.0, None), range(42, 45)):
        folder = write_run(tmp_path / "x" / f"{capacity}{seed}", capacity=capacity, seed=seed, loss=2.0 + 0.01 * seed)
        if capacity is not None:
            metrics = MetricsRecord.read(folder / MetricsRecord.FILE).scalars()
            metrics |= {f"val_capacity/{name}": value + 0.001 * seed**2 for name, value in limited.items()}
            write_metrics(folder, metrics | {"val_capacity/drop_rate/decile3": 0.3})
    write_run(tmp_path / "x" / "failed", seed=45, status="failed")
    runs = load_runs([tmp_path]).set_index(["capacity", "seed"])
    without = runs.loc["none"].loc[42]
    assert without["val_capacity/loss"] == without["val/loss"]
    assert without["val_capacity/perplexity"] == without["val/perplexity"]
    assert without["val_capacity/drop_rate"] == without["val_capacity/drop_rate/decile3"] == 0
    assert math.isnan(without["val_capacity/unrouted_rate"]), "these runs lack that of all tokens"
    assert runs.loc[("none", 45)].filter(like="val_capacity/").isna().all(), "it did not finish"
    assert runs.loc[(1.0, 42), "val_capacity/drop_rate"] == 0.2 + 0.001 * 42**2
    options = ReportOptions({"capacity": None}, metrics=("val_capacity/loss",))
    [inputs] = collect_inputs(load_runs([tmp_path / "x"]), options)
    [row] = inputs.contrasts.query("metric == 'val_capacity/loss'").itertuples()
    assert (row.level, row.reference, row.n) == (1.0, "none", 3)
    assert load_runs([write_run(tmp_path / "y")]).filter(like="val_capacity/").empty, "no run beside has a limit"


def test_a_number_in_a_csv_file_has_at_most_12_significant_digits() -> None:
    table = pd.DataFrame({"a": [0.1 + 0.2, math.nan], "b": [1e-7 / 3, 2.0], "c": ["x", 1 / 3], "d": [1, 2]})
    assert as_csv(table) == "a,b,c,d\n0.3,3.33333333333e-08,x,1\n,2.0,0.333333333333,2\n"


def test_a_sweep_writes_its_two_tables(sweep: Path) -> None:
    write_run(sweep / "lb=0.0,noise=0.1,seed=44", status="failed", noise=0.1, lb=0.0, seed=44)
    runs = write_sweep_tables(sweep)
    written = pd.read_csv(sweep / "results.csv")
    assert len(written) == len(runs) == 9
    assert {"noise", "lb", "seed", "router", "val/loss", "routing/load_cv/pooled", "status"} <= set(written)

    noise_study = pd.read_csv(sweep / "moe_routing_noise_experiment_results.csv")
    assert ",".join(noise_study.columns) == (
        "seed,noise_std,load_balancing_weight,val_loss,val_accuracy,val_perplexity,"
        "training_time_minutes,peak_memory_gb,best_val_perplexity,expert_usage_cv"
    )
    assert len(noise_study) == 8, "finished runs only"
    assert noise_study["best_val_perplexity"].tolist() == pytest.approx(
        (noise_study["val_loss"] - 0.5).map(math.exp).tolist()
    )
    assert (noise_study["training_time_minutes"] == 1.5).all()
    assert not list(sweep.glob(".*"))


def test_a_sweep_without_a_finished_run_or_with_repeated_runs_still_gets_its_tables(tmp_path: Path) -> None:
    for lb, noise in ((0.0, 0.0), (0.0, 0.1), (0.01, 0.0)):
        write_run(tmp_path / "broken" / f"lb={lb},noise={noise}", status="failed", noise=noise, lb=lb)
    assert "0 of 3 runs finished" in console_table(write_sweep_tables(tmp_path / "broken"))
    assert pd.read_csv(tmp_path / "broken" / "moe_routing_noise_experiment_results.csv").empty
    for threads in (1, 2):
        write_run(tmp_path / "twice" / f"threads={threads}", threads=threads)
    table = console_table(write_sweep_tables(tmp_path / "twice"))
    assert "not shown: seed 42 has more than one run" in table
    assert f'pass only one of them: "{tmp_path}/twice/threads=1", "{tmp_path}/twice/threads=2"' in table


def test_the_table_of_the_noise_study_needs_noise_and_balance_weight(tmp_path: Path) -> None:
    for noise in (0.0, 0.1):
        write_run(tmp_path / f"noise={noise}", noise=noise)
    write_sweep_tables(tmp_path)
    assert [path.name for path in tmp_path.glob("*.csv")] == ["results.csv"]


@pytest.mark.parametrize("changed", ["data.source.revision", "data.corpus_sha256"])
def test_runs_that_read_different_data_never_share_a_condition(tmp_path: Path, changed: str) -> None:
    """If the text changed between two cells of a sweep, on the hub or in the same files, no mean includes both."""
    for seed in (1, 2, 3, 4):
        folder = write_run(tmp_path / "s" / f"seed={seed}", seed=seed, loss=seed / 10)
        record = json.loads((folder / "run.json").read_text())
        text = "old" if seed < 3 else "new"
        source = {"revision": text if changed == "data.source.revision" else None}
        data = {"corpus_sha256": text, "tokenizer_sha256": "same"}
        change_record(folder, config=record["config"] | {"data": {"source": source}}, data=data)
    runs = load_runs([tmp_path])
    assert varied_factors(runs) == [changed, "seed"]
    assert list(spread_table(summary(runs, [changed], ["val/loss"]))["n seeds"]) == [2, 2]


def test_runs_of_different_plug_in_code_never_share_a_condition(tmp_path: Path) -> None:
    """If the code of a router changed between two runs, its digest is a factor; if not, it is none."""
    for router, seed in product(("topk", "mine"), (1, 2)):
        folder = write_run(tmp_path / "s" / f"{router},{seed}", router=router, seed=seed)
        if router == "mine":
            change_record(folder, plugins={"mylab": {"sha256": "a" * 64, "commit": None}})
    runs = load_runs([tmp_path])
    assert runs["plugins.mylab"].tolist() == ["a" * 12] * 2 + ["absent"] * 2
    assert varied_factors(runs) == ["router", "seed"]
    assert "plugins.mylab" not in tied_factors(runs)
    change_record(tmp_path / "s" / "mine,2", plugins={"mylab": {"sha256": "b" * 64, "commit": None}})
    assert varied_factors(load_runs([tmp_path])) == ["router", "plugins.mylab", "seed"]
    change_record(tmp_path / "s" / "mine,2", plugins={})
    assert "plugins.mylab" not in load_runs([tmp_path / "s" / "topk,1"])


def test_text_that_follows_from_the_settings_is_no_factor_of_its_own(tmp_path: Path) -> None:
    """Two data settings that are varied together give four texts, but only two factors."""
    for size, vocabulary in product((100, 200), (300, 400)):
        folder = write_run(tmp_path / "s" / f"{size},{vocabulary}")
        record = json.loads((folder / "run.json").read_text())
        settings = {"source": {"chars": size}, "vocab_size": vocabulary}
        data = {"corpus_sha256": f"{size}", "tokenizer_sha256": f"{size}-{vocabulary}"}
        change_record(folder, config=record["config"] | {"data": settings}, data=data)
    assert varied_factors(load_runs([tmp_path])) == ["data.source.chars", "data.vocab_size"]


def test_numbers_sort_as_numbers_in_levels_and_in_text() -> None:
    assert levels(pd.Series([10.0, "absent", 2.0])) == [2.0, 10.0, "absent"]
    assert levels(pd.Series(["lb=0.01, noise=10.0", "lb=0.01, noise=2.0", "lb=0.0, noise=2.0"])) == [
        *("lb=0.0, noise=2.0", "lb=0.01, noise=2.0", "lb=0.01, noise=10.0")
    ]


def test_the_reference_is_the_level_that_the_user_listed_first(tmp_path: Path) -> None:
    names = {}
    for noise in (2.0, 10.0, 0.5):
        write_run(tmp_path / "x" / f"noise={noise}", noise=noise)
        names[f"noise={noise}"] = {"noise": noise}
    assert reference_level(load_runs([tmp_path]), "noise") == 0.5, "the order is unknown"
    write_cells(tmp_path / "x", names)
    runs = load_runs([tmp_path])
    assert reference_level(runs, "noise") == 2.0
    assert runs.set_index("noise")["place"].to_dict() == {2.0: 0, 10.0: 1, 0.5: 2}
    assert "place" not in varied_factors(runs)


def test_adapters_are_compared_with_none_and_what_trains_has_a_name(tmp_path: Path) -> None:
    """A null `trainable` means all, or the adapter. In cells without a run it means the same."""
    cells = {}
    for number, (adapter, trainable) in enumerate([("perft_r", None), ("none", None), ("none", "router")]):
        name, settings = f"{number}", {"trainable": trainable}
        spec = {"adapter": {"_target_": "moe.adapters.perft.Perft"}} if adapter != "none" else {}
        if number:
            (tmp_path / "x" / name).mkdir(parents=True)
            write_record(tmp_path / "x" / name, config=settings | spec, choices={"adapter": adapter})
        cells[name] = flatten(settings | spec) | {"adapter": adapter}
    write_cells(tmp_path / "x", cells)
    runs = load_runs([tmp_path]).set_index("run")
    assert runs["trainable"].to_dict() == {"0": "adapter", "1": "all", "2": "router"}
    assert reference_level(runs, "adapter") == "none"
    assert reference_level(runs, "trainable") == "adapter"


def test_the_reference_is_a_causal_router_with_a_level_of_its_own(tmp_path: Path) -> None:
    cells = {}
    for router in ("expert_choice", "switch", "hash"):
        write_run(tmp_path / "x" / router, router=router)
        cells[router] = {"router": router}
    write_cells(tmp_path / "x", cells)
    runs = load_runs([tmp_path])
    assert reference_level(runs, "router") == "switch"
    assert reference_level(with_causality(runs), "router") == "switch"
    assert reference_level(runs[runs["router"] == "expert_choice"], "router") == "expert_choice"
    assert reference_level(runs.assign(noise=["absent", 0.1, 0.0]), "noise") != "absent"
