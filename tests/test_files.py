"""Tests of moe/files.py that no other test covers."""

import shutil
from pathlib import Path

from moe.files import walk


def test_a_walk_finds_what_a_recursive_pattern_finds(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-1" / "weights").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints")
    assert sorted(walk(tmp_path)) == sorted(tmp_path.rglob("*"))


def test_a_walk_goes_on_when_another_process_deletes_folders(tmp_path: Path) -> None:
    for name in ("step-1", "step-2", "step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    seen = []
    for path in walk(tmp_path):
        seen.append(path)
        if path.name == "weights":  # as a run does that keeps its newest checkpoint; a pattern raises an error here
            for other in tmp_path.iterdir():
                if other != path.parent:
                    shutil.rmtree(other)
    assert [path.name for path in seen].count("weights") == 1
