"""Settings of the process hold while a cell trains, and a later cell of the same process makes its own."""

from pathlib import Path
from typing import Any

import torch
from small_runs import run

from moe.training import process


def test_each_cell_of_a_process_multiplies_as_it_says(cell: Any, tmp_path: Path) -> None:
    for precision in ("high", "highest"):
        run(cell("steps=1", f"matmul_precision={precision}", f"out={tmp_path}/{precision}"))
        assert torch.get_float32_matmul_precision() == precision


def test_what_was_set_is_recorded() -> None:
    settings = process.set_up(threads=1, matmul_precision="highest")
    assert (settings["threads"], settings["matmul_precision"]) == (1, "highest")
