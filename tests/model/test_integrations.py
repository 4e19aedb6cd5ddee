"""Tests that tools of others take a saved model: TRL and PEFT train it, lm-eval evaluates it.

Each runs in a process of its own, because these libraries warn, and warnings are errors here.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config.options import CONF
from moe.launch.command_line import read_cells
from moe.launch.run import run

pytestmark = pytest.mark.integrations
PAGE = (CONF.parent / "docs" / "models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python( tools)?\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TASK = """task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def folder(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a finished run, at the place that docs/models.md names, in the current folder."""
    monkeypatch.chdir(tmp_path)
    [cell] = read_cells([*small, "steps=2", "eval_every=2"]) or []
    run(cell)
    return cell.folder.rename(tmp_path / "outputs/default/base")


def output_of(command: list[str], folder: Path) -> str:
    """Run a command that must succeed, with caches of its own, and return what it prints."""
    caches = {"HF_HOME": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules")}
    environment = os.environ | caches | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trl_trains_adapters_of_peft_as_the_page_says(folder: Path, tmp_path: Path) -> None:
    """Losses are finite, the load-balance loss is logged, and the merged model is loaded again."""
    check = """
import math
log = trainer.state.log_history
assert all(math.isfinite(row["loss"]) and row["aux_loss"] >= 1 for row in log if "loss" in row), log
AutoModelForCausalLM.from_pretrained("tuned/model", trust_remote_code=True)
"""
    output_of([sys.executable, "-c", "\n".join([*(block for _, block in BLOCKS), check])], tmp_path)
    assert (tmp_path / "tuned/model/modeling_moe_routing.py").is_file()


def test_trl_trains_all_weights_of_a_saved_model(folder: Path, tmp_path: Path) -> None:
    """TRL recomputes activations by default."""
    load, [train] = BLOCKS[0][1], [block for kind, block in BLOCKS if kind]
    whole = train.replace(", peft_config=lora", "").replace(".merge_and_unload()", "")
    assert len(whole) < len(train)
    output_of([sys.executable, "-c", load + whole], tmp_path)


def test_lm_eval_evaluates_a_saved_model_as_the_page_says(folder: Path) -> None:
    [command] = re.findall(r"^lm_eval (.*)$", PAGE, re.MULTILINE)
    rows = [{"start": "The state of", "ends": [" the union", " zq zq"]}] * 4
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "endings.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    words = command.replace("lambada_openai", "endings").split()
    tool = [sys.executable, "-m", "lm_eval", *words, "--include_path", str(folder)]
    assert "|endings|" in output_of(tool, folder)
