"""Checkpoints that are either complete and verified or not there.

Written to a temporary folder, hashed, flushed to disk, renamed; older ones go only after that. The newest that
verifies is loaded; order is by step number, never by file time.
"""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from moe.distributed import ranks
from moe.files import sha256, sync, write_json

log = logging.getLogger(__name__)

KEEP = 2  # the newest, and one to fall back on


def save(root: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state` as `root/step-NNNNNNNN`, atomically, then drop all but the newest `KEEP` checkpoints."""
    final, temporary = root / f"step-{step:08d}", root / f".tmp-{step}"
    root.mkdir(exist_ok=True)  # without parents: a run folder that someone deleted is an error
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_state(state, temporary / "state.pt")
        digest = sha256(temporary / "state.pt")
        write_json(temporary / "manifest.json", {"step": step, **_maker(), "sha256": {"state.pt": digest}})
        for path in temporary.iterdir():
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
    except BaseException:  # give the space back
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(root)
    for old in sorted(root.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def load(root: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint that verifies; None if there never was one.

    Raises RuntimeError, naming them, if there are checkpoints and none of them verifies: starting again at step 0
    silently would throw away work that may be recoverable.
    """
    if ranks.is_first():
        for left_over in root.glob(".tmp-*"):
            shutil.rmtree(left_over)
    folders = sorted(root.glob("step-*"), reverse=True)
    for folder in folders:
        try:
            return _read(folder)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            log.warning("checkpoint %s is damaged (%s); trying the one before", folder, reason)
    if folders:
        raise RuntimeError(f"no checkpoint of {', '.join(map(str, folders))} can be read; delete them to start afresh")
    return None


def _write_state(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, which tells a full disk as an inconsistency of its own: here it is the system's error."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(cause := error.__context__, OSError):
            raise cause from None
        raise


def _read(folder: Path) -> tuple[int, dict[str, Any]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    if sha256(folder / "state.pt") != manifest["sha256"]["state.pt"]:
        raise ValueError("state.pt does not match its sha256")
    if folder.name != f"step-{manifest['step']:08d}":
        raise ValueError(f"its manifest is that of step {manifest['step']}")
    for name, ours in _maker().items():
        if (theirs := manifest.get(name)) != ours:
            log.warning("checkpoint of %s %s, here %s: the run may end with other last bits", name, theirs, ours)
    return manifest["step"], torch.load(folder / "state.pt", weights_only=True, map_location="cpu")


def _maker() -> dict[str, Any]:
    """What bits depend on beside the configuration."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "ranks": ranks.world_size()}
