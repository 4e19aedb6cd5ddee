"""Tests of the W&B dashboard: it fits W&B's schema and shows only what runs log. How W&B draws it is not tested."""

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
from moe.config.cell import Cell
from moe.config.keys import flatten
from moe.launch.command_line import read_cells
from moe.launch.run import run
from moe.runs import wandb_mirror
from moe.runs.folder import status
from moe.runs.wandb_mirror import condition


def spec(cells: list[Cell]) -> dict[str, Any]:
    """Return the workspace in the form in which it would be sent to W&B."""
    return json.loads(
        dashboard.workspace(cells, entity="me", project="p")._to_model().spec.model_dump_json(by_alias=True)
    )


def panels(cells: list[Cell]) -> list[dict[str, Any]]:
    found = spec(cells)["section"]["panelBankConfig"]["sections"]
    return [panel for section in found for panel in section["panels"]]


@pytest.fixture(scope="module")
def factorial() -> list[Cell]:
    return read_cells(["experiment=noise_lb_seed"]) or []


class FakeWandbRun:
    """Replacement for a W&B run that remembers the keys that are logged."""

    def __init__(self) -> None:
        self.history: set[str] = set()
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any]) -> None:
        self.history |= set(values)

    def finish(self) -> None:
        self.summary |= dict.fromkeys(self.history)  # W&B copies the last value of each key into the summary


@pytest.fixture
def train_and_log(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Cell]], FakeWandbRun]:
    """Return a function that trains cells to their end. It returns one fake W&B run that all of them logged to."""

    def train(cells: list[Cell]) -> FakeWandbRun:
        wandb_run = FakeWandbRun()
        monkeypatch.setattr(wandb_mirror, "_start", lambda cell, mode: wandb_run)
        for cell in cells:
            run(cell)
            assert status(cell) == "finished"
        return wandb_run

    return train


