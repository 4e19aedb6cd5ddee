"""Measure how the loss and the choices of experts change when the router weights of a finished model are moved."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.data.blocks import Batch
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Knobs
from moe.specialization.observation import Observation, observe
from moe.training.progress import counted

DISTANCES = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)
RANDOM_DIRECTIONS = 3


def landscape(model: MoEForCausalLM, blocks: Batch, knobs: Knobs) -> dict[str, Any] | None:
    """Return the loss (nats per token) and the share of changed choices, with the weights W of all routers moved to
    W + distance ||W|| direction.

    A direction has norm 1 in every parameter of every layer (Li et al. 1712.09913 normalize each filter). There are
    `RANDOM_DIRECTIONS` Gaussian directions, and the direction of the gradient of the loss on the same blocks, along
    which the loss falls at first on the negative side. If the gradient is zero, its direction is left out. Returns None
    if the routers have no trainable weights.
    """
    weights = [p for layer in model.moe_layers for p in layer.router.parameters() if p.requires_grad]
    if not weights:
        return None
    generator = torch.Generator().manual_seed(0)
    directions = {
        f"random{number}": [torch.randn(w.shape, generator=generator).to(w) for w in weights]
        for number in range(RANDOM_DIRECTIONS)
    }
    on_device = blocks.to(model.device)
    loss = model(**on_device.inputs, labels=on_device.labels, knobs=knobs).loss
    gradient = torch.autograd.grad(loss, weights, materialize_grads=True)
    if any(g.any() for g in gradient):
        directions["gradient"] = list(gradient)
    unmoved = observe(model, blocks, knobs)
    curves: dict[str, Any] = {name: {"loss": [], "flipped": []} for name in directions}
    for name, distance in counted([*itertools.product(directions, DISTANCES)], "moves of the routers' weights"):
        with moved_weights(weights, directions[name], distance):
            moved = observe(model, blocks, knobs)
        curves[name]["loss"].append(float(np.nanmean(moved.nats)))
        curves[name]["flipped"].append(_flipped(unmoved, moved))
    return {"distances": DISTANCES, "blocks": len(blocks.ids), "tokens": blocks.ids.numel(), "curves": curves}


@contextmanager
def moved_weights(weights: Sequence[Tensor], direction: Sequence[Tensor], distance: float) -> Iterator[None]:
    """Move each weight by `distance` times its norm along its direction inside the `with` block.

    Afterwards each weight has its old value again, bit for bit.
    """
    with torch.no_grad():
        before = [w.clone() for w in weights]
        try:
            for w, d in zip(weights, direction, strict=True):
                w += distance * w.norm() * d / d.norm().clamp(min=torch.finfo(d.dtype).tiny)
            yield
        finally:
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)


def _flipped(a: Observation, b: Observation) -> float:
    """Return the share of assignments that changed. If a token has different numbers of experts, the larger counts."""
    pairs = [*zip(a.chosen, b.chosen, strict=True)]
    size = sum(np.maximum(one.sum(-1), other.sum(-1)).sum() for one, other in pairs)
    return float(1 - sum((one & other).sum() for one, other in pairs) / size)
