"""Tests of ReLU routing: the gates, the load-weighted L1 loss, and the controller that adapts its weight."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.relu import ReLU
from moe.routing.decision import Context, Knobs, Routing
from moe.routing.dispatch import dispatch
from moe.routing.measurement import collect_stats
from moe.routing.stats import RoutingStats

T, D, E = 60, 16, 8


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def make(**settings: Any) -> ReLU:
    router = ReLU(D, E, **settings)
    nn.init.normal_(router.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    return router


def route(router: ReLU, x: Tensor) -> Routing:
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


def sums(routing: Routing) -> RoutingStats:
    return collect_stats(routing, dispatch(routing, E, capacity=None, seq_len=T), T)


def test_gates_are_the_positive_logits(x: Tensor) -> None:
    router = make()
    routing = route(router, x)
    logits = (x @ router.weight.T).tolist()
    expected = {(t, e): z for t, row in enumerate(logits) for e, z in enumerate(row) if z > 0}
    found = dict(
        zip(zip(routing.token.tolist(), routing.expert.tolist(), strict=True), routing.weight.tolist(), strict=True)
    )
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_sparsity_loss_is_the_l1_norm_weighted_by_load(x: Tensor) -> None:
    router = make(target=3.0)
    routing = route(router, x)
    load = torch.bincount(routing.expert, minlength=E).tolist()
    terms = zip(routing.expert.tolist(), routing.weight.tolist(), strict=True)
    expected = sum(load[e] * E / (3 * T) * gate for e, gate in terms) / T
    torch.testing.assert_close(routing.aux["sparsity"].item(), expected, rtol=1e-4, atol=0)


def test_the_sparsity_loss_is_the_plain_l1_norm_if_balanced_and_at_the_target() -> None:
    """With equal loads and the target number of experts per token, every factor f_e is 1.

    Token t has the experts t and t + 1 (mod E), so each token has two experts and each expert two tokens.
    """
    router = ReLU(E, E, target=2.0)
    router.weight.data = torch.eye(E) + torch.eye(E).roll(1, 0)
    routing = route(router, torch.eye(E).repeat(5, 1))
    torch.testing.assert_close(routing.aux["sparsity"], routing.weight.sum() / (5 * E))


def test_the_gradient_of_the_sparsity_loss_is_proportional_to_the_experts_load() -> None:
    router = ReLU(2, 2, target=1.0)
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])  # loads: expert 0 has 3, expert 1 has 1
    route(router, x).aux["sparsity"].backward()
    # f = 2/4 * load; d/dW_e = f_e * sum of its tokens / 4
    torch.testing.assert_close(router.weight.grad, torch.tensor([[1.5 * 3, -1.5 * 3], [-0.5, 0.5]]) / 4)


def test_tokens_without_a_positive_logit_have_no_expert() -> None:
    router = make()
    routing = route(router, torch.zeros(T, D))
    assert len(routing.token) == 0
    assert sums(routing).unrouted == T
    routing.aux["sparsity"].backward()
    assert torch.equal(router.weight.grad, torch.zeros(E, D))


@pytest.mark.parametrize(("active", "factor"), [(3.0, 1.5), (2.0, 1.0), (1.0, 1 / 1.5), (0.0, 1 / 1.5)])
def test_the_weight_rises_above_the_target_and_falls_below_it(x: Tensor, active: float, factor: float) -> None:
    router = make(target=2.0, coefficient=1e-3, rate=1.5)
    stats = sums(route(router, x))._replace(assignments=torch.tensor(active * T))
    for step in range(1, 4):
        router.after_step(stats)
        torch.testing.assert_close(router.loss_weights["sparsity"], 1e-3 * factor**step, rtol=1e-4, atol=0)


def test_the_weight_recovers_from_a_value_too_small_for_fp32(x: Tensor) -> None:
    """1,000 steps below the target lower the weight to 1e-87, and 1,000 steps above it raise it again.

    Fp32 cannot hold 1e-87, but it can hold its logarithm, which the router stores.
    """
    router = make(target=2.0)
    stats = sums(route(router, x))
    for active in (0, 4):
        for _ in range(1000):
            router.after_step(stats._replace(assignments=torch.tensor(float(active * T))))
    assert router.loss_weights["sparsity"] == pytest.approx(1e-8, rel=1e-2)


def test_the_weight_of_the_loss_is_saved_and_loaded() -> None:
    trained, loaded = make(), make()
    trained.log_coefficient.fill_(math.log(0.25))
    loaded.load_state_dict(trained.state_dict())
    assert loaded.loss_weights["sparsity"] == pytest.approx(0.25)


def test_the_controller_reaches_the_target_against_a_loss_that_favors_more_experts() -> None:
    """Tokens have more than four of eight experts at first, and about the target of two in the end.

    The other loss wants the gates of a token to sum to 4, which is easier with many experts. The inputs have a mean
    above zero. With mean zero, half of all logits would be positive for any W, because the router has no bias.
    """
    torch.manual_seed(0)
    router = make(target=2.0, coefficient=1e-4)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    active = []
    for _ in range(400):
        routing = route(router, torch.randn(T, D) + 1)
        total = torch.zeros(T).index_add(0, routing.token, routing.weight)
        optimizer.zero_grad()
        ((total - 4).square().mean() + router.loss_weights["sparsity"] * routing.aux["sparsity"]).backward()
        optimizer.step()
        router.after_step(sums(routing))
        active.append(len(routing.token) / T)
    assert active[0] > 4
    assert abs(sum(active[-100:]) / 100 - 2) < 0.3


def test_relu_has_no_fixed_k() -> None:
    assert make().fixed_k is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 9.0}, r"router\.target=9\.0: must be more than 0 and at most model\.num_experts=8"),
        ({"coefficient": 0.0}, r"router\.coefficient=0\.0: must be a finite number > 0"),
        ({"rate": 0.9}, r"router\.rate=0\.9: must be a finite number >= 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)
