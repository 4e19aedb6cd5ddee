"""The event log of a run, events.jsonl: it holds every training step and every evaluation, one event per line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import orjson

from moe.files import open_file, open_unlinked, write_text

FILE = "events.jsonl"


def iterate_events(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the event of each line of a log, and None for a line that is torn or holds no event.

    An event is a flat dict with at least "kind" ("train" or "eval") and "step". Raises OSError.
    """
    with open_file(path, "rb", buffering=2**20) as lines:  # lines may be as long as the usual buffer
        for line in lines:
            try:
                event = orjson.loads(line)
            except ValueError:
                event = _with_nonfinite(line)
            yield event if isinstance(event, dict) and _is_event(event) else None


def _with_nonfinite(line: bytes) -> Any:
    """Return the content of a line with NaN or Infinity, which orjson refuses; None if it is no JSON at all."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_event(event: dict[str, Any]) -> bool:
    return isinstance(event.get("kind"), str) and type(event.get("step")) is int


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return all events of a log, without the torn last line that a killed run may leave; empty if there is no log."""
    return [event for event in iterate_events(path) if event is not None] if path.exists() else []


def lost_event(path: Path, step: int, *, eval_every: int) -> str:
    """Return the first event up to `step` that a log lacks, such as "train event of step 3"; "" if it has them all."""
    found = {(event["kind"], event["step"]) for event in read_events(path)}
    expected = [("train", number) for number in range(1, step + 1)]
    expected += [("eval", number) for number in range(0, step + 1, eval_every)]
    return next((f"{kind} event of step {number}" for kind, number in expected if (kind, number) not in found), "")


class EventLog:
    """Log to which each event is appended as one line, at once. "step" is the number of optimizer steps done.

    A run that resumes from `step` writes all later events again, so the log drops them when it opens; at step 0 it
    drops all events. evaluations: the events of evaluations that it keeps.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        earlier = [event for event in read_events(path) if event["step"] <= step] if step else []
        self.evaluations = [event for event in earlier if event["kind"] == "eval"]
        write_text(path, "".join(json.dumps(event) + "\n" for event in earlier))
        self._file = open_unlinked(path, "a", buffering=1)  # closed by __exit__

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def secure(self) -> None:
        """Wait until all events are on the disk, so that no checkpoint is newer than the log."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


@runtime_checkable
class RunListener(Protocol):
    """Receives the events of a run, on the first rank only: the mirrors in W&B and other places, a benchmark, a test.

    An exception that a listener raises ends the run, so a listener that may fail handles its own errors.
    """

    def begin(self, step: int) -> None:
        """Receive, before the first event, after how many optimizer steps the run continues; 0 for a new run.

        A resumed run repeats the steps after its checkpoint. By now events.jsonl no longer holds them. A listener that
        inherits from this class need not implement it.
        """
        return

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Receive one event after `step` optimizer steps.

        Values of a training step have the key "train/loss", values of an evaluation have "val/loss".
        """

    def finish(self, summary: dict[str, Any]) -> None:
        """Receive the final metrics after the last event; they are empty if the run did not finish.

        The code that started the run calls this, because final metrics are computed after training. A listener that
        inherits from this class need not implement it.
        """
        return


# Series of metrics.json -> the key of an evaluation event. Values by layer go into `<series>_per_layer`.
SERIES = {
    "steps": "step",
    "val_losses": "val/loss",
    "val_accuracies": "val/accuracy",
    "val_perplexities": "val/perplexity",
    "learning_rates": "learning_rate",
    "temperatures": "temperature",
    "routing_entropies": "routing/entropy",
    "selection_confidences": "routing/confidence",
    "load_cvs": "routing/load_cv",
    "drop_rates": "routing/drop_rate",
}


def evaluation_series(events: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the series of metrics.json, each with one entry per evaluation.

    `train_losses` and `load_balancing_losses` are means over the training steps since the evaluation before (null at
    step 0). `load_balancing_losses` are unweighted (1 is balanced) and a mean over layers. `elapsed_times` are minutes.
    `expert_utilizations` are shares by expert, a mean over layers; null if no token of a layer asks for an expert, and
    for layers of different numbers of experts.
    """
    series: dict[str, list[Any]] = {name: [] for name in SERIES}
    series |= {"train_losses": [], "load_balancing_losses": [], "elapsed_times": [], "expert_utilizations": []}
    series |= {"expert_utilizations_per_layer": []}
    since: list[dict[str, Any]] = []
    layers: list[Any] | None
    for event in events:
        if event["kind"] == "train":
            since.append(event)
            continue
        for name, key in SERIES.items():
            series[name].append(event.get(key))
            layers = [event[k] for k in sorted(event) if k.startswith(f"{key}/layer")]
            if layers:
                series.setdefault(f"{name}_per_layer", []).append(layers)
        series["train_losses"].append(_mean(since, "train/loss"))
        series["load_balancing_losses"].append(_mean(since, "train/load_balance"))
        series["elapsed_times"].append(event["time/elapsed"] / 60)
        layers = event.get("routing/utilization")
        series["expert_utilizations_per_layer"].append(layers)
        alike = layers if layers and len({*map(len, layers)}) == 1 else None
        series["expert_utilizations"].append(alike and [_mean_or_null(c) for c in zip(*alike, strict=True)])
        since = []
    return series


WARM_UP = 5  # the first training steps are slower than the rest


def median_speed(events: list[dict[str, Any]]) -> float | None:
    """Return the median tokens per second of training steps after the first `WARM_UP`; None without such steps.

    Evaluation and saving do not count.
    """
    speeds = [e["time/tokens_per_s"] for e in events if e["kind"] == "train" and e["step"] > WARM_UP]
    return median(speeds) if speeds else None


def late_mean(events: list[dict[str, Any]], key: str) -> float | None:
    """Return the mean of a value over the second half of the training steps; None if no such step has it."""
    trains = [event for event in events if event["kind"] == "train"]
    last = max((event["step"] for event in trains), default=0)
    return _mean([event for event in trains if event["step"] > last / 2], key)


LAST = 3  # evaluations of which `last_mean` is the mean
LAST_MEAN = f"val/loss_last_{LAST}"


def last_mean(events: list[dict[str, Any]], key: str) -> float | None:
    """Return the mean of a value over the last `LAST` evaluations after a training step; None if one has no value."""
    values = [event.get(key) for event in events if event["kind"] == "eval" and event["step"] > 0][-LAST:]
    return _mean_or_null(tuple(values)) if len(values) == LAST else None


def _mean_or_null(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _mean(events: list[dict[str, Any]], key: str) -> float | None:
    values = [event[key] for event in events if event.get(key) is not None]
    return fmean(values) if values else None
