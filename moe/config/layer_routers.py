"""Routers of single layers: the text of the key `model.routers`, and the classes and settings that it stands for.

The text is a list of entries, joined by +. An entry `0-2:hash` gives layers 0 to 2 the option `router=hash`, and
`0-2:k:1` gives the routers of these layers another value of a setting. Later entries overrule earlier ones.
"""

import json
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from moe.checks import require, unknown
from moe.config.layer_entries import check_layers, name_layers, read_entries
from moe.config.options import options, router_spec

KEY = "model.routers"
FORM = "entries such as 0-2:hash (an option of router) or 0:k:1 (a setting), joined by +"


class _Entry(NamedTuple):
    """One entry: its layers, from first to last, and an option, or a setting with its value."""

    first: int
    last: int
    word: str
    value: str | None

    def __str__(self) -> str:
        return ":".join([name_layers(self.first, self.last), self.word] + ([] if self.value is None else [self.value]))


def _entries(text: str) -> list[_Entry]:
    found = []
    for first, last, match in read_entries(KEY, text, r"([\w.-]+)(?::([^:]*?))?", form=FORM):
        if match[4] is None and match[3] not in options("router"):
            raise unknown(f"option of router in {KEY}", match[3], options("router"))
        found.append(_Entry(first, last, match[3], match[4]))
    return found


class _Part(NamedTuple):
    """Neighboring layers, from first to last, that have the same option, or none, and the same settings as text."""

    first: int
    last: int
    option: str | None
    settings: dict[str, str]

    def spec(self, router: dict[str, Any]) -> dict[str, Any]:
        """Return class and settings of the router of these layers. router: that of the layers without an entry."""
        start = router if self.option is None else _preset(self.option)
        return start | {name: _value(value) for name, value in self.settings.items()}


def _parts(text: str) -> list[_Part]:
    """Return the parts that a text stands for, by layer."""
    entries, found = _entries(text), list[_Part]()
    for first, after in pairwise(sorted({number for each in entries for number in (each.first, each.last + 1)})):
        option, settings = None, dict[str, str]()
        for each in entries:
            if each.first <= first <= each.last and each.value is None:
                option = each.word
                settings = {name: _text(value) for name, value in _preset(option).items() if name != "_target_"}
            elif each.first <= first <= each.last:
                settings |= {each.word: str(each.value)}
        part = _Part(first, after - 1, option, settings)
        if found and found[-1] == part._replace(first=found[-1].first, last=first - 1):
            found[-1] = found[-1]._replace(last=part.last)
        elif option is not None or settings:
            found.append(part)
    return found


def _written(parts: list[_Part]) -> str:
    """Return the one text that stands for these parts: by layer, the option first and then all settings by name."""
    entries = []
    for part in parts:
        words = [] if part.option is None else [(part.option, None)]
        entries += [_Entry(part.first, part.last, *word) for word in [*words, *sorted(part.settings.items())]]
    return "+".join(map(str, entries))


def explicit(text: str) -> str:
    """Return the text with all settings of its options, so that it says what a run computes.

    Two texts that give all layers the same options and settings become equal.
    """
    return _written(_parts(text))


def _overruled(entry: _Entry, later: list[_Entry]) -> bool:
    """Return whether later entries replace an entry in each of its layers: by an option, or by the same setting."""
    replacing = [each for each in later if each.value is None or each.word == entry.word]
    first_left = {entry.first, *(each.last + 1 for each in replacing)}  # one of these is left, if any layer is
    numbers = [number for number in first_left if entry.first <= number <= entry.last]
    return all(any(each.first <= number <= each.last for each in replacing) for number in numbers)


def check(text: str, *, dense: int, layers: int) -> None:
    """Raise ConfigError unless each entry has an effect, in MoE layers, and one of these at least gets no option.

    Entries may change settings in all MoE layers. dense, layers: the number of first layers without experts, and of
    all layers.
    """
    given, parts = _entries(text), _parts(text)
    for number, each in enumerate(given):
        allowed = f"entries that later ones leave an effect; {each} has none"
        require(not _overruled(each, given[number + 1 :]), KEY, text, allowed)
    check_layers(KEY, text, [(part.first, part.last) for part in parts], dense=dense, layers=layers)
    chosen = sum(part.last - part.first + 1 for part in parts if part.option is not None)
    allowed = "without an option for one layer at least: name the router of the others as router=OPTION"
    require(chosen < layers - dense, KEY, text, allowed)


def check_changes(text: str, routers: list[dict[str, Any]]) -> None:
    """Raise ConfigError for layers that the text gives the router of the others, with each of these `routers`."""
    for part in _parts(text):
        changes = any(part.spec(router) != router for router in routers)
        allowed = f"entries for layers with another router than the others; layer {part.first} has the same one"
        require(changes, KEY, text, allowed)


def in_effect(text: str, router: dict[str, Any]) -> str | None:
    """Return the text without the layers to which it gives the router of the others anyway; None if none is left."""
    return _written([part for part in _parts(text) if part.spec(router) != router]) or None


def specs(text: str | None, router: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return class and settings of the router of each layer that the text names. router: that of the other layers."""
    parts = _parts(text) if text else []
    return {number: part.spec(router) for part in parts for number in range(part.first, part.last + 1)}


def temperature(text: str | None, router: dict[str, Any]) -> float:
    """Return the temperature of the routers that have one: that of `router`, or else of a layer that the text names."""
    return float(router["temp"]) if "temp" in router else _temperature_of_layers(text)


@cache
def _temperature_of_layers(text: str | None) -> float:
    """Return the temperature of the first layer that has one. Each training step asks for it, so it is kept."""
    found = (spec["temp"] for spec in specs(text, {}).values() if "temp" in spec)
    return float(next(found, 1.0))


def _preset(option: str) -> dict[str, Any]:
    """Return class and settings of an option of `router`. Raises ConfigError for a class outside of this project."""
    spec = router_spec(option)
    allowed = f"an option without required keys; choose router={option}, and name the routers of the other layers here"
    require("???" not in spec.values(), KEY, option, allowed)
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
