"""Tests that the yaml files that only set options of `TopK` do what their first line says."""

from typing import Any

import torch
from torch import nn

from moe.config.classes import build
from moe.config.options import router_spec
from moe.routers.base import Router
from moe.routing.decision import Context, Knobs, Routing

T, D, E = 40, 16, 8


def settings(name: str) -> dict[str, Any]:
    return router_spec(name)


def make(name: str) -> Router:
    router = build(settings(name), "router", D, E)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def route(name: str) -> Routing:
    return make(name)(torch.randn(T, D), Context(torch.zeros(1, T, dtype=torch.long), Knobs.of()))


def test_switch_takes_the_most_probable_expert_with_its_probability() -> None:
    routing = route("switch")
    assert routing.probs is not None
    torch.testing.assert_close(routing.weight, routing.probs.max(-1).values)
    assert torch.equal(routing.expert, routing.probs.argmax(-1))


def test_switch_jitter_is_switch_in_evaluation_alone() -> None:
    torch.manual_seed(0)
    x, context = torch.randn(T, D), Context(torch.zeros(1, T, dtype=torch.long), Knobs.of())
    plain, jitter = make("switch"), make("switch_jitter")
    assert not torch.equal(plain(x, context).weight, jitter(x, context).weight)
    assert torch.equal(plain.eval()(x, context).weight, jitter.eval()(x, context).weight)


def test_sqrt_softplus_bias_is_sigmoid_bias_with_other_scores() -> None:
    assert settings("sqrt_softplus_bias") == settings("sigmoid_bias") | {"scores": "sqrt_softplus"}


def test_top2_takes_two_experts_in_proportion_to_their_probabilities() -> None:
    routing = route("top2")
    assert routing.probs is not None
    best = routing.probs.topk(2).values
    torch.testing.assert_close(routing.weight.view(T, 2), best / best.sum(-1, keepdim=True))


def test_topk_hard_gives_the_selected_experts_equal_weights() -> None:
    torch.testing.assert_close(route("topk_hard").weight, torch.full((2 * T,), 0.5))
