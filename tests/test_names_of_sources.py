"""Tests of docs/sources.md: the table of files with the names of the sources lists those that the code writes."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from run_folders import write_metrics, write_record

from moe.analysis.figures.drawing import Drawing
from moe.analysis.report.blocks import Attachment, ReportBlock
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.studies.routing_bench import quality_against_speed
from moe.analysis.studies.temperature.section import temperature_section
from moe.results.sweep_tables import write_sweep_tables
from moe.results.table import load_runs

SOURCES = Path(__file__).parents[1] / "docs" / "sources.md"


def files_in_docs(of: str) -> list[str]:
    """Return the files that the table says are written by a sweep, or by a report."""
    rows = re.findall(rf"(?m)^\| (`[^|]*) \| [^|]* \| [^|]* \| {of} \|$", SOURCES.read_text())
    return sorted(name for row in rows for name in re.findall("`([^`]*)`", row))


def sweeps(folder: Path) -> Iterator[Path]:
    """Write a sweep of each source's experiments, with two levels of each factor, and yield their folders."""
    grids: dict[str, list[dict[str, Any]]] = {
        "noise_lb_seed": [{"noise": noise, "lb": lb} for noise in (0.0, 0.5) for lb in (0.0, 0.01)],
        "experiment_a": [{"router": router, "capacity": 1.25} for router in ("switch", "softk")],
        "experiment_c": [{"router": router, "capacity": 1.25} for router in ("hash", "softk")],
        "temperature_ablation": [{"router.temp": temperature} for temperature in (0.5, 1.0)],
    }
    for experiment, cells in grids.items():
        for cell in cells:
            run = folder / experiment / ",".join(f"{key}={value}" for key, value in cell.items())
            run.mkdir(parents=True)
            config: dict[str, Any] = {"seed": 42, "steps": 1, "router": {"temp": cell.get("router.temp", 1.0)}}
            choices = {"router": cell.get("router", "topk")}
            plain = {key: value for key, value in cell.items() if not key.startswith("router")}
            write_record(run, config=config | plain, choices=choices)
            write_metrics(run, {"val/loss": 1.0, "val/perplexity": 2.7})
            (run / "events.jsonl").write_text("")
        yield folder / experiment


def written_by_a_report(sections: list[Callable[[ReportInputs], Iterator[ReportBlock]]], sweep: Path) -> list[str]:
    """Return the files of the figures and attachments of some sections, drawn or not."""
    [inputs] = collect_inputs(load_runs([sweep]))
    blocks = [block for section in sections for block in section(inputs)]
    return [f"{each.name}.png" for each in blocks if isinstance(each, Drawing)] + [
        each.name for each in blocks if isinstance(each, Attachment)
    ]


def test_the_table_lists_the_files_that_a_sweep_and_a_report_write_under_the_names_of_the_sources(
    tmp_path: Path,
) -> None:
    of_sweeps, of_reports = [], []
    for sweep in sweeps(tmp_path):
        write_sweep_tables(sweep)
        of_sweeps += [path.name for path in sweep.glob("*.csv") if path.name != "results.csv"]
        of_reports += written_by_a_report([quality_against_speed, temperature_section], sweep)
    assert files_in_docs("sweep") == sorted(of_sweeps)
    assert files_in_docs("report") == sorted(of_reports)
