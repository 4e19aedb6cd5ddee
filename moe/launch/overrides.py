"""Read the overrides of a command line with Hydra's grammar, and check each of them by itself."""

import logging
import pickle
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
    Sweep,
)
from omegaconf import OmegaConf, open_dict

from moe.checks import ConfigError, first_line, one_of, require, unknown
from moe.config.options import CLASSES, GROUPS, options, router_spec, search_path
from moe.config.schema import Config, allowed_values
from moe.config.words import KEYWORDS, as_word, quote
from moe.launch.hydra_errors import FAULTS, cause_of

log = logging.getLogger(__name__)
SEARCH_KEYS = tuple(f"hydra.sweeper.{key}" for key in ("n_trials", "n_jobs", "direction", "metric", "sampler.seed"))
HYDRA_KEYS = (  # those that a user may set
    *("hydra/launcher", "hydra.sweeper.max_batch_size", "hydra.launcher."),
    *("hydra/sweeper", *SEARCH_KEYS),
)
SETTABLE = ", ".join(
    f"{k}KEY" if k.endswith(".") else k for k in (*HYDRA_KEYS, "hydra/sweeper/sampler", "hydra.searchpath")
)
SWEEPERS = {"hydra/sweeper": ("basic", "optuna"), "hydra/sweeper/sampler": ("tpe", "random")}
INNER_ROUTER = "adapter.router"  # a router inside of an adapter, which is no config group of its own
PLACES = ("out", "results")  # folders from which the grid of an experiment may follow
ONE_PER_COMMAND = ("experiment", *PLACES)
DEFAULTS = ("variant=null",)  # defaults that are no option; Hydra cannot choose them, so they are left out
MOST_CELLS = 10_000  # of one sweep


GRAMMAR = OverridesParser.create()


@lru_cache(MOST_CELLS)
def parsed(line: str) -> Override:
    """Return an override that Hydra's grammar can read. Nobody may change it.

    The overrides of a sweep's cells have few different lines, and to read them takes a third of the time of composing.
    """
    return GRAMMAR.parse_overrides([line])[0]


def parse_override(word: str) -> Override:
    """Read one word of the command line, with Hydra's grammar.

    A value that this grammar cannot read, such as a path with "ä" or "=", is taken as text if it has no character that
    means something in the grammar.
    """
    loader = GlobalHydra.instance().config_loader()
    key, equals, value = word.partition("=")
    commas = [part.strip() for part in value.split(",")] if value[:1] not in ("", "'", '"', "[", "{") else [value]
    if "" in commas[1:]:
        place = "after the last comma" if commas[-1] == "" else "between two commas"
        raise ConfigError(f"{word:.200}: a value is missing {place}")
    if any("\ud800" <= character <= "\udfff" for character in word):
        raise ConfigError(f"cannot read the command line: {word:.200}: must be UTF-8")
    items = [quote(item.strip()) for item in value[1:-1].split(",")] if value[:1] + value[-1:] == "[]" else None
    as_text = f"{key}={quote(value)}" if items is None else f"{key}=[{','.join(items)}]"
    try:
        return replace(parsed(word), config_loader=loader)
    except FAULTS as error:
        cause = cause_of(error)
        if error.__cause__ is not None:  # the value is a function of this grammar, or looks like one
            cause = f"{first_line(error.__cause__)}; a text needs quotes"
            raise ConfigError(f"cannot read the command line: {word:.200}: {cause:.300}") from None
    if not equals:
        example = f"{word}=OPTION" if word in GROUPS else "key=value"
        raise ConfigError(f"cannot read the command line: {word:.200}: write {example}")
    try:
        override = replace(parsed(as_text), config_loader=loader)
    except FAULTS:
        raise ConfigError(f"cannot read the command line: {word:.200}: {cause:.300}") from None
    if set(value) & set("""'"()[]{},$\\""") or len(value) > 1000:
        raise ConfigError(f"cannot read the command line: {word:.200}: put a text in quotes, like '{as_text:.200}'")
    return override


def only_last_of_each_key(overrides: list[Override]) -> list[Override]:
    """Return the overrides without those that a later one overrules, and log these."""
    last = {override.get_key_element(): override for override in overrides}
    for override in overrides:
        if (overruling := last[override.get_key_element()]) is not override:
            log.warning("%s is given twice: %s counts", override.key_or_group, overruling.input_line)
    return [override for override in overrides if last[override.get_key_element()] is override]


