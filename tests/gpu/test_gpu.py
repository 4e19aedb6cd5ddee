"""Tests on a GPU: routers, kernels, waits of the host, resume, compilation, layouts. Run them with `pytest -m gpu`.

Each of them compares the GPU with the CPU, or two runs on the GPU with each other. No test requires a speed.
"""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import run, untimed
from torch import Tensor, nn
from train_processes import TRAIN, TrainCommand, patch, read_record

from moe.bench.profile import host_waits
from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.config.options import complete
from moe.config.schema import Config
from moe.files import sha256
from moe.model import experts as experts_module
from moe.model.causal_lm import MoEForCausalLM
from moe.model.experts import Experts
from moe.routing.decision import LABELS, Knobs, TrainingText
from moe.runs.signals import Interrupted
from moe.training.graphs import MOST
from moe.training.objective import total_loss
from moe.training.passes import layer_settings
from moe.training.setup import Training, build_model, prepare_data, set_up, token_counts
from moe.training.step import micro_batches, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROUTERS = complete("router")
WAITING = {"base_layers"}  # the host assigns tokens itself
LOSSES = ("lb=0.01", "z=0.001", "output_orthogonality=0.01")
ALIGNED = ("model.dim=64", "model.ffn=64", "data.seq_len=64", "router=topk")  # the grouped kernel takes such shapes
Cells = Callable[..., Cell]


def accepted(cell: Cells, router: str, *words: str) -> Cell:
    """Return the cell of a router with these settings, without those that it ignores, which are refused."""
    while True:
        try:
            return cell(f"router={router}", *words)
        except ConfigError as error:
            refused = str(error).partition("=")[0]
            left = [word for word in words if not word.startswith(f"{refused}=")]
            if left == [*words]:
                raise
            words = (*left,)


def first_pass(config: Config, device: str) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Run forward and backward on the first micro-batch, without noise. Return loss, auxiliary losses, gradients."""
    data = prepare_data(config)
    model = build_model(config, vocab_size=len(data.tokenizer))
    nn.Module.to(model, torch.device(device))
    text = TrainingText(token_counts(data), data.domains)
    for layer in model.moe_layers:
        layer.router.before_training(text)
    model.eval()
    blocks = micro_batches(config, data, 0)[0].to(model.device)
    inputs = blocks.inputs | {"labels": blocks.labels}
    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
        output = model(**inputs, **layer_settings(config), knobs=Knobs.of(device=model.device))
        loss = total_loss(config, [layer.router.loss_weights for layer in model.moe_layers], output)
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {name: value.detach().cpu() for name, value in output.aux.items()}, gradients


@pytest.mark.parametrize("capacity", ["null", "0.75"])
@pytest.mark.parametrize("router", ROUTERS)
def test_each_router_computes_the_same_losses_and_gradients_as_on_the_cpu(
    router: str, capacity: str, cell: Cells
) -> None:
    """In fp32, losses and gradients on the GPU equal those on the CPU, except for rounding."""
    config = accepted(cell, router, f"capacity={capacity}", *LOSSES).config
    loss, aux, gradients = first_pass(config, "cuda")
    expected_loss, expected_aux, expected_gradients = first_pass(config, "cpu")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert aux.keys() == expected_aux.keys()
    for name, value in expected_aux.items():
        torch.testing.assert_close(aux[name], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {aux[name]} {value}")
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("router", ROUTERS)
def test_in_bf16_each_router_computes_about_the_same_loss_as_on_the_cpu_in_fp32(router: str, cell: Cells) -> None:
    bf16, fp32 = (
        cell(f"router={router}", "model.dim=64", "model.ffn=64", f"precision={p}").config for p in ("bf16", "fp32")
    )
    loss, _, gradients = first_pass(bf16, "cuda")
    expected_loss, _, expected_gradients = first_pass(fp32, "cpu")
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    name = "model.embed_tokens.weight"
    cosine = nn.functional.cosine_similarity(gradients[name].flatten(), expected_gradients[name].flatten(), dim=0)
    assert cosine > 0.97


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("router", ROUTERS)
def test_each_router_trains_on_the_gpu(router: str, precision: str, cell: Cells) -> None:
    recompute = f"gradient_checkpointing={'true' if precision == 'bf16' else 'false'}"
    settings = [f"precision={precision}", recompute, "noise=0.1", "steps=4", "eval_every=2"]
    one = accepted(cell, router, *settings, *ALIGNED[:3])
    facts = run(one)
    losses = [event["train/loss"] for event in untimed(one.folder) if event["kind"] == "train"]
    assert facts["device"].startswith("cuda")
    assert facts["peak_memory_gb"] > 0
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize("kind", ["silu", "swiglu"])
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 10, 0, 0], [0, 0, 0, 10], [10, 0, 0, 0]])
def test_the_grouped_kernel_equals_the_loop_in_bf16(
    kind: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kernels give the same outputs and gradients, and an expert without rows gets a gradient of exactly 0."""
    torch.manual_seed(0)
    experts = Experts(4, 16, hidden=32, kind=kind).to("cuda")
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    rows, gradient = torch.randn(2, 10, 16, device="cuda")
    results = []
    for kernel in ("loop", "grouped"):
        monkeypatch.setattr(experts_module, "choose_kernel", lambda *_, kernel=kernel: kernel)
        junk = torch.full((1 << 22,), float("nan"), device="cuda")
        del junk  # leaves memory full of NaN, so that values that a kernel does not write show
        x = rows.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = experts(x, torch.tensor(counts, device="cuda"))
        y.float().backward(gradient)
        results.append([y.detach().float(), x.grad, *(p.grad for p in experts.parameters())])
        experts.zero_grad()
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=2e-2, atol=2e-2 * loop.abs().max().item())
    empty = torch.tensor(counts) == 0
    assert all((p[empty] == 0).all() for p in results[1][2:])


