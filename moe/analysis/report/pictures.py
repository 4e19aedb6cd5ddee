"""Sections of figures: each yields its figures by name, or a line with the reason why one cannot be drawn."""

import json
from collections.abc import Iterable, Iterator

import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.figures import effects as effect_figures
from moe.analysis.figures import layers
from moe.analysis.figures.specialization import gradients as draw_gradients
from moe.analysis.figures.specialization import specialization_figures
from moe.analysis.figures.style import axis_label
from moe.analysis.report.blocks import Attachment, Block, Bullets, Heading, Picture
from moe.analysis.report.inputs import PULLS, TESTED, ReportInputs
from moe.analysis.statistics import name_cell
from moe.analysis.studies.temperature.data import TEMPERATURE
from moe.analysis.studies.temperature.figures import temperature_figures
from moe.analysis.studies.temperature.reports import specialization_report, summary_report
from moe.results.conditions import conditions, varied_factors
from moe.results.frontier import STEMS, with_training_means
from moe.results.table import ABSENT, EventTables

Drawn = Iterator[tuple[str, Figure | str, str]]  # name, figure or reason, caption
FOREST = 40  # contrasts of one figure
TEMPERED = {
    "temperature_ablation_comprehensive": "Loss, accuracy and entropy by temperature, over training and at its end.",
    "routing_dynamics": "Entropy, confidence and balance over training, by temperature.",
    "expert_utilization": "Share of assignments of each expert, by temperature.",
    "schedule_comparison": "Schedules of the temperature beside each other.",
    "expert_utilization_analysis": "Inequality of expert load against temperature.",
    "entropy_analysis": "Router entropy over training, and how fast it changes.",
}
SPECIALIZED = {
    "expert_domains": "Share of a domain's assignments that an expert gets, relative to an even share.",
    "specialization_information": "What domain and token id say about experts, beside shuffled routing.",
    "specialization_stability": "How soon choices settle, how many change, and whether seeds agree.",
    "expert_knockouts": "Rise of the loss without an expert, beside a null matched by load.",
    "expert_importance": "Rise of the loss without an expert against its load.",
    "route_regret": "What the best of sampled routes would have saved a token.",
    "router_landscape": "Loss and changed choices along directions in the routers' weights.",
    "expert_keywords": "Tokens that mark an expert, by TF-IDF.",
    "expert_embeddings": "Experts by their outputs on shared tokens, in two dimensions.",
    "expert_positions": "Experts by position in the sequence.",
    "expert_coactivation": "Tokens that two experts share, relative to chance.",
}


def section(title: str, drawn: Iterable[tuple[str, Figure | str, str]]) -> Iterator[Block]:
    """A heading and its figures; a figure's reason not to be drawn takes its place. No figures, no heading."""
    headed = False
    for name, figure, caption in drawn:
        if not headed:
            yield Heading(title)
            headed = True
        if isinstance(figure, Figure):
            yield Picture(name, figure, caption)
        else:
            yield Bullets([f"{name}: not drawn, {figure}"])


def effects(inputs: ReportInputs) -> Iterator[Block]:
    """The tested metrics against the factors, and every contrast with its interval."""
    yield from section("Effects of the factors", [*_factors(inputs), *_forests(inputs)])


def training(inputs: ReportInputs) -> Iterator[Block]:
    """Loss over training."""
    yield from section("Learning curves", _curves(inputs))


def routing(inputs: ReportInputs) -> Iterator[Block]:
    """Routing by layer, over training and at its end, and dropped tokens by position."""
    yield from section("Routing by layer and position", [*_layers(inputs), *_at_the_end(inputs)])


def speed(inputs: ReportInputs) -> Iterator[Block]:
    """Experiments A and C: quality against speed, for those that are among the runs."""
    yield from section("Quality against speed", _frontiers(inputs))


def gradients(inputs: ReportInputs) -> Iterator[Block]:
    """How routers and experts are pulled, and how far a step moves them."""
    trains = inputs.labeled(inputs.past.trains)
    drawn = inputs.too_many() or ("" if set(PULLS) <= set(trains) else f"no run has {', '.join(PULLS)}")
    caption = "Gradient norms, and what a step changes relative to what was there, of routers and of experts."
    yield from section("Gradients", [("gradients", drawn or draw_gradients(trains), caption)])


def specialization(inputs: ReportInputs) -> Iterator[Block]:
    """What experts do, from what `python -m moe.specialization` left in the run folders."""
    drawn = specialization_figures(inputs.runs)
    yield from section("Specialization", ((name, figure, SPECIALIZED.get(name, "")) for name, figure in drawn))


def temperature(inputs: ReportInputs) -> Iterator[Block]:
    """The temperature study: its figures and reports, under its names, where routers have a temperature."""
    runs = inputs.runs
    if TEMPERATURE not in runs or (runs[TEMPERATURE].fillna(ABSENT) == ABSENT).all():
        return
    drawn = temperature_figures(runs, inputs.past.evals, inputs.past.trains)
    yield from section("Temperature", ((name, figure, TEMPERED.get(name, "")) for name, figure in drawn))
    for report in (summary_report, specialization_report):
        content = json.dumps(report(runs, inputs.past.evals), indent=1, allow_nan=False) + "\n"
        yield Attachment(
            f"{report.__name__}.json", content, "the temperature study's own summary, with n and intervals."
        )


