"""Correct for several looks: reports about one study, written before and after seeds were added.

A test at one of several looks has a share of its level, and the shares of all looks add up to 1. So chance decides
anything at any look with at most the probability of the level, whatever the tests are and however the looks depend on
each other. The shares are the steps of a spending function of O'Brien and Fleming's type (Lan and DeMets, Biometrika
1983): an early look gets little, and nearly everything is left for the last one.
"""

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from scipy import stats

from moe.analysis.power import SIGNIFICANCE
from moe.runs.planned import Look, LooksRecord, PlannedStudy, digest_of, looks_in, plans_in
from moe.runs.record import RunRecord

FURTHER = 0.2  # of the share of the look before, for a look beyond the planned number of seeds
SMALLEST = 1e-12  # share of a look at a tiny part of the planned seeds


def spent(part: float) -> float:
    """Return the share of the level that is spent when this part of the planned seeds is there."""
    if part >= 1:
        return 1.0
    return float(2 * stats.norm.sf(stats.norm.isf(SIGNIFICANCE / 2) / part**0.5) / SIGNIFICANCE) if part > 0 else 0.0


def share_of_look(n: int, earlier: Collection[int], planned: int | None) -> float:
    """Return the share of its level that a test at n seeds has, after looks at `earlier` numbers of seeds.

    planned: the number of seeds after which the study decides; if nobody said, that of the first look. Up to there the
    shares add up to 1. Each look beyond it gets a fifth of the one before, so that all shares add up to at most 1.25. A
    report about the seeds of an earlier look is that look again.
    """
    if n < 2:
        return 1.0  # no test is possible
    earlier = sorted({each for each in earlier if 1 < each < n})
    final = planned or min([*earlier, n])
    beyond = sum(each >= final for each in earlier)
    if n > final and beyond:
        return float(FURTHER**beyond)
    return max(SMALLEST, spent(n / final) - spent(max(earlier, default=0) / final))


def share_of_next_look(n: int, earlier: Collection[int], planned: int | None) -> float:
    """Return the share that a look at more seeds will have: at the planned number, or at any number beyond it."""
    if n < 2:
        return 1.0
    looks = {each for each in earlier if 1 < each < n} | {n}
    final = planned or min(looks)
    return share_of_look(final if n < final else n + 1, looks, planned)


class Study(NamedTuple):
    """What is known about the decisions of an experiment beside its runs.

    planned: the number of seeds after which it decides, as its first run recorded it. earlier: the looks before this
    one. plans: what was planned for these runs, the last one being that of the newest command. changed: earlier plans
    with other claims for some of the same runs, with the number of these runs.
    """

    planned: int | None = None
    earlier: list[Look] = []
    plans: list[PlannedStudy] = []
    changed: list[tuple[PlannedStudy, int]] = []

    def share(self, n: int, claim: str | None = None) -> float:
        """Return the share of the level of a claim, or of a comparison that nobody planned, at n seeds."""
        return share_of_look(n, self._before(claim), self.planned)

    def next_share(self, n: int, claim: str | None = None) -> float:
        """Return the share that the same test will have in the next look, after this one at n seeds."""
        return share_of_next_look(n, self._before(claim), self.planned)

    def _before(self, claim: str | None) -> list[int]:
        return [len(look.seeds) if claim is None else look.claims.get(claim, 0) for look in self.earlier]

    def looks_before(self, n: int) -> list[Look]:
        """Return the earlier looks at fewer seeds."""
        return [look for look in self.earlier if len(look.seeds) < n]


def study_of(runs: pd.DataFrame, records: dict[str, RunRecord]) -> Study:
    """Return what the sweep folders of the runs of one experiment tell."""
    experiment = str(runs["experiment"].iloc[0])
    known = [records[folder] for folder in runs["folder"].unique() if folder in records]
    first = min(known, key=lambda record: record.started, default=None)
    looks = [look for folder in _sweeps(runs) for look in looks_in(folder).get(experiment, [])]
    plans = [plan for folder in _sweeps(runs) for plan in plans_in(folder) if plan.experiment == experiment]
    plans.sort(key=lambda plan: plan.time)
    planned = first.config.get("planned_seeds") if first else None
    return Study(
        planned=planned if type(planned) is int else None,
        earlier=sorted(looks, key=lambda look: look.time),
        plans=plans,
        changed=_changed(plans[-1], _sweeps(runs)) if plans else [],
    )


def finished_seeds(runs: pd.DataFrame) -> list[int]:
    """Return the seeds of the finished runs."""
    return sorted({int(seed) for seed in runs.loc[runs["status"] == "finished", "seed"]}) if "seed" in runs else []


def record_look(runs: pd.DataFrame, claims: pd.DataFrame) -> bool:
    """Write into the sweep folders that a report about these runs was written; return whether that was possible.

    A report in which no test is possible, because there is a single seed, is no look.
    """
    experiment, seeds = str(runs["experiment"].iloc[0]), finished_seeds(runs)
    if len(seeds) < 2:
        return True
    counts = {str(claim): int(n) for claim, n in claims[["claim", "n"]].itertuples(index=False)} if len(claims) else {}
    look = Look(datetime.now(UTC).isoformat(timespec="seconds"), seeds, counts)
    written = True
    for folder in _sweeps(runs):
        looks = looks_in(folder)
        of_experiment = looks.get(experiment, [])
        if any(each._replace(time="") == look._replace(time="") for each in of_experiment):
            continue
        try:
            LooksRecord(looks=looks | {experiment: [*of_experiment, look]}).write(folder / LooksRecord.FILE)
        except OSError:
            written = False
    return written


def _sweeps(runs: pd.DataFrame) -> list[Path]:
    """Return the folders above the runs."""
    return sorted({Path(folder).parent for folder in runs["folder"]})


def _changed(plan: PlannedStudy, sweeps: list[Path]) -> list[tuple[PlannedStudy, int]]:
    """Return earlier plans with other claims, here or in a folder beside, for runs that compute the same."""
    folders = {path.parent for sweep in sweeps for path in sweep.parent.glob("*/plans.json")} | set(sweeps)
    runs = set(plan.runs)
    found = []
    for earlier in (each for folder in sorted(folders) for each in plans_in(folder)):
        same = len(runs & set(earlier.runs))
        if same and earlier.time <= plan.time and digest_of(earlier.claims) != digest_of(plan.claims):
            found.append((earlier, same))
    return found
