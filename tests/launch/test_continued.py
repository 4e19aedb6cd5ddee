"""Tests of runs that continue from a saved model of this project: `model.checkpoint=RUN/model`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from safetensors.torch import load_file, save_file
from small_runs import run, untimed

from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.config.words import quoted
from moe.launch.command_line import read_cells
from moe.model.causal_lm import MoEForCausalLM
from moe.runs.signals import Interrupted
from moe.training.setup import build_model, prepare_data

Read = Callable[..., Cell]
SHARED = ("model.shared_experts=1", "model.first_k_dense_replace=1", "model.expert=swiglu")


@pytest.fixture(scope="module")
def base(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with every part that a model of ours may have."""
    words = [*small, *SHARED, "router=temperature", "router.temp=1.5", "router.k=3", "steps=2", "eval_every=2"]
    [one] = read_cells([*words, f"out={tmp_path_factory.mktemp('base')}"]) or []
    run(one)
    return one.folder


@pytest.fixture
def read(small: list[str], base: Path, tmp_path: Path) -> Read:
    """Return a function that reads a small command that continues from a saved model, by default that of `base`."""
    kept = [word for word in small if not word.startswith(("model", "data.vocab_size"))]

    def command(*more: str, model: Path = base / "model") -> Cell:
        words = [
            *kept,
            "model=imported",
            f"model.checkpoint={quoted(str(model))}",
            "optimizer=adamw",
            "optimizer.adamw_lr=0.01",
        ]
        [cell] = read_cells([*words, f"out={tmp_path / 'runs'}", *more]) or []
        return cell

    return command


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def changed(model: Path, tmp_path: Path, **changes: Any) -> Path:
    """Return a copy of a saved model with other values in its config.json."""
    copy = tmp_path / "changed"
    shutil.copytree(model, copy)
    content = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(content))
    return copy


def test_it_starts_with_the_architecture_the_router_and_the_weights_of_the_saved_model(read: Read, base: Path) -> None:
    cell = read("steps=4")
    model = cell.config.model
    assert (model.dim, model.layers, model.shared_experts, model.first_k_dense_replace) == (32, 2, 1, 1)
    assert model.expert == "swiglu"
    assert cell.choices["router"] == "temperature"
    assert cell.config.router == {"_target_": "moe.routers.topk.Temperature", "k": 3, "gate": "renorm", "temp": 1.5}
    start, saved = build_model(cell.config).state_dict(), weights(base)
    assert start.keys() - saved.keys() == {"lm_head.weight"}  # tied, and stored once
    assert all(torch.equal(start[name], tensor) for name, tensor in saved.items())
    run(cell)
    before, after = untimed(base)[-1], [event for event in untimed(cell.folder) if "val/loss" in event]
    assert after[0]["val/loss"] == before["val/loss"]
    assert after[0]["routing/drift_kl"] == 0
    assert after[-1]["routing/drift_kl"] > 0
    assert after[-1]["val/loss"] < after[0]["val/loss"]


@pytest.mark.parametrize(
    "words",
    [
        ("trainable=router",),
        ("adapter=lora_attention", "adapter.parts=[attention,experts]"),
        ("adapter=perft_r",),
        ("adapter=perft_e",),
    ],
    ids=lambda words: words[0],
)
def test_parts_and_adapters_train_on_it_and_a_resume_changes_nothing(words: Any, read: Read, tmp_path: Path) -> None:
    whole, stopped = (read(*words, f"out={tmp_path / name}") for name in ("whole", "stopped"))
    run(whole)
    with pytest.raises(Interrupted):
        run(stopped, stop_after=2)
    run(stopped)
    assert untimed(stopped.folder) == untimed(whole.folder)
    config = whole.folder / "adapter/adapter_config.json"
    assert not config.exists() or json.loads(config.read_text())["base_model_name_or_path"] == str(
        whole.config.model.checkpoint
    )


