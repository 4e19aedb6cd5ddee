"""The dispatcher against a dense one-hot einsum, and capacity against a token-by-token queue."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.dispatch import combine, plan, slots
from moe.routing import Routing


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
    todo = plan(routing, experts, capacity=capacity, seq_len=seq_len)
    limit = len(routing.token) if capacity is None else slots(len(routing.token), experts, capacity)
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
    todo = plan(routing, experts, capacity=capacity, seq_len=6)
    x = torch.randn(tokens, dim, dtype=torch.float64)
    matrices = torch.randn(experts, dim, dim, dtype=torch.float64)
    expert = torch.repeat_interleave(torch.arange(experts), todo.kept)
    rows = torch.stack([matrices[e] @ x[t] for t, e in zip(todo.token, expert, strict=True)])
    one_hot = torch.zeros(tokens, experts, dtype=torch.float64)
    one_hot[todo.token, expert] = todo.weight.double()
    torch.testing.assert_close(combine(rows, todo, tokens), torch.einsum("te,eij,tj->ti", one_hot, matrices, x))


def test_dropless_keeps_everything_and_dropped_tokens_get_zero() -> None:
    routing = random_routing(16, 4, 2, skew=5.0)
    assert plan(routing, 4, capacity=None, seq_len=16).kept.sum() == 32
    todo = plan(routing, 4, capacity=0.25, seq_len=16)
    dropped = set(range(16)) - set(todo.token.tolist())
    assert dropped
    y = combine(torch.ones(len(todo.token), 3), todo, 16)
    assert (y[list(dropped)] == 0).all()


def test_no_sequence_is_favoured_for_standing_first_in_the_batch() -> None:
    """First come by flattened order would drop whole later sequences: here every sequence loses its tail."""
    sequences, length = 4, 8
    everything = Routing.token_choice(
        torch.zeros(sequences * length, 1, dtype=torch.long), torch.ones(sequences * length, 1)
    )
    todo = plan(everything, 2, capacity=1.0, seq_len=length)
    served = torch.bincount(todo.token // length, minlength=sequences)
    assert served.tolist() == [length // 2] * sequences
    assert (todo.token % length).max() < length // 2


@pytest.mark.parametrize(
    ("assignments", "experts", "capacity", "expected"), [(100, 8, 1.0, 13), (100, 8, 1.25, 16), (3, 8, 0.1, 1)]
)
def test_slots_round_up_and_leave_at_least_one(assignments: int, experts: int, capacity: float, expected: int) -> None:
    assert slots(assignments, experts, capacity) == expected


def test_gate_weights_get_their_gradient() -> None:
    """d y / d weight is the expert's output: the only path by which the task trains a router."""
    routing = random_routing(6, 3, 2)
    weight: Tensor = routing.weight.clone().requires_grad_()
    todo = plan(routing._replace(weight=weight), 3, capacity=None, seq_len=6)
    rows = torch.randn(12, 4)
    combine(rows, todo, 6).sum().backward()
    order = torch.argsort(routing.expert, stable=True)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[order], rows.sum(-1))
