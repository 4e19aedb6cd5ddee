"""The tables of a finished study, small enough for a repository: its runs, and the losses of their evaluations.

The run folders of a study are large and stay where they were made. From these two tables its claims can be judged
again and its curves drawn again, on any machine.
"""

import gzip
import itertools
import json
import zlib
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from moe.checks import first_line
from moe.files import replacing
from moe.results.table import DIGESTS, FACTS, OF_GRID, PLUGINS, EventTables, read_event_tables, table_of
from moe.results.training_flops import SPENT

RUNS, EVALS = "runs.csv.gz", "evals.csv.gz"
STUDIES = Path(__file__).parents[2] / "docs" / "studies"  # of a checkout; an installed package has none
CURVES = ("val/loss", "val/bits_per_byte", SPENT, "time/elapsed")  # kept of each evaluation, with what claims need

PLACES = ["out", "data.cache"]  # columns with paths of the machine that trained the runs

# Columns whose empty cells are null. Elsewhere they are unknown, such as the settings of a run without a record.
KNOWN = {*FACTS, *DIGESTS} - {"causal"}
LATER = {"unigram_perplexity", "varied", "search", "tuned", "error", "claims", "data.test_sha256"}  # of older tables

# Columns with text, in which a number or a truth value is text too.
TEXTS = {"folder", "run", *OF_GRID, "status", "error", "started", "commit", "claims", *DIGESTS} - {"place"}


def ship(runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the tables of `runs`, a table of `moe.results.table.load_runs`, into a folder and return their paths.

    A run's folder is named by that of its sweep and its own, so that no path of this machine is kept. Raises ValueError
    if two runs have the same name, before anything is written.
    """
    names = {each.folder: f"{Path(each.folder).parent.name}/{each.run}" for each in runs.itertuples()}
    for name, number in Counter(names.values()).items():
        if number > 1:
            one, other = [place for place, each in names.items() if each == name][:2]
            raise ValueError(f"{one} and {other} would both be called {name}: ship one of their sweeps alone")
    folder.mkdir(parents=True, exist_ok=True)
    evals = read_event_tables(runs.loc[runs["status"] != "missing", "folder"]).evals
    claimed = _claimed_at_cost(runs)
    columns = ["folder", "step", *(name for name in evals if name in CURVES or name.startswith(claimed))]
    evals = evals.reindex(columns=columns) if len(evals) else pd.DataFrame(columns=columns)
    runs = runs.drop(columns=[place for place in PLACES if place in runs])
    factors = [column for column in runs if "/" not in column and column not in FACTS]
    runs = runs.assign(**{column: runs[column].map(partial(_write, column)) for column in factors})
    written = []
    for name, table in ((RUNS, runs), (EVALS, evals)):
        text = table.assign(folder=table["folder"].map(names)).to_csv(index=False)
        with replacing(folder / name) as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") as packed:
            packed.write(text.encode())
        written.append(folder / name)
    return written


def _claimed_at_cost(runs: pd.DataFrame) -> tuple[str, ...]:
    """Return the metrics of claims at equal cost. They are read from the evaluations, perhaps by domain of the text."""
    claims = itertools.chain.from_iterable(json.loads(text) for text in runs["claims"].dropna().unique())
    return tuple(claim["metric"] for claim in claims if claim.get("at"))


def read_shipped(folder: Path) -> tuple[pd.DataFrame, EventTables]:
    """Return the runs and the evaluations that `ship` wrote, as `load_runs` and `read_event_tables` give them.

    Without a table of evaluations there are none. Raises ValueError, naming the file, for one that is damaged.
    """
    cells = _read(folder / RUNS, KNOWN - LATER, dtype=str, keep_default_na=False)
    try:
        rows = [
            {
                column: float(text or "nan") if "/" in column else _parse(column, text)
                for column, text in row.items()
                if text or "/" in column or column in KNOWN
            }
            for row in cells.to_dict("records")
        ]
    except ValueError as error:
        raise ValueError(f"{folder / RUNS}: {first_line(error)}") from error
    if not (folder / EVALS).exists():
        return table_of(rows), EventTables(pd.DataFrame(columns=["folder", "step"]), pd.DataFrame(), [])
    evals = _read(folder / EVALS, {"folder", "step"})
    texts = [name for name in evals if name != "folder" and not pd.api.types.is_numeric_dtype(evals[name])]
    if texts and len(evals):
        raise ValueError(f"{folder / EVALS}: column {texts[0]} must hold numbers")
    return table_of(rows), EventTables(evals, pd.DataFrame(), [])


def seeds_with(folder: Path, metric: str, factor: str) -> tuple[int, set[str]]:
    """Return how many seeds have a metric in the table of runs in a folder, and the levels of a factor, as texts.

    It is 0 if there is no table that can be read, or none with the metric.
    """
    try:
        table = pd.read_csv(folder / RUNS, usecols=lambda column: column in ("seed", metric, factor))
        seeds = int(table.dropna(subset=[metric])["seed"].nunique())
    except (OSError, EOFError, ValueError, KeyError, zlib.error):  # KeyError: a table without the metric or a seed
        return 0, set()
    return seeds, {*table[factor].dropna().astype(str)} if factor in table else set()


def _read(path: Path, needed: set[str], **options: Any) -> pd.DataFrame:
    """Return a table. Raises ValueError, naming the file, if it cannot be read or lacks a column."""
    try:
        table = pd.read_csv(path, **options)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({first_line(error)})") from error
    if missing := sorted(needed - {*table}):
        raise ValueError(f"{path}: lacks the column {missing[0]}")
    return table


@cache  # a table has the same few texts in thousands of cells
def _parse(column: str, text: str) -> Any:
    """Return the value that a cell of a fact or a factor holds as text."""
    if column in TEXTS or column.startswith(f"{PLUGINS}.") or not text:
        return text or None
    if text in ("True", "False"):
        return text == "True"
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | str) else text  # a list is a level as text


def _write(column: str, value: Any) -> Any:
    """Return a cell that `_parse` reads as `value`: a text that looks like a number gets quotes."""
    return json.dumps(value) if isinstance(value, str) and _parse(column, value) != value else value
