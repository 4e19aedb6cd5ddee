"""Time a training step with each router, in turns with one of top-k."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import median

from moe.bench.timing import UNCOUNTED, TimingTable, time_call
from moe.config.options import complete
from moe.config.words import with_words
from moe.launch.command_line import read_cells
from moe.training.setup import set_up
from moe.training.step import train_step

REFERENCE = "topk"
COLUMN = "tokens / s, topk = 1"


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    names = arguments.routers or complete("router")
    with tempfile.TemporaryDirectory() as folder:
        speeds = router_speeds(names, arguments.overrides, rounds=arguments.rounds, folder=Path(folder))
    title = (
        f"training step by router: {' '.join(arguments.overrides) or 'model=tiny'}; median of {arguments.rounds} pairs"
    )
    yield TimingTable(title, [{"router": name, COLUMN: speed} for name, speed in speeds.items()])


def router_speeds(names: list[str], overrides: list[str], *, rounds: int, folder: Path) -> dict[str, float]:
    """Return the tokens per second of a training step with each router, as a multiple of those with top-k.

    A step is the real one, without evaluation and event log. Each time it is paired with a step of top-k right before
    it, so that both meet the same machine. The result is the median ratio over `rounds` rounds.
    """
    reference, ratios = training_step(REFERENCE, overrides, folder), {}
    for name in names:
        step = training_step(name, overrides, folder)
        pairs = [(time_call(reference), time_call(step)) for _ in range(UNCOUNTED + rounds)]
        ratios[name] = median(before / own for before, own in pairs[UNCOUNTED:])
    return ratios


def training_step(router: str, overrides: list[str], folder: Path) -> Callable[[], object]:
    """Return a function that carries out the next training step of a run with this router."""
    words = with_words(["logger.mode=disabled"], *overrides)
    cells = read_cells(with_words(words, f"router={router}", f"out={folder}"))
    assert cells is not None, overrides
    training, numbers = set_up(cells[0].config), count()
    return lambda: train_step(training, next(numbers))
