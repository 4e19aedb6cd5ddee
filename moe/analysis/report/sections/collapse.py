"""Which runs had a layer whose routing collapsed, in words."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from moe.analysis.report.blocks import Heading, Paragraph, ReportBlock, literal, long_list
from moe.analysis.report.inputs import ReportInputs
from moe.runs.collapse import is_too_short
from moe.runs.evaluated import IN_EVALUATION, collapse_lines

MEANING = """\
“Few” depends on the number of experts per token: with 8 experts it is up to 2 for one expert per token, and up to 3 for
two. The page `docs/routing.md` of the project has the rule. A run tells it when it has held for 20 steps and the
warm-up of the learning rate is over. The last evaluation is a single look at the validation text; it tells nothing
about a run that ended before."""
NONE = """\
The last evaluation of each finished run that is long enough shows no layer in which few experts take 90 % of the
assignments, and no expert without tokens."""
SHORT = """\
{runs} too short to tell a collapse, with fewer than 20 steps or an end within the warm-up of the learning rate."""
NONE_TOLD = """\
No run told of such a layer while it trained, where it must hold for 20 steps, after the warm-up of the learning rate.
Training steps are not watched where labels or token ids choose the experts."""


def collapse(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield a sentence for each layer of each finished run whose routing collapsed, now or for a while."""
    runs = inputs.runs.assign(condition=inputs.condition).drop_duplicates("folder")
    lines, short, known, last = [], 0, 0, _last_evaluations(inputs.past.evals)
    for run in runs.to_dict("records"):
        record = inputs.records.get(str(run["folder"]))
        if record is None or record.facts is None:
            continue
        known += 1
        name = "" if len(runs) == 1 else f"{literal(str(run['condition']))}, seed {run.get('seed', 'unknown')}, "
        length = _length(record.config)
        short += is_too_short(**length)
        found = collapse_lines(last.get(str(run["folder"]), {}), record.facts.collapses, **length)
        lines += [f"{name}{sentence}" for sentence in found]
    if known:
        yield Heading("Collapse")
        if short:
            yield Paragraph(SHORT.format(runs="1 run is" if short == 1 else f"{short} runs are"))
        if lines or short < known:
            yield Paragraph(MEANING if lines else f"{NONE} {NONE_TOLD}" if inputs.trained else NONE)
        yield from long_list(lines)


def _length(config: dict[str, Any]) -> dict[str, Any]:
    """Return the number of steps of a run, and the share of them that is its warm-up."""
    return {"steps": config.get("steps", 0), "warmup": config.get("optimizer", {}).get("warmup", 0.0)}


def _last_evaluations(evals: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return what the last evaluation of each run says about collapsed layers, by folder."""
    if evals.empty:
        return {}
    last = evals.drop_duplicates("folder", keep="last").set_index("folder")
    return last[[name for name in last if name.startswith(IN_EVALUATION)]].to_dict("index")
