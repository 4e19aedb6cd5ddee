"""Measure the routing of a Mixture of Experts of the transformers library: `moe observe MODEL --out DIR`.

MODEL is a folder or a name on the hub. The model is evaluated as it is, like a run of ours with `steps=0`: every
routing metric by layer, then how its experts differ (`moe specialize`), then the report (`moe analyze`). Other words
are overrides as `moe train` takes them, such as `data=text` or `data.seq_len=512`.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of the hub and of transformers

RUNS = "runs"  # folder of the run, in --out


def main(command: list[str] | None = None) -> int:
    """Carry out a command, by default the one in `sys.argv`, and return the exit status."""
    parser = argparse.ArgumentParser(prog="moe observe", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or hub name of a Mixture of Experts")
    parser.add_argument("overrides", nargs="*", help="settings of data, batch size and so on, as moe train takes them")
    parser.add_argument("--out", type=Path, required=True, help="folder to write runs.csv, report and tokens.html to")
    parser.add_argument("--blocks", type=int, default=32, help="validation blocks to study the experts on (32)")
    parser.add_argument("--samples", type=int, default=64, help="tokens of a layer that try other experts (64)")
    arguments = parser.parse_intermixed_args(command)

    # Import here, so that --help and a wrong command answer at once.
    from moe import api
    from moe.analysis.report.inputs import ReportOptions
    from moe.analysis.report.report import write_report
    from moe.files import shown
    from moe.results.table import load_runs
    from moe.specialization.study import study
    from moe.training import process

    out, runs = arguments.out, arguments.out / RUNS
    words = ["model=imported", f"model.checkpoint={_quoted(arguments.model)}", "steps=0", "save_model=none"]
    words += [f"out={_quoted(str(runs))}", "logger.mode=disabled", *arguments.overrides]
    try:
        for name in ("blocks", "samples"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least 1")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: must be a folder, or not exist yet")
        [run] = api.train(*words)
        print(f"studying the experts of {run.config.model.layers} layers", flush=True)
        process.configure(threads=run.config.threads)
        study(run.folder, blocks_wanted=arguments.blocks, samples=arguments.samples)
        report = write_report(load_runs([str(runs)]), out, ReportOptions({}, {}, ()))
        page = run.folder / "tokens.html"
        if page.exists():
            shutil.copyfile(page, out / page.name)
    except (ValueError, OSError) as error:
        print(f"moe observe: {error}", file=sys.stderr)
        return 2
    print(f"report: {shown(report.with_suffix('.html'))}; metrics: {shown(out / 'runs.csv')}")
    if page.exists():
        print(f"text colored by expert: {shown(out / page.name)}")
    return 0


def _quoted(text: str) -> str:
    """Return a text as a value of an override."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    sys.exit(main())
