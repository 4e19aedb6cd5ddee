"""Documents to blocks full to the last token: texts one after another, or several whole conversations in a block."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from moe.data import chat
from moe.data.chat import Tokens
from moe.data.labels import IGNORED
from moe.data.sources import Document
from moe.data.tokenizer import tokenize


class Blocks(NamedTuple):
    """Blocks of one domain: columns by name, and what the manifest says of them beside their number.

    document: the `Document.group` of each block's first token.
    """

    columns: dict[str, Int[np.ndarray, "N S"]]
    document: list[str]
    counts: dict[str, int | float]


def cut(documents: list[Document], tokenizer: PreTrainedTokenizerFast, seq_len: int, label: str) -> Blocks:
    """Blocks of documents one after another, the tail dropped."""
    parts = tokenize(documents, tokenizer, label)
    ids = np.concatenate([np.empty(0, dtype=np.int32), *parts])
    blocks = ids[: len(ids) // seq_len * seq_len].reshape(-1, seq_len)
    ends = np.cumsum([len(part) for part in parts])
    first = np.searchsorted(ends, np.arange(len(blocks)) * seq_len, side="right")
    return Blocks({"input_ids": blocks}, [documents[place].group for place in first], {"tokens": len(ids)})


def pack(documents: list[Document], tokenizer: PreTrainedTokenizerFast, seq_len: int, label: str) -> Blocks:
    """Blocks of whole conversations, each in the fullest block that has room for it, the longest first.

    A conversation longer than a block loses its end, and is left out if no label remains. The room left over holds
    beginnings of conversations, once more and without labels: padding would be routed like text, and always alike, so
    every routing statistic and balance loss would be about it too. position_ids start at 0 with each piece.
    """
    whole = chat.tokenize(documents, tokenizer, label)
    cut = [Tokens(ids[:seq_len], labels[:seq_len]) for ids, labels in whole]
    learnable = [place for place, tokens in enumerate(cut) if (tokens.labels != IGNORED).any()]
    kept = [cut[place] for place in learnable]
    rows = best_fit([len(tokens.ids) for tokens in kept], seq_len)
    columns = {name: np.empty((len(rows), seq_len), np.int32) for name in ("input_ids", "labels", "position_ids")}
    columns["labels"][:] = IGNORED
    fillers, filled = cycle(kept), 0
    for row, members in enumerate(rows):
        end = 0
        for index in members:
            end = _write(columns, row, end, kept[index])
        filled += seq_len - end
        while end < seq_len:
            end = _write(columns, row, end, Tokens(ids := next(fillers).ids, np.full_like(ids, IGNORED)))
    counts: dict[str, int | float] = {
        "tokens": sum(len(tokens.ids) for tokens in kept),
        "labeled_tokens": int((columns["labels"] != IGNORED).sum()),
        "truncated": sum(len(tokens.ids) > seq_len for tokens in whole),
        "left_out": len(cut) - len(kept),
        "filler_share": filled / columns["input_ids"].size if rows else 0.0,
    }
    return Blocks(columns, [documents[learnable[members[0]]].group for members in rows], counts)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of the lengths that share each block of `size`: best-fit decreasing; no length may exceed `size`."""
    blocks: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of `with_room` that have blocks, in order
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(rooms, lengths[index])
        if place == len(rooms):
            block, room = len(blocks), size
            blocks.append([])
        else:
            room = rooms[place]
            block = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        blocks[block].append(index)
        if left := room - lengths[index]:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(block)
    return blocks


def _write(columns: dict[str, Int[np.ndarray, "N S"]], row: int, start: int, tokens: Tokens) -> int:
    """Write as much of a conversation as fits from `start` on; returns where it ends."""
    end = min(start + len(tokens.ids), columns["input_ids"].shape[1])
    columns["input_ids"][row, start:end] = tokens.ids[: end - start]
    columns["labels"][row, start:end] = tokens.labels[: end - start]
    columns["position_ids"][row, start:end] = np.arange(end - start)
    return end
