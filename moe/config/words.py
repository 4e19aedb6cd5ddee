"""Values as words of a command, in Hydra's grammar."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe.files import shown

SEARCHED = "hydra.searchpath"  # the key that names several folders of options
PLAIN = re.compile(r"[A-Za-z_]\w*(\.\w+)*|\$\{[\w.:]+\}")  # a text that needs no quotes: a.b, ${equal_flops:64}
KEYWORDS = ("null", "none", "true", "false", "inf", "nan")  # words that Hydra's grammar does not read as text


def as_word(value: Any) -> str:
    """Return a value as Hydra's grammar writes it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{as_word(each)}' for name, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(as_word, value))}]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in KEYWORDS else quote(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def with_words(words: Iterable[str], *others: str) -> list[str]:
    """Return the words of a command with other ones, which replace those that set the same keys."""
    keys = {key_of(word) for word in others}
    return [*(word for word in words if key_of(word) not in keys), *others]


def key_of(word: str) -> str:
    """Return the key that an override sets: of ++router.k=2, router.k."""
    return word.partition("=")[0].lstrip("+~")


def searched(folders: Iterable[Path | str]) -> list[str]:
    """Return the words of a command that name folders of options outside of this project; none without folders."""
    named = [str(shown(Path(folder))) for folder in folders]
    return ["--config-dir", *named] if len(named) == 1 else [f"{SEARCHED}={as_word(named)}"] if named else []


def quoted(text: str) -> str:
    """Return a text as the value of an override, in quotes unless it is a path of plain characters."""
    return text if re.fullmatch(r"[\w.-]*(/[\w.-]+)+", text) else quote(text)


def quote(text: str) -> str:
    """Return a text in double quotes. Backslashes have a meaning only before a quote, and are doubled there."""
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', r"\""), text)
    return f'"{escaped}"'
