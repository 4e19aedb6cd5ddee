"""Tests of the router that takes the decisions of a saved model."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import run

from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.config.model import ModelConfig
from moe.launch.command_line import read_cells
from moe.model.causal_lm import MoEConfig, MoEForCausalLM, load_model
from moe.model.cost import count_parameters, flops_per_token
from moe.specialization.interventions import intervene

V, S = 61, 8
TOPK = {"_target_": "moe.routers.topk.TopK", "k": 2}
SIZES: dict[str, Any] = {"dim": 128, "heads": 4, "layers": 4, "ffn": 16, "num_experts": 8, "dense_ffn": 16}


def make(router: dict[str, Any], *, seed: int, routers: str | None = None) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(MoEConfig.of(ModelConfig(**SIZES, routers=routers), router, vocab_size=V, seq_len=128))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like that of a run: its model has top-2, and the sizes of `model=tiny` with narrower experts."""
    folder = tmp_path_factory.mktemp("other")
    make(TOPK, seed=0).save_pretrained(folder / "model")
    return folder


def replaying(folder: Path, *, seed: int) -> MoEForCausalLM:
    return make({"_target_": "moe.routers.replay.Replay", "run": str(folder)}, seed=seed)


@pytest.mark.parametrize("training", [False, True])
def test_each_layer_routes_as_the_same_layer_of_the_other_model(other: Path, training: bool) -> None:
    ids = torch.randint(0, V, (2, S))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    theirs = load_model(other / "model")(ids, attention_mask=mask)
    model = replaying(other, seed=1).train(training)
    ours = model(ids, labels=ids, attention_mask=mask)
    assert not torch.equal(ours.logits, theirs.logits)
    for [here], [there] in zip(ours.routing, theirs.routing, strict=True):
        assert all(torch.equal(*pair) for pair in zip(here[:3], there[:3], strict=True))
    ours.loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # and the other model is none of its parts
    assert count_parameters(model).active < count_parameters(model).total


def test_decisions_of_the_other_model_can_be_changed_in_all_layers_as_a_study_does(other: Path) -> None:
    ids = torch.randint(0, V, (2, S))
    model = replaying(other, seed=1).eval()
    expected = model(ids).logits
    with ExitStack() as stack:
        for layer in model.moe_layers:
            stack.enter_context(intervene(layer, lambda routing, _: routing))
        assert torch.equal(model(ids).logits, expected)


def test_with_the_weights_of_the_other_model_it_is_that_model(other: Path) -> None:
    ids = torch.randint(0, V, (2, S))
    model, source = replaying(other, seed=1).eval(), load_model(other / "model")
    assert model.load_state_dict(source.state_dict(), strict=False).missing_keys == []
    assert torch.equal(model(ids).logits, source(ids).logits)


@pytest.mark.parametrize("routers", [None, "0:k:1+2:k:4", "1:hash+1:k:1+3:top_p"])
def test_its_experts_cost_what_those_of_the_other_model_cost_in_each_layer(tmp_path: Path, routers: str | None) -> None:
    source = make(TOPK, seed=0, routers=routers)
    source.save_pretrained(tmp_path / "model")
    model = replaying(tmp_path, seed=1)
    of_routers = sum(p.numel() for layer in source.moe_layers for p in layer.router.parameters())
    assert count_parameters(model).active == count_parameters(source).active - of_routers
    assert flops_per_token(model, 128) == flops_per_token(source, 128) - 2 * of_routers
    partly = make(model.config.router, seed=1, routers="2-3:topk+2-3:k:1")
    numbers = [layer.router.experts_per_token(128) for layer in source.moe_layers]
    assert [layer.router.experts_per_token(128) for layer in partly.moe_layers] == [*numbers[:2], 1, 1]


