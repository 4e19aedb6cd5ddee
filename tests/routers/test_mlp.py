"""Tests of the router with a hidden layer: its logits, and what a linear router cannot do."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe.checks import ConfigError
from moe.routers.base import Router
from moe.routers.mlp import ACTIVATIONS, MLPRouter
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs

T, D, E, H = 20, 6, 4, 5
FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2,
    "relu": lambda a: max(a, 0.0),
    "silu": lambda a: a / (1 + math.exp(-a)),
    "tanh": math.tanh,
}


def make(**settings: Any) -> MLPRouter:
    router = MLPRouter(D, E, **{"hidden": H, **settings})
    for p in router.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(len(p)))
    return router


def context(tokens: int) -> Context:
    return Context(torch.zeros(1, tokens, dtype=torch.long), Knobs.of())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_logits_are_those_of_a_network_of_two_layers(activation: Any) -> None:
    router, x = make(activation=activation), torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    first, second, formula = router.first.tolist(), router.second.weight.tolist(), FORMULAS[activation]
    logits = router(x, context(T)).logits
    assert logits is not None
    for t, row in enumerate(x.tolist()):
        inner = [formula(sum(w * value for w, value in zip(weights, row, strict=True))) for weights in first]
        expected = [sum(w * value for w, value in zip(weights, inner, strict=True)) for weights in second]
        assert logits[t].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def learns_xor(router: Router) -> bool:
    """Return whether a router learns by cross-entropy which of two experts each corner of a square has: XOR."""
    corners, expert = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]), torch.tensor([0, 1, 1, 0])
    for p in router.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(len(p)))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        logits = router(corners, context(4)).logits
        torch.nn.functional.cross_entropy(logits, expert).backward()
        optimizer.step()
    return torch.equal(router(corners, context(4)).expert, expert)


def test_it_separates_tokens_that_no_linear_router_separates() -> None:
    assert learns_xor(MLPRouter(2, 2, k=1, hidden=8))
    assert not learns_xor(TopK(2, 2, k=1))


def test_the_optimizers_treat_both_layers_as_they_treat_the_matrix_of_top_k() -> None:
    router = make()
    roles = {name: router.role(name, p) for name, p in router.named_parameters()}
    assert roles == {"first": "matrix", "second.weight": "matrix"}
    assert sum(p.numel() for p in router.parameters()) == H * (D + E)


def test_a_hidden_layer_without_a_unit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^router.hidden=0: must be at least 1$"):
        MLPRouter(D, E, hidden=0)
