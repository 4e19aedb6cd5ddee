"""Ship the tables of finished studies with the docs, and write what they show into the page of each study.

    python -m moe.analysis.pages ship multirun/noise_lb_seed docs/studies/noise_lb_seed
    python -m moe.analysis.pages write docs/studies

`ship` writes the tables of runs and of evaluations into a folder. `write` puts the answer, the verdicts and the table
of conditions of each such folder NAME between the two marks in NAME.md beside it. A test compares.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from moe.analysis.figures.drawing import Drawing
from moe.analysis.report.blocks import Attachment, Details, Heading, ReportBlock
from moe.analysis.report.inputs import collect_inputs
from moe.analysis.report.markdown import block_as_markdown
from moe.analysis.report.sections.answer import answer
from moe.analysis.report.sections.comparisons import condition_table
from moe.analysis.report.sections.verdicts import claim_verdicts
from moe.files import read_text, shown, write_text
from moe.results.shipped import EVALS, read_shipped, ship
from moe.results.table import load_runs

BEGIN = "<!-- What follows is written by `python -m moe.analysis.pages write docs/studies`. -->"
END = "<!-- Here it ends. -->"


def main(command: list[str] | None = None) -> int:
    """Carry out a command, by default the one in `sys.argv`, and return the exit status."""
    parser = argparse.ArgumentParser(description="Ship the tables of studies, and write their pages.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("ship", help="write the tables of the runs in a folder")
    one.add_argument("runs", type=Path, help="the folder of the sweep")
    one.add_argument("folder", type=Path, help="the folder to write to, such as docs/studies/NAME")
    every = commands.add_parser("write", help="write what the shipped tables show into the pages")
    every.add_argument("folder", type=Path, help="the folder that holds NAME.md and NAME/ for each study")
    arguments = parser.parse_args(command)
    try:
        if arguments.command == "ship":
            written = ship(load_runs([arguments.runs]), arguments.folder)
        else:
            texts = {page: page_text(page) for page in pages(arguments.folder)}  # all, before the first is written
            for page, text in texts.items():
                write_text(page, text)
            written = list(texts)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(shown(path))
    return 0


def pages(folder: Path) -> list[Path]:
    """Return the page of every study below `folder` whose tables were shipped."""
    return [table.parent.with_suffix(".md") for table in sorted(folder.glob(f"*/{EVALS}"))]


def page_text(page: Path) -> str:
    """Return a page with what the tables of its study show between the two marks.

    Raises ValueError if it lacks the marks, or if a table is damaged.
    """
    text = read_text(page)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{shown_by(page.with_suffix(''))}\n\n{END}{after}"


def shown_by(folder: Path) -> str:
    """Return as Markdown what the tables in a folder show: the answer, the verdicts, and the means by condition."""
    runs, past = read_shipped(folder)
    _, *experiments = inputs = collect_inputs(runs, past=past)
    texts = []
    for part in experiments or inputs:
        if experiments:
            texts.append(f"## {part.runs['experiment'].iloc[0]}")
        blocks = itertools.chain(answer(part), claim_verdicts(part), condition_table(part))
        texts += [block_as_markdown(_lower(block) if experiments else block) for block in _plain(blocks)]
    return "\n\n".join(texts)


def _lower(block: ReportBlock) -> ReportBlock:
    return block._replace(level=block.level + 1) if isinstance(block, Heading) else block


def _plain(blocks: Iterator[ReportBlock]) -> Iterator[ReportBlock]:
    """Yield blocks without files, figures, and the marks of what is closed."""
    for block in blocks:
        if isinstance(block, Details):
            yield from _plain(iter(block.blocks))
        elif not isinstance(block, Attachment | Drawing):
            yield block


if __name__ == "__main__":
    sys.exit(main())
