"""Tests that saved models load in processes that know transformers only, and that saving them again changes nothing."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.config.schema import ModelConfig
from moe.data.tokenizer import train_bpe
from moe.model.architecture import AUTO_MAP, CODE, MoEConfig
from moe.model.decoder import MoEForCausalLM

SIZES = {"dim": 16, "heads": 2, "layers": 2, "ffn": 16, "num_experts": 4, "dense_ffn": 16}
TOPK = {"_target_": "moe.routers.topk.TopK", "k": 2}
FILES = {"config.json", "generation_config.json", "model.safetensors", CODE.name}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the folder of a small saved model and its tokenizer."""
    tokenizer = train_bpe(["some words to learn"], 300)
    config = MoEConfig.of(ModelConfig(**SIZES), TOPK, vocab_size=len(tokenizer), seq_len=32)
    torch.manual_seed(0)
    MoEForCausalLM(config).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


WITHOUT_MOE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, again = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "Please pass the argument `trust_remote_code=True`" in str(error), error
    assert "moe" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print(model(**tokenizer("some words", return_tensors="pt")).logits.sum().item())
model.save_pretrained(again)
generate = pipeline("text-generation", model=folder, trust_remote_code=True)
assert generate("some words", max_new_tokens=3)[0]["generated_text"].startswith("some words")
"""


def test_a_process_that_does_not_import_moe_loads_a_saved_model_if_it_trusts_the_folder(
    saved: Path, tmp_path: Path
) -> None:
    """It has the same logits there, works in a pipeline, and is saved again with the same files."""
    command = [sys.executable, "-c", WITHOUT_MOE, str(saved), str(tmp_path / "again")]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache")}, **quiet)
    assert done.returncode == 0, done.stderr
    here = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([train_bpe(["some words to learn"], 300)("some words")["input_ids"]])
    assert float(done.stdout) == pytest.approx(here(ids).logits.sum().item(), abs=1e-4)
    assert {path.name for path in (tmp_path / "again").iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_without_the_package_the_file_in_a_saved_model_says_what_to_install(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of another project that is also called moe is not taken for it."""
    for name in ("moe", "moe.model"):
        with monkeypatch.context() as patch:
            for loaded in ("moe.model.decoder", "moe.model"):
                patch.delitem(sys.modules, loaded)
            patch.setitem(sys.modules, name, None)  # it can no longer be imported
            with pytest.raises(ImportError, match=r"^this model needs the Python package moe-routing, .*`pip install"):
                runpy.run_path(str(saved / CODE.name))


def test_a_saved_model_names_its_code_and_a_process_that_knows_it_runs_no_other(saved: Path, tmp_path: Path) -> None:
    """Once this project is imported, the Auto classes use it and never the file in the folder."""
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
    (saved / CODE.name).write_text("raise AssertionError('the file of the folder was run')")
    for trust in (None, False, True):
        assert type(AutoConfig.from_pretrained(saved, trust_remote_code=trust)) is MoEConfig
        model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=trust)
        assert type(model) is MoEForCausalLM
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE.name).read_bytes() == CODE.read_bytes()
