"""Agreement of two routings of the same tokens, beyond chance."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float


def overlap(a: Bool[np.ndarray, "L N E"], b: Bool[np.ndarray, "L N E"]) -> dict[str, Float[np.ndarray, "L"]]:
    """Compute the overlap o = |A_t ∩ B_t| / k of two choices, by layer, as the mean over tokens.

    Also corrects it for chance c, as (o - c) / (1 - c):
        kappa: c = k/E, as if tokens chose at random.
        kappa_shuffled: c is the overlap under the same loads if the tokens of one side were shuffled. It is larger
            than k/E when loads are uneven. Only this value measures agreement about tokens.
    Where the number of experts per token varies, the larger set counts as k. Corrected values are NaN where every token
    takes every expert, and all values where no token takes any.
    """
    total = np.maximum(a.sum(-1), b.sum(-1)).sum(-1)
    size = np.where(total > 0, total, math.nan)
    shared = (a & b).sum((1, 2)) / size
    uniform = (a.sum(-1) * b.sum(-1)).sum(-1) / a.shape[-1] / size
    shuffled = (a.sum(1) * b.sum(1)).sum(-1) / a.shape[1] / size
    return {
        "overlap": shared,
        "kappa": beyond_chance(shared, uniform),
        "kappa_shuffled": beyond_chance(shared, shuffled),
    }


def beyond_chance(observed: np.ndarray, chance: Any) -> np.ndarray:
    """Compute (observed - chance) / (1 - chance); NaN where chance is 1."""
    attainable = np.asarray(1 - chance, dtype=float)
    return np.divide(observed - chance, attainable, out=np.full(attainable.shape, np.nan), where=attainable > 1e-12)


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
