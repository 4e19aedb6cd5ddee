"""Formulas of the routing metrics: pure NumPy functions of the sums that `moe.routing.measurement` takes.

Each function takes `Sums` of L layers and returns an array (L). NaN means that the router has no such quantity.
`moe.metrics.catalog` says which metric uses which function. Balance is computed from the load before drops:
kept assignments would make a tight capacity look like good balance.

Two layers of four experts, one of them balanced, with two experts per token:

>>> loads = np.array([[4.0, 0.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
>>> s = Sums({"offered": loads, "assignments": loads.sum(1), "tokens": np.array([4.0, 4.0])})
>>> load_cv(s).round(3)  # std / mean: sqrt(2) / 2, and 0
array([0.707, 0.   ])
>>> load_max_violation(s)  # largest / mean - 1
array([1., 0.])
>>> load_gini(s)
array([0.375, 0.   ])
>>> load_entropy(s)  # in units of ln 4
array([0.75, 1.  ])
>>> effective_experts(s).round(3)  # 4^0.75, and 4
array([2.828, 4.   ])
>>> unused_experts(s)
array([0.25, 0.  ])
>>> busy_experts(s)  # 4 + 2 + 2 of 8 assignments, and all
array([3., 4.])
>>> load_cv(s.pool()).round(3)  # layers added first: 6, 2, 4, 4
array([0.354])
>>> s = Sums({"assignments": np.array([8.0]), "kept": np.array([[2.0, 0.0, 2.0, 2.0]])})
>>> drop_rate(s)  # 1 - 6 / 8
array([0.25])
>>> sequential_overlap(Sums({"repeated": np.array([3.0]), "repeatable": np.array([12.0])}))
array([0.25])
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe.routing.axes import without_absent

Layers = Float[np.ndarray, "L"]
BUSY = 0.9  # share of the assignments that the busy experts of a layer take


class Sums:
    """The fields of `moe.routing.stats.RoutingStats`, stacked over layers, as NumPy arrays in double precision."""

    def __init__(self, fields: dict[str, np.ndarray]) -> None:
        vars(self).update(fields)

    def __getattr__(self, name: str) -> np.ndarray:  # tells mypy that every field is an array
        raise AttributeError(f"RoutingStats has no field {name}")

    def pool(self) -> "Sums":
        """Add all layers into one. Opposite imbalances of two layers cancel. All have equally many experts."""
        return Sums({name: field.sum(0, keepdims=True) for name, field in vars(self).items()})

    def experts(self) -> Int[np.ndarray, " L"]:
        """Return the number of experts of each layer. NaN follows the loads of one that has fewer than another."""
        return (~np.isnan(self.offered)).sum(-1)

    def groups(self) -> list["Group"]:
        """Return the layers by their number of experts."""
        numbers, most = self.experts(), self.offered.shape[-1]
        if (numbers == most).all():
            return [Group(np.arange(len(numbers)), self)]
        found = []
        for number in np.unique(numbers).tolist():
            layers = np.flatnonzero(numbers == number)
            fields = {name: without_absent(name, field[layers], most - number) for name, field in vars(self).items()}
            found.append(Group(layers, Sums(fields)))
        return found


class Group(NamedTuple):
    """Layers of equally many experts: their numbers in the model, and their sums without experts that they lack."""

    layers: Int[np.ndarray, " N"]
    sums: Sums


def of_groups(function: Callable[[Sums], np.ndarray], groups: list[Group]) -> np.ndarray:
    """Return what a function of sums computes for all layers, from the layers of each group by themselves."""
    values = [function(group.sums) for group in groups]
    return np.concatenate(values)[np.argsort(np.concatenate([group.layers for group in groups]))]


def load_share(s: Sums) -> Float[np.ndarray, "L E"]:
    """Return f, each expert's share of the assignments asked for. Rows sum to 1."""
    return s.offered / s.assignments[:, None]


def relative_load(s: Sums) -> Float[np.ndarray, "L E"]:
    """Return load / mean load of each expert."""
    return load_share(s) * s.offered.shape[-1]


