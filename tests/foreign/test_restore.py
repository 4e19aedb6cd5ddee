"""Tests of imported models that are given back: plain transformers loads them with the same weights and logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import EXPRESSED, SPECIAL, V, around, router_of, tiny
from transformers import AutoModelForCausalLM

from moe.checks import ConfigError
from moe.foreign.export import to_transformers

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


@pytest.mark.parametrize(
    ("router", "target", "message"),
    [
        ({"_target_": "moe.routers.cosine.CosineRouter", "k": 2}, "auto", "no rule of transformers"),
        ({"_target_": "moe.routers.topk.TopK", "gate": "softmax_all"}, "auto", "mixtral does not follow its rule"),
        ({"_target_": "moe.routers.sigmoid_bias.SigmoidBias"}, "auto", "mixtral does not follow its rule"),
        (None, "qwen3_moe", "--to qwen3_moe: its router is the code of mixtral; import it with one of ours"),
        (None, "mixtrel", "--to=mixtrel: must be one of auto, mixtral, .*; nearest: mixtral"),
    ],
)
def test_what_the_architecture_does_not_express_is_refused(
    router: dict[str, Any] | None, target: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        to_transformers(around(tiny("mixtral"), router), target)
