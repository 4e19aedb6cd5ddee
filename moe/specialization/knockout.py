"""What each expert is worth: how much the loss rises when it is taken out of a finished model."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from moe.model.decoder import MoEForCausalLM
from moe.routing.decision import Knobs, Routing
from moe.specialization.information import counts
from moe.specialization.interventions import Change, altered, removed, rerouted
from moe.specialization.observation import Observation, next_token_nats

RESAMPLES = 2000
Method = Callable[[Routing, Bool[Tensor, "A"]], Routing]


def knockouts(
    model: MoEForCausalLM, seen: Observation, knobs: Knobs, *, document: Int[np.ndarray, "B"]
) -> dict[str, dict[str, Any]]:
    """The rise of the loss, nats per token, without each expert of each layer, in two ways.

    rerouted: its assignments go to the next-best experts of their tokens; zeroed: they add nothing. The null of both is
    to do the same to as many random assignments of the layer, batch by batch: what losing so much work costs, whoever
    did it. Its draw is single, so one expert's excess over it is noisy. See `_summary` for the fields.
    """
    experts = model.config.num_experts
    methods: dict[str, Method] = {
        "rerouted": functools.partial(rerouted, num_experts=experts),
        "zeroed": removed,
    }
    load = seen.chosen.sum(1) / seen.chosen.sum((1, 2))[:, None]
    results = {}
    for name, method in methods.items():
        rise = np.zeros((2, len(model.moe_layers), experts, len(seen.ids)))
        for index, layer in enumerate(model.moe_layers):
            for expert in range(experts):
                for row, change in enumerate((_without(expert, method), _null(expert, method))):
                    with altered(layer, change):
                        nats = next_token_nats(model, seen.blocks, knobs).cpu().numpy()
                    rise[row, index, expert] = np.nanmean(nats - seen.nats, axis=1)
        results[name] = _summary(*rise, load=load, domain=seen.domain, document=document)
    return results


def bootstrap(
    values: Float[np.ndarray, "*X B"],
    document: Int[np.ndarray, "B"],
    *,
    weight: Float[np.ndarray, "B"] | None = None,
) -> dict[str, Any]:
    """The (weighted) mean over blocks and its 95 % percentile bootstrap interval over `documents` of them.

    Documents are drawn with all their blocks, from all domains together, because the blocks of one are no independent
    witnesses; every X sees the same 2000 resamples. A percentile interval over few documents (below about 20) is too
    narrow, that over one is NaN, and none says anything about other seeds.
    """
    weight = np.ones(len(document)) if weight is None else weight
    unit = np.unique(document, return_inverse=True)[1]
    sizes = np.bincount(unit, weight)
    sums = counts(unit, np.moveaxis(values * weight, -1, 0).reshape(len(unit), -1), size=len(sizes))
    often = np.random.default_rng(0).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=RESAMPLES)
    means = (often @ sums / (often @ sizes)[:, None]).reshape(RESAMPLES, *values.shape[:-1])
    low, high = np.quantile(means, [0.025, 0.975], axis=0) if len(sizes) > 1 else np.full((2, *means.shape[1:]), np.nan)
    return {"mean": np.average(values, axis=-1, weights=weight), "low": low, "high": high, "documents": len(sizes)}


def _summary(
    rise: Float[np.ndarray, "L E B"],
    null: Float[np.ndarray, "L E B"],
    *,
    load: Float[np.ndarray, "L E"],
    domain: Int[np.ndarray, "B"],
    document: Int[np.ndarray, "B"],
) -> dict[str, Any]:
    """delta, null, excess = delta - null: (L, E) means with intervals; by_domain: (L, E, domains that occur) of delta;
    rho, rho_excess: (L) Spearman's correlation, over experts, of load with delta and with excess."""
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
    """Spearman's rho; NaN where one side is constant or there are fewer than three pairs."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def _without(expert: int, method: Method) -> Change:
    return lambda routing, _: method(routing, routing.expert == expert)


def _null(expert: int, method: Method) -> Change:
    draw = torch.Generator().manual_seed(expert)

    def change(routing: Routing, _: Tensor) -> Routing:
        assignments = len(routing.expert)
        order = torch.randperm(assignments, generator=draw).to(routing.expert.device)
        return method(routing, order < (routing.expert == expert).sum())

    return change
