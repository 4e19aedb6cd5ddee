"""Tests of expert choice: loads are equal, gates are probabilities, and some tokens get no expert."""

import math

import pytest
import torch
from torch import nn

from moe.checks import ConfigError
from moe.routers.expert_choice import ExpertChoice
from moe.routing.decision import Context, Knobs, Routing
from moe.routing.losses import load_balance

D, E, T = 16, 8, 50


def route(tokens: int, *, capacity_factor: float = 2.0) -> Routing:
    router = ExpertChoice(D, E, capacity_factor=capacity_factor)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))
    return router(x, Context(torch.zeros(1, tokens, dtype=torch.long), Knobs.of()))


@pytest.mark.parametrize("capacity_factor", [0.1, 1.0, 2.0, 8.0])
def test_every_expert_takes_its_most_probable_tokens_and_gates_are_their_probabilities(capacity_factor: float) -> None:
    routing = route(T, capacity_factor=capacity_factor)
    assert routing.logits is not None
    probs = torch.softmax(routing.logits, -1)
    for e in range(E):
        of_expert = routing.expert == e
        best = sorted(range(T), key=lambda t: -probs[t, e].item())[: math.ceil(capacity_factor * T / E)]
        assert routing.token[of_expert].tolist() == best
        torch.testing.assert_close(routing.weight[of_expert], probs[best, e])


@pytest.mark.parametrize("tokens", [1, 3, 7, T])
@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 2.0, 8.0])
def test_loads_are_equal_for_every_batch_size(tokens: int, capacity_factor: float) -> None:
    loads = torch.bincount(route(tokens, capacity_factor=capacity_factor).expert, minlength=E)
    assert loads.tolist() == [math.ceil(capacity_factor * tokens / E)] * E
    assert loads.max() <= tokens


def test_a_token_gets_any_number_of_experts_and_some_get_none() -> None:
    counts = torch.bincount(route(400, capacity_factor=1.0).token, minlength=400)
    assert counts.float().mean() == 1.0
    assert counts.min() == 0
    assert counts.max() > 1


def test_the_balance_loss_is_constant() -> None:
    routing = route(T)
    assert routing.probs is not None
    assert load_balance(routing.probs, torch.bincount(routing.expert, minlength=E)).item() == pytest.approx(1)


@pytest.mark.parametrize("capacity_factor", [0.0, -1.0, E + 0.1, math.inf, math.nan])
def test_a_capacity_factor_of_zero_or_above_the_number_of_experts_is_refused(capacity_factor: float) -> None:
    with pytest.raises(ConfigError, match=r"router\.capacity_factor=.*above 0, at most model\.num_experts=8"):
        ExpertChoice(D, E, capacity_factor=capacity_factor)
