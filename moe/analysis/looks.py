"""Correct for several looks: reports about one study, written before and after runs were added.

A test at one of several looks has a share of its level, and the shares of all planned looks add up to 1. So chance
decides anything at any of them with at most the probability of the level, whatever the tests are and however the looks
depend on each other. Looks after the planned number of seeds was reached add at most a quarter. The shares are the
steps of a spending function of O'Brien and Fleming's type (Lan and DeMets, Biometrika 1983): an early look gets little,
and nearly everything is left for the last one. What decides the share is how many runs a setting had, on average, at
each look. The looks of a test are those at which it was possible, and each other set of its own runs counts, also one
with fewer. So runs of other settings cost a test nothing: a test that sees the same runs again gives the same answer.
Results can be seen without a report too, so a command that adds runs when others had ended makes a look of these.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from moe.analysis.power import SIGNIFICANCE
from moe.analysis.statistics import name_cell
from moe.checks import ConfigError
from moe.config.claim import amount_of
from moe.results.conditions import varied_factors
from moe.runs.planned import (
    Look,
    LooksRecord,
    PlannedStudy,
    PlansRecord,
    digest_of,
    digests_by_earlier_ones,
    looks_in,
    plans_in,
)
from moe.runs.record import RecordError

FURTHER = 0.2  # of the share of the look before, for a look after the planned number of seeds was reached
SMALLEST = 1e-12  # share of a look to which nothing is left
ENDED = ("finished", "diverged")  # the status of a run that will not go on


def spent(part: float) -> float:
    """Return the share of the level that is spent when this part of the planned seeds is there."""
    if part >= 1:
        return 1.0
    return float(2 * stats.norm.sf(stats.norm.isf(SIGNIFICANCE / 2) / part**0.5) / SIGNIFICANCE) if part > 0 else 0.0


def share_of_look(n: int | float, earlier: Sequence[int | float], planned: int | float | None) -> float:
    """Return the share of its level that a test has at a look.

    n: the number of seeds that this look and those before it have together, in the mean over settings. earlier: the
    same number at each of the looks before, in the order of time. planned: the number of seeds after which the study
    decides; if nobody said, that of the first look. Up to there the shares add up to 1, and a look without a new run
    gets nothing. Each look after that number was reached gets a fifth of the one before, so that all shares add up to
    at most 1.25.
    """
    final = planned or next(iter(earlier), n)
    if beyond := sum(each >= final for each in earlier):
        return float(FURTHER**beyond)
    return max(SMALLEST, spent(n / final) - spent(max(earlier, default=0) / final))


@dataclass(frozen=True)
class LooksOfTest:
    """The looks at the runs of one test.

    seeds: how many seeds a setting had in the looks up to each of them together, in the mean over settings. place: that
    of the present look. planned: the number of seeds after which the test decides.
    """

    seeds: Sequence[int | float]
    place: int
    planned: int | float

    @property
    def share(self) -> float:
        """The share of its level that the test has in this look."""
        return share_of_look(self.seeds[self.place], self.seeds[: self.place], self.planned)

    @property
    def next_share(self) -> float:
        """The share at the next look, which has more seeds: the planned number, or any number beyond it."""
        last = self.seeds[-1]
        return share_of_look(self.planned if last < self.planned else last + 1, self.seeds, self.planned)


class Known(NamedTuple):
    """What is known of a run: its setting as text, its seed, and whether it has ended."""

    setting: str
    seed: int
    ended: bool


class Seen(NamedTuple):
    """What a look saw: the folders of the runs that had ended, with their settings, and of those that had not."""

    time: str
    runs: Mapping[str, str]
    awaited: frozenset[str] = frozenset()
    margins: Mapping[str, str] = {}


# The groups of runs that a test compares, as folders. A look at it was possible if each had two runs that had ended, of
# those groups that have two now.
Groups = Sequence[frozenset[str]]


@dataclass(frozen=True)
class Study:
    """What is known about the decisions of an experiment beside its results.

    planned: the number of seeds after which it decides, as its first run recorded it. runs: folder -> what is known of
    the run. earlier: the looks before this one, in the order of time, also those without a report. plans: what was
    planned for these runs, the last one being that of the newest command. changed: earlier plans with other claims for
    some of the same runs, with the number of these runs. unwritten: whether this look could not be written down.
    starts: seed -> when its first run started. here: whether the runs have a folder here, not only a shipped table.
    """

    planned: int | None = None
    runs: Mapping[str, Known] = field(default_factory=dict)
    earlier: Sequence[Seen] = ()
    plans: Sequence[PlannedStudy] = ()
    changed: Sequence[tuple[PlannedStudy, int]] = ()
    unwritten: bool = False
    starts: Mapping[int, datetime] = field(default_factory=dict)
    here: bool = True

    @cached_property
    def present(self) -> Seen:
        """This look."""
        ended = {folder: run.setting for folder, run in self.runs.items() if run.ended}
        return Seen("", ended, frozenset(self.runs.keys() - ended))

    @property
    def testable(self) -> bool:
        """Whether any test is possible, because some setting has two seeds."""
        return _testable(run for run in self.runs.values() if run.ended)

    def late(self, margins: Mapping[str, object]) -> list[str]:
        """Return the metrics whose margin is not that of the first look, so that results may have chosen it."""
        if not self.earlier:
            return []
        first = self.earlier[0].margins
        return [name for name, size in margins.items() if name not in first or _differ(first[name], size)]

    def looks_of(self, groups: Groups | None = None) -> LooksOfTest | None:
        """Return the looks at the runs of a test, or of all runs; None if the test is impossible now.

        Looks at the same runs of the test are one look, and count at the time of the first. Runs of a look that are
        gone may have been left out because of their results. Those of a setting that is gone too may have been of any
        test, so the look counts.
        """
        groups = [frozenset(self.runs)] if groups is None else groups
        own = frozenset(self.runs).intersection(frozenset[str]().union(*groups))
        tested = [group for group in groups if len(group & self.present.runs.keys()) > 1]
        if not tested:
            return None
        others = {run.setting for run in self.runs.values()} - {self.runs[folder].setting for folder in own}
        together: dict[str, str] = {}
        settings, seen, planned = set[str](), frozenset[str](), float(self.planned or 0)
        found: dict[frozenset[str], float] = {}
        for look in (*self.earlier, self.present):
            gone = {folder for folder in look.runs.keys() - self.runs.keys() if look.runs[folder] not in others}
            if not all(len(group & look.runs.keys() | gone) > 1 for group in tested):
                continue
            seen = frozenset(own & look.runs.keys() | gone)
            together |= {folder: look.runs[folder] for folder in seen}
            awaited = {self.runs[folder].setting for folder in own & look.awaited}
            settings |= {*together.values()} | awaited
            planned = planned or len({*together} | own & look.awaited) / len(settings)
            found.setdefault(seen, max([*list(found.values())[-1:], len(together) / len(settings)]))
        return LooksOfTest(list(found.values()), list(found).index(seen), planned)

    def share(self, groups: Groups | None = None) -> float:
        """Return the share of its level that a test has in this look; 1 if it is impossible."""
        looks = self.looks_of(groups)
        return looks.share if looks else 1.0

    def next_share(self, groups: Groups | None = None) -> float:
        """Return the share that the same test will have in the next look, after this one; 1 if it is impossible."""
        looks = self.looks_of(groups)
        return looks.next_share if looks else 1.0


def group_of(runs: pd.DataFrame) -> frozenset[str]:
    """Return these runs as a group of a test."""
    return frozenset(map(os.path.abspath, runs["folder"]))


def _testable(runs: Iterable[Known]) -> bool:
    """Return whether some setting of these runs has two seeds."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(run.setting, set()).add(run.seed)
    return any(len(each) > 1 for each in seeds.values())


