"""The README tells the truth: its commands compose, its tables are complete, its example keeps the contract."""

import re
import shlex

import pytest

from moe.commandline import CONF, read_cells
from moe.metrics import METRICS

ROOT = CONF.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python train\.py (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


def test_there_are_commands() -> None:
    assert "-m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44" in COMMANDS
    assert "router=temperature router.temp=1.5" in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("--")])
def test_commands_compose(command: str) -> None:
    assert read_cells(shlex.split(command))


def test_every_metric_is_defined() -> None:
    for name in (*METRICS, "router_gram"):
        assert f"`routing/{name}`" in README, name


def test_the_file_tree_names_every_module() -> None:
    tree = README.split("## Where things are")[1].split("In a run folder")[0]
    for module in (ROOT / "moe").glob("*.py"):
        assert module.name in tree or module.name == "__init__.py", module.name
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith((".", "_")) and folder.name in ("conf", "moe", "tests"):
            assert f"{folder.name}/" in tree


def test_pictures_and_pages_exist() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
