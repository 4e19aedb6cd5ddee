"""The settings of the process hold while a cell trains; a later cell in the same process makes its own settings."""

from pathlib import Path
from typing import Any

import torch
from small_runs import run

from moe.training import process


def test_each_cell_of_a_process_has_its_own_matmul_precision(cell: Any, tmp_path: Path) -> None:
    for precision in ("high", "highest"):
        run(cell("steps=1", f"matmul_precision={precision}", f"out={tmp_path}/{precision}"))
        assert torch.get_float32_matmul_precision() == precision


def test_the_settings_are_returned() -> None:
    settings = process.configure(threads=1, matmul_precision="highest")
    assert (settings["threads"], settings["matmul_precision"]) == (1, "highest")