def with_added_keys(overrides: list[Override]) -> list[Override]:
    """Return the overrides with the keys of a class that the command names itself marked as added, by "++".

    Only the class knows which keys it takes. So `router._target_=a.B router.k=1`, `+router.k=1` and
    `router={_target_: a.B, k: 1}` all become `router._target_=a.B ++router.k=1`. In this way, `adapter.router=topk`
    becomes the class and the settings of router=topk.
    """
    parts: list[Override] = []
    for override in overrides:
        value = None if override.is_sweep_override() else override.value()
        if override.key_or_group == INNER_ROUTER and isinstance(value, str):
            one_of(INNER_ROUTER, value, options("router"))
            value = router_spec(value)
        if override.key_or_group in CLASSES and isinstance(value, dict) and "_target_" in value:
            words = [f"{override.key_or_group}.{name}={as_word(each)}" for name, each in value.items()]
            parts += map(parse_override, words)
        else:
            parts.append(override)
    own = {key for key in CLASSES if any(part.key_or_group == f"{key}._target_" for part in parts)}

    def is_added(part: Override) -> bool:
        node, _, name = part.key_or_group.rpartition(".")
        return name != "_target_" and (node in own or (part.is_add() and node in CLASSES)) and not part.is_delete()

    return [parse_override(f"++{str(part.input_line).lstrip('+')}") if is_added(part) else part for part in parts]


def lines_of(overrides: list[Override]) -> list[str]:
    """Return overrides as words of a command line for Hydra, without `DEFAULTS`."""
    return [str(override.input_line) for override in overrides if override.input_line not in DEFAULTS]


def is_group(override: Override) -> bool:
    return override.key_or_group in GROUPS


def values(override: Override) -> list[Any]:
    """Return the values of an override, of their own types."""
    found = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    return [value.text if isinstance(value, QuotedString) else value for value in found]


def values_of(override: Override) -> list[str]:
    """Return the values of an override as text: several of a sweep, otherwise one."""
    if isinstance(override.value(), IntervalSweep):
        return [str(override.input_line).partition("=")[2]]
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if any(isinstance(item, Sweep) for item in getattr(override.value(), "list", ())):
        raise ConfigError(f"{override.input_line}: an interval or a range stands alone, or list single values as a,b,c")
    try:
        return list(override.sweep_string_iterator())
    except FAULTS as error:
        raise ConfigError(f"{override.input_line}: {cause_of(error)}") from None


def check_override(override: Override) -> None:
    """Raise ConfigError for an override whose key or kind is not allowed, and for an unknown option of a group."""
    line, key = override.input_line, override.key_or_group
    adds_or_deletes = override.is_add() or override.is_force_add() or override.is_delete()
    if adds_or_deletes and not key.startswith(tuple(f"{each}." for each in CLASSES)):
        places = ", ".join(CLASSES)
        raise ConfigError(f"{line}: keys can be added and deleted only in {places}; set others as key=value")
    if override.is_add() and key.endswith("._target_"):
        raise ConfigError(f"{line}: write {str(line).lstrip('+')}, without +")
    if override.package is not None:
        raise ConfigError(f"{line}: a group cannot be moved; write {key}=...")
    if not key:
        raise ConfigError(f"{line}: the key is missing; write key=value")
    if key.startswith("hydra.sweeper.") and not key.startswith((*HYDRA_KEYS, "hydra.sweeper.params")):
        raise unknown("setting of a search", key, SEARCH_KEYS)
    if not key.startswith(HYDRA_KEYS) and key.partition(".")[0].partition("/")[0] == "hydra":
        folder = key.rpartition(".")[2] in ("dir", "subdir", "chdir", "output_subdir")
        raise ConfigError(
            f"{line}: write out=DIR, which sets the folder of the runs"
            if folder
            else f"{line}: of Hydra's settings only {SETTABLE} can be set"
        )
    if override.is_sweep_override() and (key in ONE_PER_COMMAND or override.is_hydra_override()):
        raise ConfigError(f"{line}: a command has one {key}; give one command for each")
    if key in SWEEPERS:
        one_of(key, str(override.value()), SWEEPERS[key])
    values = values_of(override)
    if not values:
        raise ConfigError(f"{line}: this stands for no value")
    if "{}" in values and key not in GROUPS:
        raise ConfigError(
            f"{line}: an object without keys changes nothing; set the keys that differ, as {key}.KEY=VALUE"
        )
    for value in values if key in GROUPS else ():
        if value not in options(key) and f"{key}={value}" not in DEFAULTS:
            others = [f"{group}={value}" for group in GROUPS if group != key and value in options(group)]
            if others:
                raise ConfigError(f"unknown option of {key} '{value}'; there is {' and '.join(others)}")
            raise _unknown_option(key, value)


