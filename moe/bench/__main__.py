"""Command line of the benchmarks: each subcommand answers one question and prints its tables."""

import argparse
import json
import os
import platform
from pathlib import Path

import torch
import transformers

from moe.bench import analyze, dispatch, errors, growth, jobs, layer, profile, step
from moe.training import process

QUESTIONS = {
    "layer": layer,
    "step": step,
    "profile": profile,
    "growth": growth,
    "dispatch": dispatch,
    "sweep": jobs,
    "analyze": analyze,
    "errors": errors,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moe.bench", description=__doc__)
    questions = parser.add_subparsers(dest="question", required=True)
    for name, module in QUESTIONS.items():
        question = questions.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(question)
        question.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
        question.add_argument("--json", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    process.configure(threads=arguments.threads)
    machine = {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": arguments.threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n")
    tables = []
    for table in QUESTIONS[arguments.question].answer(arguments):
        print(table.markdown(), end="\n\n", flush=True)
        tables.append(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "tables": dict(tables)}, indent=1))


if __name__ == "__main__":
    main()
