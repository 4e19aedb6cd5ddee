"""Tests of README and docs/: their commands are accepted, and README's links lead to files."""

import importlib.util
import io
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from architectures import tiny
from transformers import LlamaConfig, LlamaForCausalLM
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from moe.analysis.__main__ import main as analyze
from moe.analysis.report import report
from moe.bench import __main__ as bench
from moe.checks import ConfigError
from moe.config.options import CONF
from moe.data.tokenizer import train_bpe
from moe.launch.command_line import help_text, read_cells
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.planning import __main__ as planning
from moe.planning.cost import Speed
from moe.results import table

ROOT = CONF.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTED_ELSEWHERE = ("hydra.md", "own-lab.md", "extending.md", "clusters.md")
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in TESTED_ELSEWHERE]
COMMAND = re.compile(r"(?:^ *|`)(?:python|moe) (train|analyze)(?:\.py)?( .*?)?(?: +#.*)?(?:$|`)", re.MULTILINE)


def commands(program: str, *texts: str) -> list[str]:
    """Return the words after each `python train.py` or `python analyze.py` of some texts, once each."""
    found = [each for text in texts for each in COMMAND.findall(text.replace("\\\n", " "))]
    return list(dict.fromkeys(words.strip() for name, words in found if name == program and "$e" not in words))


TEXTS = (README, *(path.read_text(encoding="utf-8") for path in PAGES))
ALL = (README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")))
WORKSPACES = re.findall(r"python -m moe\.dashboard (\w+)((?: [\w.]+=\S+)*)", "".join(TEXTS))
COMMANDS = commands("train", *TEXTS) + [f"-m experiment={name}{words}" for name, words in dict.fromkeys(WORKSPACES)]


def test_readme_begins_with_what_people_do() -> None:
    """README shows a single run, a grid, how a grid is judged, and W&B."""
    assert {"router=temperature router.temp=1.5", "-m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44"} <= {
        *commands("train", README)
    }
    assert "multirun/noise_lb_seed" in commands("analyze", README)
    assert "\n## W&B\n" in README


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what commands read: texts, an empty package of problems, and small models."""
    folder = tmp_path_factory.mktemp("downloads")
    for name in ("notes/a.txt", "reasoning_gym/__init__.py", "reasoning_gym-0.1.25.dist-info/METADATA"):
        path = folder / name
        path.parent.mkdir()
        path.write_text("Metadata-Version: 2.1\nName: reasoning-gym\nVersion: 0.1.25\n" if "-" in name else "")
    tokenizer = train_bpe(["some words"], 259)
    tokenizer.save_pretrained(folder / "smollm2")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("smollm2", "code", "chat"):
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "MODEL")
    tiny("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "RUN" / "model")
    router = {"_target_": "moe.routers.topk.TopK", "k": 2, "gate": "renorm"}
    config = MoEConfig(vocab_size=len(tokenizer), max_position_embeddings=128, router=router, **sizes)
    MoEForCausalLM(config).save_pretrained(folder / "RUN" / "model")
    return folder


@pytest.fixture
def downloaded(downloads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to the folder that commands read. No command writes there, because none is carried out."""
    monkeypatch.chdir(downloads)
    monkeypatch.syspath_prepend(downloads)


@pytest.mark.usefixtures("downloaded")
@pytest.mark.parametrize("command", [command for command in COMMANDS if "--" not in command])
def test_commands_are_accepted(command: str) -> None:
    """The seeds of an experiment are reduced to one, because composing all cells takes long."""
    one_seed = ["seed=42"] if "experiment=" in command and "seed=" not in command else []
    assert read_cells([*shlex.split(command), *one_seed])


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("--help")])
def test_questions_are_answered(command: str) -> None:
    assert help_text(shlex.split(command))


@pytest.mark.parametrize("command", commands("analyze", *TEXTS))
def test_options_of_the_analysis_are_known(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of each command reach what reads the runs, or what judges published numbers."""

    def reached(*_: object) -> None:
        raise ValueError("reached")

    monkeypatch.setattr(table, "load_runs", reached)
    monkeypatch.setattr(report, "write_replay", reached)
    messages = io.StringIO()
    monkeypatch.setattr("sys.stderr", messages)
    assert analyze(shlex.split(command)) == 2
    assert messages.getvalue().endswith(": reached\n")


def test_commands_of_several_processes_are_accepted() -> None:
    found = {pair for text in TEXTS for pair in re.findall(r"--config_file (\S+) train\.py ([^#`\n]+)", text)}
    assert {name for name, _ in found} == {"conf/launch/ddp.yaml", "conf/launch/fsdp.yaml"}
    for name, words in found:
        assert (ROOT / name).is_file()
        assert read_cells(shlex.split(words))


def test_the_extras_of_pip_exist() -> None:
    """Each `pip install -e '.[NAME]'` of README and docs names extras of pyproject.toml."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {name for text in ALL for names in re.findall(r"\.\[([\w,]+)\]", text) for name in names.split(",")}
    assert named <= known.keys()
    assert {"dev", "docs"} <= named


@pytest.mark.parametrize(("change", "unreachable"), [("", 0), ("effect=0.5%", 3)])
def test_what_readme_says_about_its_plan_is_what_the_command_finds(
    change: str, unreachable: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Half a percent is the other effect that README speaks of. The speed decides no number of seeds."""
    [typed] = re.findall(r"`python -m moe plan (experiment=\S+) (effect=\S+?)`", README)
    words = [typed[0], change or typed[1], "--out", str(tmp_path / "plan.json")]
    monkeypatch.setattr("sys.argv", ["moe plan", *words])
    monkeypatch.setattr(planning, "_speed", lambda cells, sources: Speed(1e-12, 1e-12, "made up"))
    assert planning.main() == 0
    claims = json.loads((tmp_path / "plan.json").read_text())["claims"]
    seeds = [each["seeds"] for each in claims if each["seeds"]]
    out_of_reach = [each for each in claims if each["reachable"] is False]
    assert len(out_of_reach) == unreachable
    said = " ".join(README.split())
    if change:
        assert f"For half a percent, {len(out_of_reach)} claims need more than 32 seeds" in said
    else:
        number = f"{min(seeds)} to {max(seeds)} seeds for {len(seeds)} of the {len(claims)} claims"
        assert f"For a difference of 1 % that is {number}." in said


def test_commands_of_other_modules_are_known() -> None:
    """Each `python -m moe.NAME` of README and docs names a module, and each benchmark takes its options."""
    found = [tuple(words) for text in TEXTS for words in re.findall(r"python -m (moe[\w.]+)([^`#\n$]*)", text)]
    for module, words in dict.fromkeys(found):
        assert importlib.util.find_spec(module), module
        if module == "moe.bench" and words.strip():
            assert bench._read(module, shlex.split(words)).question == shlex.split(words)[0]


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


def test_linked_files_exist() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
