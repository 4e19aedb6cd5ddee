"""Turn documents into blocks without padding: join texts, or pack several whole conversations into each block."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from moe.data.chat import LabeledTokens, tokenize_conversations
from moe.data.documents import Document
from moe.data.labels import IGNORED
from moe.data.tokenizer import tokenize_texts


class Blocks(NamedTuple):
    """Blocks of one domain.

    columns: the columns of the data set by name.
    document: the `Document.group` of the first token of each block.
    counts: the entries of the manifest about these blocks, except their number.
    """

    columns: dict[str, Int[np.ndarray, "N S"]]
    document: list[str]
    counts: dict[str, int | float]


def concatenate(documents: list[Document], tokenizer: PreTrainedTokenizerFast, seq_len: int, progress: str) -> Blocks:
    """Join the tokens of all documents and split them into blocks. An incomplete last block is dropped.

    progress: title of the progress bar.
    """
    parts = tokenize_texts(documents, tokenizer, progress)
    ids = np.concatenate([np.empty(0, dtype=np.int32), *parts])
    blocks = ids[: len(ids) // seq_len * seq_len].reshape(-1, seq_len)
    ends = np.cumsum([len(part) for part in parts])
    first = np.searchsorted(ends, np.arange(len(blocks)) * seq_len, side="right")
    return Blocks({"input_ids": blocks}, [documents[index].group for index in first], {"tokens": len(ids)})


def pack(documents: list[Document], tokenizer: PreTrainedTokenizerFast, seq_len: int, progress: str) -> Blocks:
    """Pack whole conversations into blocks: the longest first, each into the fullest block in which it still fits.

    A conversation that is longer than a block loses its end. Conversations without any label (after truncation) are
    left out. Leftover space is filled with copies of conversations, cut off at the block end. The copies have no
    labels. Padding would be worse: all padding tokens would be routed to the same experts, and would count in every
    routing statistic and balance loss. position_ids restart at 0 for every conversation or filler.

    progress: title of the progress bar.
    """
    conversations = tokenize_conversations(documents, tokenizer, progress)
    truncated = [LabeledTokens(ids[:seq_len], labels[:seq_len]) for ids, labels in conversations]
    learnable = [index for index, tokens in enumerate(truncated) if (tokens.labels != IGNORED).any()]
    packed = [truncated[index] for index in learnable]
    blocks = best_fit([len(tokens.ids) for tokens in packed], seq_len)
    columns = {name: np.empty((len(blocks), seq_len), np.int32) for name in ("input_ids", "labels", "position_ids")}
    columns["labels"][:] = IGNORED
    fillers, filled = cycle(packed), 0
    for block, members in enumerate(blocks):
        end = 0
        for index in members:
            end = _write(columns, block, end, packed[index])
        filled += seq_len - end
        while end < seq_len:
            ids = next(fillers).ids
            end = _write(columns, block, end, LabeledTokens(ids, np.full_like(ids, IGNORED)))
    counts: dict[str, int | float] = {
        "tokens": sum(len(tokens.ids) for tokens in packed),
        "labeled_tokens": int((columns["labels"] != IGNORED).sum()),
        "truncated": sum(len(tokens.ids) > seq_len for tokens in conversations),
        "left_out": len(truncated) - len(packed),
        "filler_share": filled / columns["input_ids"].size if blocks else 0.0,
    }
    return Blocks(columns, [documents[learnable[members[0]]].group for members in blocks], counts)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Pack lengths into blocks by best-fit decreasing; return the indices of the lengths in each block.

    No length may exceed `size`.
    """
    blocks: list[list[int]] = []
    blocks_by_free: dict[int, list[int]] = defaultdict(list)  # free size -> blocks with that much free space
    free_sizes: list[int] = []  # the keys of `blocks_by_free` that have blocks, in ascending order
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        position = bisect_left(free_sizes, lengths[index])
        if position == len(free_sizes):
            block, free = len(blocks), size
            blocks.append([])
        else:
            free = free_sizes[position]
            block = blocks_by_free[free].pop()
            if not blocks_by_free[free]:
                del free_sizes[position]
        blocks[block].append(index)
        remaining = free - lengths[index]
        if remaining > 0:
            if not blocks_by_free[remaining]:
                insort(free_sizes, remaining)
            blocks_by_free[remaining].append(block)
    return blocks


def _write(columns: dict[str, Int[np.ndarray, "N S"]], block: int, start: int, tokens: LabeledTokens) -> int:
    """Write a conversation into a block from position `start`, cut off at the block end; return its end position."""
    end = min(start + len(tokens.ids), columns["input_ids"].shape[1])
    columns["input_ids"][block, start:end] = tokens.ids[: end - start]
    columns["labels"][block, start:end] = tokens.labels[: end - start]
    columns["position_ids"][block, start:end] = np.arange(end - start)
    return end