def _factors(inputs: ReportInputs) -> Drawn:
    runs, factors = inputs.runs, inputs.factors
    metrics = list(dict.fromkeys((*TESTED, *inputs.tested)))
    if set(factors) == {"noise", "lb"} and set(TESTED) <= set(inputs.tested):
        yield (
            "noise_lb",
            effect_figures.noise_lb(runs),
            "Perplexity and load CV against router noise, by balance weight.",
        )
        metrics = metrics[len(TESTED) :]
    if not factors:
        yield "factors", "no factor varies", ""
        return
    for metric in metrics:
        name, caption = "factors_" + metric.replace("/", "_"), f"Effect of {', '.join(factors)}: {axis_label(metric)}."
        if metric not in inputs.tested:
            yield name, f"no run has {metric}", caption
        else:
            yield name, inputs.too_many() or _factor_figure(runs, factors, metric), caption


def _factor_figure(runs: pd.DataFrame, factors: list[str], metric: str) -> Figure:
    """The factor with the most levels along x, every combination of the others a color."""
    factor = max(factors, key=lambda name: runs[name].nunique())
    others = [name for name in factors if name != factor]
    hues = {index: name_cell(cell) or "all" for cell, members in conditions(runs, others) for index in members.index}
    return effect_figures.factor_plot(runs.assign(others=pd.Series(hues, dtype=object)), factor, "others", metric)


def _forests(inputs: ReportInputs) -> Drawn:
    for metric in inputs.tested if len(inputs.contrasts) else []:
        rows = inputs.contrasts[inputs.contrasts["metric"] == metric].dropna(subset=["ci_low"])
        name, caption = (
            "contrasts_" + metric.replace("/", "_"),
            f"Contrasts paired by seed, 95 % t intervals: {axis_label(metric)}.",
        )
        if rows.empty:
            yield name, "no contrast has an interval", caption
        elif len(rows) > FOREST:
            yield name, f"{len(rows)} contrasts are too many", caption
        else:
            yield name, effect_figures.forest(rows, axis_label(metric)), caption


def _curves(inputs: ReportInputs) -> Drawn:
    name, caption = "learning_curves", "Validation loss against optimizer step, every run and the mean of a condition."
    events = inputs.labeled(inputs.past.evals)
    if "val/loss" not in events or not events["val/loss"].notna().any():
        yield name, "no run has an evaluation with val/loss", caption
    else:
        yield name, inputs.too_many() or effect_figures.learning_curves(events, "condition"), caption


def _layers(inputs: ReportInputs) -> Drawn:
    events, panels = inputs.labeled(inputs.past.evals), inputs.condition.nunique()
    for metric, axis in layers.METRICS.items():
        name, caption = "layers_" + metric.replace("/", "_"), f"{axis} of every layer over training."
        seen = layers.known(events, metric)
        if seen.empty:
            yield name, f"no evaluation has {metric} by layer", caption
        elif panels > layers.PANELS:
            yield name, f"{panels} conditions are too many", caption
        else:
            yield name, layers.layer_trends(seen, metric), caption


def _at_the_end(inputs: ReportInputs) -> Drawn:
    runs = inputs.runs.assign(condition=inputs.condition)
    name, caption = "layer_profile", "Routing of every layer at the last evaluation."
    if all(layers.known(runs, metric).empty for metric in layers.METRICS):
        yield name, "no finished run has a routing metric by layer", caption
    else:
        yield name, inputs.too_many() or layers.layer_profile(runs), caption
    name, caption = "drop_by_position", "Share of assignments over capacity, by position in the sequence."
    if runs.reindex(columns=layers.DECILES).isna().all(axis=None):
        yield name, "no finished run has a capacity limit", caption
    else:
        yield name, inputs.too_many() or layers.drop_by_position(runs), caption


def _frontiers(inputs: ReportInputs) -> Drawn:
    for experiment, stem in STEMS.items():
        runs = inputs.runs[inputs.runs["experiment"] == experiment]
        if len(runs):
            yield from _frontier(runs, inputs.past, stem)
            caption = "Training loss, validation loss and perplexity against step."
            yield f"{stem}_overlay", inputs.too_many() or _overlay(inputs, runs), caption


def _frontier(runs: pd.DataFrame, past: EventTables, stem: str) -> Drawn:
    """Perplexity against both measures of speed, for runs that differ in nothing but router, capacity and seed."""
    table = with_training_means(runs, past)
    others = [factor for factor in varied_factors(runs) if factor not in ("router", "capacity", "seed")]
    for name, x in ((f"{stem}_frontier", "tokens_per_s"), (f"{stem}_frontier_tflops", "tflops")):
        caption = f"Perplexity against {effect_figures.SPEED[x].split(' (')[0]}."
        if others:
            yield name, f"{', '.join(others)} varies beside router and capacity", caption
        elif "val/perplexity" not in table or table[[x, "val/perplexity"]].dropna().empty:
            yield name, f"no finished run has both {x} and val/perplexity", caption
        else:
            yield name, effect_figures.frontier(table, x), caption


def _overlay(inputs: ReportInputs, runs: pd.DataFrame) -> Figure | str:
    columns = ["train/loss", "val/loss", "val/perplexity"]
    past = [events.filter(["folder", "step", *columns]) for events in (inputs.past.trains, inputs.past.evals)]
    events = inputs.labeled(pd.concat(past))
    events = events[events["folder"].isin(runs["folder"])] if len(events) else events
    absent = [column for column in columns if column not in events]
    return f"no run has {', '.join(absent)}" if absent else effect_figures.overlay(events, "condition")
