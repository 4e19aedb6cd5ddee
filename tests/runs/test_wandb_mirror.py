"""Tests of the W&B mirror: it contains the events of a run, and its failures do not affect training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from train_processes import TRAIN, run_script
from wandb_files import wandb_records

from moe.checks import ConfigError
from moe.config.cell import Grid
from moe.config.options import CONF
from moe.launch.command_line import read_cells
from moe.launch.run import run
from moe.launch.sweep import carry_out
from moe.runs.events import read_events
from moe.runs.wandb_mirror import WandbMirror, _histograms, mode_of_environment


def test_an_offline_wandb_run_contains_the_events_final_metrics_configuration_and_on_request_the_model(
    small: list[str], tmp_path: Path
) -> None:
    arguments = [*[s for s in small if not s.startswith("logger")], "logger.mode=offline", "logger.log_model=true"]
    done = run_script(TRAIN, *arguments, f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    [folder] = [path.parent for path in tmp_path.rglob("run.json")]
    [run] = folder.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(run)
    mirrored = [record["history"]["item"] for record in records if record["type"] == "history"]
    events = read_events(folder / "events.jsonl")
    assert len(mirrored) == len(events)
    for row, event in zip(mirrored, events, strict=True):
        numbers = {k: v for k, v in event.items() if isinstance(v, int | float)}
        assert {k: row[k] for k in numbers} == numbers
        for layer, shares in enumerate(event.get("routing/utilization", [])):  # a bin for each of the four experts
            histogram = f"routing/utilization/layer{layer:02d}"
            assert row[f"{histogram}._type"] == "histogram"
            assert (row[f"{histogram}.values"], row[f"{histogram}.bins"]) == (shares, [0, 1, 2, 3, 4])
    [axis] = [record["metric"] for record in records if record["type"] == "metric"]
    assert (axis["glob_name"], axis["step_metric"]) == ("*", "step")
    summary: dict[str, Any] = {}
    for record in records:
        summary |= record["summary"]["update"] if record["type"] == "summary" else {}
    final = json.loads((folder / "metrics.json").read_text())["final_metrics"]
    expected = {f"final/{key}": value for key, value in final.items() if isinstance(value, int | float)}
    assert {key: value for key, value in summary.items() if key.startswith("final/")} == expected
    record_json = json.loads((folder / "run.json").read_text())
    [start] = [record["run"] for record in records if record["type"] == "run"]
    assert (start["run_group"], start["display_name"]) == ("default: single runs", folder.name)
    config = {key: value for key, value in start["config"]["update"].items() if key != "_wandb"}
    condition = config.pop("condition")
    assert config == {**record_json["config"], "choices": record_json["choices"]}
    assert condition.startswith("batch_size=4,")
    [artifact] = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert (artifact["type"], artifact["name"]) == ("model", f"model-{start['run_id']}")
    files = {Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    assert files == set((folder / "model").iterdir())  # the files themselves, not copies


def test_a_link_to_wandbs_logs_outside_the_run_folder_does_not_prevent_a_resume(cell: Any) -> None:
    """An interrupted run is resumed although its folder contains a link to W&B's logs. W&B 0.31 makes such links."""
    one = cell("logger.mode=offline")
    one.folder.mkdir(parents=True)
    WandbMirror(one).finish({})
    [mirrored] = one.folder.glob("wandb/offline-run-*")
    (mirrored / "log").symlink_to("/")
    assert carry_out([one], lambda: run(one)) == 0


