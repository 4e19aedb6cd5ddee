"""Compute every routing metric from the sums that a model leaves behind."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe.metrics import formulas
from moe.metrics.catalog import ROUTING_METRICS
from moe.metrics.formulas import Sums, of_groups
from moe.routing.stats import RoutingStats


def summarize(stats: RoutingStats | Sums, *, per_layer: bool = True) -> dict[str, float | None]:
    """Return every metric as `routing/<name>`, the mean over layers; None where a router has no such quantity.

    With `per_layer` add the variants `/layerNN` and, where the catalog has them, `/pooled` and `/worst`. Layers of
    different numbers of experts have no loads that can be added, so that `/pooled` is None.
    """
    sums = stats if isinstance(stats, Sums) else to_numpy(stats)
    groups = sums.groups()
    pooled = sums.pool() if len(groups) == 1 else None
    values: dict[str, float | None] = {}
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is NaN: no such quantity
        for name, metric in ROUTING_METRICS.items():
            assert metric.function is not None
            layers = of_groups(metric.function, groups)
            values[name] = _number(layers.mean())
            if not per_layer:
                continue
            if "pooled" in metric.variants:
                worst = layers.max() if metric.better == "lower" else layers.min()
                values[f"{name}/pooled"] = None if pooled is None else _number(metric.function(pooled)[0])
                values[f"{name}/worst"] = _number(worst)
            for layer, value in enumerate(layers):
                values[f"{name}/layer{layer:02d}"] = _number(value)
    return values


def to_numpy(stats: RoutingStats) -> Sums:
    """Fetch all sums from the device."""
    return Sums(dict(zip(stats._fields, fetch(stats), strict=True)))


def fetch(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Return tensors in double precision, in one transfer from their device: each transfer from a GPU waits for it."""
    by_type = itertools.groupby((tensor.flatten() for tensor in tensors), key=lambda tensor: tensor.dtype)
    numbers = torch.cat([torch.cat([*same]).double() for _, same in by_type]).cpu().numpy()  # one kernel for each type
    parts = np.split(numbers, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def drop_rate_by_position(stats: RoutingStats) -> list[float | None]:
    """Return the drop rate of each decile of the position, the mean over layers."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = of_groups(formulas.drop_rate_by_position, to_numpy(stats).groups())
    return [_number(rate) for rate in rates.mean(0)]


def utilization(stats: RoutingStats) -> list[list[float | None]]:
    """Return the share of the assignments of each expert of each layer. None where no token asks for an expert."""
    sums = to_numpy(stats)
    with np.errstate(invalid="ignore"):
        shares = formulas.load_share(sums)
    return [[_number(e) for e in layer[:number]] for layer, number in zip(shares, sums.experts(), strict=True)]


def _number(value: np.floating) -> float | None:
    return None if np.isnan(value) else float(value)
