"""Tests that models whose attention is code of transformers are written as other architectures, with equal logits."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from architectures import around, router_of, tiny
from exported_models import make, upcycle

from moe.checks import ConfigError
from moe.foreign.anatomy import anatomy_of
from moe.foreign.export import compare, expressing, to_transformers
from moe.foreign.targets import GGUF_TARGETS, TARGETS
from moe.model.causal_lm import MoEForCausalLM

ALL = [*TARGETS.values(), *(replace(target, name=f"{target.name}.gguf") for target in GGUF_TARGETS)]
LIKE_LLAMA = {"mixtral", "granitemoe", "qwen2_moe", "olmoe", "qwen3_moe"}
BIASED = {"granitemoe", "qwen2_moe", "olmoe", "qwen3_moe"}


def check(model: MoEForCausalLM, targets: set[str]) -> None:
    """Compare the names of the targets that express a model, and the logits of each of those of transformers."""
    found = {target.name for target in expressing(anatomy_of(model), ALL)}
    assert found == targets
    for target in found & TARGETS.keys():
        assert compare(model, to_transformers(model, target)).relative < 1e-5, target


def imported(kind: str, **changes: Any) -> MoEForCausalLM:
    """Return an imported model with the router of ours that decides like its own."""
    source = tiny(kind, **changes)
    return around(source, router_of(source))


@pytest.mark.parametrize(
    ("parent", "router", "changes", "targets"),
    [
        ("mistral", "topk", {}, LIKE_LLAMA | {"llama.gguf", "glm4moe.gguf"}),
        ("mistral with a window", "topk", {}, {"mixtral", "qwen2_moe", "qwen3_moe"}),
        ("mistral with a window", "softmax_all", {"shared_experts": 2, "first_k_dense_replace": 1}, {"qwen2_moe"}),
        ("mistral", "biased", {"shared_experts": 1}, {"glm4_moe", "deepseek_v3", "glm4moe.gguf"}),
        ("qwen2", "topk", {}, BIASED | {"llama.gguf", "glm4moe.gguf"}),
        ("qwen2", "biased", {"first_k_dense_replace": 1}, {"glm4_moe", "glm4moe.gguf"}),
        ("qwen2 with a window", "topk", {"shared_experts": 2}, {"qwen2_moe"}),
        ("qwen3", "topk", {}, {"qwen3_moe", "qwen3moe.gguf", "glm4moe.gguf"}),
        ("qwen3", "softmax_all", {"first_k_dense_replace": 1}, {"qwen3_moe", "glm4moe.gguf"}),
        ("qwen3", "biased", {"shared_experts": 1}, {"glm4_moe", "glm4moe.gguf"}),
        ("qwen3", "topk", {"shared_experts": 1}, {"glm4moe.gguf"}),
        ("qwen3 with a window", "switch", {}, {"qwen3_moe"}),
        ("gemma", "topk", {}, LIKE_LLAMA),
        ("gemma", "uniform", {}, {"granitemoe"}),
        ("gemma", "biased_raw", {"shared_experts": 1, "first_k_dense_replace": 1}, {"glm4_moe", "deepseek_v3"}),
    ],
)
def test_an_upcycled_model_is_written_as_each_target_that_has_its_parts(
    parent: str, router: str, changes: dict[str, Any], targets: set[str]
) -> None:
    check(upcycle(parent, router, **changes), targets)


def test_our_decoder_with_geglu_is_written_as_each_target_but_those_of_llama_cpp() -> None:
    check(make("topk", expert="geglu"), LIKE_LLAMA)


@pytest.mark.parametrize(
    ("kind", "changes", "targets"),
    [
        ("mixtral", {"sliding_window": None}, LIKE_LLAMA | {"llama.gguf", "glm4moe.gguf"}),
        ("mixtral", {}, {"mixtral", "qwen2_moe", "qwen3_moe"}),
        ("qwen3_moe", {}, {"qwen3_moe", "qwen3moe.gguf", "glm4moe.gguf"}),
        ("qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": False}, {"qwen3_moe", "glm4moe.gguf"}),
        ("olmoe", {"clip_qkv": None}, {"olmoe"}),
        ("olmoe", {"clip_qkv": None, "num_key_value_heads": 4}, {"olmoe", "olmoe.gguf"}),
        ("olmoe", {"clip_qkv": None, "num_key_value_heads": 4, "norm_topk_prob": True}, {"olmoe"}),
    ],
)
def test_an_imported_model_is_written_as_other_targets_too(
    kind: str, changes: dict[str, Any], targets: set[str]
) -> None:
    check(imported(kind, **changes), targets)


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (partial(upcycle, "gemma2", "topk"), "auto", "a gemma2 has parts that no other target has"),
        (partial(upcycle, "gemma3_text", "topk"), "mixtral", "a gemma3_text has parts that no other target has"),
        (
            partial(imported, "jamba"),
            "mixtral",
            "a jamba has parts that no other target has; --to jamba gives it back as what it was",
        ),
        (
            partial(imported, "olmoe"),
            "mixtral",
            "clip_qkv limits queries, keys and values, in no target but olmoe; --to olmoe gives it back as what it was",
        ),
        (
            lambda: around(tiny("mixtral")),
            "olmoe",
            "its router is the code of mixtral; import it with one of ours, such as router=topk; --to mixtral gives"
            " it back as what it was",
        ),
        (
            partial(imported, "qwen3_moe", mlp_only_layers=[1]),
            "qwen2_moe",
            "a dense layer comes after one with experts, as in no target; --to qwen3_moe gives it back as what it was",
        ),
        (
            partial(upcycle, "mistral with a window", "topk"),
            "olmoe",
            "sliding_window=5: its layers see the whole text; --to mixtral expresses this model",
        ),
        (
            partial(upcycle, "qwen2 with a window", "topk"),
            "qwen3_moe",
            "sliding_window=5: it has the same one in all layers; --to qwen2_moe expresses this model",
        ),
        (
            partial(upcycle, "qwen2", "topk"),
            "mixtral",
            "biases of the matrices q, k, v of the attention: it has none there; --to granitemoe expresses this model",
        ),
        (
            partial(upcycle, "qwen3", "topk"),
            "mixtral",
            r"norms of queries and keys \(head\): its attention has no such norms; --to qwen3_moe expresses this model",
        ),
        (
            partial(upcycle, "qwen3", "topk", shared_experts=1),
            "qwen3_moe",
            "model.shared_experts=1: it has no shared experts; --to gguf expresses this model",
        ),
    ],
)
def test_parts_that_the_target_lacks_are_named(model: Callable[[], MoEForCausalLM], target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--to {target}: {message}$"):
        to_transformers(model(), target)


@pytest.mark.parametrize("positions", [64, 40])
def test_a_window_as_long_as_the_positions_acts_on_longer_texts(positions: int) -> None:
    """A target without windows is refused. The others have the logits of a text that is longer than the window."""
    model = imported("mixtral", sliding_window=64, max_position_embeddings=positions)
    ids = torch.randint(3, 61, (1, 200), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    for target in ("mixtral", "qwen2_moe", "qwen3_moe"):
        torch.testing.assert_close(to_transformers(model, target)(ids).logits, expected, rtol=1e-4, atol=1e-4)
    for target in ("granitemoe", "olmoe"):
        with pytest.raises(ConfigError, match=f"--to {target}: sliding_window=64: its layers see the whole text"):
            to_transformers(model, target)


def test_the_views_of_a_model_are_not_copies() -> None:
    model = upcycle("qwen3", "topk")
    anatomy = anatomy_of(model)
    assert anatomy.layers[1].feed_forward.experts.up.data_ptr() == model.moe_layers[1].experts.up.data_ptr()
    assert torch.equal(anatomy.head, model.model.causal_lm.lm_head.weight)
