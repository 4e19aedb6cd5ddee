"""A run folder is one run: skipped when finished, resumed when cut off, refused when different, one process at a time.

Each test starts train.py in real processes, with words that a user would type.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from train_processes import ANALYZE, TRAIN, TrainCommand, read_record, result, run_script, wait_for_end

from moe.launch.run import _commit, write_run_record


def snapshot(folder: Path) -> dict[str, str]:
    """Return the SHA-256 and the time of every file."""
    return {
        str(path.relative_to(folder)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("multirun.yaml", "run.lock")
    }


@pytest.fixture(scope="module")
def finished_command(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> TrainCommand:
    """A command whose single run is finished. Its folder must stay as it is."""
    command = TrainCommand(tmp_path_factory.mktemp("finished"), small)
    assert command.run() == 0, command.output
    return command


def test_every_file_of_a_run_has_the_permissions_of_a_new_file(finished_command: TrainCommand, tmp_path: Path) -> None:
    """Whoever may read run.json may load the weights too."""
    (tmp_path / "new").touch()
    files = [path for path in finished_command.folder.rglob("*") if path.is_file() and "wandb" not in path.parts]
    modes = {path.name: path.stat().st_mode & 0o777 for path in files}
    assert "model.safetensors" in modes
    assert modes == dict.fromkeys(modes, (tmp_path / "new").stat().st_mode & 0o777)


@pytest.mark.faults
def test_a_copied_run_is_analyzed_on_a_platform_without_locks(finished_command: TrainCommand, tmp_path: Path) -> None:
    """Python on Windows has no module fcntl, and its default encoding is not UTF-8."""
    copy = tmp_path / "copied runs"
    shutil.copytree(finished_command.folder, copy / "one")
    code = f"import runpy, sys; sys.modules['fcntl'] = None; runpy.run_path({str(ANALYZE)!r}, run_name='__main__')"
    words = ["-X", "utf8=0", "-c", code, str(copy), "--out", str(tmp_path / "report")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, *words], capture_output=True, timeout=300, cwd=TRAIN.parent, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "report.html").exists()


def test_a_sweep_over_routers_trains_each_with_the_same_temperature_and_is_found_again(
    small: list[str], tmp_path: Path
) -> None:
    """The second command spells the temperature and the folder in other ways, and skips the runs of the first one."""
    settings = ["router=temperature,gumbel", "-m", *small, "steps=1", "eval_every=1"]
    done = run_script(TRAIN, *settings, "router.temp=1.5", f"out={tmp_path}/ä=1")
    assert done.returncode == 0, done.stderr
    assert "HYDRA" not in done.stdout
    assert re.findall(r"(run . of .): .*: training\n", done.stdout) == ["run 1 of 2", "run 2 of 2"]
    assert re.findall(r"(run . of .): finished, val perplexity", done.stdout) == ["run 1 of 2", "run 2 of 2"]
    sweep = tmp_path / "ä=1" / "default"
    assert done.stdout.endswith(f"table: {sweep}/results.csv; next: python {ANALYZE} {shlex.quote(str(sweep))}\n")
    folders = sorted((tmp_path / "ä=1").glob("*/*/"))
    assert sorted((r["choices"]["router"], r["config"]["router"]["temp"]) for r in map(read_record, folders)) == [
        ("gumbel", 1.5),
        ("temperature", 1.5),
    ]
    done = run_script(TRAIN, *settings, "router.temp=15e-1", "lb=0.01", f'out="{tmp_path}/ä=1"')
    assert done.stdout.count("skipped  ") == 2, done.stderr
    assert sorted((tmp_path / "ä=1").glob("*/*/")) == folders


def test_the_users_factorial_word_for_word(small: list[str], tmp_path: Path) -> None:
    """The README's sweep trains 18 cells and writes tables. The same command then skips all, and analyze.py reports."""
    words = "-m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44".split()
    settings = [*small, "steps=1", "eval_every=1", f"out={tmp_path}"]
    done = run_script(TRAIN, *words, *settings)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "default"
    results = pd.read_csv(sweep / "results.csv")
    assert len(results) == 18
    assert set(results["status"]) == {"finished"}
    assert {read_record(path.parent)["facts"]["experts_kernel"] for path in sweep.glob("*/run.json")} == {"loop"}
    assert all(sorted(seeds) == [42, 43, 44] for _, seeds in results.groupby(["noise", "lb"])["seed"])
    assert "ddof=1" in done.stdout
    columns = (
        "seed,noise_std,load_balancing_weight,val_loss,val_accuracy,val_perplexity,"
        "training_time_minutes,peak_memory_gb,best_val_perplexity,expert_usage_cv"
    )
    assert (sweep / "moe_routing_noise_experiment_results.csv").read_text().splitlines()[0] == columns

    before = snapshot(sweep)
    again = run_script(TRAIN, *words, *settings)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("skipped") == 18
    assert snapshot(sweep) == before

    report = run_script(ANALYZE, str(sweep), "--out", str(tmp_path / "analysis"))
    assert report.returncode == 0, report.stderr
    assert "Holm" in (tmp_path / "analysis" / "report.md").read_text()
    assert list((tmp_path / "analysis").glob("*.png"))


