"""Tests of the README: its commands are accepted, its table of metrics is complete, and its links lead to files."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from moe.checks import ConfigError
from moe.config.options import CONF
from moe.data.tokenizer import train_bpe
from moe.launch.command_line import read_cells
from moe.metrics.__main__ import readme_table
from moe.metrics.catalog import METRICS

ROOT = CONF.parent
README = (ROOT / "README.md").read_text()
JOINED_LINES = README.replace("\\\n", " ")
COMMANDS = re.findall(r"^python train\.py (.*?)(?:\s+#.*)?$", JOINED_LINES, flags=re.MULTILINE)


def test_the_commands_of_the_readme_are_found() -> None:
    assert "-m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44" in COMMANDS
    assert "router=temperature router.temp=1.5" in COMMANDS


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with the files that `python -m moe.model.smollm2 smollm2` writes, of a smaller model."""
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    tokenizer = train_bpe(["some words"], 259)
    tokenizer.save_pretrained("smollm2")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained("smollm2")


@pytest.mark.usefixtures("downloaded")
@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("--")])
def test_commands_are_accepted(command: str) -> None:
    """The seeds of an experiment are reduced to one, because composing all cells takes long."""
    one_seed = ["seed=42"] if command.startswith("experiment=") and "seed=" not in command else []
    assert read_cells([*shlex.split(command), *one_seed])


ABOUT_HYDRA = (ROOT / "docs" / "hydra.md").read_text(encoding="utf-8").split("## What is refused")
HYDRA_COMMANDS = re.findall(r"`python train\.py (.*?)`", ABOUT_HYDRA[0])
HYDRA_COMMANDS += re.findall(r"^python train\.py (.*?)\n```", ABOUT_HYDRA[0], re.MULTILINE | re.DOTALL)
REFUSED = ["+nois=1", "~seed", "--config-name=x", "--config-path=x", "--experimental-rerun=x", "-m lb=interval(0,1)"]
REFUSED += ["hydra.run.dir=x", "hydra.sweep.dir=x", "-m --cfg job", "-m seed=range(0,10002)"]
REFUSED += ["-m model.dense_ffn=64,77", "-m variant=dense model.ffn=64,128", "-m variant=null,dense model.ffn=64,128"]


@pytest.mark.parametrize("command", [each for each in HYDRA_COMMANDS if "lab" not in each])  # test_outside has these
def test_what_the_page_about_hydra_says_works(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # Optuna is needed only for training
    if "slurm" not in command:  # needs Slurm
        cells = read_cells(shlex.split(command.replace("\\\n", "").replace("noise_lb_seed", "noise_lb_seed seed=1")))
        assert (cells is None) == any(flag in command for flag in ("--cfg", "--info"))


@pytest.mark.parametrize("program", [[], ["moe", "train", "${args_no_hyphens}"]])
def test_what_an_agent_of_wandb_starts_is_a_command_of_this_project(program: list[str]) -> None:
    """The words that an agent makes of the sweep on the page about Hydra, with values of W&B, are accepted."""
    sweep = yaml.safe_load(re.search(r"```yaml\n(program: .*?)```", ABOUT_HYDRA[0], re.DOTALL)[1])
    assert (ROOT / sweep["program"]).is_file()
    chosen = {"noise": {"value": 0.31}, "router": {"value": "switch"}, "seed": {"value": 42}}
    assert chosen.keys() == sweep["parameters"].keys()
    words = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    command = program or sweep["command"]
    start = next(number for number, word in enumerate(command) if word in ("${program}", "train")) + 1
    given = [each for word in command[start:] for each in (words if word == "${args_no_hyphens}" else [word])]
    [cell] = read_cells(given)
    assert (cell.config.noise, cell.choices["router"], cell.config.seed) == (0.31, "switch", 42)


def test_the_page_about_hydra_names_every_file_that_uses_its_private_modules() -> None:
    users = [path for path in (ROOT / "moe").rglob("*.py") if "hydra._internal" in path.read_text(encoding="utf-8")]
    [table] = (ROOT / "docs" / "hydra.md").read_text(encoding="utf-8").split("## Hydra's private modules")[1:]
    assert {f"`{path.relative_to(ROOT).as_posix()}`" for path in users} <= set(re.findall("`[^`]+`", table))


@pytest.mark.parametrize("command", REFUSED)
def test_what_the_page_about_hydra_says_is_refused(command: str) -> None:
    with pytest.raises(ConfigError):
        read_cells(shlex.split(command))


def test_the_table_of_metrics_matches_the_catalog() -> None:
    """The README has the table that `python -m moe.metrics --write` writes."""
    _, table, _ = re.split("<!-- .*metrics.* -->\n", README)
    assert table.strip() == readme_table().strip()
    for name, metric in METRICS.items():
        assert f"`{name}`" in table or metric.group == "router loss", name


def test_the_file_tree_names_every_module_and_folder() -> None:
    tree = README.split("## Where things are")[1].split("A run folder holds")[0]
    for module in (ROOT / "moe").glob("*.py"):
        assert module.name in tree or module.name == "__init__.py", module.name
    for package in (ROOT / "moe").glob("*/__init__.py"):
        assert f"{package.parent.name}/" in tree, package.parent.name
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith((".", "_")) and folder.name in ("conf", "moe", "tests"):
            assert f"{folder.name}/" in tree


def test_linked_files_exist() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
