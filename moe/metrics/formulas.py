"""Routing metrics: every number computed from the sums that `moe.routing.measurement` takes while running.

Training logs, evaluation, W&B, result files and figures all read this one table. Balance is judged on the offered
load, before drops: counting kept assignments makes a tight capacity look like good balance.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe.routing.stats import RoutingStats


def load_share(stats: RoutingStats) -> Float[Tensor, "L E"]:
    """f: each expert's share of the assignments asked for; rows sum to 1."""
    return stats.offered / stats.assignments[:, None]


def _relative_load(stats: RoutingStats) -> Tensor:
    return load_share(stats) * stats.offered.shape[-1]  # load / mean load


def _cv(stats: RoutingStats) -> Tensor:
    return _relative_load(stats).std(-1, correction=0)


def _max_violation(stats: RoutingStats) -> Tensor:
    return _relative_load(stats).amax(-1) - 1


def _max_violation_two_sided(stats: RoutingStats) -> Tensor:
    return (_relative_load(stats) - 1).abs().amax(-1)


def _gini(stats: RoutingStats) -> Tensor:
    share = load_share(stats)
    return (share[:, :, None] - share[:, None, :]).abs().sum((1, 2)) / (2 * share.shape[-1])


def _load_entropy(stats: RoutingStats) -> Tensor:
    return torch.special.entr(load_share(stats)).sum(-1)


def _mutual_information(stats: RoutingStats) -> Tensor:
    mean = stats.importance / stats.tokens[:, None]
    return torch.special.entr(mean).sum(-1) - stats.entropy / stats.tokens


def _position_information(stats: RoutingStats) -> Tensor:
    """Plug-in mutual information less its expectation under independence, (P - 1)(E - 1) / 2n (Miller 1955)."""
    counts = stats.offered_by_position
    total = counts.sum((1, 2))
    joint, place, expert = (c.flatten(1) / total[:, None] for c in (counts, counts.sum(2), counts.sum(1)))
    entropies = [torch.special.entr(p).sum(-1) for p in (place, expert, joint)]
    cells = ((place > 0).sum(-1) - 1) * ((expert > 0).sum(-1) - 1)
    return entropies[0] + entropies[1] - entropies[2] - cells / (2 * total)


def _k(stats: RoutingStats) -> Tensor:
    return stats.assignments / stats.tokens


def _active_moments(stats: RoutingStats) -> tuple[Tensor, Tensor]:
    """Mean and variance of the number of experts that a token asks for; of its distribution, not of sums of squares,
    whose rounding would give a fixed number a variance."""
    numbers = torch.arange(stats.tokens_by_active.shape[-1], device=stats.tokens.device)
    share = stats.tokens_by_active / stats.tokens_by_active.sum(-1, keepdim=True)
    mean = (share * numbers).sum(-1)
    return mean, (share * (numbers - mean[:, None]).square()).sum(-1)


def _attainable(stats: RoutingStats) -> Tensor:
    """E/K - 1, the largest MaxVio when no token asks for an expert twice; CV^2 and Gini have theirs from it.

    NaN where every token takes every expert. Where some take none (K < 1) it is that of the tokens which take one.
    """
    excess = stats.offered.shape[-1] / _k(stats).clamp(min=1) - 1
    return excess.where(excess > 0, math.nan)


def _cv_floor(stats: RoutingStats) -> Tensor:
    variance = (stats.offered.shape[-1] - _k(stats).clamp(min=1)) / stats.assignments
    return variance.sqrt().where(stats.assignments > 0, math.nan)


def _gini_normalized(stats: RoutingStats) -> Tensor:
    attainable = _attainable(stats)
    return _gini(stats) * (1 + attainable) / attainable


def _jaccard(stats: RoutingStats) -> Tensor:
    experts = stats.offered.shape[-1]
    i, j = torch.triu_indices(experts, experts, offset=1)
    both = stats.coactivation[:, i, j]
    either = stats.offered[:, i] + stats.offered[:, j] - both
    # two unused experts, 0 / 0, are no pair
    return (both / either).nanmean(-1).where(_k(stats) > 1, math.nan)


def _sequential_overlap(stats: RoutingStats) -> Tensor:
    return stats.repeated / stats.repeatable


def _sequential_overlap_kappa(stats: RoutingStats) -> Tensor:
    """Chance: of two unrelated tokens, each of which has expert e with probability K f_e."""
    chance = _k(stats) * load_share(stats).square().sum(-1)
    room = (1 - chance).where(chance < 1 - 1e-6, math.nan)
    return (_sequential_overlap(stats) - chance) / room


