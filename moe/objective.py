"""What training minimises, and what is kept of a micro-batch to say how a step went."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe import metrics, ranks
from moe.config import LOSS_WEIGHTS, Config
from moe.model import MoEOutput
from moe.routers.base import Router
from moe.routing import RoutingStats


def total_loss(config: Config, routers: list[Router], output: MoEOutput, *, weight: float = 1.0) -> Tensor:
    """What is minimised: cross-entropy times `weight`, plus auxiliary losses, weighted and summed over layers.

    The configuration weights the losses that all routers share, each router its own, and may change its mind; it may
    add to the former too.
    """
    assert output.loss is not None
    weighted = []
    for name, values in (output.aux or {}).items():
        if name in LOSS_WEIGHTS:
            shared = getattr(config, LOSS_WEIGHTS[name])
            weights = [shared + router.loss_weights.get(name, 0.0) for router in routers]
        else:
            weights = [router.loss_weights[name] for router in routers]
        if any(weights):  # a weight of 0 would still cost the backward pass
            weighted.append((values * values.new_tensor(weights)).sum())
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
    values: dict[str, Any] = {f"train/{n}": v / ranks.number() for n, v in zip(names, added.tolist(), strict=True)}
    if sums is not None:
        values |= {f"train/{name}": value for name, value in metrics.summarize(sums, per_layer=False).items()}
    return values
