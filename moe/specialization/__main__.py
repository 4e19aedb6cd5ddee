"""Study every finished run in the given folders: `python -m moe.specialization multirun/noise_lb_seed`."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of the hub and of transformers

from moe.config.options import use
from moe.results.table import load_runs
from moe.runs.record import SpecializationRecord
from moe.specialization.study import compare_seeds, study
from moe.training import process


def main(command: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe.specialization", description=__doc__)
    parser.add_argument("folders", nargs="+", help="run folders, or folders that contain some")
    parser.add_argument("--blocks", type=int, default=32, help="validation blocks to measure on (32)")
    parser.add_argument(
        "--samples", type=int, default=64, help="tokens of a layer for which other experts are tried (64)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run the classes that the runs name, though not of this project, and read their data again if need be",
    )
    arguments = parser.parse_args(command)
    process.configure(threads=arguments.threads)
    try:
        use()
        for name in ("blocks", "samples"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least 1")
        runs = load_runs(arguments.folders).drop_duplicates("folder")  # a run has a row for each of its grids
        finished = [Path(folder) for folder in runs.loc[runs["status"] == "finished", "folder"]]
        for folder in [folder for folder in finished if not (folder / "model").is_dir()]:
            print(f"{folder}: has no saved model (save_model=none), so its experts cannot be studied", file=sys.stderr)
            finished.remove(folder)
        for folder in finished:
            written = study(folder, blocks_wanted=arguments.blocks, samples=arguments.samples, trusted=arguments.trust)
            loss = SpecializationRecord.read(folder / SpecializationRecord.FILE).val_loss
            interval = (
                f"val/loss {loss['mean']}, 95 % over {loss['documents']} documents: {loss['low']} to {loss['high']}"
            )
            outcome = "written" if written else "up to date"
            print(f"{folder / SpecializationRecord.FILE}: {outcome}; {interval}", flush=True)
        compare_seeds(finished)
    except (ValueError, OSError) as error:
        print(f"moe.specialization: {error}", file=sys.stderr)
        return 2
    for row in runs[runs["status"] == "unreadable"].itertuples():
        print(f"unreadable: {row.error}", file=sys.stderr)
    print(f"{(runs['status'] == 'finished').sum()} of {len(runs)} runs are finished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
