"""Tests of phi-balancing: the price as a gradient, the loss and the average against loops, and balance in training."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.phi_balancing import PhiBalancing
from moe.routing.decision import Context, Knobs, Routing
from moe.routing.dispatch import dispatch
from moe.routing.measurement import collect_stats
from moe.routing.stats import RoutingStats

D, E, T = 16, 8, 40
POTENTIALS = {
    "entropy": lambda m: (m * m.log()).sum(),
    "euclidean": lambda m: m.square().sum() / 2,
}


def make(**settings: Any) -> PhiBalancing:
    router = PhiBalancing(D, E, **settings)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def route(router: PhiBalancing, x: Tensor) -> Routing:
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


def stats_of(routing: Routing, tokens: int) -> RoutingStats:
    return collect_stats(routing, dispatch(routing, E, capacity=None, seq_len=tokens), tokens)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_price_is_the_gradient_of_the_potential_minus_that_at_balance(potential: Any) -> None:
    m, balanced = torch.softmax(torch.randn(E), -1), torch.full((E,), 1 / E)
    gradient, at_balance = (torch.func.grad(POTENTIALS[potential])(each) for each in (m, balanced))
    torch.testing.assert_close(make(potential=potential).price(m), gradient - at_balance, atol=1e-5, rtol=1e-5)


def test_the_loss_and_the_average_are_those_of_a_loop_over_numbers() -> None:
    """Three steps, each of two micro-batches of different lengths. Each sees the average of the steps before it."""
    router, average = make(decay=0.7), [1 / E] * E
    for step in range(3):
        parts = [torch.randn(T, D, generator=torch.Generator().manual_seed(step)), torch.randn(T // 4, D)]
        rows, sums = [], []
        for x in parts:
            p = torch.softmax(x @ router.weight.T, -1).tolist()
            mean = [sum(column) / len(p) for column in zip(*p, strict=True)]
            moved = [0.7 * m + 0.3 * each for m, each in zip(average, mean, strict=True)]
            routing = route(router, x)
            loss = sum(each * math.log(E * m) for each, m in zip(mean, moved, strict=True))
            assert routing.aux["phi_balance"].item() == pytest.approx(loss, rel=1e-4, abs=1e-6)
            rows += p
            sums.append(stats_of(routing, len(x)))
        router.after_step(sums[0].merge(sums[1]))
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        average = [0.7 * m + 0.3 * each for m, each in zip(average, mean, strict=True)]
        assert router.average.tolist() == pytest.approx(average, rel=1e-4)


def test_the_gradient_on_a_probability_is_the_price_of_its_expert() -> None:
    router, x = make(), torch.randn(T, D)
    router.average.copy_(torch.softmax(torch.randn(E), -1))
    routing = route(router, x)
    assert routing.probs is not None
    [gradient] = torch.autograd.grad(routing.aux["phi_balance"], routing.probs)
    price = router.price(router.moved(routing.probs.mean(0)))
    torch.testing.assert_close(gradient, price.detach().expand(T, E) / T)


def test_without_memory_the_loss_is_the_divergence_from_balance() -> None:
    """With decay=0 the average is P itself, and the loss is KL(P, uniform) = ln E - H(P). It is 0 at balance."""
    router, x = make(decay=0.0), torch.randn(T, D)
    probs = route(router, x).probs
    assert probs is not None
    mean = probs.mean(0)
    divergence = math.log(E) + (mean * mean.log()).sum()
    torch.testing.assert_close(route(router, x).aux["phi_balance"], divergence)
    nn.init.zeros_(router.weight)
    assert route(router, x).aux["phi_balance"].abs() < 1e-6


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_loss_alone_balances_a_skewed_router(potential: Any) -> None:
    router = make(potential=potential, decay=0.9)
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(2)) + router.weight[0].detach()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)

    def imbalance() -> float:
        load = torch.bincount(route(router, x).expert, minlength=E).float()
        return (load.std(correction=0) / load.mean()).item()

    before = imbalance()
    for _ in range(60):
        optimizer.zero_grad()
        routing = route(router, x)
        routing.aux["phi_balance"].backward()
        optimizer.step()
        router.after_step(stats_of(routing, len(x)))
    assert imbalance() < before / 2


@pytest.mark.parametrize("wrong", [{"balance": -1.0}, {"decay": 1.0}, {"k": 9}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    [key] = wrong
    with pytest.raises(ConfigError, match=f"^router.{key}="):
        PhiBalancing(D, E, **wrong)
