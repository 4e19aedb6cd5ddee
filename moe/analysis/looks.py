"""Correct for several looks: reports about one study, written before and after seeds were added.

A test at one of several looks has a share of its level, and the shares of all planned looks add up to 1. So chance
decides anything at any of them with at most the probability of the level, whatever the tests are and however the looks
depend on each other. Looks after the planned number of seeds was reached add at most a quarter. The shares are the
steps of a spending function of O'Brien and Fleming's type (Lan and DeMets, Biometrika 1983): an early look gets little,
and nearly everything is left for the last one. Each look at another set of seeds counts, also at fewer: what decides
its share is how many seeds were seen. The looks of a claim are those of its own test at the seeds that recorded it. So
what happens to other claims costs it nothing: a test that sees the same runs again gives the same answer. Results can
be seen without a report too, so a command that adds seeds when others had ended makes a look of these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from moe.analysis.claims import planned_claims
from moe.analysis.power import SIGNIFICANCE
from moe.checks import ConfigError
from moe.config.claim import ClaimConfig, amount_of
from moe.runs.planned import (
    Look,
    LooksRecord,
    PlannedStudy,
    PlansRecord,
    Seen,
    digest_of,
    digests_by_earlier_ones,
    looks_in,
    plans_in,
)
from moe.runs.record import RecordError

FURTHER = 0.2  # of the share of the look before, for a look after the planned number of seeds was reached
SMALLEST = 1e-12  # share of a look to which nothing is left


def spent(part: float) -> float:
    """Return the share of the level that is spent when this part of the planned seeds is there."""
    if part >= 1:
        return 1.0
    return float(2 * stats.norm.sf(stats.norm.isf(SIGNIFICANCE / 2) / part**0.5) / SIGNIFICANCE) if part > 0 else 0.0


def share_of_look(n: int, earlier: Sequence[int], planned: int | None) -> float:
    """Return the share of its level that a test has at a look.

    n: the number of different seeds that this look and those before it have together. earlier: the same number at each
    of the looks before, in the order of time. planned: the number of seeds after which the study decides; if nobody
    said, that of the first look. Up to there the shares add up to 1, and a look without a new seed gets nothing. Each
    look after that number was reached gets a fifth of the one before, so that all shares add up to at most 1.25.
    """
    if n < 2:
        return 1.0  # no test is possible
    final = planned or next(iter(earlier), n)
    if beyond := sum(each >= final for each in earlier):
        return float(FURTHER**beyond)
    return max(SMALLEST, spent(n / final) - spent(max(earlier, default=0) / final))


def share_of_next_look(looks: Sequence[int], planned: int | None) -> float:
    """Return the share that a look at more seeds will have: at the planned number, or at any number beyond it.

    looks: as `earlier` of `share_of_look`, with the present look.
    """
    final = planned or looks[0]
    return share_of_look(final if looks[-1] < final else looks[-1] + 1, looks, planned)


class Study(NamedTuple):
    """What is known about the decisions of an experiment beside its runs.

    planned: the number of seeds after which it decides, as its first run recorded it. seeds: those of the finished
    runs. earlier: the looks before this one, in the order of time, also those without a report. plans: what was planned
    for these runs, the last one being that of the newest command. changed: earlier plans with other claims for some of
    the same runs, with the number of these runs. unwritten: whether this look could not be written down. starts: seed
    -> when its first run started. here: whether the runs have a folder here, not only a shipped table.
    """

    planned: int | None = None
    seeds: list[int] = []
    earlier: list[Look] = []
    plans: list[PlannedStudy] = []
    changed: list[tuple[PlannedStudy, int]] = []
    unwritten: bool = False
    starts: dict[int, datetime] = {}
    here: bool = True

    @property
    def everything(self) -> Seen:
        """What the comparisons that nobody planned see: all seeds with finished runs."""
        return Seen(self.seeds, len(self.seeds))

    def late(self, margins: Mapping[str, object]) -> list[str]:
        """Return the metrics whose margin is not that of the first look, so that results may have chosen it."""
        if not self.earlier:
            return []
        first = self.earlier[0].margins
        return [name for name, size in margins.items() if name not in first or _differ(first[name], size)]

    def share(self, seen: Seen, test: str | None = None) -> float:
        """Return the share of its level that a test has in this look.

        seen: what it sees now. test: that of a claim (`name_of_test`); None is a comparison that nobody planned.
        """
        looks, place = self.looks_of(seen, test)
        return share_of_look(looks[place], looks[:place], self.planned) if seen.n > 1 else 1.0

    def next_share(self, seen: Seen, test: str | None = None) -> float:
        """Return the share that the same test will have in the next look, after this one."""
        return share_of_next_look(self.looks_of(seen, test)[0], self.planned) if seen.n > 1 else 1.0

    def looks_of(self, seen: Seen, test: str | None = None) -> tuple[list[int], int]:
        """Return how many different seeds the looks of a test had together, up to each of them, and this look's place.

        Looks at the same seeds are one look, and count at the time of the first. A test that lacks runs of some seeds
        of a look counts as many fewer there.
        """
        earlier = [
            Seen(look.seeds, len(look.seeds)) if test is None else look.claims.get(test) for look in self.earlier
        ]
        looks = dict.fromkeys((frozenset(each.seeds), each.n) for each in earlier if each and each.n > 1)
        this = frozenset(seen.seeds), seen.n
        together: frozenset[int] = frozenset()
        numbers: list[int] = []
        for seeds, n in looks | {this: None}:
            together |= seeds
            numbers.append(max([*numbers[-1:], len(together) - len(seeds) + n]))
        return numbers, list(looks).index(this) if this in looks else len(looks)


def _differ(recorded: str, margin: object) -> bool:
    """Return whether a margin is another amount than the recorded one, which may be a damaged text."""
    try:
        return amount_of(recorded) != amount_of(margin)
    except ConfigError:
        return True


def study_of(runs: pd.DataFrame) -> Study:
    """Return what the sweep folders of the runs of one experiment tell. Raises RecordError for a damaged file."""
    experiment = str(runs["experiment"].iloc[0])
    first = runs.sort_values("started").iloc[0]
    planned = pd.to_numeric(first.get("planned_seeds"), errors="coerce")
    claims = planned_claims(runs) if "claims" in runs else []
    looks = [_with_names(look, claims) for folder in _sweeps(runs) for look in looks_in(folder).get(experiment, [])]
    plans = [plan for folder in _sweeps(runs) for plan in plans_in(folder) if plan.experiment == experiment]
    plans.sort(key=lambda plan: plan.time)
    looks += _without_report(runs, plans, looks, claims)
    return Study(
        planned=int(planned) if pd.notna(planned) else None,
        seeds=finished_seeds(runs),
        earlier=sorted(looks, key=lambda look: look.time),
        plans=plans,
        changed=_changed(plans, _sweeps(runs)) if plans else [],
        starts=_starts(runs) if plans else {},
        here=any(folder.is_dir() for folder in _sweeps(runs)),
    )


def _without_report(
    runs: pd.DataFrame, plans: list[PlannedStudy], reports: list[Look], claims: list[tuple[ClaimConfig, pd.DataFrame]]
) -> list[Look]:
    """Return a look for each command that added seeds when others had results about which there was no report.

    The terminal shows results at the end of a command, and files of runs are open to all. A seed has results as soon as
    two of its runs have ended, because these can be compared. claims: each claim, and the runs that recorded it.
    """
    if not plans:
        return []
    finished = runs[(runs["status"] == "finished") & runs["seconds"].notna()].drop_duplicates("folder")
    ended = pd.to_datetime(finished["started"], utc=True, format="ISO8601")
    ended += pd.to_timedelta(finished["seconds"].astype(float), unit="s")
    known = {seed: times.nsmallest(2).iloc[1] for seed, times in ended.groupby(finished["seed"]) if len(times) > 1}
    seen, planned, found = {frozenset(look.seeds) for look in reports}, set[int](), list[Look]()
    for plan in plans:
        seeds = sorted(int(seed) for seed, time in known.items() if time <= datetime.fromisoformat(plan.time))
        added = {*plan.seeds} - planned - {*seeds}
        planned |= {*plan.seeds}
        if added and len(seeds) > 1 and frozenset(seeds) not in seen:
            seen.add(frozenset(seeds))
            own = {name_of_test(claim): [s for s in finished_seeds(members) if s in seeds] for claim, members in claims}
            found.append(Look(plan.time, seeds, {name: Seen(each, len(each)) for name, each in own.items()}))
    return found


def _starts(runs: pd.DataFrame) -> dict[int, datetime]:
    """Return when the first run of each seed started."""
    times = pd.to_datetime(runs["started"], utc=True, format="ISO8601").groupby(runs["seed"]).min().dropna()
    return {int(seed): time.to_pydatetime() for seed, time in times.items()}


def finished_seeds(runs: pd.DataFrame) -> list[int]:
    """Return the seeds of the finished runs."""
    return sorted({int(seed) for seed in runs.loc[runs["status"] == "finished", "seed"]}) if "seed" in runs else []


def name_of_test(claim: ClaimConfig) -> str:
    """Return the fingerprint of what a claim tests, which does not depend on its words."""
    return digest_of({key: value for key, value in asdict(claim).items() if key not in ("text", "source")})


def _with_names(look: Look, planned: Sequence[tuple[ClaimConfig, pd.DataFrame]]) -> Look:
    """Return a look with the name of each test. One from before tests had names has the words of the claims instead.

    Such a look does not say which seeds had recorded a claim. planned: each claim, and the runs that did.
    """
    known = {}
    for claim, members in planned:
        if seen := look.claims.get(claim.text):
            recorded = finished_seeds(members)
            known[name_of_test(claim)] = seen._replace(seeds=[seed for seed in seen.seeds if seed in recorded])
    return look._replace(claims=known | look.claims)


def record_look(runs: pd.DataFrame, claims: dict[str, Seen], margins: Mapping[str, object] | None = None) -> bool:
    """Write into the sweep folders that a report about these runs was written; return whether that was possible.

    claims: what the test of each claim saw. margins: those that the reader gave. A report in which no test is possible,
    because there is a single seed, is no look.
    """
    experiment, seeds = str(runs["experiment"].iloc[0]), finished_seeds(runs)
    if len(seeds) < 2:
        return True
    look = Look(
        datetime.now(UTC).isoformat(timespec="seconds"),
        seeds,
        claims,
        {name: str(size) for name, size in (margins or {}).items()},
    )
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
                known = {old: new for each in {*sweeps, folder} for old, new in digests_by_earlier_ones(each).items()}
                later = {known.get(run, run) for plan in present if earlier.time <= plan.time for run in plan.runs}
                found.append((earlier, len(later & {known.get(run, run) for run in earlier.runs})))
    return [(plan, same) for plan, same in found if same]


def alike(earlier: PlannedStudy, newest: PlannedStudy) -> list[dict[str, Any]]:
    """Return the earlier claims about a factor and a metric, or with the words, of one of the newest claims."""

    def keys(claim: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(claim.get("text"),), (claim.get("factor"), claim.get("metric"))}

    known = set[tuple[Any, ...]]().union(*map(keys, newest.claims))
    return [claim for claim in earlier.claims if keys(claim) & known]
