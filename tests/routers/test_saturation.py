"""Tests of large logits: every router chooses what exact arithmetic chooses, although fp32 rounds its scores to ties.

The references evaluate the definition of each router with so many digits that 1 + exp(-10^4) is not 1.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from moe.config.classes import build
from moe.config.options import options, router_spec
from moe.routing.decision import Context, Knobs, Routing

T, E = 8, 8
ROUTERS = {name: router_spec(name) for name in options("router")}
BIAS = [0.0, 0.0, 0.0, 1e-3, 1e-3, -1e-3, -1e-3, 0.0]
Rows = list[list[Any]]  # a row of numbers of any size and precision for each token
Pairs = set[tuple[int, int]]  # (token, expert)

exp = cache(mpmath.exp)


def best(row: list[Any], k: int) -> list[int]:
    """Return the indices of the k largest numbers."""
    return sorted(range(len(row)), key=lambda index: row[index], reverse=True)[:k]


def softmax(rows: Rows) -> Rows:
    sums = [sum(exp(z) for z in row) for row in rows]
    return [[exp(z) / total for z in row] for row, total in zip(rows, sums, strict=True)]


def sigmoid(rows: Rows) -> Rows:
    return [[exp(z) / (1 + exp(z)) for z in row] for row in rows]


def top(rows: Rows, k: int) -> Pairs:
    return {(t, e) for t, row in enumerate(rows) for e in best(row, k)}


def top_of_biased(scores: Rows) -> Pairs:
    return top([[s + mpmath.mpf(b) for s, b in zip(row, BIAS, strict=True)] for row in scores], 2)


def top_of_biased_sigmoid(z: Rows) -> Pairs:
    return top_of_biased(sigmoid(z))


def top_of_biased_sqrt_softplus(z: Rows) -> Pairs:
    return top_of_biased([[mpmath.sqrt(mpmath.log(1 + exp(each))) for each in row] for row in z])


def top_in_groups(z: Rows) -> Pairs:
    """Take the two best experts in those 2 of 4 groups whose two experts have the largest probabilities together."""
    pairs = set()
    for t, row in enumerate(softmax(z)):
        groups = best([row[2 * g] + row[2 * g + 1] for g in range(4)], 2)
        pairs |= {(t, e) for e in best([p if e // 2 in groups else -1 for e, p in enumerate(row)], 2)}
    return pairs


def fewest_that_reach(z: Rows, *, p: float, k_max: int) -> Pairs:
    pairs = set()
    for t, row in enumerate(softmax(z)):
        total = mpmath.mpf(0)
        for e in best(row, k_max):
            if total >= p:
                break
            pairs.add((t, e))
            total += row[e]
    return pairs


def best_tokens_of_each_expert(scores: Rows) -> Pairs:
    columns = zip(*scores, strict=True)
    return {(t, e) for e, column in enumerate(columns) for t in best(list(column), 2 * T // E)}


def plan(z: Rows, *, iterations: int) -> Rows:
    """Return Sinkhorn's plan: rows are scaled to sum 1 / T, then columns to sum 1 / E."""
    entries = [[exp(each) for each in row] for row in z]
    for _ in range(iterations):
        entries = [[p / total / T for p in row] for row, total in zip(entries, map(sum, entries), strict=True)]
        sums = [sum(column) for column in zip(*entries, strict=True)]
        entries = [[p / total / E for p, total in zip(row, sums, strict=True)] for row in entries]
    return entries


CASES: dict[str, tuple[dict[str, Any], Callable[[Rows], Pairs]]] = {
    "topk": ({}, lambda z: top(z, 2)),
    "switch": ({}, lambda z: top(z, 1)),
    "switch_jitter": ({}, lambda z: top(z, 1)),
    "softk": ({}, lambda z: top(z, 2)),
    "temperature": ({}, lambda z: top(z, 2)),
    "gumbel": ({}, lambda z: top(z, 2)),
    "noisy_topk": ({}, lambda z: top(z, 2)),
    "random": ({}, lambda z: top(z, 2)),
    "frozen": ({}, lambda z: top(z, 2)),
    "chain_of_experts": ({}, lambda z: top(z, 1)),
    "relu": ({}, lambda z: {(t, e) for t, row in enumerate(z) for e in range(E) if row[e] > 0}),
    "null_experts": ({}, lambda z: {(t, e) for t, e in top([[*row, *8 * [0]] for row in z], 4) if e < E}),
    "moe_plus_plus": ({}, lambda z: {(t, e) for t, e in top([[*row, *4 * [0]] for row in z], 2) if e < E}),
    "sigmoid_bias": ({}, top_of_biased_sigmoid),
    "quantile_balancing": ({}, top_of_biased_sigmoid),
    "smebu": ({}, top_of_biased_sigmoid),
    "sqrt_softplus_bias": ({}, top_of_biased_sqrt_softplus),
    "group_limited": ({}, top_in_groups),
    "top_p": ({}, lambda z: fewest_that_reach(z, p=0.4, k_max=4)),
    "dtop_p": ({}, lambda z: fewest_that_reach(z, p=0.4, k_max=4)),
    "top_p, p=1": ({"p": 1.0}, lambda z: fewest_that_reach(z, p=1.0, k_max=4)),
    "expert_choice": ({}, lambda z: best_tokens_of_each_expert(softmax(z))),
    "expert_threshold": ({}, lambda z: best_tokens_of_each_expert(sigmoid(z))),
    "sinkhorn": ({}, lambda z: top(z, 2)),
    "default_moe": ({}, lambda z: top(z, 2)),
    "dense_mixer": ({}, lambda z: top(z, 2)),
    "phi_balancing": ({}, lambda z: top(z, 2)),
    "matryoshka": ({}, lambda z: top(z, 2)),
    "base_layers": ({}, lambda z: top(z, 1)),
    "sinkhorn, inference": ({"inference": True, "iterations": 3}, lambda z: top(plan(z, iterations=3), 2)),
}


