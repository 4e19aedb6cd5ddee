"""Read run folders into one table.

A row is a run. Its columns are facts about the run (`FACTS`), its factors (every leaf of its configuration under its
dotted key, and the chosen option of every config group under the group's name), and its final metrics, whose names
contain a slash. "Final" means the last evaluation, never the best one of the run. A run that did not finish keeps its
row, with its status and without metrics.
"""

import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from moe.config.cell import Grid
from moe.config.keys import DEFAULTED, OFF, flatten
from moe.config.schema import defaults
from moe.config.trainable import ALL
from moe.metrics.catalog import without_limit
from moe.runs import events
from moe.runs.folder import single_runs, user
from moe.runs.record import MetricsRecord, RecordError, RunRecord, SweepRecord

OF_GRID = ("experiment", "place", "varied", "search", "tuned")  # those facts that sweep.json tells
FACTS = (
    *("folder", "experiment", "run", "place", "varied", "search", "tuned"),
    *("status", "error", "started", "causal", "commit"),
    *("seconds", "train_seconds", "peak_memory_gb", "parameters.total", "parameters.active", "parameters.trainable"),
    *("flops_per_token", "ranks.number", "unigram_perplexity", "claims"),
)
PLUGINS = "plugins"  # factors such as plugins.mylab: the start of the checksum of a package's code, if a run used it
# Factors: the start of the checksums of what a run read.
DIGESTS = ("data.corpus_sha256", "data.tokenizer_sha256", "data.test_sha256")
# The level of a factor that does not apply to a run: its config lacks the key, such as router.temp with a top-k router,
# or its router ignores it, such as noise with a hash router.
ABSENT = "absent"

# Names of columns in the tables that are made from this one. A factor with such a name is called `config.NAME`.
TAKEN = {*FACTS, "metric", "n", "mean", "std (ddof=1)", "factor", "level", "reference", "within", "condition", "kind"}

# Any of these files marks a run folder, because a crash may leave no run.json.
RUN_FILES = (RunRecord.FILE, MetricsRecord.FILE, events.FILE)
USUAL_PLACE = Path("multirun")  # the folder of sweeps


class EventTables(NamedTuple):
    """The events of many runs: evaluations and training steps, a row per run and step, and a line per problem found.

    The columns are folder, kind, step, and metrics.
    """

    evals: pd.DataFrame
    trains: pd.DataFrame
    problems: list[str]


