"""Tests of DenseMixer: outputs and the experts' gradients of top-k, and the router's gradient of a dense mixture."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.dense_mixer import DenseMixer
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs

D, E, T = 16, 8, 40
Gate = Literal["renorm", "softmax_all"]


def layer_with(kind: type[TopK], **settings: object) -> MoELayer:
    torch.manual_seed(0)
    router, experts = kind(D, E, **settings), Experts(E, D, hidden=12, kind="silu")
    for p in (*router.parameters(), *experts.parameters()):
        nn.init.normal_(p, std=0.3)
    return MoELayer(router, experts)


def run(layer: MoELayer) -> Tensor:
    x = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1))
    y = layer(x, Context(torch.zeros(1, T, dtype=torch.long), Knobs.of())).y
    direction = torch.randn(1, T, D, generator=torch.Generator().manual_seed(2))
    (y * direction).sum().backward()
    return y


@pytest.mark.parametrize("gate", ["renorm", "softmax_all"])
@pytest.mark.parametrize("k", [1, 2, E])
def test_the_gradient_of_the_router_is_that_of_a_dense_mixture_with_constant_outputs(k: int, gate: Gate) -> None:
    """y = sum_i w_i E_i(x) over all experts, E_i(x) constant. The reference is written with a loop over experts."""
    mixer, topk = layer_with(DenseMixer, k=k, gate=gate), layer_with(TopK, k=k, gate=gate)
    torch.testing.assert_close(run(mixer), run(topk), rtol=0, atol=0)
    for own, other in zip(mixer.experts.parameters(), topk.experts.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)

    x = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1))[0]
    direction = torch.randn(1, T, D, generator=torch.Generator().manual_seed(2))[0]
    weight = topk.router.weight.detach().clone().requires_grad_()
    probs = torch.softmax(x @ weight.T, -1)
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(k).indices, 1.0)
    total = (probs * chosen).sum(-1, keepdim=True)
    y = torch.zeros(T, D)
    for e in range(E):
        counts = torch.zeros(E, dtype=torch.long)
        counts[e] = T
        output = topk.experts(x, counts).detach()
        gates = probs[:, e : e + 1]
        if gate == "renorm" and k > 1:
            gates = torch.where(chosen[:, e : e + 1] > 0, gates / total, gates / total.detach())
        y = y + gates * output
    (y * direction).sum().backward()
    torch.testing.assert_close(mixer.router.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)
    if k < E:
        assert not torch.allclose(mixer.router.weight.grad, topk.router.weight.grad, rtol=0.1)


def test_evaluation_runs_only_the_chosen_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_with(DenseMixer, k=2).eval()
    rows: list[int] = []
    layer.experts.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    run(layer)
    assert rows == [2 * T]
    run(layer.train())
    assert rows == [2 * T, 2 * T, E * T]
