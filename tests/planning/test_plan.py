"""Tests of `moe plan`: its numbers are those of the report, and the planned power is reached in simulated reports."""

import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moe.analysis.claims import judge
from moe.analysis.report.collect import collect_inputs
from moe.analysis.studies.published import experiment_claims
from moe.bench.analyze import made_up_record
from moe.bench.errors import null_runs, write_record
from moe.bench.power import Planned, planned, with_effect
from moe.checks import ConfigError
from moe.config.cell import Cell, Grid
from moe.config.claim import ClaimConfig
from moe.config.effect import Effect
from moe.config.schema import Config
from moe.launch.command_line import read_cells
from moe.planning.__main__ import _lines, _read, _with_folders, main
from moe.planning.cells import planned_cells
from moe.planning.cost import Speed, flops_of, flops_of_token, measured_speed, speed_of_runs, tokens_of
from moe.planning.differences import differences
from moe.planning.plan import Request, free_seeds, make_plan, pilot_command
from moe.planning.report_ahead import Ahead
from moe.planning.report_ahead import tests_ahead as ahead
from moe.planning.seeds import NOT_TOLD, need, spread_of
from moe.planning.sources import Sources, runs_of_pilot
from moe.program import Stopped
from moe.results.shipped import read_shipped, ship
from moe.results.table import ABSENT, level, load_runs
from moe.runs.folder import LOCK, locked
from moe.runs.record import MetricsRecord, RunRecord, SweepRecord


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pilot of noise x lb x 3 seeds. Perplexity has a mean of 100, and the load CV no spread."""
    sweep, rng = tmp_path_factory.mktemp("pilot") / "noise_lb_seed", np.random.default_rng(0)
    for noise, lb, seed in product((0.0, 0.1, 0.5), (0.0, 0.01), (1, 2, 3)):
        folder = sweep / f"lb={lb},noise={noise},seed={seed}"
        folder.mkdir(parents=True)
        record = made_up_record(folder, "topk", None, seed)
        sizes = {"noise": noise, "lb": lb, "steps": 10, "batch_size": 4, "grad_accum": 1, "data": {"seq_len": 50}}
        record = replace(record, config=record.config | sizes, identity=record.identity | {"noise": noise, "lb": lb})
        record.write(folder / RunRecord.FILE)
        quality = 100 + 3 * seed + 0.5 * rng.normal()
        values = dict.fromkeys(("val/perplexity", "test/perplexity"), quality)
        values["routing/load_cv/pooled"] = 1 + noise - 20 * lb
        final = values | {"val/loss": 4.6, "val/accuracy": 0.2}
        MetricsRecord(final_metrics=final, history={}).write(folder / MetricsRecord.FILE)
    return sweep


def test_the_level_of_each_claim_is_the_one_that_its_report_applies(tmp_path: Path) -> None:
    cells = read_cells(["experiment=noise_lb_seed"])
    assert cells is not None
    write_record(tmp_path, "noise_lb_seed")
    report = collect_inputs(null_runs(str(tmp_path), "noise_lb_seed", 3, "equal", np.random.default_rng(0)))[0]
    found = ahead(cells)
    assert [each.tests for each in found] == report.claims["tests"].tolist()
    assert [each.rivals for each in found][:2] == [2, 1]


@pytest.mark.parametrize("name", ["experiment_c", "capacity_factorial"])
def test_a_plan_divides_by_the_tests_of_the_shipped_report(name: str) -> None:
    """A claim about a percentage of a mean is tested only if that mean is clear of zero."""
    studies = Path(__file__).parents[2] / "docs" / "studies"
    runs, past = read_shipped(studies / name)
    report = collect_inputs(runs, past=past)[0]
    cells = read_cells([f"experiment={name}"])
    assert cells is not None
    divided = [each.tests for each in ahead(cells)]
    judged = report.claims["p"].notna().to_numpy()
    assert [number for number, has_p in zip(divided, judged, strict=True) if has_p] == report.claims["tests"][
        judged
    ].tolist()


def test_a_claim_at_equal_cost_has_as_many_tests_as_one_at_the_end() -> None:
    cells = read_cells(["experiment=noise_lb_seed"])
    assert cells is not None
    claim = cells[0].config.claims[1]
    assert claim.kind == "higher"
    for at in ("flops", "seconds"):
        other = [
            cell._replace(config=replace(cell.config, claims=[*cell.config.claims, replace(claim, text=at, at=at)]))
            for cell in cells
        ]
        *_, same, last = ahead(other)
        assert last.absent == []
        assert last.tests == same.tests


def test_a_mixed_claim_is_planned_as_a_paired_one_because_a_plan_has_all_runs() -> None:
    cells = read_cells(["experiment=noise_lb_seed"])
    assert cells is not None
    claim = replace(CLAIM, kind="mixed", direction="higher")
    lacking = replace(CLAIM, levels=[5.0])
    configs = [replace(cell.config, claims=[claim, lacking]) for cell in cells]
    of_one_seed = [cell._replace(config=config) for cell, config in zip(cells, configs, strict=True)][::3]
    assert {cell.config.seed for cell in of_one_seed} == {42}
    found, without = ahead(of_one_seed)
    assert found.tests > 1
    assert without.absent == ["noise=5.0 is in no run"]
    for spread in (NOT_TOLD, NOT_TOLD._replace(mean=4.0, source="a pilot")):
        unknown = need(lacking, without, spread, Effect("2sd"), **MORE)
        assert unknown.reason == "noise=5.0 is in no run"
        assert unknown.spread.source == "the plan lacks what the claim compares: noise=5.0 is in no run"
    assert spread_of(CLAIM, pd.DataFrame({"val/perplexity": [1.0]})).source == "no runs tell the spread"
    rng = np.random.default_rng(0)
    rows = [(noise, seed, rng.normal()) for noise in (0.0, 0.1, 0.5) for seed in (1, 2, 3)]
    runs = pd.DataFrame(rows, columns=["noise", "seed", "val/loss"]).assign(status="finished", folder="", experiment="")
    spread = spread_of(claim, runs)
    assert spread.high / spread.low == pytest.approx(math.sqrt(np.divide(*stats.chi2.ppf([0.975, 0.025], 2))))
    assert spread.source == "paired differences of 3 seeds"
    paired = replace(claim, kind="higher", direction=None)
    assert spread[:4] == pytest.approx(spread_of(paired, runs)[:4])
    needed, as_paired = (need(each, found, NOT_TOLD, Effect("2sd"), **MORE).seeds for each in (claim, paired))
    assert needed == as_paired
    assert needed is not None


def test_the_planned_power_is_reached(tmp_path: Path) -> None:
    """With 25 studies the standard error is 0.08. `moe bench power` simulates more, with whole reports."""
    write_record(tmp_path, "noise_lb_seed")
    case = next(each for each in planned("noise_lb_seed", 2.0) if each.claim.text == "Noise 0.5 raises perplexity")
    rng = np.random.default_rng(0)

    def supported(case: Planned) -> float:
        runs = [null_runs(str(tmp_path), "noise_lb_seed", case.seeds, "equal", rng) for _ in range(25)]
        p = [judge(with_effect(each, case), [case.claim])["p"][0] for each in runs]
        return float(np.mean(np.array(p) <= 0.05 / case.tests))

    assert case.power - 0.25 <= supported(case)
    assert supported(case._replace(difference=case.difference / 4)) <= 0.2


def test_a_plan_with_a_pilot(
    pilot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    words = ["experiment=noise_lb_seed", "effect=1%", "--pilot", str(pilot), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["moe plan", *words])
    assert main() == 0
    plan, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [each["text"] for each in plan["claims"]] == [each.text for each in experiment_claims("noise_lb_seed")]
    claim = plan["claims"][1]
    assert claim["effect"] == pytest.approx(1.06, abs=0.01)  # 1 % of the mean of the pilot's runs
    about = plan["claims"][2]  # from 5 % to 15 %: the assumed 10 % are 5 % from both bounds
    assert about["effect"] == pytest.approx(5 * claim["effect"])
    assert f"distance to the bound {about['effect']:.3g}, spread" in printed
    assert claim["seeds_low"] < claim["seeds"] <= 32
    assert claim["seeds_high"] is None
    cv = plan["claims"][3]
    assert (cv["seeds"], cv["reachable"]) == (None, None)  # no chance is known, so no number of seeds is
    assert "the same in every seed" in cv["spread_from"]
    assert re.search(r"\n +unknown  Balance weight 0.01 lowers the load CV\n +the difference is the same", printed)
    seeds = max(each["seeds"] or 0 for each in plan["claims"])
    assert plan["seeds"] == list(range(42, 42 + seeds))
    [source] = plan["sources"]
    assert (source["name"], source["runs"], source["seeds"]) == ("the pilot", 18, [1, 2, 3])
    assert "steps is 10 there, and 300 in the plan" in source["differs"]
    assert "  steps is 10 there, and 300 in the plan\n" in printed
    assert claim["spread_from"] == "the pilot, only a guide: paired differences of 3 seeds"
    assert plan["pilot"] is None
    assert {each["reachable"] for each in plan["claims"] if each is not cv} <= {True, False}
    assert (plan["runs"], plan["seconds_from"]) == (6 * seeds, "the seconds for each FLOP of the pilot")
    tokens_of_a_run = 300 * 16 * 128
    assert plan["tokens"] == plan["runs"] * tokens_of_a_run
    assert plan["command"] in printed
    cells = read_cells(plan["command"].split()[2:])
    assert cells is not None
    assert len(cells) == plan["runs"]
    of_a_flop = 2.0 / (3 * 10 * 4 * 50 * 10**6)  # a run of the pilot takes 2 seconds; see made_up_record
    assert plan["seconds"] == pytest.approx(of_a_flop * sum(flops_of(cell.config) for cell in cells), rel=1e-3)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("effect", "said"), [("1", True), ("0.5", True), ("1%", False), ("1sd", False)])
def test_an_effect_without_a_percent_sign_is_said_to_be_in_units(effect: str, said: bool) -> None:
    request = REQUEST._replace(effect=Effect(effect))
    text = " ".join(_lines(make_plan(request, cells_of([7, 8]), None, lambda: Speed(1e-9, 0.0, "a test"))))
    assert (f"effect={effect} means {effect} in units of each metric" in " ".join(text.split())) == said


CLAIM = ClaimConfig("a", "val/loss", "noise", [0.5], "higher", than=[0.0])
MORE = {"power": 0.8, "most": 32}


def test_an_effect_that_is_lost_between_evaluations_is_out_of_reach_of_any_number_of_seeds() -> None:
    """At equal FLOPs, b is read between its two evaluations, as it needs 1.5 times the FLOPs of a."""
    runs, evals, rng = [], [], np.random.default_rng(0)
    for noise, seed in product((0.0, 0.5), range(4)):
        spent, losses = np.array([1.0, 2.0]) * (1.5 if noise else 1.0), np.array([5.0, 4.0]) + rng.normal(0, 0.01, 2)
        run = {"folder": f"/x/{noise}{seed}", "noise": noise, "seed": seed, "status": "finished", "experiment": "x"}
        runs.append(run | {"val/loss": losses[1], "train/flops": spent[1], "steps": 20})
        of_run = {"folder": run["folder"], "step": [10, 20], "val/loss": losses, "train/flops": spent}
        evals.append(pd.DataFrame(of_run))
    claim = replace(CLAIM, at="flops")
    spread = spread_of(claim, pd.DataFrame(runs), pd.concat(evals))
    assert spread.off > 0.3
    lost, kept = (need(claim, Ahead(1), spread, Effect(text), **MORE) for text in ("0.3", "0.9"))
    assert lost.reason.startswith(f"an effect of 0.3 is no larger than the {spread.off:.2g} by which a difference may")
    assert (lost.seeds, kept.reason) == (None, "")
    wide = spread._replace(value=0.4, low=0.4, high=0.4)
    near, far = (need(claim, Ahead(1), wide._replace(off=off), Effect("0.9"), **MORE) for off in (0.0, 0.4))
    assert near.seeds < far.seeds, "what is left of the effect is 0.9 minus what reading leaves open"
    assert spread_of(CLAIM, pd.DataFrame(runs)).off == 0
    late = pd.concat(evals).query("step == 20")  # b has its only evaluation after a has ended
    nothing = need(claim, Ahead(1), spread_of(claim, pd.DataFrame(runs), late), Effect("1%"), **MORE)
    assert "no runs tell that of val/loss (the two have no cost in common" in nothing.reason


def test_effects_in_units_of_the_metric_and_of_the_spread() -> None:
    spread = NOT_TOLD._replace(value=0.1, low=0.05, high=0.6, mean=4.0)
    found = [need(CLAIM, Ahead(1), spread, Effect(text), **MORE).seeds for text in ("5%", "0.2", "2sd")]
    assert found[0] == found[1] == found[2] == need(CLAIM, Ahead(1), NOT_TOLD, Effect("2sd"), **MORE).seeds == 5
    untold = "an effect of 5% can be compared only with a spread, and no runs tell that of val/loss"
    assert need(CLAIM, Ahead(1), NOT_TOLD, Effect("5%"), **MORE).reason == untold
    of_share = replace(CLAIM, metric="val/accuracy")
    too_large = need(of_share, Ahead(1), spread, Effect("1.5"), **MORE)
    assert too_large.reason == "an effect of 1.5 is larger than val/accuracy can change, which is 1"
    assert too_large.seeds is None
    small = need(CLAIM, Ahead(1), spread, Effect("0.5%"), **MORE)
    assert (small.seeds, small.high) == (None, None)
    margin = replace(CLAIM, kind="equivalent", margin="5%")
    within = need(margin, Ahead(1), spread, Effect("1%"), **MORE)
    assert within.effect == pytest.approx(0.2)
    assert within.seeds is not None
    assert need(margin, Ahead(1), NOT_TOLD, Effect("2sd"), **MORE).seeds is None
    assert math.isnan(need(margin, Ahead(1), NOT_TOLD, Effect("2sd"), **MORE).effect)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each claim is the only test of its report, so that no report is made ahead."""
    monkeypatch.setattr("moe.planning.plan.tests_ahead", lambda cells: [Ahead(1) for _ in cells[0].config.claims])


