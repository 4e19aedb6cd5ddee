"""Check input and report mistakes in one line: the key, its value, what is allowed, and the nearest known name."""

import contextlib
import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

T = TypeVar("T")

REQUIRED = "???"  # the default of a key that has none, in a configuration; OmegaConf calls it MISSING


class ConfigError(ValueError):
    """The user's configuration is wrong. The message is one line for a terminal, whatever it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


METRICS_LISTED = "; docs/metrics.md lists them"


def first_line(error: object) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def not_on_hub(error: Exception) -> str:
    """Return why the Hugging Face Hub did not give a repository or a file, with the first line of its answer.

    error: of the hub's library, of its HTTP library, or of the operating system.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds = {each.__name__ for each in type(error).__mro__}
    if "GatedRepoError" in kinds or status == 403:
        why = "the hub gives it only to users who are logged in (`hf auth login`) and have accepted its terms"
    elif status == 429:
        why = "the hub takes no more requests for now; try again later"
    elif kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "HFValidationError"}:
        why = "none on the hub"
    else:
        why = "the hub does not answer"
    return f"{why} ({first_line(error)})"


def described(error: BaseException) -> str:
    """Return the class of an error and the first line of its message, such as "RuntimeError: boom"."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` naming `key`, `value` and what is `allowed`, unless `ok`."""
    if not ok:
        raise ConfigError(f"{key}={_on_one_line(_as_typed(value))}: must be {allowed}")


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raise `ConfigError` unless `value` is one of the `allowed` words."""
    require(value in (words := list(allowed)), key, value, f"one of {', '.join(words)}{_nearest(value, words)}")


def finite(value: float) -> bool:
    """Return whether `value` is a number and neither nan nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a `name` that is not among the `known` ones.

    It names those nearest to it, or else all; if there are too many metrics for that, the page that lists them.
    """
    names = sorted(known)
    listing = (
        f"; known: {', '.join(names)}" if len(names) <= 20 else METRICS_LISTED if kind.startswith("metric") else ""
    )
    return ConfigError(f"unknown {kind} '{_on_one_line(name)}'{_nearest(name, names) or listing}")


def check_settings(settings: dict[str, Any], target: type[Any], place: str, *, positional: int) -> dict[str, Any]:
    """Return keyword arguments for a class, with whole numbers as floats where it wants floats.

    positional: how many arguments the class gets besides. A parameter without a type takes anything, and so does one
    whose type is written as text that has no meaning where the class is defined. A class with `**settings` takes every
    key. Raises ConfigError for a key that the class does not take, a value that does not fit, and a missing key.
    """
    try:
        signature = inspect.signature(target, eval_str=True)
    except Exception:  # a type may be imported for type checkers alone
        signature = inspect.signature(target)
    found = list(signature.parameters.values())
    by_place = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][positional:]
    parameters = by_place + [p for p in found if p.kind is p.KEYWORD_ONLY]
    free = any(p.kind is p.VAR_KEYWORD for p in found)
    types = {
        p.name: Any if p.annotation is p.empty or isinstance(p.annotation, str) else p.annotation for p in parameters
    }
    types = (dict.fromkeys(settings, Any) if free else {}) | types
    check_values(settings, types, place)
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in settings]
    if missing:
        raise ConfigError(f"{place}.{missing[0]} is missing")
    return {name: float(value) if types[name] is float else value for name, value in settings.items()}


def check_values(values: dict[str, Any], types: dict[str, Any], place: str) -> None:
    """Raise ConfigError unless every name in `values` is in `types`, and every value fits the annotation there."""
    for name, value in values.items():
        if name not in types:
            raise unknown(f"key of {place}", f"{place}.{name}", (f"{place}.{known}" for known in types))
        require(_fits(value, types[name]), f"{place}.{name}", value, describe(types[name]))


def parse(kind: type[T], content: object, place: str = "") -> T:
    """Convert JSON `content` to an instance of `kind`, which is a dataclass, NamedTuple or TypedDict.

    The keys must be the fields of `kind`, and every value must fit its annotation. A field that is not there has its
    default. `place` says where in its file the content was found, such as "config.model". Raises
    ValueError, with a message of one line that names the key.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{place or 'the content'} is {_shorten(content)}: must be an object")
    types = _field_types(cast(Any, kind))
    for name in content:
        if name not in types:
            raise unknown("key", _join(place, name), (_join(place, known) for known in types))
    for name in types:
        if name not in content and name not in _optional(cast(Any, kind)):
            raise ValueError(f"{_join(place, name)} is missing")
    return kind(**{name: _parse_value(types[name], content[name], _join(place, name)) for name in content})


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    types = get_type_hints(kind)
    return {name: annotation for name, annotation in types.items() if get_origin(annotation) is not ClassVar}


