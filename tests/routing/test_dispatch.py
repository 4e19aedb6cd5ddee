"""Tests of the dispatch of tokens to experts: combination, capacity limits and drop policies.

The results are compared with a dense one-hot einsum, and drops under a capacity limit with a queue of single tokens.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.routing.decision import Routing, _Picked, count
from moe.routing.dispatch import _dispatch_each, capacity_per_expert, combine, dispatch, gather


def random_routing(tokens: int, experts: int, k: int, *, seed: int = 0, skew: float = 0.0) -> Routing:
    """Return a top-k routing from random scores. With a positive skew, tokens prefer experts of high index."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator) + skew * torch.arange(experts)
    expert = scores.topk(k).indices
    return Routing.token_choice(expert, torch.rand(tokens, k, generator=generator))


def queue_reference(routing: Routing, experts: int, seq_len: int, limit: int) -> set[tuple[int, int]]:
    """Return the (token, expert) pairs that slow reference code keeps: it serves the assignments one by one.

    The order is by position in the sequence, then by sequence, then by the order of the router's list.
    """
    arrivals = sorted(range(len(routing.token)), key=lambda a: (routing.token[a].item() % seq_len, a))
    free_places, kept_pairs = [limit] * experts, set()
    for a in arrivals:
        expert = int(routing.expert[a])
        if free_places[expert]:
            free_places[expert] -= 1
            kept_pairs.add((int(routing.token[a]), expert))
    return kept_pairs


@given(
    tokens=st.sampled_from([1, 6, 24]),
    experts=st.integers(1, 8),
    data=st.data(),
    capacity=st.one_of(st.none(), st.floats(0.1, 3.0)),
    skew=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_dispatch_keeps_the_assignments_that_a_queue_serves(
    tokens: int, experts: int, data: st.DataObject, capacity: float | None, skew: float
) -> None:
    k = data.draw(st.integers(1, experts))
    seq_len = data.draw(st.sampled_from([n for n in (1, 2, 3, 6) if tokens % n == 0]))
    routing = random_routing(tokens, experts, k, skew=skew)
    dispatched = dispatch(routing, experts, capacity=capacity, seq_len=seq_len)
    limit = len(routing.token) if capacity is None else capacity_per_expert(len(routing.token), experts, capacity)
    expert = torch.repeat_interleave(torch.arange(experts), dispatched.kept)
    pairs = list(zip(dispatched.token.tolist(), expert.tolist(), strict=True))
    assert set(pairs) == queue_reference(routing, experts, seq_len, limit)
    assert len(pairs) == len(set(pairs)) == dispatched.kept.sum()
    assert dispatched.offered.sum() == tokens * k
    assert dispatched.kept.max() <= limit
    weights = {(int(t), int(e)): w for t, e, w in zip(routing.token, routing.expert, routing.weight, strict=True)}
    assert all(weights[pair] == w for pair, w in zip(pairs, dispatched.weight, strict=True))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    experts=st.integers(1, 6),
    capacity=st.floats(0.1, 3.0),
    drop=st.sampled_from(["position", "score"]),
)
@settings(max_examples=40, deadline=None)
def test_with_documents_each_document_is_dispatched_as_if_it_were_alone(
    lengths: list[int], experts: int, capacity: float, drop: str
) -> None:
    parts = [random_routing(length, experts, 1, seed=seed) for seed, length in enumerate(lengths)]
    first = torch.tensor([0, *lengths]).cumsum(0)
    fields = ([part.token + start for part, start in zip(parts, first, strict=False)], [part.expert for part in parts])
    whole = Routing(*map(torch.cat, fields), torch.cat([part.weight for part in parts]), None, None)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    found = dispatch(whole, experts, capacity=capacity, seq_len=1, drop=drop, position=position, document=document)
    alone = [dispatch(part, experts, capacity=capacity, seq_len=99, drop=drop) for part in parts]
    expected = [token + start for one, start in zip(alone, first, strict=False) for token in one.token]
    assert sorted(found.token.tolist()) == sorted(map(int, expected))
    assert torch.equal(found.kept, sum(one.kept for one in alone))
    assert found.places == sum(int(one.places) for one in alone if one.places is not None)
    expert = torch.repeat_interleave(torch.arange(experts), found.kept)
    assert torch.equal(whole.expert[found.token], expert), "sorted by expert; token t has assignment t"


