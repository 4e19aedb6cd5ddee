"""Catalog of every metric that a run writes: formula, meaning, label, unit and where it is shown, one entry each.

docs/metrics.md, the lists of the report, the labels of figures and the panels of the dashboard are
derived from these entries, which stand in moe/metrics/entries/. The module does not import torch. The letters in the
formulas are explained in `moe.metrics.metric.LETTERS`.
"""

import math
from collections.abc import Mapping
from typing import Any

from moe.metrics.entries import balance, capacity, distributions, quality, sharpness, specialization, training
from moe.metrics.metric import Metric

ENTRIES: tuple[Metric, ...] = (
    *quality.ENTRIES,
    *balance.ENTRIES,
    *capacity.ENTRIES,
    *sharpness.ENTRIES,
    *specialization.ENTRIES,
    *training.ENTRIES,
    *distributions.ENTRIES,
)
# What each metric under the capacity limit is in a run without one: another metric, or a number.
WITHOUT_LIMIT: dict[str, str | float] = {
    "val_capacity/loss": "val/loss",
    "val_capacity/perplexity": "val/perplexity",
    "val_capacity/drop_rate": 0.0,
    "val_capacity/unrouted_rate": "routing/unrouted_rate",
}
QUALITY = ("quality", "test", "capacity limit")  # the groups of losses and what follows from them
METRICS = {metric.name: metric for metric in ENTRIES}
# Metrics that are computed from routing sums alone.
ROUTING_METRICS = {name: metric for name, metric in METRICS.items() if metric.function is not None}


def select(*, group: str | None = None, shown: str | None = None, written: str | None = None) -> list[Metric]:
    """Return the entries that meet all conditions, in the order of the catalog."""
    return [
        metric
        for metric in ENTRIES
        if group in (None, metric.group)
        and (shown is None or shown in metric.shown)
        and (written is None or written in metric.written)
    ]


def is_quality(name: str) -> bool:
    """Return whether a metric says how well a model predicts text."""
    metric = lookup(name)
    return metric is not None and metric.group in QUALITY


def without_limit(name: str) -> str | float | None:
    """Return what a metric under the capacity limit is without a limit, see `WITHOUT_LIMIT`; None for other metrics."""
    known = WITHOUT_LIMIT.get(name)
    return WITHOUT_LIMIT.get(name.rpartition("/")[0]) if known is None else known


def span(name: str) -> float:
    """Return how much a metric can change: by 1 if it is a share, and without a limit that is known otherwise."""
    metric = lookup(name)
    return 1.0 if metric is not None and metric.unit.startswith("share") else math.inf


def final_metrics() -> list[str]:
    """Return the names of all final metrics, and those of their variants that are shown in headlines."""
    return list(dict.fromkeys(name for metric in ENTRIES if metric.final for name in (metric.name, metric.headline)))


def dead_layers(values: Mapping[str, Any]) -> list[str]:
    """Return the layers in which no token takes an expert, such as layer01, given the metrics of an evaluation."""
    prefix = "routing/active_experts/"
    return [name.removeprefix(prefix) for name, value in values.items() if name.startswith(prefix) and value == 0]


def lookup(name: str) -> Metric | None:
    """Return the entry of a metric, or of the variant `name`, with the variant's name, label and noun; None if none.

    Understands `/pooled`, `/worst`, `/layer03`, `/<domain>`, `/decile0`, `train/routing/...` and
    `adapter/routing/...`.
    """
    if name in METRICS:
        return METRICS[name]
    if name.startswith("train/routing/"):
        metric = ROUTING_METRICS.get(name.removeprefix("train/"))
        return metric and metric.narrowed(name, "in training")
    if name.startswith("adapter/routing/"):
        metric = lookup(name.removeprefix("adapter/"))
        computed = metric is not None and metric.function is not None
        return metric.narrowed(name, "adapter's router") if metric and computed else None
    base, _, suffix = name.rpartition("/")
    return METRICS[base].variant(suffix) if base in METRICS else None
