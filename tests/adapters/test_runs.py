"""Runs with adapters: what trains, what they leave in their folders, and that an interruption changes nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run, untimed

from moe.checks import ConfigError
from moe.config import run_routers
from moe.launch.command_line import read_cells
from moe.metrics.catalog import lookup
from moe.model.causal_lm import load_model
from moe.runs.signals import Interrupted
from moe.training.objective import total_loss
from moe.training.optim import roles
from moe.training.setup import build_model, prepare_data
from tests.adapters.models import disturb

WORDS = {
    "lora": ("adapter=lora_attention", "adapter.parts=[attention,experts]"),
    "dora": ("adapter=lora_attention", "adapter.variant=dora"),
    "r": ("adapter=perft_r", "adapter.router.k=2"),
    "r with a bias": ("adapter=perft_r", "adapter.router=sigmoid_bias"),
    "e": ("adapter=perft_e",),
    "d": ("adapter=perft_d",),
    "s": ("adapter=perft_s", "adapter.activation=silu"),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


@pytest.mark.parametrize("name", WORDS)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(name: str, cell: Any) -> None:
    whole, broken = cell(*WORDS[name]), cell(*WORDS[name], "gradient_checkpointing=true")
    broken = broken._replace(folder=broken.folder.with_name("broken"))
    run(whole)
    with pytest.raises(Interrupted):
        run(broken, stop_after=3)
    run(broken)
    expected, found = weights(whole.folder), weights(broken.folder)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert untimed(whole.folder)[-1] == untimed(broken.folder)[-1]


@pytest.mark.parametrize("name", WORDS)
def test_only_the_adapter_learns_and_the_saved_model_is_the_one_that_was_evaluated(name: str, cell: Any) -> None:
    one = cell(*WORDS[name])
    run(one)
    vocab_size = len(prepare_data(one.config).tokenizer)
    start = build_model(one.config, vocab_size=vocab_size)
    end = load_model(one.folder / "model")
    before = {key: tensor for key, tensor in start.state_dict().items() if key not in start.adapter_names}
    after = end.state_dict()
    if start.adapter.stays:
        buffers = {key for key in before if "beside" in key}  # of a router that learns without a gradient
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if key not in buffers)
        changed = [key for key in start.adapter_names if not torch.equal(after[key], start.state_dict()[key])]
        assert len(changed) >= 0.9 * len(start.adapter_names)
        file = load_file(one.folder / "adapter/adapter.safetensors")
        assert all(torch.equal(after[key], tensor) for key, tensor in file.items())
        assert json.loads((one.folder / "adapter/adapter.json").read_text()) == one.config.adapter
    else:
        merged = {key.replace(".base_layer", "") for key in before}
        assert merged == after.keys()
        touched = {key for key, tensor in before.items() if ".base_layer" in key}
        assert all(torch.equal(after[key], before[key]) for key in before.keys() - touched)
        assert not torch.equal(
            after["model.layers.0.self_attn.q_proj.weight"],
            before[next(key for key in touched if key.endswith("layers.0.self_attn.q_proj.base_layer.weight"))],
        )
        assert (one.folder / "adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("name", ["lora", "r", "e"])
def test_two_micro_batches_train_an_adapter_as_one_does(name: str, cell: Any) -> None:
    """Without a balance loss, which each micro-batch has for itself."""
    one, two = (cell(*WORDS[name], "lb=0.0", *words) for words in (("batch_size=8",), ("grad_accum=2",)))
    run(one)
    run(two)
    first, second = (untimed(each.folder)[-1]["val/loss"] for each in (one, two))
    assert second == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("name", ["lora", "r", "e"])
def test_an_adapter_trains_in_bf16_and_is_stored_in_fp32(name: str, cell: Any) -> None:
    exact, rounded = cell(*WORDS[name]), cell(*WORDS[name], "precision=bf16")
    run(exact)
    run(rounded)
    losses = [untimed(each.folder)[-1]["val/loss"] for each in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert {tensor.dtype for tensor in weights(rounded.folder).values() if tensor.is_floating_point()} == {
        torch.float32
    }


def test_the_balance_loss_of_an_adapter_s_router_counts(cell: Any) -> None:
    """The gradient of the adapter's router changes with the weight of the balance loss."""
    ends = []
    for weight in ("lb=0.0", "lb=1.0"):
        one = cell("adapter=perft_r", "adapter.router.k=2", weight)
        run(one)
        ends.append(load_file(one.folder / "adapter/adapter.safetensors"))
    key = next(key for key in ends[0] if key.endswith("layers.0.mlp.beside.router.weight"))
    assert not torch.equal(ends[0][key], ends[1][key])


