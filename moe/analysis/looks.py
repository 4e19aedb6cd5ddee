"""Correct for several looks: reports about one study that saw other runs, or that asked them other questions.

Each look has a share of the level for its tests, and the shares of all planned looks add up to 1. So chance decides
anything at any of them with at most the probability of the level, whatever the tests are and however the looks depend
on each other. Looks after the planned number of seeds was reached add at most a quarter. The shares are the steps of a
spending function of O'Brien and Fleming's type (Lan and DeMets, Biometrika 1983): an early look gets little, and nearly
everything is left for the last one. What decides the share is how many runs a setting had, on average. A test that
several looks made with the same runs has the shares of all of them: its p is the same, and only the largest of its
levels counts. So runs of other settings, and other questions, cost a test nothing. Tests that are new in a look share
its level, also those of settings that were added, and those of a metric or reference that nobody had asked for. Results
can be seen without a report too, so a command that adds runs when others had ended makes a look of these.
"""

import itertools
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from moe.analysis.power import SIGNIFICANCE
from moe.checks import ConfigError
from moe.config.claim import amount_of
from moe.runs.planned import PlannedStudy

FURTHER = 0.2  # share of the first look after the planned number of seeds was reached; of each later one, to a power
SMALLEST = 1e-12  # share of a look to which nothing is left
ENDED = ("finished", "diverged")  # the status of a run that will not go on


def spent(part: float) -> float:
    """Return the share of the level that is spent when this part of the planned seeds is there."""
    if part >= 1:
        return 1.0
    if part <= 0:
        return 0.0
    return min(1.0, float(2 * stats.norm.sf(stats.norm.isf(SIGNIFICANCE / 2) / part**0.5) / SIGNIFICANCE))


def share_of_look(n: int | float, earlier: Sequence[int | float], planned: int | float | None) -> float:
    """Return the share of its level that a test has at a look.

    n: the number of seeds that this look and those before it have together, in the mean over settings. earlier: the
    same number at each of the looks before, in the order of time. planned: the number of seeds after which the study
    decides; if nobody said, that of the first look. Up to there the shares add up to 1, and a look without a new run
    gets nothing. The first look after that number was reached gets a fifth of the level, and each later one a fifth of
    the one before, so that all shares add up to at most 1.25.
    """
    final = planned or next(iter(earlier), n)
    if beyond := sum(each >= final for each in earlier):
        return float(FURTHER**beyond)
    return max(SMALLEST, spent(n / final) - spent(max(earlier, default=0) / final))


class Looks(NamedTuple):
    """The looks at a study that saw other runs than the one before, in the order of time.

    seeds: how many seeds a setting had in the looks up to each of them together, in the mean over settings. place: that
    of the present look. planned: the number of seeds after which the study decides.
    """

    seeds: Sequence[int | float]
    place: int
    planned: int | float

    def share(self, place: int | None = None) -> float:
        """Return the share of the level that a look has, by default the present one."""
        place = self.place if place is None else place
        return share_of_look(self.seeds[place], self.seeds[:place], self.planned)

    @property
    def next_share(self) -> float:
        """The share of the next look, which has more seeds: the planned number, or any number beyond it."""
        last = self.seeds[-1]
        return share_of_look(self.planned if last < self.planned else last + 1, self.seeds, self.planned)


class Known(NamedTuple):
    """What is known of a run: its setting, its seed, whether it has ended, its final loss, and when it started."""

    setting: str
    seed: int
    ended: bool
    result: str = ""
    started: str = ""


class Question(NamedTuple):
    """What a report can ask about its runs: how the levels of a factor differ from a reference in a metric.

    factor, reference: empty for tests of the metric that have no reference level.
    """

    metric: str
    factor: str = ""
    reference: str = ""


