"""Tests that a killed or repeated sweep trains only its unfinished cells, and that two sweeps do not collide."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from train_processes import LIMIT, TRAIN, TrainCommand, die, patch, result, wait_for_end

from moe.files import sha256

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def results(job: TrainCommand) -> dict[str, Any]:
    """Return the result of every cell by the name of its folder."""
    return {path.parent.name: result(path.parent) for path in (job.root / "runs").glob("*/*/run.json")}


def files(root: Path) -> dict[Path, tuple[str, int]]:
    return {path: (sha256(path), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_the_users_factorial_killed_half_way_with_two_workers(job: Any, survived: Any) -> None:
    """`-m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44` under joblib: workers stop, the end is the serial one.

    Joblib's sweeps are processes of their own, since a forked one waits at its end for workers that wait for it.
    """
    grid = ("-m", "noise=0.0,0.1,0.5", "lb=0.0,0.01", "seed=42,43,44", "steps=6", "eval_every=6")
    calm, one = job("calm", *grid), job("killed", *grid)
    assert calm.run() == 0, calm.output
    one.arguments += JOBLIB
    command = [sys.executable, str(TRAIN), *one.arguments]
    with one.log.open("w") as log:
        sweep = subprocess.Popen(command, stdout=log, stderr=log)
        while len(list((one.root / "runs").rglob("metrics.json"))) < 6:
            assert sweep.poll() is None, one.output
            time.sleep(0.02)
        kill(sweep)
        done = {path: value for folder in finished(one) for path, value in files(folder).items()}
        assert len(finished(one)) < 18
        assert subprocess.run(command, stdout=log, stderr=log, timeout=LIMIT).returncode == 0, one.output
    assert results(one) == results(calm)
    assert len(results(one)) == 18
    assert all(files(path.parent)[path] == value for path, value in done.items())
    survived(
        14,
        "SIGKILL of the user's 18-cell sweep, two workers",
        1,
        "the workers stop; the same command again: all cells exact",
    )


def test_workers_of_a_killed_sweep_stop_although_no_job_waits_for_them(job: Any, survived: Any) -> None:
    """The pool of joblib catches SystemExit: a worker would wait for another job as long as the pool allows."""
    one = job("last", "-m", "seed=1,2", "steps=5000", "eval_every=2", *JOBLIB)
    with one.log.open("w") as log:
        sweep = subprocess.Popen([sys.executable, str(TRAIN), *one.arguments], stdout=log, stderr=log)
        while sum(path.read_text().count("\n") > 6 for path in (one.root / "runs").rglob("events.jsonl")) < 2:
            assert sweep.poll() is None, one.output
            time.sleep(0.02)
        kill(sweep)
    records = [json.loads(path.read_text()) for path in (one.root / "runs").rglob("run.json")]
    assert [record["status"] for record in records] == ["interrupted"] * 2, one.output
    survived(14, "SIGKILL of a sweep whose last cells train", 2, "the workers stop, and their records say so")


def kill(sweep: subprocess.Popen[bytes]) -> None:
    """Kill a sweep, and return once its workers are gone."""
    workers = [pid for pid in children(sweep.pid) if b"popen_loky" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    sweep.kill()
    sweep.wait()
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; its new parent may not yet have noticed its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finished(job: TrainCommand) -> list[Path]:
    return [path.parent for path in (job.root / "runs").rglob("run.json") if '"status": "finished"' in path.read_text()]


def end_of_seed_two(way: str) -> None:
    def wrap(honest: Any) -> Any:
        def total_loss(config: Any, *args: Any, **weight: float) -> Any:
            if config.seed == 2 and way == "raises":
                raise ValueError("out of luck")
            if config.seed == 2 and way == "exits":
                sys.exit(3)
            if config.seed == 2:
                die()
            return honest(config, *args, **weight)

        return total_loss

    patch("moe.training.passes", "total_loss", wrap)


def test_a_cell_that_fails_leaves_the_others_alone(job: Any, survived: Any) -> None:
    for way, status in (("raises", 1), ("exits", 3), ("killed", -signal.SIGKILL)):
        one = job(way, "-m", "seed=1,2,3", "steps=4")
        assert one.run(partial(end_of_seed_two, way)) == status
        [first] = [f for f in finished(one) if json.loads((f / "run.json").read_text())["config"]["seed"] == 1]
        before = files(first)
        if way == "raises":
            assert "failed" in one.output
            assert "ValueError: out of luck" in one.output
            assert len(finished(one)) == 2
        assert one.run() == 0, one.output
        assert len(finished(one)) == 3
        assert files(first) == before
        assert "skipped" in one.output
        assert "resumed" in one.output
        outcome = {"raises": "the others run, the error is shown, exit 1", "exits": "the sweep stops, exit 3"}.get(
            way, "the sweep is killed"
        )
        survived(
            14,
            f"one cell of three {way}",
            1,
            f"{outcome}; run again: only unfinished cells train; finished ones are untouched",
        )


def test_two_sweeps_in_one_folder(job: Any, survived: Any) -> None:
    one = job("a", "-m", "seed=1,2", "steps=60")
    process = one.start()
    while not list((one.root / "runs").rglob("events.jsonl")):
        assert process.is_alive(), one.output
        time.sleep(0.01)
    second = TrainCommand(one.root, one.arguments[:-1])
    second.log = one.root / "second"
    assert second.run() == 2, second.output
    assert f"is in use by another sweep, process {process.pid}" in second.output
    assert second.output.count("\n") == 1
    assert wait_for_end(process) == 0
    assert len(finished(one)) == 2
    survived(
        13,
        "a second sweep in the same folder",
        1,
        "refused with the process id of the first, exit 2; the first is unharmed",
    )


def test_a_finished_sweep_is_left_alone(job: Any, survived: Any) -> None:
    """A finished sweep that is run again writes no file, touches none, and does not import torch."""
    one = job("a", "-m", "seed=1,2", "steps=2")
    assert one.run() == 0, one.output
    before = files(one.root / "runs")
    code = (
        f"import runpy, sys; sys.argv = {[str(TRAIN), *one.arguments]!r}\n"
        f"try: runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    began = time.process_time(), sum(os.times()[2:4])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TRAIN.parent)
    seconds = sum(os.times()[2:4]) - began[1]
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped") == 2
    assert files(one.root / "runs") == before
    survived(
        15,
        "a finished sweep of two, again",
        1,
        f"skipped in {seconds:.1f} CPU s, without torch; no file touched",
    )


def test_a_changed_configuration_is_refused(job: Any, survived: Any) -> None:
    """A folder that holds a run of another configuration is refused with the difference."""
    one = job()
    assert one.run() == 0, one.output
    record = one.folder / "run.json"
    text = record.read_text()
    changes = {'"optimizer.adamw_lr": ': "lr", '"model.num_experts": ': "experts", '"seed": ': "seed"}
    for line, what in changes.items():
        start = text.rindex(line) + len(line)
        stop = text.index(",", start)
        record.write_text(text[:start] + "7" + text[stop:])
        assert one.run() == 2, what
        assert "is 7 in the folder" in one.output
        assert one.output.count("\n") == 1
    end = "refused with the difference, exit 2; no flag overrides this, because two configurations are never one run"
    survived(16, "the folder's run has another lr, number of experts, seed", len(changes), end)
