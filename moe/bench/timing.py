"""Time variants in turns and make tables of the results.

Each round times every variant once. The tables show medians over rounds and their ratios, because absolute times mean
nothing on a shared machine.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

Variant = tuple[str, Callable[[], object]]
UNCOUNTED = 2  # The first rounds do not count, because caches and allocators warm up in them.


class TimingTable(NamedTuple):
    """Rows with the same keys. The first key is the label of the row."""

    title: str
    rows: list[dict[str, Any]]

    def markdown(self) -> str:
        """Return the table as Markdown, with its title above it."""
        names = list(self.rows[0])
        lines = [f"**{self.title}**", "", f"| {' | '.join(names)} |", f"|---|{'--:|' * (len(names) - 1)}"]
        return "\n".join(lines + [f"| {' | '.join(_text(value) for value in row.values())} |" for row in self.rows])


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def timed_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_flops(dtype: torch.dtype) -> float:
    """Measure the FLOPs per second of a large matrix product. No model can be faster."""
    size = 8192 if timed_device().type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=timed_device(), dtype=dtype)
    return 2 * size**3 / time_in_turns([("product", lambda: a @ b)], rounds=5)["product"]


def time_in_turns(variants: list[Variant], *, rounds: int) -> dict[str, float]:
    """Return the median seconds of each variant over `rounds` rounds, after `UNCOUNTED` rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in variants}
    for _ in range(rounds + UNCOUNTED):
        for name, run in variants:
            seconds[name].append(time_call(run))
    return medians(seconds)


def time_call(run: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = now()
    run()
    return now() - start


def now() -> float:
    """Return a time in seconds, from which differences can be taken.

    If one thread of a CPU does everything, it is processor time, so that other processes do not count. Otherwise it is
    wall-clock time, after a GPU has finished its work.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def touch_memory() -> None:
    """Use 2 GiB and free them. On a CPU, a process that keeps freed memory then has them for what follows.

    Otherwise its heap grows for dozens of rounds. The variants that happen to need the fresh pages would take up to
    twice as long as in a process that has run for longer.
    """
    if timed_device().type == "cpu":
        torch.ones(2**31, dtype=torch.uint8)


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of the counted rounds of each variant."""
    return {name: median(values[UNCOUNTED:]) for name, values in seconds.items()}


def relative_table(title: str, seconds: dict[str, float], *, to: str) -> TimingTable:
    """Return each variant's time as a multiple of that of the variant `to`, and its speed as a fraction of it."""
    return TimingTable(
        title,
        [
            {"variant": name, f"time / {to}": value / seconds[to], f"{to} / time": seconds[to] / value}
            for name, value in seconds.items()
        ],
    )
