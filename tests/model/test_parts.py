"""Tests of the parts of a model: every parameter belongs to exactly one, in our decoder and in imported models."""

import re
from typing import Any

import pytest
import torch
from architectures import SPECIAL, around, tiny

from moe.checks import ConfigError
from moe.config.model import ModelConfig
from moe.config.trainable import PARTS
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.parts import freeze, learning_routers, names_of, part_of, parts

# The parts by the names that the authors of these models gave: the first pattern that is found counts.
NAMES = {
    "norms": r"norm[^.]*\.(weight|bias)$|norm_\d\.weight$",
    "experts": r"\.(mlp|ffn|feed_forward|block_sparse_moe|mixer)\.experts\.",
    "router": r"\.(mlp|ffn|feed_forward|block_sparse_moe|mixer)\.(gate|router)\.",
    "shared": r"\.(mlp|feed_forward|shared_mlp)\.|\.mixer\.(shared_experts|up_proj|down_proj)\.",
    "attention": r"\.(self_attn|linear_attn|attn|mamba|mixer|conv|attn_hc|ffn_hc|hc_head)\.",
    "embeddings": r"embed_tokens|lm_head|\.wte\.|model\.embeddings\.",
}


def by_name(name: str) -> str:
    return next(part for part, pattern in NAMES.items() if re.search(pattern, name))


def ours(router: dict[str, Any] | None = None, **changes: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 2, "layers": 3, "ffn": 8, "num_experts": 4, "dense_ffn": 16}
    model = ModelConfig(
        **{**sizes, "shared_experts": 1, "shared_gate": True, "latent_dim": 4, "first_k_dense_replace": 1, **changes}
    )
    spec = router or {"_target_": "moe.routers.topk.TopK"}
    return MoEForCausalLM(MoEConfig.of(model, spec, vocab_size=50, seq_len=8))


@pytest.mark.parametrize("kind", SPECIAL)
def test_the_parts_of_an_imported_model_are_those_that_its_names_say(kind: str) -> None:
    model = around(tiny(kind))
    part = part_of(model)
    assert {*model.parameters()} <= part.keys()
    expected = {name: by_name(name) for name, _ in tiny(kind).named_parameters()}
    found = {name: part[tensor] for name, tensor in names_of(model).items() if name in expected}
    assert found == expected
    assert {"router", "experts", "attention", "embeddings", "norms"} <= {*expected.values()}


def test_the_parts_of_our_decoder_add_up_to_the_whole() -> None:
    model = ours()
    part = part_of(model)
    sizes = dict.fromkeys(PARTS, 0)
    for p in model.parameters():
        sizes[part[p]] += p.numel()
    assert sizes == {
        "router": 2 * 4 * 16,
        "experts": 2 * 2 * 4 * 4 * 8,  # in a latent of width 4
        "shared": 2 * 2 * 16 * 8 + 2 * 16 * 16 + 2 * (16 + 2 * 4 * 16),  # with the gates and the latents
        "attention": 3 * 4 * 16 * 16,
        "embeddings": 50 * 16,  # the output matrix is tied to the embedding
        "norms": 7 * 16,
        "adapter": 0,
    }


def test_the_router_of_an_imported_model_counts_as_a_router() -> None:
    model = around(tiny("mixtral"))
    assert [tuple(p.shape) for p in parts(model)["router"]] == [(5, 32)] * 3


def trained(model: MoEForCausalLM, text: str) -> set[str]:
    freeze(model, text)
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("all", "."),
        ("router", r"\.router\."),
        ("experts", r"mlp\.experts\.(up|down)$"),  # layer 0 is dense and has mlp.experts too
        ("shared+router", r"shared|latent|router|layers\.0\.mlp"),
        ("all+-router", r"^(?!.*router)"),
        ("all+-router+-*.0.*", r"^(?!.*(router|\.0\.))"),
        ("*.self_attn.?_proj.weight", r"self_attn\.[qkvo]_proj\.weight"),
        ("norms+-model.norm.weight", r"layernorm"),
    ],
)
def test_what_trains_is_what_the_words_say(text: str, pattern: str) -> None:
    names = [name for name, _ in ours().named_parameters()]
    expected = {name for name in names if re.search(pattern, name)}
    if text == "experts":
        expected = {name for name in expected if ".layers.0." not in name}
    assert trained(ours(), text) == expected
    assert expected


def test_patterns_match_the_names_of_the_imported_model_itself() -> None:
    found = trained(around(tiny("mixtral")), "model.layers.1.mlp.experts.*")
    assert len(found) == 2
    assert all(".layers.1." in name and "_proj" in name for name in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all+-*.bias", "no parameter has such a name: '*.bias'"),
        ("model.norm.weigth", "'model.norm.weigth'; nearest: model.norm.weight"),
        ("adapter", "this model has no part adapter; it has router, experts, shared, attention, embeddings, norms"),
        ("norms+-*norm*", "nothing is left to train"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        freeze(ours(), text)
    assert message in str(error.value)


def test_a_router_without_weights_cannot_be_all_that_trains() -> None:
    with pytest.raises(ConfigError, match="nothing that gradients train"):
        freeze(ours({"_target_": "moe.routers.hash.Hash"}), "router")


@pytest.mark.parametrize(
    ("text", "learns"),
    [("all", True), ("router", True), ("experts", False), ("all+-router", False), ("all+-*.router.bias", False)],
)
def test_a_router_learns_without_a_gradient_where_its_buffers_train(text: str, learns: bool) -> None:
    model = ours({"_target_": "moe.routers.sigmoid_bias.SigmoidBias", "k": 2, "rate": 0.1})
    routers = [layer.router for layer in model.moe_layers]
    assert learning_routers(model, routers, text) == frozenset(routers if learns else [])