class Seen(NamedTuple):
    """What a look saw.

    runs: the folders of the runs that had ended, with their settings. seeds, planned: as `Looks` has them, at that
    time; planned is 0 if nothing tells it. margins: those that the reader gave. metrics, references: what the report
    asked, as `Study` has them; nothing if no record tells it. decided, tests: see `moe.runs.planned.Look`.
    share: that it had at its time; 0 if no record tells it.
    """

    time: str
    runs: Mapping[str, str]
    seeds: int | float
    planned: int | float
    margins: Mapping[str, str] = {}
    metrics: Sequence[str] = ()
    references: Mapping[str, str] = {}
    decided: Mapping[str, str] = {}
    share: float = 0.0
    tests: Mapping[str, int] = {}

    @property
    def asked(self) -> frozenset[Question]:
        """The questions: each metric with the reference of each factor, and without any."""
        compared = [("", ""), *self.references.items()]
        return frozenset(Question(metric, *each) for metric in self.metrics for each in compared)


@dataclass(frozen=True)
class Study:
    """What is known about the decisions of an experiment beside its results.

    planned: the number of seeds after which it decides, as its first command said it. runs: folder -> what is known of
    the run. earlier: the looks before this one, in the order of time, also those without a report. plans: what was
    planned for these runs, the last one being that of the newest command. changed: earlier plans with other claims for
    some of the same runs, with the number of these runs. unwritten: why this look could not be written down, or "".
    starts: seed -> when its first run started. ends_known: whether each folder with plans tells which runs had ended.
    here: whether the runs have a folder here, not only a shipped table.
    name: that of the grid of the runs, or of their experiment. tested: whether a test of this report has a p. metrics,
    references: what this report asks: the tested metrics, and factor -> the level that others are compared with, as
    text. tests: how many tests it makes, as a `Look` has them. timed: whether one of them is about a speed.
    """

    planned: int | None = None
    runs: Mapping[str, Known] = field(default_factory=dict)
    earlier: Sequence[Seen] = ()
    plans: Sequence[PlannedStudy] = ()
    changed: Sequence[tuple[PlannedStudy, int]] = ()
    unwritten: str = ""
    starts: Mapping[int, datetime] = field(default_factory=dict)
    ends_known: bool = True
    here: bool = True
    name: str = ""
    tested: bool = False
    metrics: Sequence[str] = ()
    references: Mapping[str, str] = field(default_factory=dict)
    tests: Mapping[str, int] = field(default_factory=dict)
    timed: bool = False

    @cached_property
    def present(self) -> Seen:
        """This look. Runs of earlier looks at settings of this report count among its seeds, also if it lacks them."""
        ended = {folder: run.setting for folder, run in self.runs.items() if run.ended}
        first = self.earlier[0] if self.earlier else None
        planned = (first.planned or self.planned or first.seeds) if first else self.planned
        number = len({run.setting for run in self.runs.values()}) or 1
        together = len(self.absent.union(ended)) / number
        planned = planned or len(self.absent.union(self.runs)) / number
        return Seen("", ended, together, planned, metrics=self.metrics, references=self.references)

    @cached_property
    def absent(self) -> frozenset[str]:
        """Runs of earlier looks, at settings of this report, that it lacks: left out, gone or trained again since."""
        settings = {run.setting for run in self.runs.values()}
        ended = {folder for folder, run in self.runs.items() if run.ended}
        seen = {folder for look in self.earlier for folder, each in look.runs.items() if each in settings}
        return frozenset(seen - ended)

    def absent_at(self, place: int) -> frozenset[str]:
        """Return those of the absent runs that the looks up to a place saw, so that its number of seeds counts them."""
        return self.absent.intersection(itertools.chain.from_iterable(look.runs for look in self.distinct[: place + 1]))

    @cached_property
    def looks(self) -> Looks:
        """The looks at these runs."""
        return Looks([look.seeds for look in self.distinct], self._place, self.present.planned)

    @cached_property
    def distinct(self) -> list[Seen]:
        """The looks that saw other runs, or asked other questions, than those before, in the order of time.

        seeds: the most of the looks up to each of them. A look that does not tell what it asked counts as the first one
        that does.
        """
        first = next((look for look in self.earlier if look.metrics), self.present)
        found: list[Seen] = []
        for look in (*self.earlier, self.present):
            if not look.metrics:
                look = look._replace(metrics=first.metrics, references=first.references)
            same = [each.asked for each in found if each.runs.keys() == look.runs.keys()]
            if not same or not look.asked <= frozenset().union(*same):
                found.append(look._replace(seeds=max([look.seeds, *(each.seeds for each in found)])))
        return found

    @property
    def spent(self) -> float:
        """The shares of the looks up to this one together, each as it was at the time of its report.

        They can be more than 1.25 if a look did not know of one before it, such as that at another sweep folder.
        """
        return sum(self._given[: self._place + 1])

    @property
    def excess(self) -> float:
        """By how much the shares of all looks, each as it was at the time of its report, exceed those of the rule.

        It is 0 unless a look did not know of one before it.
        """
        excess = sum(self._given) - sum(map(self.looks.share, range(len(self.distinct))))
        return excess if excess > 1e-9 else 0.0

    @property
    def _given(self) -> list[float]:
        return [look.share or self.looks.share(place) for place, look in enumerate(self.distinct)]

    @cached_property
    def _place(self) -> int:
        """The place of the present look: that of the look with which all its questions had been asked of its runs."""
        same = [place for place, look in enumerate(self.distinct) if look.runs.keys() == self.present.runs.keys()]
        asked = [self.distinct[place].asked for place in same]
        enough = (self.present.asked <= frozenset().union(*asked[:number]) for number in range(1, len(same) + 1))
        return next(itertools.compress(same, enough))

    @property
    def new(self) -> frozenset[Question]:
        """What an earlier look at the same runs had not asked; nothing if no earlier look saw just these runs."""
        before = [look.asked for look in self.distinct[: self._place] if look.runs.keys() == self.present.runs.keys()]
        return self.present.asked.difference(*before) if before else frozenset()

    @property
    def testable(self) -> bool:
        """Whether any test was made, or is possible because two settings have two seeds in common."""
        return self.tested or is_testable(run for run in self.runs.values() if run.ended)

    def late(self, margins: Mapping[str, object]) -> list[str]:
        """Return the metrics whose margin is not that of the first look, so that results may have chosen it."""
        if not self.earlier:
            return []
        first = self.earlier[0].margins
        return [name for name, size in margins.items() if name not in first or _differ(first[name], size)]

    def share(self, own: frozenset[str], asked_by: Set[Question] = frozenset()) -> float:
        """Return the share of its level that a test has in this look.

        own: the folders of the runs that the test may use. asked_by: the questions each of which asks this test; none
        for a test of every report. A look of which any run is gone gives nothing: the run may have been left out
        because of its result, and the tests of that look shared the level with those that the run had.
        """
        now = own & self.present.runs.keys()
        same = [
            self.looks.share(place)
            for place, look in enumerate(self.distinct)
            if look.runs.keys() <= self.present.runs.keys()
            and own & look.runs.keys() == now
            and (not asked_by or not asked_by.isdisjoint(look.asked))
        ]
        return min(1.0, sum(same, 0.0))