def load_runs(paths: Iterable[Path | str]) -> pd.DataFrame:
    """Return one row for each run at or below `paths`, and one for each cell in a sweep.json there that has no run.

    A run that belongs to several grids of its sweep has a row for each. The column `experiment` names the grid: the
    experiment, followed by what distinguishes the grid from the experiment's own. Runs that no sweep asked for are a
    grid of their own if there are sweeps of the same experiment.

    The status of a row is that of the run record (finished, failed, running, interrupted), or "killed" (no process
    trains a run that is running), "diverged" (it failed because a loss or gradient was not finite), "unreadable", or
    "missing". The column `error` gives the reason. The factors of unreadable and missing runs come from sweep.json if
    possible, otherwise from the name of the folder. `place` is the place of the run in its sweep, as the user listed
    the levels; the rows of a grid are in this order. `varied` is a JSON list of the factors of its grid. `search` is
    such as "minimize val/loss" if a search for good settings chose the run, otherwise None. `tuned` is None unless keys
    are tuned for each setting of the grid. Then it is a JSON object: `factors`, without these keys, and the grid's
    other settings with `tune` and `tune_seeds`. It is the same for the runs that tune, which have a `search`, and for
    those that judge. Raises ValueError if there is no such folder, or no run in it.
    """
    paths = list(paths)
    runs, sweeps = _walk(paths)
    asked: dict[Path, list[dict[str, Any]]] = {}
    for cell in (cell for sweep in sweeps for cell in _cells(sweep)):
        asked.setdefault(Path(cell["folder"]).resolve(), []).append(cell)
    swept = {cell["experiment"].partition(": ")[0] for cells in asked.values() for cell in cells}
    rows = []
    for folder in runs:
        row = read_run(folder)
        alone = {"experiment": single_runs(row["experiment"])} if row["experiment"] in swept else {}
        for cell in asked.pop(folder.resolve(), [alone]):
            told = {*OF_GRID} | (set() if "causal" in row else cell.keys() - {*FACTS})
            rows.append(row | {key: cell[key] for key in cell if key in told})
    rows += itertools.chain.from_iterable(asked.values())
    if not rows:
        raise ValueError(f"no run in {', '.join(map(str, paths))}: a run folder holds a run.json")
    grids = list(dict.fromkeys(row["experiment"] for row in rows))
    rows.sort(key=lambda row: (grids.index(row["experiment"]), math.inf if row.get("place") is None else row["place"]))
    return table_of(rows)


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return rows of runs as one table: facts, factors, then metrics as floats. A row with a record has "causal"."""
    known = [row for row in rows if "causal" in row]  # rows with a record; only there a key is known to be absent
    absent = {key: ABSENT for row in known for key in row if "/" not in key and key not in FACTS}
    absent |= _levels({key: value for key, value in defaults().items() if key in absent})  # keys from after a run
    table = pd.DataFrame([absent | row if "causal" in row else row for row in rows], dtype=object)
    metrics = [column for column in table if "/" in column]
    factors = [column for column in table if "/" not in column and column not in FACTS]
    inferred = table.infer_objects()
    # A factor with a gap would become floats, and 42 would become 42.0. Such columns keep the values as they are. So do
    # texts: pandas 3 has a type for texts and keeps each such column apart, so that it takes long to pick rows.
    gaps = [column for column in factors if table[column].isna().any()]
    texts = [column for column in table if isinstance(inferred[column].dtype, pd.StringDtype)]
    table = inferred.assign(**table[[*dict.fromkeys(gaps + texts)]]).astype(dict.fromkeys(metrics, float))
    table = table.assign(**values_without_limit(table))
    return table.reindex(columns=[*FACTS, *factors, *metrics]).copy()  # in one block: a block per column would be slow


def values_without_limit(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the metrics under the capacity limit, in a table of runs or evaluations, also of runs without a limit.

    Such a run is not evaluated a second time, because that would give the same. Only a table with runs that have a
    limit has these metrics.
    """
    if "capacity" not in table or "val/loss" not in table:
        return {}
    evaluated = table["capacity"].isin([level(None), ABSENT]) & table["val/loss"].notna()
    same = {metric: without_limit(metric) for metric in table}
    return {
        metric: table[metric].mask(table[metric].isna() & evaluated, table.get(value) if value in table else value)
        for metric, value in same.items()
        if isinstance(value, float) or value in table
    }


def as_csv(table: pd.DataFrame) -> str:
    """Return a table as CSV text. Numbers have at most 12 significant digits, which is more than results tell."""
    return table.map(lambda cell: float(f"{cell:.12g}") if isinstance(cell, float) else cell).to_csv(index=False)


def read_run(folder: Path) -> dict[str, Any]:
    """Return the row of one run: facts, factors and, if it finished, final metrics."""
    row = _named_row(folder, "unreadable", None)
    try:
        record = RunRecord.read(folder / RunRecord.FILE)
        if type(seed := record.config.get("seed", 0)) is not int:
            raise RecordError(f"{folder / RunRecord.FILE}: config.seed={seed!r:.40}: must be a whole number")
        factors = _factors(record)
        if record.status == "running" and user(folder) is None:
            return (
                factors | _facts(folder, record) | {"status": "killed", "error": "its process ended without a message"}
            )
        metrics = MetricsRecord.read(folder / MetricsRecord.FILE).scalars() if record.status == "finished" else {}
        return factors | _facts(folder, record) | metrics
    except RecordError as error:
        return row | {"status": "unreadable", "error": str(error)}