@cache
def base() -> Config:
    cells = read_cells(["eval_every=10"])
    assert cells is not None
    return replace(cells[0].config, claims=[CLAIM])


def cells_of(seeds: list[int], steps: tuple[int, ...] = (4,)) -> list[Cell]:
    configs = [replace(base(), steps=each) for each in steps]
    return [Cell(replace(each, seed=seed), Path("x"), "x", {}) for each in configs for seed in seeds]


REQUEST = Request(["experiment=x"], Effect("2sd"), {}, 0.8, 32)


@pytest.mark.usefixtures("alone")
def test_tokens_are_those_of_each_setting_and_time_follows_from_its_flops() -> None:
    cells = cells_of([7, 8], steps=(4, 40))
    wide = [cell._replace(config=replace(cell.config, model=replace(cell.config.model, ffn=1024))) for cell in cells]
    assert flops_of(wide[0].config) > 1.5 * flops_of(cells[0].config)  # with as many tokens
    tokens, flops, of_token = tokens_of(cells[0].config) // 4, flops_of(cells[0].config), flops_of_token(base())
    speed = Speed(4 * 2.0 / flops, 3.0 / of_token, "a test")  # 2 seconds for a step, and 3 for an evaluation
    plan = make_plan(REQUEST, cells, None, lambda: speed)
    assert (plan.runs, len(plan.seeds)) == (10, 5)
    assert plan.tokens == 5 * 44 * tokens
    assert plan.seconds == pytest.approx(5 * (44 * 2 + (3 + 6) * 3))
    tuned = make_plan(REQUEST, cells, None, lambda: speed, cells_of([1], steps=(8,)))
    assert (tuned.runs, tuned.trials, tuned.tokens) == (11, 1, plan.tokens + 8 * tokens)
    assert tuned.seconds == pytest.approx(plan.seconds + 8 * 2 + 3 * 3)
    of_both = make_plan(REQUEST, [*cells, *wide], None, lambda: speed)
    assert of_both.seconds == pytest.approx(plan.seconds * (1 + flops_of_token(wide[0].config) / of_token))


