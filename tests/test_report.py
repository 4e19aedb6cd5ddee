"""The report: every run is accounted for, sentences follow from the data, and no state of the folders breaks it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest

from moe.analysis.figures import factor_plot, learning_curves, noise_lb
from moe.analysis.replay import read_published
from moe.analysis.report import write_report
from moe.analysis.tables import markdown
from moe.results import history, load

ROOT = Path(__file__).parent.parent


def write_run(
    folder: Path, metrics: dict[str, float], *, causal: bool = True, status: str = "finished", **keys: object
) -> None:
    folder.mkdir(parents=True)
    router = "topk" if causal else "expert_choice"
    record = {
        "status": status,
        "error": "boom\ntrace" if status == "failed" else None,
        "causal": causal,
        "commit": "abc1234",
        "experiment": folder.parent.name,
        "name": folder.name,
        "choices": {"router": router, "variant": None},
        "config": keys,
        "seconds": 2.0,
        "train_seconds": 1.0,
        "peak_memory_gb": None,
        "parameters": {"total": 1},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text(json.dumps({"final_metrics": metrics}))
    loss = metrics.get("val/loss", 1.0)
    events = [
        {"kind": "eval", "step": step, "val/loss": loss + 4 * math.exp(-step / 100)} for step in range(0, 401, 100)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The 18 published runs as run folders, with as many more metrics as a run really has."""
    sweep = tmp_path / "multirun" / "noise_lb_seed"
    for row in read_published("noise_runs").itertuples():
        name = f"lb={row.load_balancing_weight},noise={row.noise_std},seed={row.seed}"
        metrics = {f"routing/entropy/layer{layer:02d}": 0.5 for layer in range(150)} | {
            "val/loss": row.val_loss,
            "val/perplexity": row.val_perplexity,
            "val/accuracy": row.val_accuracy,
            "routing/load_cv/pooled": row.expert_usage_cv,
        }
        write_run(sweep / name, metrics, seed=row.seed, noise=row.noise_std, lb=row.load_balancing_weight)
    return sweep


