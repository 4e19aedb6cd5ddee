"""Tokenizers, trained on the documents or loaded from elsewhere, and the conversion of text to token ids."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe.checks import first_line
from moe.data.documents import Document
from moe.files import checksums, require_files

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # Ids 0, 1 and 2, as in SmolLM.


def train_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE in which every digit is a token of its own.

    Training is deterministic. Any text survives encoding and decoding unchanged.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    end, *chat = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        additional_special_tokens=chat,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def pretrained_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a path or the hub, without the settings that calls and saves leave in its files.

    The ids of a text then depend on the text alone: there is no padding or truncation, no special token is added at
    either end, no merge is left out at random, and words that spell a special token are that token. If padding is asked
    for, it is on the left, as generation needs it, and a tokenizer without a padding token uses its end-of-text token.

    Code that the files name is never run. Raises ValueError if the tokenizer cannot be loaded, or is not a fast one
    with an end-of-text token, or skips numbers.
    """
    pretrained = plain_tokenizer(name, revision, padding_side="left", split_special_tokens=False)
    ids, number = pretrained.get_vocab().values(), len(pretrained)
    if max(ids) >= number:  # a model has one row for each token
        allowed = f"a tokenizer that numbers its {number} tokens from 0 to {number - 1}"
        raise ValueError(f"data.tokenizer={name}: must be {allowed}; this one has the number {max(ids)}")
    _encode_text_alone(pretrained.backend_tokenizer)
    pretrained.backend_tokenizer.post_processor = processors.Sequence([])
    if pretrained.pad_token is None:
        pretrained.pad_token = pretrained.eos_token
    return pretrained


def plain_tokenizer(name: str, revision: str | None = None, **settings: Any) -> PreTrainedTokenizerFast:
    """Load a tokenizer as it is, from a path or the hub. `settings` replace some of its own.

    Code that the files name is never run. Raises ValueError if the tokenizer cannot be loaded, or is not a fast one
    with an end-of-text token.
    """
    try:
        require_files(Path(name))
        pretrained = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False, **settings
        )
    except Exception as error:  # whatever a wrong file makes a library raise
        raise ValueError(f"data.tokenizer={name}: cannot be read ({first_line(error)})") from error
    if not isinstance(pretrained, PreTrainedTokenizerFast) or pretrained.eos_token_id is None:
        raise ValueError(f"data.tokenizer={name}: must be a fast tokenizer that has an end-of-text token")
    return pretrained


def tokenizer_files(name: str) -> dict[str, str]:
    """Return the checksums of a local tokenizer's files; an empty dict for "bpe" and for a name on the hub."""
    return checksums(sorted(Path(name).glob("*token*.json")))


def text_encoder(tokenizer: PreTrainedTokenizerFast, *, parse_special: bool) -> Tokenizer:
    """Return a copy that turns any text into its ids alone, without truncation and padding.

    Text that spells a special token becomes that token if `parse_special`, and stays text otherwise.
    """
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.encode_special_tokens = not parse_special
    _encode_text_alone(copy)
    return copy


def _encode_text_alone(backend: Tokenizer) -> None:
    """Switch off all that can make the ids of a text depend on more than the text.

    Padding and truncation stay on after a call that used them, even in a saved tokenizer. BPE dropout leaves out merges
    at random. (The sampling of Unigram is random too, but a file cannot switch it on.)
    """
    backend.no_padding()
    backend.no_truncation()
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return the ids of all special tokens, including those that have no role such as end of text."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def tokenize_texts(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, progress: str
) -> list[Int[np.ndarray, " _"]]:
    """Return the token ids of each document, followed by the end-of-text token.

    Text that spells a special token stays text. `progress` names the progress bar.
    """
    encoder = text_encoder(tokenizer, parse_special=False)
    ids = []
    for start in tqdm(range(0, len(documents), 64), progress, leave=False, disable=None):
        texts = [document.text for document in documents[start : start + 64]]
        for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
            ids.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int32))
    return ids
