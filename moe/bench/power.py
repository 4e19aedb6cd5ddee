"""Count how often a report supports a true claim with the number of seeds that the planner names."""

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe.analysis.estimates import claimed_range
from moe.analysis.power import Prediction, power, seeds_for
from moe.analysis.report.collect import collect_inputs
from moe.analysis.studies.published import experiment_claims
from moe.bench.errors import MEAN, null_runs, write_record
from moe.bench.questions import GRIDS
from moe.bench.timing import TimingTable
from moe.bench.workers import workers
from moe.config.claim import ClaimConfig
from moe.results.table import level


class Planned(NamedTuple):
    """A claim of an experiment, and the seeds planned for it, with their power.

    difference: the true one, in standard deviations of a run. tests: the number by which 5 % are divided.
    """

    claim: ClaimConfig
    difference: float
    tests: int
    seeds: int
    power: float


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    """Simulate each claim in a process of its own. The tables show how often the report supports it."""
    for experiment in arguments.experiments:
        cases = planned(experiment, arguments.effect)
        with workers(arguments.jobs) as executor:
            count = len(cases)
            shares = executor.map(share_supported, [experiment] * count, cases, [arguments.studies] * count)
            rows = [
                {
                    "claim": case.claim.text,
                    "seeds": case.seeds,
                    "planned power": case.power,
                    "supported": share,
                    "standard error": math.sqrt(share * (1 - share) / arguments.studies),
                }
                for case, share in zip(cases, shares, strict=True)
            ]
        yield TimingTable(f"{experiment}, {arguments.studies} reports about each claim", rows)


def planned(experiment: str, effect: float) -> list[Planned]:
    """Return the claims of an experiment with the seeds that they need; those that need more than 100 are left out."""
    with tempfile.TemporaryDirectory() as folder:
        write_record(Path(folder), experiment)
        runs = null_runs(folder, experiment, 2, "equal", np.random.default_rng(0))
        tests = collect_inputs(runs)[0].claims["tests"].tolist()
    cases = []
    for claim, number in zip(experiment_claims(experiment), tests, strict=True):
        spread = _spread(experiment, claim)
        low, high = (end.at(MEAN) for end in claimed_range(claim))
        ranged = math.isfinite(low) and math.isfinite(high)
        true = (low + high) / 2 if ranged else math.copysign(effect * spread, -1 if math.isinf(low) else 1)
        rivals = len(claim.than) or len(GRIDS[experiment][claim.factor]) - len(claim.levels)
        low, high, aim = (end / spread for end in (low, high, true))
        prediction = Prediction(low, high, aim, max(number, 1), len(claim.levels), rivals)
        if seeds := seeds_for(prediction, most=100):
            cases.append(Planned(claim, true, max(number, 1), seeds, power(prediction, seeds)))
    return cases


def share_supported(experiment: str, case: Planned, studies: int) -> float:
    """Return the share of simulated reports that support a claim, if its levels differ by the planned difference."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        write_record(Path(folder), experiment)
        found = []
        for _ in range(studies):
            runs = with_effect(null_runs(folder, experiment, case.seeds, "equal", rng), case)
            claims = collect_inputs(runs)[0].claims.set_index("claim")
            found.append(claims.loc[case.claim.text, "verdict"] == "supported")
    return float(np.mean(found))


def _spread(experiment: str, claim: ClaimConfig) -> float:
    """Return the standard deviation of a claim's paired differences, if that of a run is 1."""
    others = {factor: levels for factor, levels in GRIDS[experiment].items() if factor != claim.factor}
    averaged = math.prod(len(claim.within.get(factor, levels)) for factor, levels in others.items())
    return math.sqrt(2 / averaged) if claim.kind != "interaction" else math.sqrt(4)


def with_effect(runs: pd.DataFrame, case: Planned) -> pd.DataFrame:
    """Return the runs with the difference added at the levels that the claim names."""
    claim = case.claim
    at = runs[claim.factor].isin([level(each) for each in claim.levels])
    if claim.kind == "interaction":
        at &= runs[claim.moderator] == level(claim.within[claim.moderator][1])
    return runs.assign(**{claim.metric: runs[claim.metric] + case.difference * at})
