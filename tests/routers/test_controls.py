"""Tests of the routers that cannot learn and serve as controls: hash and random."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.routers.hash import Hash, scramble, spread
from moe.routers.random import Random
from moe.routing.decision import Context, Knobs, TrainingText

D, E = 16, 8


def test_hash_depends_on_the_token_id_alone() -> None:
    ids = torch.tensor([[5, 9, 5, 700, 9]])
    routing = Hash(D, E, k=2)(torch.randn(5, D), Context(ids, Knobs.of()))
    experts = routing.expert.view(5, 2)
    assert torch.equal(experts[0], experts[2])
    assert torch.equal(experts[1], experts[4])
    assert not torch.equal(experts[0], experts[1])


def test_hash_spreads_ids_evenly_over_experts_and_pairs() -> None:
    """Of 49,152 ids each expert gets 1/E, within five standard deviations of independent draws.

    Each ordered pair of experts gets an equal share too.
    """
    vocab = 49_152
    ids = torch.arange(vocab)[None]
    experts = Hash(D, E, k=2)(torch.zeros(vocab, D), Context(ids, Knobs.of())).expert.view(-1, 2)
    assert (experts[:, 0] != experts[:, 1]).all()
    counts = torch.bincount(experts[:, 0], minlength=E).double()
    assert (counts - vocab / E).abs().max() < 5 * (vocab / E * (1 - 1 / E)) ** 0.5
    pairs = torch.bincount(experts[:, 0] * E + experts[:, 1], minlength=E * E).double()
    expected = vocab / (E * (E - 1))
    assert (pairs[pairs > 0] - expected).abs().max() < 5 * expected**0.5


def test_scramble_is_the_murmur3_finalizer() -> None:
    def reference(h: int) -> int:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert scramble(torch.tensor(numbers)).tolist() == [reference(n) for n in numbers]


def test_the_weight_of_random_is_saved_but_not_trainable() -> None:
    router = Random(D, E, k=2)
    assert list(router.parameters()) == []
    assert list(router.state_dict()) == ["weight"]


def zipf_counts(vocab: int) -> torch.Tensor:
    """Return how often each id occurs in made-up text: the r-th most frequent id occurs 1/r as often as the first.

    Ids are in random order.
    """
    counts = 10_000 // torch.arange(1, vocab + 1)
    return counts[torch.randperm(vocab, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balanced_hash_balances_the_tokens_of_the_text_and_not_the_ids(k: int) -> None:
    """The loads of two experts differ at most by twice the count of the least frequent id, which is assigned last.

    If the most frequent id alone exceeds a mean load, the loads may differ by that excess. The plain hash is far from
    this bound.
    """
    counts = zipf_counts(2000)

    def load_of(router: Hash) -> torch.Tensor:
        router.before_training(TrainingText(counts, ("text",)))
        load = torch.zeros(E, dtype=torch.long)
        return load.index_add(0, router.table[: len(counts)].long().flatten(), counts.repeat_interleave(k))

    load, plain_load = load_of(Hash(D, E, k=k)), load_of(Hash(D, E, k=k, balanced=False))
    assert load.sum() == k * counts.sum()
    assert load.max() - load.min() <= max(10_000 - k * counts.sum() / E, 2 * counts.min())
    assert plain_load.max() - plain_load.min() > 100 * counts.min()


def test_the_experts_of_an_id_are_distinct_and_ids_that_never_occur_keep_their_hash() -> None:
    router = Hash(D, E, k=3, vocab_size=100)
    before = router.table.clone()
    counts = torch.zeros(100, dtype=torch.long)
    counts[:50] = torch.arange(50, 0, -1)
    router.before_training(TrainingText(counts, ("text",)))
    assert all(len(set(row)) == 3 for row in router.table.tolist())
    assert torch.equal(router.table[50:], before[50:])
    assert not torch.equal(router.table[:50], before[:50])
    assert router.state_dict()["table"].shape == (100, 3)


def test_spread_puts_each_number_into_the_bin_with_the_smallest_sum() -> None:
    assert spread(np.array([5, 4, 3, 2]), bins=2, k=1).tolist() == [[0], [1], [1], [0]]


def test_spread_follows_its_rule_also_where_weights_and_loads_are_equal() -> None:
    weights, k = [9, 5, 5, 4, 4, 4, 2, 1, 1, 1, 1, 1], 3
    load, shared = [0] * 5, [[0] * 5 for _ in range(5)]
    for weight, chosen in zip(weights, spread(np.array(weights), 5, k).tolist(), strict=True):
        row: list[int] = []
        while len(row) < k:
            left = [b for b in range(5) if b not in row]
            light = [b for b in left if load[b] < min(load[b] for b in left) + weight]
            row.append(min(light, key=lambda b: sum(shared[a][b] for a in row) if row else load[b]))
        assert chosen == row
        for a in row:
            load[a] += weight
            shared[a] = [old + weight * (b in row) for b, old in enumerate(shared[a])]


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 4), (9, 2)])
def test_balanced_hash_combines_all_pairs_of_experts_evenly(experts: int, k: int) -> None:
    """All pairs of experts share tokens, and with equally frequent ids they share equally many.

    The k lightest experts alone would always be the same ones if k divides E: 4 of 28 pairs for E = 8 and k = 2.
    """
    for counts, tolerance in ((torch.full((3000,), 5), 0.05), (zipf_counts(3000), None)):
        router = Hash(D, experts, k=k)
        router.before_training(TrainingText(counts, ("text",)))
        chosen = F.one_hot(router.table[:3000].long(), experts).sum(1).double()
        assert chosen.max() == 1
        shared = (chosen.T @ (chosen * counts[:, None]))[*torch.triu_indices(experts, experts, 1)]
        if tolerance is None:
            assert shared.min() > 0.2 * shared.mean()
        else:
            torch.testing.assert_close(shared, shared.mean().expand_as(shared), rtol=tolerance, atol=0)


def test_ids_beyond_the_table_wrap_around() -> None:
    router = Hash(D, E, k=2, vocab_size=10)
    experts = router(torch.zeros(2, D), Context(torch.tensor([[3, 13]]), Knobs.of())).expert.view(2, 2)
    assert torch.equal(experts[0], experts[1])
