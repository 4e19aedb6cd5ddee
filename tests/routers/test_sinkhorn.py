"""The transport plan against its definition, a slow reference and the exact assignment; the gates; evaluation."""

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


def test_tokens_and_experts_have_equal_mass(scores: Tensor) -> None:
    torch.testing.assert_close(log_plan(scores, 1).exp().sum(0), torch.full((E,), 1 / E))
    plan = log_plan(scores, 100).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((E,), 1 / E))
    torch.testing.assert_close(plan.sum(1), torch.full((T,), 1 / T))


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_the_logarithms_change_nothing(scores: Tensor, iterations: int) -> None:
    """Compared with scaling exp(scores) itself, rows first."""
    plan = scores.double().exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True) / T
        plan = plan / plan.sum(0, keepdim=True) / E
    torch.testing.assert_close(log_plan(scores.double(), iterations).exp(), plan)


def test_scores_too_large_to_exponentiate_are_fine(scores: Tensor) -> None:
    assert log_plan(1e4 * scores, 50).isfinite().all()


def test_the_plain_domain_gives_the_same_plan_until_numbers_get_too_small(scores: Tensor) -> None:
    torch.testing.assert_close(plain_plan(scores, 20), log_plan(scores, 20), atol=1e-4, rtol=0)
    small = 200 * scores
    assert plain_plan(small, 20).isfinite().all()
    assert not torch.allclose(plain_plan(small, 20), log_plan(small, 20), atol=1.0)


def test_higher_scores_get_more_mass(scores: Tensor) -> None:
    raised = scores.clone()
    raised[5, 3] += 1.0
    assert log_plan(raised, 100)[5, 3] > log_plan(scores, 100)[5, 3]


def test_a_constant_per_token_or_per_expert_changes_nothing(scores: Tensor) -> None:
    shifted = scores + torch.randn(T, 1) + torch.randn(E)
    torch.testing.assert_close(log_plan(shifted, 200), log_plan(scores, 200), atol=1e-4, rtol=1e-4)


def test_with_small_epsilon_the_plan_selects_the_best_balanced_assignment(scores: Tensor) -> None:
    """Return the assignment of largest total score among those with T / E tokens for every expert."""
    _, column = linear_sum_assignment(scores.repeat_interleave(T // E, 1).numpy(), maximize=True)
    chosen = log_plan(scores.double() / 0.01, 5000).argmax(-1)
    assert chosen.tolist() == (column // (T // E)).tolist()


@pytest.mark.parametrize("k", [1, 2])
def test_it_balances_a_skewed_router(k: int) -> None:
    """Tokens that all prefer the same experts: the load's CV falls fivefold with the settings of the yaml."""
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(4)) / D**0.5 + 0.3
    greedy, planned = (load_cv(route(Sinkhorn(D, E, k=k), x, training=training).expert) for training in (False, True))
    assert greedy > 0.5
    assert planned < greedy / 5


def test_gates_come_from_the_selected_logits_and_never_from_the_plan(x: Tensor) -> None:
    for k, gate in ((1, torch.sigmoid), (3, lambda top: torch.softmax(top, -1))):
        routing = route(Sinkhorn(D, E, k=k), x)
        assert routing.logits is not None
        top = routing.logits.gather(-1, routing.expert.view(T, k))
        torch.testing.assert_close(routing.weight.view(T, k), gate(top))


def test_evaluation_is_plain_top_k(x: Tensor) -> None:
    greedy, plain = route(Sinkhorn(D, E, k=2), x, training=False), route(TopK(D, E, k=2), x)
    assert torch.equal(greedy.expert, plain.expert)
    torch.testing.assert_close(greedy.weight, plain.weight)


def test_with_inference_evaluation_is_as_training(x: Tensor) -> None:
    trained, plain = route(Sinkhorn(D, E), x), route(Sinkhorn(D, E), x, training=False)
    planned = route(Sinkhorn(D, E, inference=True), x, training=False)
    assert torch.equal(planned.expert, trained.expert)
    assert not torch.equal(planned.expert, plain.expert)


@pytest.mark.parametrize(
    "settings", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": math.inf}, {"iterations": 0}, {"k": 0}, {"k": E + 1}]
)
def test_what_makes_no_plan_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        Sinkhorn(D, E, **settings)