@pytest.mark.parametrize("capacity", [None, 0.5, 1.0])
def test_gather_and_combine_equal_the_one_hot_einsum(capacity: float | None) -> None:
    tokens, experts, dim = 12, 4, 5
    routing = random_routing(tokens, experts, 2)
    dispatched = dispatch(routing, experts, capacity=capacity, seq_len=6)
    x = torch.randn(tokens, dim, dtype=torch.float64)
    matrices = torch.randn(experts, dim, dim, dtype=torch.float64)
    expert = torch.repeat_interleave(torch.arange(experts), dispatched.kept)
    rows = torch.stack([matrices[e] @ x[t] for t, e in zip(dispatched.token, expert, strict=True)])
    one_hot = torch.zeros(tokens, experts, dtype=torch.float64)
    one_hot[dispatched.token, expert] = dispatched.weight.double()
    torch.testing.assert_close(combine(rows, dispatched, tokens), torch.einsum("te,eij,tj->ti", one_hot, matrices, x))


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_gather_and_combine_have_the_gradients_of_their_definition(capacity: float | None) -> None:
    """Gradients agree with finite differences in double precision, for assignments in random order."""
    routing = random_routing(6, 3, 2)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    routing = routing._replace(token=routing.token[shuffled], expert=routing.expert[shuffled])
    dispatched = dispatch(routing, 3, capacity=capacity, seq_len=6)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        rows = gather(x, dispatched)
        return combine(rows * rows, dispatched._replace(weight=weight), 6)

    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    weight = dispatched.weight.double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, weight))
    expected = torch.zeros(6, 2, dtype=torch.float64)
    for token, w in zip(dispatched.token, weight, strict=True):
        expected[token] += w * x[token] ** 2
    torch.testing.assert_close(layer(x, weight), expected)


def test_a_routing_without_assignments_gives_zeros_and_a_zero_gradient() -> None:
    empty = Routing(*(torch.zeros(0, dtype=kind) for kind in (torch.long, torch.long, torch.float)), None, None)
    dispatched = dispatch(empty, 3, capacity=None, seq_len=4)
    x = torch.randn(4, 2, requires_grad=True)
    y = combine(gather(x, dispatched), dispatched, 4)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_dropless_keeps_all_assignments_and_under_a_capacity_dropped_tokens_get_zeros() -> None:
    routing = random_routing(16, 4, 2, skew=5.0)
    assert dispatch(routing, 4, capacity=None, seq_len=16).kept.sum() == 32
    dispatched = dispatch(routing, 4, capacity=0.25, seq_len=16)
    dropped = set(range(16)) - set(dispatched.token.tolist())
    assert dropped
    y = combine(torch.ones(len(dispatched.token), 3), dispatched, 16)
    assert (y[list(dropped)] == 0).all()


def test_every_sequence_of_the_batch_loses_the_same_number_of_tokens() -> None:
    """Under a capacity limit, every sequence loses its last tokens.

    If assignments were dropped in the order of the flat batch, later sequences would lose all their tokens.
    """
    sequences, length = 4, 8
    all_to_one_expert = Routing.token_choice(
        torch.zeros(sequences * length, 1, dtype=torch.long), torch.ones(sequences * length, 1)
    )
    dispatched = dispatch(all_to_one_expert, 2, capacity=1.0, seq_len=length)
    served = torch.bincount(dispatched.token // length, minlength=sequences)
    assert served.tolist() == [length // 2] * sequences
    assert (dispatched.token % length).max() < length // 2


@pytest.mark.parametrize(
    ("assignments", "experts", "capacity", "expected"), [(100, 8, 1.0, 13), (100, 8, 1.25, 16), (3, 8, 0.1, 1)]
)
def test_the_capacity_of_an_expert_is_rounded_up_and_at_least_one(
    assignments: int, experts: int, capacity: float, expected: int
) -> None:
    assert capacity_per_expert(assignments, experts, capacity) == expected


def test_the_gradient_of_a_gate_weight_is_the_sum_of_its_experts_output() -> None:
    """The derivative of y with respect to a gate weight is the expert's output.

    This is the only path on which the cross-entropy trains a router.
    """
    routing = random_routing(6, 3, 2)
    weight: Tensor = routing.weight.clone().requires_grad_()
    dispatched = dispatch(routing._replace(weight=weight), 3, capacity=None, seq_len=6)
    rows = torch.randn(12, 4)
    combine(rows, dispatched, 6).sum().backward()
    order = torch.argsort(routing.expert, stable=True)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[order], rows.sum(-1))


def test_dropping_by_score_keeps_the_largest_weights() -> None:
    routing = random_routing(24, 3, 2, seed=3)
    dispatched = dispatch(routing, 3, capacity=0.5, seq_len=24, drop="score")
    expert = torch.repeat_interleave(torch.arange(3), dispatched.kept)
    for e in range(3):
        best = routing.weight[routing.expert == e].sort(descending=True).values[: int(dispatched.kept[e])]
        torch.testing.assert_close(dispatched.weight[expert == e].sort(descending=True).values, best)


def test_dropping_at_random_is_reproducible_and_uniform_and_within_capacity() -> None:
    all_to_one_expert = Routing.token_choice(torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1))
    served = torch.zeros(8)
    for seed in range(200):
        torch.manual_seed(seed)
        dispatched = dispatch(all_to_one_expert, 2, capacity=1.0, seq_len=8, drop="random")
        assert len(dispatched.token) == 4
        served[dispatched.token] += 1
        torch.manual_seed(seed)
        assert torch.equal(
            dispatch(all_to_one_expert, 2, capacity=1.0, seq_len=8, drop="random").token, dispatched.token
        )
    assert (served - 100).abs().max() < 5 * (200 * 0.25) ** 0.5


