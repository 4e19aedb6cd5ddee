"""Collect everything that the sections of a report need. This is done once, before the first file is written."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pandas as pd

from moe.analysis.recorded import study_of
from moe.analysis.report.inputs import GRADIENT_METRICS, TESTED, ReportInputs, ReportOptions, full_names, tested_metrics
from moe.analysis.report.tested import with_comparisons, with_corrections
from moe.analysis.sentences import null_everywhere
from moe.analysis.statistics import (
    name_cell,
)
from moe.analysis.tuned import is_judged, trials_of, tuned_keys, values_of
from moe.checks import require, unknown
from moe.config.claim import amount_of
from moe.results.comparable import shown_together
from moe.results.conditions import (
    HEADLINE,
    conditions,
    levels,
    present,
    tied_factors,
    varied_factors,
    with_readable_levels,
    without_causality,
)
from moe.results.learned import learned_little
from moe.results.table import EventTables, level, read_event_tables
from moe.runs.record import RunRecord

TRAINING_METRICS = (*GRADIENT_METRICS, "train/loss")  # metrics of training steps that every report needs


def collect_inputs(
    loaded: pd.DataFrame,
    options: ReportOptions | None = None,
    *,
    training_columns: Iterable[str] = (),
    past: EventTables | None = None,
) -> list[ReportInputs]:
    """Return the inputs of all runs together, followed by those of each experiment if there are several.

    Runs are compared within an experiment, so claims, contrasts and figures concern the factors that it varies.
    `loaded` is a table of `moe.results.table.load_runs`. `training_columns` are metrics of training steps to read in
    addition to `TRAINING_METRICS`. `past` holds the events of runs whose folders are elsewhere; by default they are
    read from the folders, with the records. All tests of all experiments are corrected together. Raises ValueError for
    a reference, margin or metric that no run has, and for two runs with the same seed in one condition.
    """
    options = options or ReportOptions()
    records = {}
    if past is None:
        columns = dict.fromkeys((*TRAINING_METRICS, *training_columns))
        past = read_event_tables(loaded.loc[loaded["status"] != "missing", "folder"], training=list(columns))
        readable = loaded.loc[~loaded["status"].isin(["missing", "unreadable"]), "folder"].unique()
        records = {folder: RunRecord.read(Path(folder) / RunRecord.FILE) for folder in readable}
    searched = frozenset(loaded.loc[loaded["search"].notna(), "folder"]) if "search" in loaded else frozenset[str]()
    describe = partial(_describe, everything=loaded, past=past, records=records, options=options, searched=searched)
    everything, names = describe(loaded), levels(loaded["experiment"])
    if len(names) < 2:
        _check([everything])
        return with_corrections([with_comparisons(everything)])
    experiments = [describe(loaded[loaded["experiment"] == name]) for name in names]
    _check(experiments)
    corrected_parts = with_corrections([with_comparisons(experiment) for experiment in experiments])
    return [everything._replace(families=corrected_parts[0].families), *corrected_parts]


def _describe(
    loaded: pd.DataFrame,
    *,
    everything: pd.DataFrame,
    past: EventTables,
    records: dict[str, RunRecord],
    options: ReportOptions,
    searched: frozenset[str],
) -> ReportInputs:
    """Return the inputs of some runs of `everything`, without claims and contrasts."""
    trials, trained_at = trials_of(loaded, everything), pd.Series(dtype=object)
    if is_judged(loaded):  # chosen values belong to a setting, and are no factor
        trained_at = values_of(loaded)
        loaded = loaded.drop(columns=tuned_keys(loaded), errors="ignore")
    runs = with_readable_levels(loaded)
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    name = "all runs" if len(runs) > 1 else "this run"  # if no factor varies
    names = {index: name_cell(cell) or name for cell, members in conditions(runs, factors) for index in members.index}
    folders = runs.loc[runs["status"] != "missing", "folder"]
    return ReportInputs(
        loaded=loaded,
        runs=runs,
        factors=factors,
        tied=tied_factors(runs),
        condition=pd.Series(names, index=runs.index, dtype=object),
        metrics=present(runs, (*shown_together(runs, HEADLINE), *options.metrics)),
        tested=present(runs, (*tested_metrics(runs), *options.metrics)),
        judgments=[],
        claims=pd.DataFrame(),
        contrasts=pd.DataFrame(),
        variance=pd.DataFrame(),
        without_variance=[],
        families=[],
        searched=searched,
        past=EventTables(_events_of(past.evals, folders), _events_of(past.trains, folders), past.problems),
        records=records,
        options=options,
        learned_little=learned_little(runs),
        study=study_of(loaded),
        trials=trials,
        trained_at=trained_at,
    )


def _events_of(events: pd.DataFrame, folders: pd.Series) -> pd.DataFrame:
    return events[events["folder"].isin(folders)] if len(events) else events


def _check(experiments: list[ReportInputs]) -> None:
    """Raise ValueError for an option that names a factor, level or metric that no experiment has."""
    options = experiments[0].options
    factors = sorted({factor for inputs in experiments for factor in inputs.factors})
    for factor, wanted in options.references.items():
        if factor not in factors:
            if not factors:
                raise ValueError(f"--reference {factor}={wanted}: these runs vary no factor")
            raise unknown("factor of --reference", factor, factors)
        if not any(factor in full_names(inputs, options.references) for inputs in experiments):
            known = levels(pd.concat([inputs.runs[factor] for inputs in experiments if factor in inputs.factors]))
            words = [str(without_causality(each)) for each in known]
            raise ValueError(f"--reference {factor}={level(wanted)}: allowed are {', '.join(dict.fromkeys(words))}")
    metrics = [column for column in experiments[0].loaded if "/" in column]
    for metric in options.metrics:
        if metric not in metrics:
            raise unknown("metric of --metric", metric, metrics)
        if not any(metric in inputs.tested for inputs in experiments):
            raise ValueError(f"--metric {metric}: {null_everywhere(metric)}")
    tested = dict.fromkeys((*TESTED, *options.metrics, *(name for inputs in experiments for name in inputs.tested)))
    for metric, margin in options.margins.items():
        if metric not in tested:
            raise ValueError(f"--margin {metric}={margin}: tested metrics are {', '.join(tested)}")
        key, allowed = f"--margin {metric}", "positive, in units of the metric or a text such as 1%"
        require(amount_of(margin, key=key).at(1.0) > 0, key, margin, allowed)
