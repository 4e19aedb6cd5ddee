"""Fixtures and settings for all tests: one thread, a small corpus of real text, and small configurations.

The configurations are read from overrides, as on a command line.
"""

import gc
import json
import os
import shutil
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from copy import deepcopy
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

gc.disable()  # imports create a million objects, none of which is garbage
# ruff: noqa: E402

# Large libraries are imported before `moe`, so that Python finds their compiled files. In imports made by a module that
# jaxtyping instruments, it looks for compiled files of another name, and would compile thousands of modules again.
# W&B is the first, because its classes look for their source in every module that is already imported.
import wandb.apis.public  # noqa: F401, I001
import jaxtyping
import pytest
import torch
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
from type_checks import jaxtyped

jaxtyping.jaxtyped = jaxtyped  # with which every function of `moe` is decorated when it is imported
from small_runs import OUT, read_small_cell

from moe.config.cell import Cell

torch.set_num_threads(1)

SMALL = """
    model.dim=32 model.heads=2 model.layers=2 model.ffn=32 model.num_experts=4 model.dense_ffn=64
    data.seq_len=32 data.vocab_size=400 data.max_val_blocks=4
    steps=6 batch_size=4 eval_every=3 save_every=2 logger.mode=disabled
""".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write real text in two domains: the help topics of Python, divided by the first letters of their names."""
    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    rows = [{"text": text, "half": "early" if name < "d" else "late"} for name, text in sorted(topics.items())]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="session")
def small(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides that make any command small: a tiny model, the test corpus, and a separate cache of the data."""
    cache = tmp_path_factory.mktemp("cache")
    data = ["data=text", f"data.source.paths=[{corpus}]", "data.source.column=text", "data.source.domain=half"]
    return [*data, f"data.cache={cache}", *SMALL]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save an empty file in place of each picture of a report, because drawing takes a third of the time of a report.

    It is for tests that read only text and tables. All figures are made nevertheless, but not drawn.
    """
    monkeypatch.setattr("moe.analysis.report.report._save_figure", lambda figure, path: path.touch())


@pytest.fixture
def finished_ablation(tmp_path: Path) -> Path:
    """Write the results of a small sweep, the temperature ablation, and return the folder above it."""
    rows = ["experiment,run,status,seed,router.temp,val/loss", "x,a,finished,42,1.5,4.0", "x,b,finished,43,1.5,4.1"]
    rows += ["x,c,finished,42,2.0,3.9", "x,d,finished,43,2.0,4.5"]
    (tmp_path / "temperature_ablation").mkdir()
    (tmp_path / "temperature_ablation" / "results.csv").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture
def cell(small: list[str], tmp_path: Path):
    """Return a function that reads one small cell from overrides. The cell's folder is in the folder of the test."""

    def read(*overrides: str) -> Cell:
        [out] = [word.removeprefix("out=") for word in overrides if word.startswith("out=")] or [str(tmp_path)]
        one = deepcopy(read_small_cell((*small, *(word for word in overrides if not word.startswith("out=")))))
        one.config.out = out
        return one._replace(folder=out / one.folder.relative_to(OUT))

    return read


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return the browser of the tests that are marked `browser`."""
    from playwright.sync_api import sync_playwright  # only these tests need this package

    chromium = shutil.which("chromium")
    assert chromium, "these tests need Debian's package chromium"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()
