"""A dashboard is code: its schema holds, and it shows nothing that no run logs. How W&B draws it is not tested."""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from wandb_workspaces.workspaces import internal

from moe import dashboard
from moe.config.schema import Cell, flatten
from moe.launch.command_line import read_cells
from moe.launch.run import run
from moe.runs import wandb_mirror
from moe.runs.folder import status
from moe.runs.wandb_mirror import condition


def spec(cells: list[Cell]) -> dict[str, Any]:
    """What would be sent to W&B."""
    return json.loads(
        dashboard.workspace(cells, entity="me", project="p")._to_model().spec.model_dump_json(by_alias=True)
    )


def panels(cells: list[Cell]) -> list[dict[str, Any]]:
    found = spec(cells)["section"]["panelBankConfig"]["sections"]
    return [panel for section in found for panel in section["panels"]]


@pytest.fixture(scope="module")
def factorial() -> list[Cell]:
    return read_cells(["experiment=noise_lb_seed"]) or []


class Logged:
    """Stands where a W&B run would, and keeps the keys that it is given."""

    def __init__(self) -> None:
        self.history: set[str] = set()
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any]) -> None:
        self.history |= set(values)

    def finish(self) -> None:
        self.summary |= dict.fromkeys(self.history)  # W&B itself keeps the last value of everything


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Cell]], Logged]:
    """Trains cells to their end; returns what they log together."""

    def train(cells: list[Cell]) -> Logged:
        everything = Logged()
        monkeypatch.setattr(wandb_mirror, "_start", lambda cell, mode: everything)
        for cell in cells:
            run(cell)
            assert status(cell) == "finished"
        return everything

    return train


def unlogged(cells: list[Cell], logged: Logged) -> set[str]:
    """What a dashboard shows of these cells and none of them logs."""
    shown: set[str] = set()
    for panel in panels(cells):
        config = panel["config"]
        lines = panel["viewType"] == "Run History Line Plot"
        there = logged.history if lines else set(logged.summary)
        shown |= {*config["metrics"], *([config["xAxis"]] if lines else [])} - there
    [table] = spec(cells)["section"]["runSets"]
    columns = {
        name.removeprefix("summary:") for name in table["runFeed"]["columnPinned"] if name.startswith("summary:")
    }
    return shown | (columns - set(logged.summary))


@pytest.mark.parametrize(
    "experiment",
    [
        ["noise_lb_seed", "noise=0.1", "lb=0.01"],
        ["experiment_c", "router=switch,expert_choice"],  # a capacity, and a router that is not causal
        ["temperature_schedules", "schedule=cosine", "z=0.1"],
        ["spectra_ablation", "variant=spectra_full,dense"],  # of which one has no MoE layer
    ],
    ids=lambda words: words[0],
)
def test_every_panel_shows_what_is_logged(
    experiment: list[str], small: list[str], tmp_path: Path, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *narrowed = experiment
    settings = [*small, "logger.mode=offline", f"out={tmp_path}"]
    cells = read_cells([f"experiment={name}", "seed=42", *narrowed, *settings]) or []
    keys = logged(cells)
    assert unlogged(cells, keys) == set()
    monkeypatch.setattr(dashboard, "SHARPNESS", ["routing/entropy", "routing/entropyy"])
    monkeypatch.setattr(dashboard, "COMPARED", ["val/loss", "val/los"])
    assert unlogged(cells, keys) == {"routing/entropyy", "final/val/los"}


def test_what_an_experiment_turns_on_has_panels(small: list[str]) -> None:
    def shown(*words: str) -> set[str]:
        return {name for panel in panels(read_cells([*small, *words]) or []) for name in panel["config"]["metrics"]}

    plain = shown("lb=0")
    assert {"routing/load_cv/layer00", "routing/load_cv/layer01", "temperature", "time/tokens_per_s"} <= plain
    assert shown("lb=0", "model.layers=3") - plain == {f"{name}/layer02" for name in dashboard.PER_LAYER}
    assert shown("lb=0", "model.layers=3", "model.first_k_dense_replace=1") == plain
    assert shown("lb=0", "capacity=1.0") - plain == set(dashboard.LIMIT)
    assert shown("lb=0", "z=0.1") - plain == {"train/router_z"}


def test_bars_compare_means_by_condition_and_by_every_factor(factorial: list[Cell]) -> None:
    drawn = panels(factorial)
    bars = [panel["config"] for panel in drawn if panel["viewType"] == "Bar Chart"]
    assert {bar["groupBy"] for bar in bars} == {"condition.value", "noise.value", "lb.value"}
    assert {"final/val/loss", "final/routing/load_cv/pooled"} < {name for bar in bars for name in bar["metrics"]}
    lines = [panel["config"] for panel in drawn if panel["viewType"] == "Run History Line Plot"]
    assert {line["groupBy"] for line in lines} == {"condition.value"}
    for config in bars + lines:
        assert (config["groupAgg"], config["groupArea"], config["aggregate"]) == ("mean", "minmax", True)
        assert config["limit"] >= 18


def test_the_table_holds_one_experiment_by_condition(factorial: list[Cell]) -> None:
    [table] = spec(factorial)["section"]["runSets"]
    assert table["grouping"] == [{"section": "config", "name": "condition.value"}]
    [only] = table["filters"]["filters"]
    assert (only["key"], only["op"], only["value"]) == ({"section": "run", "name": "group"}, "=", "noise_lb_seed")
    assert {"config:noise.value", "config:lb.value"} < set(table["runFeed"]["columnPinned"])


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("noise_floor", []),
        ("quick_demo", ["router.temp"]),
        ("spectra_scaling", ["choices.variant", "choices.model"]),
        ("spectra_sweep_e", ["router.gru", "data.seq_len"]),
    ],
)
def test_factors_are_the_keys_of_the_config_that_vary(experiment: str, expected: list[str]) -> None:
    cells = read_cells([f"experiment={experiment}", "seed=42,43"]) or []
    assert dashboard.factors(cells) == expected
    assert set(expected) <= set(flatten({**asdict(cells[0].config), "choices": cells[0].choices}))


