"""Tests without a GPU of what the tests on a GPU share, so that they do not fall behind the code."""

from collections.abc import Callable

import torch
from test_gpu import LOSSES, accepted, first_pass

from moe.config.cell import Cell


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
