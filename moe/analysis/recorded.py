"""Read what sweep folders tell about a study, its plans and its looks, and write a look down."""

import os
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from filelock import FileLock, Timeout

from moe.analysis.looks import ENDED, Known, Seen, Study, group_of, is_testable, place_of
from moe.analysis.statistics import name_cell
from moe.checks import first_line
from moe.files import shared_mode
from moe.results.conditions import varied_factors
from moe.runs.planned import (
    RESULT,
    Ended,
    Look,
    LooksRecord,
    PlannedStudy,
    PlansRecord,
    digest_of,
    digests_in,
    ended_in,
    looks_in,
    plans_in,
    result_of,
)
from moe.runs.record import RecordError, SweepRecord

LONGEST_WAIT = 60  # seconds until another report has written its look down, which takes a moment


class Written(NamedTuple):
    """A look that was written down: the sweep folder, the name of the study, and the time of the look."""

    folder: Path
    study: str
    time: str


def study_of(runs: pd.DataFrame) -> Study:
    """Return what the sweep folders of the runs of one experiment tell. Raises RecordError for a damaged file."""
    experiment = str(runs["experiment"].iloc[0])
    known = _known(runs)
    of_sweep = "varied" in runs and runs["varied"].notna().any()  # otherwise the folder of each run was given
    grid = "" if of_sweep else _grid_of(runs)
    study = grid or experiment
    names = {study, study.partition(": ")[0]}  # the second is that of a report about folders of runs
    looks = _looks_about(runs, known, study, None if not of_sweep else names)
    sweeps = _sweeps(runs)
    of_folder = {sweep: plans_in(sweep) for sweep in sweeps}
    ended_of = {sweep: ended_in(sweep) for sweep in sweeps}
    plans = [plan for planned in of_folder.values() for plan in planned]
    plans = sorted(
        (plan for plan in plans if plan.experiment == study or not (of_sweep or grid)), key=lambda plan: plan.time
    )
    with_records = sweeps if plans else []  # to read the records of all runs takes time
    places = {run: place_of(sweep / name) for sweep in with_records for name, run in digests_in(sweep).items()}
    ended = _ended(ended_of, plans, places)
    first_planned = _first_planned(runs, plans, ended)
    looks = _of_one_report(looks, known)
    looks += _without_report(known, plans, ended, places, first_planned, looks)
    return Study(
        name=study,
        planned=first_planned,
        runs=known,
        earlier=sorted(looks, key=lambda look: look.time),
        plans=plans,
        changed=_changed(plans, sweeps) if plans else [],
        starts=_starts(runs) if plans else {},
        ends_known=all(ended_of[sweep] is not None for sweep in sweeps if of_folder[sweep]),
        here=any(sweep.is_dir() for sweep in sweeps),
    )


def _grid_of(runs: pd.DataFrame) -> str:
    """Return the name of the smallest grid that has all of these runs, which were given by their folders; else ""."""
    names = set()
    for sweep in _sweeps(runs):
        cells = [run.name for run in map(Path, group_of(runs)) if run.parent == sweep]
        try:
            grid = SweepRecord.read(sweep / SweepRecord.FILE).grid_with(*cells)
        except RecordError:
            return ""
        names.add(grid.name if grid else "")
    return names.pop() if len(names) == 1 else ""


def _looks_about(runs: pd.DataFrame, known: Mapping[str, Known], study: str, names: Set[str] | None) -> list[Seen]:
    """Return the looks at these runs, and those at runs that a report showed together with them.

    known: what is known of the runs. A look of the name of the study counts, and so does one with another of the
    `names` (None: with any name) that saw some of these runs.
    """
    folders, found = _sweeps(runs), list[Seen]()
    own = len(folders)
    for place, folder in enumerate(folders):  # which grows
        together = {*known}.union(*(look.runs for look in found))
        for name, of_experiment in looks_in(folder).items():
            for look in (_seen(each, folder, known) for each in of_experiment):
                shown_together = (names is None or name in names) and not together.isdisjoint(look.runs)
                if shown_together or (name == study and place < own):
                    found.append(look)
                    beside = {Path(run).parent for run in look.runs if os.path.isabs(run)}
                    folders += sorted(each for each in beside - {*folders} if (each / LooksRecord.FILE).exists())
    return found


