"""Tests of a checkpoint whose experts stay on the disk: the same numbers, and little memory."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import EXPRESSED, SPECIAL, V, around, router_of, tiny

from moe.checks import ConfigError
from moe.config.model import ModelConfig
from moe.model.causal_lm import MoEForCausalLM
from moe.model.imported_checkpoint import read_checkpoint

IDS = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
# Prints by how many bytes the memory of a process grows at most that belongs to no file, while it reads and runs.
MEASURE = """
import sys, threading, time, torch
from pathlib import Path
from architectures import around, router_of, tiny
from moe.config.model import ModelConfig
from moe.model.imported_checkpoint import read_checkpoint

ids = torch.arange(3, 35)[None]
around(tiny("mixtral"))(ids)  # imports everything

def used():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watch():
    global most
    while running:
        most = max(most, used())
        time.sleep(0.001)

before, most, running = used(), 0, True
thread = threading.Thread(target=watch)
thread.start()
source = read_checkpoint(ModelConfig(checkpoint=sys.argv[1], offload=sys.argv[2] or None, attention="sdpa"))
with torch.no_grad():
    logits = around(source, router_of(source), copied=False)(ids).logits
running = False
thread.join()
print(most - before, logits.double().sum().item())
"""


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "dbrx"])
def test_experts_on_the_disk_give_the_same_numbers(kind: str, tmp_path: Path) -> None:
    """Also those of a checkpoint in bf16, which is read in fp32."""
    source = tiny(kind).bfloat16()
    source.save_pretrained(tmp_path / "model")
    found = []
    for offload in (None, str(tmp_path / "experts")):
        read = read_checkpoint(ModelConfig(checkpoint=str(tmp_path / "model"), offload=offload, attention="sdpa"))
        model = around(read, router_of(read) if kind in EXPRESSED else None, copied=False)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        with torch.no_grad():
            found.append(model(IDS).logits)
    assert all(p.is_meta for layer in model.moe_layers for p in layer.experts.parameters())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_with_its_experts_on_the_disk_needs_a_fraction_of_its_weights(tmp_path: Path) -> None:
    layers, experts, dim, width = 12, 8, 256, 512
    sizes = {"hidden_size": dim, "intermediate_size": width, "head_dim": 64, "num_hidden_layers": layers}
    tiny("mixtral", **sizes, num_local_experts=experts, num_experts=experts).save_pretrained(tmp_path / "model")
    weights = layers * experts * 3 * dim * width * 4  # bytes
    peaks, sums = [], []
    for offload in ("", str(tmp_path / "experts")):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), offload]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # architectures.py is beside the tests
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        peak, total = done.stdout.split()
        peaks.append(int(peak))
        sums.append(float(total))
    assert sums[0] == sums[1]
    assert peaks[0] > weights  # so the measurement sees what it should see
    assert peaks[1] < weights / 3, peaks


def test_experts_that_keep_their_weights_in_parts_cannot_stay_on_the_disk(tmp_path: Path) -> None:
    tiny("dbrx").save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="because the experts of a dbrx keep their weights in parts"):
        read_checkpoint(ModelConfig(checkpoint=str(tmp_path / "model"), offload=str(tmp_path / "experts")))
    assert not (tmp_path / "experts").exists()


def test_a_folder_for_experts_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"model\.offload=.*file: cannot be written") as caught:
        read_checkpoint(ModelConfig(checkpoint=str(tmp_path / "model"), offload=str(tmp_path / "file")))
    assert "\n" not in str(caught.value)


def test_a_model_on_the_disk_leaves_no_files(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "model")
    settings = ModelConfig(checkpoint=str(tmp_path / "model"), offload=str(tmp_path / "experts"), attention="sdpa")
    model = MoEForCausalLM(around(tiny("mixtral")).config, causal_lm=read_checkpoint(settings))
    assert any((tmp_path / "experts").glob("experts-*/*"))
    del model
    gc.collect()
    assert not any((tmp_path / "experts").iterdir())
