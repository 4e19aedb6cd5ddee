"""Tests of imported models that are given back: plain transformers loads them with the same weights and logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import EXPRESSED, SPECIAL, V, around, router_of, tiny
from transformers import AutoModelForCausalLM

from moe.checks import ConfigError
from moe.foreign.export import to_transformers

SOFTMAX_ALL = {"_target_": "moe.routers.topk.TopK", "gate": "softmax_all"}
BIASED = {"_target_": "moe.routers.sigmoid_bias.SigmoidBias", "k": 3}
IDS = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "own"), [*((kind, True) for kind in SPECIAL), *((kind, False) for kind in EXPRESSED)])
def test_a_model_that_was_imported_and_given_back_has_bitwise_its_weights(kind: str, own: bool, tmp_path: Path) -> None:
    source = tiny(kind)
    model = around(source, None if own else router_of(source))
    to_transformers(model, kind).save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is type(source)
    weights = back.state_dict()
    assert weights.keys() == source.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in source.state_dict().items())
    torch.testing.assert_close(back(IDS).logits, source(IDS).logits)


def test_another_k_and_other_weights_become_keys_of_the_configuration() -> None:
    model = around(tiny("qwen3_moe"), {"_target_": "moe.routers.topk.TopK", "k": 2, "gate": "softmax_all"})
    back = to_transformers(model)
    assert (back.config.num_experts_per_tok, back.config.norm_topk_prob) == (2, False)
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits)


def test_auto_tries_the_other_architectures_if_its_own_one_does_not_follow_the_router() -> None:
    model = around(tiny("mixtral", sliding_window=None), BIASED)
    assert to_transformers(model).config.model_type == "glm4_moe"
    with pytest.raises(ConfigError, match=r"^--to mixtral: .*; --to glm4_moe expresses this model$"):
        to_transformers(model, "mixtral")


def test_a_temperature_divides_the_matrix_of_the_architecture_that_it_was() -> None:
    router = {"_target_": "moe.routers.topk.Temperature", "k": 3, "temp": 0.5}
    model = around(tiny("minimax"), router)
    found, expected = to_transformers(model)(IDS).logits, model(IDS).logits
    # Linear attention amplifies rounding: embeddings that differ by 1e-7 move these logits by 5e-5.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (around(tiny("minimax"), router | {"temp": 0.51})(IDS).logits - expected).abs().max() > 1e-3


def test_an_architecture_with_parts_of_its_own_says_how_far_its_nearest_rule_is_off() -> None:
    message = (
        r"^--to auto: a jamba has parts that no other target has; router=SigmoidBias\(k=3\): jamba does not follow its"
        r" rule \(.*\); with the nearest rule, jamba with top 3 of the softmax scores, the scores themselves as"
        r" weights, the logits would be off by up to [\d.]+, where the largest logit is [\d.]+$"
    )
    with pytest.raises(ConfigError, match=message):
        to_transformers(around(tiny("jamba"), BIASED))


@pytest.mark.parametrize(
    ("router", "target", "message"),
    [
        (
            {"_target_": "moe.routers.cosine.CosineRouter", "k": 2},
            "auto",
            r"^--to auto: router=CosineRouter\(k=2\): what it does in evaluation is not the rule of any target; ",
        ),
        (
            SOFTMAX_ALL,
            "mixtral",
            r"^--to mixtral: router=TopK\(gate=softmax_all\): mixtral does not follow its rule \(.*\); with the nearest"
            r" rule, mixtral with top 2 of the softmax scores, weights that sum to 1, the logits would be off by up to"
            r" [\d.]+, where the largest logit is [\d.]+; --to qwen2_moe expresses this model$",
        ),
        (
            BIASED,
            "auto",
            r"^--to auto: router=SigmoidBias\(k=3\): its rule \(.*\) is that of glm4_moe, deepseek_v3, but"
            r" sliding_window=4: its layers see the whole text; ",
        ),
        (None, "qwen3_moe", "--to qwen3_moe: its router is the code of mixtral; import it with one of ours"),
        (None, "mixtrel", "--to=mixtrel: must be one of auto, mixtral, .*; nearest: mixtral"),
    ],
)
def test_what_the_architecture_does_not_express_is_refused(
    router: dict[str, Any] | None, target: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        to_transformers(around(tiny("mixtral"), router), target)