def logits(scale: float) -> Tensor:
    """Return different logits of both signs up to `scale`."""
    z = scale * (2 * torch.rand(T, E, generator=torch.Generator().manual_seed(0)) - 1)
    z[2] = z[2].abs()
    return z


def route(name: str, settings: dict[str, Any], z: Tensor) -> Routing:
    """Return the decision of a router in evaluation whose logits are z. Unused logits, as of null experts, are 0."""
    router = build(ROUTERS[name] | settings, "router", E, E).eval().chain[0]
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            if tensor.ndim == 2:
                tensor.copy_(torch.eye(*tensor.shape))
        if hasattr(router, "bias"):
            router.bias.copy_(torch.tensor(BIAS))
        context = Context(torch.zeros(1, T, dtype=torch.long), Knobs.of())
        if name == "expert_threshold":
            feedback = router(z, context).feedback
            assert feedback is not None
            router.threshold.copy_(feedback / T)
        return router(z, context)


def test_every_router_that_chooses_by_logits_has_a_reference() -> None:
    """Hash has no logits, Soft MoE chooses nothing, and top2, mlp and oracle are topk. Cosines are bounded.

    Another test is about SPECTRA. Document pools sum probabilities of fp64 over tokens, in which those of experts far
    below the best one are ties.
    """
    without = {"hash", "soft_moe", "cosine", "mlp", "top2", "topk_hard", "spectra"}
    without |= {"document_pool", "document_pool_causal", "running_means", "latent_prototypes"}
    without |= {"balanced_random", "oracle", "shuffled_oracle", "replay"}  # the first and the last have no logits
    assert {name.split(",")[0] for name in CASES} == set(ROUTERS) - without


@pytest.mark.parametrize("scale", [20.0, 100.0, 1e4])
@pytest.mark.parametrize("case", CASES)
def test_choices_are_those_of_exact_arithmetic(case: str, scale: float) -> None:
    settings, reference = CASES[case]
    z = logits(scale)
    if case == "group_limited":
        z[1, [0, 2, 4]] = scale  # the second best experts of these groups decide
    routing = route(case.split(",")[0], settings, z)
    chosen = set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    with mpmath.workprec(100 + int(3 * scale)):
        assert chosen == reference([[mpmath.mpf(each) for each in row] for row in z.tolist()])


@pytest.mark.parametrize(("training", "epsilon"), [(False, 1e-4), (True, 0.003)])
def test_choices_of_spectra_are_those_of_exact_arithmetic_given_its_logits(training: bool, epsilon: float) -> None:
    """In training the plan and a quota of three tokens for each expert decide: the largest entries are served first."""
    settings = {"sinkhorn_epsilon": epsilon, "ema_bias_weight": 0.0, "expert_choice_capacity_factor": 1.5}
    torch.manual_seed(0)
    router = build(ROUTERS["spectra"] | settings, "router", E, E).train(training)
    router.initialize(0.5)
    with torch.no_grad():
        routing = router(torch.randn(T, E), Context(torch.zeros(1, T, dtype=torch.long), Knobs.of()))
    assert routing.logits is not None
    assert routing.logits.abs().max() > 100
    with mpmath.workprec(5000):
        rows = [[mpmath.mpf(each) for each in row] for row in routing.logits.tolist()]
        if training:
            rows = softmax([[mpmath.log(p) for p in row] for row in plan(rows, iterations=3)])
        pairs = sorted(((t, e) for t in range(T) for e in range(E)), key=lambda pair: rows[pair[0]][pair[1]])
        expected: Pairs = set()
        for t, e in reversed(pairs):
            full = training and sum(other == e for _, other in expected) == 3
            if not full and sum(other == t for other, _ in expected) < 2:
                expected.add((t, e))
    assert set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True)) == expected
