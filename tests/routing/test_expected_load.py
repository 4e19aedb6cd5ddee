"""Tests of expected loads with each router that has one, by drawing the noise of an expert again and choosing again."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config.classes import build
from moe.routers.base import Router
from moe.routing.decision import Context, Knobs
from moe.routing.expected_load import bar, bar_in_groups, cv_squared, expected_load_cv, stay_probability
from moe.testing import inputs

D, E = inputs.D, inputs.E
DRAWS = 4000
ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("topk.TopK", {"k": 3}),
    ("sigmoid_bias.SigmoidBias", {}),
    ("sigmoid_bias.SigmoidBias", {"groups": 4, "top_groups": 2, "k": 3}),
    ("sigmoid_bias.SigmoidBias", {"groups": 8, "top_groups": 3}),
    ("sigmoid_bias.SigmoidBias", {"groups": 2, "top_groups": 1, "scores": "sqrt_softplus"}),
    ("smebu.Smebu", {"k": 1}),
    ("quantile_balancing.QuantileBalancing", {"k": 4}),
    ("group_limited.GroupLimited", {"groups": 4, "top_groups": 2}),
    ("group_limited.GroupLimited", {"groups": 2, "top_groups": 1, "k": 3}),
    ("null_experts.NullExperts", {"k": 3, "nulls": 4}),
    ("moe_plus_plus.MoEPlusPlus", {"k": 3}),
    ("expert_threshold.ExpertThreshold", {}),
]


def chosen_again(router: Router, clean: Tensor, noisy: Tensor, noise: float, expert: int) -> float:
    """Return how often `expert` is chosen if its noise alone is drawn again. clean, noisy: the logits of one token.

    The router chooses as always: its logits are replaced by those with the new noise.
    """
    logits = noisy.repeat(DRAWS, 1)
    generator = torch.Generator().manual_seed(expert)
    logits[:, expert] = clean[expert] + noise * torch.randn(DRAWS, generator=generator)
    router.add_noise = lambda *_: logits  # type: ignore[method-assign]
    routing = router(torch.zeros(DRAWS, D), Context(torch.zeros(1, DRAWS, dtype=torch.long), Knobs.of()))
    del router.add_noise
    return (routing.expert == expert).double().sum().item() / DRAWS


@pytest.mark.parametrize(("name", "settings"), ROUTERS, ids=str)
def test_the_expected_load_is_how_often_experts_are_chosen_when_their_noise_is_drawn_again(
    name: str, settings: dict[str, Any]
) -> None:
    spec, noise = {"_target_": f"moe.routers.{name}", **settings}, 0.7
    router = inputs.random_router(lambda dim: build(spec, "router", dim, E))
    generator = torch.Generator().manual_seed(5)
    choices = len(router.weight)
    clean = torch.randn(2, choices, generator=generator)
    noisy = clean + noise * torch.randn(2, choices, generator=generator)
    found = stay_probability(clean, router.bars(noisy, router.k), torch.tensor(noise))[:, :E]
    expected = [[chosen_again(router, *rows, noise, e) for e in range(E)] for rows in zip(clean, noisy, strict=True)]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.double), atol=0.03, rtol=0)
    assert 0.05 < found.double().std() < 0.6
    context = Context(torch.zeros(1, 2, dtype=torch.long), Knobs.of(noise=noise), costly=frozenset(("load",)))
    aux = router.expected_load(clean, noisy, router.k, context)
    assert aux["expected_load_cv"].item() == pytest.approx(cv_squared(torch.tensor(expected).sum(0)).item(), abs=0.02)
    assert not router.eval().expected_load(clean, noisy, router.k, context)


def test_a_bar_is_the_kth_largest_of_the_others() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    assert bar(values, 1).tolist() == [[4, 4, 4, 3]]
    assert bar(values, 2).tolist() == [[2, 3, 3, 2]]
    assert bar(values, 4).tolist() == [[-torch.inf] * 4]


def test_an_expert_has_to_lift_its_group_and_then_to_be_among_the_largest() -> None:
    """Groups have the scores 5, 6 and 3. Alone, each needs the sum that the best of the other groups has."""
    values = torch.tensor([[4.0, 1.0, 3.0, 3.0, 2.0, 1.0]])
    found = bar_in_groups(values, 2, groups=3, top_groups=1)
    assert found.tolist() == [[5, 2, 2, 2, 5, 4]]
    assert bar_in_groups(values, 1, groups=3, top_groups=1).tolist() == [[5, 4, 3, 3, 5, 4]]
    assert bar_in_groups(values, 2, groups=3, top_groups=3).tolist() == bar(values, 2).tolist()


def test_bars_that_are_infinite_have_probabilities_of_0_and_1_and_no_gradient() -> None:
    clean = torch.zeros(1, 3, requires_grad=True)
    spread = torch.ones(1, 3, requires_grad=True)
    bars = torch.tensor([[-torch.inf, 0.0, torch.inf]])
    probability = stay_probability(clean, bars, spread)
    assert probability.tolist() == [[1, 0.5, 0]]
    gradients = torch.autograd.grad(probability.sum(), (clean, spread))
    assert gradients[0][0, [0, 2]].tolist() == [0, 0]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_loss_of_equal_expected_loads_is_zero() -> None:
    assert expected_load_cv(torch.zeros(5, 4), torch.zeros(5, 4), torch.tensor(1.0)) == 0