def _jaccard_chance(stats: RoutingStats) -> Tensor:
    others = _k(stats) - 1
    return (others / (2 * (stats.offered.shape[-1] - 1) - others)).where(others > 0, math.nan)


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
    "load_cv_normalized": Metric(
        lambda s: _cv(s) / _attainable(s).sqrt(), "load_cv / its attainable maximum, for any K", "lower", balance=True
    ),
    "load_cv_floor": Metric(
        _cv_floor, "load_cv that T tokens show by chance, each taking K experts at random", "lower", balance=True
    ),
    "load_max_violation": Metric(
        _max_violation, "largest load / mean load - 1, one-sided MaxVio (Wang 2408.15664)", "lower", balance=True
    ),
    "load_max_violation_normalized": Metric(
        lambda s: _max_violation(s) / _attainable(s), "the same / its attainable maximum", "lower", balance=True
    ),
    "load_max_violation_two_sided": Metric(
        _max_violation_two_sided,
        "largest |load - mean load| / mean load; at least 1 if an expert is unused",
        "lower",
        balance=True,
    ),
    "load_max_violation_batch": Metric(
        lambda s: s.max_violation / s.batches, "load_max_violation of a micro-batch, mean over micro-batches", "lower"
    ),
    "load_max_violation_sequence": Metric(
        lambda s: s.max_violation_sequence / s.sequences,
        "load_max_violation of a sequence (block), mean over them",
        "lower",
    ),
    "load_gini": Metric(_gini, "Gini coefficient of expert load; 0 balanced, at most 1 - K/E", "lower", balance=True),
    "load_gini_normalized": Metric(
        _gini_normalized, "load_gini / its attainable maximum, for any K", "lower", balance=True
    ),
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
    "capacity_usage": Metric(
        lambda s: s.kept.sum(-1) / s.slots, "share of the slots that capacity offers which are taken", "higher"
    ),
    "active_experts": Metric(lambda s: _active_moments(s)[0], "mean number of experts that a token asked for"),
    "active_experts_std": Metric(
        lambda s: _active_moments(s)[1].sqrt(), "std (ddof 0) over tokens of the same; 0 where it is fixed"
    ),
    "unrouted_rate": Metric(lambda s: s.unrouted / s.tokens, "share of tokens that no expert processed", "lower"),
    "entropy": Metric(lambda s: s.entropy / s.tokens, "mean token entropy of the router, nats, at its temperature"),
    "entropy_t1": Metric(lambda s: s.entropy_t1 / s.tokens, "the same of the clean logits at temperature 1, nats"),
    "confidence": Metric(lambda s: s.confidence / s.tokens, "mean largest probability, at the router's temperature"),
    "confidence_t1": Metric(lambda s: s.confidence_t1 / s.tokens, "the same of the clean logits at temperature 1"),
    "margin": Metric(lambda s: s.margin / s.tokens, "mean largest - second largest probability"),
    "top_k_mass": Metric(lambda s: s.chosen_mass / s.tokens, "mean probability of all experts that a token asked for"),
    "mutual_information": Metric(
        _mutual_information, "entropy of the mean probability - mean token entropy, nats: soft specialization"
    ),
    "position_information": Metric(
        _position_information,
        "mutual information of expert and decile of the position in the text, nats, less its bias",
    ),
    "output_similarity": Metric(
        lambda s: s.output_similarity / s.probed, "mean cosine of two experts' outputs for the same token", "lower"
    ),
    "logsumexp_squared": Metric(lambda s: s.logsumexp_squared / s.tokens, "mean logsumexp(logits)^2, the z-loss"),
    "logit_rms": Metric(lambda s: (s.logit_squared / s.tokens).sqrt(), "root mean square of the clean logits"),
    "jaccard": Metric(_jaccard, "mean over pairs of experts of |tokens of both| / |tokens of either|; K > 1"),
    "jaccard_chance": Metric(_jaccard_chance, "jaccard of balanced routing at random, (K-1) / (2(E-1) - (K-1)); K > 1"),
    "sequential_overlap": Metric(
        _sequential_overlap, "share of assignments that the token before, of the same text, asked for too"
    ),
    "sequential_overlap_chance": Metric(
        lambda s: _k(s) / s.offered.shape[-1], "sequential_overlap of balanced routing at random, K/E"
    ),
    "sequential_overlap_kappa": Metric(
        _sequential_overlap_kappa,
        "sequential_overlap beyond that of two unrelated tokens under these loads, as a share of the room above it",
    ),
}


def summarize(stats: RoutingStats, *, per_layer: bool = True) -> dict[str, float | None]:
    """Every metric as `routing/<name>` (mean over layers); with `per_layer` also `routing/<name>/layerNN` and, for
    balance, `/pooled` (loads added over layers first, so that opposite imbalances cancel) and `/worst` (of a layer).

    None where a router has no such quantity.
    """
    stats = _on_host(stats)
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


def _on_host(stats: RoutingStats) -> RoutingStats:
    """In double precision, fetched at once: every transfer from a GPU waits for it."""
    numbers = torch.cat([field.flatten() for field in stats]).cpu().double()
    parts = numbers.split([field.numel() for field in stats])
    return RoutingStats(*(part.view(field.shape) for part, field in zip(parts, stats, strict=True)))


def drop_rate_by_position(stats: RoutingStats) -> list[float | None]:
    """Share of the assignments of each decile of the position that were dropped, the mean over layers."""
    rates = 1 - stats.kept_by_position.double() / stats.offered_by_position.double().sum(-1)
    return [_number(rate) for rate in rates.mean(0)]


def utilization(stats: RoutingStats) -> list[list[float]]:
    """(L, E) share of assignments per expert, plain numbers."""
    return load_share(stats).cpu().tolist()


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
