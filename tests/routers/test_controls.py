"""The controls that cannot learn: hash and random."""

import torch

from moe.routers.hash import Hash, scramble
from moe.routers.random import Random
from moe.routing import Context, Knobs

D, E = 16, 8


def test_hash_looks_at_the_token_id_alone() -> None:
    ids = torch.tensor([[5, 9, 5, 700, 9]])
    routing = Hash(D, E, k=2)(torch.randn(5, D), Context(ids, Knobs.of()))
    experts = routing.expert.view(5, 2)
    assert torch.equal(experts[0], experts[2])
    assert torch.equal(experts[1], experts[4])
    assert not torch.equal(experts[0], experts[1])


def test_hash_spreads_ids_evenly_over_experts_and_pairs() -> None:
    """49,152 ids: each expert gets 1/E of them within five standard deviations of independent draws."""
    vocab = 49_152
    ids = torch.arange(vocab)[None]
    experts = Hash(D, E, k=2)(torch.zeros(vocab, D), Context(ids, Knobs.of())).expert.view(-1, 2)
    assert (experts[:, 0] != experts[:, 1]).all()
    counts = torch.bincount(experts[:, 0], minlength=E).double()
    assert (counts - vocab / E).abs().max() < 5 * (vocab / E * (1 - 1 / E)) ** 0.5
    pairs = torch.bincount(experts[:, 0] * E + experts[:, 1], minlength=E * E).double()
    expected = vocab / (E * (E - 1))
    assert (pairs[pairs > 0] - expected).abs().max() < 5 * expected**0.5


def test_scramble_is_the_murmur3_finaliser() -> None:
    def reference(h: int) -> int:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert scramble(torch.tensor(numbers)).tolist() == [reference(n) for n in numbers]


def test_random_is_frozen_and_saved() -> None:
    router = Random(D, E, k=2)
    assert list(router.parameters()) == []
    assert list(router.state_dict()) == ["weight"]
