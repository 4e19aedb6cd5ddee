"""Measure the routing of a Mixture of Experts of the transformers library: `moe observe MODEL --out DIR`.

MODEL is a folder or a name on the hub. The model is evaluated as it is, like a run of ours with `steps=0`: every
routing metric by layer, then how its experts differ (`moe specialize`), then the report (`moe analyze`). Other words
are overrides as `moe train` takes them, such as `data=text` or `data.seq_len=512`. With `--other`, it also compares
the choices of two checkpoints of one model, such as before and after fine-tuning.
"""

import argparse
import math
import multiprocessing
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of the hub and of transformers

import pandas as pd

from moe.config.words import quoted, with_words
from moe.metrics.agreement import overlap
from moe.options import OneLineParser
from moe.program import ended, program
from moe.runs.record import SpecializationRecord
from moe.runs.traces import read_traces

if TYPE_CHECKING:  # these import Hydra or torch, which takes seconds
    from moe.api import Run
    from moe.config.cell import Cell

RUNS = "runs"  # folder of the run, in --out
AGREEMENT = "agreement.csv"
FIXED = ("model", "model.checkpoint", "model.offload", "steps", "save_model", "out", "question")  # by this command
COLUMNS = (
    "overlap: the share of equal choices. "
    "kappa_shuffled: 1 if all are equal, 0 if no more are than after shuffling the tokens"
)


def main(command: list[str] | None = None) -> int:
    """Carry out a command, by default the one in `sys.argv`, and return the exit status."""
    parser = OneLineParser(prog=program("moe observe"), description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or hub name of a Mixture of Experts")
    parser.add_argument("overrides", nargs="*", help="settings of data, batch size and so on, as moe train takes them")
    parser.add_argument("--out", type=Path, required=True, help="folder to write runs.csv, report and tokens.html to")
    parser.add_argument(
        "--other", metavar="MODEL", help="another checkpoint of the same model, to compare the routing with"
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the experts in files in --out and read them whenever they run: for a model larger than the memory",
    )
    parser.add_argument("--blocks", type=int, default=32, help="validation blocks to study the experts on (32)")
    parser.add_argument(
        "--samples",
        type=int,
        default=64,
        help="tokens of a layer for which other experts are tried (64); 0: none, and no expert is removed",
    )
    arguments = parser.parse_args(command)

    # Import here, so that --help and a wrong command answer at once.
    from moe.files import shown

    out = arguments.out
    try:
        for name, least in (("blocks", 1), ("samples", 0)):
            if getattr(arguments, name) < least:
                raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least {least}")
        for word in arguments.overrides:
            key = word.partition("=")[0].lstrip("+~")
            if key in FIXED or word.startswith("-"):
                raise ValueError(f"{word}: must be left out, because moe observe sets {', '.join(FIXED)} itself")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: must be a folder, or not exist yet")
        report, page = _observe(arguments)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"report: {shown(report.with_suffix('.html'))}; metrics: {shown(out / 'runs.csv')}")
    if page.exists():
        print(f"text colored by expert: {shown(page)}")
    return 0