def _known(runs: pd.DataFrame) -> dict[str, Known]:
    """Return what is known of each run, by its folder. A run that diverged has ended too: it will not go on."""
    if "seed" not in runs:
        return {}
    runs = runs[runs["seed"].notna()]
    factors = sorted(factor for factor in varied_factors(runs) if factor != "seed")
    ended = runs["status"].isin(ENDED)
    results = runs.reindex(columns=list(RESULT)).astype(object)
    results = results.where(results.notna(), None).to_dict("records")
    started = runs.get("started", ended).map(lambda time: time if isinstance(time, str) else "")
    columns = (runs["folder"], runs[factors].to_numpy(), runs["seed"], ended, map(result_of, results), started)
    return {
        place_of(folder): Known(name_cell(dict(zip(factors, levels, strict=True))), int(seed), bool(end), *rest)
        for folder, levels, seed, end, *rest in zip(*columns, strict=True)
    }


def _seen(look: Look, sweep: Path, known: Mapping[str, Known]) -> Seen:
    """Return what a look saw. known: what is known of the runs.

    A run that was trained again, with another result, is another run. So is one that was trained again with the same
    result, if the look tested a speed.
    """
    runs: dict[str, str] = {}
    for setting, names in look.runs.items():
        places = [_place(place_of(sweep / name), look.results.get(name), known) for name in names]
        present = next((known[place].setting for place in places if place in known), setting)
        runs |= {place: known[place].setting if place in known else present for place in places}
    return Seen(
        look.time,
        runs,
        look.mean_seeds,
        look.planned,
        look.margins,
        look.metrics,
        look.references,
        look.decided,
        look.share,
        look.tests,
    )


def _results(run: Known) -> tuple[str, str]:
    """Return what tells a run from another training of it: its loss; for tests of a speed, its loss and its start."""
    return run.result, f"{run.result} {run.started}"


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


def _ended(
    ended_of: Mapping[Path, list[Ended] | None], plans: Sequence[PlannedStudy], places: Mapping[str, str]
) -> list[Ended]:
    """Return the runs of these plans that have ended, also those that are gone since, in the order of time.

    Their folders have the whole path: that of the run with the same settings that is there, else that of the past.
    Runs of a plan with no setting that is there are left out: they are another study, such as a pilot that was deleted.
    ended_of: the runs that have ended, by their sweep folders. places: the folders of the runs that are there, by their
    fingerprints.
    """
    found = sorted(
        each._replace(folder=places.get(each.run, place_of(sweep / each.folder)))
        for sweep, of_sweep in ended_of.items()
        for each in of_sweep or []
    )
    settings = {each.setting for each in found if each.run in places}
    same = {each.run for each in found if each.setting in settings}
    names = {run for plan in plans if not same.isdisjoint(plan.runs) for run in plan.runs}
    return [each for each in found if each.run in names]


def _first_planned(runs: pd.DataFrame, plans: Sequence[PlannedStudy], ended: Sequence[Ended]) -> int | None:
    """Return the number of seeds after which the study decides, as its first plan said it; None if it said none.

    That is the first plan of which a run has ended, or the record of the first of these runs, if it began earlier.
    An ended run is that of the newest plan before its end that names it.
    """
    named = [[plan for plan in plans if plan.time <= each.time and each.run in plan.runs] for each in ended]
    binding = min((of_run[-1] for of_run in named if of_run), key=lambda plan: plan.time, default=None)
    first = runs.sort_values("started").iloc[0]
    if binding is not None and not str(first["started"]) < binding.time:
        return binding.planned_seeds
    planned = pd.to_numeric(first.get("planned_seeds"), errors="coerce")
    return int(planned) if pd.notna(planned) else None