def test_the_router_of_an_adapter_has_the_metrics_of_its_own_loads(cell: Any) -> None:
    one = cell("adapter=perft_r", "adapter.router.k=2", "adapter.adapters=6")
    run(one)
    last = [event for event in untimed(one.folder) if "val/loss" in event][-1]
    data, model = prepare_data(one.config), load_model(one.folder / "model")
    ids = torch.from_numpy(data.val["input_ids"][:])
    loads = model(ids).beside["load"].sum(1).double()
    by_layer = (loads.std(-1, correction=0) / loads.mean(-1)).tolist()
    assert [last[f"adapter/routing/load_cv/layer{layer:02d}"] for layer in range(2)] == pytest.approx(by_layer)
    assert last["adapter/routing/load_cv"] == pytest.approx(sum(by_layer) / 2)
    assert last["adapter/routing/load_cv"] != pytest.approx(last["routing/load_cv"])
    assert last["adapter/routing/active_experts"] == 2
    assert all(lookup(name) for name in last if name.startswith("adapter/"))
    other = cell("adapter=perft_e")
    run(other)
    assert not any(name.startswith("adapter/") for event in untimed(other.folder) for name in event)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("adapter=lora_experts adapter.rank=0", "adapter.rank=0: must be a whole number from 1"),
        ("adapter=lora_experts adapter.alpha=0.0", "adapter.alpha=0.0: must be a finite number > 0"),
        ("adapter=lora_experts adapter.variant=dora", "adapter.variant=dora: must be lora or rslora for experts"),
        ("adapter=lora_experts adapter.dropout=0.1", "adapter.dropout=0.1: must be 0 for experts"),
        ("adapter=lora_attention adapter.parts=[attentio]", "nearest: attention"),
        ("adapter=perft_r adapter.router.k=9", "adapter.router.k=9: must be between 1 and adapter.adapters=4"),
        ("adapter=perft_r adapter.router=soft_moe", "must be a router that in evaluation decides"),
        ("adapter=perft_r adapter.router=moe_plus_plus", "must be a router that in evaluation .* adds no output"),
        ("adapter=perft_r adapter.router=swich", "nearest: switch"),
        ("adapter=lora_attention trainable=router", "trainable=router: must be adapter[+]router, or left out"),
        ("adapter=perft_s trainable=all+-adapter", "trainable=all[+]-adapter: must be left out"),
        ("adapter=perft_s adapter.router=switch", "has no key router"),
        ("adapter=perft_s adapter.activation=sliu", "adapter.activation=sliu: .*nearest: silu"),
        ("adapter=perft_e variant=dense", "no layer of this model is a Mixture of Experts"),
        ("adapter=perft_q", "unknown option of adapter 'perft_q'"),
        (
            "adapter=perft_s adapter._target_=moe.routers.topk.TopK",
            "a class that derives from moe.adapters.base.Adapter",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_cells(words.split())
    assert "\n" not in str(caught.value)


def test_lora_needs_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.adapters.lora.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[finetune\]'"):
        read_cells(["adapter=lora_attention"])


def test_the_router_of_an_adapter_may_be_any_option_and_is_swept_by_its_class() -> None:
    cells = read_cells(
        ["-m", "adapter=perft_r", "adapter.router._target_=moe.routers.top_p.TopP,moe.routers.topk.TopK", "seed=1,2"]
    )
    assert cells is not None
    assert [c.config.adapter["router"] for c in cells[::2]] == [
        {"_target_": "moe.routers.top_p.TopP"},
        {"_target_": "moe.routers.topk.TopK", "k": 1, "gate": "softmax_all"},
    ]
    [one] = read_cells(["adapter=perft_r", "adapter.router=top_p"]) or []
    assert one.config.adapter["router"]["_target_"] == "moe.routers.top_p.TopP"
    assert one.identity()["adapter.router._target_"] == "moe.routers.top_p.TopP"
    assert "adapter.router._target_=moe.routers.top_p.TopP" in one.folder.name


LOSS_KEYS = ("lb", "z", "simbal", "erc", "output_orthogonality")
OPTIMIZER_KEYS = ("optimizer.momentum", "optimizer.expert_step")


@pytest.mark.parametrize(("name", "layers"), [("lora", 1), ("dora", 1), ("r", 1), ("e", 1), ("d", 1), ("d", 2)])
def test_a_key_applies_to_an_adapter_if_it_changes_a_gradient_or_a_step(name: str, layers: int, cell: Any) -> None:
    """Of a loss: its weight changes the gradient of a parameter. Of Muon: it has a matrix, or a stack of several."""
    one = cell(*WORDS[name], f"model.layers={layers}", "optimizer=muon", "router.k=2", "lb=0.0")
    data = prepare_data(one.config)
    model = build_model(one.config, vocab_size=len(data.tokenizer))
    disturb(model)
    ids = torch.from_numpy(data.val["input_ids"][:2])
    new = {key: p for key, p in model.named_parameters() if key in model.adapter_names}
    keys = [key for key in LOSS_KEYS if key != "erc" or name != "lora"]  # ERC cannot read what peft changes
    plain, *weighted = (gradients(model, ids, one.config, key) for key in (None, *keys))
    useful = {key for key, found in zip(keys, weighted, strict=True) if found != plain}
    matrices = [p for key, p in new.items() if roles(model)[p] == "matrix"]
    useful |= {"optimizer.momentum"} if matrices else set()
    useful |= {"optimizer.expert_step"} if any(p.ndim == 3 and len(p) > 1 for p in matrices) else set()
    assert useful == {*LOSS_KEYS, *OPTIMIZER_KEYS} - run_routers.ignored_keys(one.config)


def gradients(model: Any, ids: torch.Tensor, config: Any, key: str | None) -> list[list[float]]:
    """Return the gradient of each parameter that trains, with the loss of weight 1 at `key`."""
    torch.manual_seed(0)  # of the noise of ERC
    trained = [p for p in model.parameters() if p.requires_grad]
    output = model(ids, ids, costly=frozenset((key,)) & {"erc", "output_orthogonality"})
    own = [layer.router.loss_weights for layer in model.moe_layers]
    beside = [layer.router.loss_weights for layer in model.beside_layers]
    loss = total_loss(replace(config, **{key: 1.0} if key else {}), own, output, beside_weights=beside)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [[] if gradient is None else gradient.flatten().tolist() for gradient in found]


def test_keys_without_effect_on_an_adapter_are_refused_or_trained_once(small: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"simbal=0.1: with adapter=lora_attention and trainable=adapter it changes"):
        read_cells([*small, "-m", "adapter=lora_attention", "simbal=0.0,0.1"])
    cells = read_cells([*small, "-m", "adapter=none,lora_experts", "optimizer=muon", "optimizer.momentum=0.9,0.95"])
    assert [bool(one.config.adapter) for one in cells or []] == [False, False, True]
