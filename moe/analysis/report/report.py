"""Write the report: report.md and report.html, with figures and tables as files beside them.

A section is a function that takes `ReportInputs` and yields blocks. To add one, append it to one of the tuples below.
To add figures or sections for one source study alone, see `moe.analysis.studies.registered`.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from moe.analysis.figures.drawing import Drawing
from moe.analysis.report.blocks import Attachment, Details, Heading, ReportBlock, TableBlock, csv_file
from moe.analysis.report.html import block_as_html, render_page
from moe.analysis.report.inputs import ReportInputs, ReportOptions, collect_inputs
from moe.analysis.report.markdown import block_as_markdown
from moe.analysis.report.sections.comparisons import (
    analysis_of_variance,
    condition_table,
    contrast_table,
    noise_floor_table,
)
from moe.analysis.report.sections.factor_effects import factor_effects
from moe.analysis.report.sections.other_text import other_seeds_and_other_text
from moe.analysis.report.sections.over_training import contrasts_over_training, gradient_norms, learning_curves
from moe.analysis.report.sections.overview import what_was_run
from moe.analysis.report.sections.provenance import causality, configuration, data, software
from moe.analysis.report.sections.routing import expert_specialization, routing_by_layer
from moe.analysis.report.sections.search import levels_from_a_search, search_result
from moe.analysis.report.sections.verdicts import claim_verdicts, contrast_verdicts, how_it_decides
from moe.analysis.report.study import Section
from moe.analysis.studies.published import replay
from moe.analysis.studies.registered import STUDIES
from moe.checks import escaped
from moe.files import LinkError, replacing, write_text
from moe.results.conditions import levels

FIRST: tuple[Section, ...] = (what_was_run, how_it_decides)
FOR_EACH_EXPERIMENT: tuple[Section, ...] = (
    levels_from_a_search,
    claim_verdicts,
    contrast_verdicts,
    other_seeds_and_other_text,
    noise_floor_table,
    factor_effects,
    condition_table,
    contrast_table,
    contrasts_over_training,
    analysis_of_variance,
    learning_curves,
    gradient_norms,
    routing_by_layer,
    *itertools.chain.from_iterable(study.experiment_sections for study in STUDIES),
    expert_specialization,
)
FOR_A_SEARCH: tuple[Section, ...] = (search_result, condition_table, learning_curves)  # nothing that tests or predicts
LAST: tuple[Section, ...] = (
    *itertools.chain.from_iterable(study.report_sections for study in STUDIES),
    causality,
    configuration,
    data,
    software,
)


def write_report(
    runs: pd.DataFrame, out: Path | str, options: ReportOptions | None = None, *, files: list[Path] | None = None
) -> Path:
    """Write the report about `runs`, a table of `moe.results.table.load_runs`, and return the path of report.md.

    If there are several experiments, each has its own part of the report and its own folder for files. The paths of
    the figures and tables that are saved beside the report are appended to `files`.
    """
    columns = itertools.chain.from_iterable(study.training_columns for study in STUDIES)
    all_runs, *experiments = collect_inputs(runs, options, training_columns=tuple(columns))
    names = levels(runs["experiment"])
    shown = [f'"{name}"' for name in names[:3]] if len(names) > 1 else names  # the name of a grid may hold a comma
    title = f"Report: {', '.join(shown)}" + (f" and {len(names) - 3} more" if names[3:] else "")
    middle: Iterable[ReportBlock] = _experiment_blocks(all_runs)
    if experiments:
        middle = itertools.chain(*map(_experiment_part, names, experiments))
    blocks = itertools.chain(_blocks(FIRST, all_runs), middle, _blocks(LAST, all_runs))
    return save_report(title, blocks, Path(out), files=files)


def write_replay(out: Path | str) -> Path:
    """Write a report about the numbers that the source studies published, judged by the same rules as new runs."""
    replayed = replay()
    blocks: list[ReportBlock] = [Heading("Sentences of the sources"), TableBlock(replayed.sentences)]
    for name, table in replayed.tables.items():
        blocks += [Heading(name), TableBlock(table), csv_file(name, table, "this table.")]
    return save_report("Replay of the published numbers", blocks, Path(out))


def save_report(title: str, blocks: Iterable[ReportBlock], out: Path, *, files: list[Path] | None = None) -> Path:
    """Write report.md and report.html into the folder `out`, with the figures and attachments; return report.md.

    Each figure is drawn, saved and freed before the next one is drawn. The paths of figures and attachments are
    appended to `files`.
    """
    out.mkdir(parents=True, exist_ok=True)
    contents, texts, elements = [], [f"# {escaped(title)}"], []
    for block in blocks:
        for inner in block.blocks if isinstance(block, Details) else [block]:
            if (path := _save_file(inner, out)) is not None and files is not None:
                files.append(path)
        if isinstance(block, Heading) and block.level == 2:
            contents.append(block.text)
        texts.append(block_as_markdown(block))
        elements.append(block_as_html(block, out))
    page = render_page("report.html.j2", title=title, contents=contents, blocks=elements)
    write_text(out / "report.html", page)
    write_text(out / "report.md", "\n\n".join(texts) + "\n")
    return out / "report.md"


def _blocks(sections: Iterable[Section], inputs: ReportInputs) -> Iterator[ReportBlock]:
    return itertools.chain.from_iterable(section(inputs) for section in sections)


def _experiment_blocks(inputs: ReportInputs) -> Iterator[ReportBlock]:
    return _blocks(FOR_A_SEARCH if inputs.search else FOR_EACH_EXPERIMENT, inputs)


def _experiment_part(name: str, inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the sections of one experiment, with headings one level lower and files in a folder of its own."""
    yield Heading(name)
    folder = folder_name(name)
    for block in _experiment_blocks(inputs):
        if isinstance(block, Heading):
            yield block._replace(level=block.level + 1)
        elif isinstance(block, Attachment) or (isinstance(block, Drawing) and block.figure):
            yield block._replace(name=f"{folder}/{block.name}")
        else:
            yield block


def folder_name(experiment: str) -> str:
    """Return the name of the folder for the files of an experiment, whose own name may be anything."""
    name = re.sub(r"[^\w-]+", "_", experiment)[:100]
    return name if name == experiment != "" else f"{name}-{hashlib.sha256(experiment.encode()).hexdigest()[:8]}"


def _save_file(block: ReportBlock, out: Path) -> Path | None:
    """Write the file of a figure or an attachment and return its path; other blocks have no file."""
    path = None
    match block:
        case Attachment(name, content):
            path = _place(out, name)
            write_text(path, content)
        case Drawing(name, _, Figure() as figure):
            path = _place(out, f"{name}.png")
            _save_figure(figure, path)
    return path


def _place(out: Path, name: str) -> Path:
    """Return the path of a file in the report's folder, and create the folder of the file."""
    path = out / name
    if not path.parent.resolve().is_relative_to(out.resolve()):
        raise LinkError(f"{path.parent} is a link that leads out of {out}: delete it, or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _save_figure(figure: Figure, path: Path) -> None:
    """Save as PNG with a palette of 256 colors. The file has a third of the size, and lines look the same."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png")
    image = Image.open(pixels).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    with replacing(path) as file:
        image.save(file, format="png", optimize=True)