def _differ(recorded: str, margin: object) -> bool:
    """Return whether a margin is another amount than the recorded one, which may be a damaged text."""
    try:
        return amount_of(recorded) != amount_of(margin)
    except ConfigError:
        return True


def study_of(runs: pd.DataFrame) -> Study:
    """Return what the sweep folders of the runs of one experiment tell. Raises RecordError for a damaged file."""
    experiment = str(runs["experiment"].iloc[0])
    first = runs.sort_values("started").iloc[0]
    planned = pd.to_numeric(first.get("planned_seeds"), errors="coerce")
    known = _known(runs)
    looks = [_seen(look, folder, known) for folder in _sweeps(runs) for look in looks_in(folder).get(experiment, [])]
    plans = [plan for folder in _sweeps(runs) for plan in plans_in(folder) if plan.experiment == experiment]
    plans.sort(key=lambda plan: plan.time)
    looks += _without_report(runs, known, plans)
    return Study(
        planned=int(planned) if pd.notna(planned) else None,
        runs=known,
        earlier=sorted(looks, key=lambda look: look.time),
        plans=plans,
        changed=_changed(plans, _sweeps(runs)) if plans else [],
        starts=_starts(runs) if plans else {},
        here=any(folder.is_dir() for folder in _sweeps(runs)),
    )


def _known(runs: pd.DataFrame) -> dict[str, Known]:
    """Return what is known of each run, by its folder. A run that diverged has ended too: it will not go on."""
    if "seed" not in runs:
        return {}
    runs = runs[runs["seed"].notna()]
    factors = sorted(factor for factor in varied_factors(runs) if factor != "seed")
    ended = runs["status"].isin(ENDED)
    return {
        os.path.abspath(folder): Known(name_cell(dict(zip(factors, levels, strict=True))), int(seed), bool(has_ended))
        for folder, levels, seed, has_ended in zip(
            runs["folder"], runs[factors].to_numpy(), runs["seed"], ended, strict=True
        )
    }


def _seen(look: Look, sweep: Path, known: Mapping[str, Known]) -> Seen:
    """Return what a look saw. known: the runs; a look that names no runs saw all of its seeds."""
    if not look.runs:
        saw = {folder: run.setting for folder, run in known.items() if run.seed in look.seeds}
        return Seen(look.time, saw, margins=look.margins)
    runs = {os.path.abspath(sweep / name): setting for setting, names in look.runs.items() for name in names}
    runs |= {folder: known[folder].setting for folder in runs if folder in known}
    return Seen(look.time, runs, frozenset(os.path.abspath(sweep / name) for name in look.awaited), look.margins)


