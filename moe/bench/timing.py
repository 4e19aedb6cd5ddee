"""Timing by turns, and tables of what was timed.

Every round times each variant once; medians over rounds and their ratios are reported, because a shared machine makes
absolute times meaningless.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

Variant = tuple[str, Callable[[], object]]
UNCOUNTED = 2  # first rounds, in which caches and allocators warm up


class Table(NamedTuple):
    """Rows of equal keys; the first is the label."""

    title: str
    rows: list[dict[str, Any]]

    def markdown(self) -> str:
        names = list(self.rows[0])
        lines = [f"**{self.title}**", "", f"| {' | '.join(names)} |", f"|---|{'--:|' * (len(names) - 1)}"]
        return "\n".join(lines + [f"| {' | '.join(_text(value) for value in row.values())} |" for row in self.rows])


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def device() -> torch.device:
    """What is timed: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_flops(dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product, which no model exceeds."""
    size = 8192 if device().type == "cuda" else 2048
    one, other = torch.randn(2, size, size, device=device(), dtype=dtype)
    return 2 * size**3 / interleave([("product", lambda: one @ other)], rounds=5)["product"]


def interleave(variants: list[Variant], *, rounds: int) -> dict[str, float]:
    """Median seconds of each variant over `rounds` rounds, after those that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in variants}
    for _ in range(rounds + UNCOUNTED):
        for name, run in variants:
            seconds[name].append(clock(run))
    return medians(seconds)


def clock(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    tick = now()
    run()
    return now() - tick


def now() -> float:
    """Seconds, for differences: of processor time where one thread of a CPU does everything, because other processes
    then do not count; else by the clock, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of each variant's counted rounds."""
    return {name: median(values[UNCOUNTED:]) for name, values in seconds.items()}


def relative(title: str, seconds: dict[str, float], *, to: str) -> Table:
    """Each variant's time beside that of the variant `to`, and the inverse: the fraction of its speed."""
    return Table(
        title,
        [
            {"variant": name, f"time / {to}": value / seconds[to], f"{to} / time": seconds[to] / value}
            for name, value in seconds.items()
        ],
    )