@pytest.mark.parametrize(
    ("mode", "environment"),
    [
        ("online", {}),
        ("online", {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}),
        ("offline", {}),
    ],
    ids=["no key", "server down", "offline"],
)
def test_no_mode_and_no_failure_of_wandb_changes_the_weights(
    mode: str, environment: dict[str, str], cell: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moe.runs.signals import Signals
    from moe.training.loop import train

    monkeypatch.setattr("moe.runs.wandb_mirror.START_SECONDS", 2)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    weights = []
    for setting in ("disabled", mode):
        one = cell(f"logger.mode={setting}", "steps=2", "eval_every=1", f"out={tmp_path / setting}")
        one.folder.mkdir(parents=True)
        mirror = WandbMirror(one)
        train(one.config, one.folder, signals=Signals(), listeners=[mirror])
        mirror.finish({"val/loss": 1.0})
        weights.append((one.folder / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_resumed_run_continues_its_online_run_and_a_new_folder_begins_another(
    cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id is kept in the run folder: a run that was deleted and trained again is another run."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **settings: started.append(settings) or MagicMock())
    one = cell("logger.mode=online")
    for _ in range(2):
        one.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            WandbMirror(one).finish({})
        shutil.rmtree(one.folder)
    first, resumed, second, _ = (settings["id"] for settings in started)
    assert first == resumed != second
    assert all(settings["resume"] == "allow" for settings in started)


def test_an_agent_of_a_wandb_sweep_chooses_the_id_of_a_single_run(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of a grid that such an agent starts are several W&B runs, so each has an id of its own."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **settings: started.append(settings) or MagicMock())
    monkeypatch.setenv("WANDB_RUN_ID", "x1-y_z")
    one = cell("logger.mode=online")
    grid = Grid("default: noise", ["noise"], {}, [one.folder.name])
    for each in (one, one._replace(folder=one.folder.with_name("other"), grid=grid)):
        each.folder.mkdir(parents=True, exist_ok=True)
        WandbMirror(each).finish({})
    assert started[0]["id"] == "x1-y_z" != started[1]["id"]


def test_several_runs_with_one_wandb_run_id_in_the_environment_are_several_wandb_runs(
    cell: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Offline every start has an id of its own. Online the first folder keeps the given id, also when it is resumed."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **settings: started.append(settings) or MagicMock())
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    one = cell("logger.mode=online")
    other = one._replace(folder=one.folder.parent.with_name("other") / "base")
    for each in (one, other, one, cell("logger.mode=offline"), cell("logger.mode=offline")):
        each.folder.mkdir(parents=True, exist_ok=True)
        WandbMirror(each).finish({})
    ids = [settings["id"] for settings in started]
    assert (ids[0], ids[2]) == ("mine", "mine")
    assert len({*ids}) == 4
    warning = "WANDB_RUN_ID=mine is the id of another run, so that this run gets an id of its own"
    assert caplog.messages.count(warning) == 1


def test_a_wandb_run_id_that_wandb_refuses_is_refused_before_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "a/b:c")
    with pytest.raises(ConfigError, match=r"^environment variable WANDB_RUN_ID=a/b:c: must be 1 to 64 letters and "):
        read_cells([])
    assert read_cells(["logger.mode=disabled"])


KEY = "0" * 40


@pytest.mark.parametrize(
    ("environment", "login", "mode"),
    [
        ({}, None, "offline"),
        ({}, "api.wandb.ai", "online"),
        ({}, "other.host", "offline"),
        ({"WANDB_BASE_URL": "https://other.host:8080"}, "other.host", "online"),
        ({"WANDB_API_KEY": KEY}, None, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "api.wandb.ai", "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, None, "disabled"),
        ({"WANDB_MODE": "online"}, None, "online"),
    ],
)
def test_the_environment_and_a_login_decide_the_mode_as_in_wandb(
    environment: dict[str, str], login: str | None, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if login is not None:
        (tmp_path / "netrc").write_text(f"machine {login}\n  login user\n  password {KEY}\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mode_of_environment() == mode


def test_an_empty_variable_of_wandb_loses_no_copy(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_API_KEY", "WANDB_SILENT", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    arguments = [*[s for s in small if not s.startswith("logger")], "logger.mode=auto", "steps=1", f"out={tmp_path}"]
    done = run_script(TRAIN, *arguments)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("offline-run-*"))


def test_a_run_that_copies_nothing_to_wandb_does_not_import_its_library(small: list[str], tmp_path: Path) -> None:
    code = "import sys; from moe.launch.train import main; print(main(), *{'torch', 'wandb'} & {*sys.modules})"
    command = [sys.executable, "-c", code, *small, "logger.mode=auto", "steps=1", f"out={tmp_path}"]
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=CONF.parent, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 torch"


def test_the_message_about_a_variable_that_wandb_refuses_names_it(
    cell: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("1 validation error for Settings\nquiet\n  Input should be a valid boolean")

    monkeypatch.setattr("wandb.init", refuse)
    WandbMirror(cell("logger.mode=offline")).finish({})
    said = "W&B cannot start in offline mode: 1 validation error for Settings quiet Input should be a valid boolean"
    assert caplog.messages == [said]


def test_project_and_entity_come_from_the_environment_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_ENTITY", "us")
    [cell] = read_cells([]) or []
    assert (cell.config.logger.project, cell.config.logger.entity) == ("mine", "us")
    [cell] = read_cells(["logger.project=given"]) or []
    assert cell.config.logger.project == "given"


@pytest.mark.parametrize("name", ["a#b", "a/b", "a%b", "x" * 129])
def test_names_that_wandb_refuses_are_refused_before_the_first_run(name: str) -> None:
    for key in ("project", "entity"):
        with pytest.raises(ConfigError, match=f"logger.{key}={name}: must be a name of W&B"):
            read_cells([f"logger.{key}={name}"])


def test_a_missing_wandb_package_gives_a_warning(
    cell: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    WandbMirror(cell("logger.mode=offline")).log(1, {"a": 1.0})
    assert "W&B cannot start in offline mode" in caplog.text


def test_lists_that_are_no_histogram_are_left_out() -> None:
    """W&B refuses a histogram of more than 512 bins; one layer without tokens has no shares."""
    values = {"gap": [[0.5, 0.5], [None, None]], "long": [0.1] * 513, "empty": [], "no layer": [[]], "number": 1.0}
    assert [*_histograms(values)] == ["gap/layer00"]
