"""Auxiliary losses against closed forms, and the ways in which others got them wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.losses import load_balance, router_z


@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_one_for_every_k_and_number_of_experts(experts: int, k: int) -> None:
    """Without dividing the load by k the loss would be k."""
    tokens = 10 * experts
    probs = torch.full((tokens, experts), 1 / experts)
    assert load_balance(probs, torch.full((experts,), tokens * k // experts)) == pytest.approx(1)


def test_one_expert_taking_everything_costs_the_number_of_experts() -> None:
    probs = torch.tensor([[1.0, 0, 0, 0]]).expand(6, 4)
    assert load_balance(probs, torch.tensor([6, 0, 0, 0])) == pytest.approx(4)


def test_gradient_is_that_of_the_formula_through_probabilities_only() -> None:
    """E * f_i / T for every token: no second softmax, no gradient through counts, all experts and not the top k."""
    probs = torch.rand(5, 3, requires_grad=True)
    offered = torch.tensor([4, 1, 5])
    load_balance(probs, offered).backward()
    torch.testing.assert_close(probs.grad, (3 * offered / 10 / 5).expand(5, 3))


@given(st.integers(2, 8), st.floats(0, 60), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_shrinking_scores_cannot_push_the_loss_below_one(experts: int, sharp: float, seed: int) -> None:
    """f and P of a top-k softmax are ordered alike on average; tiny probabilities must not "hack" the loss."""
    logits = sharp * torch.randn(1, experts, generator=torch.Generator().manual_seed(seed)).expand(50, -1)
    probs = torch.softmax(logits, -1)
    offered = torch.bincount(probs.topk(1).indices.flatten(), minlength=experts)
    assert load_balance(probs, offered) >= 1 - 1e-5


def test_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    """Concatenating layers before f * P would make this pair look balanced."""
    left, right = torch.tensor([[0.9, 0.1]]).expand(10, 2), torch.tensor([[0.1, 0.9]]).expand(10, 2)
    per_layer = [load_balance(left, torch.tensor([10, 0])), load_balance(right, torch.tensor([0, 10]))]
    concatenated = load_balance(torch.cat([left, right]), torch.tensor([10, 10]))
    assert concatenated == pytest.approx(1)
    assert all(loss == pytest.approx(1.8) for loss in per_layer)


def test_z_loss_of_equal_logits_is_log_experts_squared() -> None:
    assert router_z(torch.zeros(7, 16)) == pytest.approx(math.log(16) ** 2)
    assert router_z(torch.full((7, 16), -math.log(16))) == pytest.approx(0, abs=1e-6)
