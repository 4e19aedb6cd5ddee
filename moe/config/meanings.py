"""What each key of the configuration means: the comments beside the fields, and the docstrings of the classes.

The comment of a field of `Config`, or of a dataclass in it, says what the key is, its unit and what it may be. A class
that an option names (a router, a schedule, a source of text) explains its settings in its docstring, one after another
as "name: meaning" or "name, other: meaning"; a class that derives from it need not repeat them.
"""

import ast
import inspect
import io
import re
import tokenize
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from moe.config.classes import locate
from moe.config.options import CLASSES, GROUPS
from moe.config.schema import Config


@cache
def of_fields(holder: type) -> dict[str, str]:
    """Return the comment beside each field of a dataclass that has one. The class is not inside of another one."""
    classes, comments = _classes_and_comments(inspect.getmodule(holder))
    found = {}
    for node in classes[holder.__name__].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return {name: comment for name, comment in found.items() if comment}


@cache
def _classes_and_comments(module: Any) -> tuple[dict[str, ast.ClassDef], dict[int, str]]:
    """Return the classes of a module by their names, and its comments by their lines."""
    source = inspect.getsource(module)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}, comments


@cache
def of_settings(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class, and of those that it derives from, say about its settings."""
    found: dict[str, str] = {}
    names = settings(cls)
    for parent in reversed(cls.__mro__):
        found |= _entries(inspect.cleandoc(vars(parent).get("__doc__") or ""), names.keys())
    return {name: entry.removesuffix(".") for name, entry in found.items()}


def settings(cls: type) -> dict[str, Any]:
    """Return the settings of a class that an option names, with their defaults; `inspect.Parameter.empty` for none."""
    parameters = list(inspect.signature(cls).parameters.values())
    if not is_dataclass(cls):
        parameters = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return {p.name: p.default for p in parameters}


def _entries(text: str, names: Any) -> dict[str, str]:
    """Return the entries "name: meaning" of a docstring, each with its continuation, which is indented further."""
    found: dict[str, str] = {}
    current, depth = list[str](), 0
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        entry = re.fullmatch(r"\s*(\w+(?:, \w+)*): (.*)", line)
        if entry and set(words := entry[1].split(", ")) <= set(names):
            current, depth = words, indent
            found |= dict.fromkeys(words, entry[2])
        elif current and line.strip() and indent > depth:
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        else:
            current = []
    return found


def meaning(key: str, targets: dict[str, str]) -> str | None:
    """Return what a flat key such as "model.dim" or "router.k" means; None if nothing says so.

    targets: the dotted name of the class at each node of `CLASSES`. The code of a class is imported.
    """
    node, _, name = key.rpartition(".")
    if node in CLASSES:
        if node not in targets:
            return None
        cls: type = locate(targets[node], node, trusted=True)
        return of_settings(cls).get(name)
    holder = get_type_hints(Config).get(node, Config) if node else Config
    return of_fields(holder).get(name) if is_dataclass(holder) else None


def all_keys() -> list[str]:
    """Return the keys of `Config` outside of the groups, and those of the groups that have the same in each option."""
    types, found = get_type_hints(Config), []
    for each in fields(Config):
        if is_dataclass(types[each.name]):
            below = [f"{each.name}.{inner.name}" for inner in fields(types[each.name])]
            found += [key for key in below if key not in CLASSES]
        elif each.name not in GROUPS:
            found.append(each.name)
    return found
