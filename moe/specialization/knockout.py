"""Measure how much the loss rises when one expert is removed from a finished model."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from moe.analysis.bootstrap import bootstrap
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Knobs, Routing
from moe.specialization.interventions import Intervention, intervene, remove, reroute
from moe.specialization.observation import Observation, next_token_nats
from moe.training.progress import counted

Removal = Callable[[Routing, Bool[Tensor, "A"]], Routing]  # (decision, selected assignments) -> decision without them


def knockouts(
    model: MoEForCausalLM, observed: Observation, knobs: Knobs, *, document: Int[np.ndarray, "B"]
) -> dict[str, dict[str, Any]]:
    """For each expert of each layer, return how much the loss rises (nats per token) when it is removed, in two ways.

    rerouted: the expert's assignments go to the next-best experts of their tokens.
    zeroed: the expert's assignments add nothing.

    For comparison (the load-matched null), the same change is applied to equally many random assignments of the layer
    in each forward pass. This shows the cost of removing that many assignments from any experts. The random choice is
    made only once, so the excess of a single expert is noisy. See `_summary` for the fields.
    """
    experts = model.config.num_experts
    removals: dict[str, Removal] = {
        "rerouted": functools.partial(reroute, num_experts=experts),
        "zeroed": remove,
    }
    load = observed.chosen.sum(1) / observed.chosen.sum((1, 2))[:, None]
    layers = [*model.moe_layers]
    rise = {name: np.zeros((2, len(layers), experts, len(observed.ids))) for name in removals}
    each = [*itertools.product(removals, range(len(layers)), range(experts), (_without, _null))]
    for name, layer, expert, kind in counted(each, "removals"):
        with intervene(layers[layer], kind(expert, removals[name])):
            nats = next_token_nats(model, observed.blocks, knobs).cpu().numpy()
        rise[name][int(kind is _null), layer, expert] = np.nanmean(nats - observed.nats, axis=1)
    return {name: _summary(*both, load=load, domain=observed.domain, document=document) for name, both in rise.items()}


def _summary(
    rise: Float[np.ndarray, "L E B"],
    null: Float[np.ndarray, "L E B"],
    *,
    load: Float[np.ndarray, "L E"],
    domain: Int[np.ndarray, "B"],
    document: Int[np.ndarray, "B"],
) -> dict[str, Any]:
    """Return the results of one kind of removal.

    delta: rise of the loss. null: the same for random assignments. excess: delta - null. Each has a mean and an
        interval, with shape (L, E).
    by_domain: delta by domain (L, E, number of domains that occur).
    rho, rho_excess: (L) Spearman's correlation between load and delta, and between load and excess, over experts.
    """
    excess = rise - null
    return {
        "delta": bootstrap(rise, document),
        "null": bootstrap(null, document),
        "excess": bootstrap(excess, document),
        "domains": np.unique(domain),
        "by_domain": np.stack([rise[..., domain == d].mean(-1) for d in np.unique(domain)], -1),
        "rho": [rank_correlation(*pair) for pair in zip(load, rise.mean(-1), strict=True)],
        "rho_excess": [rank_correlation(*pair) for pair in zip(load, excess.mean(-1), strict=True)],
    }


def rank_correlation(a: Float[np.ndarray, "E"], b: Float[np.ndarray, "E"]) -> float:
    """Return Spearman's rho; NaN if one side is constant or there are fewer than three pairs."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def _without(expert: int, removal: Removal) -> Intervention:
    """Return the intervention that removes the assignments of one expert."""
    return lambda routing, _: removal(routing, routing.expert == expert)


def _null(expert: int, removal: Removal) -> Intervention:
    """Return the intervention that removes as many random assignments as the expert has."""
    generator = torch.Generator().manual_seed(expert)

    def intervention(routing: Routing, _: Tensor) -> Routing:
        assignments = len(routing.expert)
        order = torch.randperm(assignments, generator=generator).to(routing.expert.device)
        return removal(routing, order < (routing.expert == expert).sum())

    return intervention
