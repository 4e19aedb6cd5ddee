"""Tests that a process may end at any moment: only unsaved steps are lost, and the resumed run has the same result."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train_processes import TrainCommand, die, patch, result, wait_for_end

SAVE_EVERY = 3  # of `conftest.TINY`


def resumed_from(job: TrainCommand) -> int | None:
    found = re.search(r"resumed after step (\d+)", job.output)
    return int(found[1]) if found else None


def test_killed_at_random_moments(job: Any, undisturbed: Any, survived: Any, soak: int) -> None:
    """Each of 20 kills hits a new run, so that the moments cover everything from its first file to its last."""
    draw, hits, lost = random.Random(1), 0, []
    attempts = soak // 10
    for attempt in range(attempts):
        one = job(str(attempt))
        process = one.start()
        one.wait_for_step(process, draw.randint(1, 24))
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        hits += wait_for_end(process) == -signal.SIGKILL
        steps = one.steps()
        assert one.run() == 0, one.output
        assert result(one.folder) == undisturbed
        if (saved := resumed_from(one)) is not None:
            lost.append(steps - saved)
    assert hits >= attempts * 3 // 4
    assert len(lost) >= attempts // 2
    assert max(lost) <= SAVE_EVERY
    survived(1, "SIGKILL at a random step", hits, f"exact; at most {max(lost)} steps are repeated, with save_every=3")


def die_before(module: str, name: str, call: int) -> None:
    """End the process before the `call`-th call of a function."""
    calls = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def fatal(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                die()
            return function(*args, **kwargs)

        return fatal

    patch(module, name, wrap)


# For each moment of the n-th save: the function before which the process dies, and the number of the call.
# A save syncs two files, renames the folder, syncs again, and deletes older checkpoints.
PLACES: dict[str, Callable[[int], tuple[str, str, int]]] = {
    "the state file is empty": lambda n: ("torch", "save", n),
    "the manifest is missing": lambda n: ("moe.runs.checkpoint", "write_json", n),
    "before the rename": lambda n: ("moe.runs.checkpoint", "sync", 3 * n - 1),
    "before older checkpoints are deleted": lambda n: ("moe.runs.checkpoint", "sync", 3 * n),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("save", [1, 2, 3])
def test_killed_while_a_checkpoint_is_written(place: str, save: int, job: Any, undisturbed: Any, survived: Any) -> None:
    one = job()
    assert one.run(partial(die_before, *PLACES[place](save))) == -signal.SIGKILL
    expected = save if place == "before older checkpoints are deleted" else save - 1
    assert len(one.checkpoints) == expected
    assert one.run() == 0, one.output
    assert resumed_from(one) == (SAVE_EVERY * expected or None)
    assert result(one.folder) == undisturbed
    assert not list(one.folder.rglob("*tmp*"))
    survived(2, f"SIGKILL while checkpoint {save} is written, {place}", 1, "the newest complete one is used; exact")


def die_while_checkpoints_are_deleted() -> None:
    """End the process when it has deleted half of the checkpoints of the finished run."""
    from moe.runs import folder

    def fatal(path: Path, **_: Any) -> None:
        for state in path.glob("*/state.pt"):
            state.unlink()
        die()

    folder.shutil = SimpleNamespace(rmtree=fatal)


ENDS: dict[str, Callable[[], None]] = {
    "before model/ is written": partial(die_before, "moe.training.loop", "save_model", 1),
    "before metrics.json is written": partial(die_before, "moe.launch.run", "_write_metrics", 1),
    "before run.json says that it is finished": partial(die_before, "moe.launch.run", "write_run_record", 2),
    "while checkpoints are deleted": die_while_checkpoints_are_deleted,
}


@pytest.mark.parametrize("moment", ENDS)
def test_killed_at_the_end_of_a_run(moment: str, job: Any, undisturbed: Any, survived: Any) -> None:
    """Checkpoints are deleted last, so the same command finishes the run and repeats only steps after the last save."""
    one = job()
    assert one.run(ENDS[moment]) == -signal.SIGKILL, one.output
    assert one.run() == 0, one.output
    assert resumed_from(one) == (None if "deleted" in moment else 24 - SAVE_EVERY)
    assert result(one.folder) == undisturbed
    assert not (one.folder / "checkpoints").exists()
    survived(1, f"SIGKILL at the end of a run, {moment}", 1, "the same command finishes it; exact")


@pytest.mark.parametrize("step", [1, 7, 20])
def test_sigterm_checkpoints_and_exits_with_143(step: int, job: Any, undisturbed: Any, survived: Any) -> None:
    one = job()
    process = one.start()
    one.wait_for_step(process, step)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert wait_for_end(process) == 143
    seconds = time.monotonic() - began
    assert seconds < 10
    assert one.record["status"] == "interrupted"
    steps = one.steps()
    assert one.run() == 0, one.output
    assert resumed_from(one) == steps
    assert result(one.folder) == undisturbed
    survived(3, f"SIGTERM in step {step}", 1, f"a checkpoint after that step, exit 143, in {seconds:.1f} s; exact")


def slow_source() -> None:
    """Make the reading of documents take a minute."""
    from moe.data import sources

    def sleeping(documents: Any, **settings: Any) -> Any:
        print("READING", flush=True)
        time.sleep(60)
        return documents

    assert sources.without_duplicates
    sources.without_duplicates = sleeping


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_while_data_are_prepared(
    number: int, status: int, job: Any, undisturbed: Any, survived: Any, tmp_path: Any
) -> None:
    one = job("a", f"data.cache={tmp_path / 'cache'}")
    process = one.start(slow_source)
    while "READING" not in one.output:
        assert process.is_alive(), one.output
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(process.pid, number)
    assert wait_for_end(process) == status
    assert time.monotonic() - began < 10
    assert one.record["status"] == ("running" if status == -9 else "interrupted")
    assert one.run() == 0, one.output
    assert result(one.folder) == undisturbed
    assert not list((tmp_path / "cache").glob("*unfinished"))
    row = 24 if number == signal.SIGKILL else 3
    name = signal.Signals(number).name
    end = f"exit {status} at once" if status > 0 else "incomplete data are made again"
    survived(row, f"{name} while text is read and tokenized", 1, f"{end}; the same batches; exact")


def test_one_ctrl_c_checkpoints_and_exits_with_130(job: Any, undisturbed: Any, survived: Any) -> None:
    one = job()
    process = one.start()
    one.wait_for_step(process, 5)
    os.kill(process.pid, signal.SIGINT)
    assert wait_for_end(process) == 130
    steps = one.steps()
    assert one.run() == 0, one.output
    assert resumed_from(one) == steps
    assert result(one.folder) == undisturbed
    survived(4, "Ctrl-C", 1, "a checkpoint after that step, exit 130; exact")


def long_step() -> None:
    """Make the seventh step take a minute."""
    from moe.training import passes

    original, calls = passes.total_loss, []

    def sleeping(*args: Any, **weight: float) -> Any:
        calls.append(1)
        if len(calls) == 7:
            print("SLEEPING", flush=True)
            time.sleep(60)
        return original(*args, **weight)

    passes.total_loss = sleeping


def test_a_second_ctrl_c_quits_at_once(job: Any, undisturbed: Any, survived: Any) -> None:
    one = job()
    process = one.start(long_step)
    while "SLEEPING" not in one.output:
        assert process.is_alive(), one.output
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive()
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert wait_for_end(process) != 0
    assert time.monotonic() - began < 2
    assert one.run() == 0, one.output
    assert resumed_from(one) == 6
    assert result(one.folder) == undisturbed
    survived(4, "Ctrl-C twice within one long step", 1, "quits at once; the last checkpoint loads; exact")


def test_an_event_survives_a_kill_right_after_it(job: Any, survived: Any) -> None:
    """The event of a step is on disk before anything else happens."""
    one = job()
    assert one.run(partial(die_before, "moe.training.loop", "validate", 2)) == -signal.SIGKILL
    assert one.steps() == 12
    survived(28, "SIGKILL right after a step's event was written", 1, "the event is complete in the file")


def test_many_random_faults_in_one_run(job: Any, survived: Any, soak: int) -> None:
    """The soak: kills and signals while starting, training and saving, damaged checkpoints, incomplete events."""
    draw, settings = random.Random(2), (f"steps={5 * soak}", "save_every=1", f"eval_every={5 * soak // 2}")
    undisturbed, one = job("undisturbed", *settings), job("soaked", *settings)
    assert undisturbed.run() == 0, undisturbed.output
    counts = dict.fromkeys(("SIGKILL", "SIGTERM", "SIGINT", "flipped bit", "truncated file", "torn line"), 0)
    ends = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130}
    while sum(counts.values()) < soak:
        kind = draw.choice(list(counts))
        if kind in ends:
            process = one.start()
            if draw.random() < 0.3:
                time.sleep(draw.uniform(0, 0.8))  # while it starts, before the first event
            else:
                one.wait_for_step(process, one.steps() + draw.randint(1, 3))
            os.kill(process.pid, signal.Signals[kind])
            assert wait_for_end(process) in (ends[kind], -signal.Signals[kind], 1), one.output
        elif not harm(one, kind, draw):
            continue
        counts[kind] += 1
    assert one.run() == 0, one.output
    assert result(one.folder) == result(undisturbed.folder)
    described = ", ".join(f"{count} × {kind}" for kind, count in counts.items())
    survived(28, f"soak of one run: {described}", sum(counts.values()), "exact")


def harm(job: TrainCommand, kind: str, draw: random.Random) -> bool:
    """Damage one file of the newest of two checkpoints, or the end of the events; False if there is none."""
    if kind == "torn line":
        events = next(iter((job.root / "runs").glob("*/*/events.jsonl")), None)
        if events is None:
            return False
        with events.open("a") as file:
            file.write('{"kind": "train", "st')
        return True
    if not list((job.root / "runs").glob("*/*/")) or len(job.checkpoints) < 2:
        return False
    path = draw.choice(sorted(job.checkpoints[-1].iterdir()))
    content = bytearray(path.read_bytes())
    if not content:
        return False
    if kind == "flipped bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        del content[draw.randrange(len(content)) :]
    path.write_bytes(bytes(content))
    return True
