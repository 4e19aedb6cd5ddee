"""Tokenizers: trained on the documents or the user's own, and text to token ids."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe.data.sources import Document, checksums

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as in SmolLM


def train_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; deterministic, and any text survives encode and decode unchanged."""
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
        additional_special_tokens=chat,
        clean_up_tokenization_spaces=False,
    )


def pretrained_tokenizer(name: str) -> PreTrainedTokenizerFast:
    pretrained = AutoTokenizer.from_pretrained(name)
    if not isinstance(pretrained, PreTrainedTokenizerFast) or pretrained.eos_token_id is None:
        raise ValueError(f"data.tokenizer={name}: must be a fast tokenizer that has an end-of-text token")
    return pretrained


def tokenizer_files(name: str) -> dict[str, str]:
    """Checksums of a local tokenizer; none for "bpe" and for a name on the hub."""
    return checksums(sorted(Path(name).glob("*token*.json")))


def encoder(tokenizer: PreTrainedTokenizerFast, *, special: bool) -> Tokenizer:
    """A copy that turns any text into ids; text that spells a special token is that token if `special`, else text."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.encode_special_tokens = not special
    copy.no_truncation()
    return copy


def tokenize(documents: list[Document], tokenizer: PreTrainedTokenizerFast, label: str) -> list[Int[np.ndarray, "_"]]:
    """Ids of each document with the end-of-text token after them. Text that spells a special token stays text."""
    words = encoder(tokenizer, special=False)
    ids = []
    for start in tqdm(range(0, len(documents), 64), label, leave=False, disable=None):
        texts = [document.text for document in documents[start : start + 64]]
        for encoding in words.encode_batch_fast(texts, add_special_tokens=False):
            ids.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int32))
    return ids