def experts_per_token(s: Sums) -> Layers:
    """Return K, the mean number of experts that a token asks for."""
    return s.assignments / s.tokens


def experts_per_assignment(s: Sums) -> Layers:
    """Return K' = mean_t K_t² / mean_t K_t, with K_t the number of experts that token t asks for.

    This is the mean over assignments of the number of experts that their token asks for.
    K' is K where that number is fixed, and larger where it varies. What happens by chance depends on K': the other
    experts of an assignment's token are K' - 1 on average. NaN for Soft MoE, whose tokens do not ask for experts.
    """
    moments = _active_moments(s)
    return moments.mean + moments.variance / moments.mean


def largest_imbalance(s: Sums) -> Float[np.ndarray, "L E"]:
    """Return load / mean load of each expert in the most unbalanced routing of the same tokens.

    In it, every token asks for as many experts as it did, and always for the first ones. Expert j then has the tokens
    that ask for at least j experts. No other routing has larger partial sums of sorted loads (Gale and Ryser), and so
    none has a larger CV, Gini coefficient or MaxVio. NaN for Soft MoE, and where no token asks for an expert.
    """
    at_least = np.cumsum(s.tokens_by_active[:, ::-1], -1)[:, -2::-1]
    mean = at_least.mean(-1, keepdims=True)
    return np.divide(at_least, mean, out=np.full(at_least.shape, np.nan), where=mean > 0)


def load_cv(s: Sums) -> Layers:
    return _cv(relative_load(s))


def load_cv_normalized(s: Sums) -> Layers:
    return _share(load_cv(s), _cv(largest_imbalance(s)))


def load_cv_floor(s: Sums) -> Layers:
    variance = (s.offered.shape[-1] - experts_per_assignment(s)) / s.assignments
    return np.sqrt(np.maximum(variance, 0))


def load_max_violation(s: Sums) -> Layers:
    return _max_violation(relative_load(s))


def load_max_violation_normalized(s: Sums) -> Layers:
    return _share(load_max_violation(s), _max_violation(largest_imbalance(s)))


def load_max_violation_two_sided(s: Sums) -> Layers:
    return np.abs(relative_load(s) - 1).max(-1)


def load_max_violation_batch(s: Sums) -> Layers:
    return s.max_violation / s.micro_batches


def load_max_violation_sequence(s: Sums) -> Layers:
    return s.max_violation_sequence / s.sequences


def load_gini(s: Sums) -> Layers:
    return _gini(relative_load(s))


def load_gini_normalized(s: Sums) -> Layers:
    return _share(load_gini(s), _gini(largest_imbalance(s)))


def load_entropy(s: Sums) -> Layers:
    return entropy_of(load_share(s)) / math.log(max(2, s.offered.shape[-1]))


def effective_experts(s: Sums) -> Layers:
    return np.exp(entropy_of(load_share(s)))


def unused_experts(s: Sums) -> Layers:
    return (s.offered == 0).mean(-1)


def busiest(loads: Float[np.ndarray, "L E"]) -> Bool[np.ndarray, "L E"]:
    """Return which experts are the fewest that together have `BUSY` of the load. None of a layer without load."""
    order = np.argsort(-loads, -1, kind="stable")
    before = np.cumsum(np.take_along_axis(loads, order, -1), -1) - np.take_along_axis(loads, order, -1)
    chosen = np.zeros(loads.shape, dtype=bool)
    # Rounding errors must not add an expert where the others have exactly this share.
    np.put_along_axis(chosen, order, before < BUSY * loads.sum(-1, keepdims=True) * (1 - 1e-9), -1)
    return chosen


def busy(s: Sums) -> Bool[np.ndarray, "L E"]:
    """Return which experts are the fewest that take 90 % of the assignments."""
    return busiest(np.nan_to_num(s.offered))  # an expert that a layer lacks takes nothing


def busy_experts(s: Sums) -> Layers:
    return np.where(s.assignments > 0, busy(s).sum(-1), math.nan)


