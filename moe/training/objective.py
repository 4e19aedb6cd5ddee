"""Compute the loss that training minimizes, and the values that describe a step in the event log."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe.config.schema import Config
from moe.distributed import ranks
from moe.model.causal_lm import MoEOutput
from moe.routing.loss_table import LOSSES
from moe.routing.stats import RoutingStats


def total_loss(
    config: Config,
    router_weights: list[dict[str, float]],
    output: MoEOutput,
    *,
    weight: float = 1.0,
    beside_weights: list[dict[str, float]] | None = None,
) -> Tensor:
    """Return the loss to minimize: cross-entropy times `weight`, plus the weighted auxiliary losses of all layers.

    router_weights: the `loss_weights` of each layer's router. They weight the losses that only this router has. For a
    loss that all routers share, they are added to the weight in the configuration. beside_weights: those of the routers
    of an adapter.
    """
    assert output.loss is not None
    weighted = _weighted(config, router_weights, output.aux or {})
    if output.beside is not None:
        weighted += _weighted(config, beside_weights or [], output.beside["aux"])
    return torch.stack([output.loss * weight, *weighted]).sum()


def _weighted(config: Config, router_weights: list[dict[str, float]], aux: dict[str, Tensor]) -> list[Tensor]:
    """Return the auxiliary losses of some layers, times their weights. Those with weight 0 are left out."""
    weighted = []
    for name, values in aux.items():
        if name in LOSSES:
            shared = getattr(config, LOSSES[name].weight)
            weights = [shared + of_router.get(name, 0.0) for of_router in router_weights]
        else:
            weights = [of_router.get(name, 0.0) for of_router in router_weights]
        # Weights are Python numbers, because a tensor would be copied to the device. A loss with weight 0 is left out,
        # because it would still cost a backward pass.
        weighted += [w * value for w, value in zip(weights, values.unbind(), strict=True) if w]
    return weighted


class Outcome(NamedTuple):
    """Values of one micro-batch that are still needed after its backward pass.

    loss: mean cross-entropy times the weight of the micro-batch in its step.
    aux: each auxiliary loss, unweighted and averaged over layers.
    stats: routing sums (L, ...). None without MoE layers.
    beside: those of the layers beside the MoE layers. None without an adapter that has a router.
    """

    loss: Tensor
    aux: dict[str, Float[Tensor, ""]]
    stats: RoutingStats | None
    beside: RoutingStats | None = None


def merged_stats(parts: Sequence[RoutingStats | None]) -> RoutingStats | None:
    """Return the routing sums (L, ...) over micro-batches, here and on all other ranks. None without MoE layers."""
    stats = [part for part in parts if part is not None]
    if not stats:
        return None
    local = functools.reduce(RoutingStats.merge, stats)
    return RoutingStats(*ranks.all_reduce_sum(local))


def mean_losses(outcomes: list[Outcome]) -> Float[Tensor, " N"]:
    """Return the mean losses of an optimizer step in double precision: the cross-entropy, then each auxiliary loss.

    outcomes: one for each of this rank's micro-batches. Every rank has the same number of them.
    """
    means = [torch.stack([outcome.loss, *outcome.aux.values()]) for outcome in outcomes]
    [added] = ranks.all_reduce_sum([torch.stack(means).double().mean(0)])
    return added / ranks.world_size()
