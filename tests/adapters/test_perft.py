"""PERFT against its formulas (2411.08212): what its four kinds have in common, and what each of them computes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from moe.model.causal_lm import load_model
from tests.adapters.models import SPECS, attached, decoder, disturb, ids, model

PERFT = ("r", "e", "d", "s")


def bottleneck(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """U silu(D x), by the formula of the paper."""
    return F.silu(x @ down.T) @ up.T


@pytest.mark.parametrize("kind", ["ours", "mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("name", PERFT)
def test_before_the_first_step_the_logits_are_those_of_the_base_bit_for_bit(kind: str, name: str) -> None:
    base = model(kind)
    before = base(ids()).logits
    torch.testing.assert_close(attached(base, SPECS[name])(ids()).logits, before, rtol=0, atol=0)
    disturb(base)
    assert not torch.allclose(base(ids()).logits, before, atol=1e-3)


def layer_of(name: str, **changes: Any) -> tuple[Any, Tensor, Tensor, Any]:
    """Return a layer with a disturbed adapter, its input and the output of the layer without the adapter."""
    net = decoder()
    attached(net, SPECS[name] | changes)
    disturb(net)
    layer = net.moe_layers[0]
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    net(ids())
    x, context, *_ = seen[0]
    without = copy.deepcopy(layer)
    without.beside = without.beside_experts = None
    return layer, x, without(x, context).y, context


def test_s_adds_one_bottleneck() -> None:
    layer, x, without, context = layer_of("s")
    [down], [up] = layer.beside.experts.up, layer.beside.experts.down
    torch.testing.assert_close(layer(x, context).y, without + bottleneck(x, down, up))


def test_without_an_activation_a_bottleneck_is_the_product_of_its_two_matrices() -> None:
    layer, x, without, context = layer_of("s", activation="identity")
    [down], [up] = layer.beside.experts.up, layer.beside.experts.down
    torch.testing.assert_close(layer(x, context).y, without + x @ (up @ down).T)


def test_d_adds_the_sum_of_as_many_bottlenecks_as_it_has_adapters() -> None:
    layer, x, without, context = layer_of("d")
    [downs], [ups] = layer.beside.experts.up, layer.beside.experts.down
    parts = zip(downs.split(3), ups.split(3, dim=1), strict=True)
    expected = sum((bottleneck(x, down, up) for down, up in parts), without)
    assert len(downs) == 4 * 3
    torch.testing.assert_close(layer(x, context).y, expected)


def test_r_adds_the_bottlenecks_that_its_own_router_chooses_with_the_weights_of_that_router() -> None:
    layer, x, without, context = layer_of("r")
    probs = (x @ layer.beside.router.weight.T).softmax(-1)
    top, chosen = probs.topk(2, dim=-1)
    weights = torch.zeros_like(probs).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
    pairs = zip(layer.beside.experts.up, layer.beside.experts.down, strict=True)
    outputs = torch.stack([bottleneck(x, down, up) for down, up in pairs], -2)
    torch.testing.assert_close(layer(x, context).y, without + (weights[..., None] * outputs).sum(-2))


def test_r_with_one_adapter_of_weight_one_is_s() -> None:
    router = {"_target_": "moe.routers.topk.TopK", "k": 1, "gate": "uniform"}
    layer, x, without, context = layer_of("r", adapters=1, router=router)
    [down], [up] = layer.beside.experts.up, layer.beside.experts.down
    torch.testing.assert_close(layer(x, context).y, without + bottleneck(x, down, up))


def test_e_adds_the_bottlenecks_of_the_chosen_experts_with_the_weights_of_the_layer_s_router() -> None:
    layer, x, without, context = layer_of("e")
    probs = (x @ layer.router.weight.T).softmax(-1)
    top, chosen = probs.topk(2, dim=-1)
    weights = torch.zeros_like(probs).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
    pairs = zip(layer.beside_experts.up, layer.beside_experts.down, strict=True)
    outputs = torch.stack([bottleneck(x, down, up) for down, up in pairs], -2)
    torch.testing.assert_close(layer(x, context).y, without + (weights[..., None] * outputs).sum(-2))


def test_e_with_equal_adapters_and_weights_that_sum_to_one_is_s() -> None:
    layer, x, without, context = layer_of("e")
    with torch.no_grad():
        for stack in layer.beside_experts.parameters():
            stack.copy_(stack[:1].expand_as(stack))
    down, up = layer.beside_experts.up[0], layer.beside_experts.down[0]
    torch.testing.assert_close(layer(x, context).y, without + bottleneck(x, down, up))


@pytest.mark.parametrize("name", PERFT)
@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_a_saved_model_has_its_adapter(name: str, kind: str, tmp_path: Path) -> None:
    net = attached(model(kind), SPECS[name])
    disturb(net)
    net.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.adapter_names == net.adapter_names
    torch.testing.assert_close(loaded(ids()).logits, net(ids()).logits)


@pytest.mark.parametrize("name", PERFT)
def test_the_files_of_an_adapter_give_it_to_another_model_with_the_same_base(name: str, tmp_path: Path) -> None:
    net = attached(decoder(), SPECS[name])
    disturb(net)
    net.adapter.save(net, net.state_dict(), tmp_path)
    other = attached(decoder(), SPECS[name])
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert other.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert tensors.keys() == net.adapter_names
    torch.testing.assert_close(other(ids()).logits, net(ids()).logits, rtol=0, atol=0)


def test_the_losses_and_decisions_of_an_adapter_s_router_are_returned() -> None:
    net = attached(decoder(), SPECS["r"])
    output = net(ids(), ids())
    assert output.beside["aux"]["load_balance"].shape == (2,)
    assert output.beside["load"].sum(-1).eq(2 * ids().numel()).all()
    assert decoder()(ids(), ids()).beside is None


def test_two_models_of_one_seed_get_equal_adapters_and_another_seed_gives_others() -> None:
    first, second = (attached(decoder(), SPECS["r"]) for _ in range(2))
    torch.manual_seed(1)
    third = decoder()
    torch.manual_seed(1)
    attached(third, SPECS["r"])
    name = next(name for name in sorted(first.adapter_names) if name.endswith("beside.experts.up"))
    tensors = [dict(net.named_parameters())[name] for net in (first, second, third)]
    assert torch.equal(tensors[0], tensors[1])
    assert not torch.equal(tensors[0], tensors[2])
