"""Tests of the gradient norms and the relative updates of routers and experts."""

import math

import pytest
import torch

from moe.config.model import ModelConfig
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.parts import parts
from moe.training.gradients import copy_parameters, gradient_norms, relative_updates


def make(router: str) -> MoEForCausalLM:
    torch.manual_seed(0)
    size = ModelConfig(dim=16, heads=2, layers=2, ffn=8, num_experts=4, dense_ffn=16)
    return MoEForCausalLM(MoEConfig.of(size, {"_target_": router}, vocab_size=50, seq_len=8))


def test_a_gradient_norm_covers_all_parameters_of_a_part() -> None:
    model = make("moe.routers.topk.TopK")
    ids = torch.randint(0, 50, (2, 8))
    model(ids, ids).loss.backward()
    norms = gradient_norms(parts(model))
    for name, word in (("router", ".router."), ("experts", ".experts.")):
        squares = sum(p.grad.square().sum().item() for key, p in model.named_parameters() if word in key)
        assert norms[f"grad_norm/{name}"] == pytest.approx(math.sqrt(squares), rel=1e-5)
        assert squares > 0


def test_an_update_is_relative_to_the_norm_of_the_weights_before_it() -> None:
    model = make("moe.routers.topk.TopK")
    by_part = parts(model)
    before = copy_parameters(by_part)
    assert relative_updates(by_part, before) == {"update/router": 0, "update/experts": 0}
    with torch.no_grad():
        for p in by_part["experts"]:
            p.mul_(1.25)
    assert relative_updates(by_part, before) == pytest.approx({"update/router": 0, "update/experts": 0.25})


def test_a_part_without_trainable_parameters_is_left_out() -> None:
    assert set(parts(make("moe.routers.hash.Hash"))) == {"experts"}
