"""A scaling law over size, tokens and experts, with its extrapolation and a check on runs that it has not seen."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from moe.analysis.equal_cost import ACTIVE, FLOPS, LOSS, is_scale
from moe.analysis.figures.drawing import drawing
from moe.analysis.figures.scaling import iso_flop_curves
from moe.analysis.report.blocks import BulletList, Heading, Paragraph, ReportBlock, TableBlock, csv_file, literal
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.scaling import EXPERTS, TOKENS, Estimate, Fit, Law, fit
from moe.analysis.statistics import name_cell
from moe.checks import plain
from moe.results.conditions import conditions

BUDGET = "variant"  # the arms budget_... change the number of steps
RESAMPLES = 200
FURTHER = 2.0  # how many times as large, and on how many times as many tokens, the extrapolated run is
LAW_EXPLAINED = """\
The law L = L_inf + A N^-a E^-e + B D^-b is fitted to the final validation losses by least squares (the third approach
of Hoffmann et al., 2203.15556, with the number of experts E as a factor): N active parameters, embeddings included, D
tokens of training. Without several numbers of experts, E is left out. Intervals are 95 % t intervals with the spread of
{resamples} resamples of the seeds. They hold if the form of the law is true, which the last lines check. Where the runs
do not determine the law, there is no interval."""

CAPTION = """\
Validation loss against the size of the model at equal training FLOPs, a curve for each budget: a larger model sees
fewer tokens. Where a curve is lowest, that size is the best one for the budget. Sizes and budgets beyond the runs are
dashed; there the law extrapolates, which nothing checks."""


def scaling_laws(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the law of each setting that was trained at three sizes and three numbers of tokens or more."""
    if inputs.search or LOSS not in inputs.runs:
        return
    others = [factor for factor in inputs.factors if not (is_scale(factor) or _is_budget(inputs.runs, factor))]
    runs = inputs.runs[inputs.runs["status"] == "finished"]
    titled = False
    for number, (cell, members) in enumerate(conditions(runs, others)):
        points = _points(members)
        law = Law(((ACTIVE, EXPERTS) if points[EXPERTS].nunique() > 1 else (ACTIVE,), (TOKENS,)))
        try:
            found = fit(points, law, resamples=RESAMPLES)
        except ValueError:
            continue  # no grid over sizes and tokens
        if not titled:
            yield Heading("Scaling law")
            yield Paragraph(LAW_EXPLAINED.format(resamples=RESAMPLES))
            titled = True
        if cell:
            yield Paragraph(f"**{literal(name_cell(cell))}**")
        yield drawing(f"scaling_{number}", CAPTION, iso_flop_curves(points, found, FURTHER**2))
        yield TableBlock(_numbers(found))
        yield BulletList([*_extrapolation(found, points), *_check(points, law), *(f"{each}." for each in found.doubts)])
        yield csv_file(f"scaling_{number}", points, "the points of this law.")


def _is_budget(runs: pd.DataFrame, factor: str) -> bool:
    return factor == BUDGET and bool(runs[factor].astype(str).str.startswith("budget_").all())


def _points(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what the law is fitted to: columns seed, active parameters, tokens, experts, FLOPs and loss."""
    keys = ["steps", "batch_size", "grad_accum", "data.seq_len"]
    columns = [*keys, "parameters.active", "model.num_experts", "flops_per_token"]
    number = runs.reindex(columns=columns).apply(pd.to_numeric, errors="coerce")
    tokens = number[keys].prod(axis=1, skipna=False)
    table = pd.DataFrame(
        {
            "seed": runs["seed"],
            ACTIVE: number["parameters.active"],
            TOKENS: tokens,
            EXPERTS: number["model.num_experts"],
            FLOPS: 3 * number["flops_per_token"] * tokens,
            "loss": runs[LOSS].astype(float),
        }
    )
    return table[(table[[ACTIVE, TOKENS]] > 0).all(axis=1)].dropna().reset_index(drop=True)


def _numbers(found: Fit) -> pd.DataFrame:
    """Return the estimates with their intervals."""
    names = {f"exponent of {name}": found.exponent(name) for _, name in found.law.exponents}
    size, tokens = found.exponent(ACTIVE), found.exponent(TOKENS)
    values = {"L_inf": found.floor} | names
    values["best size grows as FLOPs to the power of"] = tokens / (size + tokens)  # at FLOPs = 6 N D
    rows = [{"number": name, "estimate": _text(found.estimate(each))} for name, each in values.items()]
    return pd.DataFrame(rows)


def _extrapolation(found: Fit, points: pd.DataFrame) -> Iterator[str]:
    """Yield the predicted loss of a run that is larger and longer than the best one."""
    best = points.loc[points["loss"].idxmin()]
    x = {name: float(best[name]) for _, name in found.law.exponents}
    further = {name: value * (1 if name == EXPERTS else FURTHER) for name, value in x.items()}
    predicted = found.estimate(found.predict(**further))
    place = ", ".join(f"{value:.3g} {name}" for name, value in further.items())
    yield f"Extrapolation to {place}: a loss of {_text(predicted)}. {_beyond(found, further)}"


def _beyond(found: Fit, x: dict[str, float]) -> str:
    beyond = found.outside(**x)
    return f"This is {' and '.join(beyond)}." if beyond else "This is within the range of the runs."


def _check(points: pd.DataFrame, law: Law) -> Iterator[str]:
    """Yield how well the law predicts the runs of the largest budget, fitted to the others alone."""
    compute = points[ACTIVE] * points[TOKENS]
    held_out = compute > compute.max() / 1.5
    try:
        found = fit(points[~held_out], law, resamples=0)
    except ValueError:
        yield "No check: without the runs of the largest budget there are too few points for the law."
        return
    names = [name for _, name in law.exponents]
    means = points[held_out].groupby(names, as_index=False)["loss"].mean()
    errors = [float(found.predict(**row[names].to_dict())[0] - row["loss"]) for _, row in means.iterrows()]
    yield plain(
        f"Check: fitted without the {len(errors)} settings of the largest budget, the law predicts their losses with a "
        f"mean error of {np.mean(errors):+.3g} and a largest error of {max(map(abs, errors)):.3g} nats per token."
    )


def _text(estimate: Estimate) -> str:
    interval = f" [{estimate.low:.3g}, {estimate.high:.3g}]" if math.isfinite(estimate.low) else ""
    return plain(f"{estimate.value:.4g}{interval}")
