"""Compare a cheap saliency of experts, by which they are pruned, with what the loss says when they are removed."""

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.data.blocks import Batch
from moe.model.causal_lm import MoEForCausalLM
from moe.model.layer import MoELayer
from moe.routing.decision import Knobs, Routing
from moe.specialization.interventions import intervene
from moe.specialization.knockout import rank_correlation
from moe.specialization.observation import BLOCKS_PER_PASS, experts_of_layers

NORMAL = 1.959964  # 97.5 % quantile of the normal distribution


@torch.no_grad()
def saliency(model: MoEForCausalLM, blocks: Batch, knobs: Knobs) -> list[Float[np.ndarray, " _"]]:
    """Return, by layer, the saliency of each expert (REAP 2510.13999).

    It is the mean of gate x ‖output‖₂ over the tokens that take the expert. The gate is the weight with which the layer
    multiplies the output, to which an adapter beside the expert has added its own. NaN for an expert without tokens.
    """
    layers = [*model.moe_layers]
    sums = [torch.zeros(2, experts, dtype=torch.float64, device=model.device) for experts in experts_of_layers(model)]

    decisions: list[Routing] = []  # the last one of the layer that runs

    def decided(routing: Routing, _: Tensor) -> Routing:
        decisions[:] = [routing]
        return routing

    def add(_: nn.Module, inputs: Any, outputs: Tensor, *, layer: MoELayer, number: int) -> None:
        expert, order = decisions[0].expert.sort(stable=True)  # the order in which experts get their rows
        norms = layer.full_width(layer.with_beside(outputs, *inputs)).float().norm(dim=-1)
        values = torch.stack([decisions[0].weight[order] * norms, torch.ones_like(norms)]).double()
        sums[number].index_add_(1, expert, values)

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(intervene(layer, decided))
            hook = layer.experts.register_forward_hook(partial(add, layer=layer, number=number))
            stack.callback(hook.remove)
        for part in blocks.to(model.device).split(BLOCKS_PER_PASS):
            model(**part.inputs, knobs=knobs)
    totals = [of_layer.cpu().numpy() for of_layer in sums]
    return [np.divide(total, tokens, out=np.full(len(total), np.nan), where=tokens > 0) for total, tokens in totals]


def against_knockouts(
    values: list[Float[np.ndarray, " _"]], knockouts: dict[str, dict[str, Any]] | None
) -> dict[str, Any]:
    """Return the saliency, and how it ranks experts compared with the rise of the loss without each of them.

    values: from `saliency`. rho: for each kind of removal, `agreement` of saliency and rise by layer, and over layers.
        Empty if no expert was removed.
    """
    rho = {}
    for name, found in (knockouts or {}).items():
        pairs = [(a[(used := ~np.isnan(a))], b[used]) for a, b in zip(values, found["delta"]["mean"], strict=True)]
        rho[name] = {"layers": [agreement([pair]) for pair in pairs], "all": agreement(pairs)}
    return {"values": values, "rho": rho}


def agreement(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Return Spearman's rho within layers, joined over layers, and its 95 % interval over experts.

    pairs: for each layer two values of its experts. The interval is that of Fisher's z, whose variance for Spearman's
    rho of n experts is about 1.06 / (n - 3) (Fieller, Hartley and Pearson 1957). Layers are joined by the mean of z
    with the weights n - 3. It tells what other experts like these would show, and nothing about other seeds. Values
    that are themselves uncertain, as a rise of the loss is, bring rho closer to 0. NaN below four experts.
    """
    rhos = [(rank_correlation(a, b), len(a) - 3) for a, b in pairs]
    known = [(rho, weight) for rho, weight in rhos if weight > 0 and math.isfinite(rho)]
    if not known:
        return dict.fromkeys(("rho", "low", "high"), math.nan)
    weights = np.array([weight for _, weight in known])
    z = np.average(np.arctanh(np.clip([rho for rho, _ in known], -1 + 1e-9, 1 - 1e-9)), weights=weights)
    reach = NORMAL * math.sqrt(1.06 / weights.sum())
    rho, low, high = np.tanh([z, z - reach, z + reach]).tolist()
    return {"rho": rho, "low": low, "high": high}