def collapsed(s: Sums) -> Layers:
    """Return 1 where few experts take 90 % of the assignments, and 0 elsewhere.

    Few is at most a quarter of the way from the fewest that these tokens could use (`largest_imbalance`) to the number
    under an even load, and at most half of all experts. An even load of A assignments uses at most A experts. NaN where
    no token asks for an expert, and for Soft MoE.
    """
    experts = s.offered.shape[-1]
    imbalance = largest_imbalance(s)
    fewest = np.where(np.isnan(imbalance).any(-1), math.nan, busiest(np.nan_to_num(imbalance)).sum(-1))
    even = np.ceil(BUSY * np.minimum(experts, s.assignments))
    number, most = busy_experts(s), np.minimum(fewest + (even - fewest) / 4, experts / 2)
    return np.where(np.isnan(number + most), math.nan, number <= most)


def constant(s: Sums) -> Layers:
    """Return 1 where all tokens ask for the same experts and leave others out, and 0 elsewhere."""
    all_or_none = (s.offered == 0) | (s.offered == s.tokens[:, None])
    return (all_or_none.all(-1) & (s.offered == 0).any(-1) & (s.assignments > 0)).astype(float)


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


def gate_entropy(s: Sums) -> Layers:
    return s.gate_entropy / (s.tokens - s.tokens_by_active[:, 0])


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
    return entropy_of(s.importance / s.tokens[:, None]) - s.entropy / s.tokens


def position_information(s: Sums) -> Layers:
    """Subtract the expectation under independence, (P - 1)(E - K') / 2n, from the plug-in estimate.

    For K = 1 this is the correction of Miller (1955). A token's experts are distinct, which makes chance differences
    between positions smaller: with K = E there are none.
    """
    counts = s.offered_by_position
    total = counts.sum((1, 2))
    joint = counts.reshape(len(counts), -1) / total[:, None]
    position, expert = counts.sum(2) / total[:, None], counts.sum(1) / total[:, None]
    freedom = ((position > 0).sum(-1) - 1) * ((expert > 0).sum(-1) - experts_per_assignment(s))
    return entropy_of(position) + entropy_of(expert) - entropy_of(joint) - freedom / (2 * total)


def output_similarity(s: Sums) -> Layers:
    return s.output_similarity / s.probed


def flip_rate(s: Sums) -> Layers:
    return s.flipped / s.rechecked


def flip_rate_order(s: Sums) -> Layers:
    return s.reordered / s.rechecked


def jaccard(s: Sums) -> Layers:
    i, j = np.triu_indices(s.offered.shape[-1], 1)
    both = s.coactivation[:, i, j]
    pairs = both / (s.offered[:, i] + s.offered[:, j] - both)
    defined = ~np.isnan(pairs)  # two unused experts give 0 / 0 and are left out
    mean = np.where(defined, pairs, 0).sum(-1) / defined.sum(-1)
    return np.where(experts_per_assignment(s) > 1, mean, math.nan)


def jaccard_chance(s: Sums) -> Layers:
    others = experts_per_assignment(s) - 1
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


def _cv(loads: Float[np.ndarray, "L E"]) -> Layers:
    return loads.std(-1) / loads.mean(-1)


def _max_violation(loads: Float[np.ndarray, "L E"]) -> Layers:
    return loads.max(-1) / loads.mean(-1) - 1


def _gini(loads: Float[np.ndarray, "L E"]) -> Layers:
    share = loads / loads.sum(-1, keepdims=True)
    return np.abs(share[:, :, None] - share[:, None, :]).sum((1, 2)) / (2 * share.shape[-1])


def _share(value: Layers, maximum: Layers) -> Layers:
    """Return value / maximum; NaN where the maximum is 0, which is where every token takes every expert."""
    return value / np.where(maximum > 1e-12, maximum, math.nan)


def entropy_of(p: np.ndarray) -> np.ndarray:
    """Return -Σ p ln p over the last axis, with 0 ln 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