def shown_but_not_logged(cells: list[Cell], logged: FakeWandbRun) -> set[str]:
    """Return the keys that the dashboard of these cells shows although no cell logs them."""
    shown: set[str] = set()
    for panel in panels(cells):
        config = panel["config"]
        lines = panel["viewType"] == "Run History Line Plot"
        known = logged.history if lines else set(logged.summary)
        shown |= {*config["metrics"], *([config["xAxis"]] if lines else [])} - known
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
        ["spectra_ablation", "variant=spectra_full,dense"],  # the dense variant has no MoE layer
        ["default", "router=hash", "capacity=1.0"],  # no probabilities
        ["default", "router=soft_moe"],  # experts take slots, not tokens
    ],
    ids=lambda words: words[1],
)
def test_every_panel_shows_a_key_that_is_logged(
    experiment: list[str], small: list[str], tmp_path: Path, train_and_log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *overrides = experiment
    settings = [*small, "eval_every=6", "logger.mode=offline", f"out={tmp_path}"]
    cells = read_cells([f"experiment={name}", "seed=42", *overrides, *settings]) or []
    logged = train_and_log(cells)
    assert shown_but_not_logged(cells, logged) == set()
    monkeypatch.setattr(dashboard, "SHARPNESS", ["routing/entropy", "routing/entropyy"])
    monkeypatch.setattr(dashboard, "COMPARED", ["val/loss", "val/los"])
    assert shown_but_not_logged(cells, logged) == {"routing/entropyy", "final/val/los"}


def test_options_that_an_experiment_turns_on_get_panels(small: list[str]) -> None:
    def shown(*overrides: str) -> set[str]:
        return {name for panel in panels(read_cells([*small, *overrides]) or []) for name in panel["config"]["metrics"]}

    without_options = shown("lb=0")
    assert {"routing/load_cv/layer00", "routing/load_cv/layer01", "temperature", "time/tokens_per_s"} <= without_options
    assert shown("lb=0", "model.layers=3") - without_options == {f"{name}/layer02" for name in dashboard.PER_LAYER}
    assert shown("lb=0", "model.layers=3", "model.first_k_dense_replace=1") == without_options
    assert shown("lb=0", "capacity=1.0") - without_options == set(dashboard.LIMIT)
    assert shown("lb=0", "z=0.1") - without_options == {"train/router_z"}


def test_what_the_field_asks_about_routing_has_a_panel_where_it_is_logged() -> None:
    """Metrics that a router does not have get no panel: a token of switch has one expert, one of hash no logits."""

    def shown(*overrides: str) -> set[str]:
        return {name for panel in panels(read_cells([*overrides]) or []) for name in panel["config"]["metrics"]}

    asked = {f"routing/{name}" for name in ("router_gram", "jaccard", "sequential_overlap", "load_max_violation")}
    asked |= {"final/routing/consistency", "train/routing/drop_rate", "val_capacity/drop_rate"}
    assert shown("capacity=1.0") >= asked
    assert asked - shown() == {"train/routing/drop_rate", "val_capacity/drop_rate"}
    assert asked - shown("router=switch", "capacity=1.0") == {"routing/jaccard"}
    assert asked - shown("router=hash", "capacity=1.0", "lb=0") == {"routing/router_gram"}
    assert asked - shown("-m", "router=switch,hash,topk", "capacity=1.0") == set()


def test_bar_charts_show_means_by_condition_and_by_every_factor(factorial: list[Cell]) -> None:
    drawn = panels(factorial)
    bars = [panel["config"] for panel in drawn if panel["viewType"] == "Bar Chart"]
    assert {bar["groupBy"] for bar in bars} == {"condition.value", "noise.value", "lb.value"}
    assert {"final/val/loss", "final/routing/load_cv/pooled"} < {name for bar in bars for name in bar["metrics"]}
    lines = [panel["config"] for panel in drawn if panel["viewType"] == "Run History Line Plot"]
    assert {line["groupBy"] for line in lines} == {"condition.value"}
    for config in bars + lines:
        assert (config["groupAgg"], config["groupArea"], config["aggregate"]) == ("mean", "minmax", True)
        assert config["limit"] >= 18


def test_the_run_table_holds_one_experiment_grouped_by_condition(factorial: list[Cell]) -> None:
    [table] = spec(factorial)["section"]["runSets"]
    assert table["grouping"] == [{"section": "config", "name": "condition.value"}]
    [group_filter] = table["filters"]["filters"]
    assert group_filter["key"] == {"section": "run", "name": "group"}
    assert (group_filter["op"], group_filter["value"]) == ("=", "noise_lb_seed")
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
    """Two cells have the same condition exactly if they differ in nothing but the seed.

    This also holds where an override has brackets, so that the folder name contains a digest of all overrides.
    """
    words = ["seed=9,4294967295", "model.dim=64,128", "data.source.domains=[speech,docs]"]
    for cells in (factorial, read_cells(["-m", *words]) or []):
        for one, other in itertools.product(cells, cells):
            same = replace(one.config, seed=0) == replace(other.config, seed=0)
            assert (condition(one) == condition(other)) == same


def test_a_condition_begins_with_the_overrides_and_ignores_only_seed_and_threads(factorial: list[Cell]) -> None:
    cell = next(cell for cell in factorial if cell.folder.name == "lb=0.01,noise=0.1,seed=43")
    assert condition(cell).startswith("lb=0.01,noise=0.1 ")
    other_loss = cell._replace(config=replace(cell.config, z=0.5))
    other_seed_and_threads = cell._replace(config=replace(cell.config, threads=2, seed=44))
    assert condition(other_loss) != condition(cell) == condition(other_seed_and_threads)


def test_the_command_prints_a_view_that_fits_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main(["noise_lb_seed", "noise=0.0,0.5", "lb=0.01", "seed=42"]) == 0
    text = capsys.readouterr().out
    view = internal.View.model_validate_json(text)
    assert view.display_name == "noise_lb_seed"
    assert json.loads(view.model_dump_json(by_alias=True, exclude_none=True)) == json.loads(text)


def test_the_schema_refuses_wrong_panels() -> None:
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
def test_errors_are_one_line(
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))  # W&B would look for a login here
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server listens there
    monkeypatch.setattr("wandb.apis.public.api.Api._HTTP_TIMEOUT", 1)  # W&B tries again for so many seconds
    assert dashboard.main(arguments) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.reports.v2", raising=False)
    assert dashboard.main(["noise_floor"]) == 2
    assert "wandb_workspaces" in (message := capsys.readouterr().err)
    assert "pip install -e '.[dashboard]'" in message


def test_saving_a_workspace_prints_its_address(
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
