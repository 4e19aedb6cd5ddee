"""Routers of single layers: the text of the key `model.routers`, and the classes and settings that it stands for.

The text is a list of entries, joined by +. An entry `0-2:hash` gives layers 0 to 2 the option `router=hash`, and
`0-2:k:1` gives the routers of these layers another value of a setting. Later entries overrule earlier ones.
"""

import json
import re
from functools import cache
from typing import Any, NamedTuple

import yaml

from moe.checks import ConfigError, require, unknown
from moe.config.options import options, sources

KEY = "model.routers"
FORM = "entries such as 0-2:hash (an option of router) or 0:k:1 (a setting), joined by +"


class _Entry(NamedTuple):
    """One entry: its layers, from first to last, and an option, or a setting with its value."""

    first: int
    last: int
    word: str
    value: str | None

    def __str__(self) -> str:
        layers = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return ":".join([layers, self.word] + ([] if self.value is None else [self.value]))


def _entries(text: str) -> list[_Entry]:
    found = []
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?:([\w.-]+)(?::([^:]*?))?\s*", part)
        if match is None:
            raise ConfigError(f"{KEY}={text:.200}: must be {FORM}; wrong: {part.strip()!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        require(first <= last, KEY, text, f"entries whose first layer is not after the last; wrong: {part}")
        if match[4] is None and match[3] not in options("router"):
            raise unknown(f"option of router in {KEY}", match[3], options("router"))
        found.append(_Entry(first, last, match[3], match[4]))
    return found


def explicit(text: str) -> str:
    """Return the text with all settings of its options, so that it says what a run computes. Raises ConfigError."""
    given = _entries(text)
    written = []
    for number, each in enumerate(given):
        written.append(each)
        if each.value is None:
            own = {name: value for name, value in _preset(each.word).items() if name != "_target_"}
            settings = [each._replace(word=name, value=_text(own[name])) for name in own]
            written += [setting for setting in settings if not _overruled(setting, given[number + 1 :])]
    return "+".join(map(str, written))


def check(text: str, *, dense: int, layers: int) -> None:
    """Raise ConfigError unless the text names MoE layers, at least one of which keeps the router of the others.

    dense, layers: the number of first layers without experts, and of all layers.
    """
    chosen: list[int] = []
    for each in _entries(text):
        allowed = f"layers from {dense} to {layers - 1}, those that have experts"
        require(dense <= each.first and each.last < layers, KEY, text, allowed)
        if each.value is None:
            chosen += range(each.first, each.last + 1)
    twice = next((number for number in chosen if chosen.count(number) > 1), None)
    require(twice is None, KEY, text, f"at most one option for each layer; layer {twice} has two")
    allowed = "left out for one layer at least: name the router of the others as router=OPTION"
    require(len(chosen) < layers - dense, KEY, text, allowed)


def check_changes(text: str | None, router: dict[str, Any]) -> None:
    """Raise ConfigError for an entry that later ones overrule in all its layers, or layers that keep their router."""
    given = _entries(text) if text else []
    for number, each in enumerate(given):
        allowed = f"entries that later ones leave an effect; {each} has none"
        require(not _overruled(each, given[number + 1 :]), KEY, text, allowed)
    same = next((number for number, spec in specs(text, router).items() if spec == router), None)
    allowed = f"entries for layers with another router than the others; layer {same} has the same one"
    require(same is None, KEY, text, allowed)


def _overruled(entry: _Entry, later: list[_Entry]) -> bool:
    """Return whether later entries replace an entry in each of its layers: an option, or the same setting."""
    replacing = [each for each in later if each.value is None or each.word == entry.word]
    return all(any(each.first <= n <= each.last for each in replacing) for n in range(entry.first, entry.last + 1))


def specs(text: str | None, router: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return class and settings of the router of each layer that the text names. router: that of the other layers."""
    found: dict[int, dict[str, Any]] = {}
    for each in _entries(text) if text else ():
        for number in range(each.first, each.last + 1):
            if each.value is None:
                found[number] = _preset(each.word)
            else:
                found[number] = found.get(number, router) | {each.word: _value(each.value)}
    return found


def temperature(text: str | None, router: dict[str, Any]) -> float:
    """Return the temperature of the routers that have one: that of `router`, or else of a layer that the text names."""
    return float(router["temp"]) if "temp" in router else _temperature_of_layers(text)


@cache
def _temperature_of_layers(text: str | None) -> float:
    """Return the temperature of the first layer that has one. Each training step asks for it, so it is kept."""
    found = (spec["temp"] for spec in specs(text, {}).values() if "temp" in spec)
    return float(next(found, 1.0))


@cache
def _read(option: str) -> str:
    return sources("router")[option].read_text(encoding="utf-8")


def _preset(option: str) -> dict[str, Any]:
    """Return class and settings of an option of `router`. Raises ConfigError for a class outside of this project."""
    spec: dict[str, Any] = yaml.safe_load(_read(option))
    ours = str(spec.get("_target_")).startswith("moe.")
    require(ours, KEY, option, "a router of this project; choose one from outside as router=OPTION")
    return spec


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace("e+", "e")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
