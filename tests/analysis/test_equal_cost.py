"""Tests of comparisons at equal cost, on curves that are known in closed form."""

import dataclasses
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_folders import write_metrics, write_record
from scipy import stats

from moe.analysis.__main__ import main
from moe.analysis.claims import _detectable, _predicted, judge, measured_claims
from moe.analysis.comparisons import compared
from moe.analysis.equal_cost import (
    ACTIVE,
    FLOPS,
    MEASURED,
    NO_EVALUATIONS,
    NOT_RECORDED,
    NOTHING_IN_COMMON,
    ONLY_AT_THE_END,
    SECONDS,
    TOTAL,
    at_cost,
    bounds_at_cost,
    difference,
    equal_cost,
    paired_sides,
    points,
    sizes,
    training_curves,
    training_points,
    unknown_flops,
)
from moe.analysis.estimates import Comparison, widened
from moe.analysis.figures.charts import charts
from moe.analysis.figures.drawing import Drawing
from moe.analysis.power import seeds_for
from moe.analysis.report.blocks import Attachment, Paragraph, TableBlock
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportOptions
from moe.analysis.report.sections.cost import (
    FROM_CURVES,
    NOWHERE,
    SPEED_COLUMNS,
    costs,
    equal_costs,
    equal_flops,
    found_speed_ups,
    speed_ups,
    why_none,
)
from moe.analysis.report.sections.cost_in_short import SAME_FLOPS, CostInShort, _about_flops, cost_in_short, in_short
from moe.analysis.sentences import UNTESTED
from moe.analysis.speed_up import NOT_APART, _points, groups, speed_up
from moe.checks import plain
from moe.config.claim import ClaimConfig
from moe.results.comparable import NOT_COMPARABLE, TOKENIZER
from moe.results.shipped import read_shipped, ship
from moe.results.table import level, load_runs, read_event_tables
from moe.results.training_flops import SPENT

ROOT = Path(__file__).parents[2]
STEPS = (0, 10, 20, 40)


