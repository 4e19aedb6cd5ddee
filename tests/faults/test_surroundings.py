"""Tests with full disks, read-only folders, failures of W&B, too little memory, and numbers that overflow."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from train_processes import TrainCommand, patch, result, wait_for_end


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one megabyte, and return its folder."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Fill a disk except for some bytes, and return the file that fills it."""
    statistics = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, statistics.f_bavail * statistics.f_frsize - leave)))
    return ballast


@pytest.mark.parametrize("leave", [64_000, 4096, 0])
def test_a_full_disk(leave: int, words: list[str], small_disk: Path, undisturbed: Any, survived: Any) -> None:
    """The disk is full from step 7 on. 64 KB are too little for a checkpoint; 4 KB are soon too little for an event."""
    one = TrainCommand(small_disk, words)
    one.log = small_disk.parent / "log"
    process = one.start()
    one.wait_for_step(process, 7)
    ballast = fill(small_disk, leave=leave)
    assert wait_for_end(process) == 1
    assert "No space left on device" in one.output
    assert "Traceback" not in one.output
    assert one.checkpoints
    ballast.unlink()
    assert one.run() == 0, one.output
    assert "resumed after step" in one.output
    assert result(one.folder) == undisturbed
    survived(
        9, f"disk full except for {leave} bytes from step 7 on", 1, "exit 1 with the cause; with space again: exact"
    )


