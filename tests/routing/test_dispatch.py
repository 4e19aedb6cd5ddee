"""The dispatcher against a dense one-hot einsum, and capacity against a token-by-token queue."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.routing.decision import Routing
from moe.routing.dispatch import capacity_per_expert, combine, dispatch, gather


def random_routing(tokens: int, experts: int, k: int, *, seed: int = 0, skew: float = 0.0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator) + skew * torch.arange(experts)
    expert = scores.topk(k).indices
    return Routing.token_choice(expert, torch.rand(tokens, k, generator=generator))


def queue_reference(routing: Routing, experts: int, seq_len: int, limit: int) -> set[tuple[int, int]]:
    """Assignments served one by one, earliest position first, then sequence, then the router's order."""
    arrivals = sorted(range(len(routing.token)), key=lambda a: (routing.token[a].item() % seq_len, a))
    room, kept = [limit] * experts, set()
    for a in arrivals:
        expert = int(routing.expert[a])
        if room[expert]:
            room[expert] -= 1
            kept.add((int(routing.token[a]), expert))
    return kept


@given(
    tokens=st.sampled_from([1, 6, 24]),
    experts=st.integers(1, 8),
    data=st.data(),
    capacity=st.one_of(st.none(), st.floats(0.1, 3.0)),
    skew=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_plan_against_the_queue(
    tokens: int, experts: int, data: st.DataObject, capacity: float | None, skew: float
) -> None:
    k = data.draw(st.integers(1, experts))
    seq_len = data.draw(st.sampled_from([n for n in (1, 2, 3, 6) if tokens % n == 0]))
    routing = random_routing(tokens, experts, k, skew=skew)
    todo = dispatch(routing, experts, capacity=capacity, seq_len=seq_len)
    limit = len(routing.token) if capacity is None else capacity_per_expert(len(routing.token), experts, capacity)
    expert = torch.repeat_interleave(torch.arange(experts), todo.kept)
    pairs = list(zip(todo.token.tolist(), expert.tolist(), strict=True))
    assert set(pairs) == queue_reference(routing, experts, seq_len, limit)
    assert len(pairs) == len(set(pairs)) == todo.kept.sum()
    assert todo.offered.sum() == tokens * k
    assert todo.kept.max() <= limit
    weights = {(int(t), int(e)): w for t, e, w in zip(routing.token, routing.expert, routing.weight, strict=True)}
    assert all(weights[pair] == w for pair, w in zip(pairs, todo.weight, strict=True))


@pytest.mark.parametrize("capacity", [None, 0.5, 1.0])
def test_gather_and_combine_equal_the_one_hot_einsum(capacity: float | None) -> None:
    tokens, experts, dim = 12, 4, 5
    routing = random_routing(tokens, experts, 2)
    todo = dispatch(routing, experts, capacity=capacity, seq_len=6)
    x = torch.randn(tokens, dim, dtype=torch.float64)
    matrices = torch.randn(experts, dim, dim, dtype=torch.float64)
    expert = torch.repeat_interleave(torch.arange(experts), todo.kept)
    rows = torch.stack([matrices[e] @ x[t] for t, e in zip(todo.token, expert, strict=True)])
    one_hot = torch.zeros(tokens, experts, dtype=torch.float64)
    one_hot[todo.token, expert] = todo.weight.double()
    torch.testing.assert_close(combine(rows, todo, tokens), torch.einsum("te,eij,tj->ti", one_hot, matrices, x))


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_gather_and_combine_have_the_gradients_of_their_definition(capacity: float | None) -> None:
    """In double precision against finite differences; the tokens of the list are in no order."""
    routing = random_routing(6, 3, 2)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    routing = routing._replace(token=routing.token[shuffled], expert=routing.expert[shuffled])
    todo = dispatch(routing, 3, capacity=capacity, seq_len=6)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        rows = gather(x, todo)
        return combine(rows * rows, todo._replace(weight=weight), 6)

    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    weight = todo.weight.double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, weight))
    expected = torch.zeros(6, 2, dtype=torch.float64)
    for token, w in zip(todo.token, weight, strict=True):
        expected[token] += w * x[token] ** 2
    torch.testing.assert_close(layer(x, weight), expected)


def test_nothing_to_do_gives_zeros_and_no_gradient() -> None:
    empty = Routing(*(torch.zeros(0, dtype=kind) for kind in (torch.long, torch.long, torch.float)), None, None)
    todo = dispatch(empty, 3, capacity=None, seq_len=4)
    x = torch.randn(4, 2, requires_grad=True)
    y = combine(gather(x, todo), todo, 4)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_dropless_keeps_everything_and_dropped_tokens_get_zero() -> None:
    routing = random_routing(16, 4, 2, skew=5.0)
    assert dispatch(routing, 4, capacity=None, seq_len=16).kept.sum() == 32
    todo = dispatch(routing, 4, capacity=0.25, seq_len=16)
    dropped = set(range(16)) - set(todo.token.tolist())
    assert dropped
    y = combine(torch.ones(len(todo.token), 3), todo, 16)
    assert (y[list(dropped)] == 0).all()