def test_an_adapter_names_its_base_by_an_absolute_path_and_only_if_nothing_else_trained(
    read: Read, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    for words, named in (((), str(base / "model")), (("trainable=adapter+router",), None)):
        cell = read("adapter=lora_attention", "model.checkpoint=model", *words, f"out={tmp_path / str(named is None)}")
        run(cell)
        saved = json.loads((cell.folder / "adapter/adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == named


def test_a_router_takes_the_saved_tensors_that_it_has_too(read: Read, base: Path) -> None:
    """The matrix of `sigmoid_bias` has the name and shape of the saved one. `cosine` has others, which start anew."""
    saved, name = weights(base), "model.layers.1.mlp.router.weight"
    for words in (["router.k=1"], ["router.temp=3.0"], ["router=sigmoid_bias"]):
        start = build_model(read(*words).config).state_dict()
        assert torch.equal(start[name], saved[name])
    start = build_model(read("router=sigmoid_bias").config).state_dict()
    assert torch.equal(start["model.layers.1.mlp.router.bias"], torch.zeros(4))
    ones, twos = (build_model(read("router=cosine", f"seed={seed}").config) for seed in (1, 2))
    for key, one in ones.state_dict().items():
        two, drawn = twos.state_dict()[key], ".router." in key and key not in saved
        assert torch.equal(one, two) != (drawn and one.ndim == 2)


def test_a_saved_model_that_was_imported_is_continued(read: Read, base: Path, tmp_path: Path) -> None:
    """Also one that keeps its own router, which then no other one can take the place of."""
    tokenizer = prepare_data(read().config).tokenizer
    for kind, replaceable in (("mixtral", True), ("gpt_oss", False)):
        tiny(kind, vocab_size=len(tokenizer), initializer_range=0.05).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        first = read("steps=2", "save_model=last", model=tmp_path / kind)
        run(first)
        again = read("steps=2", model=first.folder / "model")
        assert again.config.router == first.config.router
        start, saved = build_model(again.config).state_dict(), weights(first.folder)
        assert all(torch.equal(start[name], tensor) for name, tensor in saved.items())
        if replaceable:
            build_model(read("router=temperature", model=first.folder / "model").config)
        else:
            with pytest.raises(ConfigError, match=r"router\._target_=.*: must be left out, because the saved model"):
                read("router=topk", model=first.folder / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapter": {"_target_": "moe.adapters.perft.Shared", "rank": 2}},
            "adapter in config.json of .*: must be null",
        ),
        (
            {"router": {"_target_": "os.system"}},
            "router._target_ in config.json of .*: must be a class of this project",
        ),
        ({"router": None}, "router in config.json of .*=null: must be a class as _target_"),
        ({"hidden_size": 64}, "config.json describes .* but in the weights it is"),
        ({"vocab_size": 10**9}, "config.json describes .* but in the weights it is"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers in config.json of .*: must be at most 1000$"),
        ({"num_hidden_layers": 500}, "num_hidden_layers in config.json of .*: must be at most .*the weights are"),
        ({"num_experts": "4"}, "num_experts in config.json of .*: must be there, of type int"),
        ({"imported": {"model_type": "moe_routing"}}, "model_type in config.json.imported"),
    ],
    ids=str,
)
def test_a_hostile_config_json_is_refused_before_any_work(
    changes: dict[str, Any], message: str, read: Read, base: Path, tmp_path: Path
) -> None:
    model = changed(base / "model", tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        read(model=model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.dim=64", "model.dim=64: must be 32, as in .*; leave it out"),
        ("model.shared_experts=0", "model.shared_experts=0: must be 1, as in .*; leave it out"),
        ("model.offload=/tmp/x steps=0", "model.offload=/tmp/x: must be null, because .* is a saved model"),
        ("data.seq_len=33", "data.seq_len=33: must be at most 32, the number of positions"),
        ("data.tokenizer=bpe data.vocab_size=400", "data.tokenizer=bpe: must be the tokenizer of model.checkpoint"),
    ],
)
def test_settings_that_the_saved_model_fixes_are_refused(words: str, message: str, read: Read) -> None:
    """So is the default of a key where the saved model has another value."""
    with pytest.raises(ConfigError, match=message):
        read(*words.split())


def test_routers_of_layers_are_those_of_the_saved_model_or_the_command_is_refused(
    read: Read, base: Path, tmp_path: Path
) -> None:
    router = {"_target_": "moe.routers.topk.Temperature", "k": 1, "gate": "renorm", "temp": 1.5}
    model = changed(base / "model", tmp_path, routers="1:k:1", router_layers={"1": router})
    assert read(model=model).config.model.routers == "1:k:1"
    with pytest.raises(ConfigError, match=r"^model\.routers=null: must be 1:k:1, as in .*; leave it out$"):
        read("model.routers=null", model=model)


def test_weights_that_are_missing_are_named(read: Read, base: Path, tmp_path: Path) -> None:
    model = changed(base / "model", tmp_path)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"its weights are not those of its config\.json: model\.norm\.weight"):
        read(model=model)


def test_weights_in_several_files_are_read(read: Read, base: Path, tmp_path: Path) -> None:
    whole = MoEForCausalLM.from_pretrained(base / "model")
    model = changed(base / "model", tmp_path)
    (model / "model.safetensors").unlink()
    whole.save_pretrained(model, max_shard_size="20KB")
    assert len([*model.glob("*.safetensors")]) > 1
    start = build_model(read(model=model).config).state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in weights(base).items())
