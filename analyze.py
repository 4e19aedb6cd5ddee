"""Tables, statistics, figures and a report: `python analyze.py multirun/noise_lb_seed --out analysis`."""

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", default=["multirun"], help="run folders or folders above them (multirun)")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="folder for the report (analysis)")
    parser.add_argument(
        "--reference", action="append", default=[], metavar="FACTOR=LEVEL", help="compare levels with this one"
    )
    arguments = parser.parse_args()

    # Imported here, so that --help and a wrong command answer at once.
    from moe.analysis.report import write_report
    from moe.results import load
    from moe.summaries import console_table

    try:
        runs = load(arguments.folders)
        report = write_report(runs, arguments.out, references=dict(map(_reference, arguments.reference)))
    except ValueError as error:
        print(f"analyze: {error}", file=sys.stderr)
        return 2
    print(console_table(runs))
    print(f"report: {report}")
    return 0


def _reference(text: str) -> tuple[str, object]:
    factor, equals, level = text.partition("=")
    if not equals:
        raise ValueError(f"--reference {text}: write FACTOR=LEVEL, such as lb=0.01")
    try:
        return factor, json.loads(level)
    except ValueError:
        return factor, level


if __name__ == "__main__":
    sys.exit(main())
