"""Read the options of commands. A mistake is one line; values are checked while the command line is read."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from moe.checks import ConfigError, unknown


class OneLineParser(argparse.ArgumentParser):
    """Parser whose mistakes are one line, with the nearest spelling of an option.

    `parse_args` prints the line and ends the command with exit status 2; `read` raises ConfigError.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))

    def options(self) -> list[str]:
        """Return the options that the parser knows, such as --rounds."""
        return list(self._option_string_actions)

    def read(self, words: list[str]) -> argparse.Namespace:
        """Return the options in the words of a command line. Raises ConfigError for a word that is no option."""
        known = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args
        arguments, others = known(words)
        if others and others[0].startswith("-"):
            raise unknown("option", others[0].partition("=")[0], self.options())
        if others:
            raise ConfigError(f"{others[0]}: belongs to no option; several values of an option are written as A,B,C")
        return arguments

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        try:
            return self.read(sys.argv[1:] if args is None else list(args))
        except ConfigError as error:
            self.exit(2, f"{self.prog}: {error}\n")


def whole(text: str) -> int:
    """Return a whole number > 0."""
    return _number(int, text, "a whole number > 0")


def positive(text: str) -> float:
    """Return a finite number > 0."""
    return _number(float, text, "a finite number > 0")


def seed(text: str) -> int:
    """Return a seed of random numbers."""
    return _number(int, text, "a whole number >= 0", least=0)


def several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a function that reads values with commas between them, each as `read` does, and none twice."""

    def read_all(text: str) -> list[Any]:
        values = [read(word.strip()) for word in text.split(",")]
        for number, value in enumerate(values):
            if value in values[:number]:
                raise argparse.ArgumentTypeError(f"{text}: {value} is given twice")
        return values

    return read_all


def one_of(known: dict[str, Any]) -> Callable[[str], str]:
    """Return a function that reads one of these names."""

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(str(unknown("value", text, known)))
        return text

    return read


def new_file(text: str) -> Path:
    """Return the path of a file that can be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: must be a file in a folder that exists")
    return path


def folder(text: str) -> Path:
    """Return the path of a folder, which need not exist."""
    path = Path(text)
    if not next(each for each in (path, *path.absolute().parents) if each.exists()).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: must be a folder")
    return path


def _number(kind: Callable[[str], Any], text: str, allowed: str, least: float = 0.0) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least and (value > 0 or allowed.endswith(">= 0"))):
        raise argparse.ArgumentTypeError(f"{text}: must be {allowed}")
    return value