def _without_report(
    known: Mapping[str, Known],
    plans: Sequence[PlannedStudy],
    ended: Sequence[Ended],
    places: Mapping[str, str],
    first_planned: int | None,
    reports: Sequence[Seen],
) -> list[Seen]:
    """Return a look for each command that trained runs when others had results that could be compared.

    The terminal shows results at the end of a command, and files of runs are open to all. So the results after the last
    command are a look too, if the report leaves out a run that no earlier look saw. known: what is known of the runs of
    the report. ended: the runs that have ended, also those that are gone; a look saw the last result of each. places:
    the folders of the runs that are there, by their fingerprints. first_planned: the number of seeds after which the
    study decides. If nobody said it, runs that earlier commands planned, and that are there, count as awaited. reports:
    the looks with a report. One that saw the same results before the command is the same look.
    """
    names = {each.setting: known[each.folder].setting for each in ended if each.folder in known}
    planned, found = set[str](), list[Seen]()

    def add_look(until: str) -> None:
        last = {each.folder: each for each in ended if each.time <= until}
        settings = {folder: names.get(each.setting, each.setting) for folder, each in last.items()}
        since = max((each.time for each in last.values()), default="")
        seen = any(_has_seen(look, last.keys(), since, until) for look in reports)
        if not seen and is_testable(Known(settings[folder], each.seed, True) for folder, each in last.items()):
            there = (places[run] for run in planned if run in places)
            awaited = settings | {folder: known[folder].setting for folder in there if folder in known}
            runs = {_place(folder, last[folder].result, known): setting for folder, setting in settings.items()}
            found.append(Seen(until, runs, _mean_seeds(settings), first_planned or _mean_seeds(awaited)))

    for plan in plans:
        before = {each.run for each in ended if each.time <= plan.time}
        if {*plan.runs} - planned or not before.isdisjoint(plan.runs):
            add_look(plan.time)
        planned |= {*plan.runs}
    last = {each.folder: _place(each.folder, each.result, known) for each in ended}
    here = {folder for folder, run in known.items() if run.ended}
    if {*last.values()}.difference(here, *(look.runs for look in (*reports, *found))):
        add_look(ended[-1].time)
    return found


def _mean_seeds(settings: Mapping[str, str]) -> float:
    """Return how many runs a setting has on average. settings: that of each run, by its folder."""
    return len(settings) / len({*settings.values()})


def _place(folder: str, result: str | None, known: Mapping[str, Known]) -> str:
    """Return the name of a run that a look saw: its folder; with the result, unless that is the run which is there.

    known: what is known of the runs of the report. result: None if the look does not tell it.
    """
    if result is None or (folder in known and result in _results(known[folder])):
        return folder
    return f"{folder} ({result if folder in known else result.split()[0]})"


def _has_seen(look: Seen, folders: Set[str], since: str, until: str) -> bool:
    """Return whether a look with a report, between two times, saw the runs of these folders.

    A run that was trained again since has its result after its folder in the look, see `_place`.
    """
    names = {*look.runs}.union(run.rpartition(" (")[0] for run in look.runs)
    return since <= look.time <= until and folders <= names


def _starts(runs: pd.DataFrame) -> dict[int, datetime]:
    """Return when the first run of each seed started."""
    times = pd.to_datetime(runs["started"], utc=True, format="ISO8601").groupby(runs["seed"]).min().dropna()
    return {int(seed): time.to_pydatetime() for seed, time in times.items()}


def finished_seeds(runs: pd.DataFrame) -> list[int]:
    """Return the seeds of the finished runs."""
    return sorted({int(seed) for seed in runs.loc[runs["status"] == "finished", "seed"]}) if "seed" in runs else []


def record_look(
    runs: pd.DataFrame,
    study: Study,
    margins: Mapping[str, object] | None = None,
    decided: Mapping[str, str] | None = None,
    written: list[Written] | None = None,
) -> str:
    """Write into the sweep folders that a report about these runs was written; return why not, or "" if that worked.

    margins: those that the reader gave. decided: see `moe.runs.planned.Look`. written: gets the looks that were added.
    A report in which no test was made, and no two settings have two seeds in common, is no look.
    """
    present = study.present
    if not study.testable:
        return ""
    look = Look(
        datetime.now(UTC).isoformat(),
        finished_seeds(runs),
        float(present.seeds),
        float(present.planned),
        runs={},  # see below: their folders, from each sweep folder
        margins={name: str(size) for name, size in (margins or {}).items()},
        metrics=sorted(study.metrics),
        references=dict(sorted(study.references.items())),
        decided=dict(decided or {}),
        share=study.looks.share(),
        tests=dict(study.tests),
    )
    unwritten = ""
    for folder in _sweeps(runs):
        ended: dict[str, list[str]] = {}
        for run, setting in sorted(present.runs.items()):
            ended.setdefault(setting, []).append(os.path.relpath(run, folder))
        results = {os.path.relpath(run, folder): _results(study.runs[run])[study.timed] for run in present.runs}
        try:
            added = _add(look._replace(runs=ended, results=results), folder, study.name)
            if added and written is not None:
                written.append(Written(folder, study.name, look.time))
        except (OSError, NotImplementedError) as error:  # the second: the file system has no locks
            unwritten = unwritten or _why_not(error, folder)
    return unwritten


