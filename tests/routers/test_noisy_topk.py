"""Tests of noisy top-k: the learned noise and the two balance losses, importance and load."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.noisy_topk import FLOOR, NoisyTopK
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs, Routing
from moe.routing.expected_load import bar, cv_squared, expected_load_cv, stay_probability

T, D, E = 40, 16, 8


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def make(num_experts: int = E, **settings: Any) -> NoisyTopK:
    router = NoisyTopK(D, num_experts, **settings)
    generator = torch.Generator().manual_seed(2)
    for p in router.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return router


def route(router: TopK, x: Tensor, *, noise: float = 0.0) -> Routing:
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of(noise=noise)))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_evaluation_equals_top_k(x: Tensor, k: int) -> None:
    noisy, plain = make(k=k).eval(), TopK(D, E, k=k)
    plain.weight = noisy.weight
    torch.testing.assert_close(route(noisy, x)[:5], route(plain, x)[:5])


@pytest.mark.parametrize("knob", [0.0, 2.0])
def test_the_standard_deviation_combines_learned_noise_and_the_noise_knob(knob: float) -> None:
    router = make(k=2)
    nn.init.zeros_(router.weight)
    nn.init.zeros_(router.noise_weight)
    probs = route(router, torch.ones(20_000, D), noise=knob).probs
    assert probs is not None
    centered = probs.log() - probs.log().mean(-1, keepdim=True)
    expected = math.hypot(math.log(2) + FLOOR, knob) * (1 - 1 / E) ** 0.5
    torch.testing.assert_close(centered.std().item(), expected, rtol=0.02, atol=0)


def test_gates_are_the_softmax_of_the_selected_noisy_logits(x: Tensor) -> None:
    routing = route(make(k=3), x)
    assert routing.probs is not None
    selected = routing.probs.log().gather(-1, routing.expert.view(T, 3))  # the noisy logits up to a constant per token
    torch.testing.assert_close(routing.weight.view(T, 3), torch.softmax(selected, -1))
    assert (routing.expert.view(T, 3) == routing.probs.topk(3).indices).all()


@pytest.mark.parametrize("k", [1, 2, 7])
def test_stay_probability_is_how_often_an_expert_is_selected_again_with_new_noise(k: int) -> None:
    generator, draws = torch.Generator().manual_seed(4), 40_000
    clean, noisy = torch.randn(2, E, generator=generator)
    spread = torch.rand(E, generator=generator) + 0.2
    expected = []
    for e in range(E):
        redrawn = noisy.repeat(draws, 1)
        redrawn[:, e] = clean[e] + spread[e] * torch.randn(draws, generator=generator)
        expected.append((redrawn.topk(k).indices == e).any(-1).double().mean().item())
    found = stay_probability(clean[None], bar(noisy[None], k), spread[None])[0].double()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double), atol=0.01, rtol=0)


def test_the_load_loss_uses_the_learned_noise_and_the_noise_knob(x: Tensor) -> None:
    """With much noise from the knob, all experts are selected equally often, so the load loss falls to nearly 0."""
    quiet, loud = (route(make(k=2), x.repeat(50, 1), noise=noise).aux["load"] for noise in (0.0, 100.0))
    assert loud < 0.05 * quiet


def test_the_losses_are_squared_coefficients_of_variation() -> None:
    assert cv_squared(torch.full((5,), 3.0)) == 0
    # one of E = 4 experts has the whole load: E - 1
    torch.testing.assert_close(cv_squared(torch.tensor([0.0, 0, 0, 4])), torch.tensor(3.0))


def test_the_importance_loss_is_computed_from_the_sums_of_gates(x: Tensor) -> None:
    routing = route(make(k=2), x)
    sums = [routing.weight[routing.expert == e].sum().item() for e in range(E)]
    mean = sum(sums) / E
    expected = sum((s - mean) ** 2 for s in sums) / E / mean**2
    torch.testing.assert_close(routing.aux["importance"].item(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (3, 3)])
def test_if_every_expert_is_selected_the_load_loss_is_zero_and_importance_is_finite(
    x: Tensor, num_experts: int, k: int
) -> None:
    routing = route(make(num_experts, k=k), x)
    assert routing.aux["load"] == 0
    assert routing.aux["importance"].isfinite()
    assert num_experts > 1 or routing.aux["importance"] == 0


def test_gradient_descent_on_the_load_loss_balances_the_load() -> None:
    torch.manual_seed(0)
    router = make(k=2)
    x = torch.randn(500, D) + 1.5
    before = cv_squared(torch.bincount(route(router.eval(), x).expert, minlength=E).float())
    optimizer = torch.optim.Adam([router.weight], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        route(router.train(), x).aux["load"].backward()
        optimizer.step()
    after = cv_squared(torch.bincount(route(router.eval(), x).expert, minlength=E).float())
    assert after < before / 4


def test_loss_weights_are_settings_and_must_not_be_negative() -> None:
    assert make(importance=0.2, load=0.3).loss_weights == {"importance": 0.2, "load": 0.3}
    with pytest.raises(ConfigError, match=r"router\.load=-1\.0: must be a finite number >= 0"):
        make(load=-1.0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_expected_load_of_top_k_is_that_of_learned_noise_of_one_size(x: Tensor, k: int) -> None:
    """With softplus(W_noise x) = softplus(0) everywhere, both routers have the same noise, and so the same loss."""
    learned, plain = make(k=k), TopK(D, E, k=k)
    nn.init.zeros_(learned.noise_weight)
    plain.weight = learned.weight
    noise = math.log(2) + FLOOR
    context = Context(torch.zeros(1, T, dtype=torch.long), Knobs.of(noise=noise), costly=frozenset(("load",)))
    torch.manual_seed(3)
    found = plain(x, context).aux["expected_load_cv"]
    torch.manual_seed(3)
    expected = learned(x, context._replace(knobs=Knobs.of())).aux["load"]
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, learned.weight)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert not plain(x, context._replace(costly=frozenset())).aux
    assert not plain.eval()(x, context).aux


@pytest.mark.parametrize("k", [1, 3])
def test_the_expected_load_is_that_of_a_slow_reference(k: int) -> None:
    """Sums over tokens and experts of P(own noise > the k-th largest of the others), closed experts being left out."""
    generator = torch.Generator().manual_seed(4)
    clean, noise = torch.randn(20, E, generator=generator), 0.7
    clean[:5, 2] = -torch.inf
    noisy = clean + noise * torch.randn(20, E, generator=generator)
    load = [0.0] * E
    for t in range(20):
        for e in range(E):
            others = sorted((noisy[t, j].item() for j in range(E) if j != e), reverse=True)
            z = (clean[t, e].item() - others[k - 1]) / noise
            load[e] += 0.0 if z == -math.inf else (1 + math.erf(z / math.sqrt(2))) / 2
    mean = sum(load) / E
    expected = sum((each - mean) ** 2 for each in load) / E / mean**2
    assert expected_load_cv(clean, bar(noisy, k), torch.tensor(noise)).item() == pytest.approx(expected, rel=1e-4)
