"""The allowed values of the data settings. This module does not import torch, so that a command is checked fast."""

from collections.abc import Iterable, Sequence

from moe.checks import one_of, require

SMALLEST_VOCABULARY = 259  # 256 bytes, and the three special tokens of `moe.data.tokenizer`


def check_limits(
    *,
    tokenizer: str,
    vocab_size: int | None,
    seq_len: int,
    val_percent: int,
    max_val_blocks: int | None,
    test_percent: int,
    max_test_blocks: int | None,
) -> None:
    """Raise ConfigError, naming the key, for a value that cannot be used."""
    if tokenizer == "bpe":
        require(
            vocab_size is not None, "data.vocab_size", None, "a whole number, because data.tokenizer=bpe is trained"
        )
    else:
        allowed = f"null, because data.tokenizer={tokenizer} has its own vocabulary"
        require(vocab_size is None, "data.vocab_size", vocab_size, allowed)
    enough = vocab_size is None or vocab_size >= SMALLEST_VOCABULARY
    allowed = f"at least {SMALLEST_VOCABULARY}: all bytes and the special tokens"
    require(enough, "data.vocab_size", vocab_size, allowed)
    require(seq_len >= 2, "data.seq_len", seq_len, "at least 2: an input and a target")
    require(1 <= val_percent <= 99, "data.val_percent", val_percent, "between 1 and 99")
    allowed = f"between 0 and {99 - val_percent}, because data.val_percent={val_percent} and training needs text too"
    require(0 <= test_percent <= 99 - val_percent, "data.test_percent", test_percent, allowed)
    for key, number, otherwise in (("val", max_val_blocks, "all"), ("test", max_test_blocks, "data.max_val_blocks")):
        allowed = f"at least 1, or null for {otherwise}"
        require(number is None or number >= 1, f"data.max_{key}_blocks", number, allowed)


def check_train_domains(names: Sequence[str], known: Iterable[str]) -> None:
    """Raise ConfigError unless these are different domains of the data, at least one."""
    allowed = "at least one domain, each once; or null for all"
    require(bool(names) and len({*names}) == len(names), "data.train_domains", list(names), allowed)
    domains = list(known)
    for name in names:
        one_of("data.train_domains", name, domains)
