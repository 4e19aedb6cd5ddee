"""Tests that the rule of a router says what the router does in evaluation, for each router in conf/router."""

from typing import Any

import pytest
import torch

from moe.config.classes import build
from moe.config.options import options, router_spec
from moe.foreign.rules import RULES, Rule, bias_of, matrix_of, rule_of
from moe.routers.base import Router
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs

T, D, E = 50, 16, 8
YAMLS = {name: router_spec(name) for name in options("router")}
# What these do in evaluation is no rule: a varying number of experts, or scores that are not linear or no target has.
WITHOUT_RULE = set(
    """
    balanced_random chain_of_experts cosine default_moe document_pool document_pool_causal dtop_p
    expert_choice expert_threshold frozen hash latent_prototypes mlp moe_plus_plus null_experts oracle relu
    replay running_means shuffled_oracle soft_moe spectra sqrt_softplus_bias top_p
    """.split()
)
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in YAMLS),
    ("topk", {"k": 1}),
    ("topk", {"k": E}),
    ("topk", {"k": 3, "gate": "softmax_all"}),
    ("topk", {"k": 1, "gate": "uniform"}),
    ("temperature", {"k": 3, "gate": "softmax_all"}),
    ("gumbel", {"k": 1}),
    ("noisy_topk", {"k": 1}),
    ("group_limited", {"k": 3, "groups": 2, "top_groups": 1, "gate": "softmax_all"}),
    ("group_limited", {"k": 3, "groups": 2, "top_groups": 2}),
    ("group_limited", {"k": 3, "groups": 8, "top_groups": 3, "gate": "uniform"}),
    ("sigmoid_bias", {"k": 3, "normalize": False}),
    ("sigmoid_bias", {"k": 1}),
    ("quantile_balancing", {"k": 1}),
    ("smebu", {"k": 3, "scale": 2.5, "groups": 4, "top_groups": 2}),
    ("sinkhorn", {"k": 1}),
    ("top_p", {"k_max": 1}),
    ("top_p", {"p": 1.0, "k_max": 3}),
    ("chain_of_experts", {"iterations": 1, "k": 3}),
]


def make(name: str, settings: dict[str, Any]) -> Router:
    """Return a router in evaluation whose parameters and buffers of floating-point numbers are random."""
    router = build(YAMLS[name] | settings, "router", D, E)
    generator = torch.Generator().manual_seed(0)
    for tensor in [*router.parameters(), *router.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return router.eval()


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_a_rule_gives_the_weights_that_the_router_gives_in_evaluation(name: str, settings: dict[str, Any]) -> None:
    """Temperature 0.7 and noise are on: the noise acts in training alone, and some routers ignore the temperature."""
    router = make(name, settings)
    rule = rule_of(router, temperature=0.7)
    assert (rule is None) == (name in WITHOUT_RULE and not settings)
    if rule is None:
        return
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    knobs = Knobs.of(temperature=0.7, noise=0.5)
    [link] = router.chain
    routing = link(x, Context(torch.zeros(1, T, dtype=torch.long), knobs))
    given = torch.zeros(T, E).index_put((routing.token, routing.expert), routing.weight, accumulate=True)
    matrix = matrix_of(router)
    assert matrix is not None
    expected = rule.gates(x @ matrix.T, bias_of(router)).float()
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-5)


def test_routers_that_use_the_plan_or_another_class_have_no_rule() -> None:
    """A class of somebody else that inherits from one of ours may do anything."""

    class Mine(TopK):
        pass

    assert rule_of(make("sinkhorn", {"inference": True})) is None
    assert rule_of(Mine(D, E)) is None
    assert Mine not in RULES


def test_groups_and_a_factor_act_as_in_a_calculation_by_hand() -> None:
    rule = Rule(1, scores="sigmoid", weights="raw", factor=2.5, biased=True, groups=2, top_groups=1)
    logits = torch.tensor([[3.0, -3.0, 1.0, 1.0]])  # the second group has the larger sum, the first the largest score
    s = 1 / (1 + torch.tensor(-1.0).double().exp())
    torch.testing.assert_close(rule.gates(logits), torch.tensor([[0, 0, 2.5, 0]]).double() * s)
    bias = torch.tensor([1.0, 0.0, 0.0, 0.5])  # now the first group wins: 0.953 + 1 + 0.047 < 0.731 + 0.731 + 0.5
    assert rule.gates(logits, bias).argmax() == 0
