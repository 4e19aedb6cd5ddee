"""Tests that damaged, missing and forged files, and links, are noticed, named and never trained on."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_kills import die_before
from train_processes import TRAIN, TrainCommand, result, wait_for_end

from moe.files import sha256
from moe.results.table import read_event_tables


@pytest.fixture
def cut_off(job: Any) -> TrainCommand:
    """Return a run that was killed after its fourth checkpoint. The checkpoints of steps 9 and 12 exist."""
    one = job()
    assert one.run(partial(die_before, "moe.runs.checkpoint", "save", 5)) == -signal.SIGKILL
    assert [path.name for path in one.checkpoints] == ["step-00000009", "step-00000012"]
    return one


def flip(path: Path, *, byte: float) -> None:
    """Flip one bit of the byte at the fraction `byte` of a file."""
    content = bytearray(path.read_bytes())
    content[int(byte * (len(content) - 1))] ^= 4
    path.write_bytes(bytes(content))


def assert_older_checkpoint_is_used(one: TrainCommand, undisturbed: Any) -> None:
    assert one.run() == 0, one.output
    assert "step-00000012 is damaged" in one.output
    assert "resumed after step 9" in one.output
    assert result(one.folder) == undisturbed


@pytest.mark.parametrize("size", [0, 10, -0.5, -10], ids=str)
def test_a_truncated_checkpoint(size: float, cut_off: TrainCommand, undisturbed: Any, survived: Any) -> None:
    path = cut_off.checkpoints[-1] / "state.pt"
    complete = path.stat().st_size
    os.truncate(path, {-0.5: complete // 2, -10: complete - 10}.get(size, int(size)))
    assert_older_checkpoint_is_used(cut_off, undisturbed)
    what = {-0.5: "half of it", -10: "all but 10 bytes"}.get(size, f"{size:.0f} bytes")
    survived(5, f"newest checkpoint cut to {what}", 1, "a warning names it; the checkpoint before it is used; exact")


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_flipped_bit(name: str, cut_off: TrainCommand, undisturbed: Any, survived: Any) -> None:
    """A flipped bit in a state file or in a digest of the manifest is noticed."""
    flip(cut_off.checkpoints[-1] / name, byte=0.5 if name == "state.pt" else 0.9)
    assert_older_checkpoint_is_used(cut_off, undisturbed)
    end = "found by sha256; the one before is used; exact. There is no --strict: falling back loses no bit"
    survived(6, f"one bit of {name} of the newest checkpoint flipped", 1, end)


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_deleted_file(name: str, cut_off: TrainCommand, undisturbed: Any, survived: Any) -> None:
    (cut_off.checkpoints[-1] / name).unlink()
    assert_older_checkpoint_is_used(cut_off, undisturbed)
    end = "the one before is used; exact. Optimizer and weights share state.pt; random streams need no file"
    survived(7, f"{name} of the newest checkpoint deleted", 1, end)


def test_a_missing_or_incomplete_run_record_is_refused(cut_off: TrainCommand, survived: Any) -> None:
    record = cut_off.folder / "run.json"
    complete = record.read_text()
    for damage in (record.unlink, lambda: record.write_text(complete[:100]), lambda: record.write_text("[]")):
        damage()
        assert cut_off.run() == 2, cut_off.output
        assert cut_off.output.count("\n") == 1
        assert str(cut_off.folder) in cut_off.output
    survived(7, "run.json deleted, cut, replaced", 3, "refused before any work; the message names the folder; exit 2")


def test_a_run_stops_if_all_checkpoints_are_damaged(cut_off: TrainCommand, survived: Any) -> None:
    for path in cut_off.checkpoints:
        flip(path / "state.pt", byte=0.3)
    events = (cut_off.folder / "events.jsonl").read_bytes()
    assert cut_off.run() == 1, cut_off.output
    for path in cut_off.checkpoints:
        assert str(path) in cut_off.record["error"]
    assert cut_off.record["status"] == "failed"
    assert (cut_off.folder / "events.jsonl").read_bytes() == events
    survived(8, "all checkpoints damaged", 1, "exit 1; the message names them; nothing is restarted or deleted")


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "deleted"])
def test_a_damaged_data_cache(damage: str, job: Any, undisturbed: Any, survived: Any, tmp_path: Path) -> None:
    one = job("a", f"data.cache={tmp_path / 'cache'}")
    assert one.run(partial(die_before, "moe.runs.checkpoint", "save", 5)) == -signal.SIGKILL
    [file] = (tmp_path / "cache").glob("*/train/input_ids.npy")
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "bit flipped":
        flip(file, byte=0.5)
    else:
        shutil.rmtree(tmp_path / "cache")
    assert one.run() == 0, one.output
    assert damage == "deleted" or "damaged: it is made again" in one.output
    assert result(one.folder) == undisturbed
    survived(
        12, f"cached token blocks {damage} before a resume", 1, "a checksum finds it; the cache is made again; exact"
    )


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_a_data_cache_damaged_while_it_is_read(
    damage: str, job: Any, undisturbed: Any, survived: Any, tmp_path: Path
) -> None:
    """Deleted blocks stay readable, because they are mapped. Truncated blocks end the process by SIGBUS."""
    one = job("a", f"data.cache={tmp_path / 'cache'}")
    process = one.start()
    one.wait_for_step(process, 4)
    if damage == "deleted":
        shutil.rmtree(tmp_path / "cache")
    else:
        [file] = (tmp_path / "cache").glob("*/train/input_ids.npy")
        os.truncate(file, 0)
    status = wait_for_end(process)
    if status != 0:
        assert one.run() == 0, one.output
    assert result(one.folder) == undisturbed
    end = "run goes on" if status == 0 else f"process ends (exit {status}), the next one makes them anew"
    survived(12, f"cached token blocks {damage} under a running process", 1, f"{end}; exact")


class Bomb:
    """Object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.marker)!r}, 'w')",)


