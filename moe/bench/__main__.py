"""Command line of the benchmarks: each subcommand answers one question and prints its tables."""

import argparse
import json
import os
import pydoc
import sys
from pathlib import Path

from moe.bench.questions import QUESTIONS
from moe.checks import ConfigError, unknown
from moe.options import OneLineParser, new_file, whole
from moe.program import ended, program

USUAL = "python -m moe.bench"


def main() -> int:
    """Carry out the command in `sys.argv`, and return the exit status."""
    typed = program(USUAL)
    try:
        arguments = _read(typed, sys.argv[1:])
        _answer(arguments)
    except ConfigError as error:
        print(f"{typed}: {error}", file=sys.stderr)
        return 2
    return 0


def _read(typed: str, words: list[str]) -> argparse.Namespace:
    """Return the options of a command. Raises ConfigError for words and values that cannot be used."""
    parser = OneLineParser(prog=typed, description=__doc__)
    questions = parser.add_subparsers(dest="question", required=True)
    first = words[0] if words else "-h"
    of_question = {}
    for name, (module, add_options) in QUESTIONS.items():
        purpose = pydoc.synopsis(str(Path(__file__).with_name(f"{module}.py"))) or ""
        of_question[name] = question = questions.add_parser(name, help=purpose, description=purpose)
        if name == first:
            add_options(question)
        question.add_argument("--threads", type=whole, default=1, help="threads of PyTorch (1)")
        question.add_argument("--json", type=new_file, help="also write the tables to this file")
        question.set_defaults(question=name)
    if first in QUESTIONS:
        return of_question[first].read(words[1:])
    if not first.startswith("-"):
        raise unknown("question", first, QUESTIONS)
    if first not in ("-h", "--help"):
        raise ConfigError(f"{first}: name the question first: {typed} QUESTION {' '.join(words)}")
    return parser.parse_args(["-h"])  # prints the help


def _answer(arguments: argparse.Namespace) -> None:
    """Print the tables that answer a question."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise PyTorch's profiler writes lines about its stages
    import torch
    import transformers

    from moe.bench.timing import TimingTable
    from moe.launch.run import processor
    from moe.training import process

    process.configure(threads=arguments.threads)
    machine = {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": arguments.threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    tables: list[TimingTable] = []
    for table in QUESTIONS[arguments.question].answer(arguments):
        if not tables:  # not before, so that wrong settings, which the question finds, are answered in one line
            print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n")
        print(table.markdown(), end="\n\n", flush=True)
        tables.append(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "tables": dict(tables)}, indent=1))


if __name__ == "__main__":
    sys.exit(ended(main, USUAL))
