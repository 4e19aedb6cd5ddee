"""Shared by all tests: one thread, a small real corpus, and small configurations read as a user would write them."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

# Import the large libraries before `moe`. Python does not find their compiled files if they are imported from a module
# that jaxtyping instruments, and then compiles thousands of files again: 20 seconds for every test process.
for name in "transformers.models.mixtral.modeling_mixtral datasets scipy.stats statsmodels.formula.api".split():
    import_module(name)

from moe.config.schema import Cell
from moe.launch import command_line

torch.set_num_threads(1)

SMALL = """
    model.dim=32 model.heads=2 model.layers=2 model.ffn=32 model.num_experts=4 model.dense_ffn=64
    data.seq_len=32 data.vocab_size=400 data.max_val_blocks=12
    steps=6 batch_size=4 eval_every=3 save_every=2 logger.mode=disabled
""".split()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="with -m faults: the file to write what was survived to")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of real text: Python's own help topics, by the first letter of their names."""
    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    rows = [{"text": text, "half": "early" if name < "d" else "late"} for name, text in sorted(topics.items())]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="session")
def small(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make any command small: tiny model, the test corpus, its own cache."""
    cache = tmp_path_factory.mktemp("cache")
    data = ["data=text", f"data.source.paths=[{corpus}]", "data.source.column=text", "data.source.domain=half"]
    return [*data, f"data.cache={cache}", *SMALL]


@pytest.fixture
def finished_ablation(tmp_path: Path) -> Path:
    """A folder of sweeps that holds the results of a small temperature ablation."""
    rows = ["run,status,router.temp,val/loss", "a,finished,1.5,4.0", "b,finished,1.5,4.1"]
    rows += ["c,finished,2.0,3.9", "d,finished,2.0,4.5"]
    (tmp_path / "temperature_ablation").mkdir()
    (tmp_path / "temperature_ablation" / "results.csv").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture
def cell(small: list[str], tmp_path: Path):
    """Reads one small cell of a command line; its folder lies in the test's own directory."""

    def read(*overrides: str) -> Cell:
        cells = command_line.read_cells([*small, f"out={tmp_path}", *overrides])
        assert cells is not None
        return cells[0]

    return read