def replace_state(checkpoint: Path, content: bytes) -> None:
    """Replace the state of a checkpoint, and give the manifest the digest of the new state."""
    (checkpoint / "state.pt").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"]["state.pt"] = sha256(checkpoint / "state.pt")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def zipped(path: Path, pickled: bytes, *, extra: str = "x") -> bytes:
    """Return a checkpoint in torch's format that contains this pickle and one more file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("state/data.pkl", pickled)
        archive.writestr("state/version", "3\n")
        archive.writestr(extra, b"\0")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["a pickle", "a torch zip", "a torch zip with names ../../marker"])
def test_code_in_a_checkpoint_does_not_run(
    kind: str, cut_off: TrainCommand, undisturbed: Any, survived: Any, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    pickled = pickle.dumps(Bomb(marker), protocol=2)
    extra = "../../../../../../marker" if "names" in kind else "x"
    content = pickled if kind == "a pickle" else zipped(tmp_path / "zip", pickled, extra=extra)
    replace_state(cut_off.checkpoints[-1], content)
    there = set(tmp_path.iterdir())
    assert_older_checkpoint_is_used(cut_off, undisturbed)
    assert not marker.exists()
    assert set(tmp_path.iterdir()) == there
    survived(18, f"{kind} that runs code as newest checkpoint, with its sha256", 1, "refused; no code ran; exact")


def test_a_zip_bomb_is_refused_without_unpacking(
    cut_off: TrainCommand, undisturbed: Any, survived: Any, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("state/data.pkl", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(2**22))
        archive.writestr("state/version", "3\n")
    replace_state(cut_off.checkpoints[-1], (tmp_path / "zip").read_bytes())
    assert_older_checkpoint_is_used(cut_off, undisturbed)
    survived(18, "a zip of 256 MB of zeros as newest checkpoint", 1, "refused; exact")


@pytest.mark.parametrize("place", ["checkpoints/step-99999999", "run.json.bak", "events.jsonl", "run.lock"])
def test_links_that_lead_out_of_the_run_folder_are_refused(
    place: str, cut_off: TrainCommand, survived: Any, tmp_path: Path
) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_text("gold")
    link = cut_off.folder / place
    link.unlink(missing_ok=True)
    link.symlink_to(treasure if place.startswith("checkpoints") else treasure / "gold")
    assert cut_off.run() == 2, cut_off.output
    assert f"{link} is a link that leads out of the run folder" in cut_off.output
    assert (treasure / "gold").read_text() == "gold"
    survived(18, f"{place} is a link out of the run folder", 1, "refused before any work, exit 2; its target untouched")


def test_weights_are_safetensors(cut_off: TrainCommand, survived: Any) -> None:
    assert cut_off.run() == 0, cut_off.output
    kinds = {path.suffix for path in (cut_off.folder / "model").iterdir()}
    assert ".safetensors" in kinds
    assert not kinds & {".bin", ".pt", ".pth", ".pkl"}
    survived(18, "the saved model", 1, "the weights are safetensors; there is no pickle")


@pytest.mark.parametrize("drift", ["another torch", "another number of threads"])
def test_a_checkpoint_of_another_machine_or_version_loads_with_a_warning(
    drift: str, job: Any, undisturbed: Any, survived: Any
) -> None:
    one = job("a", *(["threads=2"] if "threads" in drift else []))
    assert one.run(partial(die_before, "moe.runs.checkpoint", "save", 5)) == -signal.SIGKILL
    if drift == "another torch":
        for path in one.checkpoints:
            manifest = json.loads((path / "manifest.json").read_text())
            (path / "manifest.json").write_text(json.dumps(manifest | {"torch": "1.0.0"}))
    else:
        one.arguments.remove("threads=2")
    assert one.run() == 0, one.output
    assert "resumed after step 12" in one.output
    assert "the run may end with other last bits" in one.output
    survived(
        25, f"a checkpoint from {drift}", 1, "it loads; a warning says that the result may differ in the last bits"
    )


def test_an_incomplete_last_event_is_skipped_and_written_again(
    cut_off: TrainCommand, undisturbed: Any, survived: Any
) -> None:
    events = cut_off.folder / "events.jsonl"
    with events.open("a") as file:
        file.write('{"kind": "train", "step": 16, "train/lo')
    _, table, problems = read_event_tables([cut_off.folder], training=["train/loss"])
    assert table["step"].tolist() == list(range(1, 16))
    assert len(problems) == 1
    assert "incomplete" in problems[0]
    assert cut_off.run() == 0, cut_off.output
    assert result(cut_off.folder) == undisturbed
    assert read_event_tables([cut_off.folder], training=["train/loss"]).trains["step"].tolist() == list(range(1, 25))
    survived(
        27,
        "half a line at the end of events.jsonl",
        1,
        "the analysis skips and names it; a resume writes it again; exact",
    )


def test_the_analysis_names_damaged_files_and_uses_the_others(job: Any, survived: Any, tmp_path: Path) -> None:
    """Damage: an incomplete event, a repeated step, a run record that is not JSON, and metrics that are a folder."""
    jobs = [job("sweep", f"seed={seed}") for seed in range(4)]
    assert [one.run() for one in jobs] == [0, 0, 0, 0]
    folders = sorted((tmp_path / "sweep" / "runs").glob("*/*/"))
    lines = (folders[0] / "events.jsonl").read_text()
    (folders[0] / "events.jsonl").write_text(lines + lines.splitlines()[-1] + '\n{"kind": "ev')
    (folders[1] / "run.json").write_text("{")
    (folders[2] / "metrics.json").unlink()
    (folders[2] / "metrics.json").mkdir()
    analyze = TRAIN.with_name("analyze.py")
    command = [sys.executable, str(analyze), str(tmp_path / "sweep" / "runs"), "--out", str(tmp_path / "analysis")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    report = (tmp_path / "analysis" / "report.md").read_text()
    assert "2 of 4 runs did not finish" in report
    survived(
        27,
        "analyze.py on an incomplete event, an incomplete run.json, an unreadable metrics.json",
        3,
        "the report names them",
    )


def jumping_clock() -> None:
    """Make the wall clock jump a day back or forward at each reading."""
    honest, jumps = time.time, iter(range(1, 10**9))
    time.time = lambda: honest() + 86_400 * (-1) ** next(jumps)


def test_file_times_and_clock_jumps_do_not_matter(cut_off: TrainCommand, undisturbed: Any, survived: Any) -> None:
    """First the older checkpoint gets the later file times; then all files get the same time."""
    old, new = cut_off.checkpoints
    for path, stamp in ((old, 2**31), (new, 0)):
        for file in (path, *path.iterdir()):
            os.utime(file, (stamp, stamp))
    assert cut_off.run(jumping_clock) == 0, cut_off.output
    assert "resumed after step 12" in cut_off.output
    assert result(cut_off.folder) == undisturbed
    times = [json.loads(line)["time/elapsed"] for line in (cut_off.folder / "events.jsonl").read_text().splitlines()]
    assert times == sorted(times)
    assert min(times) >= 0
    survived(
        21,
        "file times reversed; wall clock jumps by a day",
        1,
        "the step decides which checkpoint is newest; no negative duration; exact",
    )