def made_up(
    *, flops: dict[str, int], sizes: tuple[int, ...] = (1000,), seeds: int = 4
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs of two routers, and their evaluations: loss 5 - log2(FLOPs) / 10, plus 0.1 for router b, by seed."""
    rng = np.random.default_rng(0)
    runs, evals = [], []
    for router, per_token in flops.items():
        for size in sizes:
            for seed in range(seeds):
                folder = f"{router}{size}{seed}"
                shift = 0.1 * (router == "b") + 0.01 * seed + rng.normal(0, 0.001)
                losses = [9.0] + [loss_at(3 * per_token * 64 * step) + shift for step in STEPS[1:]]
                of_size = losses[-1] - math.log2(size / 1000) / 10
                runs.append(
                    {"folder": folder, "router": router, "seed": seed, "batch_size": 4, "grad_accum": 2}
                    | {"data.seq_len": 8, "flops_per_token": per_token, "time/tokens_per_s": 640.0}
                    | {"status": "finished", "val/loss": of_size, "model.dim": size, "causal": True, "steps": 40}
                    | {"parameters.active": size + 100 * (router == "b"), "parameters.total": 4 * size}
                    | {"experiment": "made up", "place": len(runs), "run": folder}
                )
                evals += [{"folder": folder, "step": s, "val/loss": v} for s, v in zip(STEPS, losses, strict=True)]
    return pd.DataFrame(runs), pd.DataFrame(evals)


def loss_at(flops: float) -> float:
    return 5 - math.log2(flops) / 10


def test_a_curve_has_the_training_flops_and_the_seconds_of_each_evaluation() -> None:
    runs, evals = made_up(flops={"a": 100})
    curves = training_curves(runs, evals, seconds=MEASURED)
    one = curves[curves["folder"] == "a10000"]
    assert one["step"].tolist() == [10, 20, 40], "the evaluation before training cost nothing"
    assert one[FLOPS].tolist() == [3 * 100 * 64 * step for step in (10, 20, 40)], "64 = batch 4 x accumulation 2 x 8"
    assert one[SECONDS].tolist() == [1.0, 2.0, 4.0], "64 tokens a step at 640 tokens a second"
    stated = training_curves(runs, evals, seconds=19_200.0)
    assert stated.loc[stated["folder"] == "a10000", SECONDS].tolist() == [10.0, 20.0, 40.0]
    assert training_curves(runs, evals)[SECONDS].isna().all()
    assert points(runs, curves)[FLOPS].tolist() == [3 * 100 * 64 * 40] * 4


def test_at_equal_flops_a_router_that_costs_more_is_read_earlier() -> None:
    """Both routers follow one law of compute but for 0.1, whatever a step costs."""
    runs, evals = made_up(flops={"a": 100, "b": 160})
    [row] = equal_cost(runs, training_curves(runs, evals), ["router"], {}, FLOPS).to_dict("records")
    assert (row["level"], row["reference"], row["n"]) == ("b", "a", 4)
    assert row["cost"] == 3 * 100 * 64 * 40, "the largest cost that both reached"
    assert row["share"] == pytest.approx(100 / 160)
    by_run = runs.set_index("folder")["val/loss"]
    late = np.array([by_run[f"b1000{s}"] - by_run[f"a1000{s}"] for s in range(4)]) + math.log2(1.6) / 10
    assert row["value"] == pytest.approx(late.mean(), abs=1e-9), "interpolation in the log is exact for this law"
    assert (row["low"], row["high"]) == pytest.approx(tuple(stats.ttest_1samp(late, 0).confidence_interval(0.95)))


def test_budgets_are_not_compared_at_equal_flops() -> None:
    runs, _ = made_up(flops={"a": 100, "b": 160})
    budgets = runs.assign(variant=runs["router"].map({"a": "budget_small", "b": "budget_large"}))
    assert list(paired_sides(runs, ["router"], {}, FLOPS))
    assert list(paired_sides(budgets, ["variant"], {}, FLOPS)) == []


OTHER_EXPERTS: dict[str, dict[str, object]] = {  # columns of runs whose evaluation does not tell their training FLOPs
    "dense_mixer": {"router._target_": "moe.routers.dense_mixer.DenseMixer"},
    "matryoshka": {"router._target_": "moe.routers.matryoshka.Matryoshka"},
    "a number that varies": {"routing/active_experts_std": 0.5},
    "a capacity limit": {"capacity": 1.25},
}


def older(runs: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return the runs, without recorded training FLOPs, where those of router b trained with other experts."""
    columns = {name: runs["router"].map({"b": value}) for name, value in OTHER_EXPERTS[kind].items()}
    return runs.assign(**columns)


@pytest.mark.parametrize("kind", OTHER_EXPERTS)
def test_an_older_run_that_trained_with_other_experts_is_not_compared_at_equal_flops(kind: str) -> None:
    """Its record has the FLOPs of evaluation. Others are compared, and so is this one at equal parameters."""
    runs, evals = made_up(flops={"a": 100, "b": 150, "c": 160})
    old = older(runs, kind)
    assert {names["level"] for names, *_ in paired_sides(old, ["router"], {"router": "a"}, FLOPS)} == {"c"}
    assert {names["level"] for names, *_ in paired_sides(old, ["router"], {"router": "a"}, ACTIVE)} == {"b", "c"}
    curves = training_curves(old, evals)
    assert curves.loc[curves[FLOPS].isna(), "folder"].str[0].unique().tolist() == ["b"]
    assert unknown_flops(old) == f"4 of 12 runs (`b`) are left out at equal FLOPs: {NOT_RECORDED}."
    assert unknown_flops(runs) == ""
    known = old.assign(**{"train/flops": 3e6})
    assert unknown_flops(known) == "", "newer runs record them"
    assert {names["level"] for names, *_ in paired_sides(known, ["router"], {"router": "a"}, FLOPS)} == {"b", "c"}


def test_what_each_token_of_expert_choice_takes_varies_but_their_sum_does_not() -> None:
    runs, _ = made_up(flops={"a": 100, "b": 160})
    target = "moe.routers.expert_choice.ExpertChoice"
    assert unknown_flops(runs.assign(**{"routing/active_experts_std": 1.0, "router._target_": target})) == ""


def test_recorded_flops_of_training_are_read_and_not_those_of_evaluation() -> None:
    """Router b runs more experts in the first steps than later, so that its curve is no line through 0."""
    runs, evals = made_up(flops={"a": 100, "b": 100})
    more = 1e5 * evals["folder"].str.contains("b")
    evals = evals.assign(**{"train/flops": (3 * 100 * 64 * evals["step"] + more) * (evals["step"] > 0)})
    curves = training_curves(runs, evals, seconds=19_200.0).set_index("folder")
    assert curves.loc["a10000", FLOPS].tolist() == [3 * 100 * 64 * step for step in STEPS[1:]]
    assert curves.loc["b10000", FLOPS].tolist() == [3 * 100 * 64 * step + 1e5 for step in STEPS[1:]]
    assert curves.loc["b10000", SECONDS].tolist() == pytest.approx(
        [each / 19_200 for each in curves.loc["b10000", FLOPS]]
    )
    [row] = equal_cost(runs, curves.reset_index(), ["router"], {}, FLOPS).to_dict("records")
    assert row["cost"] == 3 * 100 * 64 * 40
    assert row["share"] == pytest.approx(768_000 / 868_000), "b is read before it ends"


def test_at_equal_parameters_final_losses_are_interpolated_between_sizes() -> None:
    runs, evals = made_up(flops={"a": 100, "b": 100}, sizes=(1000, 2000, 4000))
    [row] = equal_cost(runs, training_curves(runs, evals), ["router", "model.dim"], {}, ACTIVE).to_dict("records")
    assert (row["within"], row["n"], row["cost"]) == ("", 4, 4000)
    between = math.log(4000 / 2100) / math.log(4100 / 2100)  # where 4000 lies between the sizes of router b
    assert row["value"] == pytest.approx(0.1 + 0.1 * (1 - between), abs=0.002)
    assert row["share"] == 1.0, "every run has ended"
    alone, evals = made_up(flops={"a": 100, "b": 100})
    [row] = equal_cost(alone, training_curves(alone, evals), ["router"], {}, ACTIVE).to_dict("records")
    assert (row["n"], row["note"]) == (0, "the two have no cost in common")


@pytest.mark.parametrize("cost", [ACTIVE, TOTAL])
@pytest.mark.parametrize("factor", ["model.num_experts", "model.dropout"])
def test_at_equal_parameters_what_else_changes_the_model_stays_apart(factor: str, cost: str) -> None:
    """The routers learn alike, and the second factor changes the loss by 0.5 and the active parameters by 1 %.

    Router b has a little more of them, so a curve through the levels of both factors would go up and down. It also
    lacks a run at one level of the second factor, which must not move the others.
    """
    runs, evals = made_up(flops={"a": 100, "b": 100}, sizes=(1000, 2000))
    active = runs["model.dim"] * (1 + 0.005 * (runs["router"] == "b"))
    runs = runs.assign(
        **{"parameters.active": active}, **{"val/loss": runs["val/loss"] - 0.1 * (runs["router"] == "b")}
    )
    more = runs.assign(folder=runs["folder"] + "s", **{"val/loss": runs["val/loss"] - 0.5})
    if factor == "model.num_experts":
        more = more.assign(**{"parameters.active": more["parameters.active"] * 1.01})
    lacking = (more["router"] == "b") & (more["model.dim"] == 2000) & (more["seed"] == 0)
    both = pd.concat([runs.assign(**{factor: 1.0}), more[~lacking].assign(**{factor: 2.0})])
    table = equal_cost(both, evals, ["router", "model.dim", factor], {}, cost)
    assert table["within"].tolist() == [f"{factor}=1.0", f"{factor}=2.0"]
    assert table["value"].abs().max() < 0.01
    assert {*table["factor"]} == {"router"}, "sizes are not compared at equal parameters"


def test_sizes_that_change_together_make_one_curve() -> None:
    runs, evals = made_up(flops={"a": 100, "b": 100}, sizes=(1000, 2000, 4000))
    together = runs.assign(**{"model.ffn": 2 * runs["model.dim"], "model.dropout": 0.1})
    factors = ["router", "model.dropout", "model.dim", "model.ffn"]
    assert sizes(together, factors, ACTIVE) == ["model.dropout", "model.dim", "model.ffn"]
    [row] = equal_cost(together, evals, factors, {}, ACTIVE).to_dict("records")
    [alone] = equal_cost(runs, evals, ["router", "model.dim"], {}, ACTIVE).to_dict("records")
    assert row == alone


def test_at_equal_parameters_runs_of_different_lengths_are_compared_apart() -> None:
    """Router b has longer runs alone, or lacks a seed of the shorter ones. The routers learn alike."""
    runs, evals = made_up(flops={"a": 100, "b": 100}, sizes=(1000, 2000))
    runs["val/loss"] -= 0.1 * (runs["router"] == "b")
    short = runs.assign(folder=runs["folder"] + "s", steps=10, **{"val/loss": runs["val/loss"] + 1})
    of_b, first = short["router"] == "b", short["seed"] == 0
    for kept, lengths in ((short[~of_b], 1), (short[~(of_b & first)], 2), (short, 2)):
        table = equal_cost(pd.concat([runs, kept]), evals, ["router", "model.dim", "steps"], {}, TOTAL)
        assert {*table["factor"]} == {"router"}
        assert len(table) == lengths
        assert table["value"].abs().max() < 0.01


def test_a_reference_that_has_no_finished_run_is_not_compared_yet() -> None:
    runs, evals = made_up(flops={"a": 100, "b": 100})
    unfinished = runs.assign(status=runs["router"].map({"a": "running", "b": "finished"}))
    assert list(paired_sides(unfinished, ["router"], {"router": "a"}, FLOPS)) == []
    assert equal_cost(unfinished, training_curves(unfinished, evals), ["router"], {"router": "a"}, FLOPS).empty


@pytest.mark.parametrize("evaluations", [4, 8])
def test_settings_of_one_curve_are_equal_wherever_they_are_read(evaluations: int) -> None:
    """A setting that costs 1.5 times as much is read between two points of a convex curve, the other one at its end."""

    def law(costs: np.ndarray | float) -> np.ndarray | float:
        return 2.5 + 3 * costs**-0.3

    steps = np.linspace(400 / evaluations, 400, evaluations)
    sides = [{0: pd.DataFrame({"cost": steps * cost, "loss": law(steps * cost)})} for cost in (0.015, 0.01)]
    found = difference(*sides)
    assert found is not None
    line = np.interp(math.log(4), np.log(sides[0][0]["cost"]), sides[0][0]["loss"]) - law(4)
    assert line > 0.0006, "a straight line favors the one that ends first"
    assert abs(found.value) < 0.00003
    earlier, later = steps[steps < 400 / 1.5][-1], steps[steps > 400 / 1.5][0]
    assert found.gap == pytest.approx(law(earlier * 0.015) - law(later * 0.015))
    same = difference(sides[1], sides[1])
    assert same is not None
    assert same.gap == 0.0, "both are read at a point"
    assert difference(sides[0], {}) is None, "no seed has both sides"


def write_runs(place: Path, runs: pd.DataFrame, evals: pd.DataFrame) -> pd.DataFrame:
    """Write the folders of made-up runs, and return them as they are read."""
    for run in runs.to_dict("records"):
        folder = place / "made_up" / run["folder"]
        folder.mkdir(parents=True)
        config = {"seed": run["seed"], "batch_size": 4, "grad_accum": 2, "data": {"seq_len": 8}, "steps": run["steps"]}
        config["model"] = {"dim": run["model.dim"]}
        size = {"total": 4000, "active": 1000, "trainable": 4000}
        facts = {"flops_per_token": run["flops_per_token"], "parameters": size}
        write_record(folder, choices={"router": run["router"]}, config=config, **facts)
        write_metrics(folder, {"val/loss": run["val/loss"], "time/tokens_per_s": 640.0})
        of_run = evals[evals["folder"] == run["folder"]].drop(columns="folder").to_dict("records")
        (folder / "events.jsonl").write_text("".join(json.dumps({"kind": "eval"} | event) + "\n" for event in of_run))
    return load_runs([place])


def test_the_report_compares_at_equal_cost_and_says_what_a_speed_up_rests_on(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, *made_up(flops={"a": 100, "b": 160}))
    [inputs] = collect_inputs(runs, ReportOptions(seconds=MEASURED))
    [cost] = [block.frame for block in costs(inputs) if isinstance(block, TableBlock)]
    assert cost.set_index("condition")["FLOPs per token"].to_dict() == {"router=a": "100", "router=b": "160"}
    blocks = list(equal_costs(inputs))
    [table] = [block.frame for block in blocks if isinstance(block, TableBlock)]
    assert table["equal FLOPs"][0].endswith(", read at 62%, between points 0.1 apart")
    assert list(table)[-2:] == ["equal FLOPs", "equal seconds"]
    assert "nothing else to do" in str(blocks)
    drawn = {block.name: block.figure for block in blocks if isinstance(block, Drawing)}
    assert list(drawn) == ["equal_FLOPs", "equal_seconds"]
    [axes] = drawn["equal_FLOPs"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["router b vs a (n=4), at 62%"]
    shown = plain(f"{axes.lines[0].get_xdata()[0]:+.3f}")
    assert table["equal FLOPs"][0].startswith(shown)
    blocks = list(speed_ups(inputs))
    [speed] = [block.frame for block in blocks if isinstance(block, TableBlock)]
    assert speed["level"].tolist() == ["b"]
    [figure] = [block.figure for block in blocks if isinstance(block, Drawing)]
    [axes] = figure.axes
    [point] = [line for line in axes.lines if line.get_marker() == "o"]
    shown = ["factor", "level", "verdict", "times the compute"]
    assert speed.columns[:4].tolist() == shown, "a narrow screen shows these"
    assert speed["times the compute"][0].startswith(f"{point.get_xdata()[0]:.3f} [")
    assert axes.get_xscale() == "log"
    assert charts(figure) is not None, "the page shows values"
    assert FROM_CURVES in [block.text for block in blocks if isinstance(block, Paragraph)]
    [alike] = collect_inputs(runs.assign(flops_per_token=100))
    assert list(costs(alike)) == []
    assert "the same training FLOPs and the same active parameters" in str(list(equal_costs(alike)))
    assert equal_flops(inputs, training_curves(runs, inputs.past.evals))["level"].tolist() == ["b"]
    assert equal_flops(alike, training_curves(alike.runs, alike.past.evals)).empty, "they end at equal FLOPs"


def test_a_speed_up_compares_runs_of_one_size(tmp_path: Path) -> None:
    """Both routers have one loss at a size, number of steps and seed. A mean over both sizes is lower without 1000."""
    runs, _ = made_up(flops={"a": 100, "b": 100}, sizes=(1000, 2000))
    lengths = [runs.assign(steps=steps, folder=runs["folder"] + f"_{steps}") for steps in (100, 200, 400, 800)]
    runs = pd.concat(lengths, ignore_index=True).astype({"folder": str})
    runs["flops_per_token"] = runs["model.dim"] // 10
    noise = np.random.default_rng(0).normal(0, 0.001, len(runs))
    runs["val/loss"] = 2 + 9 * runs["steps"] ** -0.35 + 40 / runs["model.dim"] ** 0.5 + 0.1 * runs["seed"] + noise
    runs = runs.assign(run=runs["folder"], place=range(len(runs)))
    lacking = runs[(runs["router"] == "a") | (runs["model.dim"] == 2000)]
    lacking = lacking[lacking["folder"] != "b20000_400"]
    evals = lacking.rename(columns={"steps": "step"})[["folder", "step", "val/loss"]]
    [inputs] = collect_inputs(write_runs(tmp_path, lacking, evals))
    short = cost_in_short(inputs)
    assert short is not None
    named = [f"router b vs a at model.dim=2000, {each} FLOPs" for each in short.speed_ups["training FLOPs"]]
    assert list(short.quotes) == named, "each budget has its own"
    [(names, found, reason)] = found_speed_ups(inputs, training_curves(inputs.runs, inputs.past.evals))
    assert (names["within"], len(found), reason) == ("model.dim=2000", 4, "")
    assert not any(each.of_training for each in found)
    assert [each.verdict for each in found] == [NOT_APART] * 4
    assert [each.times.value for each in found] == pytest.approx([1] * 4, abs=0.01)
    assert [len(each.doubts) for each in found] == [0, 0, 1, 0], "seed 0 is left out where one side lacks it"


@pytest.mark.parametrize(
    ("key", "reason"),
    [(TOKENIZER, "the tokenizers differ, and"), ("data.max_val_blocks", "the validation texts differ,")],
)
def test_losses_that_are_not_comparable_have_no_speed_up_and_the_reason_is_said(
    tmp_path: Path, key: str, reason: str
) -> None:
    """Router b has other tokens or another text than router a. A third router c shares them with a."""
    runs = write_runs(tmp_path, *made_up(flops={"a": 100, "b": 160, "c": 130}))
    runs = runs.assign(**{"val/bits_per_byte": runs["val/loss"] / 2})
    [three] = collect_inputs(runs.assign(**{key: runs["router"].map({"a": "1", "b": "2", "c": "1"})}))
    [two] = collect_inputs(three.runs[three.runs["router"] != "c"])
    curves = training_curves(runs, three.past.evals)
    assert [(each.names["level"], len(each.found)) for each in found_speed_ups(three, curves)] == [("b", 0), ("c", 1)]
    [alone] = (each.found for each in found_speed_ups(two._replace(runs=runs[runs["router"] != "b"]), curves))
    assert [each.found for each in found_speed_ups(three, curves)][1] == alone, "a row that is not there widens nothing"
    assert reason in str(list(speed_ups(two)))
    assert f"No two settings that differ in FLOPs can be compared at equal FLOPs (not comparable: {reason}" in str(
        list(equal_costs(two))
    )
    short = cost_in_short(two)
    assert short is not None
    assert (short.reason.startswith(reason), len(short.speed_ups)) == (True, 0)
    told = str(list(in_short(short)))
    assert told.count(reason) == 2
    assert SAME_FLOPS not in told


def test_a_router_that_sees_later_tokens_has_no_verdict(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, *made_up(flops={"a": 160, "b": 100, "c": 100}))
    evals = read_event_tables(runs["folder"]).evals
    ends = evals["folder"].str.contains("[bc]1000") & (evals["step"] > 0)
    evals = evals.assign(**{"val/loss": evals["val/loss"] - 0.4 * ends})
    verdicts, flops = {}, {}
    for later in ("b", "none", "abc"):
        [inputs] = collect_inputs(runs.assign(causal=[each not in later for each in runs["router"]]))
        short = cost_in_short(inputs._replace(past=inputs.past._replace(evals=evals)))
        assert short is not None
        verdicts[later] = short.speed_ups["verdict"].tolist()
        [flops[later]] = _about_flops(short.flops)
    assert flops["none"] == flops["abc"]
    assert "has a lower loss than its reference in 2, and" in " ".join(flops["none"].split())
    assert "has a lower loss than its reference in 1, and" in " ".join(flops["b"].split())
    why = "1 is not comparable, because one side alone may use later tokens of the text"
    assert f"; {why}" in " ".join(flops["b"].split())
    assert verdicts["none"] == verdicts["abc"]
    assert verdicts["b"] == [NOT_COMPARABLE, verdicts["none"][1]]


@pytest.mark.parametrize("lengths", [(10_000,), (300, 600)])
def test_a_setting_that_is_the_reference_has_no_speed_up(lengths: tuple[int, ...], tmp_path: Path) -> None:
    """There are 100 evaluations, the last of them less than 2 % apart. Or runs have two lengths, of which the longer
    ones have another loss at the end of the shorter ones. Losses fall faster at the end of a run, with its rate.
    """
    rng = np.random.default_rng(0)
    runs, evals = [], []
    for router in "ab":
        for length, seed in product(lengths, range(4)):
            folder = f"{router}{length}{seed}"
            steps = range(length // 100, length + 1, length // 100)
            noise = 0.01 * seed + rng.normal(0, 0.001)
            losses = [loss_at(3 * 100 * 64 * s) - 0.2 * max(0, 5 * s / length - 4) + noise for s in steps]
            runs.append(
                {"folder": folder, "router": router, "seed": seed, "batch_size": 4, "grad_accum": 2, "steps": length}
                | {"data.seq_len": 8, "flops_per_token": 100 + seed, "status": "finished", "val/loss": losses[-1]}
                | {"causal": True, "place": len(runs), "run": folder, "parameters.active": 5, "parameters.total": 5}
                | {"experiment": "made up", "time/tokens_per_s": 640.0, "model.dim": 8}
            )
            evals += [{"folder": folder, "step": s, "val/loss": v} for s, v in zip(steps, losses, strict=True)]
    table, evals = pd.DataFrame(runs), pd.DataFrame(evals)
    curves = training_curves(table, evals)
    reference = table[table["router"] == "a"]
    ended, evaluations = points(reference, curves), training_points(reference, curves)
    budgets = np.unique(_points(ended, evaluations, [0, 1, 2, 3])["budget"])
    assert (np.diff(np.log(budgets)) > math.log(1.02)).all()
    assert len(budgets) > 20
    for length in lengths:
        arm = points(reference[reference["steps"] == length], curves)
        [found] = speed_up(ended, arm, evaluations=evaluations, resamples=5)
        assert found.of_training
        assert found.times == pytest.approx((1, 1, 1), abs=0.002)


def test_runs_of_one_length_are_one_budget_if_their_flops_vary_with_the_seed() -> None:
    """A router such as `matryoshka` draws the number of experts. One seed has a short run, which takes no place."""
    lengths = [(100 * length, seed) for length in (1, 2) for seed in range(4) if length == 2 or seed == 0]
    runs = pd.DataFrame([{"folder": f"{length} {seed}", "seed": seed} for length, seed in lengths])
    rows = [
        {"folder": f"{length} {seed}", "step": step, FLOPS: step * (1 + 0.1 * seed), "loss": 100 / step}
        for length, seed in lengths
        for step in (50, 100, 200)
        if step <= length
    ]
    curves = pd.DataFrame(rows)
    ended, evaluations = points(runs, curves), training_points(runs, curves)
    assert [sorted(each["seed"]) for each in groups(ended)] == [[0], [0, 1, 2, 3]]
    found = _points(ended, evaluations, [0, 1, 2, 3]).round(6)
    assert found.groupby("budget")["seed"].nunique().to_dict() == {57.5: 4, 115.0: 4, 230.0: 4}
    assert found.groupby("budget")["ended"].all().to_dict() == {57.5: False, 115.0: False, 230.0: True}


def test_a_loss_that_no_budget_reaches_is_quoted_in_words() -> None:
    row = dict.fromkeys(SPEED_COLUMNS, "") | {"factor": "router", "level": "b", "reference": "a"}
    row |= {"verdict": NOT_APART, "times the compute": NOWHERE}
    flops = pd.DataFrame(columns=["factor", "level", "reference", "within", "cell"])
    short = CostInShort(flops, pd.DataFrame([row]), reason="", left_out="", comparable=True, of_training=False)
    assert short.quotes == {"router b vs a": (NOT_APART, NOWHERE)}


def test_all_speed_ups_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.analysis.report.sections.cost.RESAMPLES", 2)
    runs = write_runs(tmp_path, *made_up(flops={f"r{k}": 100 for k in range(45)}, seeds=2))
    [inputs] = collect_inputs(runs)
    [file] = [block for block in speed_ups(inputs) if isinstance(block, Attachment)]
    assert file.content.count("\n") == 1 + 44


def test_a_claim_can_compare_at_equal_cost(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, *made_up(flops={"a": 100, "b": 160}))
    words = {"metric": "val/loss", "factor": "router", "levels": ["b"], "than": ["a"], "kind": "higher"}
    at_the_end, at_flops, at_seconds = (
        judge(runs, [ClaimConfig(text="b is worse", at=at, **words)]).iloc[0] for at in (None, "flops", "seconds")
    )
    less = at_flops["difference"] - at_the_end["difference"]
    assert less == pytest.approx(math.log2(1.6) / 10), "b was read before its end, where its loss was higher"
    assert at_seconds["difference"] == pytest.approx(at_the_end["difference"]), "both took 4 s"
    assert at_flops["compared"].endswith(", read at equal training FLOPs")
    [table] = [equal_cost(runs, training_curves(runs, read_event_tables(runs["folder"]).evals), ["router"], {}, FLOPS)]
    assert at_flops["difference"] == pytest.approx(table["value"].iloc[0])
    off = table["gap"].iloc[0] * math.log2(40 / 32)  # b is read there, a third of the way from step 20 to step 40
    assert at_flops["ci_low"] == pytest.approx(table["low"].iloc[0] - off, abs=1e-6)
    assert f"read between evaluations, so that the difference may be off by {off:.2g}" in at_flops["reason"]


def evaluated(
    steps: list[int], cost: float, *, more: float = 0.0, random: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs of settings a and b with one law. b has `cost` times the FLOPs of a, and a loss higher by `more`."""
    rng, runs, evals = np.random.default_rng(random), [], []
    for name, times, above in (("a", 1.0, 0.0), ("b", cost, more)):
        for seed in range(5):
            run = {"folder": f"/x/{name}{seed}", "v": name, "seed": seed, "steps": steps[-1], "status": "finished"}
            flops = 4e10 * times * np.array(steps)
            losses = 3 + 1.2 * (flops / 4e12) ** -0.3 + above + rng.normal(0, 0.001, len(steps))
            of_run = {"folder": run["folder"], "step": steps, "val/loss": losses, SPENT: flops}
            runs.append(run | {"val/loss": losses[-1], SPENT: flops[-1], "causal": True, "experiment": "made up"})
            evals.append(pd.DataFrame(of_run))
    return pd.DataFrame(runs), pd.concat(evals)


@pytest.mark.parametrize("kind", ["higher", "mixed"])
def test_a_claim_at_equal_cost_is_open_if_evaluations_are_too_far_apart(kind: str) -> None:
    """Otherwise each of two equal settings is worse than the other one: interpolated losses are too high."""
    direction = {"direction": "higher"} if kind == "mixed" else {}
    claim = ClaimConfig("b is worse", "val/loss", "v", ["b"], kind, than=["a"], at="flops", **direction)
    [[far]] = compared(claim, *evaluated([50, 100], cost=1.5)).pairs
    assert far.mean - far.reference_mean == pytest.approx(0.006, abs=0.002), "a straight line is too high"
    assert min(far.p_for, far.p_against) > 0.5
    assert far.low < 0 < far.high
    assert far.doubt.startswith("the evaluations beside the common cost are too far apart")
    [[near]] = compared(claim, *evaluated([*range(2, 101, 2)], cost=1.5, more=0.02)).pairs
    assert near.p_for < 0.001
    assert near.off < 0.005
    [[same]] = compared(claim, *evaluated([50, 100], cost=1.0, more=0.02)).pairs
    assert (same.off, same.p_for < 0.001) == (0, True), "both are read at an evaluation"


def test_bounds_of_a_curve_contain_its_losses_between_two_evaluations() -> None:
    """Fast and slow laws, and a loss that falls faster at the end, as with a learning rate that falls to zero."""
    costs = np.linspace(1, 4, 301)
    for law in (costs**-0.3, costs**-1.5, 5 - 0.2 * np.log(costs), np.cos(costs / 4), 1 - costs**-0.3):
        curve = pd.DataFrame({"cost": costs[::100], "loss": law[::100]})
        for cost, loss in zip(costs, law, strict=True):
            _, least, most = bounds_at_cost(curve, cost)
            assert least <= loss + 1e-12
            assert most >= loss - 1e-12
    assert at_cost(pd.DataFrame({"cost": [1.0, 2.0, 3.0], "loss": [0.3, 0.0, 0.0]}), 2.0) == 0, "no rounding error"
    assert at_cost(pd.DataFrame({"cost": [1.0, 2.0, 3.0], "loss": [0.3, 0.0, 0.0]}), 2.5) == 0
    assert bounds_at_cost(curve, 2.0) == (law[100],) * 3
    assert bounds_at_cost(curve, 9.0) == (law[-1],) * 3
    near = bounds_at_cost(pd.DataFrame({"cost": [1.0, math.e], "loss": [5.0, 4.0]}), math.exp(0.9))
    assert near == pytest.approx((4.1, 4.0, 4.2)), "shortly before the second evaluation"


@pytest.mark.parametrize(
    "words",
    [
        {"kind": "equivalent", "margin": "0.05%"},
        {"kind": "mixed", "margin": "0.05%"},
        {"kind": "higher", "size": [0.001, 0.002]},
        {"kind": "lower", "size": [0.001, 0.002]},
    ],
)
def test_a_range_that_lies_within_what_reading_leaves_open_is_not_contradicted(words: dict[str, Any]) -> None:
    """One reading lies below the range and another one above it. Each of them alone would contradict the claim."""
    claim = ClaimConfig("b", "val/loss", "v", ["b"], than=["a"], at="flops", **words)
    [[found]] = compared(claim, *evaluated([50, 100], cost=1.5)).pairs
    assert min(found.p_for, found.p_against) > 0.5
    assert found.doubt.startswith("the evaluations beside the common cost")


def test_what_more_seeds_can_tell_counts_what_reading_leaves_open() -> None:
    """The evaluations leave 0.0098 open. So a difference of 0.016 needs as many seeds as one of 0.006 at a point."""
    near, far = (
        Comparison(5, 1.016, 1.0, favor=0.016, spread=0.01, claimed_low=0.0, claimed_high=math.inf, off=off)
        for off in (0.0, 0.0098)
    )
    needed = [seeds_for(_predicted(each).deciding()) for each in (near, far)]
    assert needed[1] > needed[0] + 10
    inside = near._replace(claimed_low=-0.05, claimed_high=0.05, off=0.04)
    assert _predicted(inside)[:2] == pytest.approx((-1, 1)), "in units of the spread"
    wide = _detectable(5, 0.01, 0.0098, _predicted(far), "loss", math.inf)
    narrow = _detectable(5, 0.01, 0.0, _predicted(near), "loss", math.inf)
    assert wide != narrow


def test_a_reading_without_spread_leaves_a_claim_open() -> None:
    found = Comparison(5, 1.2, 1.0, 0.1, 0.3, p_for=0.001, p_against=1.0, favor=0.2, outside=(1.0, 1.0))
    exact = Comparison(5, 1.5, 1.0, favor=0.5, deterministic=True)
    wide = widened(found, found._replace(mean=1.1, low=0.0, high=0.2), exact)
    assert (wide.p_for, wide.low, wide.high) == (1.0, 0.0, 0.5)
    assert widened(found, found, found) == found, "all of it is read at evaluations"
    assert widened(exact, found) == exact, "not tested"


def test_only_a_reading_on_the_other_side_makes_evaluations_too_far_apart() -> None:
    """The loss may be lower by 0.08 or higher by 0.2, so that a difference of 0.14 is above zero at each reading."""
    of = {"p_against": 1.0, "claimed_low": 0.0, "claimed_high": math.inf}
    read, least, most = (
        Comparison(3, 1 + d, 1.0, d - 0.2, d + 0.2, 0.1, favor=d, spread=0.1 + d, **of) for d in (0.14, 0.06, 0.34)
    )
    found = widened(read, least, most)
    assert (found.doubt, found.off, found.spread) == ("", pytest.approx(0.08), pytest.approx(0.44))
    assert found.note.endswith("may be off by 0.2")
    across = least._replace(mean=0.99, favor=-0.01)
    assert widened(read, across, most).doubt.startswith("the evaluations beside")


def test_evaluations_of_the_shipped_studies_lie_within_the_bounds_from_their_neighbors() -> None:
    """docs/statistics.md has these numbers."""
    outside, number = list[tuple[str, float]](), 0
    for file in sorted((ROOT / "docs" / "studies").glob("*/evals.csv.gz")):
        evals = pd.read_csv(file, usecols=["folder", "step", "val/loss"]).query("step > 0").dropna()
        for _, run in evals.sort_values("step").groupby("folder"):
            cost, loss = run["step"].to_numpy(dtype=float), run["val/loss"].to_numpy()
            curve = pd.DataFrame({"cost": cost, "loss": loss})
            for place in range(1, len(run) - 1):
                _, least, most = bounds_at_cost(curve.iloc[[place - 1, place + 1]], cost[place])
                number += 1
                if (off := max(least - loss[place], loss[place] - most)) > 0:
                    outside.append((file.parent.name, off))
    assert (number, len(outside), {name for name, _ in outside}) == (4554, 47, {"scaling"})
    assert 0.021 < max(off for _, off in outside) < 0.022


def test_a_change_at_equal_cost_counts_what_interpolation_can_do_at_both_levels() -> None:
    """At each level, b may be better or worse than it is read. The change may be off by both together."""
    parts = [evaluated([50, 100], cost=1.5, random=random) for random in range(2)]
    runs = pd.concat([each[0].assign(w=w, folder=each[0]["folder"] + str(w)) for w, each in enumerate(parts)])
    evals = pd.concat([each[1].assign(folder=each[1]["folder"] + str(w)) for w, each in enumerate(parts)])
    words = {"metric": "val/loss", "factor": "v", "levels": ["b"], "than": ["a"], "at": "flops"}
    change = ClaimConfig(text="x", kind="interaction", direction="higher", within={"w": [0, 1]}, **words)
    [[both]] = compared(change, runs.reset_index(drop=True), evals).pairs
    [[one]] = compared(ClaimConfig(text="y", kind="higher", **words), *parts[0]).pairs
    assert both.off == pytest.approx(2 * one.off, rel=0.01)


def test_a_claim_at_equal_cost_reads_the_loss_under_a_limit_from_runs_without_one_too(tmp_path: Path) -> None:
    """A run without a limit is not evaluated a second time."""
    runs, evals = made_up(flops={"a": 100, "b": 160})
    of_step, limit = {"a": 3 * 64 * 100, "b": 3 * 64 * 160}, {"a": level(None), "b": 1.25}
    under = (evals["val/loss"] + 0.5).where(evals["folder"].str.startswith("b"))
    evals = evals.assign(**{"val_capacity/loss": under, SPENT: evals["step"] * evals["folder"].str[0].map(of_step)})
    runs = write_runs(tmp_path, runs, evals)
    spent = 40 * runs["router"].map(of_step)
    final = {"val_capacity/loss": runs["val/loss"], SPENT: spent}
    runs = runs.assign(capacity=runs["router"].map(limit), router="topk", **final)
    words = {"factor": "capacity", "levels": [1.25], "than": [level(None)], "kind": "higher", "at": "flops"}
    claims = [ClaimConfig(text=metric, metric=metric, **words) for metric in ("val/loss", "val_capacity/loss")]
    plain, limited = judge(runs, claims)["difference"]
    assert limited == pytest.approx(plain + 0.5)


def test_a_claim_at_equal_cost_reads_each_budget_at_its_own_cost(tmp_path: Path) -> None:
    """The runs of 40 steps differ by 0.1 and those of 20 steps by 0.3, so that one cost for all would tell 0.2."""
    runs, evals = made_up(flops={"a": 100, "b": 160})
    early = evals[evals["step"] <= 20].assign(folder="short" + evals["folder"])
    early["val/loss"] += 0.2 * early["folder"].str.contains("b")
    short = runs.assign(folder="short" + runs["folder"], run="short" + runs["run"], steps=20)
    runs = write_runs(tmp_path, pd.concat([runs, short], ignore_index=True), pd.concat([evals, early]))
    curves = training_curves(runs, read_event_tables(runs["folder"]).evals)
    table = equal_cost(runs, curves, ["router", "steps"], {}, FLOPS).set_index("within")["value"]
    assert table["steps=20"] - table["steps=40"] == pytest.approx(0.2)
    words = {"metric": "val/loss", "factor": "router", "levels": ["b"], "than": ["a"], "at": "flops"}
    within = {"steps": [20, 40]}
    higher = ClaimConfig(text="b is worse", kind="higher", **words)
    model = ClaimConfig(text="b is worse in a model", kind="mixed", direction="higher", **words)
    change = ClaimConfig(text="less so later", kind="interaction", direction="lower", within=within, **words)
    judged = judge(runs, [higher, model, change])["difference"].tolist()
    assert judged == pytest.approx([table.mean(), table.mean(), table["steps=40"] - table["steps=20"]])


def test_a_claim_at_equal_cost_has_the_same_verdict_where_only_tables_were_shipped(tmp_path: Path) -> None:
    runs, evals = made_up(flops={"a": 100, "b": 160})
    runs = write_runs(tmp_path, runs, evals.assign(**{"routing/load_cv": evals["val/loss"]}))
    words = {"text": "b is worse", "source": "our own", "factor": "router", "levels": ["b"], "than": ["a"]}
    words |= {"kind": "higher", "within": {}, "direction": None, "margin": None, "size": []}
    claims = [words | {"metric": each, "at": "flops"} for each in ("val/loss", "routing/load_cv")]
    runs = runs.assign(claims=json.dumps(claims), **{"routing/load_cv": runs["val/loss"]})
    ship(runs, tmp_path / "shipped")
    shipped, past = read_shipped(tmp_path / "shipped")
    [here], [there] = collect_inputs(runs), collect_inputs(shipped, past=past)
    assert here.claims["n"].tolist() == [4, 4]
    pd.testing.assert_frame_equal(there.claims, here.claims)
    from_table, from_folders = (measured_claims(*each).drop(columns="own") for each in ((shipped, past.evals), (runs,)))
    pd.testing.assert_frame_equal(from_table, from_folders)


def test_a_claim_at_equal_cost_is_not_tested_if_one_side_starts_after_the_other_has_ended(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, *made_up(flops={"a": 5, "b": 100}))
    claim = ClaimConfig(
        text="b is better", metric="val/loss", factor="router", levels=["b"], than=["a"], kind="lower", at="flops"
    )
    judged = judge(runs, [claim]).iloc[0]
    assert (judged["verdict"], judged["n"]) == (UNTESTED, 0)
    assert judged["reason"].startswith(NOTHING_IN_COMMON)


AT_FLOPS = {"factor": "router", "levels": ["b"], "than": ["a"], "kind": "lower", "at": "flops"}


@pytest.mark.parametrize("kind", OTHER_EXPERTS)
def test_a_claim_about_runs_whose_training_flops_are_not_known_says_so(kind: str) -> None:
    runs, evals = made_up(flops={"a": 100, "b": 160})
    claim = ClaimConfig(text="b is better", metric="val/loss", **AT_FLOPS)
    reason = f"router=b: 4 of 4 runs (`b`) are left out at equal FLOPs: {NOT_RECORDED}."
    assert compared(claim, older(runs, kind), evals).absent == [reason]
    at_seconds = dataclasses.replace(claim, at="seconds")
    assert compared(at_seconds, older(runs, kind), evals).pairs[0][0].n == 4, "seconds are measured"


@pytest.mark.parametrize("written", ["nowhere", "at the last evaluation"])
@pytest.mark.parametrize("kind", ["lower", "mixed"])
def test_a_claim_at_equal_cost_about_a_metric_that_is_known_only_at_the_end_says_so(written: str, kind: str) -> None:
    runs, evals = made_up(flops={"a": 100, "b": 160})
    runs = runs.assign(**{"test/loss": runs["val/loss"]})
    if written != "nowhere":
        evals = evals.assign(**{"test/loss": evals["val/loss"].where(evals["step"] == STEPS[-1])})
    direction = "lower" if kind == "mixed" else None
    claim = ClaimConfig(text="b is better", metric="test/loss", **AT_FLOPS | {"kind": kind, "direction": direction})
    assert compared(claim, runs, evals).absent == [ONLY_AT_THE_END.format(metric="test/loss")]
    assert compared(claim, runs, evals[:0]).absent == [NO_EVALUATIONS]


def test_a_run_length_with_one_evaluation_is_named_with_the_eval_every_that_it_needs() -> None:
    """A step of router b costs 1.6 times one of a. With eval_every=25 b is read where a ends."""
    runs, evals = made_up(flops={"a": 100, "b": 160})
    lengths = pd.concat([runs.assign(steps=40), runs.assign(steps=80, folder="long " + runs["folder"])])
    once, curves = evals[evals["step"].isin([0, 40])], evals.assign(folder="long " + evals["folder"])
    claim = ClaimConfig(
        text="b is better", metric="val/loss", factor="router", levels=["b"], than=["a"], kind="lower", at="flops"
    )
    reason = "a run ends before the first evaluation of another"
    refused = f"{NOTHING_IN_COMMON}, at steps=40: {reason}; train with eval_every=25"
    assert compared(claim, lengths, pd.concat([once, curves])).absent == [refused]
    often = pd.concat([once[once["step"] > 0].assign(step=25), once, curves])
    assert compared(claim, lengths, often).pairs[0][0].n == 4
    found = equal_cost(runs, training_curves(runs, once), ["router"], {}, FLOPS)
    assert found[["note", "eval_every"]].to_numpy().tolist() == [[f"{NOTHING_IN_COMMON}: {reason}", 25]]


def test_several_comparisons_without_a_common_cost_have_one_advice_that_is_enough_for_all() -> None:
    """A step of router b costs 1.6 times one of a, and a step of c 2 times."""
    runs, evals = made_up(flops={"a": 100, "b": 160, "c": 200})
    once = evals[evals["step"].isin([0, 40])]
    found = equal_cost(runs, training_curves(runs, once), ["router"], {}, FLOPS)
    assert found["eval_every"].tolist() == [25, 20]
    reason = f"{NOTHING_IN_COMMON}: a run ends before the first evaluation of another"
    assert why_none(found) == f" ({reason}; train with eval_every=20)"


def test_seconds_are_measured_or_a_number_of_flops(capsys: pytest.CaptureFixture[str], finished_ablation: Path) -> None:
    for wrong in ("fast", "0", "nan"):
        assert main([str(finished_ablation), "--seconds", wrong]) == 2
        assert f"--seconds {wrong}: must be measured, or FLOPs per second above 0" in capsys.readouterr().err
