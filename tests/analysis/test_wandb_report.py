"""Tests of `analyze.py --wandb`: W&B gets the tables and figures of a report, and no error of W&B loses the report."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from run_folders import write_metrics, write_record
from wandb_files import wandb_records

from moe.analysis.__main__ import main
from moe.config.claim import ClaimConfig
from moe.config.options import CONF

PAGE = (CONF.parent / "docs" / "dashboards.md").read_text(encoding="utf-8")


@pytest.fixture
def two_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write two experiments, one of which has a claim, and return the folder above. The command runs beside it."""
    claim = ClaimConfig(text="noise costs", metric="val/loss", factor="noise", levels=[0.5], than=[0.0], kind="higher")
    for experiment, claims in (("with a claim", [asdict(claim)]), ("plain", [])):
        for noise, seed in product((0.0, 0.5) if claims else (0.0,), (1, 2)):
            folder = tmp_path / "multirun" / experiment / f"noise={noise},seed={seed}"
            folder.mkdir(parents=True)
            logger = {"project": "ours", "entity": None}
            write_record(folder, config={"noise": noise, "seed": seed, "claims": claims, "logger": logger})
            loss = 4 + noise + seed / 10
            write_metrics(folder, {"val/loss": loss, "val/perplexity": 50 + 10 * noise + seed})
            event = {"kind": "eval", "step": 1, "val/loss": loss, "val/perplexity": 50.0}
            (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tables_and_figures_of_each_experiment_are_one_wandb_run_in_its_group(
    two_experiments: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    [command] = re.findall("^python analyze.py (.* --wandb)$", PAGE, flags=re.MULTILINE)
    assert main(command.replace("multirun/noise_lb_seed", "multirun").split()) == 0
    printed = capsys.readouterr()
    folders = [Path(line.removeprefix("W&B: ")) for line in printed.out.splitlines() if line.startswith("W&B: ")]
    assert printed.err == ""
    seen = {}
    for folder in folders:
        [path] = folder.glob("*.wandb")
        records = wandb_records(path)
        [start] = [record["run"] for record in records if record["type"] == "run"]
        [row] = [record["history"]["item"] for record in records if record["type"] == "history"]
        assert (start["job_type"], start["project"]) == ("analysis", "ours")
        kinds = {key.removesuffix("._type"): kind for key, kind in row.items() if key.endswith("._type")}
        seen[start["run_group"]] = kinds
        table = json.loads((folder / "files" / row["conditions.path"]).read_text())
        beside = "plain" if start["run_group"] == "plain" else next(two_experiments.glob("analysis/with_a_claim*")).name
        written = pd.read_csv(two_experiments / "analysis" / beside / "conditions.csv")
        pd.testing.assert_frame_equal(pd.DataFrame(table["data"], columns=table["columns"]), written, check_dtype=False)
        images = {path.stem for path in (two_experiments / "analysis" / beside).glob("*.png")}
        assert {key for key, kind in kinds.items() if kind == "image-file"} == images
    assert seen.keys() == {"with a claim", "plain"}
    assert seen["with a claim"]["claims"] == "table-file"
    assert "image-file" in seen["with a claim"].values()
    assert "claims" not in seen["plain"]
    assert all("runs" not in kinds for kinds in seen.values())


def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.init", lambda **settings: 1 / 0)


def it_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise TypeError("wrong\ntype")

    monkeypatch.setattr("wandb.Table", refuse)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (nothing_starts, "W&B did not start"),
        (it_is_disabled, "WANDB_MODE is disabled"),
        (tables_are_refused, "wrong"),
    ],
)
def test_an_error_of_wandb_is_one_line_and_leaves_the_report_complete(
    two_experiments: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    fault(monkeypatch)
    assert main(["multirun/plain", "--wandb"]) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith(f"the report is complete, but W&B does not have it: {reason}\n")
    assert printed.err.count("\n") == 1
    assert printed.out.endswith("report: analysis/report.md and analysis/report.html\n")
    assert (two_experiments / "analysis" / "report.html").is_file()


def test_a_replay_is_not_logged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--replay", "--wandb", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("--wandb and --replay exclude each other: a replay has no runs in W&B\n")
    assert not (tmp_path / "out").exists()