def test_a_killed_run_resumes_bitwise_and_signals_checkpoint(small: list[str], tmp_path: Path) -> None:
    """A run that is stopped by SIGKILL, then SIGTERM, then Ctrl-C ends like one that nothing disturbed, bit for bit."""
    settings = ["router=temperature", "router.temp=1.5", "noise=0.1", "steps=60", "save_every=5", "eval_every=30"]
    undisturbed, stopped = (TrainCommand(tmp_path / name, [*small, *settings]) for name in ("undisturbed", "stopped"))
    assert undisturbed.run() == 0, undisturbed.output

    def stop_by(number: int) -> int:
        process = stopped.start()
        stopped.wait_for_step(process, stopped.steps() + 12)
        os.kill(process.pid, number)
        return wait_for_end(process)

    assert stop_by(signal.SIGKILL) == -signal.SIGKILL
    assert stopped.record["status"] == "running"
    assert stop_by(signal.SIGTERM) == 143
    assert stopped.record["status"] == "interrupted"
    assert stop_by(signal.SIGINT) == 130
    assert 36 <= stopped.steps() < 60
    assert stopped.run() == 0, stopped.output
    assert result(stopped.folder) == result(undisturbed.folder)


def test_a_folder_of_another_configuration_is_refused_with_the_difference(
    small: list[str], finished_command: TrainCommand, tmp_path: Path
) -> None:
    """Two commands can name the same folder and mean different runs: here the optimizer's yaml changed in between."""
    shutil.copytree(finished_command.root / "runs", tmp_path, dirs_exist_ok=True)
    [run] = tmp_path.rglob("run.json")
    record = json.loads(run.read_text())
    record["identity"]["optimizer.momentum"] = 0.5
    run.write_text(json.dumps(record))
    before = snapshot(tmp_path)
    done = run_script(TRAIN, *small, f"out={tmp_path}")
    assert done.returncode == 2
    assert "optimizer.momentum is 0.5 in the folder, 0.95 in this command" in done.stderr
    assert done.stderr.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_a_failed_cell_is_recorded_and_the_others_run(small: list[str], tmp_path: Path) -> None:
    """A learning rate that overflows in one cell: status failed, its reason in the table, exit status 1."""
    settings = ["optimizer=adamw", "optimizer.adamw_lr=0.001,1e30", "optimizer.clip=1e30"]
    done = run_script(TRAIN, "-m", *small, *settings, f"out={tmp_path}")
    assert done.returncode == 1
    records = [read_record(path.parent) for path in tmp_path.rglob("run.json")]
    assert sorted(record["status"] for record in records) == ["failed", "finished"]
    failed = next(record for record in records if record["status"] == "failed")
    assert "Diverged: step" in failed["error"]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed ")]
    assert line.endswith(f": {failed['error']}")
    assert "Traceback" not in done.stderr


def test_a_folder_in_use_is_left_alone(small: list[str], cell: Any, tmp_path: Path) -> None:
    folder = cell("seed=7").folder
    folder.mkdir(parents=True)
    with open(folder / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_script(TRAIN, *small, "seed=7", f"out={tmp_path}")
    assert done.returncode == 1
    assert "another process" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_the_record_of_a_run_says_what_was_trained(finished_command: TrainCommand) -> None:
    record, folder = finished_command.record, finished_command.folder
    assert record["status"] == "finished"
    assert record["causal"] is True
    assert record["choices"]["router"] == "topk"
    assert record["config"]["model"]["dim"] == 32
    assert record["facts"]["parameters"]["active"] < record["facts"]["parameters"]["total"]
    assert record["facts"]["data"]["key"]
    unigram = f"a unigram model has perplexity {record['facts']['unigram_perplexity']:.2f}"
    assert unigram in finished_command.log.read_text()
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    metrics = json.loads((folder / "metrics.json").read_text())
    series = """steps train_losses val_losses val_accuracies val_perplexities elapsed_times learning_rates temperatures
        routing_entropies selection_confidences expert_utilizations load_balancing_losses""".split()
    assert set(series) <= set(metrics["history"])
    assert {len(metrics["history"][name]) for name in series} == {3}
    assert all(0 < value <= math.log(4) for value in metrics["history"]["routing_entropies"])
    assert all(0.25 <= value <= 1 for value in metrics["history"]["selection_confidences"])
    assert metrics["final_metrics"]["val/loss"] == metrics["history"]["val_losses"][-1]
    assert "routing/load_cv/layer01" in metrics["final_metrics"]
    assert os.path.getsize(next(folder.glob("model/*.safetensors"))) > 0


def test_git_is_asked_for_the_commit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep writes three records for each run, and the code of a process stays that of its start."""
    asked: list[list[str]] = []

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "# branch.oid abc\n1 .M file\n", "")

    monkeypatch.setattr("subprocess.run", answer)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    _commit.cache_clear()
    assert [_commit(), _commit()] == ["abc-dirty"] * 2
    assert [command[0] for command in asked] == ["git"]
    _commit.cache_clear()


@pytest.mark.parametrize(
    ("overrides", "causal"),
    [
        ([], True),
        (["capacity=1.0"], True),
        (["capacity=1.0", "drop=score"], False),
        (["router=expert_choice"], False),
        (["variant=spectra_full"], False),
        (["variant=spectra_no_all"], True),
    ],
)
def test_the_causal_label_depends_on_router_and_drop_rule_together(
    cell: Any, overrides: list[str], causal: bool
) -> None:
    one = cell(*overrides)
    one.folder.mkdir(parents=True)
    write_run_record(one, "running")
    assert read_record(one.folder)["causal"] is causal