@pytest.mark.usefixtures("alone")
def test_without_a_pilot_an_effect_in_other_units_has_no_number_of_seeds() -> None:
    """A command for another effect than the one that was asked for would be wrong. The table of effects in sd stays."""
    request = REQUEST._replace(effect=Effect("0.5%"))
    plan = make_plan(request, cells_of([7, 8]), None, lambda: Speed(1e-9, 0.0, "a test"))
    written, printed = plan.as_json(), "\n".join(_lines(plan))
    [claim] = written["claims"]
    assert (claim["seeds"], claim["reachable"], claim["effect"]) == (None, None, None)
    assert (written["runs"], written["seeds"]) == (2, [7, 8])  # those of the experiment
    assert written["tokens"] == 2 * tokens_of(base()) * 4 // base().steps
    assert written["command"] == "python train.py -m experiment=x seed=7,8"
    assert written["note"] == "No claim has a number of seeds: it is unknown for 1 of 1"
    assert "unknown  a\n" in printed
    assert "an effect of 0.5% can be compared only with a spread" in printed
    assert "No runs tell how much val/loss differs by chance. An effect then has a number of seeds only in" in printed
    assert f"{written['note']}. So what follows is for as many seeds as the experiment has." in printed.replace(
        "\n", " "
    )
    assert f"command: {written['command']}" in printed
    in_sd = make_plan(REQUEST, cells_of([7, 8]), None, lambda: Speed(1e-9, 0.0, "a test"))
    assert in_sd.as_json()["claims"][0]["reachable"]
    assert in_sd.as_json()["note"] is None
    text = "\n".join(_lines(in_sd))
    assert "distance to the bound 2 sd, level 5 %; no runs tell the spread" in text


