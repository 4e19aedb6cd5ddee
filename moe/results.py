"""Results: run folders in, one tidy table out.

A row is a run. Its columns are facts about the run (`FACTS`), its factors (every leaf of its config, flattened with
dots, and the choice of every config group under the group's name) and its final metrics, whose names hold a slash.
"Final" is the last evaluation, never the best over the run. A run that did not finish keeps its row, with its status
and without metrics.
"""

import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe.config import FREE_KEYS, flatten

FACTS = (
    *("folder", "experiment", "run", "status", "error", "causal", "commit"),
    *("seconds", "train_seconds", "peak_memory_gb", "parameters.total", "parameters.active"),
)
HEADLINE = ("val/loss", "val/perplexity", "val/accuracy", "routing/load_cv/pooled")
STD = "std (ddof=1)"
ABSENT = "absent"  # the level of a factor that a run's config does not have, such as router.temp of a top-k router

RUN_FILES = ("run.json", "metrics.json", "events.jsonl")  # any of them marks a run: a crash may leave no run.json
SWEEP_FILE = "sweep.json"
GROUPS = ("variant", "router", "schedule", "model", "data", "optimizer")

# Column of the noise study's own table -> our column; the last two are made in `_noise_study`.
NOISE_STUDY_FILE = "moe_routing_noise_experiment_results.csv"
NOISE_STUDY_COLUMNS = {
    "seed": "seed",
    "noise_std": "noise",
    "load_balancing_weight": "lb",
    "val_loss": "val/loss",
    "val_accuracy": "val/accuracy",
    "val_perplexity": "val/perplexity",
    "training_time_minutes": "training_time_minutes",
    "peak_memory_gb": "peak_memory_gb",
    "best_val_perplexity": "best_val_perplexity",
    "expert_usage_cv": "routing/load_cv/pooled",
}


class History(NamedTuple):
    """`events`: a row per run and step (columns folder, kind, step, metrics); `problems`: a line per thing not read."""

    events: pd.DataFrame
    problems: list[str]


# --- reading ---------------------------------------------------------------------------------------------------------


def find_runs(paths: Iterable[Path | str]) -> list[Path]:
    """Every run folder at or below `paths`, once each. ValueError when a path is no folder."""
    return _walk(paths)[0]


def load(paths: Iterable[Path | str]) -> pd.DataFrame:
    """One row a run at or below `paths`, and one for every cell that a sweep.json there names and that has no run.

    Beside the trainer's own statuses (finished, failed, running, interrupted) a row can be "unreadable" or "missing";
    `error` then says why, and the factors are those that the folder's name holds.
    """
    paths = list(paths)
    runs, sweeps = _walk(paths)
    rows = [read_run(folder) for folder in runs]
    found = {folder.resolve() for folder in runs}
    for sweep in sweeps:
        rows += [row for row in _cells(sweep) if Path(row["folder"]).resolve() not in found]
    if not rows:
        raise ValueError(f"no run in {', '.join(map(str, paths))}: a run folder holds a run.json")
    known = [row for row in rows if "causal" in row]  # run.json could be read, so a leaf it lacks is truly absent
    factors = dict.fromkeys(key for row in known for key in row if "/" not in key and key not in FACTS)
    rows = [{**dict.fromkeys(factors, ABSENT), **row} if "causal" in row else row for row in rows]
    table = pd.DataFrame(rows, dtype=object)
    metrics = [column for column in table if "/" in column]
    named = [column for column in table if "/" not in column and column not in FACTS]
    as_written = table[[column for column in named if table[column].isna().any()]]  # a gap must not turn 42 into 42.0
    table = table.infer_objects().assign(**as_written).astype(dict.fromkeys(metrics, float))
    return table.reindex(columns=[*FACTS, *named, *metrics]).copy()  # a block per column would be slow


def read_run(folder: Path) -> dict[str, Any]:
    """The row of one run: facts, factors and, if it finished, final metrics."""
    row = _named_row(folder, "unreadable", None)
    try:
        record = _read_object(folder / "run.json")
        factors = {key: _level(value) for key, value in (flatten(record["config"]) | record["choices"]).items()}
        parameters = record.get("parameters") or {}
        facts = {fact: record.get(fact) for fact in FACTS} | {
            "folder": str(folder),
            "experiment": record.get("experiment") or folder.parent.name,
            "run": record.get("name") or folder.name,
            "parameters.total": parameters.get("total"),
            "parameters.active": parameters.get("active"),
        }
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


