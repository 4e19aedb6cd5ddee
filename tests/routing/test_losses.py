"""Tests of the auxiliary losses: they equal closed forms and are free of mistakes known from other code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.routing.decision import Routing
from moe.routing.losses import (
    add_row_noise,
    auxiliary,
    expert_router_coupling,
    gate_variance,
    importance_cv,
    load_balance,
    load_balance_group,
    load_balance_sequence,
    negative_information,
    output_orthogonality,
    router_entropy,
    router_z,
    similarity_preserving,
)


@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("k", [1, 2])
def test_the_balance_loss_of_equal_loads_is_one_for_every_k_and_number_of_experts(experts: int, k: int) -> None:
    """The balance loss of equal loads is 1. If the load were not divided by k, it would be k."""
    tokens = 10 * experts
    probs = torch.full((tokens, experts), 1 / experts)
    assert load_balance(probs, torch.full((experts,), tokens * k // experts)) == pytest.approx(1)


def test_the_balance_loss_is_the_number_of_experts_if_one_expert_gets_all_tokens() -> None:
    probs = torch.tensor([[1.0, 0, 0, 0]]).expand(6, 4)
    assert load_balance(probs, torch.tensor([6, 0, 0, 0])) == pytest.approx(4)


def test_the_gradient_of_the_balance_loss_flows_through_the_probabilities_alone() -> None:
    """The gradient on the probability of expert i is E * f_i / T for every token.

    There is no second softmax and no gradient through counts, and all experts have a gradient, not only the top k.
    """
    probs = torch.rand(5, 3, requires_grad=True)
    offered = torch.tensor([4, 1, 5])
    load_balance(probs, offered).backward()
    torch.testing.assert_close(probs.grad, (3 * offered / 10 / 5).expand(5, 3))


@given(st.integers(2, 8), st.floats(0, 60), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_balance_loss_is_at_least_one_even_with_tiny_probabilities(experts: int, scale: float, seed: int) -> None:
    """The balance loss of a top-1 softmax is at least 1, because the expert of the largest load also has the largest
    mean probability. Tiny probabilities do not lower it.
    """
    logits = scale * torch.randn(1, experts, generator=torch.Generator().manual_seed(seed)).expand(50, -1)
    probs = torch.softmax(logits, -1)
    offered = torch.bincount(probs.topk(1).indices.flatten(), minlength=experts)
    assert load_balance(probs, offered) >= 1 - 1e-5


def test_the_balance_loss_does_not_cancel_opposite_imbalances_of_two_layers() -> None:
    """Each of two layers with opposite imbalances has a balance loss of 1.8.

    If the layers were concatenated before f * P is computed, the pair would seem balanced.
    """
    first_layer, second_layer = torch.tensor([[0.9, 0.1]]).expand(10, 2), torch.tensor([[0.1, 0.9]]).expand(10, 2)
    per_layer = [load_balance(first_layer, torch.tensor([10, 0])), load_balance(second_layer, torch.tensor([0, 10]))]
    concatenated = load_balance(torch.cat([first_layer, second_layer]), torch.tensor([10, 10]))
    assert concatenated == pytest.approx(1)
    assert all(loss == pytest.approx(1.8) for loss in per_layer)


def test_the_z_loss_of_equal_logits_is_the_squared_logarithm_of_the_number_of_experts() -> None:
    assert router_z(torch.zeros(7, 16)) == pytest.approx(math.log(16) ** 2)
    assert router_z(torch.full((7, 16), -math.log(16))) == pytest.approx(0, abs=1e-6)


def test_the_balance_loss_per_sequence_balances_each_sequence_by_itself() -> None:
    """The loss per sequence is 1.8 for two sequences with opposite preferences, although they are balanced together."""
    probs = torch.tensor([[0.9, 0.1]] * 4 + [[0.1, 0.9]] * 4)
    token, expert = torch.arange(8), torch.tensor([0] * 4 + [1] * 4)
    assert load_balance(probs, torch.bincount(expert)) == pytest.approx(1)
    assert load_balance_sequence(probs, token, expert, 4) == pytest.approx(1.8)
    assert load_balance_sequence(probs, token, expert, 8) == pytest.approx(1)


def test_the_balance_loss_per_sequence_of_one_sequence_is_that_of_the_batch() -> None:
    torch.manual_seed(0)
    probs = torch.softmax(torch.randn(12, 4), -1)
    expert = probs.topk(2).indices.flatten()
    token = torch.arange(12).repeat_interleave(2)
    full_batch = load_balance(probs, torch.bincount(expert, minlength=4))
    torch.testing.assert_close(load_balance_sequence(probs, token, expert, 12), full_batch)


@pytest.mark.parametrize("by_token", [True, False])
def test_the_balance_loss_per_group_equals_a_loop_over_groups(by_token: bool) -> None:
    """Groups have 1, 5, 0 and 6 tokens. A group without tokens does not count."""
    torch.manual_seed(0)
    probs = torch.softmax(torch.randn(12, 4), -1).requires_grad_()
    group = torch.tensor([0] + [1] * 5 + [3] * 6)
    token, expert = torch.arange(12).repeat_interleave(2), probs.topk(2).indices.flatten()
    terms, weights = [], []
    for g in (0, 1, 3):
        members = group == g
        loads = torch.bincount(expert[members[token]], minlength=4)
        terms.append(load_balance(probs[members], loads))
        weights.append(float(members.sum()) if by_token else 1.0)
    expected = sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights)
    loss = load_balance_group(probs, token, expert, group, by_token=by_token)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each, probs, retain_graph=True)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_documents_are_balanced_one_by_one_and_are_sequences_where_nothing_marks_them() -> None:
    """Two documents of one sequence use opposite experts: 1.8 for each, 1 for the sequence."""
    probs = torch.tensor([[0.9, 0.1]] * 4 + [[0.1, 0.9]] * 4)
    expert = torch.tensor([[0]] * 4 + [[1]] * 4)
    routing = Routing.token_choice(expert, torch.ones(8, 1), probs=probs)
    offered = torch.tensor([4, 4])
    plain = auxiliary(routing, offered, seq_len=8)
    assert plain["load_balance_document"] == plain["load_balance_sequence"] == pytest.approx(1)
    position = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    packed = auxiliary(routing, offered, seq_len=8, document_position=position)
    assert packed["load_balance_document"] == pytest.approx(1.8)
    assert packed["load_balance_sequence"] == pytest.approx(1)
    uneven = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])  # the first of these documents has both experts
    first, second = (6 / 8 * 2 * (4 / 6 * (3.8 / 6) + 2 / 6 * (2.2 / 6)), 2 / 8 * 2 * 0.9)
    loss = auxiliary(routing, offered, seq_len=8, document_position=uneven)["load_balance_document"]
    assert loss == pytest.approx(first + second)


def test_the_importance_loss_is_the_squared_coefficient_of_variation_of_summed_probabilities() -> None:
    probs = torch.softmax(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), -1)
    sums = probs.sum(0)
    assert importance_cv(probs).item() == pytest.approx((sums.var(correction=0) / sums.mean() ** 2).item(), rel=1e-4)
    assert importance_cv(torch.eye(4).repeat(3, 1)) == pytest.approx(0, abs=1e-6)
    assert importance_cv(torch.tensor([[1.0, 0, 0, 0]]).expand(6, 4)) == pytest.approx(3)


def test_a_cv_of_straight_through_loads_has_twice_the_gradient_of_the_balance_loss() -> None:
    """The docstring of `importance_cv` says so: this is why it is no loss of its own."""
    probs = torch.softmax(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), -1).requires_grad_()
    offered = torch.bincount(probs.argmax(-1), minlength=5)
    soft = 20 * probs.mean(0)
    load = offered + soft - soft.detach()
    [of_loads] = torch.autograd.grad(load.var(correction=0) / load.mean().detach() ** 2, probs)
    [of_balance] = torch.autograd.grad(load_balance(probs, offered), probs)
    spread = of_loads - of_loads.mean(1, keepdim=True)  # a constant over experts changes no softmax
    torch.testing.assert_close(spread, 2 * (of_balance - of_balance.mean(1, keepdim=True)), atol=1e-6, rtol=1e-4)


def test_minus_the_mutual_information_has_its_closed_forms() -> None:
    """-ln E for certain tokens over all experts, 0 for equal tokens, and the sum over p ln (p / P) in general."""
    assert negative_information(torch.eye(4).repeat(3, 1)) == pytest.approx(-math.log(4))
    assert negative_information(torch.tensor([[0.7, 0.2, 0.1]]).expand(6, 3)) == pytest.approx(0, abs=1e-6)
    probs = torch.softmax(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), -1)
    expected = -(probs * (probs / probs.mean(0)).log()).sum(-1).mean()
    assert negative_information(probs).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_global_balance_loss_includes_the_load_of_earlier_micro_batches() -> None:
    """A micro-batch that evens out the load of the earlier ones has the lowest global balance loss, 1.

    Its balance loss within the micro-batch stays high.
    """
    probs = torch.tensor([[0.9, 0.1]]).expand(4, 2)
    routing = Routing.token_choice(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), probs=probs)
    offered = torch.tensor([4, 0])
    first = auxiliary(routing, offered, seq_len=4)
    assert first["load_balance"] == first["load_balance_global"] == pytest.approx(1.8)
    second = auxiliary(routing, offered, seq_len=4, load=torch.tensor([0.0, 4.0]))
    assert second["load_balance"] == pytest.approx(1.8)
    assert second["load_balance_global"] == pytest.approx(1)


def test_router_entropy_is_log_experts_if_uniform_and_zero_with_a_finite_gradient_if_one_hot() -> None:
    assert router_entropy(torch.full((3, 8), 1 / 8)) == pytest.approx(math.log(8))
    certain = torch.eye(8).requires_grad_()
    loss = router_entropy(certain)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_gate_variance_is_zero_for_equal_probabilities_and_lowest_for_balanced_one_hot_ones() -> None:
    """Gate variance is 0 if all tokens have the same probabilities. For balanced one-hot probabilities it is
    -E * (1/E)(1 - 1/E) = -(1 - 1/E).
    """
    assert gate_variance(torch.tensor([[0.7, 0.3]]).expand(6, 2)) == pytest.approx(0, abs=1e-7)
    assert gate_variance(torch.eye(4).repeat(3, 1)) == pytest.approx(-(1 - 1 / 4))


def test_the_simbal_loss_is_zero_for_orthonormal_rows_only() -> None:
    rows = torch.linalg.qr(torch.randn(16, 4)).Q.T
    assert similarity_preserving(rows) == pytest.approx(0, abs=1e-5)
    assert similarity_preserving(2 * rows) == pytest.approx(4 * 3, rel=1e-4)
    assert similarity_preserving(rows[:1].expand(4, -1)) == pytest.approx(12, rel=1e-4)


def test_the_coupling_loss_is_zero_if_each_row_excites_its_own_expert_most_and_equals_a_loop() -> None:
    rows, own = torch.eye(3), torch.eye(3)[:, None, :]  # expert j sees component j alone
    assert expert_router_coupling(rows, own, noisy=False) == 0
    swapped = own[[1, 0, 2]]  # rows 0 and 1 excite each other's expert by 1, and their own one by 0
    assert expert_router_coupling(rows, swapped, noisy=False) == pytest.approx((1 + 1 + 1 + 1) / 9)
    generator = torch.Generator().manual_seed(0)
    rows, first = torch.randn(5, 4, generator=generator), torch.randn(5, 6, 4, generator=generator)
    strength = [[(first[j] @ rows[i]).norm().item() for j in range(5)] for i in range(5)]
    terms = [
        max(0.0, strength[i][j] - strength[i][i]) + max(0.0, strength[j][i] - strength[i][i])
        for i in range(5)
        for j in range(5)
    ]
    assert expert_router_coupling(rows, first, noisy=False).item() == pytest.approx(sum(terms) / 25, rel=1e-5)


def test_a_router_row_with_noise_stays_nearest_to_itself() -> None:
    """Its length changes by at most half the distance to the nearest other row."""
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(1)
    torch.manual_seed(0)
    moved = torch.stack([(add_row_noise(rows) - rows).norm(dim=1) for _ in range(200)])
    assert (moved <= distance / 2 + 1e-6).all()
    assert moved.amax() > 0.2 * distance.amax()
    assert torch.cdist(add_row_noise(rows), rows).argmin(1).tolist() == list(range(8))


def test_output_orthogonality_is_the_squared_cosine_of_two_outputs() -> None:
    """The loss is 0 for orthogonal outputs, 1 for parallel ones of any length and sign, and cos^2 in between.

    The order of the outputs does not matter.
    """
    token = torch.tensor([1, 0, 0, 1])
    east, north = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.5])
    assert output_orthogonality(torch.stack([east, east, north, north]), token) == 0
    assert output_orthogonality(torch.stack([east, north, -3 * north, 5 * east]), token) == pytest.approx(1)
    diagonal = torch.tensor([1.0, 1.0])
    assert output_orthogonality(torch.stack([east, east, north, diagonal]), token) == pytest.approx(1 / 4)


def test_output_orthogonality_is_the_mean_over_all_pairs_of_outputs_of_a_token() -> None:
    """The loss equals a loop over pairs, with tokens of 0, 1, 2 and 4 experts.

    Its gradient is orthogonal to the outputs: it changes their directions, not their lengths.
    """
    torch.manual_seed(0)
    token = torch.tensor([3, 0, 3, 1, 3, 1, 3])
    rows = torch.randn(7, 5, requires_grad=True)
    squares = [
        torch.cosine_similarity(rows[i], rows[j], dim=0) ** 2
        for i in range(7)
        for j in range(i)
        if token[i] == token[j]
    ]
    loss = output_orthogonality(rows, token)
    torch.testing.assert_close(loss, torch.stack(squares).mean())
    [gradient] = torch.autograd.grad(loss, rows)
    torch.testing.assert_close((gradient * rows).sum(-1), torch.zeros(7), atol=1e-6, rtol=0)


def test_output_orthogonality_is_zero_if_no_token_has_two_experts() -> None:
    assert output_orthogonality(torch.randn(3, 5), torch.tensor([0, 1, 2])) == 0
    assert output_orthogonality(torch.randn(0, 5), torch.tensor([], dtype=torch.long)) == 0
