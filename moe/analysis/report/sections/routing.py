"""Figures of routing: by layer, by position in the sequence, and of single experts."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from moe.analysis.figures import layers
from moe.analysis.figures.drawing import Drawing, drawing
from moe.analysis.figures.specialization import measured_runs, specialization_drawings
from moe.analysis.report.blocks import (
    Details,
    Facts,
    Heading,
    Paragraph,
    ReportBlock,
    TableBlock,
    csv_file,
    figure_section,
    long_list,
)
from moe.analysis.report.inputs import NOT_TRAINED, ReportInputs
from moe.analysis.report.sections.experts import experts_by_layer, pairs_of_experts
from moe.results.conditions import BY_LAYER
from moe.results.table import ABSENT
from moe.runs.record import SpecializationRecord

TOKENS_EXPLAINED = """\
These pages show validation text in which each token has the color of its expert. They are in the run folders, not in
this file:"""

EXPERTS_BY_LAYER = [
    ("domain", "what the domain of a token tells about its experts beyond chance, as a share of what it could tell"),
    ("p domain", "of that, if domains are shuffled over documents; after Holm's correction for the layers of a run"),
    ("token", "the same share for the token itself, where the tokens are shuffled"),
    ("missed most", "the expert whose removal changes the loss most, compared with as many random choices"),
    ("rise", "how much the loss rises without it, in nats per token; its tokens go to their next-best experts"),
    (
        "rise beyond random",
        "the same minus the rise when as many random choices are changed; `low` and `high` are its "
        "95 % interval over documents, which is not corrected for the choice of the largest",
    ),
    (
        "other routes",
        "mean loss of a token with other experts minus that with the chosen ones, in nats; `low` and "
        "`high` are its 95 % interval over documents",
    ),
    (
        "saliency",
        "Spearman's correlation, over the experts of the layer, of their saliency (mean of gate x norm of the output, "
        "REAP) and the rise of the loss without them; `low` and `high` are its 95 % interval over experts",
    ),
    (
        "next by experts",
        "how well a token's experts here predict its experts in the next layer, beyond chance: κ is 1 if always right, "
        "and 0 for shuffled tokens",
    ),
    (
        "next by state",
        "the same where the next router chooses one layer too early, for the hidden state that the router here gets",
    ),
]
LAYERS_DIFFER = """\
Some runs have layers with another router or another number of experts than the others. A layer whose router has no such
value has no line. What depends on the number of experts, such as an entropy, has another range in such a layer."""
PAIRS = "the similarity of each two experts of a layer"
EVERYTHING_MEASURED = "this table. Everything that was measured is in specialization.json in the folder of a run."


def routing_by_layer(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield routing by layer, over training and at its end, and dropped assignments by position."""
    yield from figure_section("Routing by layer and position", _routing_drawings(inputs))


def expert_specialization(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield figures of the experts from the files that `python -m moe.specialization` wrote into the run folders."""
    yield from figure_section("What the experts prefer", specialization_drawings(inputs.runs))
    measured = measured_runs(inputs.runs)[0]
    table = experts_by_layer(measured)
    if len(table):
        yield Heading("Experts by layer", level=3)
        yield Details("What the columns mean", [Facts([each for each in EXPERTS_BY_LAYER if each[0] in table])])
        yield TableBlock(table)
        yield csv_file("experts_by_layer", table, EVERYTHING_MEASURED)
        yield csv_file("pairs_of_experts", pairs_of_experts(measured), PAIRS)
    folders = inputs.runs.loc[inputs.runs["status"] == "finished", "folder"].drop_duplicates()
    pages = [f"`{page}`" for folder in folders if (page := SpecializationRecord.page(Path(folder))) is not None]
    if pages:
        yield Paragraph(TOKENS_EXPLAINED)
        yield from long_list(pages)


def _routing_drawings(inputs: ReportInputs) -> Iterator[Drawing]:
    yield from _layer_trends(inputs)
    yield _layer_profile(inputs)
    yield _drop_by_position(inputs)


def _layer_trends(inputs: ReportInputs) -> Iterator[Drawing]:
    panels = inputs.condition.nunique()
    for metric, label in layers.METRICS.items():
        rows = inputs.with_condition(layers.with_layer_values(inputs.past.evals, metric))
        if rows.empty:
            result: Figure | str = f"no evaluation has {metric} by layer"
        elif not inputs.trained:
            result = NOT_TRAINED
        elif panels > layers.MAX_PANELS:
            result = f"{panels} conditions are too many"
        else:
            result = layers.layer_trends(rows, metric)
        caption = f"{label} of every layer over training. Each line is the mean over the seeds of a condition."
        yield drawing("layers_" + metric.replace("/", "_"), caption + _layers_differ(inputs), result)


def _layer_profile(inputs: ReportInputs) -> Drawing:
    runs = inputs.runs.assign(condition=inputs.condition)
    if all(layers.with_layer_values(runs, metric).empty for metric in layers.METRICS):
        result: Figure | str = "no finished run has a routing metric by layer"
    else:
        result = inputs.too_many_lines() or layers.layer_profile(runs)
    caption = "Routing of every layer"
    if not inputs.observed:
        caption += " at the last evaluation. Each line joins the means over the seeds of a condition"
    return drawing("layer_profile", f"{caption}.{_layers_differ(inputs)}", result)


def _layers_differ(inputs: ReportInputs) -> str:
    """Return what a reader has to know of runs whose layers differ; an empty text if there are none."""
    unlike = (inputs.loaded[column].dropna().isin(["none", ABSENT]) for column in BY_LAYER if column in inputs.loaded)
    return "" if all(alike.all() for alike in unlike) else f" {LAYERS_DIFFER}"


def _drop_by_position(inputs: ReportInputs) -> Drawing:
    runs = inputs.runs.assign(condition=inputs.condition)
    if runs.reindex(columns=layers.DROP_RATES).isna().all(axis=None):
        result: Figure | str = "no finished run has a capacity limit"
    else:
        result = inputs.too_many_lines() or layers.drop_by_position(runs)
    caption = "Share of assignments that were dropped because an expert was full, by position in the sequence."
    return drawing("drop_by_position", caption, result)
