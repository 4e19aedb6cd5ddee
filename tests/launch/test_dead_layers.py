"""Tests of runs in which no token takes an expert: they train to their end, and the analysis reads them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from train_processes import ANALYZE, run_script

from moe.config.cell import Cell
from moe.launch.run import run
from moe.routers.base import LinearRouter
from moe.routers.relu import ReLU
from moe.runs.events import read_events


def negative(self: LinearRouter, x: Tensor) -> Tensor:
    """Return logits below 0, for which ReLU routing gives a token no expert. They depend on the router's weights."""
    return -torch.nn.functional.linear(x, self.weight).square() - 1


def test_a_run_whose_layers_route_nothing_trains_on_and_is_analyzed_beside_others(
    cell: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Metrics of the load are null there, in progress lines, tables, figures and the report.

    Of the runs without dropout both route nothing, and one of those with dropout.
    """
    for dropout, seed, dead in ((0.0, 1, True), (0.0, 2, True), (0.1, 1, False), (0.1, 2, True)):
        one = cell("router=relu", "router.target=1", "capacity=1.0", f"model.dropout={dropout}", f"seed={seed}")
        with monkeypatch.context() as patch:
            if dead:
                patch.setattr(ReLU, "logits", negative)
            run(one)
        record = json.loads((one.folder / "run.json").read_text())
        assert record["status"] == "finished", record.get("error")
        last = [event for event in read_events(one.folder / "events.jsonl") if event["kind"] == "eval"][-1]
        assert (last["routing/load_cv"] is None) == dead
        assert (last["routing/utilization"] == [[None] * 4] * 2) == dead
        assert (last["routing/active_experts"] == 0) == dead
        json.loads((one.folder / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert {"load CV" in line for line in lines} == {True, False}
    done = run_script(ANALYZE, str(tmp_path), "--out", str(tmp_path / "analysis"), "--metric", "routing/load_gini")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "analysis" / "report.md").read_text()
    assert "routing/load_gini" in report
