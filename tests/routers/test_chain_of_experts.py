"""Tests of the chain of experts: its iterations against a loop, and one iteration against top-k."""

import pytest
import torch
from torch import nn

from moe.checks import ConfigError
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.chain_of_experts import ChainOfExperts
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs

B, S, D, E = 2, 6, 8, 4


def make_layer(router: nn.Module) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(router, Experts(E, D, hidden=5, kind="silu"))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.7)
    return layer


def context() -> Context:
    return Context(torch.zeros(B, S, dtype=torch.long), Knobs.of())


def test_one_iteration_equals_top_k() -> None:
    chain, plain = make_layer(ChainOfExperts(D, E, iterations=1, k=2)), make_layer(TopK(D, E, k=2))
    x = torch.randn(B, S, D)
    a, b = chain(x, context()), plain(x, context())
    assert torch.equal(a.y, b.y)
    assert a.aux.keys() == b.aux.keys()
    assert all(torch.equal(p, q) or p.isnan().all() for p, q in zip(a.stats, b.stats, strict=True))


def test_each_iteration_has_its_own_router_and_gets_the_output_of_the_previous_one() -> None:
    layer = make_layer(ChainOfExperts(D, E, iterations=3, k=1))
    x = torch.randn(B, S, D)
    state = x
    for router in layer.router.chain:
        single = MoELayer(router, layer.experts)
        state = state + single(state, context()).y
    torch.testing.assert_close(layer(x, context()).y, state - x)
    weights = [router.weight for router in layer.router.chain]
    assert not torch.equal(weights[0], weights[1])


def test_losses_are_means_over_iterations_and_assignments_are_sums() -> None:
    layer = make_layer(ChainOfExperts(D, E, iterations=2, k=1))
    x = torch.randn(B, S, D)
    first = MoELayer(layer.router.chain[0], layer.experts)(x, context())
    second = MoELayer(layer.router.chain[1], layer.experts)(x + first.y, context())
    both = layer(x, context())
    expected = (first.aux["load_balance"] + second.aux["load_balance"]) / 2
    torch.testing.assert_close(both.aux["load_balance"], expected)
    assert torch.equal(both.stats.offered, first.stats.offered + second.stats.offered)
    assert both.stats.assignments == 2 * B * S
    assert layer.router.experts_per_token(S) == 2


def test_the_global_balance_loss_of_an_iteration_counts_the_earlier_loads_of_that_iteration() -> None:
    """If iteration 0 always takes expert 0 and iteration 1 always expert 1, the loss stays E over all micro-batches.

    The loads of both iterations together would look better than each of them.
    """
    layer = make_layer(ChainOfExperts(D, E, iterations=2, k=1))
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.zero_()
        for number, router in enumerate(layer.router.chain):
            router.weight.zero_()[number] = 20.0
    load = None
    for _ in range(4):
        output = layer(torch.rand(B, S, D) + 0.5, context()._replace(load=load))
        assert output.aux["load_balance_global"].item() == pytest.approx(E)
        load = output.load if load is None else load + output.load
    assert load.tolist() == [[4 * B * S, 0, 0, 0], [0, 4 * B * S, 0, 0]]


def test_zero_iterations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"router\.iterations=0"):
        ChainOfExperts(D, E, iterations=0)
