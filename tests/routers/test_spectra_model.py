"""Tests of SPECTRA in a model: all layers share one GRU, and each layer passes its state to the next."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe.config.model import ModelConfig
from moe.config.sections import OptimizerConfig
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.cost import flops_per_token
from moe.model.parts import parts
from moe.routing.decision import Context, Knobs
from moe.training.optim import build_optimizers

V, S = 97, 16


def make_model(**changes: Any) -> MoEForCausalLM:
    sizes = {"dim": 32, "heads": 2, "layers": 3, "ffn": 32, "num_experts": 4, "dense_ffn": 64, "shared_experts": 1}
    router = {"_target_": "moe.routers.spectra.Spectra", "router_dim": 4}
    torch.manual_seed(0)
    config = MoEConfig.of(ModelConfig(**sizes, first_k_dense_replace=1), router | changes, vocab_size=V, seq_len=S)
    model = MoEForCausalLM(config)
    for layer in model.moe_layers:
        nn.init.normal_(layer.router.mean_expression)
        nn.init.normal_(layer.router.load, mean=0.25, std=0.1)
        layer.router.steps.fill_(7)
    return model.eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(1))


def test_all_layers_share_one_gru_and_lists_of_parameters_contain_it_once() -> None:
    model = make_model()
    first, second = (layer.router for layer in model.moe_layers)
    assert first.gru is second.gru
    assert first.projector is not second.projector
    both = parts(model)["router"]
    assert len(both) == len({id(p) for p in both}) == 4 + 2
    settings = OptimizerConfig(muon_lr=0.02, adamw_lr=0.01)
    optimized = [p for o in build_optimizers(model, settings) for g in o.param_groups for p in g["params"]]
    assert len(optimized) == len(set(optimized)) == len(list(model.parameters()))


def test_flops_count_the_shared_gru_in_every_layer() -> None:
    """FLOPs count the shared GRU once per layer.

    Each of the two layers has a state of width 16 and hidden states of width 32. The GRU has 3 (16 * 32 + 16 * 16)
    weights, and the linear map that replaces it has 16 * 32.
    """
    gru, linear = flops_per_token(make_model(), S), flops_per_token(make_model(gru=False), S)
    assert gru - linear == 2 * 2 * (3 * (16 * 32 + 16 * 16) - 16 * 32)


def test_a_saved_and_loaded_model_has_equal_outputs_and_still_shares_the_gru(ids: Tensor, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    first, second = (layer.router for layer in loaded.moe_layers)
    assert first.gru.weight_hh is second.gru.weight_hh
    assert second.steps == 7


def test_loading_a_state_dict_restores_the_shared_gru(ids: Tensor, tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    for p in other.parameters():
        nn.init.normal_(p)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_in_evaluation_outputs_do_not_depend_on_later_tokens_or_other_sequences(ids: Tensor) -> None:
    model, changed = make_model(), ids.clone()
    changed[:, 9:], changed[1:] = 5, 7
    torch.testing.assert_close(model(ids).logits[0, :9], model(changed).logits[0, :9], atol=1e-5, rtol=0)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(ids[order]).logits, model(ids).logits[order], atol=1e-5, rtol=0)


def test_generation_with_a_cache_equals_generation_without(ids: Tensor) -> None:
    """Generation with a cache equals generation without one. No cache needs to store the state, because the state of a
    token depends on that token alone.
    """
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (make_model().generate(ids[:1, :5], use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for a, b in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_second_layer_uses_the_state_of_the_first(ids: Tensor) -> None:
    model = make_model()
    routings = [layer[0] for layer in model(ids).routing]
    context = Context(ids, Knobs.of())
    inputs: list[Tensor] = []
    second = model.moe_layers[1].router
    second.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model(ids)
    torch.testing.assert_close(second(inputs[0], context._replace(state=routings[0].state)).probs, routings[1].probs)
    assert not torch.allclose(second(inputs[0], context).probs, routings[1].probs)