def test_what_a_plan_lacks_without_a_pilot_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also before the speed is measured, which a signal ends as it ends every other work."""

    def work(*_: object) -> None:
        out = capsys.readouterr().out
        assert "This plan has no pilot" in out
        assert "seed=1,2,3 out=pilot\n" in out
        assert out.endswith(f"python -m moe plan {shlex.join(words)} --pilot pilot\n")
        raise ConfigError("no more")

    monkeypatch.setattr("moe.planning.__main__.make_plan", work)
    monkeypatch.setattr("moe.planning.__main__.planned_cells", lambda request: (cells_of([42]), []))
    words = ["experiment=noise_lb_seed", "--power", "0.9", "--most=64", "effect=2sd", f"--out={tmp_path / 'x'}"]
    words += ["--effect", "val/perplexity=1%"]
    monkeypatch.setattr("sys.argv", ["moe plan", *words])
    assert main() == 2
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object, **__: object) -> None:
        assert signal.getsignal(signal.SIGINT) is before
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("moe.training.setup.set_up", stop)
    with pytest.raises(Stopped):
        measured_speed(base())


@pytest.fixture
def tuned_pilot(pilot: Path, tmp_path: Path) -> Path:
    """The pilot, which trained its seeds at learning rates that seeds 8 and 9 chose."""
    runs, cells, rate = sorted(pilot.iterdir()), {}, "optimizer.muon_lr"
    for number, folder in enumerate(runs):
        record = RunRecord.read(folder / RunRecord.FILE)
        for seed in (record.config["seed"], 8, 9):
            name = folder.name.replace(f"seed={record.config['seed']}", f"seed={seed}")
            cells[name] = {"noise": record.config["noise"], "lb": record.config["lb"], "seed": seed}
            config = record.config | {"seed": seed, "optimizer": {"muon_lr": 0.01 * (1 + number % 2)}}
            (tmp_path / "x" / name).mkdir(parents=True, exist_ok=True)
            replace(record, config=config, name=name).write(tmp_path / "x" / name / RunRecord.FILE)
            final = MetricsRecord.read(folder / MetricsRecord.FILE).final_metrics
            metrics = {key: value + 1000 * (seed > 7) for key, value in final.items()}
            MetricsRecord(final_metrics=metrics, history={}).write(tmp_path / "x" / name / MetricsRecord.FILE)
    fixed = {"tune": {rate: [0.01, 0.02]}, "tune_seeds": [8, 9]}
    trials, judged = ([name for name in cells if name[-1] in seeds] for seeds in ("89", "123"))
    grids = [
        Grid("x: tuning", ["lb", "noise", rate], fixed, trials, "minimize val/loss"),
        Grid("x: tuned", ["lb", "noise"], fixed, judged),
    ]
    SweepRecord(cells=cells, grids=grids).write(tmp_path / "x" / SweepRecord.FILE)
    return tmp_path / "x"


def test_of_a_pilot_that_tuned_the_runs_that_judge_tell_the_spread(pilot: Path, tuned_pilot: Path) -> None:
    plain, runs = runs_of_pilot(pilot), runs_of_pilot(tuned_pilot)
    assert sorted(runs["seed"]) == sorted(plain["seed"])
    claim = replace(CLAIM, metric="val/perplexity")
    assert spread_of(claim, runs) == spread_of(claim, plain)
    assert speed_of_runs(runs, "") == speed_of_runs(plain, "")
    cells = cells_of([42])
    tuned = [cell._replace(config=replace(cell.config, tune={"optimizer.muon_lr": [0.01, 0.02]})) for cell in cells]
    assert "optimizer.muon_lr is tuned there, and not in the plan" in differences(cells, runs)
    assert "optimizer.muon_lr is tuned in the plan, and not there" in differences(tuned, plain)
    assert not any("muon_lr" in each for each in differences(tuned, runs))
    for folder in tuned_pilot.glob("*seed=[123]"):
        shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"finished runs of two seeds at least, beside those that tune or search$"):
        runs_of_pilot(tuned_pilot)


def test_the_runs_that_tune_are_part_of_the_plan_and_not_of_the_pilot(caplog: pytest.LogCaptureFixture) -> None:
    words = ["experiment=noise_lb_seed", "noise=0.0,0.5", "lb=0.0", "seed=42", "tune_seeds=[1,2]", "planned_seeds=8"]
    request = REQUEST._replace(words=[*words, "tune={optimizer.muon_lr: [0.01, 0.02]}"])
    cells, trials = planned_cells(request)
    assert not [line for line in caplog.messages if "given twice" in line]  # by us, and not by the user
    command = pilot_command(request, cells)
    assert command.endswith(" tune=null seed=3,4,5 out=pilot")
    pilot = read_cells(shlex.split(command)[2:]) or []
    assert {(cell.config.seed, cell.config.planned_seeds) for cell in pilot} == {(3, None), (4, None), (5, None)}
    assert (len(cells), len(trials)) == (2, 8)
    assert {cell.config.seed for cell in trials} == {1, 2}
    assert free_seeds([0], set(cells[0].config.tune_seeds), 2) == [0, 3]


def test_the_settings_that_a_pilot_lacks_are_named() -> None:
    cells = cells_of([7, 8], steps=(4, 40))
    same = pd.DataFrame([{key: level(value) for key, value in cell.identity().items()} for cell in cells]).assign(
        steps=[4, 40, 400, 400]
    )
    assert differences(cells, same) == []
    other = same.assign(steps=40).drop(columns="noise").assign(batch_size=3)
    batch = cells[0].config.batch_size
    assert differences(cells, other) == [
        "steps is 40 there, and 4, 40 in the plan",
        f"batch_size is 3 there, and {batch} in the plan",
    ]


def test_an_absent_key_of_the_pilot_has_its_default_and_consequences_are_not_named() -> None:
    """The pilot is of an older version, and of another router, whose keys differ too."""
    cells = read_cells(["-m", "router=temperature", "router.temp=1.5,2.0", "seed=1"]) or []
    rows = [cell.choices | {key: level(value) for key, value in cell.identity().items()} for cell in cells]
    newer = ["model.experts_by_layer", "optimizer.beta2", "model.upcycle_parents", "router.gate", "noise"]
    pilot = pd.DataFrame(rows).drop(columns=newer)
    assert differences(cells, pilot) == []
    changed = [cell._replace(config=replace(cell.config, noise=0.5)) for cell in cells]
    assert differences(changed, pilot) == ["noise is 0.0 there, and 0.5 in the plan"]
    other = pilot.assign(router="topk", logger="csv").drop(columns=["router.temp"])
    assert differences(cells, other) == [
        "router is topk there, and temperature in the plan",
        "router.temp is absent there, and 1.5, 2.0 in the plan",
    ]
    assert differences(cells[:1], other.assign(**{"router.k": 7}))[0].startswith("router is topk there")
    assert len(differences(read_cells(["router=temperature"]) or [], other.assign(**{"router.k": 7}))) == 1


def test_a_key_that_does_not_apply_to_a_planned_run_is_no_difference() -> None:
    """A dense arm beside Mixtures of Experts has no router, and its run in the pilot has none either."""
    moe, dense = cells_of([7, 8])
    k = moe.identity()["router.k"]
    dense = dense._replace(ignored=frozenset({"router", "router.k", "noise"}), choices={"router": "another"})
    known = {key: level(value) for key, value in moe.identity().items()} | {"router": "topk"}
    pilot = pd.DataFrame([known, known | {"router.k": ABSENT, "noise": ABSENT}])
    moe = moe._replace(choices={"router": "topk"})
    assert differences([moe, dense], pilot) == differences([dense, moe], pilot) == []
    assert differences([moe, dense], pilot.replace({"router.k": {k: k + 1}})) == [
        f"router.k is {k + 1} there, and {k} in the plan"
    ]


def test_seeds_that_are_added_are_free_and_below_the_limit() -> None:
    last = 2**32 - 1
    assert free_seeds([last - 1], {last, 1}, 4) == [last - 1, 0, 2, 3]
    assert free_seeds([42, 43, 44], set(), 2) == [42, 43]
    assert free_seeds([42, 44], {46}, 4) == [42, 44, 45, 47]
    assert free_seeds([42, 43, 44], {*range(42, 48)}, 3) == [48, 49, 50]


@pytest.mark.usefixtures("alone")
def test_no_seed_that_told_the_spread_judges(pilot: Path) -> None:
    claim = replace(CLAIM, metric="val/perplexity")
    cells = [cell._replace(config=replace(cell.config, claims=[claim])) for cell in cells_of([1, 2, 7])]
    request = REQUEST._replace(effect=Effect("50%"))
    plan = make_plan(request, cells, Sources(cells, pilot), lambda: Speed(1e-9, 0.0, "a test"))
    assert (plan.seeds, plan.left_out) == ([7, 8], [1, 2, 3])
    assert plan.command == "python train.py -m experiment=x planned_seeds=2 planned_effect=50% seed=7,8"
    assert "Seeds 1 to 3 told the spread, so they judge nothing." in "\n".join(_lines(plan))


@pytest.mark.usefixtures("alone")
def test_without_a_pilot_the_nearest_finished_runs_tell_the_spread(pilot: Path, tmp_path: Path) -> None:
    """Those of the experiment in its own folder, then its shipped ones, then those of another one with the metric."""
    claim = replace(CLAIM, metric="val/perplexity")
    cells = [cell._replace(config=replace(cell.config, claims=[claim])) for cell in cells_of([1, 7])]
    cells = [cell._replace(folder=tmp_path / "x" / "x" / "new") for cell in cells]
    request = REQUEST._replace(effect=Effect("5%"))

    def plan() -> tuple[str, str, str]:
        made = make_plan(
            request, cells, Sources(cells, studies=tmp_path / "studies"), lambda: Speed(1e-9, 0.0, "a test")
        )
        [told] = made.as_json()["claims"]
        return told["spread_from"], made.command, "\n".join(_lines(made))

    assert plan()[:2] == ("no runs tell the spread", "python train.py -m experiment=x seed=1,7")
    ship(load_runs([pilot]), tmp_path / "studies" / "y")
    found, command, text = plan()
    assert found == "the shipped runs of y, only a guide: paired differences of 3 seeds"
    assert "the experiment is y there, and x in the plan\n  steps is 10 there, and 4 in the plan\n" in text
    assert command.endswith("seed=7,8,9")
    ship(load_runs([pilot]), tmp_path / "studies" / "a")
    table = tmp_path / "studies" / "a" / "runs.csv.gz"
    runs = pd.read_csv(table)
    more = pd.concat([runs, runs.assign(seed=runs["seed"] + 10)])
    more.assign(noise=more["noise"] + 5).to_csv(table, index=False)
    assert plan()[0] == found, "a has more seeds, but no level of the claim"
    ship(load_runs([pilot]), tmp_path / "studies" / "x")
    assert plan()[0] == "the shipped runs of x, only a guide: paired differences of 3 seeds"
    own = shutil.copytree(pilot, tmp_path / "x" / "x")
    paths = [folder / RunRecord.FILE for folder in own.iterdir()]

    def passed_over(because: str) -> bool:
        found, _, text = plan()
        words = f"passed over: the finished runs in {own}, because {because}"
        return found.startswith("the shipped runs of x, ") and words in " ".join(text.split())

    def learn(unigram: float) -> None:
        for path in paths:
            each = RunRecord.read(path)
            settings = {key: each.config[key] for key in ("seed", "noise", "lb")}
            same = {"config": asdict(cells[0].config) | settings, "identity": cells[0].identity() | settings}
            assert each.facts
            facts = each.facts._replace(unigram_perplexity=unigram)
            replace(each, **same, choices=cells[0].choices, facts=facts).write(path)

    assert passed_over("steps is 10 there, and 4 in the plan (and ")
    learn(90)
    assert passed_over("no setting is better than a unigram model")
    learn(900)
    training = own / "training"
    training.mkdir()
    replace(RunRecord.read(paths[0]), status="running", name="training").write(training / RunRecord.FILE)
    with locked(training / LOCK):
        assert passed_over("other runs of this sweep are still training")
    found, command, text = plan()
    assert "passed over" not in text
    assert found == f"the finished runs in {own}: paired differences of 3 seeds"
    assert command.endswith("seed=7,8,9 out=multirun_study")
    assert "The command has a folder of its own" in text


def test_a_spread_of_shipped_runs_is_a_share_of_the_mean(pilot: Path, tmp_path: Path) -> None:
    """One finished run with the settings of the plan tells the mean here, which is twice that of the shipped runs."""
    claim = replace(CLAIM, metric="val/perplexity")
    ship(load_runs([pilot]), tmp_path / "studies" / "x")
    [cell] = [each._replace(folder=tmp_path / "x" / "new") for each in cells_of([7])]
    there = Sources([cell], studies=tmp_path / "studies").spread(claim)[0]
    cell.folder.mkdir(parents=True)
    config, identity = asdict(cell.config), cell.identity()
    record = replace(
        made_up_record(cell.folder, "topk", None, 7), config=config, identity=identity, choices=cell.choices
    )
    record.write(cell.folder / RunRecord.FILE)
    final = {"val/loss": 4.6, "val/accuracy": 0.2, "val/perplexity": 2 * there.mean}
    metrics = MetricsRecord(final_metrics=final, history={})
    metrics.write(cell.folder / MetricsRecord.FILE)
    here, source = Sources([cell], studies=tmp_path / "studies").spread(claim)
    assert source is not None
    assert here[:4] == pytest.approx([2 * each for each in there[:4]])
    assert here.source.endswith(f"at the mean of the finished runs in {tmp_path / 'x'}")


@pytest.mark.parametrize(("limit", "steps"), [(0.0, 2), (math.inf, 8)])
def test_measuring_the_speed_takes_a_few_steps_or_seconds(
    limit: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trained = replace(base(), grad_accum=4), []
    training = SimpleNamespace(data=SimpleNamespace(val=range(10)))
    monkeypatch.setattr("moe.training.setup.set_up", lambda short: trained.append(short.grad_accum) or training)
    monkeypatch.setattr("moe.training.step.train_step", lambda training, step: trained.append(step))
    monkeypatch.setattr("moe.planning.cost.MEASURED_SECONDS", limit)
    speed = measured_speed(config)
    assert trained == [1, *range(1 + steps)]  # of one micro-batch each, and the first one does not count
    assert speed.source.startswith(f"{steps} measured steps")
    assert speed.of_evaluation == pytest.approx(10 * config.data.seq_len * speed.of_flop)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["experiment=noise_lb_seed"],
            "effect is missing: give the smallest difference that matters, such as effect=0.5%",
        ),
        (["experiment=quick_demo", "effect=1", "seed=42", "router.temp=1.0"], "experiment=quick_demo: has no claims"),
        (["experiment=noise_lb_seed", "effect=-1%"], "effect=-1%: must be an amount > 0"),
        (["effect=1", "--effect", "val/loss"], "--effect=val/loss: must be METRIC=SIZE"),
        (["effect=1", "--effect", "val/loss=1%", "--effect", "val/loss=2%"], "--effect=val/loss=2%: given twice"),
        (["effect=1", "--most", "1"], "--most=1: must be a whole number > 1: a test needs two seeds at least"),
        (["experiment=noise_lb_seed", "effect=1", "planned_seeds=1"], "planned_seeds=1: must be a whole number from 2"),
        (["effect=1", "--power", "1.5"], "--power=1.5: must be between 0.05 and 1"),
        (["effect=1", "--out", "{other}"], "must be a new file, or an earlier plan"),
        (["effect=1", "--pliot", "x"], "nearest: --pilot"),
        (["experiment=noise_lb_seed", "efect=1%"], "unknown key 'efect'; nearest: effect"),
        (
            ["experiment=noise_lb_seed", "effect=1", "noise=0.0,0.5", "lb=0.0", "seed=${{data_seed}}", "data_seed=3,4"],
            "data_seed=3,4: must be one value for all runs",
        ),
        (
            ["experiment=noise_lb_seed", "effect=1", "seed=42", "model.experts_by_layer=0-1:4"],
            "claims[3].metric=routing/load_cv/pooled: must be another metric: it is null if layers differ",
        ),
    ],
)
def test_words_that_cannot_be_used(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "thesis.json"
    other.write_text("{}")
    monkeypatch.setattr("sys.argv", ["moe plan", *(word.format(other=other) for word in words)])
    assert main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert other.read_text() == "{}"


def test_the_pilot_has_one_folder_and_new_seeds() -> None:
    request = Request(["experiment=x", "-m", "out=mine", "seed=7", "steps=5"], Effect.read("effect", "1%"), {}, 0.8, 32)
    cells = cells_of([2, 3])
    assert pilot_command(request, cells) == "python train.py -m experiment=x steps=5 seed=1,4,5 out=pilot"
    request = request._replace(words=["claims=[{text: a}]"])
    assert pilot_command(request, cells) == "python train.py -m 'claims=[{text: a}]' seed=1,4,5 out=pilot"


def test_a_plan_and_its_commands_name_the_folders_of_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("lab", "other"):
        (tmp_path / folder / "router").mkdir(parents=True)
    monkeypatch.setenv("MOE_SEARCH_PATH", "other")
    words = ["experiment=noise_lb_seed", "effect=1sd", "--config-dir", "lab", f"--out={tmp_path / 'plan.json'}"]
    request = _read(words)[1]
    cells, _ = planned_cells(request)
    request = _with_folders(request)
    assert request.words == ["experiment=noise_lb_seed", "hydra.searchpath=[other,lab]"]
    assert "'hydra.searchpath=[other,lab]' seed=1,2,3" in pilot_command(request, cells)


def test_seeds_that_a_command_plans_give_way_to_those_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A level for looks at fewer seeds would be that of another study."""
    words = ["experiment=noise_lb_seed", "planned_seeds=8", "effect=1%", f"--out={tmp_path / 'plan.json'}"]
    request = _read([*words, "data_seed=${seed}"])[1]
    command = "python train.py -m experiment=noise_lb_seed 'data_seed=${seed}' planned_seeds=5"
    assert request.command("planned_seeds=5") == command
    cells, _ = planned_cells(request)
    assert {cell.config.planned_seeds for cell in cells} == {None}
    said = "planned_seeds=8 plays no part in a plan: its command has the number that the claims need\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("effect", "others", "message"),
    [
        (
            "effect=100%",
            [],
            "effect=100%: must be below 100%: “Deterministic routing has the best perplexity” claims a fall of",
        ),
        (
            "effect=1%",
            ["--effect", "routing/load_cv/pooled=150%"],
            "--effect routing/load_cv/pooled=150%: must be below 100%: ",
        ),
        ("effect=1%", ["--effect", "routing/load_cv/pooled=99%"], ""),
        ("effect=1%", ["--effect", "routing/load_cv/pooled=150"], ""),
    ],
)
def test_nothing_falls_by_all_of_its_mean(effect: str, others: list[str], message: str, tmp_path: Path) -> None:
    request = _read(["experiment=noise_lb_seed", effect, *others, f"--out={tmp_path / 'plan.json'}"])[1]
    with pytest.raises(ConfigError, match=re.escape(message)) if message else nullcontext():
        planned_cells(request)


