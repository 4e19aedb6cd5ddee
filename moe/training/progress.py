"""Show the progress of a run in the terminal: a progress bar, one line for each evaluation, and one on the speed."""

import time
from typing import Any

from tqdm import tqdm

from moe.checks import plain
from moe.distributed import ranks
from moe.metrics.catalog import dead_layers

TIMED = 5  # steps whose time is measured, after the first one, which takes longer


class Progress:
    """Progress bar over the optimizer steps of a run; only the first rank shows it."""

    def __init__(self, *, done: int, steps: int) -> None:
        hidden = None if ranks.is_first() else True  # None: tqdm shows the bar in a terminal only
        self._bar = tqdm(initial=done, total=steps, unit="step", disable=hidden)
        self._steps, self._done, self._first = steps, done, done + 1
        self._began = 0.0
        self._perplexity = ""

    def evaluated(self, step: int, values: dict[str, Any]) -> None:
        """Print the line of an evaluation after `step` optimizer steps."""
        self._perplexity = f"{values['val/perplexity']:.1f}"
        if not ranks.is_first():
            return
        line = f"step {step:>5}/{self._steps}  val loss {values['val/loss']:.4f}"
        line += f"  perplexity {values['val/perplexity']:.2f}"
        if (load_cv := values.get("routing/load_cv")) is not None:
            line += f"  load CV {load_cv:.3f}"
        if dead := dead_layers(values):
            line += f"  no token takes an expert in {', '.join(dead)}"
        tqdm.write(f"{line}  after {values['time/elapsed']:.0f} s")

    def trained(self, values: dict[str, Any]) -> None:
        """Advance the bar by one step and show the values of that step beside it.

        After the first few steps, print how long a step takes and the remaining ones take together.
        """
        self._done += 1
        if self._done == self._first:
            self._began = time.perf_counter()
        elif self._done == self._first + TIMED < self._steps and ranks.is_first():
            pace = (time.perf_counter() - self._began) / TIMED
            minutes = pace * (self._steps - self._done) / 60
            speed = plain(f"{pace:.2g} s per step, about {minutes:.2g} min left")
            tqdm.write(f"step {self._done:>5}/{self._steps}  {speed}")
        shown = {"loss": f"{values['train/loss']:.3f}"}
        if self._perplexity:
            shown["val ppl"] = self._perplexity
        if (load_cv := values.get("train/routing/load_cv")) is not None:
            shown["load CV"] = f"{load_cv:.2f}"
        shown |= {"T": f"{values['temperature']:.2f}", "tok/s": f"{values['time/tokens_per_s']:,.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
