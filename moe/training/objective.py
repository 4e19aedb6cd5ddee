"""Compute the loss that training minimizes, and the values that describe a step in the event log."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.config.schema import Config
from moe.distributed import ranks
from moe.metrics.summary import summarize
from moe.model.causal_lm import MoEOutput
from moe.routing.loss_table import LOSSES
from moe.routing.stats import RoutingStats


def total_loss(
    config: Config, router_weights: list[dict[str, float]], output: MoEOutput, *, weight: float = 1.0
) -> Tensor:
    """Return the loss to minimize: cross-entropy times `weight`, plus the weighted auxiliary losses of all layers.

    router_weights: the `loss_weights` of each layer's router. They weight the losses that only this router has. For a
    loss that all routers share, they are added to the weight in the configuration.
    """
    assert output.loss is not None
    weighted = []
    for name, values in (output.aux or {}).items():
        if name in LOSSES:
            shared = getattr(config, LOSSES[name].weight)
            weights = [shared + of_router.get(name, 0.0) for of_router in router_weights]
        else:
            weights = [of_router[name] for of_router in router_weights]
        # Weights are Python numbers, because a tensor would be copied to the device. A loss with weight 0 is left out,
        # because it would still cost a backward pass.
        weighted += [w * value for w, value in zip(weights, values.unbind(), strict=True) if w]
    return torch.stack([output.loss * weight, *weighted]).sum()


class Outcome(NamedTuple):
    """Values of one micro-batch that are still needed after its backward pass.

    loss: mean cross-entropy times the weight of the micro-batch in its step.
    aux: each auxiliary loss by layer (L).
    stats: routing sums (L, ...). None without MoE layers.
    """

    loss: Tensor
    aux: dict[str, Tensor]
    stats: RoutingStats | None


def merged_stats(outcomes: list[Outcome]) -> RoutingStats | None:
    """Return the routing sums (L, ...) over all micro-batches of a step and all ranks. None without MoE layers."""
    stats = [outcome.stats for outcome in outcomes if outcome.stats is not None]
    if not stats:
        return None
    local = functools.reduce(RoutingStats.merge, stats)
    return RoutingStats(*ranks.all_reduce_sum(local))


def step_values(outcomes: list[Outcome], sums: RoutingStats | None) -> dict[str, Any]:
    """Return the mean losses of an optimizer step, unweighted and averaged over layers, and its routing metrics.

    outcomes: one for each of this rank's micro-batches. Every rank has the same number of them.
    sums: routing sums of all ranks, from `merged_stats`.
    """
    names = ["loss", *outcomes[0].aux]
    means = [torch.stack([o.loss, *(o.aux[name].mean() for name in names[1:])]) for o in outcomes]
    [added] = ranks.all_reduce_sum([torch.stack(means).double().mean(0)])
    values: dict[str, Any] = {f"train/{n}": v / ranks.world_size() for n, v in zip(names, added.tolist(), strict=True)}
    if sums is not None:
        values |= {f"train/{name}": value for name, value in summarize(sums, per_layer=False).items()}
    return values