def test_a_condition_is_the_configuration_without_the_seed(factorial: list[Cell]) -> None:
    """Of a sweep; also where brackets put a digest of everything into the folder's name."""
    words = ["seed=9,4294967295", "model.dim=64,128", "data.source.domains=[speech,docs]"]
    for cells in (factorial, read_cells(["-m", *words]) or []):
        for one, other in itertools.product(cells, cells):
            same = replace(one.config, seed=0) == replace(other.config, seed=0)
            assert (condition(one) == condition(other)) == same


def test_a_condition_reads_like_the_overrides_and_tells_apart_what_they_do_not_say(factorial: list[Cell]) -> None:
    cell = next(cell for cell in factorial if cell.folder.name == "lb=0.01,noise=0.1,seed=43")
    assert condition(cell).startswith("lb=0.01,noise=0.1 ")
    other = cell._replace(config=replace(cell.config, z=0.5))
    free = cell._replace(config=replace(cell.config, threads=2, seed=44))
    assert condition(other) != condition(cell) == condition(free)


def test_the_command_prints_a_view_that_the_schema_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main(["noise_lb_seed", "noise=0.0,0.5", "lb=0.01", "seed=42"]) == 0
    text = capsys.readouterr().out
    view = internal.View.model_validate_json(text)
    assert view.display_name == "noise_lb_seed"
    assert json.loads(view.model_dump_json(by_alias=True, exclude_none=True)) == json.loads(text)


def test_the_schema_takes_no_other_panels() -> None:
    view = dashboard.workspace(read_cells(["experiment=noise_floor"]) or [], entity="me", project="p")
    with pytest.raises(ValueError, match="panels"):
        view.sections[0].panels = ["loss"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["noise_lb_sed"], "unknown option of experiment 'noise_lb_sed'; nearest: noise_lb_seed"),
        (["noise_lb_seed", "nois=1"], "unknown key 'nois'; nearest: noise"),
        (["noise_lb_seed", "--project", "p"], "--entity and --project go together"),
        (["default", "model=dense"], "no run of this experiment has a Mixture-of-Experts layer"),
        (["noise_floor", "--entity", "e", "--project", "p"], "W&B did not save the workspace: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))  # where a login would be
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there; what W&B says of it is its own
    assert dashboard.main(arguments) == 2
    told = capsys.readouterr()
    assert complaint in told.err
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.reports.v2", raising=False)
    assert dashboard.main(["noise_floor"]) == 2
    assert "wandb_workspaces" in (told := capsys.readouterr().err)
    assert "pip install -e '.[dashboard]'" in told


def test_a_saved_workspace_is_told_by_its_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[internal.View] = []

    def upsert(view: internal.View) -> dict[str, Any]:
        sent.append(view)
        return {"upsertView": {"view": {"name": view.name, "id": "1"}}}

    monkeypatch.setattr(internal, "upsert_view2", upsert)
    monkeypatch.setattr("wandb_workspaces.workspaces.interface.get_app_url", lambda api: "https://wandb.example")
    monkeypatch.setattr("wandb.Api", lambda: None)
    assert dashboard.main(["noise_floor", "--entity", "me", "--project", "p"]) == 0
    [view] = sent
    assert (view.entity, view.project, view.display_name) == ("me", "p", "noise_floor")
    assert capsys.readouterr().out.startswith("https://wandb.example/me/p?nw=")