def take_back(written: Sequence[Written]) -> None:
    """Remove looks that were written down for a report that then showed nothing. Those that cannot be removed stay."""
    for folder, name, time in written:
        with suppress(OSError, NotImplementedError, RecordError), _locked(folder):
            looks = looks_in(folder)
            looks[name] = [look for look in looks.get(name, []) if look.time != time]
            LooksRecord(looks={name: kept for name, kept in looks.items() if kept}).write(folder / LooksRecord.FILE)


def _why_not(error: OSError | NotImplementedError, folder: Path) -> str:
    """Return why a look could not be written into a sweep folder: the file, and what is wrong with it."""
    lock = f"{folder.name}/{_lock_in(folder).name}"
    if isinstance(error, Timeout):
        return f"{lock}: another process had it for {LONGEST_WAIT} s"
    if isinstance(error, NotImplementedError):
        return f"{lock}: the file system has no locks"
    file = lock if str(error.filename) == str(_lock_in(folder)) else f"{folder.name}/{LooksRecord.FILE}"
    return f"{file}: {error.strerror or first_line(error)}"


def _lock_in(folder: Path) -> Path:
    return folder / f"{LooksRecord.FILE}.lock"


def _locked(folder: Path) -> FileLock:
    """Return the lock of the looks of a sweep folder: other reports may add theirs at the same time."""
    return FileLock(_lock_in(folder), timeout=LONGEST_WAIT, mode=shared_mode(folder))


def _add(look: Look, folder: Path, name: str) -> bool:
    """Add a look at an experiment to looks.json of a sweep folder, and return whether that changed the file.

    A look that is there gets the verdicts that it lacks: a report about these runs alone may decide what one about them
    and other runs left open. Raises OSError or NotImplementedError if the folder cannot be written to, or has no locks.
    """

    def with_look() -> dict[str, list[Look]] | None:
        looks = looks_in(folder)
        known = looks.get(name, [])
        place = next((place for place, each in enumerate(known) if _same(each, look)), None)
        if place is None:
            return looks | {name: [*known, look]}
        decided = look.decided | known[place].decided
        if decided == known[place].decided:
            return None
        return looks | {name: [*known[:place], known[place]._replace(decided=decided), *known[place + 1 :]]}

    if with_look() is None:
        return False
    with _locked(folder):
        if (looks := with_look()) is not None:
            LooksRecord(looks=looks).write(folder / LooksRecord.FILE)
        return looks is not None


def _same(look: Look, other: Look) -> bool:
    """Return whether two looks saw the same, and were asked the same."""
    fields = attrgetter("runs", "results", "margins", "metrics", "references")
    return bool(fields(look) == fields(other))


def _sweeps(runs: pd.DataFrame) -> list[Path]:
    """Return the folders above the runs."""
    return sorted({Path(folder).parent for folder in group_of(runs)})


def _changed(here: list[PlannedStudy], sweeps: list[Path]) -> list[tuple[PlannedStudy, int]]:
    """Return earlier plans that changed claims of the newest of `here`, for runs that compute the same.

    here: the plans of this study. The earlier ones are here, in a folder beside, or in one of another `out=DIR` beside.
    A damaged file there is passed over, because this report is not about its runs.
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
                later = {run for plan in present if earlier.time <= plan.time for run in plan.runs}
                found.append((earlier, len(later.intersection(earlier.runs))))
    return [(plan, same) for plan, same in found if same]


def alike(earlier: PlannedStudy, newest: PlannedStudy) -> list[dict[str, Any]]:
    """Return the earlier claims about a factor and a metric, or with the words, of one of the newest claims."""

    def keys(claim: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(claim.get("text"),), (claim.get("factor"), claim.get("metric"))}

    known = set[tuple[Any, ...]]().union(*map(keys, newest.claims))
    return [claim for claim in earlier.claims if keys(claim) & known]
