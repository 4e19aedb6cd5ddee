"""Read what sweep folders tell about a study, its plans and its looks, and write a look down."""

import os
from collections.abc import Mapping, Sequence, Set
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from moe.analysis.looks import ENDED, Known, Seen, Study, group_of, is_testable, place_of
from moe.analysis.statistics import name_cell
from moe.checks import first_line
from moe.files import shared_mode
from moe.results.conditions import varied_factors
from moe.results.table import read_run, table_of
from moe.runs.planned import (
    ENDED_FILE,
    Ended,
    Look,
    LooksRecord,
    PlannedStudy,
    PlansRecord,
    digest_of,
    digest_of_run,
    digests_in,
    ended_in,
    looks_in,
    plans_in,
)
from moe.runs.record import RecordError, RunRecord, SweepRecord

LONGEST_WAIT = 60  # seconds until another report has written its look down, which takes a moment
RESULT = ("val/loss", "val/perplexity")  # the first of these tells two trainings of a run apart


def study_of(runs: pd.DataFrame) -> Study:
    """Return what the sweep folders of the runs of one experiment tell. Raises RecordError for a damaged file."""
    experiment = str(runs["experiment"].iloc[0])
    known = _known(runs)
    of_sweep = "varied" in runs and runs["varied"].notna().any()  # otherwise the folder of each run was given
    study = experiment if of_sweep else _grid_of(runs) or experiment
    names = {study, study.partition(": ")[0]}  # the second is that of a report about folders of runs
    looks = _looks_about(runs, known, study, None if not of_sweep else names)
    plans = [plan for folder in _sweeps(runs) for plan in plans_in(folder)]
    plans = sorted(
        (plan for plan in plans if plan.experiment == experiment or not of_sweep), key=lambda plan: plan.time
    )
    digests, places = _digests(_sweeps(runs)) if plans else ({}, {})
    dated = [plan._replace(runs=[digests.get(run, run) for run in plan.runs]) for plan in plans]
    named = _named_by(dated, runs) if plans else runs
    told = _ended(_sweeps(runs), dated, places)
    first_planned = _first_planned(named, dated, told)
    everything = known if named is runs else _known(named) | known
    looks = _of_one_report(looks, known)
    looks += _without_report(named, everything, dated, first_planned, places, told, looks)
    return Study(
        name=study,
        planned=first_planned,
        runs=known,
        earlier=sorted(looks, key=lambda look: look.time),
        plans=plans,
        changed=_changed(plans, _sweeps(runs)) if plans else [],
        starts=_starts(runs) if plans else {},
        here=any(folder.is_dir() for folder in _sweeps(runs)),
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
    loss = next((runs[name] for name in RESULT if name in runs), ended)
    started = runs.get("started", ended).map(lambda time: time if isinstance(time, str) else "")
    columns = (runs["folder"], runs[factors].to_numpy(), runs["seed"], ended, loss.map(repr), started)
    return {
        place_of(folder): Known(name_cell(dict(zip(factors, levels, strict=True))), int(seed), bool(end), *rest)
        for folder, levels, seed, end, *rest in zip(*columns, strict=True)
    }


def _seen(look: Look, sweep: Path, known: Mapping[str, Known]) -> Seen:
    """Return what a look saw. known: the runs; a look that names no runs saw all of its seeds.

    A run that was trained again, with another result, is another run. So is one that was trained again with the same
    result, if the look tested a speed.
    """
    runs = {}
    for setting, names in look.runs.items():
        for name in names:
            folder = place_of(sweep / name)
            same = folder not in known or look.results.get(name) in (None, *_results(known[folder]))
            runs[folder if same else f"{folder} ({look.results[name]})"] = setting
    if not look.runs:
        runs = {folder: run.setting for folder, run in known.items() if run.seed in look.seeds}
        runs |= {f"seed {seed}": "unknown" for seed in {*look.seeds} - {run.seed for run in known.values()}}
    runs |= {folder: known[folder].setting for folder in runs.keys() & known.keys()}
    seeds = look.mean_seeds or len(look.seeds)
    return Seen(
        look.time,
        runs,
        seeds,
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


def _named_by(plans: Sequence[PlannedStudy], runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs; if the report leaves some out that these plans name, all runs of the sweep folders that they do.

    A run that cannot be read is passed over.
    """
    present, digests = group_of(runs), {digest for plan in plans for digest in plan.runs}
    folders = {place_of(path.parent) for sweep in _sweeps(runs) for path in sweep.glob(f"*/{RunRecord.FILE}")}
    named = [folder for folder in folders - present if _digest(folder) in digests]
    return table_of([read_run(Path(folder)) for folder in sorted([*(folders & present), *named])]) if named else runs


def _digest(folder: str) -> str | None:
    """Return the fingerprint of the settings of a run; None if its record cannot be read."""
    try:
        return digest_of_run(RunRecord.read(Path(folder) / RunRecord.FILE).identity)
    except RecordError:
        return None


def _digests(sweeps: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the fingerprint of each run in the sweep folders, by itself and by its earlier form; and its folder."""
    found = {place_of(sweep / name): each for sweep in sweeps for name, each in digests_in(sweep).items()}
    digests = dict(found.values())
    return digests | {new: new for new in digests.values()}, {new: place for place, (_, new) in found.items()}


def _ended(sweeps: list[Path], plans: Sequence[PlannedStudy], places: Mapping[str, str]) -> list[Ended]:
    """Return the runs of these plans that have ended, also those that are gone since, in the order of time.

    Their folders have the whole path. places: the folders of the runs that are there, by their fingerprints. Runs of a
    plan with no setting that is there are left out: they are another study, such as a pilot that was deleted.
    """
    found = sorted(
        each._replace(folder=places.get(each.run, place_of(sweep / each.folder)))
        for sweep in sweeps
        for each in ended_in(sweep) or []
    )
    settings = {each.setting for each in found if each.run in places}
    same = {each.run for each in found if each.setting in settings}
    names = {run for plan in plans if not same.isdisjoint(plan.runs) for run in plan.runs}
    return [each for each in found if each.run in names]


def _first_planned(runs: pd.DataFrame, plans: Sequence[PlannedStudy], ended: Sequence[Ended]) -> int | None:
    """Return the number of seeds after which the study decides, as its first plan said it; None if it said none.

    That is the first plan of which a run has ended, or the record of the first run that is there, if it began earlier.
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
    runs: pd.DataFrame,
    known: Mapping[str, Known],
    plans: Sequence[PlannedStudy],
    first_planned: int | None,
    places: Mapping[str, str],
    told: Sequence[Ended],
    reports: Sequence[Seen],
) -> list[Seen]:
    """Return a look for each command that added runs when others had results that could be compared.

    The terminal shows results at the end of a command, and files of runs are open to all. Runs of the seeds that
    earlier commands planned count as awaited if they had not ended. first_planned: the number of seeds after which the
    study decides, if somebody said it. places: the folders of the runs in the sweep folders, by their fingerprints.
    told: the runs that have ended, also those that are gone since. In a folder of earlier code, which does not tell it,
    a run that an earlier command planned and that is not there may have ended, so the look may have seen it. reports:
    the looks with a report. One that saw all of this before the command is the same look. A run that is there and began
    in a later command is another run than the one that the look saw.
    """
    if not plans:
        return []
    ended = runs[runs["status"].isin(ENDED) & runs["seconds"].notna()]
    ends = pd.to_datetime(ended["started"], utc=True, format="ISO8601")
    ends += pd.to_timedelta(ended["seconds"].astype(float), unit="s")
    names = {each.setting: known[each.folder].setting for each in told if each.folder in known}
    of_file = {each.folder: each for each in reversed(told)}  # the first end counts
    gone = {place: Known(names.get(each.setting, each.setting), each.seed, True) for place, each in of_file.items()}
    known = gone | dict(known)
    earlier_code = any((sweep / PlansRecord.FILE).exists() > (sweep / ENDED_FILE).exists() for sweep in _sweeps(runs))
    planned, seeds, found = set[str](), set[int](), list[Seen]()
    for plan in plans:
        by_record = group_of(ended[ends <= datetime.fromisoformat(plan.time)]) - of_file.keys()
        before = by_record.union(place for place, each in of_file.items() if each.time <= plan.time)
        seen = {folder: known[folder] for folder in before}
        if {*plan.runs} - planned and is_testable(seen.values()):
            awaited = {folder for folder, run in known.items() if run.seed in seeds}
            number = len({known[folder].setting for folder in awaited.union(seen)})
            expected = first_planned or len(awaited.union(seen)) / number
            lost = planned - places.keys() - {each.run for each in told} if earlier_code else set()
            following = next((each.time for each in plans if each.time > plan.time), "")
            again = {folder for folder, run in known.items() if following and run.started >= following}
            runs_seen = {
                f"{folder} (before it was trained again)" if folder in again else folder: run.setting
                for folder, run in seen.items()
            } | dict.fromkeys(lost, "unknown")
            times = [*ends[ends <= datetime.fromisoformat(plan.time)].map(datetime.isoformat), *(e.time for e in told)]
            last = max((time for time in times if time <= plan.time), default="")
            if not any(_has_seen(look, seen.keys(), len(runs_seen), last, plan.time) for look in reports):
                found.append(Seen(plan.time, runs_seen, len(seen) / number, expected))
        planned, seeds = planned | {*plan.runs}, seeds | {*plan.seeds}
    return found


def _has_seen(look: Seen, folders: Set[str], number: int, since: str, until: str) -> bool:
    """Return whether a look with a report, between two times, saw these runs, and as many in all.

    A run that was trained again since has its result after its folder in the look, as `_seen` has it.
    """
    names = {*look.runs}.union(run.rpartition(" (")[0] for run in look.runs)
    return since <= look.time <= until and folders <= names and number <= len(look.runs)


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
) -> str:
    """Write into the sweep folders that a report about these runs was written; return why not, or "" if that worked.

    margins: those that the reader gave. decided: see `moe.runs.planned.Look`. A report in which no test was made, and
    no two settings have two seeds in common, is no look.
    """
    present = study.present
    if not study.testable:
        return ""
    look = Look(
        datetime.now(UTC).isoformat(),
        finished_seeds(runs),
        float(present.seeds),
        float(present.planned),
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
            _add(look._replace(runs=ended, results=results), folder, study.name)
        except (OSError, NotImplementedError) as error:  # the second: the file system has no locks
            unwritten = unwritten or _why_not(error, folder)
    return unwritten


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


def _add(look: Look, folder: Path, name: str) -> None:
    """Add a look at an experiment to looks.json of a sweep folder, unless it is there.

    Raises OSError or NotImplementedError if the folder cannot be written to, or has no locks.
    """

    def with_look() -> dict[str, list[Look]] | None:
        looks = looks_in(folder)
        known = looks.get(name, [])
        return None if any(_same(each, look) for each in known) else looks | {name: [*known, look]}

    if with_look() is None:
        return
    lock = FileLock(_lock_in(folder), timeout=LONGEST_WAIT, mode=shared_mode(folder))
    with lock:  # other reports may add theirs meanwhile
        if (looks := with_look()) is not None:
            LooksRecord(looks=looks).write(folder / LooksRecord.FILE)


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
                known = dict(pair for each in {*sweeps, folder} for pair in digests_in(each).values())
                later = {known.get(run, run) for plan in present if earlier.time <= plan.time for run in plan.runs}
                found.append((earlier, len(later & {known.get(run, run) for run in earlier.runs})))
    return [(plan, same) for plan, same in found if same]


def alike(earlier: PlannedStudy, newest: PlannedStudy) -> list[dict[str, Any]]:
    """Return the earlier claims about a factor and a metric, or with the words, of one of the newest claims."""

    def keys(claim: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(claim.get("text"),), (claim.get("factor"), claim.get("metric"))}

    known = set[tuple[Any, ...]]().union(*map(keys, newest.claims))
    return [claim for claim in earlier.claims if keys(claim) & known]
