"""A run folder is a run: skipped when finished, resumed when cut off, refused when different, one process at a time.

Through real processes and the user's own words.
"""

import fcntl
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moe.config.options import CONF
from moe.launch.run import write_run_record

TRAIN = CONF.parent / "train.py"
ANALYZE = CONF.parent / "analyze.py"


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TRAIN), *arguments], capture_output=True, text=True, timeout=300)


def snapshot(folder: Path) -> dict[str, str]:
    """sha256 and time of every file."""
    return {
        str(path.relative_to(folder)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("multirun.yaml", "run.lock")
    }


def state(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run.json").read_text())


def test_the_users_factorial_word_for_word(small: list[str], tmp_path: Path) -> None:
    """`python train.py -m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44`, tables, a re-run, and the analysis of it."""
    words = "-m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44".split()
    settings = [*small, "steps=2", "eval_every=2", f"out={tmp_path}"]
    done = train(*words, *settings)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "default"
    results = pd.read_csv(sweep / "results.csv")
    assert len(results) == 18
    assert set(results["status"]) == {"finished"}
    assert {state(path.parent)["facts"]["experts_kernel"] for path in sweep.glob("*/run.json")} == {"loop"}
    assert all(sorted(seeds) == [42, 43, 44] for _, seeds in results.groupby(["noise", "lb"])["seed"])
    assert "ddof=1" in done.stdout
    columns = (
        "seed,noise_std,load_balancing_weight,val_loss,val_accuracy,val_perplexity,"
        "training_time_minutes,peak_memory_gb,best_val_perplexity,expert_usage_cv"
    )
    assert (sweep / "moe_routing_noise_experiment_results.csv").read_text().splitlines()[0] == columns

    before = snapshot(sweep)
    again = train(*words, *settings)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("skipped") == 18
    assert snapshot(sweep) == before

    report = subprocess.run(
        [sys.executable, str(ANALYZE), str(sweep), "--out", str(tmp_path / "analysis")], capture_output=True, text=True
    )
    assert report.returncode == 0, report.stderr
    assert "Holm" in (tmp_path / "analysis" / "report.md").read_text()
    assert list((tmp_path / "analysis").glob("*.png"))


def test_a_killed_run_resumes_bitwise_and_signals_checkpoint(small: list[str], tmp_path: Path) -> None:
    """SIGKILL, then SIGTERM, then Ctrl-C, then to the end; and once undisturbed."""
    settings = ["router=temperature", "router.temp=1.5", "noise=0.1", "steps=200", "save_every=5", "eval_every=50"]
    commands = {name: [*small, *settings, f"out={tmp_path / name}"] for name in ("a", "b")}
    assert train(*commands["a"]).returncode == 0

    def start_and_send(number: int) -> int:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *commands["b"]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        [events] = wait_for(tmp_path / "b", "**/events.jsonl")
        lines = len(events.read_text().splitlines())
        while len(events.read_text().splitlines()) < lines + 20 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(timeout=60)

    assert start_and_send(signal.SIGKILL) == -signal.SIGKILL
    [folder_b] = [path.parent for path in (tmp_path / "b").rglob("run.json")]
    assert state(folder_b)["status"] == "running"
    assert start_and_send(signal.SIGTERM) == 143
    assert state(folder_b)["status"] == "interrupted"
    assert start_and_send(signal.SIGINT) == 130
    assert train(*commands["b"]).returncode == 0
    [folder_a] = [path.parent for path in (tmp_path / "a").rglob("run.json")]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (folder_a, folder_b)]
    assert weights[0] == weights[1]
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (folder_a, folder_b)]
    for each in metrics:
        each["history"].pop("elapsed_times")
        for name in ("time/train_seconds", "time/tokens_per_s"):
            each["final_metrics"].pop(name)
    assert metrics[0] == metrics[1]


def wait_for(root: Path, pattern: str, *, seconds: float = 60) -> list[Path]:
    deadline = time.monotonic() + seconds
    while not (found := list(root.glob(pattern))):
        assert time.monotonic() < deadline, f"{pattern} does not appear"
        time.sleep(0.05)
    return found


