"""Tests of imported models that are given back: plain transformers loads them with the same weights and logits."""

import copy
from pathlib import Path

import pytest
import torch
from architectures import EXPRESSED, SPECIAL, V, tiny
from transformers import AutoModelForCausalLM

from moe.checks import ConfigError
from moe.config import imported
from moe.config.schema import ModelConfig
from moe.foreign.export import to_transformers
from moe.launch.command_line import read_cells
from moe.model.causal_lm import MoEConfig, MoEForCausalLM

IDS = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))


def take_over(kind: str, *words: str, own: bool = False) -> tuple[torch.nn.Module, MoEForCausalLM]:
    """Return a model of transformers, and an imported copy of it.

    words: the router. By default it is the equal one of ours, with `own` that of the model itself.
    """
    source = tiny(kind)
    experts = imported.number(source.config, imported.EXPERTS)
    [cell] = read_cells([*(words or imported.router(source.config)), f"model.num_experts={experts}"]) or []
    router = cell.config.router
    if own:
        router = {"_target_": "moe.routers.imported.Imported", "k": imported.number(source.config, imported.PER_TOKEN)}
    sizes = ModelConfig(dim=source.config.hidden_size, heads=4, layers=3, ffn=24, dense_ffn=40, num_experts=experts)
    config = MoEConfig.around(source.config, sizes, router)
    return source, MoEForCausalLM(config, causal_lm=copy.deepcopy(source)).eval()


@pytest.mark.parametrize(("kind", "own"), [*((kind, True) for kind in SPECIAL), *((kind, False) for kind in EXPRESSED)])
def test_a_model_that_was_imported_and_given_back_has_bitwise_its_weights(kind: str, own: bool, tmp_path: Path) -> None:
    source, model = take_over(kind, own=own)
    to_transformers(model, kind).save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is type(source)
    weights = back.state_dict()
    assert weights.keys() == source.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in source.state_dict().items())
    torch.testing.assert_close(back(IDS).logits, source(IDS).logits)


def test_another_k_and_other_weights_become_keys_of_the_configuration() -> None:
    _, model = take_over("qwen3_moe", "router=topk", "router.k=2", "router.gate=softmax_all")
    back = to_transformers(model)
    assert (back.config.num_experts_per_tok, back.config.norm_topk_prob) == (2, False)
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("kind", "words", "target", "message"),
    [
        ("mixtral", ["router=hash"], "auto", "no rule of transformers"),
        ("mixtral", ["router=topk", "router.gate=softmax_all"], "auto", "mixtral does not follow its rule"),
        ("mixtral", ["router=sigmoid_bias"], "auto", "mixtral does not follow its rule"),
        ("mixtral", [], "qwen3_moe", "--to=qwen3_moe: must be mixtral or auto"),
    ],
)
def test_what_the_architecture_does_not_express_is_refused(
    kind: str, words: list[str], target: str, message: str
) -> None:
    _, model = take_over(kind, *words)
    with pytest.raises(ConfigError, match=message):
        to_transformers(model, target)