def test_weights_are_renormalized_over_the_assignments_that_are_kept() -> None:
    routing = random_routing(24, 4, 2, skew=1.0)
    renormalized = dispatch(routing._replace(log_weight=routing.weight.log()), 4, capacity=0.6, seq_len=24)
    sums = torch.zeros(24).index_add(0, renormalized.token, renormalized.weight)
    has_expert = torch.bincount(renormalized.token, minlength=24) > 0
    assert not has_expert.all()
    torch.testing.assert_close(sums[has_expert], torch.ones(int(has_expert.sum())))
    plain = dispatch(routing, 4, capacity=0.6, seq_len=24)
    assert torch.equal(plain.token, renormalized.token)
    assert not torch.allclose(plain.weight, renormalized.weight)


def test_weights_are_renormalized_by_token_if_there_are_fewer_assignments_than_tokens() -> None:
    """Of three tokens only the last one has an expert. Its weight .5 becomes 1."""
    routing = Routing.masked(torch.tensor([[False, False], [False, False], [True, False]]), torch.full((3, 2), 0.5))
    dispatched = dispatch(routing._replace(log_weight=routing.weight.log()), 2, capacity=1.0, seq_len=3)
    assert dispatched.token.tolist() == [2]
    assert dispatched.weight.tolist() == [1.0]


@pytest.mark.parametrize("gap", [10.0, 88.0, 104.0, 1e4])
def test_a_token_that_loses_its_best_expert_gives_all_its_weight_to_the_other_one(gap: float) -> None:
    """The weight is 1 and its gradient 0, however small the softmax of the other expert's logit was."""
    logits = torch.tensor([[gap, 0.0], [gap, 0.0]], requires_grad=True)
    log_weight = logits.flatten()
    weight = logits.softmax(-1).flatten()
    token, expert = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    first_fills_expert_0 = torch.tensor([True, False, True, True])
    routing = Routing(token, expert, weight, None, None, log_weight=log_weight).take(first_fills_expert_0)
    dispatched = dispatch(routing, 2, capacity=0.5, seq_len=2)
    assert dispatched.token.tolist() == [0, 1]
    torch.testing.assert_close(dispatched.weight.detach(), torch.ones(2))
    [gradient] = torch.autograd.grad(dispatched.weight.square().sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(2, 2))


@pytest.mark.parametrize("drop", ["position", "score", "random"])
@pytest.mark.parametrize(("experts", "k"), [(64, 1), (64, 4), (128, 2), (256, 2)])
@pytest.mark.parametrize("capacity", [0.9, 1.0, 1.05, 1.25])
def test_the_drop_rate_of_random_logits_agrees_with_theory(drop: str, experts: int, k: int, capacity: float) -> None:
    """The drop rate is E[(X - C)+] / (T k / E) for X ~ N(T p, T p (1 - p)) with p = k / E, for every drop policy.

    X is the load of an expert and C its capacity.
    """
    tokens = 16_384
    dispatched = dispatch(random_routing(tokens, experts, k), experts, capacity=capacity, seq_len=256, drop=drop)
    rate = 1 - (dispatched.kept.sum() / dispatched.offered.sum()).item()
    mean, limit = tokens * k / experts, capacity_per_expert(tokens * k, experts, capacity)
    deviation = (mean * (1 - k / experts)) ** 0.5
    z = (limit - mean) / deviation
    normal = torch.distributions.Normal(0, 1)
    tail = 1 - normal.cdf(torch.tensor(z)).item()
    expected = deviation * (normal.log_prob(torch.tensor(z)).exp().item() - z * tail) / mean
    error = deviation / mean / experts**0.5  # at most one standard deviation of the mean over experts
    assert rate == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 3), (300, 2)])
def test_equally_many_experts_for_each_token_need_no_order_by_token(experts: int, k: int) -> None:
    """What a GPU computes where every token has k experts equals the general way, also in all gradients."""
    routing = random_routing(20, experts, k)
    assert routing.each == k
    assert routing.take(torch.arange(20 * k) % 3 > 0).each is None
    x, gradient = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    found = []
    for each in (True, False):
        rows, weight = x.clone().requires_grad_(), routing.weight.double().requires_grad_()
        routed = routing._replace(weight=weight)
        offered = count(routing.expert, experts)
        sent = _dispatch_each(routed, k, offered) if each else dispatch(routed, experts, capacity=None, seq_len=20)
        assert sent.each == (k if each else None)
        y = combine(gather(rows, sent).sin(), sent, 20)
        y.backward(gradient)
        found.append([sent.token, sent.kept, sent.weight.detach(), y.detach(), rows.grad, weight.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_the_gradient_of_picked_scores_is_that_of_gather() -> None:
    scores, index = torch.randn(9, 5, dtype=torch.float64), torch.rand(9, 5).topk(3).indices
    gradient = torch.randn(9, 3, dtype=torch.float64)
    results = []
    for pick in (_Picked.apply, lambda tensor, places: tensor.gather(-1, places)):
        leaf = scores.clone().requires_grad_()
        picked = pick(leaf, index)
        picked.backward(gradient)
        results.append((picked.detach(), leaf.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
