"""Draw all figures of specialization from the files that `python -m moe.specialization` wrote into run folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pandas as pd

from moe.analysis.figures import expert_grids
from moe.analysis.figures import specialization_by_condition as by_condition
from moe.analysis.figures.drawing import Drawing, drawing
from moe.analysis.figures.expert_grids import MeasuredRun
from moe.analysis.figures.style import MOST_LINES
from moe.analysis.statistics import name_cell
from moe.results.conditions import conditions, varied_factors
from moe.runs.record import RecordError, SpecializationRecord

UNTRIED = "no other experts were tried (--samples 0)"


def specialization_drawings(runs: pd.DataFrame) -> Iterator[Drawing]:
    """Yield every figure, or a single reason why there is none.

    `runs` is a table of `moe.results.table.load_runs`. Figures of single experts show the first seed of each condition.
    """
    measured, reasons = measured_runs(runs)
    names = dict.fromkeys(run.condition for run in measured)
    first = [next(run for run in measured if run.condition == name) for name in names]
    first = [run for run in first if _shape(run) == _shape(first[0])]
    if not measured:
        advice = "run python -m moe.specialization FOLDER"
        finished = runs.loc[runs["status"] == "finished", "folder"]
        if len(finished) and not any(Path(folder, "model").is_dir() for folder in finished):
            advice = "it comes from saved models, and no run has one (save_model=none)"
        reasons = reasons or f"no run has a {SpecializationRecord.FILE}: {advice}"
    else:
        reasons = f"{len(first)} conditions are too many" if len(first) > MOST_LINES else ""
    if reasons:
        yield drawing("specialization", "How the experts differ.", reasons)
    else:
        yield from _drawings(measured, first)


def _drawings(measured: list[MeasuredRun], first: list[MeasuredRun]) -> Iterator[Drawing]:
    """Yield every figure; `first` is a run of each condition."""
    caption = "Share of a domain's assignments that an expert gets, relative to an even share."
    yield drawing("expert_domains", caption, expert_grids.expert_domains(first))
    caption = "How much domain and token id tell about the choice of experts, compared with shuffled routing."
    yield drawing("specialization_information", caption, by_condition.specialization_information(measured))
    caption = "How early the choices become stable, how many change during training, and whether seeds agree."
    stable = any(run.found["churn"] or run.found["seed_agreement"] for run in measured)
    result = by_condition.specialization_stability(measured) if stable else "no run has two traces or another seed"
    yield drawing("specialization_stability", caption, result)
    without = [run for run in first if run.found["knockout"]]
    caption = "Rise of the loss without an expert, and the rise when equally many random assignments are removed."
    yield drawing("expert_knockouts", caption, expert_grids.expert_knockouts(without) if without else UNTRIED)
    tried = [run for run in measured if run.found["knockout"]]
    caption = "Rise of the loss without an expert against the expert's load."
    yield drawing("expert_importance", caption, by_condition.expert_importance(tried) if tried else UNTRIED)
    caption = "Rise of the loss without an expert against its saliency, the mean of gate x norm of its output (REAP)."
    yield drawing("expert_saliency", caption, by_condition.expert_saliency(tried) if tried else UNTRIED)
    caption = "How much lower the loss of a token would have been on the best of some sampled routes."
    yield drawing("route_regret", caption, by_condition.regret_by_route(tried) if tried else UNTRIED)
    several = [run for run in measured if len(run.found["loss_by_k"]) > 1]
    caption = "Loss when tokens get fewer or more experts than in training."
    result = by_condition.loss_by_k(several) if several else why_one_number(first[0].found["loss_by_k"])
    yield drawing("loss_by_k", caption, result)
    moving = [run for run in measured if run.found["landscape"]]
    caption = "Loss and share of changed choices when the routers' weights move along some directions."
    result = by_condition.router_landscape(moving) if moving else "no router has weights to train"
    yield drawing("router_landscape", caption, result)
    caption = "Tokens that are typical of an expert, by TF-IDF."
    yield drawing("expert_keywords", caption, expert_grids.expert_keywords(first[0]))
    caption = "Experts by their outputs on the same tokens, in two dimensions."
    yield drawing("expert_embeddings", caption, expert_grids.expert_embeddings(first[0]))
    caption = "Share of each part of the sequence that an expert gets, relative to an even share."
    yield drawing("expert_positions", caption, expert_grids.expert_positions(first))
    several = [run for run in first if any((chance or 0) > 0 for chance in run.found["coactivation_chance"])]
    caption = "How often two experts get the same token, relative to chance."
    result = expert_grids.expert_coactivation(several) if several else "no token has more than one expert"
    yield drawing("expert_coactivation", caption, result)
    following = first[0].found["next_layer"]
    caption = "How often tokens of an expert take each expert of the next layer, relative to chance."
    result = expert_grids.expert_transitions(first) if following else "there is no next layer with experts"
    yield drawing("expert_transitions", caption, result)
    caption = "How well the experts of the next layer are predicted, from the experts here and from the hidden state."
    result = by_condition.next_layer(measured) if following else "there is no next layer with experts"
    yield drawing("next_layer", caption, result)
    caption = "Cosine of the outputs of each two experts on the same tokens."
    yield drawing("expert_similarity", caption, expert_grids.expert_similarity(first, "outputs"))
    caption = "Cosine of the first matrices of each two experts. It misses experts that differ in the order of units."
    known = [run for run in first if run.found["similarity"]["weights"]]
    result = expert_grids.expert_similarity(known, "weights") if known else "the layout of the weights is not known"
    yield drawing("expert_weights", caption, result)


def measured_runs(runs: pd.DataFrame) -> tuple[list[MeasuredRun], str]:
    """Return the measured runs in order of condition and seed, and why the others could not be measured."""
    name = "all runs" if len(runs) > 1 else "this run"  # if no factor varies
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    runs = runs[runs["status"] == "finished"]
    measured, reasons = [], []
    for cell, members in conditions(runs, factors) if len(runs) else ():
        for folder, seed in sorted(zip(members["folder"], members["seed"], strict=True), key=lambda pair: pair[1]):
            path = Path(folder) / SpecializationRecord.FILE
            if not path.exists():
                continue
            try:
                record = SpecializationRecord.read(path)
            except RecordError as error:
                reasons.append(str(error))
                continue
            if record.measured is None:
                reasons.append(str(record.reason))
            else:
                found = cast(dict[str, Any], record.measured)
                measured.append(MeasuredRun(name_cell(cell) or name, int(seed), found))
    return measured, "; ".join(sorted(set(reasons)))


def _shape(run: MeasuredRun) -> tuple[Any, ...]:
    """Return the numbers of layers and experts, and the domains. All panels of a figure must have the same."""
    return [len(load) for load in run.found["load"]], tuple(run.found["domains"])


def why_one_number(losses: list[dict[str, Any]]) -> str:
    """Return why a study has no loss with another number of experts per token. losses: its `loss_by_k`."""
    if losses:
        return "another number of experts per token needs other weights of the router, or its settings forbid it"
    reasons = "the router has no setting k, or evaluation does not use it, or layers have different routers"
    return f"no other number of experts per token can be tried: {reasons}"
