"""Numbers of experts of single layers: the text of the key `model.experts_by_layer`.

The text is a list of entries, joined by +. An entry `0-2:4` gives each of the layers 0 to 2 four experts. The other
layers have `model.num_experts`.
"""

from typing import NamedTuple

from moe.checks import ConfigError, require
from moe.config.layer_entries import check_layers, name_layers, read_entries

KEY = "model.experts_by_layer"
FORM = "entries such as 0-2:4 (layers 0 to 2 have four experts), joined by +"


class _Part(NamedTuple):
    """Layers, from first to last, that have so many experts each."""

    first: int
    last: int
    experts: int


def _parts(text: str) -> list[_Part]:
    """Return the parts that a text stands for, by layer. Neighbors have different numbers."""
    parts = []
    for first, last, match in read_entries(KEY, text, "([0-9]{1,7})", form=FORM):
        part = _Part(first, last, int(match[3]))
        require(1 <= part.experts <= 10**6, KEY, text, f"entries of 1 to 10^6 experts; wrong: {match.string}")
        parts.append(part)
    joined = list[_Part]()
    for part in sorted(parts):
        if joined and part.first <= joined[-1].last:
            raise ConfigError(f"{KEY}={text}: must be one entry for each layer; layer {part.first} has several")
        if joined and (joined[-1].last + 1, joined[-1].experts) == (part.first, part.experts):
            part = part._replace(first=joined.pop().first)
        joined.append(part)
    return joined


def _written(parts: list[_Part]) -> str:
    return "+".join(f"{name_layers(first, last)}:{experts}" for first, last, experts in parts)


def explicit(text: str) -> str:
    """Return the one text that gives the layers these numbers: by layer, with as few entries as possible."""
    return _written(_parts(text))


def check(text: str, *, dense: int, layers: int) -> None:
    """Raise ConfigError unless the text names MoE layers, and leaves out one of them at least.

    dense, layers: the number of first layers without experts, and of all layers.
    """
    parts = _parts(text)
    check_layers(KEY, text, [(part.first, part.last) for part in parts], dense=dense, layers=layers)
    allowed = "left out for one layer at least: model.num_experts is the number of experts of the others"
    require(sum(part.last - part.first + 1 for part in parts) < layers - dense, KEY, text, allowed)


def check_changes(text: str, numbers: list[int]) -> None:
    """Raise ConfigError for layers that the text gives the number of the others, with each of these `numbers`."""
    for part in _parts(text):
        allowed = f"entries for layers with another number of experts; layer {part.first} has {part.experts} anyway"
        require(any(part.experts != number for number in numbers), KEY, text, allowed)


def in_effect(text: str, experts: int) -> str | None:
    """Return the text without the layers that have as many experts as the others; None if none is left."""
    return _written([part for part in _parts(text) if part.experts != experts]) or None


def of_layer(text: str | None, layer: int, experts: int) -> int:
    """Return the number of experts of a layer. experts: that of the layers that the text does not name."""
    parts = _parts(text) if text else []
    return next((part.experts for part in parts if part.first <= layer <= part.last), experts)


def named(text: str | None, experts: int, others: int) -> str:
    """Return how an error about a router begins: with the key, if it gives the router's layer its number of experts.

    experts, others: the number of the router's layer, and of the layers that the text does not name.
    """
    return "" if text is None or experts == others else f"{KEY}={text}: "
