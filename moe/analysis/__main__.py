"""Write tables, statistics, figures and a report: `moe analyze multirun/noise_lb_seed --out analysis`."""

import gc
import io
import json
import sys
from pathlib import Path
from typing import Any

from moe.options import OneLineParser
from moe.program import ended, program

# What the value of an option is made of, with an example.
EXAMPLES = {
    "--reference": "FACTOR=LEVEL, such as lb=0.01",
    "--margin": "METRIC=SIZE, such as val/perplexity=1%",
}


def main(command: list[str] | None = None) -> int:
    """Carry out a command, by default the one in `sys.argv`, and return the exit status."""
    parser = OneLineParser(
        prog=program("moe analyze"),
        description="Compare finished runs, judge their claims, and write report.html with its tables and figures.",
    )
    add = parser.add_argument
    add("folders", nargs="*", default=["multirun"], help="run folders or folders above them (default: multirun)")
    add("--out", type=Path, default=Path("analysis"), help="folder to write the report to (default: analysis)")
    add(
        "--reference",
        action="append",
        default=[],
        metavar="FACTOR=LEVEL",
        help="compare the other levels of the factor with this one, such as lb=0.01",
    )
    add(
        "--margin",
        action="append",
        default=[],
        metavar="METRIC=SIZE",
        help="call smaller differences a tie, such as val/perplexity=1%%",
    )
    add(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="test this metric too, such as routing/load_gini; name all in the first report",
    )
    add(
        "--seconds",
        metavar="measured|FLOPS",
        help="compare at equal training time too: as it was measured, if nothing else ran on the machine, or as "
        "computed for a machine with so many FLOPs per second, such as 5e10",
    )
    add("--replay", action="store_true", help="judge the published numbers of the source studies instead of runs")
    add("--wandb", action="store_true", help="log the tables and figures to W&B too, in the group of the runs")
    arguments = parser.parse_args(command)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not have the character ±

    # Import here, so that --help and a wrong command answer at once. What imports create is no garbage.
    repeated = "moe.analysis.report.report" in sys.modules
    gc.disable()
    from moe.analysis.report.earlier import Listing
    from moe.analysis.report.inputs import ReportOptions
    from moe.analysis.report.report import write_replay, write_report
    from moe.analysis.wandb_report import log_report
    from moe.checks import first_line, one_line
    from moe.files import shown
    from moe.results.sweep_tables import console_table
    from moe.results.table import load_runs

    if not repeated:
        gc.freeze()  # so it need not be searched for garbage again and again
    gc.enable()
    files: list[Path] = []
    said: list[str] = []
    earlier = Listing.read(arguments.out)
    try:
        if arguments.replay and arguments.wandb:
            raise ValueError("--wandb and --replay exclude each other: a replay has no runs in W&B")
        if arguments.replay:
            report = write_replay(arguments.out)
        else:
            seconds = _seconds(arguments.seconds)
            references = dict(_pair("--reference", text) for text in arguments.reference)
            margins = dict(_pair("--margin", text) for text in arguments.margin)
            options = ReportOptions(references, margins, tuple(arguments.metric), seconds)
            runs = load_runs(arguments.folders)
            if sys.stderr.isatty():  # elsewhere standard error is for errors alone
                print(
                    f"runs read: {len(runs)}; writing the report and its figures, which takes a while", file=sys.stderr
                )
            report = write_report(runs, arguments.out, options, files=files, said=said)
            print("\n".join([console_table(runs, options.metrics), *said]))
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"--out {arguments.out}: cannot be written"
        print(f"{parser.prog}: {place}: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    if earlier:
        print(f"{shown(arguments.out)}: an earlier report was replaced ({one_line(earlier.title)})")
    print(f"report: {shown(report)} and {shown(report.with_suffix('.html'))}")
    if not arguments.wandb:
        return 0
    try:
        for place in log_report(runs, options, arguments.out, files):
            print(f"W&B: {place}")
    except Exception as error:  # the errors of W&B have no other common class
        print(f"{parser.prog}: the report is complete, but W&B does not have it: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


def _seconds(text: str | None) -> float | str | None:
    from moe.analysis.equal_cost import MEASURED

    if text is None or text == MEASURED:
        return text
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"--seconds {text}: must be {MEASURED}, or FLOPs per second above 0, such as 5e10")
    return number


def _pair(option: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{option} {text}: must be {EXAMPLES[option]}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.exit(ended(main, "moe analyze"))
