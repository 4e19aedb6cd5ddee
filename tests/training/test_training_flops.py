"""Tests of the FLOPs that training spends: closed forms, PyTorch's own count, and events."""

from typing import Any

import pytest
import torch
from small_runs import run, untimed
from torch.utils.flop_counter import FlopCounterMode

from moe.model.cost import flops_per_token
from moe.training.setup import Training, set_up
from moe.training.step import train_step

EXPERTS = 4


def spent_by(words: list[str], cell: Any, *, even: bool = False) -> tuple[Training, float, int]:
    """Carry out a step; return its objects, its FLOPs, and those of the matrix products as PyTorch counts them.

    even: make all experts equally probable.
    """
    training = set_up(cell(*words).config)
    if even:
        for router in training.routers:
            torch.nn.init.zeros_(router.expert_rows)
    with FlopCounterMode(display=False) as counter:
        values = train_step(training, 0)
    return training, values["train/flops"], counter.get_flop_counts()["Global"].get(torch.ops.aten.mm, 0)


def closed_form(training: Training, *, trained: float, alone: float = 0.0) -> float:
    """Return the FLOPs of a step whose tokens train so many experts each, and run others without a backward pass."""
    config, layers = training.config, training.model.moe_layers
    tokens = config.batch_size * config.grad_accum * config.data.seq_len
    expert = sum(p.numel() for p in layers[0].experts.parameters() if p.ndim == 3) / EXPERTS
    rest = flops_per_token(training.model, config.data.seq_len, active=[0.0] * len(layers))
    return tokens * (3 * rest + len(layers) * 2 * expert * (3 * trained + alone))


@pytest.mark.parametrize(
    ("words", "trained", "alone"),
    [
        (["router=topk", "router.k=1"], 1, 0),
        (["router=topk", "router.k=3"], 3, 0),
        (["router=dense_mixer"], 2, EXPERTS),  # all experts run, those of the output with a backward pass too
        (["router=matryoshka", "router.k_min=3", "router.k_max=3"], 3, 0),  # evaluation has 2
        (["router=top_p", "router.p=0.6"], 3, 0),  # of four equal probabilities, three sum to 0.6
        (["router=top_p", "router.p=0.4"], 2, 0),
        (["router=chain_of_experts", "router.k=1"], 2, 0),  # two routers run one after the other
    ],
)
def test_a_step_spends_what_its_experts_cost(words: list[str], trained: int, alone: int, cell: Any) -> None:
    training, spent, _ = spent_by([*words, f"model.num_experts={EXPERTS}"], cell, even="router=top_p" in words)
    assert spent == pytest.approx(closed_form(training, trained=trained, alone=alone), rel=1e-12)


@pytest.mark.parametrize(
    "words",
    [["router=dense_mixer"], ["router=matryoshka"], ["router=topk", "capacity=1.0"], ["router=topk", "router.k=1"]],
)
def test_what_a_step_spends_more_than_top_k_is_what_pytorch_counts(words: list[str], cell: Any) -> None:
    """PyTorch does not count attention and the loss, which cost the same with all of these routers."""
    (_, plain, counted_plain), (_, spent, counted) = (spent_by(each, cell) for each in (["router=topk"], words))
    assert counted != counted_plain
    assert spent - plain == counted - counted_plain


def test_dropped_assignments_cost_nothing(cell: Any) -> None:
    words = ["router=topk", "capacity=1.0", f"model.num_experts={EXPERTS}", "steps=1", "eval_every=1"]
    one = cell(*words)
    run(one)
    [step] = [event for event in untimed(one.folder) if event["kind"] == "train"]
    kept = 2 * (1 - step["train/routing/drop_rate"])
    assert 1 < kept < 1.99
    assert step["train/flops"] == pytest.approx(closed_form(set_up(one.config), trained=kept), rel=1e-12)


def test_flops_add_up_over_steps_in_which_the_number_of_experts_varies(cell: Any) -> None:
    """An evaluation has the FLOPs of all steps before it. It costs none itself."""
    one = cell("router=top_p", "optimizer.muon_lr=0.3", "router.p=0.6", f"model.num_experts={EXPERTS}")
    run(one)
    training, total, numbers = set_up(one.config), 0.0, set[float]()
    for event in untimed(one.folder):
        if event["kind"] == "train":
            numbers.add(event["train/routing/active_experts"])
            total += closed_form(training, trained=event["train/routing/active_experts"])
        assert event["train/flops"] == pytest.approx(total, rel=1e-12)
    assert len(numbers) > 1


def test_an_adapter_with_a_router_counts_by_the_experts_that_it_ran(cell: Any) -> None:
    adapter = ["router=topk", "adapter=perft_r", "trainable=all"]
    (one, less, _), (_, more, _) = (spent_by([*adapter, f"adapter.router.k={k}"], cell) for k in (1, 2))
    config, layers = one.config, one.model.beside_layers
    tokens = config.batch_size * config.grad_accum * config.data.seq_len
    weights = sum(p.numel() for layer in layers for p in layer.experts.parameters() if p.ndim == 3)
    assert more - less == pytest.approx(tokens * 6 * weights / layers[0].router.num_experts, rel=1e-9)
