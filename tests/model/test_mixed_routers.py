"""Tests of models whose layers have different routers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import run
from transformers import AutoModelForCausalLM

from moe.config.cell import Cell
from moe.config.checkpoints import saved
from moe.config.model import ModelConfig
from moe.metrics.summary import summarize
from moe.model.causal_lm import MoEConfig, MoEForCausalLM, load_model
from moe.model.cost import count_parameters, flops_per_token
from moe.routers.hash import Hash
from moe.routers.spectra import Spectra
from moe.routers.topk import TopK
from moe.routing.decision import Knobs

V, S = 61, 8
TOPK = {"_target_": "moe.routers.topk.TopK", "k": 2}
SPECTRA = {"_target_": "moe.routers.spectra.Spectra", "k": 2}


def make(routers: str | None, router: dict[str, Any] = TOPK, **changes: Any) -> MoEForCausalLM:
    sizes: dict[str, Any] = {"dim": 16, "heads": 2, "layers": 3, "ffn": 8, "num_experts": 4, "dense_ffn": 16}
    model = ModelConfig(**{**sizes, "routers": routers, **changes})
    torch.manual_seed(0)
    return MoEForCausalLM(MoEConfig.of(model, router, vocab_size=V, seq_len=S)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (2, S), generator=torch.Generator().manual_seed(1))


def test_a_layer_that_is_given_the_router_of_the_others_changes_no_bit(ids: torch.Tensor) -> None:
    plain, spelled = make(None), make("1:topk")
    assert torch.equal(plain(ids).logits, spelled(ids).logits)


def test_each_layer_has_its_router_its_k_and_its_flops(ids: torch.Tensor) -> None:
    model = make("1:hash+2:k:1")
    assert [type(layer.router) for layer in model.moe_layers] == [TopK, Hash, TopK]
    output = model(ids)
    assert summarize(output.stats)["routing/active_experts/layer00"] == 2
    assert summarize(output.stats)["routing/active_experts/layer02"] == 1
    assert output.aux["load_balance"].ne(0).tolist() == [True, False, True]  # hash has no probabilities
    matrices = 3 * 4 * 16 * 16 + (2 + 2 + 1) * 2 * 16 * 8 + 2 * 4 * 16 + V * 16
    assert flops_per_token(model, S) == 2 * matrices + 3 * 2 * 16 * S
    assert count_parameters(model).total - count_parameters(model).active == (2 + 2 + 3) * 2 * 16 * 8
    assert not hasattr(model.config, "num_experts_per_tok")
    assert make("1:hash").config.num_experts_per_tok == 2


def test_dense_layers_count_as_layers(ids: torch.Tensor) -> None:
    model = make("1:hash", first_k_dense_replace=1)
    assert [type(layer.router) for layer in model.moe_layers] == [Hash, TopK]
    model(ids)


def test_routers_share_modules_and_state_only_with_their_like(ids: torch.Tensor) -> None:
    """In SPECTRA, all layers share a GRU, whose state goes from layer to layer. After another router it starts anew."""
    model = make("1:hash", SPECTRA)
    first, other, last = [layer.router for layer in model.moe_layers]
    assert isinstance(first, Spectra)
    assert {*first.parameters()} & {*last.parameters()}
    assert not {*first.parameters()} & {*other.parameters()}
    states = []
    last.register_forward_pre_hook(lambda module, inputs: states.append(inputs[1].state))
    model(ids)
    assert states == [None]


def test_a_saved_model_has_the_routers_of_its_layers(ids: torch.Tensor, tmp_path: Path) -> None:
    model = make("0:hash+0:k:1")
    model.save_pretrained(tmp_path)
    for loaded in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert saved.resolve(str(tmp_path), None)["routers"] == "0:hash+0:k:1"


def test_routers_that_learn_without_gradients_learn_in_their_own_layers(cell: Callable[..., Cell]) -> None:
    """Their sums have other widths: E D of running means, E of the threshold. All parts of a layer train with them."""
    parts = ["model.shared_experts=1", "model.shared_gate=true", "model.latent_dim=8", "model.router_input=attention"]
    one = cell("router=running_means", "model.routers=0:quantile_balancing", *parts, "steps=2", "eval_every=2")
    run(one)
    routers = [layer.router for layer in load_model(one.folder / "model").moe_layers]
    assert routers[0].bias.abs().sum() > 0
    assert routers[1].mean.isfinite().all()
    assert routers[1].mean.abs().sum() > 0


def test_the_temperature_acts_only_in_layers_whose_router_has_one(ids: torch.Tensor) -> None:
    model = make("1:temperature+1:temp:5")
    assert model.config.router_temperature == 5
    hot, cold = (model(ids, knobs=Knobs.of(temperature=each)).routing for each in (5.0, 1.0))
    assert torch.equal(hot[0][0].probs, cold[0][0].probs)
    assert not torch.allclose(hot[1][0].probs, cold[1][0].probs)
    assert torch.equal(model(ids).routing[1][0].probs, hot[1][0].probs)