def test_a_cache_and_vectors_instead_of_token_ids_are_refused(other: Path) -> None:
    model = replaying(other, seed=1).eval()
    with pytest.raises(ConfigError, match="use_cache"):
        model(torch.zeros(1, S, dtype=torch.long), use_cache=True)
    with pytest.raises(ConfigError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, S, 128))


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, "model.num_experts=4", "num_experts in config.json of .*=8: must be 4, as in this run$"),
        ({}, "model.layers=2", "num_hidden_layers in config.json of .*=4: must be 2, as in this run$"),
        ({}, "router.digest=abc", "^router.digest=abc: must be [0-9a-f]{64}, the checksum of .*, or left out$"),
        (
            {},
            "router.run=/no/such",
            "^router.run=/no/such: must be the folder of a finished run that has a saved model",
        ),
        ({"max_position_embeddings": 16}, "", "^data.seq_len=128: must be at most 16, the number of positions of"),
        (
            {"model_type": "mixtral"},
            "",
            "^model_type in config.json of .*=mixtral: must be moe_routing, as in this run$",
        ),
        (
            {"router": {"_target_": "moe.routers.expert_choice.ExpertChoice"}},
            "",
            "ExpertChoice: must be a causal router that decides once in a layer, adds no output, and knows no domains$",
        ),
        ({"router": {"_target_": "os.system"}}, "", "must be a class of moe.routers"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_one_line(
    other: Path, tmp_path: Path, changes: dict[str, Any], words: str, message: str
) -> None:
    shutil.copytree(other, tmp_path / "run")
    settings = tmp_path / "run/model/config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changes))
    with pytest.raises(ConfigError, match=message) as raised:
        read_cells(["router=replay", f"router.run={tmp_path / 'run'}", *words.split()])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("router=replay", "^router.run: required, for example 'router.run=outputs/default/base'$"),
        (
            "model.routers=0:replay",
            "^model.routers=replay: must be an option without .*; choose router=replay, and name",
        ),
    ],
)
def test_without_another_run_it_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_cells([words])


def test_a_sweep_compares_replay_with_learned_routing_and_with_replay_in_some_layers(other: Path) -> None:
    """The key `router.run` does not apply to top-k. The losses of probabilities do not apply to replay."""
    words = ["-m", "router=topk,replay", f"router.run={other}", "model.routers=null,2-3:hash", "seed=1"]
    cells = read_cells(words) or []
    assert [cell.choices["router"] for cell in cells] == ["topk", "topk", "replay", "replay"]
    assert [cell.config.model.routers is None for cell in cells] == [True, False, True, False]
    assert all("run" not in cell.config.router for cell in cells[:2])
    assert all(len(cell.config.router["digest"]) == 64 for cell in cells[2:])
    assert cells[2].ignored >= {"lb", "z", "noise", "optimizer.router_lr"}
    specs = MoEConfig.of(cells[3].config.model, cells[3].config.router, vocab_size=V, seq_len=128)
    assert [specs.router_of(number)["_target_"].rpartition(".")[2] for number in range(4)] == 2 * ["Replay"] + 2 * [
        "Hash"
    ]


def test_one_run_under_two_names_is_one_cell(other: Path, tmp_path: Path) -> None:
    """A trailing slash is no other name, and a copy of the run has the same digest."""
    with pytest.raises(ConfigError, match=r"^two cells of this sweep are the same run: router.run=.* and router.run="):
        read_cells(["-m", "router=replay", f"router.run={other},{other}/"])
    shutil.copytree(other, tmp_path / "copy")
    assert len(read_cells(["-m", "router=replay", f"router.run={other},{tmp_path / 'copy'}"]) or []) == 1


def test_a_run_replays_another_run_and_refuses_one_with_another_tokenizer(
    cell: Callable[..., Cell], tmp_path: Path
) -> None:
    first = cell("steps=1", "eval_every=1")
    run(first)
    folder = tmp_path / "first"  # whose path needs no quotes
    shutil.copytree(first.folder / "model", folder / "model")
    words = ["router=replay", f"router.run={folder}", "steps=1", "eval_every=1"]
    second = cell(*words, f"out={tmp_path / 'second'}")
    assert len(second.config.router["digest"]) == 64
    run(second)
    ids = torch.arange(20)[None]
    one, two = (load_model(each.folder / "model")(ids).routing for each in (first, second))
    assert all(torch.equal(a[0].expert, b[0].expert) for a, b in zip(one, two, strict=True))
    with pytest.raises(ConfigError, match=r"^router.run=.*: must be a run with the tokenizer of this run$"):
        run(cell(*words, "data.vocab_size=401", f"out={tmp_path / 'third'}"))
