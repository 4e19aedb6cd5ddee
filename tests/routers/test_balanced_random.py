"""Tests of balanced random routing: even loads, no preference, and fixed experts in evaluation."""

import pytest
import torch

from moe.routers.balanced_random import BalancedRandom
from moe.routers.hash import Hash
from moe.routing.decision import Context, Knobs

D = 4


def experts(router: BalancedRandom, ids: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    routing = router(torch.randn(ids.numel(), D), Context(ids, Knobs.of()))
    assert (routing.weight == 1 / router.k).all()
    return routing.expert.view(-1, router.k)


@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(40, 8, 2), (37, 8, 2), (5, 8, 1), (41, 7, 3), (9, 4, 4)])
def test_the_loads_of_a_micro_batch_differ_by_one_at_most(tokens: int, num_experts: int, k: int) -> None:
    chosen = experts(BalancedRandom(D, num_experts, k=k), torch.zeros(1, tokens, dtype=torch.long))
    loads = torch.bincount(chosen.flatten(), minlength=num_experts)
    assert loads.sum() == tokens * k
    assert loads.max() - loads.min() <= 1
    assert all(len(set(row)) == k for row in chosen.tolist())


def test_a_token_has_each_pair_of_experts_equally_often() -> None:
    """Over 600 seeds, each of the 6 pairs of 4 experts is the first token's in 1/6 of the cases, within 5 deviations.

    Pairs of neighbors alone, as without shuffled experts, would be 4 of the 6.
    """
    router, ids = BalancedRandom(D, 4, k=2), torch.zeros(1, 6, dtype=torch.long)
    pairs = [tuple(sorted(experts(router, ids, seed=seed)[0].tolist())) for seed in range(600)]
    counts = torch.tensor([pairs.count((a, b)) for a in range(4) for b in range(a + 1, 4)]).double()
    assert counts.sum() == 600
    assert (counts - 100).abs().max() < 5 * (600 * 1 / 6 * 5 / 6) ** 0.5


def test_the_seed_decides_in_training_and_the_token_id_in_evaluation() -> None:
    router, ids = BalancedRandom(D, 8, k=2), torch.arange(20)[None]
    assert torch.equal(experts(router, ids), experts(router, ids + 7))
    assert not torch.equal(experts(router, ids), experts(router, ids, seed=1))
    router.eval()
    fixed = Hash(D, 8, k=2)(torch.randn(20, D), Context(ids, Knobs.of())).expert.view(20, 2)
    assert torch.equal(experts(router, ids), fixed)
    assert torch.equal(experts(router, ids, seed=1), fixed)
