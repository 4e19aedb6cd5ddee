"""Entries for single layers in `model.routers` and `model.experts_by_layer`, such as 0-2:WHAT, joined by +."""

import re
from collections.abc import Iterable, Iterator

from moe.checks import ConfigError, require


def read_entries(key: str, text: str, what: str, *, form: str) -> Iterator[tuple[int, int, re.Match[str]]]:
    """Yield first layer, last layer and match of each entry. The groups of the pattern `what` begin with number 3.

    Raises ConfigError, which names `key` and says that it must be `form`, at an entry that is not like this.
    """
    for part in text.split("+"):
        match = re.fullmatch(rf"\s*([0-9]{{1,6}})(?:-([0-9]{{1,6}}))?:{what}\s*", part)
        if match is None:
            raise ConfigError(f"{key}={text:.200}: must be {form}; wrong: {part.strip()!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        require(first <= last, key, text, f"entries whose first layer is not after the last; wrong: {part}")
        yield first, last, match


def check_layers(key: str, text: str, spans: Iterable[tuple[int, int]], *, dense: int, layers: int) -> None:
    """Raise ConfigError unless all layers of the entries have experts.

    spans: first and last layer of each entry. dense, layers: the number of first layers without experts, and of all
    layers.
    """
    require(dense < layers, key, text, "null, because no layer has experts")
    allowed = f"layers from {dense} to {layers - 1}, those that have experts"
    require(all(dense <= first and last < layers for first, last in spans), key, text, allowed)


def name_layers(first: int, last: int) -> str:
    """Return how an entry writes its layers: 0-2, or 0 for a single one."""
    return str(first) if first == last else f"{first}-{last}"


def in_words(text: str) -> str:
    """Return entries for layers in words: of 0:hash+0:balanced:true+0:k:2, "layer 0: hash, balanced, k=2".

    Of 0-1:4 it is "layers 0 to 1: 4 experts". Any other text stays as it is.
    """
    said: dict[str, list[str]] = {}
    for entry in text.split("+"):
        match = re.fullmatch(r"([0-9]+(?:-[0-9]+)?):([\w.-]+)(?::([^:]*))?", entry)
        if match is None:
            return text
        layers, word, value = match.groups()
        if value is None:
            words = f"{word} expert{'' if word == '1' else 's'}" if word.isdigit() else word
        else:
            words = {"true": word, "false": f"not {word}"}.get(value, f"{word}={value}")
        said.setdefault(f"layer{'s' if '-' in layers else ''} {layers.replace('-', ' to ')}", []).append(words)
    return "; ".join(f"{layers}: {', '.join(words)}" for layers, words in said.items())
