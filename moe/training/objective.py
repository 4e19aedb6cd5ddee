"""What training minimizes, and what is kept of a micro-batch to say how a step went."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.config.schema import Config
from moe.distributed import ranks
from moe.metrics.summary import summarize
from moe.model.decoder import MoEOutput
from moe.routing.loss_table import LOSSES
from moe.routing.stats import RoutingStats


def total_loss(config: Config, own: list[dict[str, float]], output: MoEOutput, *, weight: float = 1.0) -> Tensor:
    """What is minimized: cross-entropy times `weight`, plus auxiliary losses, weighted and summed over layers.

    The configuration weights the losses that all routers share; own: the `loss_weights` of each layer's router, for its
    own losses and on top of those of the configuration.
    """
    assert output.loss is not None
    weighted = []
    for name, values in (output.aux or {}).items():
        if name in LOSSES:
            shared = getattr(config, LOSSES[name].weight)
            weights = [shared + more.get(name, 0.0) for more in own]
        else:
            weights = [of_router[name] for of_router in own]
        # numbers, not a tensor, which would be copied to the device; a weight of 0 would still cost the backward pass
        weighted += [w * value for w, value in zip(weights, values.unbind(), strict=True) if w]
    return torch.stack([output.loss * weight, *weighted]).sum()


class Outcome(NamedTuple):
    """What is kept of a micro-batch: its weighted mean cross-entropy, aux {name: (L)}, routing sums."""

    loss: Tensor
    aux: dict[str, Tensor]
    stats: RoutingStats | None


def merged_stats(outputs: list[Outcome]) -> RoutingStats | None:
    """The routing sums (L, ...) over all micro-batches of a step, of all ranks; None without MoE layers."""
    stats = [output.stats for output in outputs if output.stats is not None]
    if not stats:
        return None
    ours = functools.reduce(RoutingStats.merge, stats)
    return RoutingStats(*ranks.total(ours))


def step_values(outputs: list[Outcome], sums: RoutingStats | None) -> dict[str, Any]:
    """Of one optimizer step: mean losses, unweighted (aux: mean over layers), and the routing metrics of all tokens.

    outputs: of this rank's micro-batches, as many as every other rank has; sums: of all ranks.
    """
    names = ["loss", *outputs[0].aux]
    means = [torch.stack([o.loss, *(o.aux[name].mean() for name in names[1:])]) for o in outputs]
    [added] = ranks.total([torch.stack(means).double().mean(0)])
    values: dict[str, Any] = {f"train/{n}": v / ranks.world_size() for n, v in zip(names, added.tolist(), strict=True)}
    if sums is not None:
        values |= {f"train/{name}": value for name, value in summarize(sums, per_layer=False).items()}
    return values
