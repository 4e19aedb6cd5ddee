"""Tests of cosine routing: only the directions of vectors matter, and the learned temperature tau is the only scale."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.cosine import MIN_TAU, CosineRouter
from moe.routing.decision import Context, Knobs, Routing

T, D, E = 40, 16, 8


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def make(**settings: Any) -> CosineRouter:
    router = CosineRouter(D, E, **{"proj_dim": 6, **settings})
    generator = torch.Generator().manual_seed(2)
    nn.init.normal_(router.projection, generator=generator)
    nn.init.normal_(router.embedding, generator=generator)
    return router


def route(router: CosineRouter, x: Tensor) -> Routing:
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


def test_logits_are_cosines_divided_by_tau(x: Tensor) -> None:
    router = make(tau=0.4)
    logits = route(router, x).logits
    assert logits is not None
    for t in range(T):
        for e in range(E):
            cosine = torch.cosine_similarity(router.projection @ x[t], router.embedding[e], dim=0)
            torch.testing.assert_close(logits[t, e], cosine / 0.4)
    assert logits.abs().max() <= 1 / 0.4


def test_the_norms_of_tokens_and_embeddings_change_nothing(x: Tensor) -> None:
    router = make()
    plain = route(router, x)
    with torch.no_grad():
        router.embedding *= torch.linspace(0.1, 10, E)[:, None]
        router.projection *= 7
    torch.testing.assert_close(route(router, 100 * x)[:5], plain[:5])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_k_largest_logits_are_selected_and_gates_are_their_softmax(x: Tensor, k: int) -> None:
    routing = route(make(k=k), x)
    assert routing.logits is not None
    best = routing.logits.topk(k)
    assert torch.equal(routing.expert.view(T, k), best.indices)
    probs = torch.softmax(routing.logits if k == 1 else best.values, -1)
    torch.testing.assert_close(routing.weight.view(T, k), probs.topk(k).values)


def test_tau_is_trainable_and_never_below_its_minimum(x: Tensor) -> None:
    router = make(tau=0.05)
    route(router, x).weight.square().sum().backward()
    assert router.log_tau.grad is not None
    assert router.log_tau.grad.abs().item() > 0
    nn.init.constant_(router.log_tau, math.log(MIN_TAU) - 5)
    logits = route(router, x).logits
    assert logits is not None
    assert 0.5 / MIN_TAU < logits.abs().max() <= 1 / MIN_TAU * (1 + 1e-5)


def test_a_higher_tau_lowers_the_largest_probability(x: Tensor) -> None:
    confidence = [route(make(tau=tau), x).probs.amax(-1).mean() for tau in (0.05, 0.3, 2.0)]
    assert confidence == sorted(confidence, reverse=True)


def test_initialization_does_not_change_tau() -> None:
    router = make(tau=0.2)
    router.initialize(0.02)
    torch.testing.assert_close(router.log_tau.exp().item(), 0.2)
    torch.testing.assert_close(router.projection.std().item(), 0.02, rtol=0.3, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proj_dim": 17}, r"router\.proj_dim=17: must be between 1 and model\.dim=16"),
        ({"tau": 0.001}, r"router\.tau=0\.001: must be a finite number >= 0\.01"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)
