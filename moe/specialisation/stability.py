"""How settled routing is: along a run, and from seed to seed, whatever the experts are called."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from moe.specialisation.information import set_labels
from moe.trace import Trace

SHUFFLES = 20


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
    return {"overlap": shared, "kappa": _beyond(shared, uniform), "kappa_shuffled": _beyond(shared, shuffled)}


def saturation(traces: list[Trace]) -> list[dict[str, Any]]:
    """`overlap` of every trace with the last one (OLMoE 2409.02060)."""
    return [{"step": trace.step} | overlap(trace.chosen, traces[-1].chosen) for trace in traces]


def churn(traces: list[Trace]) -> list[dict[str, Any]]:
    """1 - `overlap` of every two traces in a row: how many choices changed since the step `since`."""
    return [
        {"since": before.step, "step": after.step}
        | {name: 1 - value for name, value in overlap(before.chosen, after.chosen).items()}
        for before, after in itertools.pairwise(traces)
    ]


def agreement(
    a: Bool[np.ndarray, "L N E"], b: Bool[np.ndarray, "L N E"], *, rng: np.random.Generator
) -> list[dict[str, float]]:
    """How alike two models route the same tokens, by layer, whatever their experts are called.

    matched: overlap / k under the renaming of experts that maximises it (Hungarian); chance: the same with the tokens
    of one side shuffled, mean of `SHUFFLES`; kappa: (matched - chance) / (1 - chance). rand: adjusted Rand index of the
    sets of experts as clusters of tokens, where two sets that share all but one expert count as different.
    """
    layers = []
    for one, other in zip(a, b, strict=True):
        matched = _matched(one, other)
        chance = np.mean([_matched(one, rng.permutation(other)) for _ in range(SHUFFLES)])
        layers.append(
            {
                "matched": matched,
                "chance": float(chance),
                "kappa": float(_beyond(np.array(matched), chance)),
                "rand": float(adjusted_rand_score(set_labels(one), set_labels(other))),
            }
        )
    return layers


def _matched(a: Bool[np.ndarray, "N E"], b: Bool[np.ndarray, "N E"]) -> float:
    both = a.T.astype(float) @ b
    return float(both[linear_sum_assignment(both, maximize=True)].sum() / max(a.sum(), b.sum()))


def _beyond(observed: np.ndarray, chance: Any) -> np.ndarray:
    """(o - c) / (1 - c); NaN where chance leaves no room."""
    room = np.asarray(1 - chance, dtype=float)
    return np.divide(observed - chance, room, out=np.full(room.shape, np.nan), where=room > 1e-12)
