"""Documents, the interface of a source of documents, and the filter that leaves out duplicates."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

SHINGLE_WORDS = 13  # A shingle is a sequence of this many words.
MAX_SEEN = 0.3  # A text is a near duplicate if a larger share of its shingles has been seen before.
DUPLICATES = "duplicates"


class Turn(NamedTuple):
    """One message of a conversation, by the system, the user or the assistant."""

    role: str
    content: str


class Document(NamedTuple):
    """One text with the name of its domain.

    group: the source file. Documents of one group are never divided between training, validation and test text.
    turns: the messages of a conversation; empty for plain text. `text` is then what user and assistant say, without the
        system messages, which many conversations share.
    beyond: whether it lies beyond the limit of its source, so that it is for the test text alone.
    """

    domain: str
    id: str
    text: str
    group: str
    turns: tuple[Turn, ...] = ()
    beyond: bool = False

    @staticmethod
    def conversation(domain: str, id: str, turns: Sequence[Turn]) -> "Document":
        """Return a conversation, which is a group of its own."""
        text = "\n\n".join(turn.content for turn in turns if turn.role != "system")
        return Document(domain, id, text, id, tuple(turns))


@runtime_checkable
class Source(Protocol):
    """Interface of a source for `moe.data.blocks.prepare`. Its fields and `describe()` together identify the text.

    The first field says where the text is. An error names this field if there is no text.

    A class may have an attribute `unused`: the names of fields that change nothing with the values of the others. A
    sweep over such a field is refused.

    A class whose documents are conversations sets the class variable `conversations = True`. Routers that cannot keep
    the conversations of a block apart are then refused before any work. A class may have a method `remarks()`, which
    returns lines about its text that a run prints, such as what is left out.

    A class that limits how much it reads may have a method `with_test(percent)`. It yields what `documents()` yields,
    and about `percent` percent more from beyond the limit, of other source files and with `beyond=True`: the test text,
    which then costs no training text.
    """

    def documents(self) -> Iterator[Document]:
        """Yield the documents in an order that depends only on the fields and on the text.

        A generator may return {reason: number} of what it leaves out, for the manifest.
        """
        ...

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return license, package versions and file checksums, by domain or path, as JSON-serializable values."""
        ...


class DuplicateFilter:
    """Filter that admits each text once.

    A text is refused if the same text was admitted before (ignoring case and white space), or if more than `MAX_SEEN`
    of its shingles were. Docstrings made from templates are the reason: without the filter up to a third of the 13-word
    sequences of the validation set also occur in train.
    """

    RULE = (
        f"a duplicate has the same words as an earlier document, ignoring case, or more than {MAX_SEEN:.0%} of its "
        f"sequences of {SHINGLE_WORDS} words occurred before (data.source.drop_duplicates=false keeps duplicates of "
        "your own data)"
    )

    def __init__(self) -> None:
        self._texts: set[bytes] = set()
        self._shingles: set[int] = set()

    def admits(self, text: str) -> bool:
        """Return whether the text is new, and remember it if so."""
        words = text.lower().split()
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
        shingles = {
            zlib.crc32(" ".join(words[start : start + SHINGLE_WORDS]).encode())
            for start in range(len(words) - SHINGLE_WORDS + 1)
        }
        if digest in self._texts or len(shingles & self._shingles) > MAX_SEEN * len(shingles):
            return False
        self._texts.add(digest)
        self._shingles |= shingles
        return True


def without_duplicates(
    found: Iterable[Document | str], *, drop_duplicates: bool = True
) -> Generator[Document, None, Counter[str]]:
    """Yield the documents, without exact and near duplicates of earlier ones if `drop_duplicates`.

    In `found`, a text in place of a document says why a row gives none. The generator returns the number of duplicates
    and of such rows, by reason.
    """
    duplicates, left_out = DuplicateFilter(), Counter[str]()
    for document in found:
        if isinstance(document, str):
            left_out[document] += 1
        elif drop_duplicates and not duplicates.admits(document.text):
            left_out[DUPLICATES] += 1
        else:
            yield document
    return left_out