def history(folders: Iterable[Path | str], *, kind: str = "eval") -> History:
    """The events of one `kind` ("eval" or "train") of many runs.

    A step written twice, after a resume, counts as written last. Runs become arrays one by one, so that a thousand
    of them fit into memory.
    """
    tables, problems = [], []
    for folder in map(Path, folders):
        events, unread = _read_events(folder)
        problems += unread
        rows = [event for (_, event_kind), event in sorted(events.items()) if event_kind == kind]
        if rows:
            tables.append(pd.DataFrame(rows).assign(folder=str(folder)))
        elif not unread:
            problems.append(f"{folder}: no {kind} event")
    return History(pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), problems)


# --- factors and conditions ------------------------------------------------------------------------------------------


def varied_factors(runs: pd.DataFrame) -> list[str]:
    """Factors with more than one level, the seed last; those that only follow another one are in `tied_factors`."""
    seed = ["seed"] if "seed" in runs and runs["seed"].nunique() > 1 else []
    return _free_and_tied(runs)[0] + seed


def tied_factors(runs: pd.DataFrame) -> dict[str, str]:
    """Varied factor -> the factor that fixes its level in all these runs: their effects cannot be told apart."""
    return _free_and_tied(runs)[1]


def levels(column: pd.Series) -> list[Any]:
    """The distinct levels of a factor, sorted: numbers, then text. The first is the reference level of contrasts."""
    return sorted(column.dropna().unique().tolist(), key=lambda level: (isinstance(level, str), level))


