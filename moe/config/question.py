"""The question of an experiment: a text, or a list of its parts, each with the claims that answer it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from moe.checks import require, unknown

KEYS = ("ask", "claims")


class Part(NamedTuple):
    """A part of a question: its words, and the texts of the claims that answer it, which may be none."""

    ask: str
    claims: tuple[str, ...] = ()

    @property
    def alone(self) -> str:
        """The part as a question of its own: "and is it fast," becomes "Is it fast?"."""
        words = self.ask.strip().removeprefix("and ").rstrip(",?.").strip()
        return f"{words[:1].upper()}{words[1:]}?"


def parts_of(question: Any) -> list[Part]:
    """Return the parts of a question in order; a text is one part. Raises ConfigError for a wrong form."""
    if isinstance(question, str):
        return [Part(question)]
    listed = isinstance(question, list) and bool(question)
    require(listed, "question", question, "a text, or a list of parts such as {ask: Is it faster?}")
    return [_part(part, f"question[{number}]") for number, part in enumerate(question)]


def _part(part: Any, key: str) -> Part:
    require(isinstance(part, dict), key, part, "a part such as {ask: Is it faster?, claims: [text of a claim]}")
    for name in part:
        if name not in KEYS:
            raise unknown(f"key of {key}", str(name), KEYS)
    ask, claims = part.get("ask", ""), part.get("claims", [])
    require(isinstance(ask, str) and bool(ask.strip()), f"{key}.ask", ask, "a text that is not empty")
    texts = isinstance(claims, list) and all(isinstance(text, str) for text in claims)
    require(texts, f"{key}.claims", claims, "a list of texts of claims")
    return Part(ask, tuple(claims))


def text_of(parts: list[Part]) -> str:
    """Return the whole question."""
    return " ".join(part.ask.strip() for part in parts)


def applicable(question: Any, claims: Iterable[str]) -> Any:
    """Return a question, but only its text if it names claims and `claims` has none of them.

    Such a question was written for another experiment.
    """
    parts = parts_of(question)
    named = {text for part in parts for text in part.claims}
    return text_of(parts) if named and named.isdisjoint(claims) else question
