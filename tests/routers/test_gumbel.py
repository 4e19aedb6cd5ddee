"""Tests of Gumbel top-k: the distribution of the drawn experts, the effect of temperature, and the gradient."""

import math

import pytest
import torch
from torch import Tensor, nn

from moe.routers import gumbel
from moe.routers.gumbel import Gumbel, gumbel_like
from moe.routers.topk import Temperature, TopK
from moe.routing.decision import Context, Knobs, Routing

T, D, E = 40, 16, 8


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def route(router: TopK, x: Tensor, *, temperature: float = 1.0) -> Routing:
    nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of(temperature=temperature)))


def test_gumbel_noise_has_the_mean_and_variance_of_its_distribution() -> None:
    torch.manual_seed(0)
    noise = gumbel_like(torch.empty(400_000, dtype=torch.double))
    assert abs(noise.mean().item() - 0.5772156649) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_with_k_1_each_expert_is_drawn_with_its_probability(x: Tensor, temperature: float) -> None:
    torch.manual_seed(0)
    routing = route(Gumbel(D, E, k=1), x[:1].repeat(40_000, 1), temperature=temperature)
    assert routing.probs is not None
    frequency = torch.bincount(routing.expert, minlength=E) / 40_000
    torch.testing.assert_close(frequency, routing.probs[0], atol=0.01, rtol=0)


def test_two_experts_are_drawn_without_replacement(x: Tensor) -> None:
    """Every ordered pair of experts is drawn with probability P(i, then j) = p_i p_j / (1 - p_i)."""
    torch.manual_seed(0)
    draws = 80_000
    routing = route(Gumbel(D, E, k=2), x[:1].repeat(draws, 1))
    assert routing.probs is not None
    p = routing.probs[0].tolist()
    first, second = routing.expert.view(draws, 2).unbind(-1)
    for i in range(E):
        for j in range(E):
            expected = 0 if i == j else p[i] * p[j] / (1 - p[i])
            assert abs(((first == i) & (second == j)).double().mean().item() - expected) < 0.01


@pytest.mark.parametrize("k", [1, 2, 5])
def test_evaluation_selects_the_largest_logits_and_renormalizes_their_gates(x: Tensor, k: int) -> None:
    drawn, ranked = (
        route(Gumbel(D, E, k=k).eval(), x, temperature=0.7),
        route(Temperature(D, E, k=k), x, temperature=0.7),
    )
    assert torch.equal(drawn.expert, ranked.expert)
    torch.testing.assert_close(drawn.weight, ranked.weight if k > 1 else torch.ones(T))


def test_a_higher_temperature_draws_experts_of_lower_logits_more_often(x: Tensor) -> None:
    """With a higher temperature, fewer of the drawn experts have the largest logits. In top-k, temperature has no
    effect on the selection.
    """
    torch.manual_seed(0)
    best = route(Gumbel(D, E, k=1).eval(), x.repeat(50, 1)).expert
    agreement = [
        (route(Gumbel(D, E, k=1), x.repeat(50, 1), temperature=t).expert == best).double().mean().item()
        for t in (0.01, 1.0, 5.0, 1000.0)
    ]
    assert agreement == sorted(agreement, reverse=True)
    assert agreement[0] > 0.95
    assert abs(agreement[-1] - 1 / E) < 0.05


@pytest.mark.parametrize("k", [1, 3])
def test_gates_sum_to_one_and_have_the_gradient_of_the_relaxed_gates(
    x: Tensor, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = gumbel_like(torch.empty(T, E))
    monkeypatch.setattr(gumbel, "gumbel_like", lambda logits: noise)
    router, temperature = Gumbel(D, E, k=k), 0.8
    coefficients = torch.randn(k * T)
    routing = route(router, x, temperature=temperature)
    (routing.weight * coefficients).sum().backward()
    torch.testing.assert_close(routing.weight.view(T, k).sum(-1), torch.ones(T))

    weight = router.weight.detach().requires_grad_()
    relaxed = torch.softmax(x @ weight.T / temperature + noise, -1).gather(-1, routing.expert.view(T, k))
    (relaxed.flatten() * coefficients).sum().backward()
    torch.testing.assert_close(router.weight.grad, weight.grad)


def test_its_temperature_can_follow_a_schedule() -> None:
    assert Gumbel.schedulable
    assert Gumbel(D, E, temp=2.5).temp == 2.5
