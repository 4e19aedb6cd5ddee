"""Tests that the recipes of docs/extending.md work as printed, all together, in a copy of this project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`(\S+\.(?:py|yaml))`:\n\n```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = """
    model.dim=16 model.heads=2 model.layers=1 model.ffn=16 model.num_experts=4 model.dense_ffn=32
    data.seq_len=32 data.vocab_size=300 data.max_val_blocks=4 data.source.longest=3000
    steps=2 batch_size=2 eval_every=1 logger.mode=disabled
""".split()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of this project with every recipe applied."""
    copy = tmp_path_factory.mktemp("extended")
    for folder in ("moe", "conf", "tests", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("example-report"))
    for name in ("train.py", "analyze.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    for name, content in FILE.findall(PAGE):
        assert not (copy / name).exists(), f"{name}: the file exists already"
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(content, encoding="utf-8")
    for diff in DIFF.findall(PAGE):
        done = subprocess.run(
            ["git", "apply", "--recount", "-"], cwd=copy, input=diff, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{diff}\n{done.stderr}"
    python(copy, "-m", "moe.metrics", "--write")
    return copy


def python(project: Path, *arguments: str) -> str:
    """Run Python in a project and return what it prints. Fails if the exit status is not 0."""
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_five_recipes_and_the_table_names_each_of_their_files() -> None:
    introduction, *recipes, outside = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    assert len(recipes) == 5
    assert outside.startswith("Outside of this project")
    for name in [name for name, _ in FILE.findall(PAGE)] + re.findall(r"^\+\+\+ b/(\S+)", PAGE, re.MULTILINE):
        assert f"`{name}`" in introduction or (name.startswith("tests/") and "a test" in introduction), name


@pytest.mark.pages
def test_training_and_a_report_work_with_every_recipe(project: Path) -> None:
    python(project, "train.py", "-m", "router=distance,steady", "data=topics", f"data.cache={project}/cache", *SMALL)
    runs = {json.loads(path.read_text())["choices"]["router"]: path.parent for path in project.rglob("run.json")}
    assert set(runs) == {"distance", "steady"}
    for folder in runs.values():
        final = json.loads((folder / "metrics.json").read_text())["final_metrics"]
        assert 0 <= final["routing/near_ties"] <= 1
        assert {"val/loss/statements", "val/loss/other"} <= set(final)
    events = [json.loads(line) for line in (runs["steady"] / "events.jsonl").read_text().splitlines()]
    assert all(event["train/steadiness"] > 0 for event in events if event["kind"] == "train")
    python(project, "analyze.py", "multirun", "--metric", "routing/near_ties", "--out", "analysis")
    report = (project / "analysis" / "report.md").read_text(encoding="utf-8")
    assert "routing/near_ties" in report
    assert "quality_and_balance.png" in report
    assert (project / "analysis" / "quality_and_balance.png").exists()


@pytest.mark.pages
def test_tests_of_routers_and_metrics_pass_with_every_recipe(project: Path) -> None:
    """With every recipe applied, the tests of routers, metrics and the recipes themselves pass."""
    new = [name for name, _ in FILE.findall(PAGE) if name.startswith("tests/")]
    existing = ["tests/routers/test_contract.py", "tests/metrics/test_catalog.py", "tests/metrics/test_formulas.py"]
    python(project, "-m", "pytest", "-q", *new, *existing, "-k", "distance or steady or near or loss or page")
