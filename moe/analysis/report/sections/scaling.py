"""A scaling law over size, tokens and experts, with its extrapolation and a check on runs that it has not seen."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe.analysis.equal_cost import ACTIVE, FLOPS, LOSS, is_budget, is_scale
from moe.analysis.figures.drawing import drawing
from moe.analysis.figures.scaling import iso_flop_curves
from moe.analysis.report.blocks import BulletList, Heading, Paragraph, ReportBlock, TableBlock, csv_file, literal
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.scaling import EXPERTS, LEAST_BUDGETS, TOKENS, Estimate, Fit, Law, fit, iso_flop_minima, numbered
from moe.analysis.sentences import enumerated
from moe.analysis.statistics import name_cell
from moe.checks import plain
from moe.results.conditions import conditions
from moe.results.training_flops import training_flops

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

MINIMA_EXPLAINED = """\
**Best size for a budget.** Runs with the same training FLOPs and number of experts form a budget. A parabola in the log
of the size is fitted to their losses (the second approach of Hoffmann et al., 2203.15556), without the law above. Only
seeds with a finished run of every size of the budget count, and no size that would leave less than half of the seeds.
The minimum counts only if it lies between the smallest and the largest size. In brackets is the 95 % t interval over
the minima of single seeds, if all seeds have one there."""
NO_LAW = """\
No law{place}: the runs have {sizes} sizes and {tokens} numbers of tokens, in {points} combinations. A law needs at
least {least} of each, and {parameters} combinations."""
NO_MINIMUM = "none between the sizes"


class _Fitted(NamedTuple):
    """The law of one setting: its other levels, the points, the form of the law, and the fit; None without one."""

    cell: dict[str, Any]
    points: pd.DataFrame
    law: Law
    found: Fit | None


def scaling_laws(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the law of each setting that was trained at three sizes and three numbers of tokens or more.

    Of a setting with two of each, yield what a law needs.
    """
    number, of_settings = 0, [each for each in _of_settings(inputs) if each.found or _could_have_law(each)]
    if of_settings:
        yield Heading("Scaling law")
    for setting in of_settings:
        if setting.found is None:
            yield Paragraph(_no_law(setting))
    for cell, points, law, found in of_settings:
        if found is None:
            continue
        if not number:
            yield Paragraph(LAW_EXPLAINED.format(resamples=RESAMPLES))
        if cell:
            yield Paragraph(f"**{literal(name_cell(cell))}**")
        yield drawing(f"scaling_{number}", CAPTION, iso_flop_curves(points, found, FURTHER**2))
        yield TableBlock(_numbers(found))
        yield BulletList([*_extrapolation(found, points), _check(points, law), *(f"{each}." for each in found.doubts)])
        minima = iso_flop_minima(points)
        if len(minima):
            yield Paragraph(MINIMA_EXPLAINED)
            yield TableBlock(_minima_table(minima))
        yield csv_file(f"scaling_{number}", points, "the points of this law.")
        number += 1


def _could_have_law(setting: _Fitted) -> bool:
    """Return whether runs of a setting vary in size and in tokens, so that a reader may look for a law."""
    return bool((setting.points[[ACTIVE, TOKENS]].nunique() > 1).all())


def _no_law(setting: _Fitted) -> str:
    """Return what a law needs, beside what the runs of a setting have."""
    different = numbered(setting.points[[name for _, name in setting.law.exponents]])
    sizes, tokens = (different[name].nunique() for name in (ACTIVE, TOKENS))
    return NO_LAW.format(
        place=f" at {literal(name_cell(setting.cell))}" if setting.cell else "",
        sizes=sizes,
        tokens=tokens,
        points=len(different.drop_duplicates()),
        least=LEAST_BUDGETS,
        parameters=setting.law.parameters,
    )


def laws_in_words(inputs: ReportInputs) -> str:
    """Return how the loss falls, which size is best for a budget, and what the fits carry; empty without a law."""
    return " ".join(_in_words(*each[:3], each.found) for each in _of_settings(inputs) if each.found)


def _in_words(cell: dict[str, Any], points: pd.DataFrame, law: Law, found: Fit) -> str:
    sentences = [f"At {name_cell(cell)}:"] if cell else []
    minima = iso_flop_minima(points)
    inside = minima[minima["inside"]]
    if len(minima):
        sentences.append(
            f"In {len(inside)} of {len(minima)} cases, each a budget with a number of experts, a parabola through the"
            " mean losses has its minimum between the smallest and the largest size."
        )
    for row in inside.tail(1).itertuples():
        sentences.append(
            f"In the largest of these, {_flops(row.FLOPs)} with {row.experts:g} experts, it is at about"
            f" {_size(row.size, row.low, row.high)}."
        )
    if found.sure:
        exponents = enumerated(
            [f"{_text(found.estimate(found.exponent(name)))} of {name}" for _, name in law.exponents]
        )
        sentences.append(
            f"The scaling law has the exponents {exponents}, and L_inf {_text(found.estimate(found.floor))}."
        )
    else:
        doubts = "; ".join(found.doubts).removeprefix("no interval, because ")
        sentences.append(
            f"These runs do not determine a scaling law: {doubts}. So the fitted one describes them alone."
        )
    return " ".join([*sentences, _check(points, law)])