def test_the_spread_of_a_pilot_without_the_level_is_that_within_seeds() -> None:
    """Seeds differ five times as much as the runs of a seed; the difference of two runs spreads by sqrt(2)."""
    rng = np.random.default_rng(0)
    table = 10 + 5 * rng.normal(size=(40, 1)) + rng.normal(size=(40, 3))
    rows = [(f"{seed}-{level}", level / 10, seed, table[seed, level]) for seed, level in np.ndindex(40, 3)]
    runs = pd.DataFrame(rows, columns=["folder", "noise", "seed", "val/loss"]).assign(status="finished", experiment="x")
    spread = spread_of(CLAIM, runs)
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    assert spread.value == pytest.approx(math.sqrt(2 * (rest**2).sum() / (39 * 2)))
    assert spread.low < math.sqrt(2) < spread.high
    alone = spread_of(CLAIM, runs[runs["noise"] == 0.1])
    assert alone.mean == pytest.approx(table[:, 1].mean()), "the runs lack the level with which the claim compares"
    assert spread.mean == pytest.approx(table[:, 0].mean())
    assert alone.value == pytest.approx(math.sqrt(2) * table[:, 1].std(ddof=1))


@pytest.mark.parametrize("in_turns", [True, False])
def test_a_spread_of_speeds_comes_only_from_runs_that_took_turns(in_turns: bool) -> None:
    """The differences of other runs are mostly those of the load of their machine."""
    rng = np.random.default_rng(0)
    by_seed = [(noise, seed) for seed in range(6) for noise in ((0.0, 0.1, 0.5) if seed % 2 else (0.5, 0.1, 0.0))]
    order = by_seed if in_turns else sorted(by_seed)
    runs = pd.DataFrame(order, columns=["noise", "seed"]).assign(status="finished", folder="", experiment="")
    runs["started"] = [f"2026-01-01T10:{minute:02}:00+00:00" for minute in range(len(order))]
    runs = runs.assign(**{"seconds": 60.0, "time/tokens_per_s": 1000 + rng.normal(size=len(order))})
    told = "paired differences of 6 seeds" if in_turns else NOT_TOLD.source
    assert spread_of(replace(CLAIM, metric="time/tokens_per_s"), runs).source == told
    quality = spread_of(CLAIM, runs.assign(**{"val/loss": rng.normal(size=len(order))}))
    assert quality.source == "paired differences of 6 seeds"


