"""Tests of the copies of events in a CSV file and in TensorBoard files, and of what all copies have in common."""

import contextlib
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.config.options import CONF
from moe.config.sections import LoggerConfig
from moe.files import write_text
from moe.launch.command_line import read_cells
from moe.launch.run import write_run_record
from moe.runs.events import RunListener, read_events
from moe.runs.folder import same_run
from moe.runs.mirrors import MIRRORS, Mirrors
from moe.runs.signals import Signals
from moe.training.loop import train

PAGE = (CONF.parent / "docs" / "dashboards.md").read_text(encoding="utf-8")


class Kill(RunListener):
    """Listener that ends a run without a checkpoint when step `step` is recorded."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def log(self, step: int, values: dict[str, Any]) -> None:
        if step == self.step:
            raise KeyboardInterrupt  # nothing handles it


def numbers(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if isinstance(value, int | float)}


def train_killed_twice(cell: Cell) -> list[dict[str, Any]]:
    """Train a cell with its mirrors, killed at step 1, before its first checkpoint, and at step 5, after another one.

    Return the numbers of its events.
    """
    cell.folder.mkdir(parents=True)
    started = []
    for step in (1, 5, None):
        started.append(Mirrors(cell))
        with contextlib.suppress(KeyboardInterrupt):
            train(cell.config, cell.folder, signals=Signals(), listeners=[started[-1], Kill(step)])
    started[-1].finish({"val/loss": 1.5})
    for killed in started[:-1]:  # only now, because a killed process closes nothing
        killed.finish({})
    return [numbers(event) for event in read_events(cell.folder / "events.jsonl")]


def load(folder: Path) -> pd.DataFrame:
    """Return metrics.csv as the page about loggers reads it."""
    found: dict[str, Any] = {"pd": pd}
    with contextlib.chdir(folder):
        exec(re.search("`(table = pd.read_csv.*?)`", PAGE)[1], found)  # type: ignore[index]
    assert len(eval(re.search("`(table.dropna.*?)`", PAGE)[1], found)) == 4  # type: ignore[index]
    return found["table"]


def test_metrics_csv_has_each_event_of_a_resumed_run_once(cell: Any) -> None:
    one = cell("logger.to=[csv]", "eval_every=2")
    events = train_killed_twice(one)
    table = load(one.folder)
    assert [{k: v for k, v in row.items() if pd.notna(v)} for row in table.to_dict("records")] == events
    assert table["step"].dtype == int
    assert not (one.folder / "wandb").exists()


def test_tensorboard_shows_each_step_of_a_resumed_run_once(cell: Any) -> None:
    """TensorBoard's own reader drops what an earlier start wrote after the checkpoint."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    one = cell("logger.to=[tensorboard]", "eval_every=2")
    events = train_killed_twice(one)
    read = reader.EventAccumulator(str(one.folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    tags = read.Tags()["scalars"]
    assert set(tags) == {key for event in events for key in event if key != "step"} | {"final/val/loss"}
    for tag in tags:
        expected = [(event["step"], event[tag]) for event in events if tag in event] or [(6, 1.5)]
        assert [(each.step, each.value) for each in read.Scalars(tag)] == [(s, pytest.approx(v)) for s, v in expected]


@pytest.fixture
def tensorboard_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands find TensorBoard, whether or not it is installed here."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "tensorboard" or find(name, *rest))


@pytest.mark.parametrize("place", ["csv", "tensorboard"])
def test_a_place_that_is_named_when_a_run_is_resumed_has_all_earlier_events(place: str, cell: Any) -> None:
    if place == "tensorboard":
        pytest.importorskip("tensorboard")
    one = cell(f"logger.to=[{place}]")
    one.folder.mkdir(parents=True)
    lines = [{"kind": "eval", "step": 0, "val/loss": 2.0}, {"kind": "train", "step": 1, "train/loss": 3.0}]
    write_text(one.folder / "events.jsonl", "".join(f"{line}\n".replace("'", '"') for line in lines))
    mirrors = Mirrors(one)
    mirrors.begin(1)
    mirrors.log(2, {"train/loss": 1.0, "val/loss": None})
    mirrors.finish({})
    if place == "csv":
        written = (one.folder / "metrics.csv").read_text().splitlines()
        assert written == ["step,val/loss,train/loss", "0,2.0,", "1,,3.0", "2,,1.0"]
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = EventAccumulator(str(one.folder / "tensorboard"))
        read.Reload()
        assert [(each.step, each.value) for each in read.Scalars("train/loss")] == [(1, 3.0), (2, 1.0)]


@pytest.mark.parametrize("method", ["__init__", "begin", "log", "finish"])
def test_the_first_error_of_a_place_gives_one_warning_and_ends_the_copying_to_it_alone(
    method: str, cell: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("lost connection\nand more")

    class Broken(RunListener):
        def log(self, step: int, values: dict[str, Any]) -> None: ...

    monkeypatch.setattr(Broken, method, fail)
    monkeypatch.setitem(MIRRORS, "wandb", ("W&B", lambda cell: Broken()))
    one = cell("logger.to=[wandb,csv]")
    one.folder.mkdir(parents=True)
    mirrors = Mirrors(one)
    mirrors.begin(0)
    for step in (1, 2):
        mirrors.log(step, {"a": float(step)})
    mirrors.finish({})
    [warning] = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.fullmatch("events are (not|no longer) copied to W&B: lost connection", warning)
    assert (one.folder / "metrics.csv").read_text() == "step,a\n1,1.0\n2,2.0\n"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ("logger=[csv,wandb]", "unknown option of logger"),
        ("logger.to=[csv,wand]", "^logger.to=wand: must be one of wandb, tensorboard, csv; nearest: wandb"),
        (
            "logger=csv logger.mode=offline",
            "^logger.mode=offline: must be left out, because logger.to=csv",
        ),
        ("logger=csv logger.log_model=true", "^logger.log_model=True: must be false, because nothing is copied to W&B"),
        ("logger.log_model=true save_model=none", "^logger.log_model=True: must be false with save_model=none"),
        ("report_to=csv", "write logger.to"),
    ],
)
def test_wrong_settings_of_the_copies_are_refused(overrides: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_cells(overrides.split())


def test_tensorboard_without_its_package_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^logger.to=tensorboard: must be .*pip install -e '.\[tensorboard\]'"):
        LoggerConfig(to=["tensorboard"]).check()


@pytest.mark.usefixtures("tensorboard_found")
def test_every_place_has_an_option_and_another_one_does_not_make_another_run(tmp_path: Path) -> None:
    """`logger=csv` copies to the CSV file alone, and finds the run that was begun with `logger=wandb`."""
    options = sorted(path.stem for path in (CONF / "logger").glob("*.yaml"))
    cells = {name: (read_cells([f"logger={name}", f"out={tmp_path}"]) or [])[0] for name in options}
    assert {name: one.config.logger.to for name, one in cells.items()} == {name: [name] for name in MIRRORS}
    assert len({(one.folder, str(one.identity())) for one in cells.values()}) == 1
    first = cells["wandb"]
    first.folder.mkdir(parents=True)
    write_run_record(first, "running")
    spelled = cells["csv"]._replace(folder=first.folder.with_name("another spelling"))
    assert same_run(spelled) == first.folder


@pytest.mark.parametrize("command", re.findall(r"^python train\.py (.*?)(?: +#.*)?$", PAGE, flags=re.MULTILINE))
@pytest.mark.usefixtures("tensorboard_found")
def test_the_commands_of_the_page_are_accepted(command: str) -> None:
    assert len(read_cells(command.split()) or []) == 1