def level_as_text(level: object) -> str:
    """Return a level as a question has it. Numbers that are equal have the same text, such as 1000 and 1000.0."""
    number = isinstance(level, numbers.Real) and not isinstance(level, bool | np.bool_)
    return f"{float(level):.12g}" if number else str(level)  # type: ignore[arg-type]


def group_of(runs: pd.DataFrame) -> frozenset[str]:
    """Return these runs as those of a test."""
    return frozenset(map(place_of, runs["folder"]))


def place_of(folder: str | Path) -> str:
    """Return the one name of a folder, however it was given: its absolute path, without links."""
    return _without_links(os.path.join(os.getcwd(), folder))


@lru_cache(maxsize=2**16)  # each test asks it for each of its runs
def _without_links(path: str) -> str:
    return os.path.realpath(path)


def is_testable(runs: Iterable[Known]) -> bool:
    """Return whether two settings of these runs have two seeds in common, so that a test is possible."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(run.setting, set()).add(run.seed)
    return any(len(one & other) > 1 for one, other in itertools.combinations(seeds.values(), 2))


def _differ(recorded: str, margin: object) -> bool:
    """Return whether a margin is another amount than the recorded one, which may be a damaged text."""
    try:
        return amount_of(recorded) != amount_of(margin)
    except ConfigError:
        return True
