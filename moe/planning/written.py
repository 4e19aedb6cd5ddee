"""plan.json: a plan with its time and fingerprint, and without paths of the machine on which it was made."""

import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe.config.words import key_of
from moe.files import shown
from moe.runs.planned import digest_of_plan

PLACES = ("out", "data.cache")  # keys that only say where files lie on a machine
ABSOLUTE = re.compile(r"(?<![\w.~}$/])/+(?=[^/\s])[^\s,\]\"'}]*")


def as_written(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what plan.json holds: the plan, the present time, such as 2026-11-27T09:30:00+00:00, and its fingerprint.

    A command leaves out where the runs lie, if that is an absolute path. Of any other absolute path, only the last
    part stays, as in ".../lab"; one below the working folder becomes relative.
    """
    commands = {key: _portable(plan[key]) for key in ("command", "pilot") if plan[key] is not None}
    content = {key: _each_without_paths(value) for key, value in (plan | commands).items()}
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), "digest": digest_of_plan(content)} | content


def _portable(command: str) -> str:
    """Return a command without words that only say where files lie on this machine."""
    words = shlex.split(command)
    kept = [word for word in words if not (key_of(word) in PLACES and ABSOLUTE.search(word))]
    return command if kept == words else shlex.join(kept)


def _each_without_paths(value: Any) -> Any:
    """Return a value of JSON whose texts have no absolute paths."""
    if isinstance(value, dict):
        return {key: _each_without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_each_without_paths(each) for each in value]
    return without_paths(value) if isinstance(value, str) else value


def without_paths(text: str) -> str:
    """Return a text without absolute paths."""

    def relative(found: re.Match[str]) -> str:
        path = Path(found[0])
        below = shown(path)
        return str(below) if below != path else f".../{path.name}"

    return ABSOLUTE.sub(relative, text.replace("file://", ""))