def _without_report(runs: pd.DataFrame, known: Mapping[str, Known], plans: Sequence[PlannedStudy]) -> list[Seen]:
    """Return a look for each command that added runs when others had results that could be compared.

    The terminal shows results at the end of a command, and files of runs are open to all.
    """
    if not plans:
        return []
    ended = runs[runs["status"].isin(ENDED) & runs["seconds"].notna()]
    ends = pd.to_datetime(ended["started"], utc=True, format="ISO8601")
    ends += pd.to_timedelta(ended["seconds"].astype(float), unit="s")
    planned, found = set[str](), []
    for plan in plans:
        added, planned = {*plan.runs} - planned, planned | {*plan.runs}
        seen = {folder: known[folder] for folder in group_of(ended[ends <= datetime.fromisoformat(plan.time)])}
        if added and _testable(seen.values()):
            found.append(Seen(plan.time, {folder: run.setting for folder, run in seen.items()}))
    return found


def _starts(runs: pd.DataFrame) -> dict[int, datetime]:
    """Return when the first run of each seed started."""
    times = pd.to_datetime(runs["started"], utc=True, format="ISO8601").groupby(runs["seed"]).min().dropna()
    return {int(seed): time.to_pydatetime() for seed, time in times.items()}


def finished_seeds(runs: pd.DataFrame) -> list[int]:
    """Return the seeds of the finished runs."""
    return sorted({int(seed) for seed in runs.loc[runs["status"] == "finished", "seed"]}) if "seed" in runs else []


def record_look(runs: pd.DataFrame, margins: Mapping[str, object] | None = None) -> bool:
    """Write into the sweep folders that a report about these runs was written; return whether that was possible.

    margins: those that the reader gave. A report in which no test is possible, because no setting has two seeds, is no
    look.
    """
    experiment, known = str(runs["experiment"].iloc[0]), _known(runs)
    present = Study(runs=known).present
    if not _testable(known[folder] for folder in present.runs):
        return True
    look = Look(
        datetime.now(UTC).isoformat(timespec="seconds"),
        finished_seeds(runs),
        margins={name: str(size) for name, size in (margins or {}).items()},
    )
    written = True
    for folder in _sweeps(runs):
        ended: dict[str, list[str]] = {}
        for run, setting in sorted(present.runs.items()):
            ended.setdefault(setting, []).append(os.path.relpath(run, folder))
        here = look._replace(runs=ended, awaited=sorted(os.path.relpath(run, folder) for run in present.awaited))
        looks = looks_in(folder)
        of_experiment = looks.get(experiment, [])
        if any(each._replace(time="") == here._replace(time="") for each in of_experiment):
            continue
        try:
            LooksRecord(looks=looks | {experiment: [*of_experiment, here]}).write(folder / LooksRecord.FILE)
        except OSError:
            written = False
    return written


def _sweeps(runs: pd.DataFrame) -> list[Path]:
    """Return the folders above the runs."""
    return sorted({Path(folder).parent for folder in runs["folder"]})


def _changed(here: list[PlannedStudy], sweeps: list[Path]) -> list[tuple[PlannedStudy, int]]:
    """Return earlier plans that changed claims of the newest of `here`, for runs that compute the same.

    here: the plans of this study. The earlier ones are here, in a folder beside, or in one of another `out=DIR` beside.
    A damaged file there is passed over, because this report is not about its runs. Fingerprints of an earlier form are
    read with the records of the runs beside them.
    """
    places = [(sweep.parent, "*") for sweep in sweeps] + [(sweep.parent.parent, "*/*") for sweep in sweeps]
    folders = {path.parent for place, depth in places for path in place.glob(f"{depth}/{PlansRecord.FILE}")}
    present = [plan for plan in here if digest_of(plan.claims) == digest_of(here[-1].claims)]
    found = []
    for folder in sorted(folders):
        try:
            plans = plans_in(folder)
        except RecordError:
            continue
        for earlier in plans:
            if digest_of(earlier.claims) != digest_of(here[-1].claims) and alike(earlier, here[-1]):
                known = {old: new for each in {*sweeps, folder} for old, new in digests_by_earlier_ones(each).items()}
                later = {known.get(run, run) for plan in present if earlier.time <= plan.time for run in plan.runs}
                found.append((earlier, len(later & {known.get(run, run) for run in earlier.runs})))
    return [(plan, same) for plan, same in found if same]


def alike(earlier: PlannedStudy, newest: PlannedStudy) -> list[dict[str, Any]]:
    """Return the earlier claims about a factor and a metric, or with the words, of one of the newest claims."""

    def keys(claim: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(claim.get("text"),), (claim.get("factor"), claim.get("metric"))}

    known = set[tuple[Any, ...]]().union(*map(keys, newest.claims))
    return [claim for claim in earlier.claims if keys(claim) & known]