def test_a_folder_of_another_configuration_is_refused_with_the_difference(small: list[str], tmp_path: Path) -> None:
    """Overrides that share a folder name but not a configuration: here the preset changed in between."""
    command = [*small, f"out={tmp_path}"]
    assert train(*command).returncode == 0
    [run] = tmp_path.rglob("run.json")
    stored = json.loads(run.read_text())
    stored["identity"]["optimizer.momentum"] = 0.5
    run.write_text(json.dumps(stored))
    before = snapshot(tmp_path)
    done = train(*command)
    assert done.returncode == 2
    assert "optimizer.momentum is 0.5 in the folder, 0.95 in this command" in done.stderr
    assert done.stderr.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_a_failed_cell_is_recorded_and_the_others_run(small: list[str], tmp_path: Path) -> None:
    """A learning rate that overflows in one cell: status failed, its reason in the table, exit status 1."""
    done = train(
        "-m", *small, "optimizer=adamw", "optimizer.adamw_lr=0.001,1e30", "optimizer.clip=1e30", f"out={tmp_path}"
    )
    assert done.returncode == 1
    states = {path.parent.name: state(path.parent) for path in tmp_path.rglob("run.json")}
    assert sorted(str(s["status"]) for s in states.values()) == ["failed", "finished"]
    failed = next(s for s in states.values() if s["status"] == "failed")
    assert "Diverged: step" in str(failed["error"])
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed ")]
    assert line.endswith(f": {failed['error']}")
    assert "Traceback" not in done.stderr


def test_a_folder_in_use_is_left_alone(small: list[str], cell: Any, tmp_path: Path) -> None:
    folder = cell("seed=7").folder
    folder.mkdir(parents=True)
    with open(folder / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = train(*small, "seed=7", f"out={tmp_path}")
    assert done.returncode == 1
    assert "another process" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("launcher", ["joblib"])
def test_two_jobs_at_once_give_what_one_after_the_other_gives(small: list[str], tmp_path: Path, launcher: str) -> None:
    settings = [*small, "seed=1,2", "noise=0.0,0.2"]
    serial = train("-m", *settings, f"out={tmp_path / 'serial'}")
    parallel = train(
        "-m", *settings, f"out={tmp_path / 'parallel'}", f"hydra/launcher={launcher}", "hydra.launcher.n_jobs=2"
    )
    assert serial.returncode == parallel.returncode == 0, parallel.stderr
    found = {
        root: {p.parent.parent.name: p.read_bytes() for p in (tmp_path / root).rglob("model.safetensors")}
        for root in ("serial", "parallel")
    }
    assert len(found["serial"]) == 4
    assert found["serial"] == found["parallel"]


def test_the_record_of_a_run_says_what_it_was(small: list[str], tmp_path: Path) -> None:
    assert train(*small, f"out={tmp_path}").returncode == 0
    [run] = tmp_path.rglob("run.json")
    record = json.loads(run.read_text())
    assert record["status"] == "finished"
    assert record["causal"] is True
    assert record["choices"]["router"] == "topk"
    assert record["config"]["model"]["dim"] == 32
    assert record["facts"]["parameters"]["active"] < record["facts"]["parameters"]["total"]
    assert record["facts"]["data"]["key"]
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    metrics = json.loads((run.parent / "metrics.json").read_text())
    series = """steps train_losses val_losses val_accuracies val_perplexities elapsed_times learning_rates temperatures
        routing_entropies selection_confidences expert_utilizations load_balancing_losses""".split()
    assert set(series) <= set(metrics["history"])
    assert {len(metrics["history"][name]) for name in series} == {3}
    assert all(0 < value <= math.log(4) for value in metrics["history"]["routing_entropies"])
    assert all(0.25 <= value <= 1 for value in metrics["history"]["selection_confidences"])
    assert metrics["final_metrics"]["val/loss"] == metrics["history"]["val_losses"][-1]
    assert "routing/load_cv/layer01" in metrics["final_metrics"]
    assert os.path.getsize(next(run.parent.glob("model/*.safetensors"))) > 0


@pytest.mark.parametrize(
    ("overrides", "causal"),
    [
        ([], True),
        (["capacity=1.0"], True),
        (["capacity=1.0", "drop=score"], False),
        (["drop=score"], True),
        (["router=expert_choice"], False),
        (["variant=spectra_full"], False),
        (["variant=spectra_no_all"], True),
    ],
)
def test_the_causal_label_is_that_of_router_and_drops_together(cell: Any, overrides: list[str], causal: bool) -> None:
    one = cell(*overrides)
    one.folder.mkdir(parents=True)
    write_run_record(one, "running")
    assert state(one.folder)["causal"] is causal