@cache
def _optional(kind: Any) -> frozenset[str]:
    """Return the fields that have a default. A section of a configuration has one if its fields do."""

    def has_default(field: Field[Any]) -> bool:
        made_by = field.default_factory
        if is_dataclass(made_by):
            return {each.name for each in fields(made_by)} == _optional(made_by)
        return made_by is not MISSING or field.default not in (MISSING, REQUIRED)

    if is_dataclass(kind):
        return frozenset(field.name for field in fields(kind) if has_default(field))
    return frozenset(getattr(kind, "_field_defaults", ()))  # of a NamedTuple


class _Kinds(NamedTuple):
    """What an annotation allows.

    options: the members of a union, or the annotation alone. record, listing, mapping: which of them is a record, a
    list and a dict. simple: those of which every value is fine as it is.
    """

    options: tuple[Any, ...]
    record: Any
    listing: Any
    mapping: Any
    simple: frozenset[Any]


@cache
def _kinds(annotation: Any) -> _Kinds:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return _Kinds(
        options,
        record=next((option for option in options if _is_record(option)), None),
        listing=next((option for option in options if get_origin(option) is list), list[Any]),
        mapping=next((option for option in options if get_origin(option) is dict), None),
        simple=frozenset(options) & {float, str, bool, type(None)},
    )


def _parse_value(annotation: Any, value: object, place: str) -> Any:
    options, record, listing, mapping, _ = _kinds(annotation)
    if record is not None and not (value is None and type(None) in options):
        return parse(record, value, place)
    if listing != list[Any] and isinstance(value, list):
        return [_parse_value(get_args(listing)[0], item, f"{place}[{number}]") for number, item in enumerate(value)]
    if mapping is not None and isinstance(value, dict):
        each = get_args(mapping)[1]
        simple = _kinds(each).simple  # most items: their places, which cost time, are then not needed
        return {k: v if type(v) in simple else _parse_value(each, v, _join(place, k)) for k, v in value.items()}
    if not _fits(value, annotation):
        raise ValueError(f"{place} is {_shorten(value)}: must be {describe(annotation)}")
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value)
    return value


def _is_record(annotation: Any) -> bool:
    if is_typeddict(annotation):
        return True
    return isinstance(annotation, type) and (is_dataclass(annotation) or hasattr(annotation, "_fields"))


def _join(place: str, name: object) -> str:
    return f"{place}.{_on_one_line(name)}" if place else _on_one_line(name)


def _as_typed(value: object) -> object:
    """Return null for None, as a user types it. Booleans stay: Hydra takes True and true."""
    return "null" if value is None else value


def _shorten(value: object) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def _on_one_line(value: object) -> str:
    """Return a value as text without line breaks and characters that control a terminal, cut after 500 characters."""
    text = str(value)
    return (text if text.isprintable() else repr(text))[:500]


