"""Tests of the controller of top-p: its formula, its limits, and that it reaches its target."""

from typing import Any

import pytest
import torch
from torch import nn

from moe.checks import ConfigError
from moe.routers.dtop_p import DTopP
from moe.routing.decision import Context, Knobs
from moe.routing.stats import RoutingStats

D, E = 16, 8


def test_the_controller_follows_its_formula_and_its_integral_does_not_wind_up() -> None:
    router = DTopP(D, E, target=2.0, p=0.4, k_max=4, k_p=0.3, k_i=0.2)
    assert router.threshold == pytest.approx(0.4)
    total = 0.0
    for active in (3.0, 1.0, 2.5):
        router.after_step(step_with(active))
        error = (2.0 - active) / E
        total += error
        assert router.threshold.item() == pytest.approx(0.4 + 0.3 * error + 0.2 * total)
    for _ in range(100):
        router.after_step(step_with(0.0))
    assert router.threshold == pytest.approx(1, abs=1e-5)
    assert router.integral.item() == pytest.approx((1 - 0.4) / 0.2)


def step_with(active: float) -> RoutingStats:
    """Return the sums of a step in which 100 tokens took so many experts on average."""
    nothing = RoutingStats(*torch.zeros(len(RoutingStats._fields)).unbind())
    return nothing._replace(assignments=torch.tensor(100 * active), tokens=torch.tensor(100.0))


@pytest.mark.parametrize("target", [1.3, 2.0, 3.5])
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_the_controller_reaches_its_target_for_flat_and_for_sharp_probabilities(target: float, scale: float) -> None:
    router = DTopP(D, E, target=target, k_max=6)
    nn.init.normal_(router.weight, std=scale, generator=torch.Generator().manual_seed(0))
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(1))
    active = []
    for _ in range(200):
        active.append(len(router(x, Context(torch.zeros(1, 500, dtype=torch.long), Knobs.of())).token) / 500)
        router.after_step(step_with(active[-1]))
    assert sum(active[100:]) / 100 == pytest.approx(target, abs=0.05)


@pytest.mark.parametrize(
    "settings", [{"target": 0.5}, {"target": 4.0}, {"p": 1.0}, {"k_max": 1}, {"k_p": -1.0}, {"k_i": 0.0, "k_p": 0.0}]
)
def test_wrong_settings_of_the_controller_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        DTopP(D, E, **settings)