@pytest.mark.usefixtures("alone")
def test_a_plan_says_what_brings_a_claim_within_reach_in_lines_that_a_terminal_shows(pilot: Path) -> None:
    """The texts of all claims begin at one place, however long the numbers before them are."""
    far = replace(CLAIM, text="far away", metric="val/perplexity")
    near = replace(far, text="near", kind="equivalent", margin="500%")
    cells = [cell._replace(config=replace(cell.config, claims=[far, near])) for cell in cells_of([7])]
    source = "8 measured steps of the setting with the most FLOPs, and the FLOPs of each setting"
    request = REQUEST._replace(effect=Effect("0.0001%"))
    plan = make_plan(request, cells, Sources(cells, pilot), lambda: Speed(1e-9, 0.0, source))
    lines = [*_lines(plan)]
    text = " ".join(lines)
    assert [each.seeds is None for each in plan.needs] == [True, False]
    assert "A claim that needs over 32 seeds is out of reach." in text
    [advice] = [line.split()[-1] for line in lines if line.startswith("  --effect val/perplexity=")]
    size = advice.partition("=")[2]
    assert size.endswith("%")
    enough, less = (request._replace(effect=Effect(f"{share * float(size[:-1])}%")) for share in (1, 0.8))
    found = [make_plan(each, cells, Sources(cells, pilot), lambda: Speed(1e-9, 0.0, source)) for each in (enough, less)]
    assert [plan.needs[0].seeds is None for plan in found] == [False, True]
    for word in ("distance to the bound", "spread", "level"):
        assert sum(line.startswith(f"{word}: ") for line in lines) == 1
    assert len({line.index(claim.text) for line in lines for claim in (far, near) if line.endswith(claim.text)}) == 1
    assert max(len(line) for line in lines if not line.startswith("command: ")) <= 110
    plan = plan._replace(needs=plan.needs[1:])
    assert "out of reach" not in " ".join(_lines(plan))


