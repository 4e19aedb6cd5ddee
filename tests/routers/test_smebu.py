"""Tests of SMEBU: its updates against a loop over Python numbers, a closed form, and the limits of its constants."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.checks import ConfigError
from moe.routers.sigmoid_bias import SigmoidBias
from moe.routers.smebu import Smebu
from moe.routing.decision import Context, Knobs
from moe.routing.dispatch import dispatch
from moe.routing.measurement import collect_stats
from moe.routing.stats import RoutingStats

D, E, T = 16, 8, 50
LOADS = ([0, 4, 6, 6, 12, 12, 12, 12], [8] * 8, [64, 0, 0, 0, 0, 0, 0, 0], [3, 5, 8, 8, 8, 8, 11, 13])


@pytest.fixture(scope="module")
def sums() -> RoutingStats:
    router = SigmoidBias(D, E, k=2)
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(T, D), Context(torch.zeros(1, T, dtype=torch.long), Knobs.of()))
    return collect_stats(routing, dispatch(routing, E, capacity=None, seq_len=T), T)


def biases(router: SigmoidBias | Smebu, sums: RoutingStats, loads: Any) -> Tensor:
    for load in loads:
        router.after_step(sums._replace(offered=torch.tensor(load, dtype=torch.float32)))
    return router.bias


@pytest.mark.parametrize(("kappa", "momentum"), [(2.0, 0.5), (0.3, 0.9), (1.0, 0.0)])
def test_updates_are_those_of_a_loop_over_numbers(sums: RoutingStats, kappa: float, momentum: float) -> None:
    bias, velocity = [0.0] * E, [0.0] * E
    for load in LOADS:
        mean = sum(load) / E
        step = [0.01 * math.tanh(kappa * (mean - each) / mean) for each in load]
        centered = [each - sum(step) / E for each in step]
        velocity = [momentum * m + (1 - momentum) * d for m, d in zip(velocity, centered, strict=True)]
        bias = [b + m for b, m in zip(bias, velocity, strict=True)]
    router = Smebu(D, E, rate=0.01, kappa=kappa, momentum=momentum)
    torch.testing.assert_close(biases(router, sums, LOADS), torch.tensor(bias))
    assert router.bias.sum().abs() < 1e-7  # centered steps keep the biases centered


def test_under_a_constant_load_the_bias_lags_a_straight_line_by_the_sum_of_a_geometric_series(
    sums: RoutingStats,
) -> None:
    """With equal steps d, m after n steps is (1 - beta^n) d, and b is d (n - beta (1 - beta^n) / (1 - beta))."""
    n, beta, load = 7, 0.6, LOADS[0]
    once = biases(Smebu(D, E, rate=0.01, momentum=0.0), sums, [load]).clone()
    expected = once * (n - beta * (1 - beta**n) / (1 - beta))
    torch.testing.assert_close(biases(Smebu(D, E, rate=0.01, momentum=beta), sums, n * [load]), expected)


def test_the_limits_of_kappa_are_the_two_updates_of_sigmoid_bias(sums: RoutingStats) -> None:
    """A large kappa gives the sign of the error. A small one gives the error itself, times rate * kappa."""
    large = biases(Smebu(D, E, rate=0.01, kappa=1e6, momentum=0.0), sums, LOADS)
    torch.testing.assert_close(large, biases(SigmoidBias(D, E, rate=0.01), sums, LOADS))
    small = biases(Smebu(D, E, rate=10.0, kappa=1e-3, momentum=0.0), sums, LOADS)
    torch.testing.assert_close(
        small, biases(SigmoidBias(D, E, rate=0.01, update="proportional"), sums, LOADS), rtol=1e-3, atol=1e-6
    )


def test_the_bias_comes_to_rest_where_that_of_sigmoid_bias_swings(sums: RoutingStats) -> None:
    """A load that answers the bias of two experts: the sign never settles, and the clamped step does."""

    def after(router: SigmoidBias | Smebu) -> list[float]:
        errors = []
        for _ in range(200):
            load = torch.full((E,), 8.0)
            load[0] += 3 + 40 * router.bias[0].item()
            load[1] -= 3 + 40 * router.bias[0].item()
            errors.append(abs(load[0].item() - 8))
            router.after_step(sums._replace(offered=load))
        return errors[-20:]

    assert max(after(Smebu(D, E, rate=0.02))) < 0.01
    assert max(after(SigmoidBias(D, E, rate=0.02))) > 0.2


@pytest.mark.parametrize("wrong", [{"rate": -1.0}, {"kappa": 0.0}, {"momentum": 1.0}, {"groups": 3}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    [key] = wrong
    with pytest.raises(ConfigError, match=f"^router.{key}="):
        Smebu(D, E, **wrong)