def _of_settings(inputs: ReportInputs) -> Iterator[_Fitted]:
    if inputs.search or LOSS not in inputs.runs:
        return
    others = [factor for factor in inputs.factors if not (is_scale(factor) or is_budget(inputs.runs, factor))]
    for cell, members in conditions(inputs.runs[inputs.runs["status"] == "finished"], others):
        points = _points(members)
        law = Law(((ACTIVE, EXPERTS) if points[EXPERTS].nunique() > 1 else (ACTIVE,), (TOKENS,)))
        try:
            found = fit(points, law, resamples=RESAMPLES)
        except ValueError:
            found = None  # no grid over sizes and tokens
        yield _Fitted(cell, points, law, found)


def _minima_table(minima: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "experts": f"{row.experts:g}",
            "training FLOPs": f"{row.FLOPs:.3g}",
            "sizes": f"{row.sizes}" + (f" ({more} left out)" if more else ""),
            "size of the lowest mean loss": f"{row.best:,.0f}",
            "that loss": f"{row.loss:.4g}",
            "minimum of the parabola": _size(row.size, row.low, row.high) if row.inside else NO_MINIMUM,
        }
        for row, more in zip(minima.itertuples(), minima["left out"], strict=True)
    ]
    return pd.DataFrame(rows)


def _flops(number: float) -> str:
    power = math.floor(math.log10(number))
    return f"{number / 10**power:.3g} x 10^{power} FLOPs"


def _size(size: float, low: float, high: float) -> str:
    """Return a size and its interval with three digits; the fit has no more."""
    rounded = [f"{float(f'{each:.3g}'):,.0f}" for each in (size, low, high) if math.isfinite(each)]
    interval = f" [{', '.join(rounded[1:])}]" if rounded[1:] else ""
    return f"{rounded[0]}{interval} active parameters"


def _points(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what the law is fitted to: columns seed, active parameters, tokens, experts, FLOPs and loss.

    FLOPs are the mean over the runs of one size, because they vary with the seed where the number of experts does.
    """
    keys = ["steps", "batch_size", "grad_accum", "data.seq_len"]
    columns = [*keys, "parameters.active", "model.num_experts"]
    number = runs.reindex(columns=columns).apply(pd.to_numeric, errors="coerce")
    tokens = number[keys].prod(axis=1, skipna=False)
    table = pd.DataFrame(
        {
            "seed": runs["seed"],
            ACTIVE: number["parameters.active"],
            TOKENS: tokens,
            EXPERTS: number["model.num_experts"],
            FLOPS: training_flops(runs),
            "loss": runs[LOSS].astype(float),
        }
    )
    table = table[(table[[ACTIVE, TOKENS]] > 0).all(axis=1)].dropna().reset_index(drop=True)
    return table.assign(**{FLOPS: table.groupby([ACTIVE, TOKENS, EXPERTS])[FLOPS].transform("mean")})


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
    beyond = " and ".join(found.outside(**further)) or "within the range of the runs"
    yield f"Extrapolation to {place}: a loss of {_text(predicted)}. This is {beyond}."


def _check(points: pd.DataFrame, law: Law) -> str:
    """Return how well the law predicts the runs of the largest budget, fitted to the others alone."""
    compute = points[ACTIVE] * points[TOKENS]
    held_out = compute > compute.max() / 1.5
    try:
        found = fit(points[~held_out], law, resamples=0)
    except ValueError:
        return "No check: without the runs of the largest budget there are too few points for the law."
    names = [name for _, name in law.exponents]
    means = points[held_out].groupby(names, as_index=False)["loss"].mean()
    errors = [float(found.predict(**row[names].to_dict())[0] - row["loss"]) for _, row in means.iterrows()]
    return plain(
        f"Check: fitted without the {len(errors)} settings of the largest budget, the law predicts their losses with a "
        f"mean error of {np.mean(errors):+.3g} and a largest error of {max(map(abs, errors)):.3g} nats per token."
    )


def _text(estimate: Estimate) -> str:
    interval = f" [{estimate.low:.3g}, {estimate.high:.3g}]" if math.isfinite(estimate.low) else ""
    return plain(f"{estimate.value:.4g}{interval}")
