"""Tests that a checkpoint has exactly the fields of TrainState, and that listeners receive the events of a run."""

import json
from typing import Any

import pytest
from small_runs import run

from moe.checks import ConfigError
from moe.runs import checkpoint
from moe.runs.events import RunListener, read_events
from moe.runs.signals import Interrupted, Signals
from moe.training.loop import train
from moe.training.state import TrainState


def test_a_checkpoint_without_a_field_or_with_an_unknown_one_is_refused(cell: Any) -> None:
    one = cell()
    with pytest.raises(Interrupted):
        run(one, stop_after=3)
    loaded = checkpoint.load(one.folder / "checkpoints")
    assert loaded is not None
    step, fields = loaded
    assert step == fields["step"] == 3
    assert set(fields) == set(TrainState._fields)
    for changed, name in (
        ({key: value for key, value in fields.items() if key != "optimizers"}, "optimizers"),
        ({**fields, "sampler": 1}, "sampler"),
    ):
        checkpoint.save(one.folder / "checkpoints", step, changed)
        with pytest.raises(
            ConfigError, match=rf"step 3 was written by another version of this program \(different fields: {name}\);"
        ):
            run(one)
    checkpoint.save(one.folder / "checkpoints", step, fields)
    assert run(one)["train_seconds"] > fields["train_seconds"]


@pytest.mark.parametrize(
    "lost", [{"kind": "train", "step": 1}, {"kind": "train", "step": 3}, {"kind": "eval", "step": 2}]
)
def test_a_run_whose_log_lacks_an_event_is_not_resumed(cell: Any, lost: dict[str, Any]) -> None:
    one = cell("eval_every=2")
    with pytest.raises(Interrupted):
        run(one, stop_after=3)
    path = one.folder / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not lost.items() <= json.loads(line).items()]
    path.write_text("".join(kept))
    with pytest.raises(
        ConfigError, match=rf"events.jsonl: the {lost['kind']} event of step {lost['step']} is missing, .* step 3"
    ):
        run(one)
    assert path.read_text() == "".join(kept)
    path.unlink()
    with pytest.raises(ConfigError, match="the train event of step 1 is missing"):
        run(one)
    path.write_text("".join(lines))
    assert run(one)


def test_every_listener_receives_the_events_of_the_file_in_the_same_order(cell: Any) -> None:
    class Collector(RunListener):
        """Collects events. Checks that each event is in events.jsonl before listeners receive it."""

        def __init__(self) -> None:
            self.events: list[dict[str, Any]] = []

        def log(self, step: int, values: dict[str, Any]) -> None:
            written = read_events(one.folder / "events.jsonl")
            assert len(written) == len(self.events) + 1
            self.events.append({"step": step, **values})

    one, listeners = cell(), [Collector(), Collector()]
    one.folder.mkdir(parents=True)
    train(one.config, one.folder, signals=Signals(), listeners=listeners)
    for event in (written := read_events(one.folder / "events.jsonl")):
        del event["kind"]
    assert listeners[0].events == listeners[1].events == written
