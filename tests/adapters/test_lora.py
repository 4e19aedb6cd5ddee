"""LoRA by peft on models of ours and of transformers: laws, saved files, and plain peft as the reader of them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from moe.checks import ConfigError
from moe.model.causal_lm import load_model
from tests.adapters.models import SPECS, attached, disturb, ids, model
from tests.architectures import around, tiny

LORA = ("lora", "rslora", "dora")
KINDS = ("ours", "mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_the_logits_are_those_of_the_base(kind: str, name: str) -> None:
    base = model(kind)
    before = base(ids()).logits
    after = attached(base, SPECS[name])(ids()).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # dora divides rows by their lengths
    if name == "lora":
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    disturb(base)
    assert not torch.allclose(base(ids()).logits, before, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_new_parameter_gets_a_gradient_and_no_other_needs_one(kind: str) -> None:
    net = attached(model(kind), SPECS["lora"]).train()
    for name, p in net.named_parameters():
        p.requires_grad_(name in net.adapter_names)
    disturb(net)
    net(ids(), ids()).loss.backward()
    got = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == net.adapter_names


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_has_the_adapter_in_its_weights(kind: str, name: str, tmp_path: Path) -> None:
    net = attached(model(kind), SPECS[name])
    disturb(net)
    logits = net(ids()).logits
    merged, weights = net.adapter.merged(net, net.state_dict())
    merged.save_pretrained(tmp_path, state_dict=weights)
    loaded = load_model(tmp_path)
    assert loaded.adapter is None
    assert loaded.state_dict().keys() == model(kind).state_dict().keys()
    torch.testing.assert_close(loaded(ids()).logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net(ids()).logits, logits, rtol=0, atol=0)  # the model in training is as before


def test_a_change_of_an_expert_is_the_scaled_product_of_its_own_two_matrices() -> None:
    net = attached(model("ours"), SPECS["rslora"])
    disturb(net)
    _, weights = net.adapter.merged(net, net.state_dict())
    state, path = net.state_dict(), "model.layers.1.mlp.experts."
    nested = [name for name in state if name.startswith(path) and name.endswith("lora_A.default.weight")]
    for name in nested:
        wrapper = net.get_submodule(name.removesuffix(".lora_A.default.weight"))
        stack: Any = wrapper.parameter_name
        a = state[name].view(4, 3, -1)  # expert, rank, in
        b = state[name.replace("lora_A", "lora_B")].view(-1, 3, 4)  # out, rank, expert
        change = torch.stack([b[:, :, e] @ a[e] for e in range(4)]) * 4 / 3**0.5
        base = dict(model("ours").named_parameters())[path + stack]
        torch.testing.assert_close(weights[path + stack], base + change, rtol=1e-5, atol=1e-5)
    assert len(nested) == 3


def test_plain_peft_loads_base_and_adapter_without_this_package(tmp_path: Path) -> None:
    cases = [(kind, name) for kind in ("mixtral", "qwen3_moe") for name in ("lora", "dora")]
    folders = [tmp_path / f"{kind}-{name}" for kind, name in cases]
    for folder, (kind, name) in zip(folders, cases, strict=True):
        source = tiny(kind)
        source.save_pretrained(folder / "base")
        net = attached(around(source), SPECS[name])
        disturb(net)
        (folder / "adapter").mkdir()
        net.adapter.save(net, net.state_dict(), folder / "adapter", base=str(folder / "base"))
        torch.save((ids(), net(ids()).logits.detach()), folder / "expected.pt")
    script = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    ids, expected = torch.load(f"{folder}/expected.pt")
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
    assert (plain - expected).abs().max() > 1e-2
    found = adapted(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    both = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter", dtype=torch.float32).eval()
    torch.testing.assert_close(both(ids).logits, expected, rtol=1e-4, atol=1e-4)
print("read all")
assert not any(name == "moe" or name.startswith("moe.") for name in sys.modules)
"""
    command = [sys.executable, "-c", script, *map(str, folders)]  # one process, because its imports take seconds
    found = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.endswith("read all\n")
    for folder in folders:
        names = load_file(folder / "adapter/adapter_model.safetensors")
        assert all(key.startswith("base_model.model.model.layers.") for key in names)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
def test_plain_peft_trains_a_whole_router_and_lora_on_one_is_refused_in_one_line() -> None:
    before = model("ours")(ids()).logits
    wrapped = get_peft_model(model("ours"), LoraConfig(r=2, target_parameters=["router.weight"]))
    with pytest.raises(ConfigError, match=r"^router: must not be inside ParamWrapper, .* modules_to_save=\["):
        wrapped(ids())
    whole = get_peft_model(model("ours"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"]))
    torch.testing.assert_close(whole(ids()).logits, before)
    weights = [p for name, p in whole.named_parameters() if p.requires_grad and ".router." in name]
    assert len(weights) == 2
    with torch.no_grad():
        for weight in weights:
            weight.neg_()
    assert not torch.allclose(whole(ids()).logits, before, atol=1e-2)
