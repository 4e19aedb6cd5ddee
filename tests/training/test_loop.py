"""Tests of the training loop: resume, micro-batches, losses, recorded metrics, and numbers that are not finite."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from small_runs import run, untimed

from moe.checks import ConfigError
from moe.config.options import options
from moe.data.blocks import batch as read_batch
from moe.files import sha256
from moe.launch.command_line import read_cells
from moe.model.causal_lm import MoEForCausalLM
from moe.model.cost import flops_per_token
from moe.routing.decision import Knobs
from moe.routing.loss_table import COSTLY, LOSSES
from moe.runs.events import read_events
from moe.runs.signals import Interrupted
from moe.training import passes
from moe.training.divergence import Diverged, locate_nonfinite
from moe.training.objective import total_loss
from moe.training.schedules import LinearSchedule, knob_settings
from moe.training.setup import build_model, prepare_data
from moe.training.step import micro_batches


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the weights of a run's saved model."""
    return sha256(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "overrides",
    [
        ["router=temperature", "schedule=linear", "noise=0.3", "model.dropout=0.1"],
        ["optimizer=adamw", "grad_accum=2", "capacity=1.0", "precision=bf16"],
        ["router=spectra", "grad_accum=2", "model.neftune_noise_alpha=5"],
    ],
)
def test_a_resumed_run_has_bitwise_the_weights_and_events_of_an_uninterrupted_run(
    cell: Any, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is stopped and resumed three times ends like one that nothing interrupted, bit for bit.

    It prints the same last line too, which has the perplexity before training.
    """
    whole, stopped = cell(*overrides, f"out={tmp_path}/whole"), cell(*overrides)
    run(whole)
    last = capsys.readouterr().out.splitlines()[-1]
    uninterrupted = whole.folder
    for stop_after in (1, 3, 5):
        with pytest.raises(Interrupted) as interrupted:
            run(stopped, stop_after=stop_after)
        assert interrupted.value.exit_status == 143
        assert not (stopped.folder / "model").exists()
        torch.manual_seed(999)  # the random state of the process must not matter
    run(stopped)
    assert last.partition(" by a unigram")[0].count(" before training, ") == 1
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert weights_digest(uninterrupted) == weights_digest(stopped.folder)
    assert untimed(uninterrupted) == untimed(stopped.folder)


def test_a_run_is_not_resumed_with_changed_text(cell: Any, corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(corpus.read_text())
    one = cell(f"data.source.paths=[{text}]")
    with pytest.raises(Interrupted):
        run(one, stop_after=3)
    text.write_text("".join(line + "\n" for line in corpus.read_text().splitlines()[5:]))
    with pytest.raises(ConfigError, match=r"the text or the tokenizer of data\.\* has changed since step 3"):
        run(one)
    text.write_text(corpus.read_text())
    run(one)


def test_models_of_milestones_are_saved_and_can_be_loaded(cell: Any, tmp_path: Path) -> None:
    uninterrupted, stopped = (cell("steps=8", "save_model=all", f"out={tmp_path}/{name}") for name in "ab")
    run(uninterrupted)
    with pytest.raises(Interrupted):
        run(stopped, stop_after=3)
    run(stopped)
    names = [path.name for path in sorted((uninterrupted.folder / "milestones").iterdir())]
    assert names == ["step-00000001", "step-00000002", "step-00000004", "step-00000006"]
    for name in names:
        one, other = (each.folder / "milestones" / name / "model.safetensors" for each in (uninterrupted, stopped))
        assert sha256(one) == sha256(other)
    first = MoEForCausalLM.from_pretrained(uninterrupted.folder / "milestones" / names[0])
    last = MoEForCausalLM.from_pretrained(uninterrupted.folder / "model")
    assert not torch.equal(first.lm_head.weight, last.lm_head.weight)


@pytest.mark.parametrize(
    ("router", "knob"), [("temperature", "temperature"), ("gumbel", "temperature"), ("topk", "noise")]
)
def test_every_saved_model_has_the_validation_loss_and_the_knobs_of_its_step(cell: Any, router: str, knob: str) -> None:
    """A model saved while a schedule runs has, without further settings, the validation loss that the run logged."""
    start = ["schedule=linear", f"schedule.knob={knob}", "schedule.start=5.0"]
    one = cell(f"router={router}", *start, "steps=8", "eval_every=2", "save_model=all", "optimizer.adamw_lr=0.02")
    run(one)
    data = prepare_data(one.config)
    blocks = read_batch(data.val, range(len(data.val)))
    logged = {event["step"]: event for event in read_events(one.folder / "events.jsonl") if event["kind"] == "eval"}
    saved = {step: one.folder / f"milestones/step-{step:08d}" for step in (2, 4, 6)} | {8: one.folder / "model"}
    for step, folder in saved.items():
        model = MoEForCausalLM.from_pretrained(folder)
        assert model(blocks.ids, blocks.labels).loss.item() == pytest.approx(logged[step]["val/loss"], rel=1e-6)
        assert model.config.router_temperature == logged[step]["temperature"]
        assert model.config.router_noise == logged[step]["noise"]
        with_noise, without = (model.train()(blocks.ids, knobs=knobs).logits for knobs in (None, Knobs.of()))
        assert torch.equal(with_noise, without) == (logged[step] == logged[8] and router != "gumbel")


def test_equal_seeds_give_equal_weights_and_different_seeds_different_weights(cell: Any, tmp_path: Path) -> None:
    cells = [cell(f"seed={seed}", f"out={tmp_path}/{n}") for n, seed in enumerate((1, 1, 2))]
    for one in cells:
        run(one)
    first, same_seed, other_seed = (weights_digest(one.folder) for one in cells)
    assert first == same_seed != other_seed


def test_four_micro_batches_of_two_blocks_train_like_one_of_eight(cell: Any, tmp_path: Path) -> None:
    """Four micro-batches of two blocks give the same losses and gradients as one of eight, except for rounding.

    This holds for losses that are means over tokens, so the run has no balance loss. The global balance loss includes
    earlier micro-batches of the step: it equals the plain one with one micro-batch per step, and not with four.
    """
    undivided = cell("batch_size=8", "lb=0", "z=0.1", f"out={tmp_path}/a")
    divided = cell("batch_size=2", "grad_accum=4", "lb=0", "z=0.1", f"out={tmp_path}/b")
    for one in (undivided, divided):
        run(one)
    for a, b in zip(untimed(undivided.folder), untimed(divided.folder), strict=True):
        assert a["step"] == b["step"]
        for key in {"train/loss", "train/router_z", "val/loss", "grad_norm"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=2e-4), key
        if a["kind"] == "train":
            assert a["train/load_balance"] == a["train/load_balance_global"]
            assert b["train/load_balance"] != b["train/load_balance_global"]


def test_every_passes_is_recorded_with_unweighted_losses(cell: Any) -> None:
    one = cell("lb=0.5", "z=0.1", "noise=0.2")
    run(one)
    events = untimed(one.folder)
    training = [e for e in events if e["kind"] == "train"]
    assert [e["step"] for e in training] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in events if e["kind"] == "eval"] == [0, 3, 6]
    assert all(0.9 < e["train/load_balance"] < 2 for e in training)
    assert all(e["noise"] == 0.2 for e in training)


def test_the_weight_of_a_loss_changes_the_gradient_but_not_the_logged_loss(cell: Any, tmp_path: Path) -> None:
    runs = {}
    for lb in (0.0, 1.0):
        one = cell(f"lb={lb}", "steps=1", "eval_every=1", f"out={tmp_path}/{lb}")
        run(one)
        runs[lb] = untimed(one.folder)
    first = [next(e for e in events if e["kind"] == "train") for events in runs.values()]
    assert first[0]["train/loss"] == first[1]["train/loss"]
    assert first[0]["train/load_balance"] == first[1]["train/load_balance"]
    assert first[0]["grad_norm"] != first[1]["grad_norm"]


def test_the_loss_of_each_layer_has_the_current_weight_of_its_router(cell: Any) -> None:
    """The sparsity loss of each layer is multiplied by the current weight of that layer's router.

    During training, the controllers of two layers arrive at different weights.
    """
    config = cell("router=relu", "router.coefficient=0.5").config
    model = build_model(config, vocab_size=400)
    routers = [layer.mlp.router for layer in model.model.layers]
    ids = torch.randint(0, 300, (2, 16))
    output = model(ids, ids)
    for weight in (0.5, 2.0):
        routers[1].log_coefficient.fill_(math.log(weight))
        sparsity = output.aux["sparsity"]
        expected = output.loss + 0.5 * sparsity[0] + weight * sparsity[1]
        torch.testing.assert_close(total_loss(config, [router.loss_weights for router in routers], output), expected)


def test_the_weights_of_a_shared_loss_in_the_router_and_in_the_configuration_are_added(cell: Any) -> None:
    others = ["router.cosine_similarities_loss_coef=0", "router.so_lambda_max=0", "lb=0"]
    config = cell("router=spectra", "router.router_entropy_coef=0.25", "router_entropy=0.5", *others).config
    model = build_model(config, vocab_size=400)
    ids = torch.randint(0, 300, (2, 16))
    output = model(ids, ids)
    expected = output.loss + 0.75 * output.aux["router_entropy"].sum()
    torch.testing.assert_close(
        total_loss(config, [layer.router.loss_weights for layer in model.moe_layers], output), expected
    )


@pytest.mark.parametrize(("name", "key"), [(name, loss.weight) for name, loss in LOSSES.items()])
def test_every_shared_loss_is_in_the_total_loss_with_its_configured_weight(name: str, key: str, cell: Any) -> None:
    config = cell("lb=0", "noise=0.1", f"{key}=0.3").config
    model = build_model(config, vocab_size=400)
    ids = torch.randint(0, 300, (2, 16))
    output = model(ids, ids, costly=COSTLY, knobs=Knobs.of(noise=0.1))
    expected = output.loss + 0.3 * output.aux[name].sum()
    torch.testing.assert_close(total_loss(config, [{} for _ in model.moe_layers], output), expected)


def test_scheduled_knobs_depend_on_the_step_alone_and_end_at_the_configured_values(cell: Any) -> None:
    config = cell("router=temperature", "router.temp=2.0", "schedule=linear", "noise=0.1", "steps=10").config
    schedule = LinearSchedule("temperature", 5.0)
    settings = [knob_settings(config, schedule, step) for step in range(11)]
    assert settings[0] == {"temperature": 5.0, "noise": 0.1}
    assert settings[10] == {"temperature": 2.0, "noise": 0.1}


def test_validation_blocks_are_the_same_for_every_seed_and_training_blocks_differ(cell: Any) -> None:
    one, two = cell("seed=1").config, cell("seed=2").config
    data = prepare_data(one)
    assert data.val["input_ids"][:].tolist() == prepare_data(two).val["input_ids"][:].tolist()
    assert not torch.equal(micro_batches(one, data, 0)[0].ids, micro_batches(two, data, 0)[0].ids)


def test_a_run_with_a_capacity_is_evaluated_with_and_without_it(cell: Any) -> None:
    one = cell("capacity=0.5")
    run(one)
    last = untimed(one.folder)[-1]
    assert last["routing/drop_rate"] == 0
    assert last["val_capacity/drop_rate"] > 0.4
    assert last["val_capacity/loss"] != last["val/loss"]


def test_recorded_flops_count_the_experts_that_validation_tokens_asked_for(cell: Any) -> None:
    one = cell("router=top_p", "router.mean_k=4", "steps=1", "eval_every=1")
    facts = run(one)
    last = untimed(one.folder)[-1]
    active = [last[f"routing/active_experts/layer{layer:02d}"] for layer in range(2)]
    assert all(1 < number < 4 for number in active)
    model = MoEForCausalLM.from_pretrained(one.folder / "model")
    assert facts["flops_per_token"] == flops_per_token(model, 32, active=active) < flops_per_token(model, 32)


# What an experiment needs on the test corpus, or if every run takes one step.
# `finetuning` needs a checkpoint: tests/launch/test_imported_models.py.
NEEDED = {"finetuning_base": ["data.train_domains=[early]"], "scaling": ["variant=budget_small"]}


@pytest.mark.parametrize("experiment", sorted({*options("experiment")} - {"finetuning"}))
def test_the_first_and_last_cell_of_every_experiment_can_be_trained(
    experiment: str, small: list[str], finished_ablation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the first and the last cell are composed, because Hydra takes long to compose all of them.
    split = BasicSweeper.split_arguments
    first_and_last = staticmethod(lambda *arguments: [grid[:: max(1, len(grid) - 1)] for grid in split(*arguments)])
    monkeypatch.setattr(BasicSweeper, "split_arguments", first_and_last)
    settings = [*small, "steps=1", "eval_every=1", f"out={finished_ablation}", *NEEDED.get(experiment, [])]
    cells = read_cells([f"experiment={experiment}", "seed=7", *settings])
    assert cells
    for one in {cells[0].folder: cells[0], cells[-1].folder: cells[-1]}.values():
        run(one)
        assert untimed(one.folder)[-1]["step"] == 1


def test_a_loss_that_is_nan_stops_the_run_before_it_changes_the_weights(
    cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stops at the step whose loss is NaN, here the fourth, and can be resumed from its last checkpoint."""
    one = cell("save_every=1")
    correct_total_loss = passes.total_loss
    calls = []

    def total_loss_with_nan(*arguments: Any, **weight: float) -> torch.Tensor:
        calls.append(1)
        return correct_total_loss(*arguments, **weight) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(passes, "total_loss", total_loss_with_nan)
    with pytest.raises(Diverged, match=r"step 3: gradient of .* is not finite"):
        run(one)
    assert json.loads((one.folder / "events.jsonl").read_text().splitlines()[-1])["step"] == 3
    monkeypatch.setattr(passes, "total_loss", correct_total_loss)
    run(one)
    assert (one.folder / "model").exists()


@pytest.mark.parametrize(
    ("parameter", "expert", "expected"),
    [
        ("model.layers.1.mlp.experts.up", 2, "weight model.layers.1.mlp.experts.up (expert 2)"),
        ("model.layers.0.input_layernorm.weight", None, "weight model.layers.0.input_layernorm.weight"),
    ],
)
def test_locate_nonfinite_names_layer_tensor_and_expert(
    cell: Any, parameter: str, expert: int | None, expected: str
) -> None:
    config = cell().config
    model = build_model(config, vocab_size=400)
    ids = torch.zeros(1, 8, dtype=torch.long)
    tensor = dict(model.named_parameters())[parameter]
    with torch.no_grad():
        tensor[expert if expert is not None else 0] = float("nan")
    assert locate_nonfinite(model, {"input_ids": ids}, Knobs.of()) == expected


def test_locate_nonfinite_names_the_gradient_of_one_expert(cell: Any) -> None:
    model = build_model(cell().config, vocab_size=400)
    ids = torch.zeros(1, 8, dtype=torch.long)
    model(ids, ids).loss.backward()
    gradient = model.model.layers[1].mlp.experts.down.grad
    gradient[3, 0, 0] = float("inf")
    assert (
        locate_nonfinite(model, {"input_ids": ids}, Knobs.of())
        == "gradient of model.layers.1.mlp.experts.down (expert 3)"
    )


def test_locate_nonfinite_names_the_first_output_that_overflows(cell: Any) -> None:
    model = build_model(cell().config, vocab_size=400)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(3e38)
    assert locate_nonfinite(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}, Knobs.of()).startswith(
        "output of model.layers.0.self_attn.v_proj"
    )
