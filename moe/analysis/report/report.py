"""Write the report: report.md and report.html, with figures and tables as files beside them.

A section is a function that takes `ReportInputs` and yields blocks. To add one, append it to a chapter below.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from moe.analysis.figures.drawing import Drawing
from moe.analysis.recorded import Written, record_look, take_back
from moe.analysis.report.blocks import (
    Attachment,
    BulletList,
    Details,
    Folded,
    Heading,
    ReportBlock,
    TableBlock,
    csv_file,
    literal,
    not_drawn,
)
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.earlier import Listing
from moe.analysis.report.html import Page
from moe.analysis.report.inputs import ReportInputs, ReportOptions
from moe.analysis.report.markdown import block_as_markdown
from moe.analysis.report.sections.answer import answer, index_of_verdicts
from moe.analysis.report.sections.collapse import collapse
from moe.analysis.report.sections.comparisons import (
    analysis_of_variance,
    condition_table,
    contrast_table,
    noise_floor_table,
)
from moe.analysis.report.sections.cost import costs, equal_costs, speed_ups
from moe.analysis.report.sections.factor_effects import factor_effects
from moe.analysis.report.sections.league import how_much_routing_matters, league
from moe.analysis.report.sections.other_text import other_seeds_and_other_text
from moe.analysis.report.sections.over_training import contrasts_over_training, gradient_norms, learning_curves
from moe.analysis.report.sections.overview import what_was_run
from moe.analysis.report.sections.planned import decisions, look_in_words
from moe.analysis.report.sections.provenance import causality, configuration, data, software
from moe.analysis.report.sections.routing import expert_specialization, routing_by_layer
from moe.analysis.report.sections.scaling import scaling_laws
from moe.analysis.report.sections.seed_components import seed_components
from moe.analysis.report.sections.terms import terms
from moe.analysis.report.sections.tuning import tuning
from moe.analysis.report.sections.verdicts import claim_verdicts, contrast_verdicts, how_it_decides
from moe.analysis.studies.published import replay
from moe.analysis.studies.routing_bench import quality_against_speed
from moe.analysis.studies.temperature.data import TEMPERATURE_NOW
from moe.analysis.studies.temperature.figures import LOAD_BALANCE
from moe.analysis.studies.temperature.section import temperature_section
from moe.checks import escaped
from moe.files import LinkError, replacing, sha256, write_text
from moe.results.conditions import levels
from moe.results.frontier import LATE
from moe.results.table import EventTables

Section = Callable[[ReportInputs], Iterable[ReportBlock]]
# Metrics of training steps that sections about a source study read.
TRAINING_COLUMNS = (*LATE, LOAD_BALANCE, TEMPERATURE_NOW)


class Chapter(NamedTuple):
    """Sections under one title, closed on the page until the reader opens it; `summary` says what is inside."""

    title: str
    summary: str
    sections: tuple[Section, ...]


ANSWER: tuple[Section, ...] = (answer,)
OF_EACH_MODEL: tuple[Chapter, ...] = (
    Chapter("Routing", "collapse, balance and sharpness by layer", (collapse, routing_by_layer)),
    Chapter(
        "Training",
        "learning curves, gradients, differences over training",
        (learning_curves, contrasts_over_training, gradient_norms),
    ),
    Chapter("Specialization", "what single experts do", (expert_specialization,)),
)
CHAPTERS: tuple[Chapter, ...] = (
    Chapter(
        "Effects",
        "every comparison as a sentence and as a chart",
        (
            claim_verdicts,
            contrast_verdicts,
            league,
            how_much_routing_matters,
            factor_effects,
            other_seeds_and_other_text,
            noise_floor_table,
            seed_components,
            quality_against_speed,
        ),
    ),
    Chapter("Tuning", "how the values of tuned keys were chosen for each setting", (tuning,)),
    Chapter(
        "Cost",
        "what each setting costs, comparisons at equal cost, effective speed-up, scaling law",
        (costs, equal_costs, speed_ups, scaling_laws),
    ),
    Chapter(
        "Conditions and statistics",
        "means of each setting, tests, analysis of variance",
        (condition_table, contrast_table, analysis_of_variance),
    ),
    *OF_EACH_MODEL,
)
CHAPTERS_OF_ONE_MODEL: tuple[Chapter, ...] = (  # that was evaluated and not trained: nothing is compared
    Chapter("Values", "the metrics of the evaluation", (condition_table,)),
    *OF_EACH_MODEL,
)
CHAPTERS_OF_A_SEARCH: tuple[Chapter, ...] = (  # nothing that tests or predicts
    Chapter("Settings that were tried", "means and learning curves", (condition_table, learning_curves)),
)
LAST: tuple[Chapter, ...] = (
    Chapter(
        "Source studies",
        "the reports that a source study wrote",
        (temperature_section,),
    ),
    Chapter("How this report decides", "when a difference counts as more than chance", (how_it_decides,)),
    Chapter("Terms", "what the words of this page mean", (terms,)),
    Chapter(
        "Provenance",
        "runs, routers, configuration, data, code and machine",
        (what_was_run, causality, configuration, data, software),
    ),
)


def write_report(
    runs: pd.DataFrame,
    out: Path | str,
    options: ReportOptions | None = None,
    *,
    files: list[Path] | None = None,
    said: list[str] | None = None,
    past: EventTables | None = None,
) -> Path:
    """Write the report about `runs`, a table of `moe.results.table.load_runs`, and return the path of report.md.

    If there are several experiments, each has its own part of the report and its own folder for files. The paths of
    the figures and tables that are saved beside the report are appended to `files`, and a line on each look that was
    written down to `said`. past: the events of runs whose folders are elsewhere, as `moe.results.shipped.read_shipped`
    gives them; such a report is no look. Nor is one that fails before it has saved a file: its looks are taken back.
    """
    files = [] if files is None else files
    written, before = list[Written](), len(files)
    try:
        return _write_report(runs, out, options, files=files, said=said, past=past, written=written)
    except (OSError, ValueError):
        if len(files) == before:
            take_back(written)
        raise


def _write_report(
    runs: pd.DataFrame,
    out: Path | str,
    options: ReportOptions | None,
    *,
    files: list[Path],
    said: list[str] | None,
    past: EventTables | None,
    written: list[Written],
) -> Path:
    """Do what `write_report` does. written: gets the looks that were written down."""
    all_runs, *experiments = collect_inputs(runs, options, training_columns=TRAINING_COLUMNS, past=past)
    if past is None:
        experiments = [_with_look(part, written) for part in experiments]
        all_runs = all_runs if experiments else _with_look(all_runs, written)
        if said is not None:
            said += filter(None, map(look_in_words, experiments or [all_runs]))
    names = levels(runs["experiment"])
    if len(names) == 1:  # the facts below the verdicts give the settings that a grid adds to its experiment
        names = [names[0].partition(": ")[0]]
    shown = [f'"{name}"' for name in names[:3]] if len(names) > 1 else names  # the name of a grid may hold a comma
    title = f"Report: {', '.join(shown)}" + (f" and {len(names) - 3} more" if names[3:] else "")
    middle: Iterable[ReportBlock] = _experiment(all_runs)
    if experiments:
        parts = itertools.chain(*map(_experiment_part, names, experiments))
        middle = itertools.chain(index_of_verdicts(dict(zip(names, experiments, strict=True))), parts)
    blocks = itertools.chain(middle, itertools.chain(*(_chapter(each, all_runs) for each in LAST)))
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
    appended to `files`. The figures that could not be drawn are listed at the end, with the reasons. Files that an
    earlier report wrote into `out` are removed at the end, if this report has none of that name.
    """
    out.mkdir(parents=True, exist_ok=True)
    earlier, listing = Listing.read(out), Listing(title, {})
    page, texts, missing = Page(), [f"# {escaped(literal(title))}"], []
    for block in blocks:
        if isinstance(block, Drawing) and block.figure is None:
            missing.append(not_drawn(block))
            continue
        for inner in block.blocks if isinstance(block, Details) else [block]:
            if (path := _save_file(inner, out)) is None:
                continue
            listing.files[path.relative_to(out).as_posix()] = sha256(path)
            if files is not None:
                files.append(path)
        texts.append(block_as_markdown(block))
        page.add(block)
    if missing:
        for block in (Heading("Figures that were not drawn", level=3), BulletList(missing)):
            texts.append(block_as_markdown(block))
            page.add(block)
    write_text(out / "report.html", page.render(title))
    write_text(out / "report.md", "\n\n".join(texts) + "\n")
    if earlier:
        earlier.remove(out, but=listing.files)
    listing.write(out)
    return out / "report.md"


