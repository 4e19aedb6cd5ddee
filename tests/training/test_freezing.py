"""Tests of runs in which only some parts train: frozen ones stay bit for bit, and the others train as in a full run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from small_runs import run, untimed
from torch import Tensor

from moe.config.cell import Cell
from moe.launch.command_line import read_cells
from moe.launch.run import run as run_cell
from moe.model.causal_lm import MoEForCausalLM, load_model
from moe.model.parts import part_of
from moe.routing.decision import Knobs
from moe.runs.events import read_events
from moe.runs.record import RunRecord
from moe.runs.signals import Interrupted
from moe.training.setup import Training, build_model, prepare_data, set_up
from moe.training.step import accumulate_gradients, train_step

Read = Callable[..., Cell]
VALUES = ["router", "experts", "shared", "attention", "embeddings", "norms", "router+experts", "all+-router"]


def gradients(training: Training) -> dict[str, Tensor]:
    """Return the gradients of the first optimizer step."""
    training.wrapped.train()
    accumulate_gradients(training, 0, Knobs.of(device=training.model.device))
    return {name: p.grad for name, p in training.model.named_parameters() if p.grad is not None}


def changed(before: MoEForCausalLM, after: MoEForCausalLM) -> set[str]:
    """Return the parts of which some parameter changed, and "buffers" if a buffer did."""
    part, state = part_of(before), before.state_dict(keep_vars=True)
    found = after.state_dict()
    return {part.get(p, "buffers") for name, p in state.items() if not torch.equal(p, found[name])}


@pytest.mark.parametrize("trainable", VALUES)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_frozen_parts_stay_bit_for_bit_and_cost_no_state(cell: Read, trainable: str, optimizer: str) -> None:
    """Weight decay is on. The optimizers have state for what trains, and for nothing else."""
    one = cell(f"trainable={trainable}", f"optimizer={optimizer}", "model.shared_experts=1", "steps=3")
    training = set_up(one.config)
    before = build_model(one.config, vocab_size=len(training.data.tokenizer))
    for step in range(2):
        train_step(training, step, measure_updates=True)
    wanted = {"router", "experts", "shared", "attention", "embeddings", "norms"} - {"router"}
    expected = wanted if trainable == "all+-router" else {*trainable.split("+")}
    assert changed(before, training.model) == expected
    with_state = {p for optimizer in training.optimizers for p in optimizer.state}
    assert with_state == {p for p in training.model.parameters() if p.requires_grad}
    assert {part_of(training.model)[p] for p in with_state} == expected


@pytest.mark.parametrize("trainable", VALUES)
def test_the_first_gradients_of_what_trains_are_those_of_a_full_run(cell: Read, trainable: str) -> None:
    words = ("lb=0.1", "z=0.1", "model.shared_experts=1", "grad_accum=2")
    full, part = (gradients(set_up(cell(*words, f"trainable={value}").config)) for value in ("all", trainable))
    assert 0 < len(part) < len(full)
    for name, gradient in part.items():
        assert torch.equal(gradient, full[name]), name


def test_everything_trains_by_default(cell: Read) -> None:
    """The same weights and the same events, bit for bit, whether the key is given or not."""
    given, left_out = (cell(*words, "steps=3") for words in (["trainable=all"], []))
    for one in (given, left_out):
        run(one)
    first, second = (load_model(one.folder / "model").state_dict() for one in (given, left_out))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert untimed(given.folder) == untimed(left_out.folder)


@pytest.mark.parametrize(
    ("words", "learns"),
    [
        (["router=sigmoid_bias", "trainable=experts"], False),
        (["router=sigmoid_bias", "trainable=router"], True),
        (["router=expert_threshold", "trainable=experts"], False),
        (["router=expert_threshold"], True),
    ],
)
def test_a_frozen_router_does_not_learn_without_a_gradient_either(cell: Read, words: list[str], learns: bool) -> None:
    training = set_up(cell(*words).config)
    before = [buffer.clone() for router in training.routers for buffer in router.buffers()]
    train_step(training, 0)
    after = [buffer for router in training.routers for buffer in router.buffers()]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)) == learns


@pytest.mark.parametrize("loss", ["lb", "z", "lb_global", "lb_sequence"])
@pytest.mark.parametrize("trainable", ["router", "experts", "attention"])
def test_balance_losses_act_on_whatever_part_trains(cell: Read, loss: str, trainable: str) -> None:
    """Those of a frozen router reach the attention before it, and the experts of the layer before it."""
    words = (f"trainable={trainable}", "lb=0", "grad_accum=2")
    off, on = (gradients(set_up(cell(*words, f"{loss}={weight}").config)) for weight in (0, 1))
    assert off.keys() == on.keys()
    assert any(not torch.allclose(off[name], on[name]) for name in on)


def test_the_loss_of_the_only_router_does_not_reach_experts(cell: Read) -> None:
    """This is why such a key is refused: the gradients are the same with and without it."""
    words = ("trainable=experts", "model.layers=1")
    config = cell(*words).config
    plain = gradients(set_up(config))
    config.lb, config.z = 1.0, 1.0
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients(set_up(config)).items())


def test_a_router_that_trains_alone_becomes_more_even_with_a_balance_loss(cell: Read) -> None:
    words = ("trainable=router", "optimizer=adamw", "optimizer.adamw_lr=0.05", "optimizer.clip=100")
    balance = []
    for weight in (0, 1):
        training = set_up(cell(*words, f"lb={weight}").config)
        with torch.no_grad():
            for router in training.routers:
                router.weight[0] += 0.3 * router.weight.new_ones(32)  # uneven from the start
        steps = [train_step(training, step)["train/load_balance"] for step in range(6)]
        balance.append(steps[-1] - steps[0])
    assert balance[1] < balance[0] - 0.01


@pytest.mark.parametrize("words", [["trainable=router"], ["trainable=experts", "optimizer=adamw"], ["trainable=norms"]])
def test_a_resumed_run_is_bitwise_the_same(cell: Read, words: list[str], tmp_path: Path) -> None:
    whole, stopped = (cell(*words, f"out={tmp_path / name}") for name in ("whole", "stopped"))
    run(whole)
    with pytest.raises(Interrupted):
        run(stopped, stop_after=3)
    run(stopped)
    first, second = (load_model(one.folder / "model").state_dict() for one in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("words", [["gradient_checkpointing=true"], ["precision=bf16"]])
def test_frozen_parts_go_with_checkpointed_layers_and_bf16(cell: Read, words: list[str]) -> None:
    training = set_up(cell("trainable=experts", *words).config)
    found = gradients(training)
    assert {part_of(training.model)[p] for p in training.model.parameters() if p.grad is not None} == {"experts"}
    plain = gradients(set_up(cell("trainable=experts").config))
    tolerance = 0.1 if words == ["precision=bf16"] else 1e-6
    for name, gradient in found.items():
        assert (gradient - plain[name]).norm() <= tolerance * plain[name].norm()


def test_grouped_experts_compute_no_gradient_for_frozen_weights() -> None:
    from moe.model.experts import _GroupedLinear

    x, stack = torch.randn(8, 4, requires_grad=True), torch.randn(2, 4, 4)
    ends = torch.tensor([3, 8], dtype=torch.int32)
    _GroupedLinear.apply(x, stack, ends).sum().backward()
    expected = torch.cat([torch.ones(3, 4) @ stack[0], torch.ones(5, 4) @ stack[1]])
    assert torch.allclose(x.grad, expected, atol=1e-5)
    assert stack.grad is None


@pytest.fixture
def words(small: list[str], tmp_path: Path) -> list[str]:
    """Return the words of a small command that fine-tunes an imported model, whose tokenizer is that of the corpus."""
    [one] = read_cells(small) or []
    tokenizer = prepare_data(one.config).tokenizer
    tiny("mixtral", vocab_size=len(tokenizer), initializer_range=0.05).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    kept = [word for word in small if not word.startswith(("model", "data.vocab_size"))]
    return [*kept, "model=imported", f"model.checkpoint={tmp_path / 'base'}", f"out={tmp_path / 'runs'}", "steps=3"]


@pytest.mark.parametrize("own", [True, False])
def test_an_imported_model_trains_its_router_alone(words: list[str], own: bool) -> None:
    chosen = ["router={_target_: moe.routers.imported.Imported, k: 3}"] if own else []
    [one] = read_cells([*words, *chosen, "trainable=router", "optimizer=adamw", "optimizer.router_lr=0.01"]) or []
    run_cell(one)
    before = build_model(one.config, vocab_size=1)
    assert changed(before, load_model(one.folder / "model")) == {"router"}
    facts = RunRecord.read(one.folder / "run.json").facts
    assert facts is not None
    assert facts.parameters.trainable == 3 * 5 * 32
    steps = [event for event in read_events(one.folder / "events.jsonl") if "update/router" in event]
    assert steps[-1]["update/router"] > 0
    assert steps[-1]["grad_norm/router"] == pytest.approx(steps[-1]["grad_norm"])
    assert "grad_norm/experts" not in steps[-1]


@pytest.mark.parametrize("adapter", ["lora_attention", "lora_experts", "perft_r", "perft_e"])
def test_an_adapter_trains_alone_or_with_other_parts(cell: Read, adapter: str) -> None:
    for words, expected in (([], {"adapter"}), (["trainable=adapter+router"], {"adapter", "router"})):
        training = set_up(cell(f"adapter={adapter}", *words).config)
        names = training.model.adapter_names
        assert {part_of(training.model)[p] for p in training.model.parameters() if p.requires_grad} == expected
        assert {
            name for name, p in training.model.named_parameters() if part_of(training.model)[p] == "adapter"
        } == names
        off, on = (gradients(set_up(cell(f"adapter={adapter}", *words, f"lb={weight}").config)) for weight in (0, 1))
        assert any(not torch.allclose(off[name], on[name]) for name in on)


def test_a_model_that_is_only_evaluated_may_have_frozen_parts(cell: Read) -> None:
    one = cell("trainable=norms", "steps=0")
    run_cell(one)
    facts: Any = RunRecord.read(one.folder / "run.json").facts
    assert facts.parameters.trainable == 5 * 32
