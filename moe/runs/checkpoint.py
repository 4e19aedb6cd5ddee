"""Write and read checkpoints. A checkpoint is either complete and verified, or it does not exist.

A checkpoint is written to a temporary folder, hashed, flushed to disk and then renamed. Only then are older checkpoints
deleted. `load` reads the newest checkpoint whose hash is right. The newest is the one with the largest step number; the
times of the files do not matter.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from moe.checks import first_line
from moe.distributed import ranks
from moe.files import open_unlinked, read_text, sha256, sync, write_json

log = logging.getLogger(__name__)

KEEP = 2  # the newest checkpoint, and the one before it in case the newest is damaged


def save(root: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state` to `root/step-NNNNNNNN`, atomically; then delete all but the newest `KEEP` checkpoints."""
    final, temporary = root / f"step-{step:08d}", root / f".tmp-{step}"
    root.mkdir(exist_ok=True)  # without parents: a run folder that somebody deleted is an error
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_state(state, temporary / "state.pt")
        digest = sha256(temporary / "state.pt")
        write_json(temporary / "manifest.json", {"step": step, **_environment(), "sha256": {"state.pt": digest}})
        for path in temporary.iterdir():
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
    except BaseException:  # free the disk space
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(root)
    for old in sorted(root.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def load(root: Path) -> tuple[int, dict[str, Any]] | None:
    """Return (step, state) of the newest intact checkpoint in `root`; None if there is no checkpoint.

    Raises RuntimeError with their names if there are checkpoints, but all are damaged. The run does not start again at
    step 0 by itself, because somebody may still recover the checkpoints.
    """
    if ranks.is_first():
        for leftover in root.glob(".tmp-*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover)
    folders = sorted(root.glob("step-*"), reverse=True)
    for folder in folders:
        try:
            return _read(folder)
        except Exception as error:  # whatever a torn or wrong file makes a library raise
            reason = first_line(error)
            log.warning("checkpoint %s is damaged (%s); trying the previous one", folder, reason)
    if folders:
        names = ", ".join(map(str, folders))
        raise RuntimeError(f"no checkpoint of {names} can be read; delete them to start again at step 0")
    return None


def _write_state(state: dict[str, Any], path: Path) -> None:
    """Save with `torch.save`, but raise the OSError of a full disk, which torch hides behind a RuntimeError."""
    try:
        with open_unlinked(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(cause := error.__context__, OSError):
            raise cause from None
        raise


def _read(folder: Path) -> tuple[int, dict[str, Any]]:
    """Read one checkpoint; raises an error of many possible types if it is damaged."""
    manifest = json.loads(read_text(folder / "manifest.json"))
    if sha256(folder / "state.pt") != manifest["sha256"]["state.pt"]:
        raise ValueError("state.pt does not match its sha256")
    if folder.name != f"step-{manifest['step']:08d}":
        raise ValueError(f"its manifest says step {manifest['step']}")
    for name, present in _environment().items():
        if (saved := manifest.get(name)) != present:
            log.warning(
                "checkpoint was saved with %s=%s and is resumed with %s: the run may end with other last bits",
                name,
                saved,
                present,
            )
    return manifest["step"], torch.load(folder / "state.pt", weights_only=True, map_location="cpu")


def _environment() -> dict[str, Any]:
    """Return what the last bits of a run depend on, apart from the configuration."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "ranks": ranks.world_size()}
