"""The overrides that the choice of a checkpoint implies: its own router and its tokenizer."""

import contextlib
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from moe.checks import ConfigError
from moe.config.checkpoints import imported, saved
from moe.config.options import sources
from moe.config.words import as_word, quoted
from moe.launch.hydra_errors import FAULTS
from moe.launch.option_files import preset_of
from moe.launch.overrides import parse_override, parsed, with_added_keys

KEY = "model.checkpoint"


def implied_by_checkpoint(words: Sequence[str]) -> list[str]:
    """Return the overrides that `model.checkpoint=NAME` implies among the words of a command.

    A key that the command gives itself is left out, and the whole router if the command chooses one. Raises ConfigError
    for several checkpoints, and for one that cannot be imported.
    """
    given = {word.partition("=")[0].lstrip("+"): word for word in words}
    if KEY not in given:
        return []
    try:
        override = parsed(given[KEY])
    except FAULTS:  # the parser of the command line says what is wrong
        return []
    if override.is_sweep_override():
        raise ConfigError(f"{given[KEY]:.200}: must be one checkpoint for a command, because each has its own router")
    name = override.value()
    if not isinstance(name, str):
        return []
    words = [] if {"router", "router._target_"} & given.keys() else _router(name)
    return [word for word in [*words, *_tokenizer(name)] if word.partition("=")[0] not in given]


def without_implied(overrides: list[Override]) -> list[Override]:
    """Return the overrides without those that the checkpoint among them implies, which need not name a run.

    A router whose class is not of this project is not implied.
    """
    single = {each.key_or_group: each.value() for each in overrides if not each.is_sweep_override()}
    name = single.get(KEY)
    if not isinstance(name, str):
        return overrides
    words = _tokenizer(name)
    with contextlib.suppress(ConfigError):
        words += _router(name)
    implied = {each.key_or_group: each.value() for each in with_added_keys([*map(parse_override, words)])}
    same = {key for key, value in implied.items() if key in single and single[key] == value}
    return [each for each in overrides if each.key_or_group not in same]


def _tokenizer(name: str) -> list[str]:
    return [f"data.tokenizer={quoted(name)}", "data.vocab_size=null"]


def _router(name: str) -> list[str]:
    """Return the overrides that choose the router of a checkpoint."""
    if saved.is_saved(name, None):
        spec = saved.router(name)
        option = _option(spec)
        settings = spec if option is None else {key: value for key, value in spec.items() if key != "_target_"}
    else:
        option, settings = imported.router(imported.read(name, None))
        settings = {"_target_": "moe.routers.imported.Imported", **settings} if option is None else settings
    if option is None:
        return [f"router={as_word(settings)}"]
    return [f"router={option}", *(f"router.{key}={as_word(value)}" for key, value in settings.items())]


def _option(spec: dict[str, Any]) -> str | None:
    """Return the option of `router` with this class that has the most equal settings; None if there is none.

    Several options have the class of topk, which is the default and comes first.
    """
    found: dict[str, int] = {}
    for option in ("topk", *sources("router")):
        preset = preset_of("router", option) or {}
        if preset.get("_target_") == spec["_target_"] and spec.keys() <= preset.keys():
            found[option] = sum(preset[key] == value for key, value in spec.items())
    return max(found, key=lambda option: found[option], default=None)
