"""Show the progress of a run in the terminal: what it reads, bars, a line for each evaluation and one on the speed."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from moe.checks import plain
from moe.config.schema import Config
from moe.data.blocks import Prepared
from moe.distributed import ranks
from moe.metrics.catalog import dead_layers
from moe.runs.place import Place, duration, so_far

Item = TypeVar("Item")

TIMED = 5  # steps whose time is measured, after the first one, which takes longer
NAMED = 8  # domains whose names are printed, if there are no more of them
QUIET = 10.0  # seconds before a count is printed
SWEEP = "{desc} |{bar}|"  # the bar of a sweep


class Progress:
    """Lines and progress bars of a run; only the first rank shows them.

    A terminal has a bar over the optimizer steps of the run and, in a sweep, one over its runs. There are no bars
    if the output goes to a file, or if several runs write to the terminal at the same time.
    """

    def __init__(self, *, done: int, steps: int, place: Place | None = None) -> None:
        self._place = place = place or Place()
        self._steps, self._done, self._first = steps, done, done + 1
        self._began = 0.0
        self._perplexity = ""
        self._baselines: list[str] = []
        hidden = None if ranks.is_first() and place.has_terminal else True  # None: tqdm shows bars in a terminal only
        self._sweep: tqdm[Any] | None = None
        if place.in_sweep:
            title = f"{place.prefix}{place.standing()}"
            self._sweep = tqdm(
                desc=title, initial=place.ended(), total=place.unfinished, leave=False, disable=hidden, bar_format=SWEEP
            )
        self._bar = tqdm(initial=done, total=steps, unit="step", leave=not place.in_sweep, disable=hidden)

    def read(self, lines: list[str], unigram: float) -> None:
        """Print what the run reads, once for all runs of a command. unigram: see `text_lines`."""
        self._baselines.append(f"{unigram:.2f} by a unigram model of the training text")
        for line in lines:
            if ranks.is_first() and self._place.first_to_say(line):
                _say(line)

    def resumed(self, evaluations: list[dict[str, Any]]) -> None:
        """Print of a resumed run the perplexities of its first and its last evaluation so far.

        evaluations: their events, in order; without any, the run begins and nothing is printed.
        """
        perplexities = {each["step"]: f"{each['val/perplexity']:.2f}" for each in evaluations}
        if not perplexities:
            return
        if 0 in perplexities:
            self._baselines.insert(0, f"{perplexities[0]} before training")
        last, self._perplexity = max(perplexities), f"{evaluations[-1]['val/perplexity']:.1f}"
        known = self._baselines[:1] if 0 in perplexities else []
        known += [f"{perplexities[last]} after step {last}"] if last else []
        self._say(f"step {self._done:>5}/{self._steps}  perplexity so far: {', '.join(known)}")

    def evaluated(self, step: int, values: dict[str, Any]) -> None:
        """Print the line of an evaluation after `step` optimizer steps, and at the end what to compare it with."""
        self._perplexity = f"{values['val/perplexity']:.1f}"
        if step == 0 < self._steps:
            self._baselines.insert(0, f"{values['val/perplexity']:.2f} before training")
        line = f"step {step:>5}/{self._steps}  val loss {values['val/loss']:.4f}"
        line += f"  perplexity {values['val/perplexity']:.2f}"
        if (load_cv := values.get("routing/load_cv")) is not None:
            line += f"  load CV {load_cv:.3f}"
        if dead := dead_layers(values):
            line += f"  no token takes an expert in {', '.join(dead)}"
        line += f"  after {duration(values['time/elapsed'])}"
        if self._sweep is not None and self._sweep.disable and 0 < step < self._steps:
            line += f"; {self._place.standing(step / self._steps)}"  # what the bar of the sweep would show
        self._say(line)
        if step == self._steps and self._baselines and not self._place.in_sweep:
            self._say(f"perplexity {values['val/perplexity']:.2f}; for comparison: {', '.join(self._baselines)}")

    def trained(self, values: dict[str, Any]) -> None:
        """Advance the bars by one step and show the values of that step beside them.

        Print what the `LoadWatch` tells. After the first few steps, print how long a step takes, and all that remain.
        """
        self._done += 1
        if "collapse" in values:
            self._say(f"step {self._done:>5}/{self._steps}  {values['collapse']}")
        if self._done == self._first:
            self._began = time.perf_counter()
        elif self._done == self._first + TIMED < self._steps:
            pace = (time.perf_counter() - self._began) / TIMED
            left = duration(pace * (self._steps - self._done))
            self._say(f"step {self._done:>5}/{self._steps}  {plain(f'{pace:.2g}')} s per step, about {left} left")
        shown = {"loss": f"{values['train/loss']:.3f}"}
        if self._perplexity:
            shown["val ppl"] = self._perplexity
        if (load_cv := values.get("train/routing/load_cv")) is not None:
            shown["load CV"] = f"{load_cv:.2f}"
        shown |= {"T": f"{values['temperature']:.2f}", "tok/s": f"{values['time/tokens_per_s']:,.0f}"}
        if self._sweep is not None and not self._sweep.disable:
            part = self._done / self._steps
            self._sweep.n = self._place.ended() + part
            self._sweep.set_description_str(f"{self._place.prefix}{self._place.standing(part)}")
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def ended(self, collapses: list[str]) -> None:
        """Print what the report will say of layers whose routing collapsed (`moe.runs.evaluated.collapse_lines`)."""
        for line in collapses:
            self._say(f"collapse: {line}")

    def _say(self, line: str) -> None:
        if ranks.is_first():
            _say(f"{self._place.prefix}{line}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._sweep is not None:
            self._sweep.close()


def text_lines(config: Config, data: Prepared, unigram: float, remarks: list[str]) -> list[str]:
    """Return what a run reads: documents, domains, tokens, and how often it reads the training text.

    unigram: the validation perplexity of a model that knows only how often each token occurs in the training text.
    remarks: what the source of the text says about it.
    """
    manifest, length = data.manifest["domains"], config.data.seq_len
    splits = ("train", "val") if data.test is None else ("train", "val", "test")
    count = {split: sum(domain[split]["documents"] for domain in manifest.values()) for split in splits}
    names = f" ({', '.join(data.domains)})" if len(data.domains) <= NAMED else ""
    only = config.data.train_domains
    trained = "" if only is None else f" of {', '.join(only)} alone"
    domains = f"{len(data.domains)} domains" if len(data.domains) > 1 else "1 domain"
    test = "" if data.test is None else f", {count['test']:,} with {len(data.test) * length:,} for the test at the end"
    text = (
        f"text: {domains}{names}; {count['train']:,} documents with {len(data.train) * length:,} tokens{trained} for "
        f"training, {count['val']:,} with {len(data.val) * length:,} for validation{test}; "
        f"a unigram model has perplexity {unigram:.2f}"
    )
    blocks = config.steps * config.batch_size * config.grad_accum
    passes = blocks / len(data.train)
    again = "; text that is read again teaches less than new text" if passes > 1 else ""
    reads = f"{config.steps:,} steps read {blocks * length:,} tokens: {passes:.2g} passes over the training text{again}"
    return [*remarks, text, reads if config.steps else "0 steps: the model is evaluated as it is, and not trained"]


def counted(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield the items, and print how many of them are done and how long the others will take.

    The first line comes after `QUIET` seconds, and each further one when half as much time again has passed, so that
    minutes and days of work both have a handful of lines.
    """
    began, due = time.monotonic(), QUIET
    for done, item in enumerate(items):
        elapsed = time.monotonic() - began
        if done and elapsed >= due:
            _say(f"{what} {done:,}/{len(items):,} {so_far(elapsed, float(done), len(items))}")
            due = 1.5 * elapsed
        yield item


def _say(line: str) -> None:
    """Print a line above the bars, at once even if the output goes to a file."""
    tqdm.write(line)
    sys.stdout.flush()
