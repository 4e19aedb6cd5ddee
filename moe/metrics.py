"""Routing metrics: what is summed while running (`measure`), and every number computed from the sums (`METRICS`).

Training logs, evaluation, W&B, result files and figures all read this one table. Balance is judged on the offered
load, before drops: counting kept assignments makes a tight capacity look like good balance.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe.dispatch import Plan
from moe.routing import Routing, RoutingStats


@torch.no_grad()
def measure(routing: Routing, plan: Plan, tokens: int) -> RoutingStats:
    """The sums of one layer over one micro-batch of `tokens` tokens."""
    missing = plan.weight.new_tensor(math.nan)
    probs = routing.probs
    at_t1 = torch.softmax(routing.logits, -1) if routing.logits is not None else None
    reached = torch.zeros(tokens, device=plan.token.device).index_fill_(0, plan.token, 1.0)
    return RoutingStats(
        tokens=plan.weight.new_tensor(float(tokens)),
        assignments=plan.offered.sum().float(),
        offered=plan.offered.float(),
        kept=plan.kept.float(),
        unrouted=tokens - reached.sum(),
        importance=missing.expand(len(plan.offered)) if probs is None else probs.sum(0),
        entropy=missing if probs is None else torch.special.entr(probs).sum(),
        confidence=missing if probs is None else probs.amax(-1).sum(),
        entropy_t1=missing if at_t1 is None else torch.special.entr(at_t1).sum(),
        confidence_t1=missing if at_t1 is None else at_t1.amax(-1).sum(),
        logsumexp_squared=missing if routing.logits is None else torch.logsumexp(routing.logits, -1).square().sum(),
        evidence=missing.expand(len(plan.offered)) if routing.evidence is None else routing.evidence,
    )


def load_share(stats: RoutingStats) -> Float[Tensor, "L E"]:
    """f: each expert's share of the assignments asked for; rows sum to 1."""
    return stats.offered / stats.assignments[:, None]


def _relative_load(stats: RoutingStats) -> Tensor:
    return load_share(stats) * stats.offered.shape[-1]  # load / mean load


def _cv(stats: RoutingStats) -> Tensor:
    return _relative_load(stats).std(-1, correction=0)


def _max_violation(stats: RoutingStats) -> Tensor:
    return _relative_load(stats).amax(-1) - 1


def _gini(stats: RoutingStats) -> Tensor:
    share = load_share(stats)
    return (share[:, :, None] - share[:, None, :]).abs().sum((1, 2)) / (2 * share.shape[-1])


def _load_entropy(stats: RoutingStats) -> Tensor:
    return torch.special.entr(load_share(stats)).sum(-1)


def _mutual_information(stats: RoutingStats) -> Tensor:
    mean = stats.importance / stats.tokens[:, None]
    return torch.special.entr(mean).sum(-1) - stats.entropy / stats.tokens


class Metric(NamedTuple):
    """formula: RoutingStats (L, ...) -> (L); balance metrics are also given pooled over layers and for the worst layer;
    better: which way is better, if either."""

    formula: Callable[[RoutingStats], Tensor]
    meaning: str
    better: str | None = None
    balance: bool = False


METRICS: dict[str, Metric] = {
    "load_cv": Metric(
        _cv, "std (ddof 0) / mean of expert load; 0 balanced, at most sqrt(E/K - 1)", "lower", balance=True
    ),
    "load_max_violation": Metric(
        _max_violation, "largest load / mean load - 1, one-sided MaxVio (Wang 2408.15664)", "lower", balance=True
    ),
    "load_gini": Metric(_gini, "Gini coefficient of expert load; 0 balanced, at most 1 - K/E", "lower", balance=True),
    "load_entropy": Metric(
        lambda s: _load_entropy(s) / math.log(max(2, s.offered.shape[-1])),
        "entropy of the load / ln E; 1 balanced",
        "higher",
        balance=True,
    ),
    "effective_experts": Metric(
        lambda s: _load_entropy(s).exp(), "exp(entropy of the load), 1 ... E", "higher", balance=True
    ),
    "unused_experts": Metric(
        lambda s: (s.offered == 0).float().mean(-1), "share of experts that no token asked for", "lower", balance=True
    ),
    "drop_rate": Metric(lambda s: 1 - s.kept.sum(-1) / s.assignments, "share of assignments over capacity", "lower"),
    "unrouted_rate": Metric(lambda s: s.unrouted / s.tokens, "share of tokens that no expert processed", "lower"),
    "entropy": Metric(lambda s: s.entropy / s.tokens, "mean token entropy of the router, nats, at its temperature"),
    "entropy_t1": Metric(lambda s: s.entropy_t1 / s.tokens, "the same of the clean logits at temperature 1, nats"),
    "confidence": Metric(lambda s: s.confidence / s.tokens, "mean largest probability, at the router's temperature"),
    "confidence_t1": Metric(lambda s: s.confidence_t1 / s.tokens, "the same of the clean logits at temperature 1"),
    "mutual_information": Metric(
        _mutual_information, "entropy of the mean probability - mean token entropy, nats: soft specialisation"
    ),
    "logsumexp_squared": Metric(lambda s: s.logsumexp_squared / s.tokens, "mean logsumexp(logits)^2, the z-loss"),
}


def summarize(stats: RoutingStats, *, per_layer: bool = True) -> dict[str, float | None]:
    """Every metric as `routing/<name>` (mean over layers); with `per_layer` also `routing/<name>/layerNN` and, for
    balance, `/pooled` (loads added over layers first, so that opposite imbalances cancel) and `/worst` (of a layer).

    None where a router has no such quantity.
    """
    stats = RoutingStats(*(field.double().cpu() for field in stats))
    values: dict[str, float | None] = {}
    for name, metric in METRICS.items():
        layers = metric.formula(stats)
        values[f"routing/{name}"] = _number(layers.mean())
        if not per_layer:
            continue
        if metric.balance:
            worst = layers.amax() if metric.better == "lower" else layers.amin()
            values[f"routing/{name}/pooled"] = _number(metric.formula(stats.pool())[0])
            values[f"routing/{name}/worst"] = _number(worst)
        for layer, value in enumerate(layers):
            values[f"routing/{name}/layer{layer:02d}"] = _number(value)
    return values


def utilization(stats: RoutingStats) -> list[list[float]]:
    """(L, E) share of assignments per expert, plain numbers."""
    return load_share(stats).cpu().tolist()


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
