"""Test that `compile=true` trains the same model: `pytest -m compiled`.

The runs are separate processes, because the runtime type checks of the other tests stop the compiler.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import untimed

TRAIN = Path(__file__).parents[2] / "train.py"


@pytest.mark.compiled
@pytest.mark.parametrize(
    "overrides",
    [
        ["router=temperature", "schedule=linear", "noise=0.1", "capacity=1.0", "grad_accum=2", "model.dropout=0.1"],
        ["router=relu", "model.expert=swiglu", "model.shared_experts=1"],
        ["router=spectra", "model.first_k_dense_replace=1"],
    ],
)
def test_a_compiled_run_differs_only_by_rounding(overrides: list[str], small: list[str], tmp_path: Path) -> None:
    trained = []
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # a killed compiler leaves torn files behind
    for compiled in ("true", "false"):
        command = [*small, *overrides, f"compile={compiled}", f"out={tmp_path / compiled}"]
        command = [sys.executable, str(TRAIN), *command]
        subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment)
        [folder] = (tmp_path / compiled).glob("*/*/")
        trained.append([event for event in untimed(folder) if event["kind"] == "train"])
    assert len(trained[0]) == len(trained[1]) == 6
    for fast, plain in zip(*trained, strict=True):
        for name in ("train/loss", "grad_norm"):
            assert fast[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-6), name