def _chapter(chapter: Chapter, inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield a chapter, with the titles of its sections one level lower; nothing if its sections yield nothing."""
    titled = False
    for block in itertools.chain.from_iterable(section(inputs) for section in chapter.sections):
        if not titled and not (isinstance(block, Drawing) and block.figure is None):
            yield Folded(chapter.title, chapter.summary)
            titled = True
        yield block._replace(level=block.level + 1) if isinstance(block, Heading) else block


def _with_look(inputs: ReportInputs, written: list[Written] | None = None) -> ReportInputs:
    """Write the look down, and return the inputs, which then say why if that was not possible."""
    if inputs.search or inputs.observed:
        return inputs
    unwritten = record_look(inputs.loaded, inputs.study, inputs.options.margins, decisions(inputs), written)
    return inputs._replace(study=replace(inputs.study, unwritten=unwritten))


def _experiment(inputs: ReportInputs) -> Iterator[ReportBlock]:
    for section in ANSWER:
        yield from section(inputs)
    chapters = CHAPTERS_OF_ONE_MODEL if inputs.observed else CHAPTERS
    for chapter in CHAPTERS_OF_A_SEARCH if inputs.search else chapters:
        yield from _chapter(chapter, inputs)


def _experiment_part(name: str, inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the chapters of one experiment, with titles one level lower and files in a folder of its own."""
    yield Heading(literal(name))
    folder = folder_name(name)
    for block in _experiment(inputs):
        if isinstance(block, Heading | Folded):
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
    """Save as PNG with a palette of 256 colors. The file has a third of the size, and lines look the same.

    The figure is drawn only once. `Figure.savefig` would draw it a first time to measure it.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    with replacing(path) as file:
        image.save(file, format="png", optimize=True)
