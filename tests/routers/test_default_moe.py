"""Tests of Default MoE: the output and the router's gradient against a loop, and the default outputs."""

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.model.experts import Experts
from moe.model.layer import LayerOutput, MoELayer
from moe.routers.default_moe import DefaultMoE
from moe.routing.decision import Context, Knobs

D, E, T = 16, 8, 40


def make(**settings: float) -> MoELayer:
    torch.manual_seed(0)
    router, experts = DefaultMoE(D, E, **settings), Experts(E, D, hidden=12, kind="silu")
    for p in (*router.parameters(), *experts.parameters()):
        nn.init.normal_(p, std=0.3)
    return MoELayer(router, experts)


def run(layer: MoELayer, x: Tensor) -> LayerOutput:
    return layer(x[None], Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


def outputs_of(layer: MoELayer, x: Tensor) -> Tensor:
    """Return the outputs of all experts (E, T, D)."""
    return layer.experts(x.repeat(E, 1), torch.full((E,), len(x))).view(E, len(x), D).detach()


@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradient_equal_a_loop_that_puts_defaults_in_the_place_of_outputs(training: bool) -> None:
    layer, x = make(k=2).train(training), torch.randn(T, D)
    with torch.no_grad():
        layer.router.default.normal_()
    outputs = outputs_of(layer, x)
    weight = layer.router.weight.detach().clone().requires_grad_()
    rows = []
    for t in range(T):
        p = torch.softmax(weight @ x[t], -1)
        chosen = p.topk(2).indices.tolist()
        terms = [p[e] * (outputs[e, t] if e in chosen else layer.router.default[e]) for e in range(E)]
        rows.append(torch.stack(terms).sum(0))
    expected = torch.stack(rows)
    y = run(layer, x).y[0]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)


def test_defaults_are_a_moving_average_of_mean_outputs_over_the_tokens_of_a_step() -> None:
    layer = make(k=2, decay=0.75)
    with torch.no_grad():
        layer.router.weight[3] = 0
        layer.router.weight[3, 0] = -100.0  # expert 3 gets no token while x_0 > 0
    expected = torch.zeros(E, D)
    for _ in range(3):
        parts = [torch.randn(T, D), torch.randn(T // 2, D)]  # two micro-batches of one step
        for x in parts:
            x[:, 0] = x[:, 0].abs() + 0.1
        stats = [run(layer, x).stats for x in parts]
        x = torch.cat(parts)
        chosen = torch.zeros(len(x), E).scatter(-1, (x @ layer.router.weight.T).topk(2).indices, 1.0)
        for e in range(E):
            if chosen[:, e].any():
                mean = outputs_of(layer, x)[e][chosen[:, e] > 0].mean(0)
                expected[e] = 0.75 * expected[e] + 0.25 * mean
        layer.router.after_step(stats[0].merge(stats[1]))
        torch.testing.assert_close(layer.router.default, expected, rtol=1e-4, atol=1e-6)
    assert (layer.router.default[3] == 0).all()
    assert (layer.router.default[:3] != 0).all()


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_wrong_settings_are_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"router\.decay="):
        DefaultMoE(D, E, decay=decay)
