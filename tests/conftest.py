"""Options of the tests, their order, and where their fixtures are loaded."""

import gc
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="with -m faults: write all faults and their results to this file")
    soak = "with -m faults: the number of random faults in one run, at least 50; other repeated tests are in proportion"
    parser.addoption("--soak", type=int, default=200, help=soak)


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, which import large libraries, unless this process only gives tests to others."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")  # `fixtures` is a name of pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that two workers end at about the same time."""
    longest = "many_random_faults long_run fuzz compiled test_run.py test_extending".split()
    items.sort(key=lambda item: not any(word in item.nodeid for word in longest))


def pytest_collection_finish() -> None:
    """Make the tests faster: Python searches only what they create for garbage, not all imported modules."""
    gc.freeze()
    gc.enable()
