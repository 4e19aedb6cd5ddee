"""Fixtures for tests that break runs on purpose: `pytest -m faults`. `--reliability=FILE` writes a page of results."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_processes import TrainCommand, result

TINY = """
    model.dim=16 model.heads=2 model.layers=2 model.ffn=16 model.num_experts=4 model.dense_ffn=16 model.dropout=0.1
    data.seq_len=16 data.vocab_size=300 data.max_val_blocks=4 router=temperature noise=0.1
    steps=24 batch_size=2 eval_every=12 save_every=3 logger.mode=disabled
""".split()

HEADER = """# What was broken on purpose, and what happened

`OMP_NUM_THREADS=1 python -m pytest -m faults --reliability=docs/reliability.md` wrote this page on {machine}.
Every fault hits a real process of `train.py` that trains a small model on real text. *Exact* means that the same
command was run again afterwards, and that the sha256 of the weights and every line of events.jsonl and metrics.json,
except durations, were then equal to those of an undisturbed run. The first column is the number of the fault in the
list for which the tests were written. On a real Slurm, jobs at their time limit, canceled jobs, an interrupted command
and a node that fails were tried too: [clusters.md](clusters.md) says what was seen there, and describes the tests of
other cluster launchers.

| | fault | times | what happened |
|---:|---|---:|---|
"""


def own_marker(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("clusters", "slurm"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not own_marker(item):
            item.add_marker(pytest.mark.faults)


class Notes:
    """Pytest plugin that writes a page from the property `fault` of tests: (row, injected, times, outcome)."""

    def __init__(self, target: Path) -> None:
        self.target, self.rows = target, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            rows = [value for name, value in report.user_properties if name == "fault"]
            self.rows += [(*row[:3], row[3] if report.passed else "**not survived**") for row in rows]

    def pytest_sessionfinish(self) -> None:
        machine = f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}"
        lines = [f"| {row} | {what} | {times} | {end} |\n" for row, what, times, end in sorted(self.rows)]
        self.target.write_text(HEADER.format(machine=machine) + "".join(lines))


def pytest_configure(config: pytest.Config) -> None:
    in_worker = hasattr(config, "workerinput")  # of pytest-xdist; only its controller sees the reports of all tests
    if not in_worker and (target := config.getoption("--reliability")):
        config.pluginmanager.register(Notes(target))


@pytest.fixture(scope="session")
def words(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments of a run that takes a second."""
    data = ["data=text", f"data.source.paths=[{corpus}]", "data.source.column=text", "data.source.domain=half"]
    return [*data, f"data.cache={tmp_path_factory.mktemp('cache')}", *TINY]


@pytest.fixture
def job(words: list[str], tmp_path: Path) -> Callable[..., TrainCommand]:
    """Return a function: `job("a", "seed=7")` is a train.py command whose runs lie in the folder `a`."""
    return lambda name="job", *more: TrainCommand(tmp_path / name, [*words, *more])


@pytest.fixture(scope="session")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result of the run of `words` when nothing disturbs it."""
    alone = TrainCommand(tmp_path_factory.mktemp("undisturbed"), words)
    assert alone.run() == 0, alone.output
    return result(alone.folder)


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> int:
    """Return the number of random faults in one run, to which other repeated tests are in proportion."""
    return int(pytestconfig.getoption("soak"))


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Callable[[int, str, int, str], None]:
    """Return a function: `survived(row, injected, times, outcome)` adds a line to the page if the test passes."""
    return lambda row, injected, times, end: record_property("fault", (row, injected, times, end))
