"""Tests of process-wide settings: each cell makes its own, even if several cells train in the same process."""

from pathlib import Path
from typing import Any

import torch
from small_runs import run

from moe.training import process


def test_a_cell_sets_its_own_matmul_precision_after_another_cell_in_the_same_process(cell: Any, tmp_path: Path) -> None:
    for precision in ("high", "highest"):
        run(cell("steps=1", f"matmul_precision={precision}", f"out={tmp_path}/{precision}"))
        assert torch.get_float32_matmul_precision() == precision


def test_gradients_on_a_gpu_are_repeatable_and_those_on_a_cpu_need_no_setting() -> None:
    """Attention on a GPU has gradients that differ from run to run, unless torch is told to avoid them."""
    process.configure(threads=1)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    for device, expected in (("cuda", True), ("cpu", False)):
        with process.repeatable_gradients(torch.device(device)):
            assert torch.are_deterministic_algorithms_enabled() == expected
        assert not torch.are_deterministic_algorithms_enabled()


def test_configure_returns_the_settings() -> None:
    settings = process.configure(threads=1, matmul_precision="highest")
    assert (settings["threads"], settings["matmul_precision"]) == (1, "highest")
