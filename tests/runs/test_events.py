"""Tests of events.jsonl: writing, resuming, and the history that is computed from the events."""

from pathlib import Path

from moe.files import write_json
from moe.runs.events import EventLog, evaluation_series, last_mean, median_speed, read_events


def test_a_resume_removes_incomplete_lines_and_events_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, step=0) as events:
        for step in range(1, 6):
            events.write("train", step, {"train/loss": 1.0 / step})
    path.write_text(path.read_text()[:-9])
    assert [event["step"] for event in read_events(path)] == [1, 2, 3, 4]
    with EventLog(path, step=3) as events:
        events.write("train", 4, {"train/loss": 9.0})
    assert [event["step"] for event in read_events(path)] == [1, 2, 3, 4]
    assert read_events(path)[-1]["train/loss"] == 9.0


def test_a_run_killed_before_its_first_checkpoint_starts_its_events_again(tmp_path: Path) -> None:
    for _ in range(2):
        with EventLog(tmp_path / "events.jsonl", step=0) as events:
            events.write("eval", 0, {"val/loss": 1.0})
    assert len(read_events(tmp_path / "events.jsonl")) == 1


def test_every_event_is_written_to_the_file_at_once(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", step=0) as events:
        events.write("train", 1, {})
        assert len(read_events(tmp_path / "events.jsonl")) == 1


def test_history_has_one_entry_per_evaluation_and_means_over_the_steps_before_it() -> None:
    def evaluation(step: int) -> dict[str, object]:
        layers = {"routing/entropy/layer00": 1.0, "routing/entropy/layer01": 2.0}
        shares = {"routing/utilization": [[0.5, 0.5], [0.25, 0.75]]}
        values = {"kind": "eval", "step": step, "val/loss": 5.0 - step, "time/elapsed": 60.0 * step}
        return values | layers | shares | {"routing/entropy": 1.5}

    train = [{"kind": "train", "step": s, "train/loss": float(s), "train/load_balance": 1.0 + s} for s in (1, 2)]
    series = evaluation_series([evaluation(0), *train, evaluation(2)])
    assert series["steps"] == [0, 2]
    assert series["train_losses"] == [None, 1.5]
    assert series["load_balancing_losses"] == [None, 2.5]
    assert series["val_losses"] == [5.0, 3.0]
    assert series["elapsed_times"] == [0.0, 2.0]
    assert series["routing_entropies_per_layer"] == [[1.0, 2.0]] * 2
    assert series["expert_utilizations"] == [[0.375, 0.625]] * 2


def test_write_json_replaces_a_file_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_median_speed_covers_training_steps_after_the_first_five() -> None:
    """The speed is the median over training steps after the first five. Evaluations do not count.

    With five steps or fewer there is no speed.
    """
    speeds = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0, 6: 100.0, 7: 300.0, 8: 250.0}
    events = [{"kind": "train", "step": step, "time/tokens_per_s": speed} for step, speed in speeds.items()]
    events += [{"kind": "eval", "step": step} for step in range(9)]
    assert median_speed(events) == 250.0
    assert median_speed(events[:5]) is None


def test_the_mean_of_the_last_evaluations_needs_three_after_the_first_step() -> None:
    events = [{"kind": "eval", "step": step, "val/loss": loss} for step, loss in ((0, 9.0), (1, 5.0), (2, 4.0))]
    assert last_mean(events, "val/loss") is None
    events += [{"kind": "train", "step": 3}, {"kind": "eval", "step": 3, "val/loss": 3.0}]
    assert last_mean(events, "val/loss") == 4.0
    assert last_mean([*events, {"kind": "eval", "step": 4, "val/loss": 2.0}], "val/loss") == 3.0
    assert last_mean([*events, {"kind": "eval", "step": 4, "val/loss": None}], "val/loss") is None, "no mean of two"