def _factors(record: RunRecord) -> dict[str, Any]:
    leaves = flatten(record.config) | record.choices
    inapplicable = (OFF.keys() | DEFAULTED) - record.identity.keys()
    factors = {key: ABSENT if key in inapplicable else value for key, value in _levels(leaves).items()}
    factors.pop("claims", None)  # no setting: they are facts
    return {f"config.{key}" if key in TAKEN else key: value for key, value in factors.items()}


def _levels(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the level of each setting. That of `trainable`, if it is null, is what then trains."""
    if settings.get("trainable", ALL) is None:
        settings = settings | {"trainable": "adapter" if "adapter._target_" in settings else ALL}
    return {key: level(value) for key, value in settings.items() if "/" not in key}


def _facts(folder: Path, record: RunRecord) -> dict[str, Any]:
    row = dict.fromkeys(FACTS) | {
        "folder": str(folder),
        "experiment": record.experiment,
        "run": record.name,
        "status": "diverged" if record.diverged else record.status,
        "error": record.error,
        "started": record.started,
        "causal": record.causal,
        "commit": record.commit,
        "claims": json.dumps(record.config.get("claims") or []),
    }
    row |= dict.fromkeys(DIGESTS)
    row |= {f"{PLUGINS}.{name}": plugin.sha256[:12] for name, plugin in record.plugins.items()}
    if (facts := record.facts) is not None:
        row |= {key: str(level(facts.data.get(key.removeprefix("data."))))[:12] for key in DIGESTS}
        row |= {
            "seconds": facts.seconds,
            "train_seconds": facts.train_seconds,
            "peak_memory_gb": facts.peak_memory_gb,
            "parameters.total": facts.parameters.total,
            "parameters.active": facts.parameters.active,
            "parameters.trainable": facts.parameters.trainable,
            "flops_per_token": facts.flops_per_token,
            "ranks.number": facts.ranks.number,
            "unigram_perplexity": facts.unigram_perplexity,
        }
    return row


def read_event_tables(folders: Iterable[Path | str], *, training: Sequence[str] = ()) -> EventTables:
    """Return the events of many runs: all values of evaluations, but only the columns `training` of training steps.

    If a step was written twice, as after a resume, the later line counts. The events of twenty runs at a time are
    turned into arrays, so that a thousand runs fit into memory.
    """
    tables: dict[str, list[pd.DataFrame]] = {"eval": [], "train": []}
    problems = []
    places = list(dict.fromkeys(map(Path, folders)))  # a run has a row for each grid to which it belongs
    for start in range(0, len(places), 20):
        rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in tables}
        for folder in places[start : start + 20]:
            by_kind, unread = _read_events(folder, training)
            problems += unread
            if not (by_kind["eval"] or unread):
                problems.append(f"{folder}: no evaluation, because the run ended before its first one")
            for kind, by_step in by_kind.items():
                rows[kind] += [by_step[step] for step in sorted(by_step)]
        for kind, of_kind in rows.items():
            if of_kind:
                tables[kind].append(pd.DataFrame(of_kind))
    evals, trains = (pd.concat(t, ignore_index=True) if t else pd.DataFrame() for t in tables.values())
    return EventTables(evals, trains, problems)


def _walk(paths: Iterable[Path | str]) -> tuple[list[Path], list[Path]]:
    """Return the run folders and the sweep folders at or below `paths`, without looking inside run folders."""
    runs: dict[Path, Path] = {}
    sweeps: dict[Path, Path] = {}

    def note_unreadable(error: OSError) -> None:  # a folder without permission to read gets a row with that error
        runs.setdefault(Path(error.filename).resolve(), Path(error.filename))

    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"no folder {path}{_nearest(path)}")
        for name, folders, files in os.walk(path, onerror=note_unreadable):
            folder = Path(name)
            if any(file in files for file in RUN_FILES):
                runs.setdefault(folder.resolve(), folder)
                folders.clear()
            elif SweepRecord.FILE in files:
                sweeps.setdefault(folder.resolve(), folder)
            folders.sort(key=natural)
    return list(runs.values()), list(sweeps.values())


def _nearest(path: Path) -> str:
    """Return a text that names the folder with runs whose name is the most similar; "" if there is none.

    A sweep is also found by its name in the usual folder of sweeps.
    """
    folders = [USUAL_PLACE / path]
    while path.parent != path and not path.parent.is_dir():
        path = path.parent
    siblings = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    close = difflib.get_close_matches(path.name, siblings, n=5, cutoff=0.6)
    folders += [path.parent / name for name in close]
    found = next(filter(_has_runs, folders), None)
    return "" if found is None else f"; the nearest is {found}"


def _has_runs(folder: Path) -> bool:
    """Return whether a folder is a run, a sweep, or holds some as far below as this project puts them."""
    files = (*RUN_FILES, SweepRecord.FILE)
    return any(any(folder.glob(f"{below}{file}")) for below in ("", "*/", "*/*/") for file in files)


def _cells(sweep: Path) -> list[dict[str, Any]]:
    """Return a row for every cell that a sweep should have, in each of its grids.

    `load_runs` uses the rows of cells without a run.
    """
    path = sweep / SweepRecord.FILE
    try:
        record = SweepRecord.read(path)
    except RecordError as error:
        return [_named_row(path, "unreadable", f"it is unknown which cells are missing: {error}")]
    return [
        _named_row(sweep / name, "missing", "no run in this cell of the sweep")
        | {key: value for key, value in _levels(record.cells[name]).items() if key not in FACTS}
        | {"experiment": grid.name, "place": place, "varied": json.dumps(grid.factors)}
        | {"search": grid.search, "tuned": _tuned(grid)}
        for grid in record.grids
        for place, name in enumerate(grid.cells)
    ]


def _tuned(grid: Grid) -> str | None:
    tune = grid.fixed.get("tune")
    return json.dumps({"factors": [name for name in grid.factors if name not in tune], **grid.fixed}) if tune else None


def _named_row(folder: Path, status: str, error: str | None) -> dict[str, Any]:
    """Return the row of a run if only the name of its folder is known.

    `lb=0.0,noise=0.1,seed=42` holds three factors. A name that was changed for the file system ends in a checksum and
    holds none.
    """
    row: dict[str, Any] = {}
    for part in folder.name.split(",") if not re.search("-[0-9a-f]{8}$", folder.name) else ():
        key, equals, text = part.partition("=")
        if equals:
            row[key] = level(_parse(text))
    return row | {
        "folder": str(folder),
        "experiment": folder.parent.name,
        "run": folder.name,
        "status": status,
        "error": error,
    }


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def natural(text: str) -> list[str | float]:
    """Return a key that sorts texts with their numbers as numbers: "noise=2.0" comes before "noise=10.0"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [float(part) if odd else part for part, odd in zip(parts, itertools.cycle((False, True)), strict=False)]


def level(value: Any) -> bool | int | float | str:
    """Return a leaf of a configuration as a level that can be compared.

    Null becomes "none", a list its JSON, and a number that is not finite a text, because NaN is unequal to itself.
    """
    if value is None:
        return "none"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _read_events(folder: Path, training: Sequence[str]) -> tuple[dict[str, dict[int, dict[str, Any]]], list[str]]:
    """Return {kind: {step: event}} of one run, training steps with the columns `training`, and a line per problem."""
    path = folder / events.FILE
    found: dict[str, dict[int, dict[str, Any]]] = {"eval": {}, "train": {}}
    problems = []
    columns, of_run = ("kind", "step", *training), {"folder": str(folder)}
    try:
        for number, event in enumerate(events.iterate_events(path), start=1):
            if event is None:
                problems.append(f"{path}: line {number} skipped, incomplete or not an event")
            elif event["kind"] == "eval":
                found["eval"][event["step"]] = event | of_run
            elif event["kind"] == "train" and training:
                found["train"][event["step"]] = {key: event[key] for key in columns if key in event} | of_run
    except FileNotFoundError:
        problems.append(f"{folder}: no {events.FILE}")
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
    return found, problems
