"""Which runs had a layer whose routing collapsed, in words."""

from collections.abc import Iterator

from moe.analysis.report.blocks import Heading, Paragraph, ReportBlock, literal, long_list
from moe.analysis.report.inputs import ReportInputs
from moe.runs.collapse import sentences

MEANING = "Few experts are at most half of all, and at most a quarter of the way from the fewest that the number of \
experts per token allows to those of an even load. A run tells it when it has held for 20 steps and the warm-up of the \
learning rate is over."
NONE = "In no layer of a finished run did few experts take 90 % of the assignments, and no expert was without tokens."


def collapse(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield a sentence for each layer of each finished run whose routing collapsed, now or for a while."""
    runs = inputs.runs.assign(condition=inputs.condition).drop_duplicates("folder")
    lines, known = [], 0
    for run in runs.to_dict("records"):
        record = inputs.records.get(str(run["folder"]))
        if record is None or record.facts is None:
            continue
        known += 1
        name = "" if len(runs) == 1 else f"{literal(str(run['condition']))}, seed {run.get('seed', 'unknown')}, "
        lines += [f"{name}{sentence}" for sentence in sentences(record.facts.collapses)]
    if known:
        yield Heading("Collapse")
        yield Paragraph(MEANING if lines else NONE)
        yield from long_list(lines)