def check_grid(overrides: list[Override]) -> None:
    """Raise ConfigError for overrides of a search in a command that trains a run or a grid, and for too many cells."""
    check_number(overrides)
    for override in overrides:
        check_discrete(override)
        if override.key_or_group.startswith((*SEARCH_KEYS, "hydra/sweeper/")):
            raise ConfigError(
                f"{override.input_line}: a setting of a search; add hydra/sweeper=optuna, or leave it out"
            )


def check_discrete(override: Override) -> None:
    """Raise ConfigError for an interval, which has no list of values."""
    if override.is_sweep_override() and not override.is_discrete_sweep():
        listed = "write them as a,b,c or range(start,stop,step)"
        search = "add hydra/sweeper=optuna to search in it"
        raise ConfigError(f"{override.input_line}: an interval has no list of values; {listed}, or {search}")


def _unknown_option(group: str, value: str) -> ConfigError:
    """Return the error for an option that does not exist. It says how a class or an option of the user is named."""
    error = unknown(f"option of {group}", value, options(group))
    node = next((key for key, of_group in CLASSES.items() if of_group == group), None)
    if node and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value):
        return ConfigError(f"unknown option of {group} '{value}'; for a class write {node}._target_={value}")
    if node and value.startswith("{") and "_target_" in value:
        swept = f"{node}._target_=A,B, and their keys as {node}.KEY=VALUE"
        return ConfigError(f"{group}={value}: a sweep of classes is written as {swept}")
    if "; nearest: " in str(error):
        return error
    advice = "" if "; known: " in str(error) else "; --help lists all"
    if not search_path() and value.isidentifier() and value not in KEYWORDS:
        advice = f"; name a folder that holds {group}/{value}.yaml by --config-dir or MOE_SEARCH_PATH{advice}"
    return ConfigError(f"{error}{advice}")


def check_number(overrides: Iterable[Override]) -> None:
    """Raise ConfigError if overrides span too many cells. Nothing is listed, so that this takes no time."""
    number = 1.0
    for override in overrides:
        value = override.value()
        if isinstance(value, RangeSweep):
            if value.step == 0:
                raise ConfigError(f"{override.input_line}: the step must not be 0")
            number *= max(0.0, (float(value.stop or 0) - float(value.start or 0)) / float(value.step))
        elif isinstance(value, ChoiceSweep):
            number *= len(value.list)
        if number > MOST_CELLS:
            limit = f"a sweep has at most {MOST_CELLS:,} cells, and this one has {number:,.0f}"
            raise ConfigError(f"{override.input_line}: {limit}")


def check_type(override: Override) -> None:
    """Raise ConfigError for a value that does not fit the type of its key in `Config`."""
    key = override.key_or_group
    allowed = None if key in GROUPS or override.is_hydra_override() else allowed_values(key)
    if allowed is None:
        return
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    typed_words = str(override.input_line).partition("=")[2].split(",")
    if len(typed_words) != len(values):
        typed_words = values_of(override)
    for value, word in zip(values, typed_words, strict=True):
        if (error := misfit(key, value)) is None:
            continue
        if isinstance(value, (list, dict)) and misfit(key, type(value)()) is None:  # one of its parts is wrong
            raise ConfigError(f"{override.input_line:.200}: {cause_of(error)}")
        parts = value if isinstance(value, list) else []
        if len(parts) > 1 and all(misfit(key, part) is None for part in parts):
            swept = f"-m {key}={','.join(map(as_word, parts))}"
            raise ConfigError(f"{key}={word}: must be {allowed}; for several values in a sweep write {swept}")
        require(False, key, word, allowed)


@cache
def _pickled_schema() -> bytes:
    """Return `Config` with its types as OmegaConf's container, pickled, because building it takes long."""
    return pickle.dumps(OmegaConf.structured(Config))


@cache
def _pickled_section(section: str) -> bytes:
    """Return `Config` with no other key than this one, pickled: a copy takes a quarter of the time or less."""
    schema = pickle.loads(_pickled_schema())
    with open_dict(schema):
        for other in {*schema} - {section}:
            del schema[other]
    return pickle.dumps(schema)


def misfit(key: str, value: object) -> Exception | None:
    """Return why `Config` does not take a value for a key; None if it does."""
    try:
        OmegaConf.update(pickle.loads(_pickled_section(key.partition(".")[0])), key, value)
    except FAULTS as error:
        return error
    return None