def small_files(limit: int) -> None:
    """Limit the size of each file, as a quota does, without mounting anything."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_quota(job: Any, undisturbed: Any, survived: Any) -> None:
    one = job()
    assert one.run(partial(small_files, 20_000)) == 1
    assert "File too large" in one.output
    assert one.run() == 0, one.output
    assert result(one.folder) == undisturbed
    survived(9, "no file may exceed 20 KB (RLIMIT_FSIZE)", 1, "exit 1 with the cause; resumed without the limit: exact")


def poisoned_loss(step: int, value: float) -> None:
    def wrap(original: Any) -> Any:
        calls: list[int] = []

        def total_loss(*args: Any, **weight: float) -> Any:
            calls.append(1)
            return original(*args, **weight) * (value if len(calls) == step else 1.0)

        return total_loss

    patch("moe.training.passes", "total_loss", wrap)


def poisoned_expert(step: int) -> None:
    """Make the gradient of a single expert NaN in one step."""

    def wrap(original: Any) -> Any:
        calls: list[int] = []

        def gradient_norms(parts: Any) -> Any:
            calls.append(1)
            if len(calls) == step:
                expert = next(p for p in parts["experts"] if p.grad is not None)
                expert.grad[2, 0, 0] = float("nan")
            return original(parts)

        return gradient_norms

    patch("moe.training.gradients", "gradient_norms", wrap)


@pytest.mark.parametrize(
    ("what", "sabotage"),
    [
        ("NaN loss", partial(poisoned_loss, 5, float("nan"))),
        ("infinite loss", partial(poisoned_loss, 5, float("inf"))),
        ("NaN gradient of expert 2 alone", partial(poisoned_expert, 5)),
    ],
)
def test_numbers_that_are_not_finite(what: str, sabotage: Any, job: Any, undisturbed: Any, survived: Any) -> None:
    one = job()
    assert one.run(sabotage) == 1, one.output
    assert one.record["status"] == "failed"
    assert "Diverged: step 4: " in one.record["error"]
    assert "expert 2" in one.record["error"] or "loss" in what
    assert one.steps() == 4
    assert one.run() == 0, one.output
    assert result(one.folder) == undisturbed
    survived(10, f"{what} in step 4", 1, "stops before the update and names step, tensor and expert; run again: exact")


def no_wandb() -> None:
    sys.modules["wandb"] = None  # type: ignore[assignment]


def no_server() -> None:
    os.environ |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "online"}
    patch("moe.runs.wandb_mirror", "START_SECONDS", lambda seconds: 2)


def no_key() -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    os.environ |= {"HOME": "/nonexistent", "NETRC": "/nonexistent"}


def broken_log() -> None:
    import wandb

    def log(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError("the connection is gone")

    wandb.Run.log = log


@pytest.mark.parametrize(
    ("what", "mode", "sabotage"),
    [
        ("W&B not installed", "offline", no_wandb),
        ("W&B server down", "online", no_server),
        ("no W&B key", "online", no_key),
        ("wandb.log raises", "offline", broken_log),
    ],
)
def test_failures_of_wandb_do_not_change_a_run(
    what: str, mode: str, sabotage: Any, job: Any, undisturbed: Any, survived: Any
) -> None:
    one = job()
    one.arguments.remove("logger.mode=disabled")
    one.arguments.append(f"logger.mode={mode}")
    assert one.run(sabotage) == 0, one.output
    assert "W&B" in one.output
    assert result(one.folder) == undisturbed
    survived(11, what, 1, "one warning; the run finishes; its events are complete; exact")


@pytest.mark.parametrize(
    "name",
    ["é ✓ 漢字", "with space", "n" * 200, "a/b/../c", "semi;colon 'quoted'"],
    ids=["unicode", "space", "long", "up", "odd"],
)
def test_odd_folder_names(name: str, words: list[str], tmp_path: Path, undisturbed: Any, survived: Any) -> None:
    one = TrainCommand(tmp_path / "job", words)
    quoted = str(tmp_path / name).replace("\\", "\\\\").replace('"', '\\"')
    one.arguments[-1] = f'out="{quoted}"'
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert one.run() == 0, one.output
    [folder] = (tmp_path / name).glob("*/*/")
    assert result(folder) == undisturbed
    survived(19, f"out= of {name[:20]!r}", 1, "works; exact")


@pytest.mark.parametrize("value", ["x" * 300, "a/../../../b", "ü ñ"], ids=["long", "up", "unicode"])
def test_odd_values_name_a_folder_inside(value: str, words: list[str], tmp_path: Path, survived: Any) -> None:
    corpus = next(word for word in words if word.startswith("data.source.paths=")).split("=")[1][1:-1]
    path = tmp_path / "text" / ("x" * 200 if len(value) > 200 else value.replace("..", "d")) / "t.jsonl"
    path.parent.mkdir(parents=True)
    shutil.copy(corpus, path)
    one = TrainCommand(tmp_path / "job", [*words, f'data.source.paths=["{path}"]', "steps=1"])
    assert one.run() == 0, one.output
    assert one.folder.parent.parent == tmp_path / "job" / "runs"
    survived(
        19,
        f"a swept value of {value[:16]!r} names the run folder",
        1,
        "one folder deep, inside the folder of the sweep",
    )


@pytest.mark.parametrize("place", ["read-only disk", "file in the way", "deleted while it runs"])
def test_folders_that_cannot_be_written_to(
    place: str, words: list[str], small_disk: Path, tmp_path: Path, survived: Any
) -> None:
    one = TrainCommand(tmp_path / "job", words)
    if place == "deleted while it runs":
        process = one.start()
        one.wait_for_step(process, 4)
        folder = one.folder
        shutil.rmtree(folder)
        assert wait_for_end(process) == 1
        assert not folder.exists()
        assert "No such file or directory" in one.output
    else:
        target = small_disk / "runs" if place.startswith("read") else tmp_path / "file"
        if place.startswith("read"):
            subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        else:
            target.write_text("")
        one.arguments[-1] = f"out={target}"
        assert one.run() == 2, one.output
        assert one.output.count("\n") == 1
        folder = target
    assert str(folder) in one.output
    assert "Traceback" not in one.output
    survived(20, f"run folder: {place}", 1, "the error names the folder; nothing is created in its place")


def little_memory(megabytes: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def memory_error() -> None:
    def wrap(original: Any) -> Any:
        def total_loss(config: Any, *args: Any, **weight: float) -> Any:
            if config.seed == 1:
                raise MemoryError
            return original(config, *args, **weight)

        return total_loss

    patch("moe.training.passes", "total_loss", wrap)


def test_too_little_memory_is_reported_with_advice(job: Any, survived: Any) -> None:
    one = job("a", "batch_size=20000", "data.seq_len=128", "steps=2")
    assert one.run(partial(little_memory, 1500)) == 1
    assert one.record["status"] == "failed"
    assert "a smaller batch_size" in one.record["error"]
    sweep = job("b", "-m", "seed=1,2", "steps=2")
    assert sweep.run(memory_error) == 1, sweep.output
    assert "a smaller batch_size" in sweep.output
    states = {path.name[-6:]: path for path in (sweep.root / "runs").glob("*/*/")}
    assert len(states) == 2
    assert len(list((sweep.root / "runs").rglob("model.safetensors"))) == 1
    survived(
        22,
        "RLIMIT_AS; MemoryError in one cell of two",
        2,
        "the cell fails with advice on batch_size; the other cell is trained",
    )


def slow_blocks() -> None:
    def wrap(original: Any) -> Any:
        def micro_batches(*args: Any) -> Any:
            time.sleep(0.05)
            return original(*args)

        return micro_batches

    patch("moe.training.step", "micro_batches", wrap)


def test_a_slow_disk_changes_nothing(job: Any, undisturbed: Any, survived: Any) -> None:
    one = job()
    assert one.run(slow_blocks) == 0, one.output
    assert result(one.folder) == undisturbed
    survived(
        24, "reading a batch takes 50 ms", 1, "exact; there are no loader workers, because blocks are mapped files"
    )


@pytest.mark.parametrize(
    "settings",
    [
        "batch_size=1 data.seq_len=2 data.max_val_blocks=1",
        "capacity=0.001",
        "model.num_experts=64 batch_size=1 data.seq_len=4",
        "router.k=4",
        "model.num_experts=1 router.k=1 noise=0.0",
    ],
)
def test_degenerate_routing(settings: str, job: Any, survived: Any) -> None:
    one = job("a", *settings.split(), "steps=3")
    assert one.run() == 0, one.output
    for event in result(one.folder)["events"]:
        assert all(value == value for value in event.values() if isinstance(value, float))  # no NaN
    survived(
        26, f"degenerate routing: {settings}", 1, "trains; loss and gradients are finite; undefined metrics are null"
    )


def test_a_long_run_keeps_its_memory_disk_and_log_within_bounds(job: Any, survived: Any, soak: int) -> None:
    """A run of 5,000 steps keeps its memory after step 500, and the sizes of its files."""
    last, tenth = 25 * soak, 25 * soak // 10
    one = job("a", f"steps={last}", "save_every=50", f"eval_every={tenth}", "model.layers=1", "batch_size=1")
    process = one.start()
    one.wait_for_step(process, 1)
    memory: dict[int, int] = {}
    steps = saved = 0
    with (one.folder / "events.jsonl").open() as events:
        while steps < last and process.is_alive():
            steps += sum('"kind": "train"' in line for line in events)
            memory[steps] = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * resource.getpagesize()
            saved = max(saved, len(list((one.folder / "checkpoints").glob("*"))))
            time.sleep(last / 50_000)
    assert wait_for_end(process) == 0, one.output
    early = [used for step, used in memory.items() if 500 <= step < 500 + tenth]
    late = [used for step, used in memory.items() if last - tenth <= step < last]
    assert min(len(early), len(late)) > 10
    growth = (max(late) - max(early)) / 2**20
    assert growth < 2  # half a kilobyte a step, of 5,000
    assert saved <= 4  # two to keep, one being written, one being pruned
    assert not (one.folder / "checkpoints").exists()
    sizes = {path.name: path.stat().st_size for path in one.folder.rglob("*") if path.is_file()}
    per_step = sizes.pop("events.jsonl") / last
    assert per_step < 3000
    assert sum(sizes.values()) < 500_000
    assert len(one.output.splitlines()) < 20  # a line an evaluation
    survived(
        28,
        f"a run of {last:,} steps that saves every 50",
        1,
        f"memory grows by {max(growth, 0):.1f} MB after step 500; {saved} checkpoints at most; {per_step:.0f} bytes of "
        "events a step, all else constant; a line of log an evaluation",
    )
