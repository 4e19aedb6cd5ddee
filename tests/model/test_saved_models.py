"""Tests that saved models load in processes that know transformers only, and that saving them again changes nothing."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from run_folders import FACTS, write_record
from small_runs import read_small_cell
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moe.checks import escaped
from moe.config.model import ModelConfig
from moe.config.options import CONF
from moe.data.tokenizer import train_bpe
from moe.launch.command_line import read_cells
from moe.launch.run import run
from moe.model.architecture import AUTO_MAP, CODE, MoEConfig
from moe.model.causal_lm import MoEForCausalLM
from moe.model.decoder import MoEModel
from moe.runs.card import model_card
from moe.runs.events import read_events
from moe.runs.record import RunRecord

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
            for loaded in ("moe.model.causal_lm", "moe.model"):
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
        assert type(AutoModel.from_pretrained(saved, trust_remote_code=trust)) is MoEModel
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE.name).read_bytes() == CODE.read_bytes()


def test_auto_model_loads_the_decoder_alone(saved: Path) -> None:
    """It has the hidden states of the whole model, and so its logits before the output matrix."""
    ids = torch.tensor([[1, 2, 3]])
    whole = AutoModelForCausalLM.from_pretrained(saved)
    decoder, about = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert not about["missing_keys"]
    assert torch.equal(whole.lm_head(decoder(ids).last_hidden_state), whole(ids).logits)


def test_the_page_about_saved_models_runs_as_printed(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that need this project alone run on a small trained model, whose card says what the run was."""
    monkeypatch.chdir(tmp_path)
    [cell] = read_cells([*small, "steps=2", "eval_every=1", "save_model=all"]) or []
    run(cell)
    folder = cell.folder.rename(tmp_path / "outputs/default/base")
    page = (CONF.parent / "docs" / "models.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    card = ModelCard.load(folder / "model/README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    perplexity = json.loads((folder / "metrics.json").read_text())["final_metrics"]["val/perplexity"]
    assert f"| `val/perplexity` | {perplexity:.4g} |" in card.text
    assert "| seed | 42 |" in card.text
    assert "| router | TopK(k=" in card.text
    assert "| adapter | none |" in card.text
    first = next(event for event in read_events(folder / "events.jsonl") if event["step"] == 1 and "val/loss" in event)
    milestone = (folder / "milestones/step-00000001/README.md").read_text()
    assert f"| `val/loss` | {first['val/loss']:.4g} |" in milestone
    assert "This is the model after step 1 of 2, saved in the middle of its training." in milestone
    assert "validation text after step 1.\n" in milestone


def test_a_model_card_escapes_names_hides_paths_and_names_the_packages_of_routers(
    small: list[str], tmp_path: Path
) -> None:
    """Text from the user becomes neither HTML nor a link nor a row of a table, and the title has no path of a file."""
    evil = "<script>x</script> [a](http://x) | y"
    data = FACTS["data"] | {
        "source": {"paths": ["/home/me/secret.txt"]},
        "tokenizer": {"name": "/home/me/tokenizer"},
        "corpus_sha256": "0" * 64,
        "documents": {"/home/me/secret.txt": {"license": "the user's own"}, evil: {"license": evil}},
        "domains": {evil: {"train": {"tokens": 1234}}},
    }
    plugins = {"mylab": {"sha256": "1" * 64, "commit": None}}
    config = asdict(read_small_cell(tuple(small)).config)
    config |= {"router": TOPK | {"gate": evil}, "schedule": {"_target_": "lab.S"}}
    versions = dict.fromkeys(("moe-routing", "torch", "transformers"), "1")
    names = {"name": evil, "experiment": evil}
    write_record(tmp_path, **names, config=config, data=data, plugins=plugins, versions=versions)
    card = model_card(RunRecord.read(tmp_path / "run.json"), {"val/loss": 2.0, "val/perplexity": None})
    assert "| temperature schedule | S() |" in card
    assert "<script>" not in card
    assert "](http" not in card
    assert "/home/me" not in card
    assert "| 1,234 |" in card
    assert "| `val/loss` | 2 |" in card
    assert "classes of the package mylab" in card
    milestone = model_card(RunRecord.read(tmp_path / "run.json"), {}, step=1)
    assert "The run measured nothing after step 1: its key `eval_every` decides where it does." in milestone
    assert "`val/loss`" not in milestone
    assert all(line.replace("\\|", "").count("|") in (0, 3) for line in card.splitlines() if line.startswith("|"))
    config["data"]["source"] = {"paths": ["/home/me/client-x, steps=y.txt"]}
    config["model"]["dense"] = "/home/me/client-x/dense"
    config["data"]["tokenizer"] = "client-x/tokenizer"
    names["name"] = (
        "data.source.paths=_home_me_client-x,steps=y.txt_,data.tokenizer=client-x_tokenizer,"
        "model.dense=_home_me_client-x_dense,lb=0.1,router.gate=sigmoid,model.hea-12345678"
    )
    config["router"]["gate"], config["steps"] = "sigmoid", 3
    write_record(tmp_path, **names, config=config, data=data, plugins=plugins, versions=versions)
    card = model_card(RunRecord.read(tmp_path / "run.json"), {"val/loss": 2.0})
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert "client-x" not in title
    assert title.endswith(f": steps=3, lb={config['lb']}, router.gate=sigmoid")
    config["adapter"] = {"_target_": "moe.adapters.lora.Lora", "rank": 4}
    (tmp_path / "tuned").mkdir()
    for checkpoint, origin in ((str(tmp_path / "model"), f"the run {escaped(evil)}"), ("/home/me/model", "model")):
        config["model"]["checkpoint"] = checkpoint
        write_record(tmp_path / "tuned", name="a", config=config, data=data, versions=versions)
        tuned = RunRecord.read(tmp_path / "tuned" / "run.json")
        for has_adapter in (False, True):
            card = model_card(tuned, {}, has_adapter=has_adapter)
            assert f"| imported from | {origin}".replace(" | y", " \\| y") in card
            assert ("| adapter | Lora(rank=4), merged into the weights |" in card) != has_adapter
            assert ("counted in training, with the adapter" in card) != has_adapter
