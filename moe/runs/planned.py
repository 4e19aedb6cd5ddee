"""What a sweep folder tells about decisions: what was planned, which runs have ended, which reports were written."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from moe.checks import first_line, parse
from moe.config.keys import fingerprint
from moe.config.schema import without_defaults
from moe.files import open_unlinked, read_text, shared_mode
from moe.runs.record import Record, RecordError, RunRecord

MOST_SEEDS = 10**9  # of a setting, that a record may name; more is a damaged number
LARGEST_FAMILY = 10**6  # tests that a look may have made of a family or metric, likewise
RESULT = ("val/loss", "val/perplexity")  # the first of these that a run has tells it from another training
ENDED_FILE = "ended.jsonl"  # in a sweep folder: the runs that have ended, one `Ended` in each line


class PlannedStudy(NamedTuple):
    """What a command planned before the first step of its runs.

    time: such as 2026-11-27T09:30:00+00:00. experiment: the name of the grid. planned_seeds: the number of seeds after
    which the report decides; null if nobody said. runs: the fingerprint of the settings of each run that had not begun.
    """

    time: str
    experiment: str
    claims: list[dict[str, Any]]
    seeds: list[int]
    planned_seeds: int | None
    runs: list[str]

    @property
    def digest(self) -> str:
        """The start of the SHA-256 of everything but the time."""
        return digest_of(self._replace(time="")._asdict())


class Ended(NamedTuple):
    """A run that will not go on, because it is finished or diverged. It stays known if its folder is gone.

    time: when it ended, as in `PlannedStudy`. run, setting: fingerprints of its settings, with and without the seed.
    folder: the name of its folder. result: see `result_of`.
    """

    time: str
    run: str
    setting: str
    seed: int
    folder: str
    result: str


class Look(NamedTuple):
    """A report that was written: its time, what it saw, and what the reader asked for.

    seeds: those of the finished runs. mean_seeds: how many seeds a setting had in all looks up to this one, on average.
    planned: the number of seeds after which the study decides. runs: setting, such as "lb=0.01, noise=0.1" -> the
    folders of its runs that had ended, from the sweep folder. margins: metric -> the margin that a reader gave, as
    text. results: folder of a run -> its result, see `result_of`; if the look tested a speed, followed by the time at
    which the run started, because a run that is trained again has the same loss and another speed. metrics: those that
    were tested. references: factor -> the level that the others were compared with, as text. decided: the words of each
    claim with its fingerprint, and the metric and levels of each comparison -> its verdict, if a test decided it.
    share: of the level, that the look had for its new tests. tests: name of a family of claims, or metric of the
    analysis of variance -> how many tests the look made of it.
    """

    time: str
    seeds: list[int]
    mean_seeds: float
    planned: float
    runs: dict[str, list[str]]
    margins: dict[str, str] = {}
    metrics: list[str] = []
    references: dict[str, str] = {}
    decided: dict[str, str] = {}
    results: dict[str, str] = {}
    share: float = 0.0
    tests: dict[str, int] = {}


@dataclass(frozen=True, kw_only=True)
class PlansRecord(Record):
    """plans.json: what each command planned before the first step of its runs, in the order of time."""

    FILE: ClassVar[str] = "plans.json"
    ADVICE: ClassVar[str] = "move this file away; it says what was planned before the runs"

    plans: list[PlannedStudy]

    def __post_init__(self) -> None:
        for number, plan in enumerate(self.plans):
            _check_time(f"plans[{number}].time", plan.time, with_zone=True)
            _check_numbers(f"plans[{number}].seeds", plan.seeds)
            _check_numbers(f"plans[{number}].planned_seeds", [plan.planned_seeds or 0], most=MOST_SEEDS)


@dataclass(frozen=True, kw_only=True)
class LooksRecord(Record):
    """looks.json: the reports that were written about each experiment of a sweep folder, in the order of time."""

    FILE: ClassVar[str] = "looks.json"
    ADVICE: ClassVar[str] = "move this file away; it says how often results were looked at"

    looks: dict[str, list[Look]]

    def __post_init__(self) -> None:
        for experiment, looks in self.looks.items():
            for number, look in enumerate(looks):
                place = f"looks.{experiment}[{number}]"
                _check_numbers(f"{place}.seeds", look.seeds)
                _check_numbers(f"{place}.mean_seeds", [look.mean_seeds], most=MOST_SEEDS)
                _check_numbers(f"{place}.planned", [look.planned], most=MOST_SEEDS)
                _check_numbers(f"{place}.share", [look.share], most=1)
                _check_numbers(f"{place}.tests", look.tests.values(), most=LARGEST_FAMILY)
                _check_folders(f"{place}.runs", itertools.chain.from_iterable(look.runs.values()))
                _check_time(f"{place}.time", look.time)


def plans_in(folder: Path) -> list[PlannedStudy]:
    """Return what was planned in a sweep folder; nothing without the file. Raises RecordError if it is damaged."""
    path = folder / PlansRecord.FILE
    return PlansRecord.read(path).plans if path.exists() else []


def looks_in(folder: Path) -> dict[str, list[Look]]:
    """Return the looks at each experiment of a sweep folder; none without the file. Raises RecordError if damaged."""
    path = folder / LooksRecord.FILE
    return LooksRecord.read(path).looks if path.exists() else {}


def begin_ended(folder: Path) -> None:
    """Create the file of the runs that have ended, in a sweep folder without a plan. Raises OSError.

    A folder that has plans lost its file, and gets no new one: that would lack the runs that ended before.
    """
    path = folder / ENDED_FILE
    if not path.exists() and not (folder / PlansRecord.FILE).exists():
        # Another command may create the file at the same time. Some file systems have no modes.
        with open_unlinked(path, "a"), suppress(OSError):
            path.chmod(shared_mode(folder))


def add_ended(
    identity: dict[str, Any], seed: int, folder: Path, metrics: Mapping[str, Any], time: datetime | None = None
) -> None:
    """Append a run that has ended to the file of its sweep folder, if that has one. Raises OSError and LinkError.

    A line is written at once, so that runs which end at the same time need no lock. After a torn line, it begins a new
    one. identity: see `RunRecord`. folder: that of the run. metrics: its final metrics; none if it diverged. time: when
    it ended; by default now.
    """
    path = folder.parent / ENDED_FILE
    if path.exists():
        setting = digest_of_run({key: value for key, value in identity.items() if key != "seed"})
        text = (time or datetime.now(UTC)).isoformat()
        ended = Ended(text, digest_of_run(identity), setting, seed, folder.name, result_of(metrics))
        known = read_text(path)
        torn = bool(known) and not known.endswith("\n")
        with open_unlinked(path, "a") as file:
            file.write("\n" * torn + json.dumps(ended._asdict()) + "\n")


def result_of(metrics: Mapping[str, Any]) -> str:
    """Return what tells two trainings of a run apart: its final validation loss, as text; "nan" if it has none."""
    return repr(float(next((metrics[name] for name in RESULT if metrics.get(name) is not None), math.nan)))


def ended_in(folder: Path) -> list[Ended] | None:
    """Return the runs of a sweep folder that have ended, in the order of lines; None without the file.

    A torn line, such as a full disk leaves, is no JSON and is passed over. Raises RecordError for another line that
    holds no such run.
    """
    path = folder / ENDED_FILE
    if not path.exists():
        return None
    found = list[Ended]()
    try:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            try:
                ended = parse(Ended, content)
                _check_time("time", ended.time, with_zone=True)
                _check_folders("folder", [ended.folder])
            except ValueError as error:
                raise ValueError(f"line {number}: {first_line(error)}") from None
            found.append(ended)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{path}: {first_line(error)}; move this file away; it says which runs have ended") from None
    return found


def _check_time(place: str, time: str, *, with_zone: bool = False) -> None:
    """Raise ValueError unless a text is a time. with_zone: it has to tell its zone."""
    known = None
    with suppress(ValueError):
        known = datetime.fromisoformat(time)
    if known is None or (with_zone and known.tzinfo is None):
        raise ValueError(f"{place} has {time!r:.40}: must be a time such as 2026-11-27T09:30:00+00:00")


def _check_numbers(place: str, numbers: Iterable[int | float], most: int | float = math.inf) -> None:
    """Raise ValueError unless all numbers are at least 0, and at most `most`."""
    for number in numbers:
        if not 0 <= number <= most:
            allowed = "at least 0" if most == math.inf else f"from 0 to {most}"
            raise ValueError(f"{place} has {number}: must be {allowed}")


def _check_folders(place: str, names: Iterable[str]) -> None:
    """Raise ValueError if no folder can have one of these names."""
    for name in names:
        if "\0" in name:
            raise ValueError(f"{place} has {name!r:.40}: must be names of folders")


def short(fingerprint_or_checksum: str) -> str:
    """Return the start of a fingerprint or checksum, as texts show it. The JSON files have all of it."""
    return fingerprint_or_checksum[:8]


def digest_of(content: Any) -> str:
    """Return the fingerprint of something that JSON can hold: the first 12 characters of its SHA-256."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def digest_of_run(identity: dict[str, Any]) -> str:
    """Return the fingerprint of all that decides what a run computes. A new key with its default does not change it.

    identity: see `RunRecord`.
    """
    return digest_of(fingerprint(without_defaults(identity)))


def digests_in(folder: Path) -> dict[str, str]:
    """Return the fingerprint of each run in a sweep folder, by the name of its folder; none of an unreadable record."""
    found = {}
    for path in folder.glob(f"*/{RunRecord.FILE}"):
        try:
            record = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError):
            continue
        identity = record.get("identity") if isinstance(record, dict) else None
        if isinstance(identity, dict):
            found[path.parent.name] = digest_of_run(identity)
    return found


def digest_of_plan(plan: dict[str, Any]) -> str:
    """Return the fingerprint of a plan.json: of all but its time and its key "digest", which holds the fingerprint."""
    return digest_of({key: value for key, value in plan.items() if key not in ("time", "digest")})


def is_plan(content: Any) -> bool:
    """Return whether the content of a JSON file is a plan of `moe plan`, also an old one without a fingerprint."""
    return isinstance(content, dict) and {"claims", "runs", "command"} <= content.keys()