@pytest.mark.parametrize("router", ROUTERS)
def test_a_dropless_forward_and_backward_pass_waits_for_the_gpu_only_if_the_number_of_experts_varies(
    router: str, cell: Cells
) -> None:
    config = cell(*ALIGNED[:3], f"router={router}", "precision=bf16").config
    model = build_model(config, vocab_size=400)
    nn.Module.to(model, torch.device("cuda"))
    model.train()
    ids = torch.randint(0, 400, (4, 64), device="cuda")
    told = torch.zeros(4, len(LABELS), dtype=torch.long, device="cuda")
    knobs = Knobs.of(noise=0.1, device="cuda")
    weights = [layer.router.loss_weights for layer in model.moe_layers]

    def forward_and_backward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(input_ids=ids, labels=ids, knobs=knobs, told=told)
            loss = total_loss(config, weights, output)
        loss.backward()

    forward_and_backward()  # the first call may wait, to create handles
    waits = host_waits(forward_and_backward)
    router_of_layer = model.moe_layers[0].router
    if router not in WAITING and (router_of_layer.fixed_k is not None or router_of_layer.mixing_flops()):
        assert not waits


def test_a_training_step_waits_for_the_gpu_a_few_times_whatever_the_number_of_layers(cell: Cells) -> None:
    totals = []
    for layers in (2, 4):
        training = set_up(cell(*ALIGNED, f"model.layers={layers}", "precision=bf16").config)
        train_step(training, 0)
        waits = host_waits(lambda training=training: train_step(training, 1))
        print(waits)
        totals.append(sum(waits.values()))
    assert totals[0] == totals[1] <= 8, totals


def outcome(one: Cell) -> tuple[str, list[dict[str, Any]]]:
    """Return the digest of a run's weights, and its events."""
    return sha256(one.folder / "model" / "model.safetensors"), untimed(one.folder)


