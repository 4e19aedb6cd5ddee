"""Measure how stable routing is: during a run, and between seeds, whose experts must be matched first."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from moe.metrics.agreement import Choices, beyond_chance, overlap
from moe.runs.traces import Trace
from moe.specialization.information import expert_set_labels

SHUFFLES = 20


class OwnTrace(NamedTuple):
    """A trace in which each layer has the columns of its own experts alone."""

    step: int
    chosen: Choices


def cut(trace: Trace, experts: list[int]) -> OwnTrace:
    """Return the trace without the columns that stand for no expert, in layers with fewer `experts` than others."""
    return OwnTrace(trace.step, [chosen[:, :number] for chosen, number in zip(trace.chosen, experts, strict=True)])


def saturation(traces: Sequence[Trace | OwnTrace]) -> list[dict[str, Any]]:
    """Return the `overlap` of every trace with the last one (OLMoE 2409.02060)."""
    return [{"step": trace.step} | overlap(trace.chosen, traces[-1].chosen) for trace in traces]


def churn(traces: Sequence[Trace | OwnTrace]) -> list[dict[str, Any]]:
    """Return 1 - `overlap` of every two traces in a row: the share of choices that changed after the step `since`."""
    return [
        {"since": before.step, "step": after.step}
        | {name: 1 - value for name, value in overlap(before.chosen, after.chosen).items()}
        for before, after in itertools.pairwise(traces)
    ]


def seed_agreement(a: Choices, b: Choices, *, rng: np.random.Generator) -> list[dict[str, float]]:
    """Return, for each layer, how similarly two models route the same tokens.

    matched: overlap / k after the experts of one model are renumbered so that it is as large as possible (Hungarian
        algorithm).
    chance: the same with the tokens of one model shuffled, mean of `SHUFFLES` shuffles.
    kappa: (matched - chance) / (1 - chance).
    rand: adjusted Rand index of the sets of experts as clusters of tokens. Two sets that differ in one expert count as
        different clusters.
    """
    layers = []
    for chosen_a, chosen_b in zip(a, b, strict=True):
        matched = _matched(chosen_a, chosen_b)
        chance = np.mean([_matched(chosen_a, rng.permutation(chosen_b)) for _ in range(SHUFFLES)])
        layers.append(
            {
                "matched": matched,
                "chance": float(chance),
                "kappa": float(beyond_chance(np.array(matched), chance)),
                "rand": float(adjusted_rand_score(expert_set_labels(chosen_a), expert_set_labels(chosen_b))),
            }
        )
    return layers


def _matched(a: Bool[np.ndarray, "N E"], b: Bool[np.ndarray, "N E"]) -> float:
    """Return the overlap / k under the best one-to-one match of experts."""
    both = a.T.astype(float) @ b
    return float(both[linear_sum_assignment(both, maximize=True)].sum() / max(a.sum(), b.sum()))
