"""Results: run folders in, one tidy table out.

A row is a run. Its columns are facts about the run (`FACTS`), its factors (every leaf of its config, flattened with
dots, and the choice of every config group under the group's name) and its final metrics, whose names hold a slash.
"Final" is the last evaluation, never the best over the run. A run that did not finish keeps its row, with its status
and without metrics.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from moe.config.schema import flatten

FACTS = (
    *("folder", "experiment", "run", "status", "error", "causal", "commit"),
    *("seconds", "train_seconds", "peak_memory_gb", "parameters.total", "parameters.active", "flops_per_token"),
    "ranks.number",
)
ABSENT = "absent"  # the level of a factor that a run's config does not have, such as router.temp of a top-k router

RUN_FILES = ("run.json", "metrics.json", "events.jsonl")  # any of them marks a run: a crash may leave no run.json
SWEEP_FILE = "sweep.json"


class EventTables(NamedTuple):
    """`evals`, `trains`: a row per run and step (columns folder, kind, step, metrics); `problems`: a line per thing not
    read."""

    evals: pd.DataFrame
    trains: pd.DataFrame
    problems: list[str]


def load_runs(paths: Iterable[Path | str]) -> pd.DataFrame:
    """One row a run at or below `paths`, and one for every cell that a sweep.json there names and that has no run.

    Beside the trainer's own statuses (finished, failed, running, interrupted) a row can be "diverged" (failed, because
    loss or gradient was not finite), "unreadable" or "missing"; `error` says why, and the factors of the last two are
    those that sweep.json or else the folder's name holds.
    """
    paths = list(paths)
    runs, sweeps = _walk(paths)
    asked = {Path(row["folder"]).resolve(): row for sweep in sweeps for row in _cells(sweep)}
    rows = []
    for folder in runs:
        row, cell = read_run(folder), asked.pop(folder.resolve(), {})
        rows.append(row if "causal" in row else row | {key: cell[key] for key in cell.keys() - set(FACTS)})
    rows += asked.values()
    if not rows:
        raise ValueError(f"no run in {', '.join(map(str, paths))}: a run folder holds a run.json")
    known = [row for row in rows if "causal" in row]  # run.json could be read, so a leaf it lacks is truly absent
    absent = {key: ABSENT for row in known for key in row if "/" not in key and key not in FACTS}
    table = pd.DataFrame([absent | row if "causal" in row else row for row in rows], dtype=object)
    metrics = [column for column in table if "/" in column]
    factors = [column for column in table if "/" not in column and column not in FACTS]
    as_written = table[[column for column in factors if table[column].isna().any()]]  # a gap must not turn 42 into 42.0
    table = table.infer_objects().assign(**as_written).astype(dict.fromkeys(metrics, float))
    return table.reindex(columns=[*FACTS, *factors, *metrics]).copy()  # a block per column would be slow


def read_run(folder: Path) -> dict[str, Any]:
    """The row of one run: facts, factors and, if it finished, final metrics."""
    row = _named_row(folder, "unreadable", None)
    try:
        record = _read_object(folder / "run.json")
        factors = {key: level(value) for key, value in (flatten(record["config"]) | record["choices"]).items()}
        factors.pop("claims", None)  # `moe.analysis.claims.planned` reads them from the record
        parameters = record.get("parameters") or {}
        facts = {fact: record.get(fact) for fact in FACTS} | {
            "folder": str(folder),
            "experiment": record.get("experiment") or folder.parent.name,
            "run": record.get("name") or folder.name,
            "parameters.total": parameters.get("total"),
            "parameters.active": parameters.get("active"),
            "ranks.number": (record.get("ranks") or {}).get("number"),
        }
        if facts["status"] == "failed" and str(facts["error"]).startswith("Diverged"):
            facts["status"] = "diverged"
        row = {**factors, **facts}
        if record["status"] == "finished":
            metrics = _read_object(folder / "metrics.json")["final_metrics"]
            row |= {name: value for name, value in metrics.items() if not isinstance(value, list)}
    except FileNotFoundError as error:
        row |= {"status": "unreadable", "error": f"no {Path(error.filename).name}"}
    except (OSError, TypeError, ValueError) as error:
        row |= {"status": "unreadable", "error": str(error)}
    except (AttributeError, KeyError) as error:
        row |= {"status": "unreadable", "error": f"unexpected content: {error!r}"}
    return row


def read_event_tables(folders: Iterable[Path | str], *, training: Sequence[str] = ()) -> EventTables:
    """The events of many runs, each file read once: of evaluations everything, of training steps these columns.

    A step written twice, after a resume, counts as written last. Some runs at a time become arrays, so that a thousand
    of them fit into memory.
    """
    tables: dict[str, list[pd.DataFrame]] = {"eval": [], "train": []}
    problems = []
    places = list(map(Path, folders))
    for start in range(0, len(places), 20):
        rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in tables}
        for folder in places[start : start + 20]:
            events, unread = _read_events(folder, training)
            problems += unread
            if not (events["eval"] or unread):
                problems.append(f"{folder}: no eval event")
            for kind, of_run in events.items():
                rows[kind] += [of_run[step] | {"folder": str(folder)} for step in sorted(of_run)]
        for kind, of_some in rows.items():
            if of_some:
                tables[kind].append(pd.DataFrame(of_some))
    evals, trains = (pd.concat(t, ignore_index=True) if t else pd.DataFrame() for t in tables.values())
    return EventTables(evals, trains, problems)


def _walk(paths: Iterable[Path | str]) -> tuple[list[Path], list[Path]]:
    """Run folders and sweep folders at or below `paths`; nothing inside a run folder is looked at."""
    runs: dict[Path, Path] = {}
    sweeps: dict[Path, Path] = {}

    def closed(error: OSError) -> None:  # a folder that may not be read gets a row that says so
        runs.setdefault(Path(error.filename).resolve(), Path(error.filename))

    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"no folder {path}{_nearest(path)}")
        for name, folders, files in os.walk(path, onerror=closed):
            folder = Path(name)
            if any(file in files for file in RUN_FILES):
                runs.setdefault(folder.resolve(), folder)
                folders.clear()
            elif SWEEP_FILE in files:
                sweeps.setdefault(folder.resolve(), folder)
            folders.sort()
    return list(runs.values()), list(sweeps.values())


def _nearest(path: Path) -> str:
    while path.parent != path and not path.parent.is_dir():
        path = path.parent
    siblings = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.4)
    return f"; the nearest is {path.parent / close[0]}" if close else ""


def _cells(sweep: Path) -> list[dict[str, Any]]:
    """A row for every cell that a sweep was asked for; `load_runs` keeps those without a run."""
    try:
        cells = _read_object(sweep / SWEEP_FILE)["cells"]
        return [
            _named_row(sweep / name, "missing", "no run in this cell of the sweep")
            | {key: level(value) for key, value in factors.items()}
            for name, factors in cells.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [_named_row(sweep / SWEEP_FILE, "unreadable", f"which cells are missing is unknown: {error}")]


def _named_row(folder: Path, status: str, error: str | None) -> dict[str, Any]:
    """What the name alone says of a run: `lb=0.0,noise=0.1,seed=42` holds three factors; one that was cut or changed
    for the file system, and ends in a digest instead, none."""
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


def level(value: Any) -> bool | int | float | str:
    """A leaf of a config as a level that can be compared: null is "none", a list its JSON."""
    if value is None:
        return "none"
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is torn or no JSON: {error}") from error
    if not isinstance(content, dict):
        raise TypeError(f"{path.name} holds a {type(content).__name__}, not an object")
    return content


def _read_events(folder: Path, training: Sequence[str]) -> tuple[dict[str, dict[int, dict[str, Any]]], list[str]]:
    """{kind: {step: event}} of one run, of training steps the columns `training`, and a line per thing not read."""
    path = folder / "events.jsonl"
    marks = {key: json.dumps(key).encode() + b": " for key in ("step", *training)}
    events: dict[str, dict[int, dict[str, Any]]] = {"eval": {}, "train": {}}
    problems = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                trains = line.startswith(b'{"kind": "train"') and line.endswith(b"}\n") and line.find(b"{", 1) < 0
                if trains and not training:
                    continue
                try:
                    event = _pick(line, marks) if trains else json.loads(line)
                    step, kind = int(event["step"]), event["kind"]
                except (ValueError, KeyError, TypeError, OverflowError):
                    problems.append(f"{path}: line {number} skipped, torn or no event")
                    continue
                if kind == "eval":
                    events[kind][step] = event
                elif kind == "train" and training:
                    events[kind][step] = {key: event[key] for key in ("kind", *marks) if key in event}
    except FileNotFoundError:
        problems.append(f"{folder}: no events.jsonl")
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
    return events, problems


def _pick(line: bytes, marks: dict[str, bytes]) -> dict[str, Any]:
    """Some values of a flat event: finding a hundredth of them is ten times as fast as parsing all."""
    event: dict[str, Any] = {}
    for key, mark in marks.items():
        start = line.find(mark) + len(mark)
        if start >= len(mark):
            value = line[start : line.find(b",", start)].removesuffix(b"}")  # to the brace if it is the last one
            try:
                event[key] = float(value)
            except ValueError:
                return dict(json.loads(line))  # null, or a list
    return event | {"kind": "train", "step": int(event["step"])}
