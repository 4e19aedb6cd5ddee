"""plan.json: a plan with its time and fingerprint, and without paths of the machine on which it was made."""

import json
import re
import shlex
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from moe.checks import ConfigError
from moe.config.words import key_of
from moe.files import read_text, shown, write_json
from moe.runs.planned import digest_of_plan

MEASURED = ("time", "digest", "seconds", "seconds_from")  # what differs between two plans that plan the same
PLACES = ("out", "data.cache")  # keys that only say where files lie on a machine
ABSOLUTE = re.compile(r"(?<![\w.~}$/])/+(?=[^/\s])[^\s,\]\"'}]*")


def write_plan(path: Path, plan: dict[str, Any]) -> str:
    """Write a plan, and return in words what is in the file now. No earlier plan is lost.

    A file that plans the same stays as it is, with the time at which that was planned first. Any other plan in its
    place gets the next free number in its name. Raises ConfigError if the file cannot be written.
    """
    content, kept = as_written(plan), None
    try:
        if path.exists():
            earlier = json.loads(read_text(path))
            if _same(earlier) == _same(json.loads(json.dumps(content))):
                return f"plan: {shown(path)}, which plans the same since {earlier.get('time', 'an earlier time')}"
            numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
            kept = next(each for each in numbered if not each.exists())
            path.rename(kept)
        write_json(path, content)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {path}: cannot be written ({error})") from error
    return f"plan: {shown(path)}" + (f" (the earlier plan is now {shown(kept)})" if kept else "")


def _same(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what two plans that plan the same have in common: all but times, and the fingerprint, which has them."""
    return {key: value for key, value in plan.items() if key not in MEASURED}


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
