"""How settled routing is: along a run, and from seed to seed, whatever the experts are called."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from moe.metrics.agreement import beyond_chance, overlap
from moe.runs.traces import Trace
from moe.specialization.information import set_labels

SHUFFLES = 20


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

    matched: overlap / k under the renaming of experts that maximizes it (Hungarian); chance: the same with the tokens
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
                "kappa": float(beyond_chance(np.array(matched), chance)),
                "rand": float(adjusted_rand_score(set_labels(one), set_labels(other))),
            }
        )
    return layers


def _matched(a: Bool[np.ndarray, "N E"], b: Bool[np.ndarray, "N E"]) -> float:
    both = a.T.astype(float) @ b
    return float(both[linear_sum_assignment(both, maximize=True)].sum() / max(a.sum(), b.sum()))
