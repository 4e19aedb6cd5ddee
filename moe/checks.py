"""One-line complaints about configuration: key, value, what is allowed, and the nearest name."""

import difflib
import inspect
import math
import pydoc
from collections.abc import Callable, Iterable, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


class ConfigError(ValueError):
    """The user's configuration is wrong; the message is one line, made to be read on a terminal."""


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` naming `key`, `value` and what is `allowed`, unless `ok`."""
    if not ok:
        raise ConfigError(f"{key}={value}: must be {allowed}")


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raise `ConfigError` unless `value` is one of the `allowed` words."""
    require(value in (words := list(allowed)), key, value, f"one of {', '.join(words)}{_nearest(value, words)}")


def finite(value: float) -> bool:
    """True for an ordinary number: not nan, not inf."""
    return isinstance(value, int | float) and math.isfinite(value)


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a `name` that is not among the `known` ones, with the nearest of them."""
    names = sorted(known)
    listing = f"; known: {', '.join(names)}" if len(names) <= 20 else ""
    return ConfigError(f"unknown {kind} '{name}'{_nearest(name, names)}{listing}")


def locate(path: object) -> Callable[..., Any]:
    """The class or function that a dotted `_target_` names."""
    found = pydoc.locate(path) if isinstance(path, str) else None
    if not callable(found):
        raise ConfigError(f"_target_={path}: must name a class or function that can be imported")
    return found


def build(spec: Any, key: str, *args: Any) -> Any:
    """Call `spec["_target_"]` with `args` and the other entries of `spec` as keywords, names and types checked first.

    `key` is where the spec stands in the configuration (`"router"`), for messages.
    """
    if not isinstance(spec, dict) or "_target_" not in spec:
        raise ConfigError(f"{key}={spec}: must name its class as {key}._target_")
    target = locate(spec["_target_"])
    values = {name: value for name, value in spec.items() if name != "_target_"}
    parameters = list(inspect.signature(target).parameters.values())[len(args) :]
    types = {p.name: p.annotation for p in parameters}
    for name, value in values.items():
        if name not in types:
            raise unknown(f"key of {key}", f"{key}.{name}", (f"{key}.{known}" for known in types))
        require(_fits(value, types[name]), f"{key}.{name}", value, _describe(types[name]))
        if types[name] is float:
            values[name] = float(value)
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in values]
    if missing:
        raise ConfigError(f"{key}.{missing[0]} is missing")
    try:
        return target(*args, **values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; nearest: {near[0]}" if near else ""


def _fits(value: object, annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) in (list, tuple, Sequence):  # yaml has lists only
        return isinstance(value, list) and all(_fits(item, get_args(annotation)[0]) for item in value)
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(annotation))
    if annotation is float:  # a whole number is a fine float; True is not a number
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation) if isinstance(annotation, type) else value is annotation


def _describe(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if get_origin(annotation) in (list, tuple, Sequence):
        return f"a list of {_describe(get_args(annotation)[0])}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_describe(option) for option in get_args(annotation))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}.get(
        annotation, str(annotation)
    )