def test_the_published_runs_give_the_published_verdicts(published: Path, tmp_path: Path) -> None:
    text = write_report(load([published]), tmp_path / "out", references={"lb": 0.01}).read_text()
    assert (
        "noise 0.1 vs 0.0 at lb=0.01: +1.15 perplexity [0.967, 1.34], p=0.0014 (Holm 0.0085), n=3: **worse**\n" in text
    )
    assert "(Holm 0.066), n=3: **worse**, but not after Holm's correction" in text
    assert "lb 0.0 vs 0.01 at noise=0.0: +0.307 perplexity [-1.72, 2.33], p=0.58 (Holm 1), n=3: **undecided**" in text
    assert "smallest effect these seeds could have seen (power 0.8) is 2.7" in text
    assert "router: topk (causal: yes)" in text
    assert "(ddof=1)" in text
    names = {
        "report.md",
        "runs.csv",
        "conditions.csv",
        "contrasts.csv",
        "anova.csv",
        "noise_lb.png",
        "learning_curves.png",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert len(pd.read_csv(tmp_path / "out" / "contrasts.csv")) == 14
    for name in ("noise_lb", "learning_curves"):
        pixels = matplotlib.image.imread(tmp_path / "out" / f"{name}.png")
        assert pixels.std() > 0.05, "something is drawn"
        edge = (pixels[0, :, :3], pixels[-1, :, :3], pixels[:, 0, :3], pixels[:, -1, :3])
        assert all((side == 1).all() for side in edge), "nothing is cut off at the border"


def test_every_run_is_accounted_for(published: Path, tmp_path: Path) -> None:
    write_run(published / "lb=0.0,noise=0.1,seed=45", {}, status="failed", seed=45, noise=0.1, lb=0.0)
    write_run(published / "lb=0.0,noise=0.5,seed=45", {"val/perplexity": math.inf}, seed=45, noise=0.5, lb=0.0)
    (published / "lb=0.0,noise=0.0,seed=42" / "run.json").write_text("{")
    (published / "sweep.json").write_text(json.dumps({"cells": ["lb=0.0,noise=0.0,seed=45"]}))
    with (published / "lb=0.0,noise=0.0,seed=43" / "events.jsonl").open("a") as log:
        log.write('{"kind": "ev')
    text = write_report(load([published]), tmp_path / "out").read_text()
    assert "3 of 21 runs did not finish" in text
    assert "| lb=0.0,noise=0.1,seed=45 | failed | boom |" in text
    assert "| lb=0.0,noise=0.0,seed=42 | unreadable |" in text
    assert "| lb=0.0,noise=0.0,seed=45 | missing |" in text
    assert "lb=0.0,noise=0.5,seed=45: finished, but its val/perplexity is not finite" in text
    assert "line 6 skipped" in text
    assert "unbalanced" in text
    assert "without a partner: seed 42" in text


def test_every_router_says_whether_it_is_causal(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for causal in (True, False):
            metrics = {
                "val/loss": 1.0 + 0.1 * causal + 0.01 * seed**2 * causal,
                "val/perplexity": 3.0 + 0.1 * seed * causal,
            }
            write_run(tmp_path / "r" / f"{causal},{seed}", metrics, causal=causal, seed=seed)
    text = write_report(load([tmp_path / "r"]), tmp_path / "out", references={"router": "topk"}).read_text()
    assert "router expert_choice (causal: no) vs topk (causal: yes): -0.2 perplexity" in text
    assert "factors_routing_load_cv_pooled: not drawn, no run has routing/load_cv/pooled" in text
    assert (tmp_path / "out" / "factors_val_perplexity.png").stat().st_size > 5_000


def test_a_single_run_is_reported_too(published: Path, tmp_path: Path) -> None:
    run = published / "lb=0.0,noise=0.1,seed=42"
    text = write_report(load([run]), tmp_path / "out").read_text()
    assert "factors: none varies" in text
    assert "131.9 ± –" in text
    assert "- factors: not drawn, no factor varies" in text
    assert "![learning_curves]" in text


def test_no_finished_run_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "x" / "seed=1").mkdir(parents=True)
    (tmp_path / "x" / "seed=1" / "run.json").write_text("")
    text = write_report(load([tmp_path / "x"]), tmp_path / "out").read_text()
    assert "unreadable" in text
    assert "learning_curves: not drawn" in text


def test_figures_show_every_seed_and_name_n(published: Path) -> None:
    runs = load([published])
    left, right = noise_lb(runs).axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("validation perplexity", "load CV over experts, layers pooled")
    assert left.get_legend_handles_labels()[1] == [
        "load-balancing weight 0.0 (n=3)",
        "load-balancing weight 0.01 (n=3)",
    ]
    seeds = [line for line in left.lines if line.get_markersize() == 4 and len(line.get_xdata()) == 3]
    assert sorted(y for line in seeds for y in line.get_ydata()) == sorted(runs["val/perplexity"])
    assert len(factor_plot(runs, "lb", "noise", "val/loss").axes) == 1
    events = history(runs["folder"]).events.merge(runs[["folder", "noise"]], on="folder")
    assert learning_curves(events, "noise").axes[0].get_legend_handles_labels()[1] == [
        *("0.0 (n=6)", "0.1 (n=6)", "0.5 (n=6)")
    ]


def test_markdown_is_a_table() -> None:
    table = pd.DataFrame({"name": ["a|b", None], "p": [0.00123, float("nan")], "mean": [130.23456, 1.0]})
    assert markdown(table).split("\n") == [
        "| name | p | mean |",
        "| :--- | ---: | ---: |",
        "| a\\|b | 0.0012 | 130.23 |",
        "| – | – | 1 |",
    ]
    assert markdown(pd.DataFrame()) == "(none)"


def analyze(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "analyze.py", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_command_prints_the_table_and_where_the_report_lies(published: Path, tmp_path: Path) -> None:
    done = analyze(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "18 of 18 runs finished" in done.stdout
    assert done.stdout.endswith("report: analysis/report.md\n")
    assert (tmp_path / "analysis" / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["multirn"], "analyze: no folder multirn; the nearest is multirun\n"),
        (["--reference", "lb"], "analyze: --reference lb: write FACTOR=LEVEL, such as lb=0.01\n"),
        (["--reference", "lb=7"], "analyze: reference lb=7: allowed are 0.0, 0.01\n"),
    ],
)
def test_a_wrong_command_gets_one_line(published: Path, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    done = analyze(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", complaint)
    assert not (tmp_path / "analysis").exists()
