"""Tests that only complete and undamaged checkpoints are loaded."""

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch

from moe.files import sha256
from moe.runs import checkpoint


def state(step: int) -> dict[str, torch.Tensor]:
    return {"weights": torch.full((1000,), float(step))}


def write(root: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(root, step, state(step))


def test_the_checkpoint_of_the_last_step_is_loaded_and_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 9, 10, 100)
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded[0] == 100
    assert torch.equal(loaded[1]["weights"], state(100)["weights"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_load_returns_none_without_a_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["empty", "truncated", "bit", "no manifest", "truncated manifest", "no state"])
def test_if_the_newest_checkpoint_is_damaged_the_one_before_is_loaded_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002"
    content = bytearray((newest / "state.pt").read_bytes())
    if damage == "empty":
        (newest / "state.pt").write_bytes(b"")
    elif damage == "truncated":
        (newest / "state.pt").write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        (newest / "state.pt").write_bytes(content)
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "truncated manifest":
        (newest / "manifest.json").write_text('{"step"')
    else:
        (newest / "state.pt").unlink()
    with caplog.at_level(logging.WARNING):
        loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded[0] == 1
    assert "step-00000002 is damaged" in caplog.text


def test_damaged_checkpoints_alone_are_an_error_and_not_a_silent_restart(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for path in tmp_path.glob("*/state.pt"):
        path.write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"step-00000002, .*step-00000001 can be read"):
        checkpoint.load(tmp_path)


def test_remains_of_an_interrupted_save_are_removed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".tmp-2").mkdir()
    (tmp_path / ".tmp-2" / "state.pt").write_bytes(b"half")
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded[0] == 1
    assert not (tmp_path / ".tmp-2").exists()


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    class CodeWhenUnpickled:
        """Object that creates the file `marker` when it is unpickled."""

        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'marker')!r}, 'w')",)

    write(tmp_path, 1)
    file = tmp_path / "step-00000001" / "state.pt"
    file.write_bytes(pickle.dumps(CodeWhenUnpickled(), protocol=2))
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["sha256"]["state.pt"] = sha256(file)
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RuntimeError, match="can be read"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "marker").exists()
