"""Tests without a GPU of what the tests on a GPU share, so that they do not fall behind the code."""

from collections.abc import Callable

import torch
from test_gpu import LOSSES, accepted, first_pass

from moe.config.cell import Cell
from moe.routing.decision import Knobs
from moe.training.setup import set_up
from moe.training.step import accumulate_gradients, micro_batches


def test_the_pass_that_gpu_tests_compare_runs_on_a_cpu(cell: Callable[..., Cell]) -> None:
    config = cell("router=topk", "capacity=0.75", "output_orthogonality=0.01").config
    loss, aux, gradients = first_pass(config, "cpu")
    assert loss > 0
    assert aux["output_orthogonality"].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert torch.stack([gradient.norm() for gradient in gradients.values()]).max() > 0


def test_settings_that_a_router_ignores_are_left_out(cell: Callable[..., Cell]) -> None:
    config = accepted(cell, "switch", "capacity=0.75", *LOSSES).config
    assert (config.capacity, config.lb, config.output_orthogonality) == (0.75, 0.01, 0.0)


def test_batches_made_ahead_are_used_once(cell: Callable[..., Cell]) -> None:
    training = set_up(cell("router=topk").config)
    batches = micro_batches(training.config, training.data, 3)
    training.ahead[0] = batches
    knobs = Knobs.of()
    for step in (0, 3):
        _, last = accumulate_gradients(training, step, knobs)
        assert torch.equal(last.ids, batches[-1].ids)
    assert not training.ahead
    _, last = accumulate_gradients(training, 0, knobs)
    assert not torch.equal(last.ids, batches[-1].ids)
