"""Count how often a report names an effect although no factor has one."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain, islice, product, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe.analysis.power import SIGNIFICANCE
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import TESTED
from moe.analysis.sentences import SIGNIFICANT, standing
from moe.analysis.studies.published import experiment_claims
from moe.bench.analyze import made_up_record
from moe.bench.candidates import looks_table, variance_table
from moe.bench.kinds import kinds_table
from moe.bench.questions import GRIDS
from moe.bench.timing import TimingTable
from moe.bench.workers import workers
from moe.config.claim import OURS, ClaimConfig
from moe.results.table import FACTS
from moe.runs.record import RunRecord

MEAN = 100.0  # of every metric
# How runs spread, in standard deviations of a run: the seeds' common offset is 5 in all three.
SPREADS = {
    "equal": "every run has the same spread",
    "seeds respond": "each seed has a slope of its own over the levels, up to 2 on either side",
    "a run missing": "as equal, and one run is missing",
}


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    """Try all kinds of claims, other tests and rules for more seeds, then whole reports, a row in a process of its own.

    The tables of reports show the share of those that name an effect.
    """
    yield kinds_table(arguments.tests)
    yield variance_table(arguments.tests)
    yield looks_table(arguments.tests)
    cases = [list(product([experiment], arguments.seeds, SPREADS)) for experiment in arguments.experiments]
    every: list[dict[str, float]] = []
    with workers(arguments.jobs) as executor:
        shares = executor.map(error_shares, *zip(*chain(*cases), strict=True), repeat(arguments.studies))
        for of_experiment in cases:
            found = list(islice(shares, len(of_experiment)))
            rows = [
                {"seeds": seeds, "spread": spread} | share
                for (_, seeds, spread), share in zip(of_experiment, found, strict=True)
            ]
            yield TimingTable(f"{of_experiment[0][0]}, {arguments.studies} reports in each row", rows)
            every += found
    mean = {kind: float(np.mean([share[kind] for share in every])) for kind in every[0]}
    yield TimingTable("mean of all rows", [{"reports": arguments.studies * len(every)} | mean])


def error_shares(experiment: str, seeds: int, spread: str, studies: int) -> dict[str, float]:
    """Return the share of reports that name at least one effect, by kind.

    source claims, own claims: a planned claim of a source, or one of our own, is decided wrongly. contrasts, ANOVA: a
    contrast or a term of the analysis of variance is significant. anything: one of these.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        write_record(Path(folder), experiment)
        found = [_named_effects(null_runs(folder, experiment, seeds, spread, rng)) for _ in range(studies)]
    return {kind: float(np.mean([each[kind] for each in found])) for kind in found[0]}


def null_runs(folder: str, experiment: str, seeds: int, spread: str, rng: np.random.Generator) -> pd.DataFrame:
    """Return a table as of `load_runs` in which no factor has an effect. Metrics are independent of each other."""
    grid, claims = GRIDS[experiment], experiment_claims(experiment)
    shape = (*map(len, grid.values()), seeds)
    index = pd.MultiIndex.from_product([*grid.values(), range(seeds)], names=[*grid, "seed"])
    columns: dict[str, Any] = {}
    for metric in dict.fromkeys((*TESTED, *(claim.metric for claim in claims))):
        values = rng.normal(size=shape) + 5 * rng.normal(size=seeds)
        if spread == "seeds respond":
            values += rng.normal(size=seeds) * np.linspace(-2, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        columns[metric] = MEAN + values.ravel()
    if "val/loss" in columns:
        columns["val/loss"] = np.log(columns["val/perplexity"])
    facts = dict.fromkeys(FACTS) | {
        "folder": folder,
        "experiment": experiment,
        "run": "made up",
        "status": "finished",
        "causal": True,
        "claims": json.dumps([asdict(claim) for claim in claims]),
    }
    runs = pd.DataFrame(columns, index=index).reset_index().assign(**facts)
    return runs.drop(index=rng.integers(len(runs))) if spread == "a run missing" else runs


def _named_effects(runs: pd.DataFrame) -> dict[str, bool]:
    """Return by kind whether the report about these runs names an effect."""
    inputs = collect_inputs(runs)[0]
    verdicts = inputs.claims.set_index("claim")["verdict"]
    wrong = [claim for claim in experiment_claims(runs["experiment"].iloc[0]) if _is_wrong(claim, verdicts[claim.text])]
    found = {
        "source claims": any(not claim.source.startswith(OURS) for claim in wrong),
        "own claims": any(claim.source.startswith(OURS) for claim in wrong),
        "contrasts": any(standing(row) == SIGNIFICANT for _, row in inputs.contrasts.iterrows()),
        "ANOVA": bool(len(inputs.variance) and (inputs.variance["p Holm"] <= SIGNIFICANCE).any()),
    }
    return found | {"anything": any(found.values())}


def _is_wrong(claim: ClaimConfig, verdict: str) -> bool:
    """Return whether a verdict is wrong if all levels are equal."""
    if claim.kind == "equivalent":
        return verdict == "contradicted"
    return verdict == "supported" or (verdict == "contradicted" and not claim.size)  # no difference is not of that size


def write_record(folder: Path, experiment: str) -> None:
    """Write the run.json that all simulated runs share; it holds the planned claims."""
    record = made_up_record(folder, "topk", None, 0)
    claims = [asdict(claim) for claim in experiment_claims(experiment)]
    replace(record, experiment=experiment, config=record.config | {"claims": claims}).write(folder / RunRecord.FILE)