def printable(text: str) -> str:
    """Return text in one line, with characters that control a terminal or the direction of writing as escapes."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def escaped(text: str) -> str:
    """Return text on one line of Markdown, escaped so that text from the data cannot become HTML or a link.

    Outside of code, a `#` at an end is no mark of a heading, and a `_` at an end of a word emphasizes nothing.
    """
    parts = re.split(r"((?<!\\)`[^`]*`)", one_line(text).replace("<", "&lt;").replace("](", "]\\("))
    parts[::2] = [re.sub(r"(?<!\\)(?:(?<![^\W_])_|_(?![^\W_])|^#|#$)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def one_line(text: str) -> str:
    """Return text with its line breaks replaced by spaces, and with what controls a terminal as escapes."""
    return printable(" ".join(text.splitlines()))


def plain(text: str) -> str:
    """Return text with large numbers in plain notation: 180 for 1.8e+02."""
    return re.sub(r"\d(?:\.\d+)?e\+\d\d\b", lambda number: f"{float(number[0]):.0f}", text)


def _nearest(name: str, names: list[str]) -> str:
    """Return the name that is nearly the same, such as layers for layer, or else those that have `name` as a part, such
    as optimizer.muon_lr for lr, or else those that begin with it, or whose words have its last word, such as
    routing/load_gini for routing/gini.

    Without any, or with more than five, return the most similar one.

    What `name` has in common with others up to its last dot is no similarity: router.temp is not near router.gate.
    """
    group, dot, last = name.rpartition(".")
    in_group = {other.removeprefix(group + dot): other for other in names if other.startswith(group + dot)}
    if not in_group:
        last, in_group = name, {other: other for other in names}
    near = [in_group[short] for short in difflib.get_close_matches(last, in_group, n=1, cutoff=0.9)]
    near = near or [other for short, other in in_group.items() if last in re.split(r"[._/]", short)]
    if not near and len(last) >= 3:  # the beginning of a name, such as exp for exponential
        near = [other for short, other in in_group.items() if short.startswith(last)]
    word = last.rpartition("/")[2]
    near = near or [other for short, other in in_group.items() if word in re.split(r"[._/]", short)]
    if not 1 <= len(near) <= 5:
        some = [short for short, other in in_group.items() if not near or other in near]
        near = [in_group[short] for short in difflib.get_close_matches(last, some, n=1, cutoff=0.6)]
    return f"; nearest: {', '.join(near)}" if near else ""


def _fits(value: object, annotation: Any) -> bool:
    """Return whether a value from yaml or JSON fits the annotation of a parameter or field."""
    return _test(annotation)(value)


@cache
def _test(annotation: Any) -> Callable[[Any], bool]:
    """Return the function that says whether a value fits an annotation."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return lambda value: True
    if is_typeddict(annotation):
        return lambda value: isinstance(value, dict)
    if origin is Literal:
        return lambda value: value in parts
    if annotation is int:
        return _is_whole
    if annotation is float:  # a whole number is a float too
        return lambda value: isinstance(value, float) or _is_whole(value)
    tests = [_test(part) for part in parts if part is not ...]
    if origin is dict:
        of_keys, of_values = tests
        return lambda value: isinstance(value, dict) and all(of_keys(k) and of_values(v) for k, v in value.items())
    if origin in (list, tuple, Sequence):  # yaml has lists only
        return lambda value: isinstance(value, list) and all(map(tests[0], value))
    if origin in (Union, UnionType):
        return lambda value: any(test(value) for test in tests)
    return lambda value: isinstance(value, annotation) if isinstance(annotation, type) else value is annotation


def _is_whole(value: object) -> bool:
    """Return whether a value is an integer that can become a float. True is no number."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023


def describe(annotation: Any) -> str:
    """Return in words what an annotation allows, such as "a whole number or null"."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if get_origin(annotation) in (list, tuple, Sequence):
        kind = get_args(annotation)[0]
        return f"a list of {'objects' if _is_record(kind) else describe(kind)}"
    if get_origin(annotation) is dict:
        return f"an object, each value {describe(get_args(annotation)[1])}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(describe(option) for option in get_args(annotation))
    return {
        Any: "anything",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "an object",
        type(None): "null",
    }.get(annotation, str(annotation))


def require_path(key: str, path: str) -> None:
    """Raise ConfigError for a path that cannot be one, or that begins with ~ where there is no home directory."""
    require(bool(path.strip()) and "\0" not in path, key, path, "a path")
    require("${" not in path, key, path, "a path without ${")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(os.path.expanduser(path))  # raises OSError for a name that is too long
    require(os.path.expanduser(path)[:1] != "~", key, path, "a path; there is no home for ~")
