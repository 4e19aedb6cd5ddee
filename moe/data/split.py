"""Divide documents into training, validation and test text, by whole source files."""

import hashlib
import logging
import re
from collections import Counter
from typing import NamedTuple

from moe.data.documents import Document

log = logging.getLogger(__name__)

Corpus = dict[str, list[Document]]  # documents by domain


class Splits(NamedTuple):
    """Documents by domain. Each split has all domains; a domain without documents in a split has an empty list.

    val is for choosing, test is for judging once. test is empty if none was asked for.
    rule: "by source file", or "by position" if validation text comes from the same file as training text.
    test_rule: the same for the test text, or "beyond the limit" if a domain has text of its source beyond its limit.
    """

    train: Corpus
    val: Corpus
    test: Corpus
    rule: str
    test_rule: str | None


def divide(corpus: Corpus, beyond: Corpus, *, val_percent: int, test_percent: int) -> Splits:
    """Divide the documents of a source.

    corpus: those within the limit of the source. val_percent of the characters of each domain are for validation.
    beyond: those beyond the limit, which no run trains on. They are the test text of their domain. A domain with less
    than half of `test_percent` there has test text from its training text instead.

    Test text is thus no validation text that becomes smaller and noisier, and costs no training text where the source
    has more. Training and validation text are then the same as without test text.
    """
    chars = {domain: _chars(documents) for domain, documents in corpus.items()}
    train, val, rule = _hold_out(corpus, chars, val_percent, "validation")
    test: Corpus = {domain: beyond.get(domain, []) if test_percent else [] for domain in corpus}
    lacking = [domain for domain in corpus if 200 * _chars(test[domain]) < test_percent * chars[domain]]
    rules = ["beyond the limit"] if len(lacking) < len(corpus) and test_percent else []
    if lacking:
        stay, held, from_training = _hold_out({d: train[d] for d in lacking}, chars, test_percent, "the test")
        train, test, rules = train | stay, test | held, [*rules, from_training]
    return Splits(train, val, test, rule, " and ".join(rules) or None)


def _hold_out(corpus: Corpus, chars: dict[str, int], percent: int, purpose: str) -> tuple[Corpus, Corpus, str]:
    """Divide documents into those that stay and those that are held out, and say by which rule.

    percent: the share of `chars`, the characters of each domain, to hold out. purpose: for the log.
    """
    parts = {domain: _whole_files(documents, percent * chars[domain]) for domain, documents in corpus.items()}
    by_position = not any(held for _, held in parts.values())
    if by_position:
        parts = {domain: _end(documents, percent * chars[domain]) for domain, documents in corpus.items()}
        log.warning(
            "no domain has a source file to spare for %s: the last %d %% of the characters of each are used, "
            "so this text comes from the same file as training text",
            purpose,
            percent,
        )
    for domain, (_, held) in parts.items():
        if not held:
            log.warning("domain %s has only one source file to train on: none of its text is for %s", domain, purpose)
    stay, held_out = ({domain: part[number] for domain, part in parts.items()} for number in (0, 1))
    return stay, held_out, "by position" if by_position else "by source file"


def _whole_files(documents: list[Document], wanted: int) -> tuple[list[Document], list[Document]]:
    """Divide the documents of one domain. Neither part is empty if there are two source files or more.

    Source files are visited in the order of a hash. Each is held out if it still fits into `wanted` hundredths of
    characters. A file that is too large is skipped, because it could otherwise fill most of them. If no file fits, the
    smallest one is held out.
    """
    chars: Counter[str] = Counter()
    for document in documents:
        chars[document.group] += len(document.text)
    held, held_chars = set[str](), 0
    for group in sorted(chars, key=lambda group: hashlib.sha256(f"{documents[0].domain}/{group}".encode()).digest()):
        if 100 * (held_chars + chars[group]) <= wanted and len(held) + 1 < len(chars):
            held.add(group)
            held_chars += chars[group]
    if not held and len(chars) > 1:
        held = {min(chars, key=lambda group: (chars[group], group))}
    stay = [document for document in documents if document.group not in held]
    return stay, [document for document in documents if document.group in held]


def _end(documents: list[Document], wanted: int) -> tuple[list[Document], list[Document]]:
    """Divide the text of a domain into its beginning and its last `wanted` hundredths of characters.

    The document that holds the border is cut at the next white space. A conversation is not cut.
    """
    remaining = (100 * _chars(documents) - wanted) // 100
    stay, held = list[Document](), list[Document]()
    for document in documents:
        size = len(document.text)
        if size <= remaining or document.turns:
            stay.append(document)
        elif remaining <= 0:
            held.append(document)
        else:
            space = re.compile(r"\s").search(document.text, remaining)
            border = space.end() if space else remaining
            stay.append(document._replace(text=document.text[:border]))
            held.append(document._replace(text=document.text[border:]))
        remaining -= size
    return stay, [document for document in held if document.text]


def _chars(documents: list[Document]) -> int:
    return sum(len(document.text) for document in documents)
