"""Conversations as tokens: rendered by a chat template, with labels on what the assistant says and nothing else."""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from moe.data.labels import IGNORED
from moe.data.sources import Document
from moe.data.tokenizer import encoder

MARKERS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Tokens(NamedTuple):
    """One conversation: its ids, and the same as labels, IGNORED where nothing is predicted."""

    ids: Int[np.ndarray, "N"]
    labels: Int[np.ndarray, "N"]


def set_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give a tokenizer without a chat template ours, ChatML as SmolLM2 has it; ValueError if it lacks its tokens."""
    if tokenizer.chat_template is not None:
        return
    if missing := [marker for marker in MARKERS if marker not in tokenizer.all_special_tokens]:
        raise ValueError(f"data.tokenizer: has no chat template, and no special token {' and '.join(missing)} for ours")
    tokenizer.chat_template = CHATML


def tokenize(conversations: list[Document], tokenizer: PreTrainedTokenizerFast, label: str) -> list[Tokens]:
    """Tokens of the conversations; labeled are the assistant's words and the special token that ends them.

    The template writes a mark for each turn, which the words then replace: so words that spell a special token stay
    words, and no template has to say which words are the assistant's. Words are tokenized apart from what stands before
    them, as they are when a model writes them. Raises ValueError where a template leaves out or reorders turns.
    """
    markup, words = encoder(tokenizer, special=True), encoder(tokenizer, special=False)
    special = set(tokenizer.all_special_ids)
    found = []
    for conversation in tqdm(conversations, label, leave=False, disable=None):
        frame = _frame(conversation, tokenizer)
        ids = list(markup.encode(frame[0], add_special_tokens=False).ids)
        labels = [IGNORED] * len(ids)
        for turn, after in zip(conversation.turns, frame[1:], strict=True):
            said = words.encode(turn.content, add_special_tokens=False).ids
            rest = markup.encode(after, add_special_tokens=False).ids
            said, rest = (said + rest[:1], rest[1:]) if rest and rest[0] in special else (said, rest)
            ids += said + rest
            labels += said if turn.role == "assistant" else [IGNORED] * len(said)
            labels += [IGNORED] * len(rest)
        labels[0] = IGNORED  # nothing of the conversation stands before it
        found.append(Tokens(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)))
    return found


def _frame(conversation: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the template writes before the first turn's words, and after the words of each turn."""
    marked = [{"role": turn.role, "content": f"\ue000{n}\ue001"} for n, turn in enumerate(conversation.turns)]
    try:
        rendered = tokenizer.apply_chat_template(marked, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"{conversation.id}: the chat template of data.tokenizer refuses it: {error}") from None
    assert isinstance(rendered, str)
    parts = re.split("\ue000(\\d+)\ue001", rendered)
    if parts[1::2] != [str(n) for n in range(len(marked))]:
        raise ValueError(f"{conversation.id}: the chat template of data.tokenizer leaves out or reorders its turns")
    return parts[::2]
