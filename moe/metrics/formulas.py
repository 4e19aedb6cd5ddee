"""Formulas of the routing metrics: pure NumPy functions of the sums that `moe.routing.measurement` takes.

Each function takes `Sums` of L layers and returns an array (L). NaN means that the router has no such quantity.
`moe.metrics.catalog` says which metric uses which function. Balance is computed from the load before drops:
kept assignments would make a tight capacity look like good balance.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Layers = Float[np.ndarray, "L"]


class Sums:
    """The fields of `moe.routing.stats.RoutingStats`, stacked over layers, as NumPy arrays in double precision."""

    def __init__(self, fields: dict[str, np.ndarray]) -> None:
        vars(self).update(fields)

    def __getattr__(self, name: str) -> np.ndarray:  # tells mypy that every field is an array
        raise AttributeError(f"RoutingStats has no field {name}")

    def pool(self) -> "Sums":
        """Add all layers into one. Opposite imbalances of two layers cancel."""
        return Sums({name: field.sum(0, keepdims=True) for name, field in vars(self).items()})


def load_share(s: Sums) -> Float[np.ndarray, "L E"]:
    """Return f, each expert's share of the assignments asked for. Rows sum to 1."""
    return s.offered / s.assignments[:, None]


def relative_load(s: Sums) -> Float[np.ndarray, "L E"]:
    """Return load / mean load of each expert."""
    return load_share(s) * s.offered.shape[-1]


def experts_per_token(s: Sums) -> Layers:
    """Return K, the mean number of experts that a token asks for."""
    return s.assignments / s.tokens


def attainable_violation(s: Sums) -> Layers:
    """Return E/K - 1, the largest MaxVio if no token asks for an expert twice; maxima of CV and Gini follow from it.

    NaN where every token takes every expert. If some tokens take none (K < 1), it is the maximum over the tokens that
    take one.
    """
    excess = s.offered.shape[-1] / np.maximum(experts_per_token(s), 1) - 1
    return np.where(excess > 0, excess, math.nan)


def load_cv(s: Sums) -> Layers:
    return relative_load(s).std(-1)


def load_cv_normalized(s: Sums) -> Layers:
    return load_cv(s) / np.sqrt(attainable_violation(s))


def load_cv_floor(s: Sums) -> Layers:
    variance = (s.offered.shape[-1] - np.maximum(experts_per_token(s), 1)) / s.assignments
    return np.where(s.assignments > 0, np.sqrt(variance), math.nan)


def load_max_violation(s: Sums) -> Layers:
    return relative_load(s).max(-1) - 1


def load_max_violation_normalized(s: Sums) -> Layers:
    return load_max_violation(s) / attainable_violation(s)


def load_max_violation_two_sided(s: Sums) -> Layers:
    return np.abs(relative_load(s) - 1).max(-1)


def load_max_violation_batch(s: Sums) -> Layers:
    return s.max_violation / s.micro_batches


def load_max_violation_sequence(s: Sums) -> Layers:
    return s.max_violation_sequence / s.sequences


def load_gini(s: Sums) -> Layers:
    share = load_share(s)
    return np.abs(share[:, :, None] - share[:, None, :]).sum((1, 2)) / (2 * share.shape[-1])


def load_gini_normalized(s: Sums) -> Layers:
    attainable = attainable_violation(s)
    return load_gini(s) * (1 + attainable) / attainable


def load_entropy(s: Sums) -> Layers:
    return _entropy(load_share(s)) / math.log(max(2, s.offered.shape[-1]))


def effective_experts(s: Sums) -> Layers:
    return np.exp(_entropy(load_share(s)))


def unused_experts(s: Sums) -> Layers:
    return (s.offered == 0).mean(-1)


def drop_rate(s: Sums) -> Layers:
    return 1 - s.kept.sum(-1) / s.assignments


def drop_rate_by_position(s: Sums) -> Float[np.ndarray, "L P"]:
    """Return the drop rate of each decile of the position."""
    return 1 - s.kept_by_position / s.offered_by_position.sum(-1)


