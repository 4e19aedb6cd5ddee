"""Tests of BASE layers: the assignment against scipy and against all assignments, gates, and evaluation."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from moe.routers.base_layers import BaseLayers, balanced_assignment
from moe.routing.decision import Context, Knobs, Routing

T, D, E = 40, 16, 8


def route(x: Tensor, *, training: bool = True) -> tuple[BaseLayers, Routing]:
    router = BaseLayers(D, E).train(training)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    return router, router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


def total(scores: Tensor, expert: Tensor) -> float:
    return scores.gather(1, expert[:, None]).sum().item()


@pytest.mark.parametrize("skew", [0.0, 1.0, 20.0])
@pytest.mark.parametrize(("tokens", "experts"), [(64, 8), (45, 8), (7, 8), (30, 3), (5, 1), (1, 4)])
def test_no_other_balanced_assignment_has_a_larger_sum(tokens: int, experts: int, skew: float) -> None:
    """Scipy solves the same problem with a column for each place of each expert."""
    generator = torch.Generator().manual_seed(tokens)
    for _ in range(5):
        scores = torch.randn(tokens, experts, generator=generator) + skew * torch.linspace(0, 1, experts)
        expert = balanced_assignment(scores)
        places = math.ceil(tokens / experts)
        assert expert.bincount(minlength=experts).max() <= places
        _, columns = linear_sum_assignment(scores.repeat_interleave(places, 1).double().numpy(), maximize=True)
        assert total(scores, expert) == pytest.approx(total(scores, torch.from_numpy(columns // places)), abs=1e-4)


def test_it_is_the_best_of_all_assignments_of_six_tokens() -> None:
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 0.0, 3.0])
    balanced = [each for each in itertools.product(range(3), repeat=6) if max(np.bincount(each)) == 2]
    best = max(balanced, key=lambda each: total(scores, torch.tensor(each)))
    assert balanced_assignment(scores).tolist() == list(best)


def test_a_chain_of_two_moves_can_be_the_cheapest() -> None:
    """Experts 0 and 1 are full. Token 0 costs 1 to move to expert 1, whose token 2 then moves to expert 2 for 1."""
    scores = torch.tensor([[9.0, 8.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 8.0]])
    assert balanced_assignment(scores).tolist() == [1, 0, 2]


@pytest.mark.parametrize("value", [0.0, 1e30, math.nan, math.inf])
def test_equal_and_broken_scores_are_balanced_too(value: float) -> None:
    expert = balanced_assignment(torch.full((16, 4), value))
    assert expert.bincount(minlength=4).tolist() == [4, 4, 4, 4]


def test_training_is_balanced_and_evaluation_takes_the_largest_logit() -> None:
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)) + 1
    _, trained = route(x)
    router, evaluated = route(x, training=False)
    assert trained.expert.bincount(minlength=E).tolist() == [T // E] * E
    assert evaluated.expert.bincount(minlength=E).max() > T // E
    logits = x @ router.weight.T
    assert torch.equal(evaluated.expert, logits.argmax(-1))
    for routing in (trained, evaluated):
        chosen = logits.gather(1, routing.expert[:, None])[:, 0]
        torch.testing.assert_close(routing.weight, torch.sigmoid(chosen))
