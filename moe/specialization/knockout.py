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

Removal = Callable[[Routing, Bool[Tensor, " A"]], Routing]  # (decision, selected assignments) -> decision without them


def knockouts(
    model: MoEForCausalLM, observed: Observation, knobs: Knobs, *, document: Int[np.ndarray, " B"]
) -> dict[str, dict[str, Any]]:
    """For each expert of each layer, return how much the loss rises (nats per token) when it is removed, in two ways.

    rerouted: the expert's assignments go to the next-best experts of their tokens.
    zeroed: the expert's assignments add nothing.

    For comparison (the load-matched null), the same change is applied to equally many random assignments of the layer
    in each forward pass. This shows the cost of removing that many assignments from any experts. The random choice is
    made only once, so the excess of a single expert is noisy. See `_summary` for the fields.
    """
    load = [chosen.sum(0) / chosen.sum() for chosen in observed.chosen]
    experts = [(layer, expert) for layer in model.moe_layers for expert in range(layer.router.num_experts)]
    rise = {name: np.zeros((2, len(experts), len(observed.ids))) for name in ("rerouted", "zeroed")}
    each = [*itertools.product(rise, enumerate(experts), (_without, _null))]
    for name, (place, (layer, expert)), kind in counted(each, "removals"):
        reroute_here = functools.partial(reroute, num_experts=layer.router.num_experts)
        with intervene(layer, kind(expert, reroute_here if name == "rerouted" else remove)):
            nats = next_token_nats(model, observed.blocks, knobs).cpu().numpy()
        rise[name][int(kind is _null), place] = np.nanmean(nats - observed.nats, axis=1)
    return {name: _summary(*both, load=load, domain=observed.domain, document=document) for name, both in rise.items()}


def _summary(
    rise: Float[np.ndarray, "E B"],
    null: Float[np.ndarray, "E B"],
    *,
    load: list[Float[np.ndarray, " _"]],
    domain: Int[np.ndarray, " B"],
    document: Int[np.ndarray, " B"],
) -> dict[str, Any]:
    """Return the results of one kind of removal. rise, null: of the experts of all layers, one layer after another.

    delta: rise of the loss. null: the same for random assignments. excess: delta - null. Each has a mean and an
        interval, with a list of experts for each layer.
    by_domain: delta by domain, with an array (E, number of domains that occur) for each layer.
    rho, rho_excess: (L) Spearman's correlation between load and delta, and between load and excess, over experts.
    """
    excess = rise - null
    ends = np.cumsum([len(of_layer) for of_layer in load])[:-1]

    def interval(values: Float[np.ndarray, "E B"]) -> dict[str, Any]:
        found = bootstrap(values, document)
        return found | {name: np.split(found[name], ends) for name in ("mean", "low", "high")}

    return {
        "delta": interval(rise),
        "null": interval(null),
        "excess": interval(excess),
        "domains": np.unique(domain),
        "by_domain": np.split(np.stack([rise[:, domain == d].mean(-1) for d in np.unique(domain)], -1), ends),
        "rho": [rank_correlation(*pair) for pair in zip(load, np.split(rise.mean(-1), ends), strict=True)],
        "rho_excess": [rank_correlation(*pair) for pair in zip(load, np.split(excess.mean(-1), ends), strict=True)],
    }


def rank_correlation(a: Float[np.ndarray, " E"], b: Float[np.ndarray, " E"]) -> float:
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
