"""Tests of imported models: they compute what transformers computes, with our layer in each MoE block."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import EXPRESSED, SPECIAL, E, V, around, router_of, tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moe.checks import ConfigError
from moe.config.checkpoints import imported
from moe.config.model import ModelConfig
from moe.config.options import CONF, complete
from moe.model.blocks import find_blocks
from moe.model.causal_lm import MoEForCausalLM, load_model
from moe.model.imported import probabilities
from moe.model.imported_checkpoint import read_checkpoint
from moe.routers.base import LinearRouter
from moe.routing.decision import LABELS, Knobs
from moe.training.optim import roles

IDS = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
OWN = {"_target_": "moe.routers.imported.Imported"}


def plain_name(name: str) -> str:
    """Return the name in transformers of a parameter of an imported model."""
    name = name.removeprefix("model.causal_lm.")
    name = name.replace(".experts.layer.experts.module.", ".experts.")
    return name.replace(".experts.layer.router.weight", ".gate.weight")


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert difference < 1e-4, f"{what}: {difference:.1e}"


def assert_same_gradients(model: MoEForCausalLM, source: PreTrainedModel) -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        named = {plain_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name.replace(".router.", ".gate.").replace(".gate.wg.", ".gate."): g for name, g in named.items()}

    found, renamed = gradients(model), gradients(source)
    assert found.keys() == renamed.keys()
    for name, gradient in renamed.items():
        assert_close(found[name], gradient, name)


@pytest.mark.parametrize("kind", SPECIAL)
def test_an_imported_model_has_the_logits_and_gradients_of_transformers(kind: str) -> None:
    source = tiny(kind)
    model = around(source)
    output = model(IDS, labels=IDS)
    reference = source(IDS).logits
    assert_close(output.logits, reference, "logits")
    blocks = find_blocks(source)
    assert len(model.moe_layers) == len(output.routing) == len(blocks) > 0
    loss = F.cross_entropy(reference[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, loss)
    loss.backward()
    output.loss.backward()
    assert_same_gradients(model, source)
    assert output.stats.tokens.tolist() == [18.0] * len(blocks)
    for [decision] in output.routing:
        assert decision.logits is not None
        assert decision.probs is not None
        torch.testing.assert_close(decision.probs.sum(-1), torch.ones(18))


@pytest.mark.parametrize("kind", EXPRESSED)
def test_our_router_computes_what_the_router_of_the_checkpoint_computes(kind: str) -> None:
    source = tiny(kind)
    model = around(source, router_of(source))
    assert OWN["_target_"] != model.config.router["_target_"]
    output = model(IDS, labels=IDS)
    reference = source(IDS).logits
    assert_close(output.logits, reference, "logits")
    F.cross_entropy(reference[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    output.loss.backward()
    assert_same_gradients(model, source)


def test_experts_that_ask_the_registry_of_transformers_run_in_our_kernels() -> None:
    found = {kind: around(tiny(kind)).experts_kernel(torch.float32) for kind in ("mixtral", "gpt_oss", "dbrx")}
    assert found == {"mixtral": "loop", "gpt_oss": "loop", "dbrx": "transformers"}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # the second has biases and transposed matrices
def test_many_experts_run_in_one_kernel(kind: str) -> None:
    many = dict.fromkeys(("num_experts", "num_local_experts"), 64)
    source = tiny(kind, **many)
    model = around(source)
    assert model.experts_kernel(torch.float32) == "grouped"
    output, reference = model(IDS, labels=IDS), source(IDS).logits
    assert_close(output.logits, reference, "logits")
    F.cross_entropy(reference[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    output.loss.backward()
    assert_same_gradients(model, source)


def test_what_another_library_changes_about_the_experts_of_a_model_counts() -> None:
    """A hook of the module runs, and a parametrized tensor is used, as PEFT and accelerate need it."""
    model = around(tiny("mixtral"))
    before = model(IDS).logits
    module = model.moe_layers[0].experts.module
    called = []
    handle = module.register_forward_pre_hook(lambda module, inputs: called.append(len(inputs)))
    torch.testing.assert_close(model(IDS).logits, before)
    handle.remove()
    assert called == [1]
    doubled = nn.Module()
    doubled.forward = lambda tensor: 2 * tensor
    nn.utils.parametrize.register_parametrization(module, "down_proj", doubled)
    changed = model(IDS).logits
    nn.utils.parametrize.remove_parametrizations(module, "down_proj")  # which leaves the doubled matrices
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(model(IDS).logits, changed)


@pytest.mark.parametrize("router", complete("router"))
def test_every_router_of_ours_takes_the_place_of_the_router_of_a_checkpoint(router: str, cell: Any) -> None:
    source = tiny("mixtral", num_local_experts=4, num_experts=4, n_routed_experts=4, moe_num_experts=4)
    model = around(source, cell(f"router={router}").config.router).train()
    told = torch.zeros(len(IDS), len(LABELS), dtype=torch.long)
    model(IDS, labels=IDS, knobs=Knobs.of(noise=0.1), told=told).loss.backward()
    trained = [p for layer in model.moe_layers for p in layer.experts.parameters()]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    first = model.moe_layers[0].router
    if isinstance(first, LinearRouter) and len(first.weight) == 4:  # it starts with the matrix of the checkpoint
        torch.testing.assert_close(first.weight, find_blocks(source)[0].module.gate.weight)


@pytest.mark.parametrize("kind", [*EXPRESSED, "gpt_oss"])
def test_an_imported_model_writes_the_greedy_text_of_transformers(kind: str) -> None:
    """With a cache, in a batch whose first text is padded on the left."""
    source = tiny(kind)
    model = around(source, router_of(source) if kind in EXPRESSED else None)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    for use_cache in (True, False):
        expected = source.generate(IDS, use_cache=use_cache, **arguments).tolist()
        assert model.generate(IDS, use_cache=use_cache, **arguments).tolist() == expected


@pytest.mark.parametrize("kind", SPECIAL)
def test_an_imported_model_is_the_same_after_it_was_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    """It has fp32 weights, also if the checkpoint had others, and its files have the names of its weights."""
    source = tiny(kind)
    source.config.dtype = torch.bfloat16
    model = around(source, router_of(source) if kind in EXPRESSED else None)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_layers_that_are_computed_again_have_the_same_gradients() -> None:
    source = tiny("qwen2_moe")
    gradients = []
    for again in (False, True):
        model = around(source, router_of(source)).train()
        model.model.gradient_checkpointing = again
        assert model.model.gradient_checkpointing == again
        output = model(IDS, labels=IDS)
        (output.loss + output.aux["load_balance"].mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_padding_is_not_routed() -> None:
    model = around(tiny("mixtral"))
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    output = model(IDS, attention_mask=mask)
    assert output.stats.tokens.tolist() == [14.0] * 3
    alone = model(IDS[1:, :5])
    torch.testing.assert_close(output.logits[1:, :5], alone.logits)


def test_probabilities_are_found_from_the_weights_of_a_router() -> None:
    scores = torch.randn(20, E, generator=torch.Generator().manual_seed(1))
    index = scores.topk(2).indices
    softmax, sigmoid = scores.softmax(-1), scores.sigmoid()
    for rule, given in ((softmax, scores), (sigmoid / sigmoid.sum(-1, keepdim=True), scores), (softmax, softmax)):
        weights = 2.5 * rule.gather(-1, index)
        torch.testing.assert_close(probabilities(given, index, weights), rule)
    torch.testing.assert_close(probabilities(scores, index, torch.rand(20, 2) + 0.1), softmax)  # no known rule


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("mixtral").save_pretrained(tmp_path / "mixtral", max_shard_size="20KB")
    assert len([*(tmp_path / "mixtral").glob("*.safetensors")]) > 1
    return tmp_path / "mixtral"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, "auto_map in config.json"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config in config.json"),
        ({"model_type": "evil"}, "model_type in config.json"),
        ({"model_type": "moe_routing"}, "model_type in config.json"),
        ({"model_type": ["mixtral"]}, "model_type in config.json"),
        ({"hidden_size": "__import__('os')"}, "cannot be read"),
        ({"attn_implementation": "evil/kernel"}, "attn_implementation in config.json"),
        ({"compression_config": {}}, "compression_config in config.json"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights in config.json"),
        ({"num_labels": 10**9}, "num_labels in config.json .*at most 1000000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in config.json .*at most 1000"),
        ({"num_local_experts": 10**9}, "num_local_experts in config.json .*at most 1000000"),
    ],
    ids=str,
)
def test_a_hostile_config_json_of_a_checkpoint_is_refused_in_one_line(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message) as caught:
        imported.read.__wrapped__(str(folder), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size"])
def test_a_size_that_no_weight_has_is_refused_before_any_work(key: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 10**9}))
    imported.read.cache_clear()
    with pytest.raises(ConfigError, match=f"{key} in config.json of .*=1000000000: must be a dimension of one of its"):
        imported.resolve(dict.fromkeys(ModelConfig.__dataclass_fields__) | {"checkpoint": str(folder)})


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": 1}))
    imported.read.cache_clear()
    settings = ModelConfig(checkpoint=str(folder))
    with pytest.raises(ValueError, match=r"has weights of other shapes for .*k_proj"):
        read_checkpoint(settings)


def test_a_folder_with_an_adapter_of_peft_is_refused(folder: Path) -> None:
    """transformers would add the adapter to the model, whose digest does not cover it."""
    (folder / "adapter_config.json").write_text("{}")
    imported.read.cache_clear()
    with pytest.raises(ConfigError, match=r"model.checkpoint=.*: has adapter_config.json.*merge the adapter"):
        imported.read(str(folder), None)


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=V, hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no Mixture of Experts"):
        imported.read(str(tmp_path), None)


def test_the_page_about_foreign_models_has_the_table_of_all_architectures() -> None:
    """Differences change from machine to machine, so only the other columns are compared."""
    page = (CONF.parent / "docs/foreign-models.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| below 1e-\d \| yes \| (one of ours|its own code)", page, re.MULTILINE))
    assert rows == {kind: "one of ours" if kind in EXPRESSED else "its own code" for kind in SPECIAL}


def test_a_model_without_blocks_of_the_known_form_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="this deepseek_v3 has no block whose experts can run"):
        around(tiny("deepseek_v3", first_k_dense_replace=3))


@pytest.mark.parametrize("kind", sorted(imported.UNFIT))
def test_an_architecture_that_does_not_fit_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match=re.escape(imported.UNFIT[kind])) as caught:
        imported.read(str(tmp_path), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "message"), [("llama4", "a language model alone"), ("switch_transformers", "causal")])
def test_a_model_that_reads_something_else_than_text_before_it_is_refused(
    kind: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match=message):
        imported.read(str(tmp_path), None)


@pytest.mark.parametrize("changes", [{"hidden_act": "os.system"}, {"rope_parameters": {"rope_type": "evil"}}], ids=str)
def test_a_config_json_that_describes_no_model_is_refused_in_one_line(changes: dict[str, Any]) -> None:
    source = tiny("mixtral")
    config = around(source).config
    config.imported |= changes
    with pytest.raises(ConfigError, match=r"describes no model|cannot be read") as caught:
        MoEForCausalLM(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "message"), [(2, "has weights that its config.json does not describe"), (4, "has no weights for")]
)
def test_weights_must_be_those_of_config_json(folder: Path, layers: int, message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(ModelConfig(checkpoint=str(folder), attention="sdpa"))


def test_more_layers_than_tensors_are_refused_before_they_are_built(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3000}))
    given = dict.fromkeys(vars(ModelConfig())) | {"checkpoint": str(folder)}
    with pytest.raises(ConfigError, match=r"num_hidden_layers in config\.json of .*=3000: must be at most"):
        imported.resolve(given)


def test_the_output_matrix_of_an_imported_model_is_none_that_muon_trains() -> None:
    model = around(tiny("mixtral"))
    role = roles(model)
    assert {role[p] for name, p in model.named_parameters() if "lm_head" in name or "embed_tokens" in name} == {"other"}
