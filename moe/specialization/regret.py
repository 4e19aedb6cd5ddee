"""What a better choice of experts would have been worth: counterfactual routes of single tokens at single layers."""

import functools
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.data.blocks import Batch
from moe.model.decoder import MoEForCausalLM
from moe.model.layer import MoELayer
from moe.routing.decision import Knobs, Routing
from moe.specialization.interventions import altered, swapped
from moe.specialization.knockout import bootstrap
from moe.specialization.observation import BATCH, Observation, next_token_nats

ROUTES = 8  # alternatives tried for a token


def route_regret(
    model: MoEForCausalLM, seen: Observation, knobs: Knobs, *, document: Int[np.ndarray, "B"], samples: int
) -> list[dict[str, Any]]:
    """By layer, for about `samples` tokens: next-token loss as chosen less the least over the routes tried, nats.

    A token tries up to `ROUTES` sets of as many experts as it has: windows of its own random order of all experts, so
    that experts are tried equally often, and all of them for k = 1. Weights stay (`interventions.swapped`). One token
    of a block is changed at a time: it can act on later tokens of its block, never on other blocks, unless the router
    looks at the whole batch. Tokens without an expert, and before a token without a label, are left out.

    regret >= 0 grows with the number of routes tried, because the best of several is picked with hindsight; what
    hindsight cannot fake is `advantage`, the mean loss over routes tried less the loss as chosen: > 0 if the router
    knows something, 0 if any experts do as well. better: share of the routes tried that beat the chosen one.
    """
    rounds = math.ceil(samples / len(seen.ids))
    rng = np.random.default_rng(0)
    token = rng.integers(seen.ids.shape[1] - 1, size=(rounds, len(seen.ids)))
    order = rng.permuted(np.tile(np.arange(model.config.num_experts), (rounds, len(seen.ids), 1)), axis=-1)
    chosen = np.take_along_axis(seen.nats, token.T, axis=1).T
    results = []
    for layer, taken in zip(model.moe_layers, seen.chosen, strict=True):
        tried = np.stack(
            [
                _losses(model, layer, seen.blocks, knobs, *map(torch.from_numpy, drawn))
                for drawn in zip(token, order, strict=True)
            ]
        )  # (rounds, B, routes)
        routed = np.take_along_axis(taken.any(-1).reshape(seen.ids.shape), token.T, axis=1).T & ~np.isnan(chosen)
        least = np.minimum(chosen, tried.min(-1))
        values = {
            "regret": chosen - least,
            "advantage": tried.mean(-1) - chosen,
            "better": (tried < chosen[..., None] - 1e-6).mean(-1),
        }
        blocks = routed.any(0)
        results.append(
            {name: bootstrap(_block_means(value, routed)[blocks], document[blocks]) for name, value in values.items()}
            | {"tokens": int(routed.sum()), "routes": tried.shape[-1], "values": values["regret"][routed]}
        )
    return results


def _block_means(values: Float[np.ndarray, "R B"], kept: np.ndarray) -> Float[np.ndarray, "B"]:
    return np.where(kept, values, 0).sum(0) / kept.sum(0).clip(min=1)


@torch.no_grad()
def _losses(
    model: MoEForCausalLM,
    layer: MoELayer,
    blocks: Batch,
    knobs: Knobs,
    position: Int[Tensor, "B"],
    order: Int[Tensor, "B E"],
) -> Float[np.ndarray, "B M"]:
    """The loss at one position of each block for each window of the order in which it tries experts."""
    experts = order.shape[-1]
    routes = min(ROUTES, experts)
    losses = []
    for start in range(0, len(blocks.ids), BATCH):
        part = slice(start, start + BATCH)
        block, place = blocks.take(part), position[part]
        token = torch.arange(len(block.ids)) * blocks.ids.shape[1] + place
        tried = []
        for route in range(routes):
            window = order[part].roll(-route * experts // routes, dims=-1)
            with altered(layer, functools.partial(_route, token=token.to(window.device), order=window)):
                nats = next_token_nats(model, block, knobs).cpu()
            tried.append(nats[torch.arange(len(place)), place])
        losses.append(torch.stack(tried, -1))
    return torch.cat(losses).double().numpy()


def _route(routing: Routing, x: Float[Tensor, "T D"], *, token: Int[Tensor, "B"], order: Int[Tensor, "B E"]) -> Routing:
    return swapped(routing, token, order)
