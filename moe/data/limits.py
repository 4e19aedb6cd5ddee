"""The allowed values of the data settings. This module does not import torch, so that a command is checked fast."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe.checks import one_of, require

SMALLEST_VOCABULARY = 259  # 256 bytes, and the three special tokens of `moe.data.tokenizer`


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """The keys of `data` that decide, for a source of text, which blocks of tokens there are.

    tokenizer: "bpe" trains a tokenizer with `vocab_size` tokens on the train documents. Any other value is the path or
        hub name of a fast tokenizer; it has its own vocabulary, so `vocab_size` must be None.
    tokenizer_revision: commit of a tokenizer on the hub; None is the newest one.
    seq_len: tokens of a block.
    val_percent: share of the characters of each domain to validate on, as whole source files chosen by hash.
    max_val_blocks: keep this many evenly spaced validation blocks; the domains keep their shares.
    test_percent, max_test_blocks: the same for the test, see `moe.data.split.divide`. 0 percent is no test text, and
        None is `max_val_blocks`.
    """

    tokenizer: str
    vocab_size: int | None
    seq_len: int
    val_percent: int
    max_val_blocks: int | None
    tokenizer_revision: str | None = None
    test_percent: int = 0
    max_test_blocks: int | None = None

    def check(self) -> None:
        """Raise ConfigError, naming the key, for a value that cannot be used."""
        trained = self.tokenizer == "bpe"
        allowed = "a whole number, because data.tokenizer=bpe is trained"
        require(not trained or self.vocab_size is not None, "data.vocab_size", None, allowed)
        allowed = f"null, because data.tokenizer={self.tokenizer} has its own vocabulary"
        require(trained or self.vocab_size is None, "data.vocab_size", self.vocab_size, allowed)
        enough = self.vocab_size is None or self.vocab_size >= SMALLEST_VOCABULARY
        allowed = f"at least {SMALLEST_VOCABULARY}: all bytes and the special tokens"
        require(enough, "data.vocab_size", self.vocab_size, allowed)
        require(self.seq_len >= 2, "data.seq_len", self.seq_len, "at least 2: an input and a target")
        require(1 <= self.val_percent <= 99, "data.val_percent", self.val_percent, "between 1 and 99")
        most = 99 - self.val_percent
        allowed = f"between 0 and {most}, because data.val_percent={self.val_percent} and training needs text too"
        require(0 <= self.test_percent <= most, "data.test_percent", self.test_percent, allowed)
        for name, otherwise in (("max_val_blocks", "all"), ("max_test_blocks", "data.max_val_blocks")):
            number = getattr(self, name)
            require(number is None or number >= 1, f"data.{name}", number, f"at least 1, or null for {otherwise}")


def check_train_domains(names: Sequence[str], known: Iterable[str]) -> None:
    """Raise ConfigError unless these are different domains of the data, at least one."""
    allowed = "at least one domain, each once; or null for all"
    require(bool(names) and len({*names}) == len(names), "data.train_domains", list(names), allowed)
    domains = list(known)
    for name in names:
        one_of("data.train_domains", name, domains)
