"""The runs that tell how much runs differ by chance: a pilot, finished runs of the experiment, or shipped tables."""

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.comparisons import mean_compared_with
from moe.analysis.learned import TOO_LITTLE
from moe.analysis.tuned import tuned_keys
from moe.checks import ConfigError, first_line, require
from moe.config.cell import Cell
from moe.config.claim import ClaimConfig
from moe.files import shown
from moe.planning.differences import differences
from moe.planning.seeds import NOT_TOLD, Spread, spread_of
from moe.results.conditions import conditions, varied_factors
from moe.results.learned import learned_little
from moe.results.shipped import RUNS, STUDIES, read_shipped, seeds_with
from moe.results.table import level, load_runs


class Source(NamedTuple):
    """Finished runs that tell how much runs differ by chance.

    name: in words, such as "the pilot". differs: in words what planned runs have and these lack; with any difference
    they are only a guide. evals: the evaluations of the runs; None if they are in the run folders, as those of runs
    that were trained here.
    """

    name: str
    runs: pd.DataFrame
    differs: list[str]
    evals: pd.DataFrame | None = None

    @property
    def here(self) -> bool:
        """Whether the runs are in folders here, so that they tell the speed too."""
        return self.evals is None

    @property
    def seeds(self) -> set[int]:
        return {*self.runs["seed"].astype(int)}

    def spread(self, claim: ClaimConfig) -> Spread:
        """Return the spread of a claim, whose source says whether it is only a guide; `NOT_TOLD` if it is unknown.

        Raises ConfigError if two of the runs have the same settings and seed.
        """
        try:
            spread = spread_of(claim, self.runs, self.evals)
        except ValueError as error:
            raise ConfigError(f"{self.name}: {first_line(error)}") from error
        guide = ", only a guide" if self.differs else ""
        known = not math.isnan(spread.mean)
        return spread._replace(source=f"{self.name}{guide}: {spread.source}") if known else spread

    def as_json(self) -> dict[str, Any]:
        """Return the source as plan.json has it."""
        return {"name": self.name, "runs": len(self.runs), "seeds": sorted(self.seeds), "differs": self.differs}


