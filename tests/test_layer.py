"""Experts and the layer against slow references."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

from moe.experts import Experts
from moe.layer import MoELayer
from moe.routers.topk import TopK
from moe.routing import Context, Knobs, RoutingStats

D, E, H = 8, 4, 12


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    return module


@pytest.mark.parametrize("kind", ["silu", "swiglu"])
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 10, 0], [10, 0, 0, 0]])
def test_experts_row_by_row(kind: str, counts: list[int]) -> None:
    experts = filled(Experts(E, D, hidden=H, kind=kind))
    x = torch.randn(10, D)
    y = experts(x, torch.tensor(counts))
    owner = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    for row, e, out in zip(x, owner, y, strict=True):
        hidden = F.silu(experts.up[e] @ row)
        if kind == "swiglu":
            hidden = F.silu(experts.gate[e] @ row) * (experts.up[e] @ row)
        torch.testing.assert_close(out, experts.down[e] @ hidden)


def test_expert_gradients_in_double_precision() -> None:
    experts = filled(Experts(3, 4, hidden=5, kind="swiglu")).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: experts(rows, torch.tensor([2, 0, 4])), x)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_identical_experts_are_a_dense_feed_forward(k: int) -> None:
    """With renormalised gates the weights sum to 1, so routing cannot matter; with k=1 the gate p scales the output."""
    experts = filled(Experts(E, D, hidden=H, kind="silu"))
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(p[:1].expand_as(p))
    router = filled(TopK(D, E, k=k))
    x = torch.randn(2, 5, D)
    ids = torch.zeros(2, 5, dtype=torch.long)
    dense = F.linear(F.silu(F.linear(x, experts.up[0])), experts.down[0])
    gate = router(x.view(-1, D), Context(ids, Knobs.of())).weight.view(10, k).sum(-1).view(2, 5, 1)
    torch.testing.assert_close(MoELayer(router, experts)(x, Context(ids, Knobs.of())).y, dense * gate)
    if k > 1:
        torch.testing.assert_close(gate, torch.ones_like(gate))


def test_shared_experts_add_to_the_routed_ones() -> None:
    router, experts = filled(TopK(D, E)), filled(Experts(E, D, hidden=H, kind="silu"))
    shared = filled(nn.Linear(D, D))
    x, context = torch.randn(2, 5, D), Context(torch.zeros(2, 5, dtype=torch.long), Knobs.of())
    alone, both = MoELayer(router, experts)(x, context), MoELayer(router, experts, shared)(x, context)
    torch.testing.assert_close(both.y, alone.y + shared(x))


def test_statistics_are_detached_and_merging_halves_is_the_whole() -> None:
    layer = MoELayer(filled(TopK(D, E)), filled(Experts(E, D, hidden=H, kind="silu")))
    x, ids = torch.randn(6, 5, D), torch.zeros(6, 5, dtype=torch.long)
    whole = layer(x, Context(ids, Knobs.of())).stats
    halves = [layer(part, Context(ids[:3], Knobs.of())).stats for part in (x[:3], x[3:])]
    for name, merged, field in zip(RoutingStats._fields, halves[0].merge(halves[1]), whole, strict=True):
        assert not field.requires_grad
        if name not in ("batches", "max_violation"):  # the two that are about micro-batches
            torch.testing.assert_close(merged, field, equal_nan=True)


@pytest.mark.parametrize("k", [2, 3])
def test_the_layer_equals_transformers_mixtral_block(k: int) -> None:
    """An implementation by other hands: same weights, same output and same gradient of the input."""
    config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "eager"
    block = filled(MixtralSparseMoeBlock(config))
    experts, router = Experts(E, D, hidden=H, kind="swiglu"), TopK(D, E, k=k)
    with torch.no_grad():
        gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
        experts.gate.copy_(gate)
        experts.up.copy_(up)
        experts.down.copy_(block.experts.down_proj)
        router.weight.copy_(block.gate.weight)
    ours, theirs = (torch.randn(2, 5, D, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    y = MoELayer(router, experts)(ours.requires_grad_(), Context(torch.zeros(2, 5, dtype=torch.long), Knobs.of())).y
    reference = block(theirs.requires_grad_())
    reference = reference[0] if isinstance(reference, tuple) else reference
    torch.testing.assert_close(y, reference)
    for output in (y, reference):
        output.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
