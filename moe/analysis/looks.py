"""Correct for several looks: reports about one study, written before and after runs were added.

Each look at other runs has a share of the level for its tests, and the shares of all planned looks add up to 1. So
chance decides anything at any of them with at most the probability of the level, whatever the tests are and however the
looks depend on each other. Looks after the planned number of seeds was reached add at most a quarter. The shares are
the steps of a spending function of O'Brien and Fleming's type (Lan and DeMets, Biometrika 1983): an early look gets
little, and nearly everything is left for the last one. What decides the share is how many runs a setting had, on
average. A test whose own runs were the same at several looks has the shares of all of them: it asks the same data, so
its p is the same, and only the largest of its levels counts. So runs of other settings cost a test nothing. Tests that
are new in a look share its level, also those of settings that were added. Results can be seen without a report too, so
a command that adds runs when others had ended makes a look of these.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import combinations
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
    """What is known of a run: its setting as text, its seed, and whether it has ended."""

    setting: str
    seed: int
    ended: bool


class Seen(NamedTuple):
    """What a look saw.

    runs: the folders of the runs that had ended, with their settings. seeds, planned: as `Looks` has them, at that
    time; planned is 0 if nothing tells it. margins: those that the reader gave.
    """

    time: str
    runs: Mapping[str, str]
    seeds: int | float
    planned: int | float
    margins: Mapping[str, str] = {}


class _View(NamedTuple):
    """What is left of a look: its share, its runs that still have a result, and the settings of which it had others.

    settings_gone: whether some of its settings have no result any more.
    """

    share: float
    runs: frozenset[str]
    lost: set[str]
    settings_gone: bool


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
        """This look. Runs of earlier looks that are gone count among its seeds, if their settings are still there."""
        ended = {folder: run.setting for folder, run in self.runs.items() if run.ended}
        settings = {run.setting for run in self.runs.values()}
        gone = {folder for look in self.earlier for folder, each in look.runs.items() if each in settings}
        first = self.earlier[0] if self.earlier else None
        planned = (first.planned or self.planned or first.seeds) if first else self.planned
        number = len(settings) or 1
        together = len(gone.union(ended)) / number
        return Seen("", ended, together, planned or len(gone.union(self.runs)) / number)

    @cached_property
    def looks(self) -> Looks:
        """The looks at these runs."""
        return Looks(
            list(self._distinct.values()), list(self._distinct).index(_runs(self.present)), self.present.planned
        )

    @cached_property
    def _distinct(self) -> dict[frozenset[str], int | float]:
        """The runs of each look -> its number of seeds. Looks at the same runs are one, at the time of the first."""
        found: dict[frozenset[str], int | float] = {}
        for look in (*self.earlier, self.present):
            found.setdefault(_runs(look), max([*found.values(), look.seeds]))
        return found

    @property
    def testable(self) -> bool:
        """Whether any test is possible, because two settings have two seeds in common."""
        return _testable(run for run in self.runs.values() if run.ended)

    def late(self, margins: Mapping[str, object]) -> list[str]:
        """Return the metrics whose margin is not that of the first look, so that results may have chosen it."""
        if not self.earlier:
            return []
        first = self.earlier[0].margins
        return [name for name, size in margins.items() if name not in first or _differ(first[name], size)]

    def share(self, own: frozenset[str]) -> float:
        """Return the share of its level that a test has in this look. own: the folders of the runs that it may use.

        Runs of its settings that are gone may have been left out because of their results, so a look that had them saw
        other runs. So did one with a setting that is gone, because its tests shared the level with more others.
        """
        settings = {self.runs[folder].setting for folder in own & self.runs.keys()}
        now = own & self.present.runs.keys()
        same = [
            view.share
            for view in self._views
            if own & view.runs == now and not (view.lost & settings or view.settings_gone)
        ]
        return min(1.0, sum(same))

    @cached_property
    def _views(self) -> list[_View]:
        """What is left of each look."""
        settings = {*self.present.runs.values()}
        views = []
        for place, runs in enumerate({_runs(look): look.runs for look in (*self.earlier, self.present)}.values()):
            lost = {runs[folder] for folder in runs.keys() - self.present.runs.keys()}
            left = frozenset(runs.keys() & self.present.runs.keys())
            views.append(_View(self.looks.share(place), left, lost & settings, bool(lost - settings)))
        return views


def group_of(runs: pd.DataFrame) -> frozenset[str]:
    """Return these runs as those of a test."""
    return frozenset(map(os.path.abspath, runs["folder"]))


def _runs(look: Seen) -> frozenset[str]:
    return frozenset(look.runs)


def _testable(runs: Iterable[Known]) -> bool:
    """Return whether two settings of these runs have two seeds in common, so that a test is possible."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(run.setting, set()).add(run.seed)
    return any(len(one & other) > 1 for one, other in combinations(seeds.values(), 2))


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
    first_planned = int(planned) if pd.notna(planned) else None
    known = _known(runs)
    of_sweep = "varied" in runs and runs["varied"].notna().any()  # otherwise the folder of each run was given
    names = {experiment, experiment.partition(": ")[0]}  # the second is that of a report about folders of runs
    looks = [
        seen
        for folder in _sweeps(runs)
        for name, of_experiment in looks_in(folder).items()
        for seen in (_seen(look, folder, known) for look in of_experiment)
        if name == experiment or ((name in names or not of_sweep) and not known.keys().isdisjoint(seen.runs))
    ]
    plans = [plan for folder in _sweeps(runs) for plan in plans_in(folder)]
    plans = sorted(
        (plan for plan in plans if plan.experiment == experiment or not of_sweep), key=lambda plan: plan.time
    )
    looks = _of_one_report(looks, known) + _without_report(runs, known, plans, first_planned)
    return Study(
        planned=first_planned,
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
    runs = {os.path.abspath(sweep / name): setting for setting, names in look.runs.items() for name in names}
    if not look.runs:
        runs = {folder: run.setting for folder, run in known.items() if run.seed in look.seeds}
        runs |= {f"seed {seed}": "unknown" for seed in {*look.seeds} - {run.seed for run in known.values()}}
    runs |= {folder: known[folder].setting for folder in runs.keys() & known.keys()}
    return Seen(look.time, runs, look.mean_seeds or len(look.seeds), look.planned, look.margins)


def _of_one_report(looks: list[Seen], known: Mapping[str, Known]) -> list[Seen]:
    """Return one look for each time. A report about two sweep folders is written into both, and one may have moved."""
    found: dict[str, Seen] = {}
    for look in looks:
        other = found.get(look.time, look)
        here = {folder: run.setting for folder, run in known.items() if folder in other.runs or folder in look.runs}
        gone = min((_gone(each, known) for each in (other, look)), key=len)
        most = max(len(other.runs), len(look.runs))
        found[look.time] = look._replace(runs=here if len(here) >= most else here | gone)
    return list(found.values())


def _gone(look: Seen, known: Mapping[str, Known]) -> dict[str, str]:
    return {folder: setting for folder, setting in look.runs.items() if folder not in known}


def _without_report(
    runs: pd.DataFrame, known: Mapping[str, Known], plans: Sequence[PlannedStudy], first_planned: int | None
) -> list[Seen]:
    """Return a look for each command that added runs when others had results that could be compared.

    The terminal shows results at the end of a command, and files of runs are open to all. Runs of the seeds that
    earlier commands planned count as awaited if they had not ended. first_planned: the number of seeds after which the
    study decides, if somebody said it.
    """
    if not plans:
        return []
    ended = runs[runs["status"].isin(ENDED) & runs["seconds"].notna()]
    ends = pd.to_datetime(ended["started"], utc=True, format="ISO8601")
    ends += pd.to_timedelta(ended["seconds"].astype(float), unit="s")
    planned, seeds, found = set[str](), set[int](), list[Seen]()
    for plan in plans:
        seen = {folder: known[folder] for folder in group_of(ended[ends <= datetime.fromisoformat(plan.time)])}
        if {*plan.runs} - planned and _testable(seen.values()):
            awaited = {folder for folder, run in known.items() if run.seed in seeds}
            number = len({known[folder].setting for folder in awaited.union(seen)})
            expected = first_planned or len(awaited.union(seen)) / number
            runs_seen = {folder: run.setting for folder, run in seen.items()}
            found.append(Seen(plan.time, runs_seen, len(seen) / number, expected))
        planned, seeds = planned | {*plan.runs}, seeds | {*plan.seeds}
    return found


def _starts(runs: pd.DataFrame) -> dict[int, datetime]:
    """Return when the first run of each seed started."""
    times = pd.to_datetime(runs["started"], utc=True, format="ISO8601").groupby(runs["seed"]).min().dropna()
    return {int(seed): time.to_pydatetime() for seed, time in times.items()}


def finished_seeds(runs: pd.DataFrame) -> list[int]:
    """Return the seeds of the finished runs."""
    return sorted({int(seed) for seed in runs.loc[runs["status"] == "finished", "seed"]}) if "seed" in runs else []


def record_look(runs: pd.DataFrame, study: Study, margins: Mapping[str, object] | None = None) -> bool:
    """Write into the sweep folders that a report about these runs was written; return whether that was possible.

    margins: those that the reader gave. A report in which no test is possible, because no two settings have two
    seeds in common, is no look.
    """
    experiment, present = str(runs["experiment"].iloc[0]), study.present
    if not study.testable:
        return True
    look = Look(
        datetime.now(UTC).isoformat(timespec="seconds"),
        finished_seeds(runs),
        float(present.seeds),
        float(present.planned),
        margins={name: str(size) for name, size in (margins or {}).items()},
    )
    written = True
    for folder in _sweeps(runs):
        ended: dict[str, list[str]] = {}
        for run, setting in sorted(present.runs.items()):
            ended.setdefault(setting, []).append(os.path.relpath(run, folder))
        here = look._replace(runs=ended)
        looks = looks_in(folder)
        of_experiment = looks.get(experiment, [])
        if any((each.runs, each.margins) == (here.runs, here.margins) for each in of_experiment):
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
