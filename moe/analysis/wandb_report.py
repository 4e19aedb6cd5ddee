"""Copy the tables and figures of a report to W&B: `analyze.py --wandb`, one W&B run for each experiment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moe.analysis.report.inputs import ReportOptions
from moe.analysis.report.report import folder_name
from moe.config.sections import LoggerConfig
from moe.results.conditions import levels
from moe.runs.wandb_mirror import UPLOAD_SECONDS, mode_of_environment, settings, start_in

JOB_TYPE = "analysis"
LEFT_OUT = "runs.csv"  # W&B has the runs themselves


def log_report(runs: pd.DataFrame, options: ReportOptions, out: Path, files: Sequence[Path]) -> list[str]:
    """Log the tables and figures of a report, and return the address or the folder of each W&B run.

    An experiment has a W&B run of its own, in the group and the project of its training runs. It is online or offline
    as WANDB_MODE says, or as for training. files: the figures and tables of the report in the folder `out`.

    Raises ValueError if W&B does not start, and whatever error W&B raises later.
    """
    names = levels(runs["experiment"])
    places = {}
    for name in names:
        folder = out if len(names) == 1 else out / folder_name(name)
        media = _media([path for path in files if path.parent == folder and path.name != LEFT_OUT])
        places[name] = _log(name, runs[runs["experiment"] == name], options, out, media)
    return list(places.values())


def _media(files: Sequence[Path]) -> dict[str, Any]:
    """Return each figure as an image and each table as a W&B table, by the name of its file."""
    import wandb

    media: dict[str, Any] = {}
    for path in files:
        if path.suffix == ".png":
            media[path.stem] = wandb.Image(str(path))
        elif path.stat().st_size:  # a table without columns is an empty file
            table = pd.read_csv(path).astype(object)
            rows = table.where(table.notna(), None).to_numpy().tolist()
            media[path.stem] = wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
    return media


def _log(experiment: str, runs: pd.DataFrame, options: ReportOptions, out: Path, media: dict[str, Any]) -> str:
    import wandb

    def start(mode: str) -> Any:
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=_setting(runs, "project"),
            entity=_setting(runs, "entity"),
            group=experiment,
            job_type=JOB_TYPE,
            name=f"analysis of {len(runs)} runs",
            config={"folders": runs["folder"].tolist(), **options._asdict()},
            dir=str(out.absolute()),
            settings=settings(finish_seconds=UPLOAD_SECONDS),
            reinit="finish_previous",
        )

    run = start_in(mode_of_environment(), start)
    if run is None:
        raise ValueError("W&B did not start" if mode_of_environment() != "disabled" else "WANDB_MODE is disabled")
    try:
        run.log(media)
    finally:
        run.finish()
    return str(Path(run.dir).parent if run.offline else run.url)


def _setting(runs: pd.DataFrame, name: str) -> str | None:
    """Return the setting `logger.<name>` of the first run that has it."""
    known = runs.get(f"logger.{name}", pd.Series(dtype=object)).dropna()
    value = next((str(value) for value in known if value not in ("none", "absent")), None)
    return value or getattr(LoggerConfig(), name)
