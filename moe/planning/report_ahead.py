"""The report that an experiment will get, made ahead from random results, to know which tests share the 5 %."""

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe.analysis.comparisons import compared
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import tested_metrics
from moe.config import run_routers
from moe.config.cell import Cell
from moe.config.claim import DOMAIN, ClaimConfig
from moe.launch.run import run_record
from moe.results.table import load_runs
from moe.runs.record import RunRecord, SweepRecord


class Ahead(NamedTuple):
    """What is known of a claim's test ahead.

    tests: the number by which the report divides 5 %. rivals: the number of levels with which each level that the
    claim names is compared. absent: what the runs lack for the claim.
    """

    tests: int
    rivals: int = 1
    absent: list[str] = []


def tests_ahead(cells: list[Cell]) -> list[Ahead]:
    """Return what is known of the test of each claim.

    The report is collected as every other one, from the records of these runs and from random results. So it has the
    claims, the contrasts and the terms of the analysis of variance that the real one will have. These runs have no
    training curves, so a claim at equal cost is taken for one at the end of training: it has as many tests. Where the
    cells have a single seed, with which no test is possible, there is a second one.
    """
    cells = [
        cell._replace(config=replace(cell.config, claims=[replace(claim, at=None) for claim in cell.config.claims]))
        for cell in cells
    ]
    claims = cells[0].config.claims
    cells = _of_two_seeds(cells)
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write_records(cells, folder)
        runs = load_runs([folder])
        rng = np.random.default_rng(0)
        # Each mean is clear of zero, so that a claim about a percentage of it is tested, too.
        columns = {metric: 1 + 1e-3 * rng.random(len(runs)) for metric in _metrics(claims, runs)}
        runs = runs.assign(status="finished", **columns)
        tests = collect_inputs(runs)[0].claims["tests"]
    found = [compared(claim, runs) for claim in claims]
    return [
        Ahead(max(1, int(number)), len(each.rivals), each.absent) for number, each in zip(tests, found, strict=True)
    ]


def _of_two_seeds(cells: list[Cell]) -> list[Cell]:
    if len({cell.config.seed for cell in cells}) > 1:
        return cells
    other = (cells[0].config.seed + 1) % 2**32
    again = [
        cell._replace(config=replace(cell.config, seed=other), folder=Path(f"{cell.folder} again")) for cell in cells
    ]
    return cells + again


def _metrics(claims: list[ClaimConfig], runs: pd.DataFrame) -> list[str]:
    """Return the metrics that a report tests, and those that the claims read."""
    of_claims = [
        name
        for claim in claims
        for name in (claim.metric, *(f"{claim.metric}/{domain}" for domain in claim.within.get(DOMAIN, [])))
    ]
    return list(dict.fromkeys([*tested_metrics(runs), *of_claims]))


def _write_records(cells: list[Cell], sweep: Path) -> None:
    """Write run.json of each cell, and sweep.json, as the sweep itself will."""
    cells = [cell._replace(folder=sweep / cell.folder.name) for cell in cells]
    first = run_record(cells[0], "interrupted")
    for cell in cells:
        cell.folder.mkdir()
        record = replace(
            first,
            name=cell.folder.name,
            choices=cell.choices,
            causal=run_routers.is_causal(cell.config),
            config=asdict(cell.config),
            identity=cell.identity(),
        )
        record.write(cell.folder / RunRecord.FILE)
    if grid := cells[0].grid:
        names = [cell.folder.name for cell in cells]
        known = {cell.folder.name: cell.choices | cell.identity() for cell in cells}
        SweepRecord(cells=known, grids=[grid._replace(cells=names)]).write(sweep / SweepRecord.FILE)
