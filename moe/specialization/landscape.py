"""The loss around a finished model as its routers' weights move, and how many decisions that changes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.data.blocks import Batch
from moe.model.decoder import MoEForCausalLM
from moe.routing.decision import Knobs
from moe.specialization.observation import Observation, observe

DISTANCES = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)
RANDOM_DIRECTIONS = 3


def landscape(model: MoEForCausalLM, blocks: Batch, knobs: Knobs) -> dict[str, Any] | None:
    """Loss, nats per token, and share of choices flipped, with all routers at W + distance * ||W|| * direction.

    Directions have norm 1 in every parameter of every layer (as in Li et al. 1712.09913, of whole parameters):
    `RANDOM_DIRECTIONS` Gaussian ones, and that of the loss's gradient on the same blocks, along which the loss falls
    first on the negative side. A gradient of zero gives no such direction. None if routers have no weights to train.
    """
    weights = [p for layer in model.moe_layers for p in layer.router.parameters() if p.requires_grad]
    if not weights:
        return None
    draw = torch.Generator().manual_seed(0)
    directions = {
        f"random{number}": [torch.randn(w.shape, generator=draw).to(w) for w in weights]
        for number in range(RANDOM_DIRECTIONS)
    }
    here = blocks.to(model.device)
    loss = model(here.ids, here.labels, position_ids=here.position_ids, knobs=knobs).loss
    gradient = torch.autograd.grad(loss, weights, materialize_grads=True)
    if any(g.any() for g in gradient):
        directions["gradient"] = list(gradient)
    unmoved = observe(model, blocks, knobs)
    curves = {}
    for name, direction in directions.items():
        seen = []
        for distance in DISTANCES:
            with moved(weights, direction, distance):
                seen.append(observe(model, blocks, knobs))
        curves[name] = {
            "loss": [float(np.nanmean(there.nats)) for there in seen],
            "flipped": [_flipped(unmoved, there) for there in seen],
        }
    return {"distances": DISTANCES, "blocks": len(blocks.ids), "tokens": blocks.ids.numel(), "curves": curves}


@contextmanager
def moved(weights: Sequence[Tensor], direction: Sequence[Tensor], distance: float) -> Iterator[None]:
    """Inside, each weight stands `distance` times its norm along its direction; outside, bit for bit where it was."""
    with torch.no_grad():
        before = [w.clone() for w in weights]
        try:
            for w, d in zip(weights, direction, strict=True):
                w += distance * w.norm() * d / d.norm().clamp(min=torch.finfo(d.dtype).tiny)
            yield
        finally:
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)


def _flipped(here: Observation, there: Observation) -> float:
    """Share of the assignments of one side, the larger, that the other does not have."""
    size = np.maximum(here.chosen.sum(-1), there.chosen.sum(-1)).sum()
    return float(1 - (here.chosen & there.chosen).sum() / size)