def capacity_usage(s: Sums) -> Layers:
    return s.kept.sum(-1) / s.capacity


def active_experts(s: Sums) -> Layers:
    return _active_moments(s).mean


def active_experts_std(s: Sums) -> Layers:
    return np.sqrt(_active_moments(s).variance)


def unrouted_rate(s: Sums) -> Layers:
    return s.unrouted / s.tokens


def entropy(s: Sums) -> Layers:
    return s.entropy / s.tokens


def entropy_t1(s: Sums) -> Layers:
    return s.entropy_t1 / s.tokens


def confidence(s: Sums) -> Layers:
    return s.confidence / s.tokens


def confidence_t1(s: Sums) -> Layers:
    return s.confidence_t1 / s.tokens


def margin(s: Sums) -> Layers:
    return s.margin / s.tokens


def top_k_mass(s: Sums) -> Layers:
    return s.top_k_mass / s.tokens


def logsumexp_squared(s: Sums) -> Layers:
    return s.logsumexp_squared / s.tokens


def logit_rms(s: Sums) -> Layers:
    return np.sqrt(s.logit_squared / s.tokens)


def mutual_information(s: Sums) -> Layers:
    return _entropy(s.importance / s.tokens[:, None]) - s.entropy / s.tokens


def position_information(s: Sums) -> Layers:
    """Subtract the expectation under independence, (P - 1)(E - 1) / 2n, from the plug-in estimate (Miller 1955)."""
    counts = s.offered_by_position
    total = counts.sum((1, 2))
    joint = counts.reshape(len(counts), -1) / total[:, None]
    position, expert = counts.sum(2) / total[:, None], counts.sum(1) / total[:, None]
    freedom = ((position > 0).sum(-1) - 1) * ((expert > 0).sum(-1) - 1)  # degrees of freedom
    return _entropy(position) + _entropy(expert) - _entropy(joint) - freedom / (2 * total)


def output_similarity(s: Sums) -> Layers:
    return s.output_similarity / s.probed


def jaccard(s: Sums) -> Layers:
    i, j = np.triu_indices(s.offered.shape[-1], 1)
    both = s.coactivation[:, i, j]
    pairs = both / (s.offered[:, i] + s.offered[:, j] - both)
    defined = ~np.isnan(pairs)  # two unused experts give 0 / 0 and are left out
    mean = np.where(defined, pairs, 0).sum(-1) / defined.sum(-1)
    return np.where(experts_per_token(s) > 1, mean, math.nan)


def jaccard_chance(s: Sums) -> Layers:
    others = experts_per_token(s) - 1
    return np.where(others > 0, others / (2 * (s.offered.shape[-1] - 1) - others), math.nan)


def sequential_overlap(s: Sums) -> Layers:
    return s.repeated / s.repeatable


def sequential_overlap_chance(s: Sums) -> Layers:
    return experts_per_token(s) / s.offered.shape[-1]


def sequential_overlap_kappa(s: Sums) -> Layers:
    """Compare with two unrelated tokens, each of which asks for expert e with probability K f_e."""
    chance = experts_per_token(s) * np.square(load_share(s)).sum(-1)
    attainable = np.where(chance < 1 - 1e-6, 1 - chance, math.nan)
    return (sequential_overlap(s) - chance) / attainable


class _Moments(NamedTuple):
    mean: np.ndarray
    variance: np.ndarray


def _active_moments(s: Sums) -> _Moments:
    """Return mean and variance of the number of experts that a token asks for.

    They are computed from the distribution of that number. Computed from sums of squares, the variance of a fixed
    number would not be exactly 0, because of rounding.
    """
    numbers = np.arange(s.tokens_by_active.shape[-1])
    share = s.tokens_by_active / s.tokens_by_active.sum(-1, keepdims=True)
    mean = (share * numbers).sum(-1)
    return _Moments(mean, (share * np.square(numbers - mean[:, None])).sum(-1))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Return -Σ p ln p over the last axis, with 0 ln 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
