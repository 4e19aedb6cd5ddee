"""The report: what was run, what it says and how sure one may be, as report.md and report.html with files beside them.

A section is a function from the evidence to blocks; a new one is a line in one of the tuples of sections.
"""

import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from moe.analysis.report import accounts, pictures, progress, provenance, verdicts
from moe.analysis.report.blocks import Attachment, Block, Details, Heading, Picture, Table, as_markdown
from moe.analysis.report.html import element, page
from moe.analysis.report.inputs import ReportInputs, Wishes, gather
from moe.analysis.report.markdown import harmless
from moe.analysis.studies.published import replay
from moe.files import write_text
from moe.results.conditions import levels

Section = Callable[[ReportInputs], Iterable[Block]]
BEFORE: tuple[Section, ...] = (accounts.what_was_run,)
OF_EACH_EXPERIMENT: tuple[Section, ...] = (
    verdicts.planned,
    verdicts.post_hoc,
    verdicts.floor,
    pictures.effects,
    verdicts.conditions,
    verdicts.contrasts,
    progress.progress,
    verdicts.variance,
    pictures.training,
    pictures.gradients,
    pictures.routing,
    pictures.speed,
    pictures.specialization,
)
AFTER: tuple[Section, ...] = (
    pictures.temperature,
    provenance.causality,
    provenance.configuration,
    provenance.data,
    provenance.software,
)


def write_report(runs: pd.DataFrame, out: Path | str, wishes: Wishes | None = None) -> Path:
    """Write report.md, report.html, their figures and tables into `out` and return the path of report.md.

    `runs` is what `load_runs` returns. Of several experiments each has a part of the report and a folder.
    """
    whole, *parts = gather(runs, wishes)
    names = levels(runs["experiment"])
    title = f"Report: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
    blocks = [_blocks(BEFORE, whole), _blocks(OF_EACH_EXPERIMENT, whole), _blocks(AFTER, whole)]
    if parts:
        blocks[1] = itertools.chain(*map(_part, names, parts))
    return write(title, itertools.chain(*blocks), Path(out))


def write_replay(out: Path | str) -> Path:
    """The same for the sources' own numbers: what they published, recomputed and judged."""
    again = replay()
    blocks: list[Block] = [Heading("Sentences of the sources"), Table(again.sentences)]
    for name, table in again.tables.items():
        blocks += [Heading(name), Table(table), Attachment(f"{name}.csv", table.to_csv(index=False), "this table.")]
    return write("Replay of the published numbers", blocks, Path(out))


def _blocks(sections: Iterable[Section], inputs: ReportInputs) -> Iterator[Block]:
    return itertools.chain.from_iterable(section(inputs) for section in sections)


def _part(name: str, inputs: ReportInputs) -> Iterator[Block]:
    """The sections of one experiment, a level further down, their files in a folder of its own."""
    yield Heading(name)
    folder = re.sub(r"[^\w-]+", "_", name)  # whatever a record calls itself, files stay below the report
    for block in _blocks(OF_EACH_EXPERIMENT, inputs):
        if isinstance(block, Heading):
            yield block._replace(level=block.level + 1)
        elif isinstance(block, Picture | Attachment):
            yield block._replace(name=f"{folder}/{block.name}")
        else:
            yield block


def write(title: str, blocks: Iterable[Block], out: Path) -> Path:
    """Write a document both ways, with its figures and attached files; figures are drawn, saved and freed in turn."""
    out.mkdir(parents=True, exist_ok=True)
    headings, texts, elements = [], [f"# {harmless(title)}"], []
    for block in blocks:
        for leaf in block.blocks if isinstance(block, Details) else [block]:
            if isinstance(leaf, Attachment | Picture):
                (out / leaf.name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(leaf, Attachment):
                write_text(out / leaf.name, leaf.content)
            elif isinstance(leaf, Picture):
                _save(leaf.figure, out / f"{leaf.name}.png")
            elif isinstance(leaf, Heading) and leaf.level == 2:
                headings.append(leaf.text)
        texts.append(as_markdown(block))
        elements.append(element(block, out))
    write_text(out / "report.html", page(title, headings, elements))
    write_text(out / "report.md", "\n\n".join(texts) + "\n")
    return out / "report.md"


def _save(figure: Figure, path: Path) -> None:
    """As PNG with a palette: a third of the size, and lines look the same."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png")
    Image.open(pixels).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