@pytest.mark.usefixtures("alone")
def test_a_share_or_units_count_for_metrics_of_quality_alone(pilot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a percent of a load CV matters to nobody. A spread is known for it here, so its reach is too."""
    load = replace(CLAIM, text="load", metric="routing/load_gini/pooled", kind="lower")
    ranged = replace(load, text="range", kind="equivalent", margin="50%", levels=[0.5], than=[0.0])
    runs = load_runs([pilot])
    runs["routing/load_gini/pooled"] = runs["val/perplexity"] / 500
    spread = spread_of(load, runs)
    for text, told in (("0.5%", False), ("0.02", False), ("2sd", True)):
        request = REQUEST._replace(effect=Effect(text))
        assert request.effect_on("test/loss") == request.effect
        found = need(load, Ahead(1), spread, request.effect_on(load.metric), **MORE)
        assert (found.seeds is not None) == told
        assert ("--effect routing/load_gini/pooled=SIZE" in found.reason) != told
        assert math.isnan(found.within_reach) == told
        assert need(ranged, Ahead(1), spread, request.effect_on(load.metric), **MORE).seeds is not None
    own = REQUEST._replace(effect=Effect("0.5%"), effects={load.metric: Effect("20%")})
    assert need(load, Ahead(1), spread, own.effect_on(load.metric), **MORE).seeds is not None
    cells = [cell._replace(config=replace(cell.config, claims=[load])) for cell in cells_of([7, 8])]
    request = REQUEST._replace(effect=Effect("0.5%"))
    sources = Sources(cells, pilot)
    monkeypatch.setattr(sources, "spread", lambda _: (spread, sources.pilot))
    plan = make_plan(request, cells, sources, lambda: Speed(1e-9, 0.0, "a test"))
    printed = "\n".join(_lines(plan))
    assert "out of reach" not in printed
    [advice] = [line.split()[-1] for line in printed.splitlines() if line.startswith("  --effect ")]
    metric, _, size = advice.rpartition("=")
    assert need(load, Ahead(1), spread, Effect(size), **MORE).seeds in (31, 32)
    assert metric == load.metric


@pytest.mark.usefixtures("alone")
def test_what_no_runs_tell_is_said_of_its_metrics_alone(pilot: Path) -> None:
    """A table of effects in standard deviations says nothing about a claim with a range."""
    told = replace(CLAIM, text="told", metric="val/perplexity")
    speed = replace(CLAIM, text="speed", metric="time/tokens_per_s", kind="equivalent", margin="1%")
    cells = [cell._replace(config=replace(cell.config, claims=[told, speed])) for cell in cells_of([7, 8])]
    request = REQUEST._replace(effect=Effect("5%"))
    plan = make_plan(request, cells, Sources(cells, pilot), lambda: Speed(1e-9, 0.0, "a test"))
    printed = " ".join("\n".join(_lines(plan)).split())
    assert plan.table == {}
    assert "No runs tell how much time/tokens_per_s differs by chance. A claim with a range then has no" in printed
    assert "no runs tell that of time/tokens_per_s; the runs of a pilot do if they are trained one after" in printed
    assert "What follows is for the claims with a number of seeds: 1 of 2." in printed


def test_one_seed_of_each_setting_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies are the runs that the command trains, beside their folders."""
    words, composed = ["experiment=noise_lb_seed", "noise=0.0,0.5"], []
    whole = read_cells(words) or []
    monkeypatch.setattr("moe.launch.cells.check_claims", lambda cells, *_, **__: composed.append(len(cells)))
    cells, _ = planned_cells(REQUEST._replace(words=words))
    assert [cell.config for cell in cells] == [cell.config for cell in whole]
    assert len({cell.folder for cell in cells}) == len(cells) == 12
    assert (cells[0].grid and cells[0].grid.replacements()) == (whole[0].grid and whole[0].grid.replacements())
    assert composed == [4]
    tune = [*words, "tune={optimizer.muon_lr: [0.01, 0.02]}", "tune_seeds=[1,2]"]
    trials = read_cells(tune) or []
    copies = [cell.config for cell in planned_cells(REQUEST._replace(words=tune))[1]]
    assert sorted(map(repr, copies)) == sorted(repr(replace(cell.config, tune_seeds=[1])) for cell in trials)
    assert composed[-2:] == [8, 4]
    own_seeds = ["experiment=noise_lb_seed", "noise=0.0,0.5", "seed=1,2", "init_seed=7"]
    assert len(planned_cells(REQUEST._replace(words=own_seeds))[0]) == composed[-1] == 8


def test_trials_of_which_only_the_first_seed_has_ended_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["experiment=noise_lb_seed", "noise=0.0", "lb=0.0", "tune={optimizer.muon_lr: [0.01, 0.02]}"]
    ended = {1}
    monkeypatch.setattr("moe.launch.tuning.finished", lambda cell: cell.config.seed in ended)
    monkeypatch.setattr("moe.launch.tuning.objective", lambda cells, _: 1.0)
    request = REQUEST._replace(words=[*words, "tune_seeds=[1,2]"])
    assert sorted(cell.config.seed for cell in planned_cells(request)[1]) == [1, 1, 2, 2]
    ended.add(2)
    cells, trials = planned_cells(request)
    assert (len(cells), trials) == (3, [])


def test_seeds_that_chose_a_value_give_way_to_free_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """The experiment's own seeds chose its temperature, in the shipped runs, so the plan begins with others."""
    words = ["experiment=temperature_best_long", "results=docs/studies"]
    cells, _ = planned_cells(REQUEST._replace(words=words))
    chose = {*cells[0].config.tune_seeds}
    assert {45, 46, 47} < chose
    assert not chose & {cell.config.seed for cell in cells}
    assert len(cells) == 6
    with pytest.raises(ConfigError, match=r"by results=DIR, such as results=docs/studies, which has its shipped runs$"):
        planned_cells(REQUEST._replace(words=[words[0], "results=nowhere"]))
    with pytest.raises(ConfigError, match=r"which has the sizes; add model\.checkpoint=NAME$"):
        planned_cells(REQUEST._replace(words=["experiment=finetuning"]))


@pytest.mark.usefixtures("alone")
def test_the_command_and_the_report_name_the_effect_for_which_the_seeds_were_planned() -> None:
    effects = {"test/loss": Effect("0.02"), "routing/load_cv": Effect("10%")}
    request = Request(["noise=0.0,0.5"], Effect("2sd"), effects, 0.8, 32)
    plan = make_plan(request, cells_of([7, 8]), None, lambda: Speed(1e-9, 0.0, "a test"))
    [*cells] = read_cells(shlex.split(plan.command)[2:]) or []
    said = "2sd, but 0.02 for test/loss and 10% for routing/load_cv"
    assert {cell.config.planned_effect for cell in cells} == {said}
    assert not any("planned_effect" in cell.folder.name for cell in cells)
    again = request._replace(words=shlex.split(plan.command)[3:])
    assert again.command("a=1").count("planned_effect") == 0


def test_an_effect_that_a_plan_would_refuse_is_no_planned_effect_either() -> None:
    claims = [replace(CLAIM, metric="test/loss")]
    for text in ("0.5%", "1e-3", "2sd, but 0.02 for test/loss"):
        replace(base(), planned_effect=text, claims=claims).check()
    wrong = ("abc", " ", "-1%", "1%sd", "inf", "0.5%,", "0.5%, but", "0.5%, but 2 for", "0.5%, but x for test/loss")
    for text in (*wrong, "0.5%\n", f"{'1' * 300}%"):
        with pytest.raises(ConfigError, match=r"^planned_effect=.*: must be an amount > 0: a share of the mean"):
            replace(base(), planned_effect=text).check()
    with pytest.raises(ConfigError, match=r"^unknown metric of planned_effect 'test/los'; nearest: test/loss$"):
        replace(base(), planned_effect="0.5%, but 2 for test/los", claims=claims).check()


@pytest.mark.usefixtures("alone")
def test_a_plan_with_runs_that_tune_says_what_its_command_trains_each_time() -> None:
    plan = make_plan(REQUEST, cells_of([7, 8]), None, lambda: Speed(1e-9, 0.0, "a test"), cells_of([1]))
    assert plan.as_json()["command_trains"] == ["1 run for tuning", "5 runs for judging"]
    *_, said, command = _lines(plan)
    assert said == (
        "command, which must be given twice: first it trains 1 run for tuning, then, given again, 5 runs for judging"
    )
    assert command == f"  {plan.command}"
    without = make_plan(REQUEST, cells_of([7, 8]), None, lambda: Speed(1e-9, 0.0, "a test"))
    assert without.as_json()["command_trains"] == ["5 runs"]


@pytest.mark.parametrize("words", ["--help", "experiment=scaling effect=1%"])
def test_help_and_an_experiment_without_claims_are_answered_before_pytorch_is_imported(words: str) -> None:
    """The experiment has 54 runs, and none of them is composed."""
    code = """
import sys
from moe.planning.__main__ import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False"
    assert ("experiment=scaling: has no claims" in done.stderr) == (words != "--help")