@pytest.mark.parametrize("capacity", ["null", "1.0"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(precision: str, capacity: str, cell: Cells) -> None:
    """Three runs have bitwise the same weights and events: two uninterrupted ones, and one that is resumed."""
    sizes = "model.dim=128 model.ffn=256 model.heads=4 data.seq_len=256 batch_size=16 noise=0.1 model.dropout=0.1"
    words = [*sizes.split(), f"precision={precision}", f"capacity={capacity}", "router=topk", "router.k=3"]
    outcomes = []
    for stop_after in (None, None, 3):
        with tempfile.TemporaryDirectory() as folder:
            one = cell(*words, f"out={folder}")
            if stop_after is not None:
                with pytest.raises(Interrupted):
                    run(one, stop_after=stop_after)
            run(one)
            outcomes.append(outcome(one))
    assert outcomes[0] == outcomes[1], "two uninterrupted runs"
    assert outcomes[0] == outcomes[2], "a resumed run"


def test_recomputed_layers_have_the_same_gradients_and_save_memory(cell: Cells) -> None:
    sizes = "model.dim=128 model.ffn=512 model.layers=4 data.seq_len=256 batch_size=16 steps=2 eval_every=2"
    facts = [
        run(cell(*sizes.split(), "precision=bf16", f"gradient_checkpointing={value}", f"seed={seed}"))
        for seed, value in ((1, "true"), (1, "false"))
    ]
    assert facts[0]["peak_memory_gb"] < facts[1]["peak_memory_gb"]


def as_one_rank_of(layout: str) -> None:
    """Make this process train in a layout of several ranks, with a process group of NCCL that has one rank."""
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    patch("moe.training.parallel", "layout", lambda _: lambda *, expert_parallel: layout)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["sharded", "experts"])
def test_layouts_of_several_ranks_train_the_same_model_on_one_gpu(
    layout: str, precision: str, small: list[str], tmp_path: Path
) -> None:
    """With FSDP2, and with divided experts, a run on one GPU equals an ordinary run except for rounding."""
    words = [*small, *ALIGNED, f"precision={precision}", "optimizer=muon", "noise=0.1"]
    commands = [TrainCommand(tmp_path / name, words) for name in ("plain", layout)]
    for command, sabotage in zip(commands, (None, functools.partial(as_one_rank_of, layout)), strict=True):
        assert command.run(sabotage) == 0, command.output
    facts = read_record(commands[1].folder)["facts"]
    assert facts["device"].startswith("cuda")
    assert facts["ranks"]["layout"] == layout
    assert_about_equal(*(command.folder for command in commands), rel=1e-3 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_differs_only_by_rounding(precision: str, small: list[str], tmp_path: Path) -> None:
    words = [*small, *ALIGNED, f"precision={precision}", "noise=0.1", "model.dropout=0.1"]
    folders = []
    for compiled in ("true", "false"):
        command = [sys.executable, str(TRAIN), *words, f"compile={compiled}", f"out={tmp_path / compiled}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        folders += (tmp_path / compiled).glob("*/*/")
    assert_about_equal(*folders, rel=1e-3 if precision == "fp32" else 2e-2)


def without_fusion() -> None:
    """Make a process run operations one by one that are joined on a GPU."""
    patch("moe.fused", "_can_compile", lambda _: lambda: False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_joined_operations_differ_only_by_rounding_and_are_repeatable(
    precision: str, small: list[str], tmp_path: Path
) -> None:
    """At sizes at which all functions are joined, which smaller tests do not reach."""
    sizes = "model.dim=512 model.heads=8 model.layers=1 model.ffn=64 data.seq_len=512 batch_size=16 data.vocab_size=600"
    words = [*small, *sizes.split(), "router=topk", f"precision={precision}", "noise=0.1", "lb=0.01", "z=0.001"]
    commands = [TrainCommand(tmp_path / name, words) for name in ("joined", "again", "separate")]
    for command, sabotage in zip(commands, (None, None, without_fusion), strict=True):
        assert command.run(sabotage) == 0, command.output
    assert untimed(commands[0].folder) == untimed(commands[1].folder)
    assert_about_equal(commands[0].folder, commands[2].folder, rel=1e-4 if precision == "fp32" else 2e-2)


def assert_about_equal(a: Path, b: Path, *, rel: float) -> None:
    """Assert that two runs have equal losses and gradient norms at each step, except for rounding."""
    events = [[event for event in untimed(folder) if event["kind"] == "train"] for folder in (a, b)]
    assert len(events[0]) == len(events[1]) > 0
    for one, other in zip(*events, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=rel)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=5 * rel)


def test_a_saved_model_generates_the_same_tokens_on_the_gpu_as_on_the_cpu(cell: Cells) -> None:
    one = cell("steps=2", "eval_every=2", "model.dim=64")
    run(one)
    texts = []
    for device in ("cuda", "cpu"):
        model = MoEForCausalLM.from_pretrained(one.folder / "model")
        nn.Module.to(model, torch.device(device))
        ids = torch.ones(1, 1, dtype=torch.long, device=device)
        texts.append(model.generate(ids, min_new_tokens=8, max_new_tokens=8, do_sample=False).tolist())
    assert len(texts[0][0]) == 9
    assert texts[0] == texts[1]


def passes_of(training: Training, *, steps: int) -> list[Tensor]:
    """Train for some steps. Return the values of each, then the weights."""
    values = [train_step(training, step) for step in range(steps)]
    numbers = [torch.tensor([v for v in each.values() if v is not None], dtype=torch.double) for each in values]
    return [*numbers, *(p.detach().clone() for p in training.model.parameters())]


@pytest.mark.parametrize("router", ROUTERS)
def test_recorded_passes_compute_bitwise_the_same_as_others(router: str, cell: Cells) -> None:
    """With dropout, noise, and a load that the second micro-batch gets from the first, three steps are equal.

    A router with a fixed number of experts per token must not need the host in a pass.
    """
    words = [*ALIGNED[:3], "precision=bf16", "noise=0.1", "model.dropout=0.1", "grad_accum=2"]
    results = []
    for value in ("true", "false"):
        training = set_up(accepted(cell, router, *words, f"cuda_graph={value}").config)
        results.append(passes_of(training, steps=3))
        if training.graphs is not None:
            print(router, training.graphs.used())
            fixed = training.routers[0].fixed_k is not None or bool(training.routers[0].mixing_flops())
            assert not fixed or training.graphs.obstacle is None or router in WAITING, training.graphs.obstacle
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("words", [["capacity=1.0"], ["precision=fp32"], ["output_orthogonality=0.1"]])
def test_a_pass_in_which_the_host_waits_runs_without_a_graph(words: list[str], cell: Cells) -> None:
    training = set_up(cell(*ALIGNED, "cuda_graph=true", "precision=bf16", *words).config)
    train_step(training, 0)
    assert training.graphs is not None
    assert "waits for the GPU in" in training.graphs.used()["cuda_graph"]
    assert not training.graphs.recorded


def test_a_moved_weight_is_recorded_anew_and_too_many_changes_end_recording(cell: Cells) -> None:
    training = set_up(cell(*ALIGNED, "cuda_graph=true", "precision=bf16").config)
    graphs = training.graphs
    assert graphs is not None
    moved, places = training.model.moe_layers[0].experts.up, []
    for number in range(MOST):
        train_step(training, number)
        assert len(graphs.recorded) == number + 1
        places.append(moved.data)  # keeps the memory, so that each copy has another place
        moved.data = moved.data.clone()
    train_step(training, MOST)
    assert not graphs.recorded
    assert "differed" in graphs.used()["cuda_graph"]


def test_recorded_updates_compute_bitwise_the_same_as_others(cell: Cells) -> None:
    results = []
    for value in ("true", "false"):
        training = set_up(cell(*ALIGNED, "precision=bf16", "optimizer=muon", f"cuda_graph={value}").config)
        results.append(passes_of(training, steps=5))
        assert training.graphs is None or training.graphs.update_graph is not None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
