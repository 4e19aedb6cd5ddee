"""Tests that `compile=true` trains the same model. Run them with `pytest -m compiled`.

The runs are separate processes, because code with the runtime type checks of the other tests cannot be compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import untimed

TRAIN = Path(__file__).parents[2] / "train.py"


@pytest.mark.compiled
@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        "router=temperature schedule=linear noise=0.1 capacity=1.0 grad_accum=2 model.dropout=0.1 model.layers=1",
        "router=relu model.expert=swiglu model.shared_experts=1 model.layers=1",
        "router=spectra model.first_k_dense_replace=1",
        "adapter=lora_attention adapter.parts=[attention,experts] model.layers=1",
        "adapter=perft_r adapter.router.k=2 model.layers=1",
        "model.num_experts=4 model.experts_by_layer=1:8 model.routers=1:k:1 noise=0.1 load=0.1",
    ],
    ids=["drawn and dropped", "swiglu", "dense layer", "lora", "perft_r", "different numbers of experts"],
)
def test_a_compiled_run_differs_only_by_rounding(overrides: str, small: list[str], tmp_path: Path) -> None:
    events_of_runs = []
    # The test has its own compiler cache, because a compiler that is killed leaves incomplete files in its cache.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for compiled in ("true", "false"):
        command = [*small, *overrides.split(), f"compile={compiled}", f"out={tmp_path / compiled}"]
        command = [sys.executable, str(TRAIN), *command]
        subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment)
        [folder] = (tmp_path / compiled).glob("*/*/")
        events_of_runs.append([line for line in untimed(folder) if line["kind"] == "train"])
    assert len(events_of_runs[0]) == len(events_of_runs[1]) == 6
    for compiled_event, event in zip(*events_of_runs, strict=True):
        for name in ("train/loss", "grad_norm"):
            assert compiled_event[name] == pytest.approx(event[name], rel=1e-3, abs=1e-6), name