def _observe(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Evaluate and study the model, and compare it with the other one. Return the paths of report and colored text."""
    from moe.analysis.report.inputs import ReportOptions
    from moe.analysis.report.report import write_report
    from moe.files import write_text
    from moe.results.table import as_csv, load_runs
    from moe.specialization.study import study
    from moe.training import process

    out, name = arguments.out, Path(arguments.model).name
    question = f"question={quoted(f'How does {name} route text, and what do its experts do?')}"
    words = ["model=imported", "steps=0", "save_model=none", f"out={quoted(str(out / RUNS))}", "logger.mode=disabled"]
    words = with_words([*words, question], *arguments.overrides)
    if arguments.offload:
        words = with_words(words, f"model.offload={quoted(str(out))}")
    words, others = [f"model.checkpoint={quoted(arguments.model)}", *words], list[str]()
    if arguments.other is not None:
        tokenizer = read_one(words).config.data.tokenizer  # the same tokens for both
        others = [f"model.checkpoint={quoted(arguments.other)}", f"data.tokenizer={quoted(tokenizer)}", *words[1:]]
        require_same_shape(read_one(words), read_one(others))
    run = _evaluated(words)
    loss = run.metrics["val/loss"]
    if loss is None or not math.isfinite(loss):
        raise ValueError(f"{arguments.model}: its validation loss is {loss}, so there is nothing to study")
    if others:
        agreement = compare_routing(run.folder, _evaluated(others).folder)
        write_text(out / AGREEMENT, as_csv(agreement))
        print(f"experts that {name} and {Path(arguments.other).name} choose for the same tokens. {COLUMNS}")
        print(agreement.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"studying the experts of {name}", flush=True)
    process.configure(threads=run.config.threads)
    if not study(run.folder, blocks_wanted=arguments.blocks, samples=arguments.samples):
        print("they have been studied with these settings before; nothing is computed again")
    runs = load_runs([str(run.folder)]).assign(experiment=name)  # the title of the report
    report = write_report(runs, out, ReportOptions({}, {}, ()))
    page = run.folder / SpecializationRecord.PAGE
    if page.exists():
        shutil.copyfile(page, out / page.name)
    return report, out / page.name


def read_one(words: list[str]) -> "Cell":
    """Return the cell of a command. Raises ConfigError for what cannot be evaluated."""
    from moe.launch.command_line import read_cells

    [cell] = read_cells(words) or []
    return cell


def require_same_shape(model: "Cell", other: "Cell") -> None:
    """Raise ConfigError unless two models have one architecture, and equally many layers and experts.

    Their config.json says so.
    """
    from moe.checks import ConfigError
    from moe.config.checkpoints.files import content

    shapes = [
        {
            "architecture": content("model.checkpoint", str(cell.config.model.checkpoint), None).get("model_type"),
            "MoE layers": cell.config.model.layers - cell.config.model.first_k_dense_replace,
            "experts": cell.config.model.num_experts,
            "experts by layer": cell.config.model.experts_by_layer,
        }
        for cell in (model, other)
    ]
    for name, count in shapes[0].items():
        if shapes[1][name] != count:
            checkpoint = other.config.model.checkpoint
            raise ConfigError(f"--other {checkpoint}: {name} {shapes[1][name]}: must be {count}, as in the model")


def _evaluated(words: list[str]) -> "Run":
    """Return the run of a command of `moe train`, which a process of its own carries out, so that its memory is free.

    Raises ConfigError with the message of the command if the run did not finish.
    """
    from moe.api import load_run
    from moe.checks import ConfigError

    process = multiprocessing.get_context("spawn").Process(target=_evaluate, args=(words,))
    folder = read_one(words).folder
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    if process.exitcode:
        raise ConfigError(f"moe train {shlex.join(words)}: ended with status {process.exitcode}; see what it printed")
    return load_run(folder)


def _evaluate(words: list[str]) -> None:
    """Carry out a command of `moe train`, and end this process with its status."""
    from moe.launch.train import main

    sys.argv = ["moe train", *words]
    sys.exit(main(tables=False))


def compare_routing(first: Path, other: Path) -> pd.DataFrame:
    """Return how far two checkpoints of one model choose the same experts for the same tokens, a row for each layer.

    overlap: the share of choices that are equal. kappa_shuffled: the same beyond chance, 0 for routing that has nothing
    to do with the tokens (`moe.metrics.agreement.overlap`). Experts keep their numbers, so the two must be checkpoints
    of one training, or before and after fine-tuning. Raises ValueError for models of different shape.
    """
    one, two = (read_traces(folder / "trace")[-1].chosen for folder in (first, other))
    if one.shape != two.shape:
        raise ValueError(
            f"--other: has layers, tokens and experts {two.shape}, the model {one.shape}; must be the same"
        )
    found = overlap(one, two)
    return pd.DataFrame({"layer": range(len(one)), **{key: found[key] for key in ("overlap", "kappa_shuffled")}})


if __name__ == "__main__":
    sys.exit(ended(main, "moe observe"))
