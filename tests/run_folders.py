"""Write the files of made-up runs. Fields that a test does not set get default values."""

import json
from pathlib import Path
from typing import Any

from moe.config.keys import flatten
from moe.runs.record import FORMAT, MetricsRecord, RunFacts

RECORD = {
    "format": FORMAT,
    "status": "finished",
    "error": None,
    "started": "2026-01-01T00:00:00+00:00",
    "choices": {},
    "causal": True,
    "config": {"seed": 42},
    "identity": {},
    "versions": {"python": "3.11"},
    "machine": {"system": "Linux", "processor": None, "cpus": 2, "gpus": [], "driver": None},
    "commit": None,
    "plugins": {},
    "facts": None,
}
FACTS = {
    "parameters": {"total": 1000, "active": 500, "trainable": 250},
    "flops_per_token": 1000,
    "seconds": 2.0,
    "train_seconds": 1.0,
    "peak_memory_gb": None,
    "device": "cpu",
    "process": {"threads": 1},
    "ranks": {"number": 1, "layout": "single"},
    "experts_kernel": "loop",
    "loss_kernel": "chunks",
    "data": {},
    "collapses": [],
}


def write_record(folder: Path, **fields: Any) -> None:
    """Write run.json with these fields. Those of `RunFacts` are written into `facts`; a finished run has them all."""
    facts = {name: fields.pop(name) for name in RunFacts._fields if name in fields}
    record = RECORD | {"experiment": folder.parent.name, "name": folder.name} | fields
    record |= {"identity": flatten(record["config"])} | fields
    if "facts" not in fields and (facts or record["status"] == "finished"):
        record["facts"] = FACTS | facts
    (folder / "run.json").write_text(json.dumps(record))


def change_record(folder: Path, **fields: Any) -> None:
    """Replace fields of a run.json. A field of `RunFacts` is replaced in `facts`."""
    record = json.loads((folder / "run.json").read_text())
    for name in [name for name in fields if name in RunFacts._fields]:
        record["facts"] = (record["facts"] or FACTS) | {name: fields.pop(name)}
    (folder / "run.json").write_text(json.dumps(record | fields))


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json with these final metrics, and with those that every run has."""
    metrics = dict.fromkeys(MetricsRecord.EVERY_RUN, 1.0) | metrics
    (folder / "metrics.json").write_text(json.dumps({"format": FORMAT, "final_metrics": metrics, "history": {}}))


def write_cells(sweep: Path, cells: dict[str, dict[str, Any]], *, search: str | None = None) -> None:
    """Write the sweep.json of a sweep with these cells: folder name -> overrides. They are one grid, or one search."""
    grid = {"name": sweep.name, "factors": [], "fixed": {}, "cells": list(cells), "search": search}
    (sweep / "sweep.json").write_text(json.dumps({"format": FORMAT, "cells": cells, "grids": [grid]}))
