"""Agreement of two routings of the same tokens, beyond chance."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Choices = Bool[np.ndarray, "L N E"] | list[Bool[np.ndarray, "N _"]]  # by layer; a list if layers may differ in E


def overlap(a: Choices, b: Choices) -> dict[str, Float[np.ndarray, " L"]]:
    """Compute the overlap o = Σ_t |A_t ∩ B_t| / Σ_t k of two choices, by layer.

    Also corrects it for chance c, as (o - c) / (1 - c):
        kappa: c is the overlap if each token chose as many experts as it did, at random: k/E.
        kappa_shuffled: c is the overlap if the tokens of one side were shuffled. Loads stay as they are, and so does
            the number of experts per token. It is larger than k/E when loads are uneven. Only this value measures
            agreement about tokens.
    Where the number of experts per token varies, the larger set counts as k, in the overlap and in both chance levels.
    Corrected values are NaN where every token takes every expert, and all values where no token takes any.
    """
    sums = np.array([_sums(*of_layer) for of_layer in zip(a, b, strict=True)]).reshape(-1, 5)
    size, shared, at_random, shuffled, size_if_shuffled = sums.T
    observed = _divide(shared, size)
    return {
        "overlap": observed,
        "kappa": beyond_chance(observed, _divide(at_random, size)),
        "kappa_shuffled": beyond_chance(observed, _divide(shuffled, size_if_shuffled)),
    }


def _sums(a: Bool[np.ndarray, "N E"], b: Bool[np.ndarray, "N E"]) -> Float[np.ndarray, "5"]:
    """Return Σ_t max(|A_t|, |B_t|) and Σ_t |A_t ∩ B_t| in one layer, and what is expected by chance.

    This is Σ_t |A_t ∩ B_t| of random experts, and both sums if the tokens of b are shuffled.
    """
    of_a, of_b, numbers = a.sum(-1), b.sum(-1), np.arange(a.shape[-1] + 1)
    counts = [(of_token[:, None] == numbers).sum(0) for of_token in (of_a, of_b)]
    if_shuffled = np.einsum("i,j,ij->", *counts, np.maximum(numbers[:, None], numbers)) / len(a)
    at_random, shuffled = (of_a * of_b).sum() / a.shape[-1], (a.sum(0) * b.sum(0)).sum() / len(a)
    return np.array([np.maximum(of_a, of_b).sum(), (a & b).sum(), at_random, shuffled, if_shuffled], dtype=float)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b > 0)


def beyond_chance(observed: np.ndarray, chance: Any) -> np.ndarray:
    """Compute (observed - chance) / (1 - chance); NaN where chance is 1.

    >>> beyond_chance(np.array([0.25, 0.625, 1.0]), np.array([0.25, 0.25, 1.0]))
    array([0. , 0.5, nan])
    """
    attainable = np.asarray(1 - chance, dtype=float)
    return np.divide(observed - chance, attainable, out=np.full(attainable.shape, np.nan), where=attainable > 1e-12)


def divergence(base: Float[np.ndarray, "*L N E"], now: Float[np.ndarray, "*L N E"]) -> Float[np.ndarray, "*L"]:
    """Compute KL(base || now) = mean_t Σ_e p_te ln(p_te / q_te) in nats, by layer.

    A probability of 0 in `now` counts as the smallest normal number of fp32, so that the result is finite. The terms
    are p ln(p / q) - p + q, which have the same sum and are not negative. Probabilities in fp32 sum to 1 only almost,
    which would make the divergence of nearly equal ones negative.

    >>> divergence(np.array([[[0.5, 0.5]]]), np.array([[[0.25, 0.75]]])).round(4)
    array([0.1438])
    """
    p, q = (each.astype(float) for each in (base, now))
    q = np.maximum(q, np.finfo(np.float32).tiny)
    logs = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0)
    return np.maximum(logs - p + q, 0).sum(-1).mean(-1)


def drift(
    base: Bool[np.ndarray, "L N E"],
    now: Bool[np.ndarray, "L N E"],
    probs: tuple[Float[np.ndarray, "L C N E"], Float[np.ndarray, "L C N E"]] | None,
) -> dict[str, float | None]:
    """Return how far the routing of the same tokens has moved from that of the base, as means over layers and by layer.

    base, now: the choices. probs: the distributions of both, of which those in a chain of routers are averaged; None if
    the router has none. A value is None where it cannot be computed, as in `consistency`.
    """
    shared = overlap(base, now)
    moved = {"drift_churn": 1 - shared["overlap"], "drift_kappa": shared["kappa_shuffled"]}
    moved["drift_kl"] = np.full(len(base), np.nan) if probs is None else divergence(*probs).mean(1)
    return {name: value for end, layers in moved.items() for name, value in by_layer(f"routing/{end}", layers).items()}


def by_layer(name: str, layers: Float[np.ndarray, " L"]) -> dict[str, float | None]:
    """Return the mean over layers as `name`, and the value of each layer as `name/layerNN`; None for NaN."""
    numbers = {"": layers.mean(), **{f"/layer{number:02d}": value for number, value in enumerate(layers)}}
    return {name + end: float(value) if math.isfinite(value) else None for end, value in numbers.items()}


def consistency(chosen: Sequence[Bool[np.ndarray, "L N E"]]) -> dict[str, float | None]:
    """Compare the experts that a run chose for the same tokens at 75 and at 100 % of training.

    chosen: the choices at the milestones of the run; the last two are compared.

    Returns `overlap` and `kappa_shuffled` of `overlap`, means over layers. They are None if there are fewer than two
    choices, or if every token takes every expert or none.
    """
    names = {"routing/consistency": "overlap", "routing/consistency_kappa": "kappa_shuffled"}
    if len(chosen) < 2:
        return dict.fromkeys(names)
    shared = overlap(chosen[-2], chosen[-1])
    means = {name: float(shared[part].mean()) for name, part in names.items()}
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
