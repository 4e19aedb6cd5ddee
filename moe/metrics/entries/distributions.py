"""Distributions, which are lists of numbers."""

from moe.metrics.metric import Metric

ENTRIES = (
    Metric(
        "routing/utilization",
        "f of every layer and expert",
        "Share of the assignments by layer and expert.",
        "share of assignments",
        "distribution",
    ),
    Metric(
        "routing/drop_rate_by_position",
        "1 - kept / asked for, by decile of the position",
        "Share of assignments over capacity in each decile of the position, mean over layers. 0 when dropless.",
        "drop rate",
        "distribution",
    ),
)
