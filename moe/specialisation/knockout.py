"""What each expert is worth: how much the loss rises when it is taken out of a finished model."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from moe.model import MoEForCausalLM
from moe.routing import Knobs, Routing
from moe.specialisation.interventions import Change, altered, removed, rerouted
from moe.specialisation.observation import Observation, next_token_nats

RESAMPLES = 2000
Method = Callable[[Routing, Bool[Tensor, "A"]], Routing]


def knockouts(model: MoEForCausalLM, seen: Observation, knobs: Knobs) -> dict[str, dict[str, Any]]:
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
        results[name] = _summary(*rise, load=load, domain=seen.domain)
    return results


def bootstrap(values: Float[np.ndarray, "*X B"]) -> dict[str, Any]:
    """The mean over blocks and its 95 % percentile bootstrap interval; every X sees the same 2000 resamples.

    Blocks are what text varies by; the interval says nothing about other seeds.
    """
    units = values.shape[-1]
    often = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=RESAMPLES)
    low, high = np.quantile(values @ often.T / units, [0.025, 0.975], axis=-1)
    return {"mean": values.mean(-1), "low": low, "high": high}


def _summary(
    rise: Float[np.ndarray, "L E B"],
    null: Float[np.ndarray, "L E B"],
    *,
    load: Float[np.ndarray, "L E"],
    domain: Int[np.ndarray, "B"],
) -> dict[str, Any]:
    """delta, null, excess = delta - null: (L, E) means with intervals; by_domain: (L, E, domains that occur) of delta;
    rho, rho_excess: (L) Spearman's correlation, over experts, of load with delta and with excess."""
    excess = rise - null
    return {
        "delta": bootstrap(rise),
        "null": bootstrap(null),
        "excess": bootstrap(excess),
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
