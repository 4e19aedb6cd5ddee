"""How far two routings of the same tokens agree, beyond chance."""

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from moe.runs.traces import Trace


def overlap(a: Bool[np.ndarray, "L N E"], b: Bool[np.ndarray, "L N E"]) -> dict[str, Float[np.ndarray, "L"]]:
    """|A_t ∩ B_t| / k, by layer, the mean over tokens, and the same with chance taken out: (o - c) / (1 - c).

    kappa: c = k/E, tokens choosing at random. kappa_shuffled: c is what the same loads would share if the tokens of one
    side were shuffled, which is more than k/E when loads are uneven: it alone is agreement about tokens. Where the
    number of experts varies, the larger set counts as k. NaN where every token takes every expert.
    """
    size = np.maximum(a.sum(-1), b.sum(-1)).sum(-1)
    shared = (a & b).sum((1, 2)) / size
    uniform = (a.sum(-1) * b.sum(-1)).sum(-1) / a.shape[-1] / size
    shuffled = (a.sum(1) * b.sum(1)).sum(-1) / a.shape[1] / size
    return {
        "overlap": shared,
        "kappa": beyond_chance(shared, uniform),
        "kappa_shuffled": beyond_chance(shared, shuffled),
    }


def beyond_chance(observed: np.ndarray, chance: Any) -> np.ndarray:
    """(observed - chance) / (1 - chance); NaN where chance leaves no room."""
    room = np.asarray(1 - chance, dtype=float)
    return np.divide(observed - chance, room, out=np.full(room.shape, np.nan), where=room > 1e-12)


def consistency(traces: list[Trace]) -> dict[str, float | None]:
    """`overlap` and `kappa_shuffled` of the last two traces, of 75 and 100 % of a run, means over layers; None where
    there are no two, or where every token takes every expert."""
    names = {"routing/consistency": "overlap", "routing/consistency_kappa": "kappa_shuffled"}
    if len(traces) < 2:
        return dict.fromkeys(names)
    shared = overlap(traces[-2].chosen, traces[-1].chosen)
    means = {name: float(shared[part].mean()) for name, part in names.items()}
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