class Sources:
    """The runs that may tell the spreads of the claims of planned cells.

    Those of a pilot if there is one. Otherwise, in this order: the finished runs in the folder of these cells unless
    they are `passed_over`, the shipped runs of their experiment, and those of the other experiment that has the most of
    the levels that a claim compares, then the most seeds that have the metric. Without a pilot, only runs with two
    seeds of two settings at least tell a spread.
    """

    def __init__(self, cells: list[Cell], pilot: Path | None = None, studies: Path = STUDIES) -> None:
        """Raises ConfigError for a pilot that cannot be used. studies: the folder that has those of shipped tables."""
        self.cells, self.studies = cells, studies
        self.pilot = None
        if pilot is not None:
            runs = runs_of_pilot(pilot)
            little = [TOO_LITTLE] if learned_little(runs) else []
            self.pilot = Source("the pilot", runs, [*little, *differences(cells, runs)])
        self._read: dict[str, Source | None] = {}

    @property
    def own(self) -> Source | None:
        """The finished runs in the folder of the planned cells, unless they are passed over."""
        source, why_not = self._in_folder
        return None if why_not else source

    @property
    def passed_over(self) -> str:
        """Which finished runs in the folder of the planned cells tell nothing, and why; "" if there are none."""
        source, why_not = (None, "") if self.pilot else self._in_folder
        return f"{source.name}, because {why_not}" if source and why_not else ""

    @cached_property
    def _in_folder(self) -> tuple[Source | None, str]:
        """The finished runs in the folder of the planned cells, and why they are passed over, if they are.

        Of several grids, it is the one that differs least.
        """
        folder = self.cells[0].folder.parent
        try:
            runs = load_runs([folder])
        except ValueError:  # no folder, or no run there
            return None, ""
        source = self._nearest(f"the finished runs in {shown(folder)}", runs, None)
        if source is None:
            return None, ""
        of_grid = runs[runs["experiment"].isin(source.runs["experiment"])]
        if "running" in {*of_grid["status"]}:
            return source, "other runs of this sweep are still training"
        if learned_little(source.runs):
            return source, TOO_LITTLE
        found = differences(self.cells, source.runs, of_factors=False)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return source, f"{found[0]}{more}" if found else ""

    def spread(self, claim: ClaimConfig) -> tuple[Spread, Source | None]:
        """Return the spread of a claim, and the runs that tell it; `NOT_TOLD` and None if none do."""
        for source in self._in_order(claim):
            spread = source.spread(claim)
            if not math.isnan(spread.mean):
                return (spread if source.here else self._at_level_here(spread, claim)), source
        return NOT_TOLD, None

    def _in_order(self, claim: ClaimConfig) -> Iterator[Source]:
        if self.pilot is not None:
            yield self.pilot
            return
        if self.own is not None and _tells(self.own.runs):
            yield self.own
        experiment = self.cells[0].experiment
        if (same := self._shipped(experiment)) is not None:
            yield same
        compared = {str(level(each)) for each in (*claim.levels, *claim.than)}
        others: list[tuple[int, int, str]] = []
        for path in self.studies.glob("*"):
            if path.name != experiment:
                seeds, known = seeds_with(path, claim.metric, claim.factor)
                others += [(-len(compared & known), -seeds, path.name)] if seeds > 1 else []
        for *_, name in sorted(others):
            if (other := self._shipped(name)) is not None:
                yield other

    def _shipped(self, study: str) -> Source | None:
        """Return the runs of a study whose tables are shipped, if they tell a spread."""
        folder = self.studies / study
        if study in self._read or not (folder / RUNS).exists():
            return self._read.get(study)
        try:
            runs, past = read_shipped(folder)
        except ValueError as error:
            raise ConfigError(first_line(error)) from error
        source = self._nearest(f"the shipped runs of {study}", runs, past.evals)
        if source is not None and study != (experiment := self.cells[0].experiment):
            differs = [f"the experiment is {study} there, and {experiment} in the plan", *source.differs]
            source = source._replace(differs=differs)
        self._read[study] = source if source and _tells(source.runs) else None
        return self._read[study]

    def _nearest(self, name: str, runs: pd.DataFrame, evals: pd.DataFrame | None) -> Source | None:
        """Return the grid of these runs that tells most about the planned ones."""
        grids = [found for _, members in runs.groupby("experiment", sort=False) if len(found := _judging(members))]
        sources = [Source(name, grid, differences(self.cells, grid), evals) for grid in grids]
        return min(sources, key=lambda source: (not _tells(source.runs), len(source.differs)), default=None)

    def _at_level_here(self, spread: Spread, claim: ClaimConfig) -> Spread:
        """Return a spread of shipped runs with the same share of the mean, if finished runs here tell the mean.

        They must have the settings of the plan, but one seed is enough.
        """
        if self.own is None or self.own.differs or claim.metric not in self.own.runs:
            return spread
        mean = mean_compared_with(claim, self.own.runs)
        if not (0 < mean < math.inf and spread.mean > 0):
            return spread
        value, low, high = (mean / spread.mean * each for each in (spread.value, spread.low, spread.high))
        source = f"{spread.source}, at the mean of {self.own.name}"
        return spread._replace(value=value, low=low, high=high, mean=mean, source=source)


def runs_of_pilot(folder: Path) -> pd.DataFrame:
    """Return the finished runs in a folder that results did not choose; of a pilot that tuned, those that judge.

    Raises ConfigError unless there are runs of two seeds.
    """
    try:
        runs = load_runs([folder])
    except ValueError as error:
        raise ConfigError(f"--pilot {folder}: {error}") from None
    left_out = ", beside those that tune or search" if runs["search"].notna().any() else ""
    runs = _judging(runs)
    allowed = f"a folder with finished runs of two seeds at least{left_out}"
    require(len(runs) > 1 and runs["seed"].nunique() > 1, "--pilot", folder, allowed)
    return runs


def _judging(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the finished ones of these runs that results did not choose.

    Chosen values of tuned keys belong to a setting, and are no factor, so these columns are left out.
    """
    searched = runs["folder"].isin(runs.loc[runs["search"].notna(), "folder"])
    runs = runs[(runs["status"] == "finished") & ~searched].drop_duplicates("folder")
    return runs.drop(columns=tuned_keys(runs), errors="ignore")


def _tells(runs: pd.DataFrame) -> bool:
    """Return whether there are two seeds of two settings at least."""
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    return sum(members["seed"].nunique() > 1 for _, members in conditions(runs, factors)) > 1