def conditions(runs: pd.DataFrame, factors: list[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Every combination of levels that occurs, in sorted order, with its runs; all runs when there are no factors."""
    if not factors:
        yield {}, runs
        return
    for level in levels(runs[factors[0]]):
        for rest, members in conditions(runs[runs[factors[0]] == level], factors[1:]):
            yield {factors[0]: level, **rest}, members


def by_seed(runs: pd.DataFrame, metric: str) -> pd.Series:
    """The finite values of `metric` in one condition, indexed by seed. ValueError when a seed has two runs."""
    values = runs.set_index("seed")[metric].astype(float)
    values = values[values.map(math.isfinite)].sort_index()
    if not values.index.is_unique:
        seed = values.index[values.index.duplicated()][0]
        folders = ", ".join(runs.loc[runs["seed"] == seed, "folder"])
        raise ValueError(f"seed {seed} has more than one run of the same condition, give one of them: {folders}")
    return values


def summary(runs: pd.DataFrame, factors: list[str], metrics: Iterable[str]) -> pd.DataFrame:
    """Per condition and metric: n seeds with a finite value, their mean and sample standard deviation (ddof=1)."""
    rows = []
    for condition, members in conditions(runs, factors):
        for metric in metrics:
            values = by_seed(members, metric)
            rows.append(
                condition | {"metric": metric, "n": len(values), "mean": values.mean(), STD: values.std(ddof=1)}
            )
    table = pd.DataFrame(rows, columns=[*factors, "metric", "n", "mean", STD])
    return table.astype({"n": int, "mean": float, STD: float})


def spread_table(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary with a row per condition and "mean ± std (ddof=1)" as text; a metric short of seeds names its own n."""
    factors = [column for column in summary if column not in ("metric", "n", "mean", STD)]
    rows = []
    for condition, members in conditions(summary, factors):
        n = members["n"].max()
        cells = {}
        for metric, seeds, mean, std in members[["metric", "n", "mean", STD]].itertuples(index=False):
            cells[metric] = _spread(mean, std) + (f" (n={seeds})" if seeds < n else "")
        rows.append(condition | cells | {"n seeds": n})
    return pd.DataFrame(rows)


def with_causality(runs: pd.DataFrame) -> pd.DataFrame:
    """The same runs with "(causal: yes|no)" beside every router's name; a run that broke off learns it from its kin."""
    if "router" not in runs:
        return runs
    words = runs["causal"].map({True: "yes", False: "no"})
    known = words.groupby(runs["router"]).transform("first")
    words = words.fillna(known).fillna("unknown")
    return runs.assign(router=(runs["router"] + " (causal: " + words + ")").where(runs["router"].notna()))


def unfinished(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that are not finished: run, status and the first line of the error."""
    rest = runs.loc[runs["status"] != "finished", ["experiment", "run", "status", "error"]]
    return rest.assign(error=[str(e).strip().split("\n")[0] if isinstance(e, str) else "" for e in rest["error"]])


# --- a sweep's own tables --------------------------------------------------------------------------------------------


def write_sweep_tables(sweep: Path | str) -> pd.DataFrame:
    """Write and return a sweep's results.csv (a row a run); if noise and lb vary, write the noise study's table too."""
    sweep = Path(sweep)
    runs = load([sweep])
    write_text(sweep / "results.csv", runs.to_csv(index=False))
    if {"noise", "lb"} <= set(varied_factors(runs)):
        write_text(sweep / NOISE_STUDY_FILE, _noise_study(runs).to_csv(index=False))
    return runs


def console_table(runs: pd.DataFrame) -> str:
    """Per condition mean ± std as text, then what is not finished."""
    runs = with_causality(runs)
    metrics = [metric for metric in HEADLINE if metric in runs]
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    lines = []
    if metrics:
        lines += ["per condition: mean ± sample standard deviation (ddof=1) over n seeds"]
        try:
            lines += [spread_table(summary(runs, factors, metrics)).to_string(index=False)]
        except ValueError as error:  # a sweep over threads= repeats its conditions; that must not end a training
            lines += [f"not shown: {error}"]
    rest = unfinished(runs)
    lines += [f"{len(runs) - len(rest)} of {len(runs)} runs finished"]
    lines += [f"  {row.status}: {row.run}" + (f": {row.error}" if row.error else "") for row in rest.itertuples()]
    return "\n".join(lines)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it: a reader never meets half a table."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# --- inside ----------------------------------------------------------------------------------------------------------


def _walk(paths: Iterable[Path | str]) -> tuple[list[Path], list[Path]]:
    """Run folders and sweep folders at or below `paths`; nothing inside a run folder is looked at."""
    runs: dict[Path, Path] = {}
    sweeps: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"no folder {path}{_nearest(path)}")
        for name, folders, files in os.walk(path):
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
    """A row for every cell that a sweep was asked for; `load` keeps those without a run."""
    try:
        cells = _read_object(sweep / SWEEP_FILE)["cells"]
        return [_named_row(sweep / cell, "missing", "no run in this cell of the sweep") for cell in cells]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [_named_row(sweep / SWEEP_FILE, "unreadable", f"which cells are missing is unknown: {error}")]


def _named_row(folder: Path, status: str, error: str | None) -> dict[str, Any]:
    """What the name alone says of a run: `lb=0.0,noise=0.1,seed=42` holds three factors."""
    row: dict[str, Any] = {}
    for part in folder.name.split(","):
        key, equals, text = part.partition("=")
        if equals:
            row[key] = _level(_parse(text))
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


def _level(value: Any) -> bool | int | float | str:
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


def _read_events(folder: Path) -> tuple[dict[tuple[int, str], dict[str, Any]], list[str]]:
    events: dict[tuple[int, str], dict[str, Any]] = {}
    problems = []
    path = folder / "events.jsonl"
    if not path.is_file():
        return events, [f"{folder}: no events.jsonl"]
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
                events[int(event["step"]), event["kind"]] = event
            except (ValueError, KeyError, TypeError):
                problems.append(f"{path}: line {number} skipped, torn or no event")
    return events, problems


def _free_and_tied(runs: pd.DataFrame) -> tuple[list[str], dict[str, str]]:
    """Split the varied factors; groups and root keys lead, because `router` says more than `router._target_` does."""
    factors = [column for column in runs if "/" not in column and column not in (*FACTS, "seed")]
    factors = [column for column in factors if not any(f"{column}.".startswith(f"{key}.") for key in FREE_KEYS)]
    factors.sort(key=lambda column: (column not in GROUPS, "." in column))
    free: list[str] = []
    tied: dict[str, str] = {}
    for factor in [*factors, "experiment"]:
        known = runs.dropna(subset=[factor])
        if known[factor].nunique() < 2 or ("seed" in runs and (known[factor] == known["seed"]).all()):
            continue  # data.seed=${seed} is the seed, not a factor
        leader = next((other for other in free if (runs.groupby(other, sort=False)[factor].nunique() < 2).all()), None)
        if leader is None:
            free.append(factor)
        else:
            tied[factor] = leader
    return free, tied


def _spread(mean: float, std: float) -> str:
    """Two significant digits of the spread, and the mean to the same decimal."""
    if not math.isfinite(mean):
        return "–"
    if not math.isfinite(std) or std == 0:
        return f"{mean:.5g} ± {'0' if std == 0 else '–'}"
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def _noise_study(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs under the noise study's own column names; "best" is over a run's evaluations, as there."""
    runs = runs[runs["status"] == "finished"]
    best = [
        history([folder]).events.get("val/loss", pd.Series(dtype=float)).astype(float).min()
        for folder in runs["folder"]
    ]
    with np.errstate(over="ignore"):  # a diverged run has an infinite perplexity
        perplexity = np.exp(best)
    runs = runs.assign(best_val_perplexity=perplexity, training_time_minutes=runs["train_seconds"] / 60)
    return runs.reindex(columns=list(NOISE_STUDY_COLUMNS.values())).set_axis(list(NOISE_STUDY_COLUMNS), axis=1)