def test_no_sequence_is_favored_for_standing_first_in_the_batch() -> None:
    """Drops in the order of a flat batch would drop whole later sequences. Here every sequence loses its tail."""
    sequences, length = 4, 8
    everything = Routing.token_choice(
        torch.zeros(sequences * length, 1, dtype=torch.long), torch.ones(sequences * length, 1)
    )
    todo = dispatch(everything, 2, capacity=1.0, seq_len=length)
    served = torch.bincount(todo.token // length, minlength=sequences)
    assert served.tolist() == [length // 2] * sequences
    assert (todo.token % length).max() < length // 2


@pytest.mark.parametrize(
    ("assignments", "experts", "capacity", "expected"), [(100, 8, 1.0, 13), (100, 8, 1.25, 16), (3, 8, 0.1, 1)]
)
def test_slots_round_up_and_leave_at_least_one(assignments: int, experts: int, capacity: float, expected: int) -> None:
    assert capacity_per_expert(assignments, experts, capacity) == expected


def test_gate_weights_get_their_gradient() -> None:
    """d y / d weight is the expert's output: the only path by which the task trains a router."""
    routing = random_routing(6, 3, 2)
    weight: Tensor = routing.weight.clone().requires_grad_()
    todo = dispatch(routing._replace(weight=weight), 3, capacity=None, seq_len=6)
    rows = torch.randn(12, 4)
    combine(rows, todo, 6).sum().backward()
    order = torch.argsort(routing.expert, stable=True)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[order], rows.sum(-1))


def test_dropping_by_score_keeps_the_largest_weights() -> None:
    routing = random_routing(24, 3, 2, seed=3)
    todo = dispatch(routing, 3, capacity=0.5, seq_len=24, drop="score")
    expert = torch.repeat_interleave(torch.arange(3), todo.kept)
    for e in range(3):
        best = routing.weight[routing.expert == e].sort(descending=True).values[: int(todo.kept[e])]
        torch.testing.assert_close(todo.weight[expert == e].sort(descending=True).values, best)


def test_dropping_at_random_is_reproducible_fair_and_within_capacity() -> None:
    everyone = Routing.token_choice(torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1))
    served = torch.zeros(8)
    for seed in range(200):
        torch.manual_seed(seed)
        todo = dispatch(everyone, 2, capacity=1.0, seq_len=8, drop="random")
        assert len(todo.token) == 4
        served[todo.token] += 1
        torch.manual_seed(seed)
        assert torch.equal(dispatch(everyone, 2, capacity=1.0, seq_len=8, drop="random").token, todo.token)
    assert (served - 100).abs().max() < 5 * (200 * 0.25) ** 0.5


def test_weights_are_renormalized_over_the_experts_that_keep_a_token() -> None:
    routing = random_routing(24, 4, 2, skew=1.0)
    kept = dispatch(routing._replace(renormalize=True), 4, capacity=0.6, seq_len=24)
    sums = torch.zeros(24).index_add(0, kept.token, kept.weight)
    reached = torch.bincount(kept.token, minlength=24) > 0
    assert not reached.all()
    torch.testing.assert_close(sums[reached], torch.ones(int(reached.sum())))
    plain = dispatch(routing, 4, capacity=0.6, seq_len=24)
    assert torch.equal(plain.token, kept.token)
    assert not torch.allclose(plain.weight, kept.weight)


@pytest.mark.parametrize("drop", ["position", "score", "random"])
@pytest.mark.parametrize(("experts", "k"), [(64, 1), (64, 4), (128, 2), (256, 2)])
@pytest.mark.parametrize("capacity", [0.9, 1.0, 1.05, 1.25])
def test_drop_rates_of_random_logits_agree_with_theory(drop: str, experts: int, k: int, capacity: float) -> None:
    """E[(X - C)+] / (T k / E) for X ~ N(T p, T p (1 - p)), p = k / E. The policy does not change it."""
    tokens = 16_384
    todo = dispatch(random_routing(tokens, experts, k), experts, capacity=capacity, seq_len=256, drop=drop)
    rate = 1 - (todo.kept.sum() / todo.offered.sum()).item()
    mean, limit = tokens * k / experts, capacity_per_expert(tokens * k, experts, capacity)
    deviation = (mean * (1 - k / experts)) ** 0.5
    z = (limit - mean) / deviation
    normal = torch.distributions.Normal(0, 1)
    tail = 1 - normal.cdf(torch.tensor(z)).item()
    expected = deviation * (normal.log_prob(torch.tensor(z)).exp().item() - z * tail) / mean
    error = deviation / mean / experts**0.5  # one standard deviation of the mean over experts, at most
    assert rate == pytest.approx(expected, abs=4 * error)
