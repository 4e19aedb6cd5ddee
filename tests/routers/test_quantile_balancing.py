"""Tests of quantile balancing: selection by score + bias, gates by score, and biases that balance the loads."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_matrix
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.quantile_balancing import QuantileBalancing, balanced_bias
from moe.routing.decision import Context, Knobs
from moe.routing.dispatch import dispatch
from moe.routing.measurement import collect_stats
from moe.routing.stats import RoutingStats

D, E, T = 16, 8, 400


def make(**settings: Any) -> QuantileBalancing:
    router = QuantileBalancing(D, E, **settings)
    nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return router


def context(tokens: int = T) -> Context:
    return Context(torch.zeros(1, tokens, dtype=torch.long), Knobs.of())


def stats_of(router: QuantileBalancing, x: Tensor) -> RoutingStats:
    routing = router(x, context(len(x)))
    return collect_stats(routing, dispatch(routing, E, capacity=None, seq_len=len(x)), len(x))


def skewed_tokens(router: QuantileBalancing, generator: torch.Generator) -> Tensor:
    """Return random tokens that all prefer the same experts."""
    return torch.randn(T, D, generator=generator) + 2 * router.weight[0].detach()


def load_cv(load: Tensor) -> float:
    return (load.std(correction=0) / load.mean()).item()


def test_the_bias_changes_the_selection_but_not_the_gates() -> None:
    x, router = torch.randn(T, D), make(k=2)
    router.bias[3] = 10.0
    routing = router(x, context())
    experts = routing.expert.view(T, 2)
    assert (experts == 3).any(-1).all()
    scores = torch.sigmoid(x @ router.weight.T).gather(-1, experts)
    torch.testing.assert_close(routing.weight.view(T, 2), scores / scores.sum(-1, keepdim=True))


def test_with_k_1_the_gate_is_the_score() -> None:
    x, router = torch.randn(T, D), make(k=1)
    torch.testing.assert_close(router(x, context()).weight, torch.sigmoid(x @ router.weight.T).amax(-1))


def dual_value(scores: Tensor, bias: Tensor, k: int) -> float:
    """Return the value of the linear program's dual at these biases.

    The dual is sum_te max(0, s_te + b_e - a_t) + k sum_t a_t - (T k / E) sum_e b_e, minimized over a. Any a_t between
    the k-th and the (k + 1)-th largest s_te + b_e gives the minimum.
    """
    tokens, experts = scores.shape
    return ((scores + bias).topk(k).values.sum() - tokens * k / experts * bias.sum()).item()


def best_total_score(scores: Tensor, k: int) -> float:
    """Return the largest total score of an assignment of k different experts to each token and T k / E tokens to each
    expert.
    """
    tokens, experts = scores.shape
    pairs = np.arange(tokens * experts)
    rows = np.concatenate([pairs // experts, tokens + pairs % experts])
    limits = np.concatenate([np.full(tokens, k), np.full(experts, tokens * k / experts)])
    uses = coo_matrix((np.ones(2 * len(pairs)), (rows, np.tile(pairs, 2))))
    return -linprog(-scores.flatten().numpy(), A_eq=uses, b_eq=limits, bounds=(0, 1)).fun


@pytest.mark.parametrize("k", [1, 2, 4])
def test_repeated_bias_updates_solve_the_balanced_assignment(k: int) -> None:
    """Repeated updates reach the optimum that a linear-program solver finds, with exactly equal loads."""
    scores = torch.rand(80, E, generator=torch.Generator().manual_seed(4), dtype=torch.float64) ** 3
    scores[:, 0] += 0.5
    bias = torch.zeros(E, dtype=torch.float64)
    for _ in range(50):
        bias = balanced_bias(scores, bias, k)
    assert dual_value(scores, bias, k) == pytest.approx(best_total_score(scores, k), rel=1e-6)
    assert torch.bincount((scores + bias).topk(k).indices.flatten(), minlength=E).tolist() == [80 * k // E] * E


@pytest.mark.parametrize("k", [1, 3])
def test_one_bias_update_minimizes_the_dual_over_the_biases(k: int) -> None:
    """For each expert, exactly T k / E tokens have s + b above the token's cutoff, so the slope of the dual is 0."""
    scores, bias = torch.rand(T, E), torch.randn(E)
    found = balanced_bias(scores, bias, k)
    for e in range(E):
        cutoffs = [np.quantile((scores[t] + bias).numpy(), 1 - k / E) for t in range(T)]
        assert sum((scores[t, e] + found[e]).item() > cutoffs[t] for t in range(T)) == T * k // E


def test_the_bias_is_a_running_average_over_steps_with_mean_zero() -> None:
    router, x = make(decay=0.75), torch.randn(T, D)
    router.bias.copy_(torch.linspace(-0.1, 0.1, E))
    scores = torch.sigmoid(x @ router.weight.T)
    expected = 0.75 * router.bias + 0.25 * balanced_bias(scores, router.bias, 2)
    router.after_step(stats_of(router, x))
    torch.testing.assert_close(router.bias, expected - expected.mean())


def test_the_bias_changes_only_after_a_step_and_never_in_evaluation() -> None:
    router, x = make(decay=0.0), torch.randn(T, D) + 0.5
    first = router(x, context())
    second = router(x, context())
    assert torch.equal(first.expert, second.expert)
    router.eval()(x, context())
    assert (router.bias == 0).all()
    router.after_step(stats_of(router, x))
    assert not torch.equal(router(x, context()).expert, first.expert)


def test_the_bias_balances_a_skewed_router_on_new_batches_without_a_gradient() -> None:
    router, generator = make(), torch.Generator().manual_seed(1)
    before = load_cv(stats_of(router, skewed_tokens(router, generator)).offered)
    for _ in range(80):
        router.after_step(stats_of(router, skewed_tokens(router, generator)))
    assert before > 0.5
    assert load_cv(stats_of(router.eval(), skewed_tokens(router, generator)).offered) < 0.15


def test_the_bias_of_a_new_router_is_zero_and_is_saved() -> None:
    router = make()
    assert (router.bias == 0).all()
    assert list(router.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": E + 1}, {"decay": 1.0}, {"decay": -0.1}, {"decay": float("nan")}])
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        QuantileBalancing(D, E, **settings)
