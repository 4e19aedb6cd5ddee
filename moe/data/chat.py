"""Turns conversations into tokens: a chat template renders them, and only the assistant's words get labels."""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from moe.data.documents import Document, Turn
from moe.data.labels import IGNORED
from moe.data.tokenizer import special_ids, text_encoder

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class LabeledTokens(NamedTuple):
    """One conversation: its token ids, and the same ids as labels, with IGNORED where nothing is to be predicted."""

    ids: Int[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]


TEMPLATE_OF = "the conversation with the id {id}: the chat template of data.tokenizer"  # begins messages


def set_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give a tokenizer that has no chat template the ChatML template of SmolLM2.

    Raises ValueError if the tokenizer lacks the special tokens of ChatML.
    """
    if tokenizer.chat_template is not None:
        return
    if missing := [token for token in CHATML_TOKENS if token not in tokenizer.all_special_tokens]:
        raise ValueError(
            f"data.tokenizer: has no chat template, and no special token {' and '.join(missing)}, which ChatML needs"
        )
    tokenizer.chat_template = CHATML


def tokenize_conversations(
    conversations: list[Document], tokenizer: PreTrainedTokenizerFast, progress: str
) -> list[LabeledTokens]:
    """Return the tokens of each conversation, with labels on the assistant's words and on the special token that ends
    them.

    The template is rendered with a placeholder for the words of each turn, and the tokens of the words replace the
    placeholders. This has two advantages: words that spell a special token stay words, and the template need not mark
    which words are the assistant's. The words of a turn are tokenized separately from the text before them, as when a
    model writes them. `progress` names the progress bar. Raises ValueError if the template leaves out or reorders
    turns, or ends the assistant's words without a special token, because a model could then not learn to stop.
    """
    markup_encoder = text_encoder(tokenizer, parse_special=True)
    word_encoder = text_encoder(tokenizer, parse_special=False)
    special = special_ids(tokenizer)
    tokenized = []
    for conversation in tqdm(conversations, progress, leave=False, disable=None):
        markup = _markup(conversation, tokenizer)
        ids = list(markup_encoder.encode(markup[0], add_special_tokens=False).ids)
        labels = [IGNORED] * len(ids)
        for turn, markup_after in zip(conversation.turns, markup[1:], strict=True):
            words = word_encoder.encode(turn.content, add_special_tokens=False).ids
            after = markup_encoder.encode(markup_after, add_special_tokens=False).ids
            if after and after[0] in special:  # The token that ends a turn is learned with its words.
                words, after = words + after[:1], after[1:]
            elif turn.role == "assistant":
                raise ValueError(
                    f"{TEMPLATE_OF.format(id=conversation.id)} does not end the words of the assistant "
                    "with a special token, so a model could not learn to stop"
                )
            ids += words + after
            labels += words if turn.role == "assistant" else [IGNORED] * len(words)
            labels += [IGNORED] * len(after)
        labels[0] = IGNORED  # No token of the conversation precedes the first one, from which to predict it.
        tokenized.append(LabeledTokens(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)))
    return tokenized


def end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids at which generation ends: the end of text, and what ends the assistant's words in the template."""
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        example = Document.conversation("", "an example", [Turn("user", "Hi"), Turn("assistant", "Hi")])
        try:
            after = _markup(example, tokenizer)[-1]
        except ValueError:  # It takes other conversations only, and was not used for training.
            return ends
        ids = text_encoder(tokenizer, parse_special=True).encode(after, add_special_tokens=False).ids
        ends += [number for number in ids[:1] if number in special_ids(tokenizer) and number not in ends]
    return ends


def _markup(conversation: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return what the template writes before the words of the first turn, and after the words of each turn."""
    placeholders = [{"role": turn.role, "content": f"\ue000{n}\ue001"} for n, turn in enumerate(conversation.turns)]
    try:
        rendered = tokenizer.apply_chat_template(placeholders, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"{TEMPLATE_OF.format(id=conversation.id)} refuses it: {error}") from None
    assert isinstance(rendered, str)
    parts = re.split("\ue000(\\d+)\ue001", rendered)
    if parts[1::2] != [str(n) for n in range(len(placeholders))]:
        raise ValueError(f"{TEMPLATE_OF.format(id=conversation.id)} leaves out or reorders its turns")
    return parts[::2]
