"""Tests of top-p: the smallest set of experts with total probability p, and the entropy loss that keeps it small."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.top_p import TopP
from moe.routing.decision import Context, Knobs, Routing

T, D, E = 60, 16, 6


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def route(router: TopP, x: Tensor, *, std: float = 0.3) -> Routing:
    nn.init.normal_(router.weight, std=std, generator=torch.Generator().manual_seed(3))
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


@pytest.mark.parametrize("p", [0.1, 0.4, 0.8, 0.99])
def test_a_token_takes_the_smallest_set_of_experts_whose_probabilities_sum_to_p(x: Tensor, p: float) -> None:
    """The selected experts' probabilities sum to at least p. Those of no smaller set do, and no set of the same size
    sums to more. The test compares all subsets.
    """
    routing = route(TopP(D, E, p=p, k_max=E), x)
    assert routing.probs is not None
    for t, probs in enumerate(routing.probs.tolist()):
        of_token = routing.token == t
        chosen = routing.expert[of_token].tolist()
        mass = sum(probs[e] for e in chosen)
        assert mass >= p
        for size in range(1, len(chosen) + 1):
            best = max(sum(subset) for subset in itertools.combinations(probs, size))
            assert best < p if size < len(chosen) else abs(best - mass) < 1e-6
        torch.testing.assert_close(routing.weight[of_token], routing.probs[t, chosen])


def test_k_max_limits_a_token_to_its_most_probable_experts(x: Tensor) -> None:
    limited = route(TopP(D, E, p=0.9, k_max=2), x)
    assert limited.probs is not None
    for t in range(T):
        assert set(limited.expert[limited.token == t].tolist()) <= set(limited.probs[t].topk(2).indices.tolist())
    assert torch.bincount(limited.token, minlength=T).max() == 2


def test_confident_tokens_take_one_expert_and_uncertain_tokens_many(x: Tensor) -> None:
    confident, uncertain = (
        route(TopP(D, E, p=0.4, k_max=E), x, std=50.0),
        route(TopP(D, E, p=0.4, k_max=E), x, std=1e-6),
    )
    assert torch.bincount(confident.token, minlength=T).eq(1).double().mean() > 0.9
    assert torch.bincount(uncertain.token, minlength=T).eq(3).all(), (
        "3/6 is the smallest multiple of 1/6 that is at least 0.4"
    )


def test_every_token_has_one_expert_if_p_is_tiny_and_all_experts_if_p_is_1(x: Tensor) -> None:
    assert torch.bincount(route(TopP(D, E, p=1e-9, k_max=E), x).token, minlength=T).eq(1).all()
    # rounded probabilities of fewer experts may already sum to 1
    assert len(route(TopP(D, E, p=1.0, k_max=E), x).token) > 0.9 * T * E


def test_the_loss_is_the_mean_token_entropy_with_a_finite_gradient(x: Tensor) -> None:
    routing = route(TopP(D, E), x)
    assert routing.probs is not None
    expected = -sum(p * torch.tensor(p).log().item() for row in routing.probs.tolist() for p in row) / T
    torch.testing.assert_close(routing.aux["entropy"].item(), expected, rtol=1e-4, atol=0)

    saturated = TopP(D, E)
    route(saturated, 1e4 * x).aux["entropy"].backward()
    assert saturated.weight.grad is not None
    assert saturated.weight.grad.isfinite().all()


def test_top_p_has_no_fixed_k_and_the_loss_weight_of_its_settings() -> None:
    """Top-p has no `fixed_k`, so active parameters are not counted as if the number of experts were fixed.

    The weight of its entropy loss is a setting.
    """
    assert TopP(D, E).fixed_k is None
    assert TopP(D, E, entropy=0.5).loss_weights == {"entropy": 0.5}


def test_the_mean_is_ignored_where_the_number_is_fixed() -> None:
    assert "router.mean_k" in TopP(D, E, p=1.0).ignores
    assert {"router.mean_k", "router.p"} <= TopP(D, E, k_max=1).ignores
    assert "router.mean_k" not in TopP(D, E).ignores


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 0.0}, r"router\.p=0\.0: must be more than 0 and at most 1"),
        ({"p": float("nan")}, r"router\.p=nan: must be more than 0"),
        ({"k_max": 7}, r"router\.k_max=7: must be between 1 and model\.num_experts=6"),
        ({"mean_k": 0.5}, r"router\.mean_k=0\.5: must be between 1 and router\.k_max=4"),
        ({"mean_k": 3.0, "k_max": 2}, r"router\.mean_k=3\.0: must be between 1 and router\.k_max=2"),
        ({"entropy": -0.1}, r"router\.entropy=-0\.1: must be a finite number >= 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TopP(D, E, **settings)
