"""Tests of Sinkhorn routing: the transport plan, the gates, and evaluation.

The plan is compared with its definition, with slow reference code, and with the exact balanced assignment.
"""

import math
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.sinkhorn import Sinkhorn, log_plan, plain_plan
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs, Routing

T, D, E = 40, 16, 8


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def route(router: Sinkhorn | TopK, x: Tensor, *, training: bool = True) -> Routing:
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    return router.train(training)(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


def load_cv(expert: Tensor) -> float:
    load = torch.bincount(expert, minlength=E).float()
    return (load.std(correction=0) / load.mean()).item()


def test_all_tokens_have_equal_mass_and_all_experts_too(scores: Tensor) -> None:
    torch.testing.assert_close(log_plan(scores, 1).exp().sum(0), torch.full((E,), 1 / E))
    plan = log_plan(scores, 100).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((E,), 1 / E))
    torch.testing.assert_close(plan.sum(1), torch.full((T,), 1 / T))


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_the_plan_in_logarithms_equals_the_plan_without(scores: Tensor, iterations: int) -> None:
    """The plan from logarithms equals the plan from exp(scores), whose rows and then columns are scaled in turn."""
    plan = scores.double().exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True) / T
        plan = plan / plan.sum(0, keepdim=True) / E
    torch.testing.assert_close(log_plan(scores.double(), iterations).exp(), plan)


def test_the_plan_is_finite_for_scores_whose_exponential_overflows(scores: Tensor) -> None:
    assert log_plan(1e4 * scores, 50).isfinite().all()


def test_plain_plan_equals_log_plan_unless_numbers_are_too_small_for_it(scores: Tensor) -> None:
    torch.testing.assert_close(plain_plan(scores, 20), log_plan(scores, 20), atol=1e-4, rtol=0)
    too_small = 200 * scores
    assert plain_plan(too_small, 20).isfinite().all()
    assert not torch.allclose(plain_plan(too_small, 20), log_plan(too_small, 20), atol=1.0)


def test_higher_scores_get_more_mass(scores: Tensor) -> None:
    raised = scores.clone()
    raised[5, 3] += 1.0
    assert log_plan(raised, 100)[5, 3] > log_plan(scores, 100)[5, 3]


def test_adding_a_constant_per_token_or_per_expert_does_not_change_the_plan(scores: Tensor) -> None:
    shifted = scores + torch.randn(T, 1) + torch.randn(E)
    torch.testing.assert_close(log_plan(shifted, 200), log_plan(scores, 200), atol=1e-4, rtol=1e-4)


def test_with_a_small_epsilon_the_plan_gives_the_best_balanced_assignment(scores: Tensor) -> None:
    """With a small epsilon, the plan gives the assignment of largest total score among those with equal loads."""
    _, column = linear_sum_assignment(scores.repeat_interleave(T // E, 1).numpy(), maximize=True)
    chosen = log_plan(scores.double() / 0.01, 5000).argmax(-1)
    assert chosen.tolist() == (column // (T // E)).tolist()


@pytest.mark.parametrize("k", [1, 2])
def test_the_plan_balances_a_skewed_router(k: int) -> None:
    """When all tokens prefer the same experts, the plan reduces the CV of the load to less than a fifth.

    The router has its default settings, which are those of the yaml.
    """
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(4)) / D**0.5 + 0.3
    greedy, planned = (load_cv(route(Sinkhorn(D, E, k=k), x, training=training).expert) for training in (False, True))
    assert greedy > 0.5
    assert planned < greedy / 5


def test_gates_are_computed_from_the_selected_logits_and_not_from_the_plan(x: Tensor) -> None:
    for k, gate in ((1, torch.sigmoid), (3, lambda top: torch.softmax(top, -1))):
        routing = route(Sinkhorn(D, E, k=k), x)
        assert routing.logits is not None
        top = routing.logits.gather(-1, routing.expert.view(T, k))
        torch.testing.assert_close(routing.weight.view(T, k), gate(top))


def test_evaluation_equals_top_k(x: Tensor) -> None:
    greedy, plain = route(Sinkhorn(D, E, k=2), x, training=False), route(TopK(D, E, k=2), x)
    assert torch.equal(greedy.expert, plain.expert)
    torch.testing.assert_close(greedy.weight, plain.weight)


def test_with_the_setting_inference_evaluation_uses_the_plan_too(x: Tensor) -> None:
    trained, plain = route(Sinkhorn(D, E), x), route(Sinkhorn(D, E), x, training=False)
    planned = route(Sinkhorn(D, E, inference=True), x, training=False)
    assert torch.equal(planned.expert, trained.expert)
    assert not torch.equal(planned.expert, plain.expert)


@pytest.mark.parametrize(
    "settings", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": math.inf}, {"iterations": 0}, {"k": 0}, {"k": E + 1}]
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        Sinkhorn(D, E, **settings)
