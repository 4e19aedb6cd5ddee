"""The files of a run folder: events.jsonl (the truth, a line an event), metrics.json and run.json (made from it)."""

import json
from pathlib import Path
from statistics import fmean, median
from types import TracebackType
from typing import Any

from moe.files import write_text


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the torn last line of a killed run is left out."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only the last line of a killed run can be torn
    return events


class EventLog:
    """Appends events, each a flat dict with "kind" and "step" (optimizer steps done), a line at a time.

    On a resume from `step`, later events are dropped, and all of them at step 0: the run writes them again.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        kept = [event for event in read_events(path) if event["step"] <= step] if step else []
        write_text(path, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed by __exit__

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


# history series: at each evaluation, the value of an event key; layers of a routing metric go into `<series>_per_layer`
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
    """Series with one entry an evaluation; `train_*` and losses are means over the training steps since the last one
    (null at step 0), `elapsed_times` are minutes, `load_balancing_losses` are unweighted (1: balanced), the mean over
    layers, `expert_utilizations` are shares per expert, the mean over layers."""
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
        series["expert_utilizations"].append(layers and [fmean(column) for column in zip(*layers, strict=True)])
        since = []
    return series


WARM_UP = 5  # first training steps that say nothing about speed


def median_speed(events: list[dict[str, Any]]) -> float | None:
    """Tokens per second of training steps, evaluation and saving excluded: the median after the first `WARM_UP`."""
    speeds = [e["time/tokens_per_s"] for e in events if e["kind"] == "train" and e["step"] > WARM_UP]
    return median(speeds) if speeds else None


def _mean(events: list[dict[str, Any]], key: str) -> float | None:
    values = [event[key] for event in events if event.get(key) is not None]
    return fmean(values) if values else None
