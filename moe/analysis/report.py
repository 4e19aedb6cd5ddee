"""The report: what was run, what it says and how sure one may be, as report.md and report.html with files beside them.

A section is a function from the evidence to blocks; a new one is a line in `SECTIONS`.
"""

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from moe.analysis import accounts, pictures, provenance, verdicts
from moe.analysis.document import Attachment, Block, Details, Heading, Picture, as_markdown
from moe.analysis.evidence import Evidence, gather
from moe.analysis.page import element, page
from moe.analysis.tables import harmless
from moe.record import write_text

Section = Callable[[Evidence], Iterable[Block]]
SECTIONS: tuple[Section, ...] = (
    accounts.what_was_run,
    verdicts.post_hoc,
    pictures.effects,
    verdicts.conditions,
    verdicts.contrasts,
    verdicts.variance,
    pictures.training,
    pictures.routing,
    pictures.speed,
    provenance.causality,
    provenance.configuration,
    provenance.data,
    provenance.software,
)


def write_report(runs: pd.DataFrame, out: Path | str, *, references: dict[str, Any] | None = None) -> Path:
    """Write report.md, report.html, their figures and tables into `out` and return the path of report.md.

    `runs` is what `moe.results.load` returns; `references` names the level that a factor's others are compared with.
    """
    evidence = gather(runs, references=references)
    experiments = [str(name) for name in sorted(runs["experiment"].dropna().unique())]
    title = f"Report: {', '.join(experiments[:3])}" + (f" and {len(experiments) - 3} more" if experiments[3:] else "")
    return write(title, (block for section in SECTIONS for block in section(evidence)), Path(out))


def write(title: str, blocks: Iterable[Block], out: Path) -> Path:
    """Write a document both ways, with its figures and attached files; figures are drawn, saved and freed in turn."""
    out.mkdir(parents=True, exist_ok=True)
    headings, texts, elements = [], [f"# {harmless(title)}"], []
    for block in blocks:
        for leaf in block.blocks if isinstance(block, Details) else [block]:
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
