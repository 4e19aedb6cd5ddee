"""Study what the experts of finished runs do: `python -m moe.specialization multirun/noise_lb_seed`.

For each run: which domains and tokens each expert prefers, the loss without it, how similar experts are, and how much
lower the loss of a token would be with other experts. Write specialization.json and tokens.html into the run's folder.
With `--text "The quick brown fox"`, only write a page with this text, colored by the experts of each run.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of the hub and of transformers

from moe.config.options import use
from moe.files import read_text
from moe.options import OneLineParser
from moe.program import ended, program
from moe.results.table import load_runs
from moe.runs.folder import changed_code
from moe.runs.record import RunRecord, SpecializationRecord
from moe.specialization.study import OWN_TEXT, compare_seeds, study, write_own_text
from moe.training import process
from moe.training.setup import observed

USUAL = "python -m moe.specialization"


def main(command: list[str] | None = None) -> int:
    parser = OneLineParser(prog=program(USUAL), description=__doc__)
    parser.add_argument("folders", nargs="+", help="run folders, or folders that contain some")
    parser.add_argument("--blocks", type=int, default=32, help="validation blocks to measure on (32)")
    parser.add_argument(
        "--samples",
        type=int,
        default=64,
        help="tokens of a layer for which other experts are tried (64); 0: none, and no knock-outs",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="allow runs to import classes from outside of this project, and to read their data again if need be",
    )
    own = parser.add_mutually_exclusive_group()
    own.add_argument("--text", help=f"write {OWN_TEXT} into each folder: this text, colored by expert; study nothing")
    own.add_argument("--text-file", type=Path, metavar="FILE", help="the same with the text of a file")
    arguments = parser.parse_args(command)
    process.configure(threads=arguments.threads)
    try:
        use()
        for name, least in (("blocks", 1), ("samples", 0)):
            if getattr(arguments, name) < least:
                raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least {least}")
        text = _own_text(arguments)
        runs = load_runs(arguments.folders).drop_duplicates("folder")  # a run has a row for each of its grids
        folders = [Path(folder) for folder in runs.loc[runs["status"] == "finished", "folder"]]
        finished = _with_models(folders, trusted=arguments.trust)
        if text is None:
            for folder in finished:
                _study(folder, arguments)
            compare_seeds(finished)
        else:
            for folder in finished:
                print(f"{write_own_text(folder, text, trusted=arguments.trust)}: written", flush=True)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for row in runs[runs["status"] == "unreadable"].itertuples():
        print(f"unreadable: {row.error}", file=sys.stderr)
    print(f"{(runs['status'] == 'finished').sum()} of {len(runs)} runs are finished")
    return 0


def _study(folder: Path, arguments: argparse.Namespace) -> None:
    """Study one run, and print the loss and the files, or why its routing was not studied."""
    written = study(folder, blocks_wanted=arguments.blocks, samples=arguments.samples, trusted=arguments.trust)
    found = SpecializationRecord.read(folder / SpecializationRecord.FILE)
    loss = found.val_loss
    ends = f"{loss['low']} to {loss['high']}" if loss["low"] is not None else "no interval, which takes four of them"
    interval = f"val/loss {loss['mean']}, 95 % over {loss['documents']} documents: {ends}"
    outcome = "written" if written else "up to date"
    print(f"{folder / SpecializationRecord.FILE}: {outcome}; {interval}")
    if found.reason is not None:
        print(f"{folder}: its routing is not studied: {found.reason}")
    if page := SpecializationRecord.page(folder):
        print(f"{page}: {outcome}; text colored by expert")
    sys.stdout.flush()


def _with_models(folders: list[Path], *, trusted: bool) -> list[Path]:
    """Return the runs that have a saved model or have evaluated an imported one, and print which others there are.

    Of `trusted` runs, print whose code has changed. Raises RecordError for the first run that cannot be read.
    """
    records = {folder: RunRecord.read_typed(folder / RunRecord.FILE) for folder in folders}
    for folder, (record, config) in [*records.items()]:
        if not (folder / "model").is_dir() and not observed(config):
            print(f"{folder}: has no saved model (save_model=none), so its experts cannot be studied", file=sys.stderr)
            del records[folder]
            continue
        for name in changed_code(record, config) if trusted else ():
            print(f"{folder}: the code of {name} has changed since that run began", file=sys.stderr)
    return [*records]


def _own_text(arguments: argparse.Namespace) -> str | None:
    """Return the text that `--text` or `--text-file` gives, or None."""
    if arguments.text_file is None:
        return cast(str | None, arguments.text)
    try:
        return read_text(arguments.text_file)
    except UnicodeDecodeError as error:
        raise ValueError(f"--text-file {arguments.text_file}: is not UTF-8 text ({error})") from error


if __name__ == "__main__":
    sys.exit(ended(main, USUAL))
