"""Turns documents into blocks without padding: texts one after another, or several whole conversations in a block."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from moe.data.chat import LabeledTokens, tokenize_conversations
from moe.data.labels import IGNORED
from moe.data.sources import Document
from moe.data.tokenizer import tokenize_texts


class Blocks(NamedTuple):
    """Blocks of one domain.

    columns: the columns of the data set by name.
    document: the `Document.group` of the first token of each block.
    counts: what the manifest says about these blocks, except their number.
    """

    columns: dict[str, Int[np.ndarray, "N S"]]
    document: list[str]
    counts: dict[str, int | float]


def concatenate(documents: list[Document], tokenizer: PreTrainedTokenizerFast, seq_len: int, progress: str) -> Blocks:
    """Put the tokens of all documents one after another and split them into blocks. The incomplete last one is dropped.

    `progress` names the progress bar.
    """
    parts = tokenize_texts(documents, tokenizer, progress)
    ids = np.concatenate([np.empty(0, dtype=np.int32), *parts])
    blocks = ids[: len(ids) // seq_len * seq_len].reshape(-1, seq_len)
    ends = np.cumsum([len(part) for part in parts])
    first = np.searchsorted(ends, np.arange(len(blocks)) * seq_len, side="right")
    return Blocks({"input_ids": blocks}, [documents[index].group for index in first], {"tokens": len(ids)})


def pack(documents: list[Document], tokenizer: PreTrainedTokenizerFast, seq_len: int, progress: str) -> Blocks:
    """Pack whole conversations into blocks: the longest first, each into the fullest block that has room for it.

    A conversation that is longer than a block loses its end. It is left out if no label remains. The room that is left
    in a block is filled with beginnings of conversations, which appear a second time there, without labels. Padding
    would be worse: it would be routed like text, always in the same way, and would enter every routing statistic and
    balance loss. position_ids start at 0 with each piece. `progress` names the progress bar.
    """
    conversations = tokenize_conversations(documents, tokenizer, progress)
    truncated = [LabeledTokens(ids[:seq_len], labels[:seq_len]) for ids, labels in conversations]
    learnable = [index for index, tokens in enumerate(truncated) if (tokens.labels != IGNORED).any()]
    packed = [truncated[index] for index in learnable]
    rows = best_fit([len(tokens.ids) for tokens in packed], seq_len)
    columns = {name: np.empty((len(rows), seq_len), np.int32) for name in ("input_ids", "labels", "position_ids")}
    columns["labels"][:] = IGNORED
    fillers, filled = cycle(packed), 0
    for row, members in enumerate(rows):
        end = 0
        for index in members:
            end = _write(columns, row, end, packed[index])
        filled += seq_len - end
        while end < seq_len:
            end = _write(columns, row, end, LabeledTokens(ids := next(fillers).ids, np.full_like(ids, IGNORED)))
    counts: dict[str, int | float] = {
        "tokens": sum(len(tokens.ids) for tokens in packed),
        "labeled_tokens": int((columns["labels"] != IGNORED).sum()),
        "truncated": sum(len(tokens.ids) > seq_len for tokens in conversations),
        "left_out": len(truncated) - len(packed),
        "filler_share": filled / columns["input_ids"].size if rows else 0.0,
    }
    return Blocks(columns, [documents[learnable[members[0]]].group for members in rows], counts)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the indices of the lengths that share each block, by best-fit decreasing. No length may exceed `size`."""
    blocks: list[list[int]] = []
    blocks_by_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # The keys of `blocks_by_room` that have blocks, in order.
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        position = bisect_left(rooms, lengths[index])
        if position == len(rooms):
            block, room = len(blocks), size
            blocks.append([])
        else:
            room = rooms[position]
            block = blocks_by_room[room].pop()
            if not blocks_by_room[room]:
                del rooms[position]
        blocks[block].append(index)
        if left := room - lengths[index]:
            if not blocks_by_room[left]:
                insort(rooms, left)
            blocks_by_room[left].append(block)
    return blocks


def _write(columns: dict[str, Int[np.ndarray, "N S"]], row: int, start: int, tokens: LabeledTokens) -> int:
    """Write as much of a conversation as fits into a row from `start` on; return where it ends."""
    end = min(start + len(tokens.ids), columns["input_ids"].shape[1])
    columns["input_ids"][row, start:end] = tokens.ids[: end - start]
    columns["labels"][row, start:end] = tokens.labels[: end - start]
    columns["position_ids"][row, start:end] = np.arange(end - start)
    return end
