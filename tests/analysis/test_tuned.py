"""Tests of reports on tuned settings: equal budgets, chosen values, and verdicts by other seeds on test text."""

import json
from itertools import product
from pathlib import Path

import pytest
from run_folders import FORMAT, change_record, write_metrics, write_record

from moe.analysis.report.blocks import literal
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.report import write_report
from moe.analysis.report.sections.commands import command_for_more
from moe.analysis.report.sections.setup import setup
from moe.analysis.tuned import arms_of, tuned_equally
from moe.results.table import ABSENT, load_runs

RATE = "optimizer.muon_lr"
TUNE = {"tune": {RATE: [0.01, 0.02, 0.04]}, "tune_seeds": [1, 2]}
BEST = {0.0: 0.01, 0.1: 0.02}  # learning rate by noise


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Write a sweep that tuned the learning rate for two noises, and trained other seeds at the best values."""
    trials = product(BEST, TUNE["tune"][RATE], TUNE["tune_seeds"])
    judged = [(noise, rate, seed) for noise, rate in BEST.items() for seed in (42, 43, 44)]
    grids, cells = [], {}
    for name, settings, search in (("tuning", trials, "minimize val/loss"), ("tuned", judged, None)):
        names = []
        for noise, rate, seed in settings:
            names.append(f"noise={noise},rate={rate},seed={seed}")
            cells[names[-1]] = {"noise": noise, RATE: rate, "seed": seed}
            folder = tmp_path / "x" / names[-1]
            folder.mkdir(parents=True)
            write_record(folder, config={"seed": seed, "noise": noise, "optimizer": {"muon_lr": rate}})
            value = 4 + noise + 10 * abs(rate - BEST[noise]) + 0.001 * seed * (1 + noise)
            write_metrics(folder, {"val/loss": value, "val/perplexity": value, "test/perplexity": value + 1})
        factors = ["noise", RATE] if search else ["noise"]
        grids.append({"name": f"x: {name}", "factors": factors, "fixed": TUNE, "cells": names, "search": search})
    (tmp_path / "x" / "sweep.json").write_text(json.dumps({"format": FORMAT, "cells": cells, "grids": grids}))
    return tmp_path / "x"


def parts(sweep: Path) -> list[ReportInputs]:
    return collect_inputs(load_runs([sweep]))


def test_only_the_seeds_for_judging_are_tested_and_on_test_text(sweep: Path) -> None:
    """The chosen value belongs to its arm, although it differs between arms. Runs that tune are in no test."""
    _, tuning, judged = parts(sweep)
    assert tuning.search
    assert len(tuning.contrasts) == 0
    assert judged.factors == ["noise"]
    assert judged.tied == {}
    [contrast] = judged.contrasts.to_dict("records")
    assert (contrast["metric"], contrast["n"]) == ("test/perplexity", 3)
    assert contrast["difference"] == pytest.approx(0.1 + 0.001 * 43 * 0.1)
    assert dict(zip(judged.condition, judged.trained_at, strict=True)) == {
        f"noise={noise}": f"{RATE}={rate}" for noise, rate in BEST.items()
    }


def test_each_arm_has_the_best_of_its_values(sweep: Path) -> None:
    for part in parts(sweep)[1:]:
        arms = arms_of(part.trials)
        assert {arm.name: arm.best for arm in arms} == {f"noise={noise}": {RATE: rate} for noise, rate in BEST.items()}
        assert [list(arm.means["n"]) for arm in arms] == [[2, 2, 2], [2, 2, 2]]
        assert arms[0].means["mean"].iloc[0] == pytest.approx(4 + 0.0015)


def test_budgets_are_equal_only_if_all_runs_ended(sweep: Path) -> None:
    """A run that diverged has used its budget. Its value is then not the best, whatever the other seed says."""
    trials = parts(sweep)[2].trials
    same = f"each setting of noise has the same 3 values of {RATE}, with seeds 1, 2"
    assert tuned_equally(trials) == f"tuned equally: yes, {same}, which judge nothing"
    one = tuned_equally(trials[trials["seed"] == 2])
    assert one == f"tuned equally: yes, {same.replace('seeds 1, 2', 'seed 2')}, which judges nothing"
    change_record(sweep / "noise=0.1,rate=0.02,seed=2", status="failed", error="Diverged: not finite", facts=None)
    trials = parts(sweep)[2].trials
    assert tuned_equally(trials).startswith("tuned equally: yes")
    assert arms_of(trials)[1].best == {RATE: 0.01}
    change_record(sweep / "noise=0.1,rate=0.02,seed=2", status="failed", error="stopped", facts=None)
    trials = parts(sweep)[2].trials
    assert tuned_equally(trials) == f"tuned equally: no, the settings of noise differ in how many runs ended by {RATE}"


def test_a_setting_to_which_fewer_keys_apply_is_named_and_must_have_its_runs_too(sweep: Path) -> None:
    trials = parts(sweep)[2].trials
    temperature = [{0.0: ABSENT, 0.1: 1.0}[noise] for noise in trials["noise"]]
    told = json.dumps({"factors": ["noise"], "tune": {RATE: [], "router.temp": []}})
    two = trials.assign(**{"router.temp": temperature, "tuned": told})
    assert tuned_equally(two).endswith(f"which judge nothing; {RATE}, router.temp do not all apply to noise=0.0")
    assert arms_of(two)[0].best == {RATE: 0.01}
    stopped = two["status"].where((two["noise"] != 0.0) | (two[RATE] != 0.04) | (two["seed"] != 2), "failed")
    assert tuned_equally(two.assign(status=stopped)).startswith("tuned equally: no")


@pytest.mark.usefixtures("undrawn")
def test_the_report_shows_the_chosen_values_and_a_curve_of_each_arm(sweep: Path, tmp_path: Path) -> None:
    text = write_report(load_runs([sweep]), tmp_path / "out").read_text()
    assert text.count("**Equal budgets:** tuned equally: yes") == 2
    assert "tuning_optimizer_muon_lr.png" in text
    assert f"| noise=0.0 | {RATE}=0.01 |" in text
    assert f"{RATE}: at the end of the list" in text
    facts = [text for name, text in setup(parts(sweep)[2]) if name.startswith("Settings that differ")]
    assert facts == [literal(f"tune={{{RATE}:[0.01,0.02,0.04]}}, tune_seeds=[1,2]")]
    words = command_for_more(parts(sweep)[2], 2)
    assert words.endswith("noise=0.0,0.1 seed=45,46")
    assert f"'tune={{{RATE}:[0.01,0.02,0.04]}}' 'tune_seeds=[1,2]'" in words
