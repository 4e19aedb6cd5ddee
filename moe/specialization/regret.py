"""Measure how much lower the loss of single tokens would be with other experts in one layer (route regret)."""

import functools
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.analysis.bootstrap import bootstrap
from moe.data.blocks import Batch
from moe.model.causal_lm import MoEForCausalLM
from moe.model.layer import MoELayer
from moe.routing.decision import Knobs, Routing
from moe.specialization.interventions import intervene, swap_experts
from moe.specialization.observation import BLOCKS_PER_PASS, Observation, experts_of_layers, next_token_nats
from moe.training.progress import counted

MAX_ROUTES = 8  # Sets of experts that are tried for a token.


def route_regret(
    model: MoEForCausalLM, observed: Observation, knobs: Knobs, *, document: Int[np.ndarray, " B"], samples: int
) -> list[dict[str, Any]]:
    """Return, by layer, the regret of about `samples` tokens: next-token loss as routed minus the smallest loss of the
    routes tried, in nats.

    A token tries up to `MAX_ROUTES` sets of as many experts as it has. They are windows of a random order of all
    experts of the layer, drawn for this token, so that all are tried equally often; for k = 1 and few experts all of
    them are tried. The gate weights stay (see `interventions.swap_experts`). Only one token of a block is changed at a
    time. The change can influence later tokens of its block, but no other blocks, unless the router looks at the whole
    batch. Tokens without an expert and tokens whose next token has no label are left out.

    regret: at least 0. It grows with the number of routes tried, because the best of several is picked afterwards.
    advantage: the mean loss over the routes tried minus the loss as routed. It involves no such choice of the best. It
        is above 0 if the router's choice is better than random experts, and 0 if random experts are equally good.
    better: the share of the routes tried that beat the chosen one.
    """
    rounds = math.ceil(samples / len(observed.ids))
    rng = np.random.default_rng(0)
    token = rng.integers(observed.ids.shape[1] - 1, size=(rounds, len(observed.ids)))
    orders = {
        experts: rng.permuted(np.tile(np.arange(experts), (rounds, len(observed.ids), 1)), axis=-1)
        for experts in dict.fromkeys(experts_of_layers(model))
    }
    chosen = np.take_along_axis(observed.nats, token.T, axis=1).T
    results = []
    layers = [*zip(model.moe_layers, observed.chosen, strict=True)]
    for layer, taken in counted(layers, "layers whose tokens try other experts:"):
        tried = np.stack(
            [
                _losses(model, layer, observed.blocks, knobs, *map(torch.from_numpy, drawn))
                for drawn in zip(token, orders[layer.router.num_experts], strict=True)
            ]
        )  # (rounds, B, routes)
        routed = np.take_along_axis(taken.any(-1).reshape(observed.ids.shape), token.T, axis=1).T & ~np.isnan(chosen)
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


def _block_means(values: Float[np.ndarray, "R B"], included: np.ndarray) -> Float[np.ndarray, " B"]:
    """Return the mean of the included values of each block."""
    return np.where(included, values, 0).sum(0) / included.sum(0).clip(min=1)


@torch.no_grad()
def _losses(
    model: MoEForCausalLM,
    layer: MoELayer,
    blocks: Batch,
    knobs: Knobs,
    position: Int[Tensor, " B"],
    order: Int[Tensor, "B E"],
) -> Float[np.ndarray, "B M"]:
    """Return the loss at one position of each block, for each route that is tried (a window of `order`)."""
    experts = order.shape[-1]
    routes = min(MAX_ROUTES, experts)
    losses = []
    for start in range(0, len(blocks.ids), BLOCKS_PER_PASS):
        part = slice(start, start + BLOCKS_PER_PASS)
        block, position_in_block = blocks.take(part), position[part]
        token = torch.arange(len(block.ids)) * blocks.ids.shape[1] + position_in_block
        tried = []
        for route in range(routes):
            window = order[part].roll(-route * experts // routes, dims=-1)
            with intervene(layer, functools.partial(_swap, token=token.to(window.device), order=window)):
                nats = next_token_nats(model, block, knobs).cpu()
            tried.append(nats[torch.arange(len(position_in_block)), position_in_block])
        losses.append(torch.stack(tried, -1))
    return torch.cat(losses).double().numpy()


def _swap(routing: Routing, x: Float[Tensor, "T D"], *, token: Int[Tensor, " B"], order: Int[Tensor, "B E"]) -> Routing:
    return swap_experts(routing, token, order)
