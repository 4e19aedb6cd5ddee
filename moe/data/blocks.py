"""Turn documents into token blocks (split, tokenize, pack, cache), and give the order in which training reads
them.

All functions of this module depend on their arguments alone. Every seed, rank and resumed run therefore sees the same
validation set, and the batch of a step needs no state.
"""

import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from moe.checks import require
from moe.data.cache import intact, locked, publish
from moe.data.chat import end_ids, set_template
from moe.data.documents import DUPLICATES, Document, DuplicateFilter, Source
from moe.data.labels import IGNORED, next_token
from moe.data.limits import BlockSettings, check_train_domains
from moe.data.packing import Blocks, concatenate, pack
from moe.data.split import Corpus, divide
from moe.data.table import BlockTable
from moe.data.tokenizer import pretrained_tokenizer, tokenizer_files, train_bpe
from moe.files import LinkError, read_text, sha256, shown

log = logging.getLogger(__name__)

DIGESTS = ("corpus_sha256", "tokenizer_sha256", "test_sha256")  # of a manifest, see `Prepared.digests`
CACHE_FORMAT = 7  # Increase it whenever the same arguments give different blocks or different files.


SHUFFLE = 7  # the seed of shuffled domains, the same for all runs


class Prepared(NamedTuple):
    """Token blocks of one corpus.

    train, val, test: tables with the columns input_ids (seq_len) and domain (an index into `domains`). All tokens of
        a block are of one domain. Blocks of conversations also have the columns labels and position_ids (seq_len); see
        `Batch`.
    val, test: have the column document too, a number for each source file (`Document.group`); a conversation is a
        source file of its own. A block has the number of the document of its first token. Blocks with the same number
        are not statistically independent. test is None without test text.
    manifest: counts, licenses, package versions and checksums of everything that the blocks were made from. `left_out`
        counts the documents that were left out, by reason. `split` and `test_split` say how validation and test text
        were chosen, see `moe.data.split.Splits`.
    """

    train: BlockTable
    val: BlockTable
    domains: tuple[str, ...]
    tokenizer: PreTrainedTokenizerFast
    manifest: dict[str, Any]
    test: BlockTable | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Return the sha256 of the text, of the tokenizer and of the test text (null without one).

        Together with the configuration they determine the blocks.
        """
        return {name: self.manifest[name] for name in DIGESTS}

    def predicted_bytes(self, split: str) -> tuple[int, ...]:
        """Return for each domain the bytes (UTF-8) of the text that a model predicts in the split val or test."""
        return tuple(counts[split]["predicted_bytes"] for counts in self.manifest["domains"].values())


def prepare(source: Source, settings: BlockSettings, *, cache: str, make: bool = True) -> Prepared:
    """Return the token blocks of `source`, read from `<cache>/<key>`, or made and written there first.

    If several processes prepare the same data at once, one makes it and the others wait. A damaged cache is made again.
    A complete one may be read-only.
    `make=False` only reads the cache. Raises ValueError for a value outside its range, and with `make=False` for data
    that are not in the cache.
    """
    settings.check()
    settings = replace(settings, max_test_blocks=settings.max_test_blocks or settings.max_val_blocks)
    blocks = ("seq_len", "val_percent", "max_val_blocks", "test_percent", "max_test_blocks")
    recipe: dict[str, Any] = {
        "format": CACHE_FORMAT,
        "source": {"class": type(source).__name__, **vars(source)},
        "documents": source.describe(),
        "tokenizer": {
            "name": settings.tokenizer,
            "revision": settings.tokenizer_revision,
            "vocab_size": settings.vocab_size,
            "files": tokenizer_files(settings.tokenizer),
        },
        "blocks": {name: getattr(settings, name) for name in blocks},
        "packages": {"tokenizers": metadata.version("tokenizers")},
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(cache).expanduser()
    folder = root / key
    if not intact(folder):  # An intact one is read without the lock, which may belong to another user.
        if not make:
            raise ValueError(
                f"data.cache={cache}: has no intact {key}, and these settings are not trusted to read the text"
            )
        with locked(root, key, cache):
            if not intact(folder):
                if folder.exists():
                    log.warning("%s is damaged: it is made again", folder)
                    shutil.rmtree(folder)
                unfinished = root / f"{key}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)  # A process that was killed may have left it.
                if unfinished.is_symlink():
                    raise LinkError(f"{unfinished} is a link: delete it")
                log.info("reading and tokenizing the text, once; the result is kept in %s", shown(folder))
                contents = _build(source, unfinished, settings)
                publish(unfinished, folder, {"key": key, **recipe, **contents})
    return _load(folder)


def of_domains(data: Prepared, names: Sequence[str]) -> Prepared:
    """Return the data with the training text of these domains alone. Validation and test text and tokenizer stay.

    The counts of the other domains in the manifest become 0. Raises ConfigError for a domain that the data do not have,
    and if no training block remains.
    """
    check_train_domains(names, data.domains)
    numbers = [number for number, name in enumerate(data.domains) if name in names]
    kept = np.flatnonzero(np.isin(data.train["domain"], numbers))
    require(len(kept) > 0, "data.train_domains", list(names), "domains with at least one block of training text")
    domains = {
        name: counts | ({} if name in names else {"train": dict.fromkeys(counts["train"], 0)})
        for name, counts in data.manifest["domains"].items()
    }
    return data._replace(train=data.train.select(kept), manifest={**data.manifest, "domains": domains})


def batch_indices(num_blocks: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Return the indices (batch_size) of the blocks of one step.

    Each epoch is a permutation of all blocks. A batch may contain the end of one epoch and the start of the next.
    """
    epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_blocks)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = _permutation(num_blocks, seed, int(epoch))[positions[in_epoch]]
    return indices


def evenly_spaced(available: int, wanted: int) -> np.ndarray:
    """Return `wanted` evenly spaced indices out of 0 ... available-1, or all if there are not that many.

    Blocks lie domain by domain, so each domain keeps its share of the blocks.
    """
    count = min(wanted, available)
    return np.arange(count) * available // max(1, count)


class Batch(NamedTuple):
    """Blocks in the form in which the model takes them.

    labels: the token ids, not shifted, with IGNORED where nothing is to be predicted. For plain text they equal `ids`.
    position_ids: start at 0 again with each conversation of a block, and conversations do not attend to each other.
        None if a block is one text.
    told: the domain and the shuffled domain of each block, see `moe.routing.decision.LABELS`. None if the domain of a
        text is unknown.
    """

    ids: Int[torch.Tensor, "B S"]
    domain: Int[torch.Tensor, " B"]
    labels: Int[torch.Tensor, "B S"]
    position_ids: Int[torch.Tensor, "B S"] | None
    told: Int[torch.Tensor, "B 2"] | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of a model, without labels."""
        return {"input_ids": self.ids, "position_ids": self.position_ids, "told": self.told}

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on `device`. The transfer to a GPU does not wait for the GPU's other work."""

        def move(values: torch.Tensor) -> torch.Tensor:
            return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)

        return self._map(move)

    def take(self, blocks: slice) -> "Batch":
        """Return the batch of these blocks alone."""
        return self._map(lambda values: values[blocks])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        parts: list[Any] = [None if values is None else change(values) for values in self]
        return Batch(*parts)

    def split(self, size: int) -> "list[Batch]":
        """Return batches of `size` blocks; the last one may be smaller."""
        return [self.take(slice(start, start + size)) for start in range(0, len(self.ids), size)]


def batch(table: BlockTable, indices: Sequence[int] | np.ndarray) -> Batch:
    """Return the blocks at `indices` (B), as int64 tensors."""
    rows = {name: torch.from_numpy(column) for name, column in table[indices].items()}
    ids, domain = rows["input_ids"], rows["domain"]
    shuffled = torch.from_numpy(_shuffled_domains(table)[np.asarray(indices)])
    told = torch.stack([domain, shuffled], 1)
    return Batch(ids, domain, rows.get("labels", ids), rows.get("position_ids"), told)


@lru_cache(maxsize=4)
def _shuffled_domains(table: BlockTable) -> np.ndarray:
    """Return the domain of each block of a table, shuffled over its blocks in the same way at each call."""
    domain = table["domain"]
    return domain[_permutation(len(domain), SHUFFLE, 0)]


@lru_cache(maxsize=2)
def _permutation(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    # This sorts raw bits because numpy keeps them the same in all versions, unlike Generator.permutation.
    bits = np.random.Philox(key=[seed, epoch]).random_raw(num_blocks)
    permutation = np.argsort(bits, kind="stable")
    permutation.setflags(write=False)
    return permutation


# ---- Making the blocks ------------------------------------------------------------------------------------------


def _build(source: Source, folder: Path, settings: BlockSettings) -> dict[str, Any]:
    """Write the folders tokenizer, train, val and, if there is test text, test; return their manifest entries."""
    seq_len, test_percent = settings.seq_len, settings.test_percent
    corpus, beyond, left_out = _read(source, test_percent)
    splits = divide(corpus, beyond, val_percent=settings.val_percent, test_percent=test_percent)
    if settings.vocab_size is not None:
        fast = train_bpe([document.text for document in _all(splits.train)], settings.vocab_size)
    else:
        fast = pretrained_tokenizer(settings.tokenizer, settings.tokenizer_revision)
    make_blocks = concatenate
    if any(document.turns for document in _all(corpus)):
        set_template(fast)
        make_blocks = pack
    fast.save_pretrained(folder / "tokenizer")

    counts: dict[str, Any] = {domain: {"sha256": _digest(documents)} for domain, documents in corpus.items()}
    parts = [("train", splits.train, None), ("val", splits.val, settings.max_val_blocks)]
    if test_percent:
        parts.append(("test", splits.test, settings.max_test_blocks))
    for name, split, max_blocks in parts:
        blocks = {
            domain: make_blocks(documents, fast, seq_len, f"tokenize {name} {domain}")
            for domain, documents in split.items()
        }
        table = _table(list(blocks.values()), max_blocks, with_document=name != "train")
        if not len(table):
            without = ", or data.test_percent=0" if name == "test" else ""
            raise ValueError(
                f"data.seq_len={seq_len}: no {name} block is that long; give more or longer documents{without}"
            )
        _refuse_padding(table, fast, name)
        table.save(folder / name)
        for domain, counted in _counts(split, blocks, table["domain"]).items():
            counts[domain][name] = counted
        if name != "train":
            lengths = _predicted_bytes(table, fast, len(counts))
            for domain, length in zip(counts, lengths, strict=True):
                counts[domain][name]["predicted_bytes"] = length
    return {
        "corpus_sha256": _digest(_all(corpus)),
        "test_sha256": _digest(_all(splits.test)) if test_percent else None,
        "tokenizer_sha256": sha256(folder / "tokenizer" / "tokenizer.json"),
        "domains": counts,
        "left_out": left_out,
        "split": splits.rule,
        "test_split": splits.test_rule,
    }


def _all(corpus: Corpus) -> Iterator[Document]:
    return chain.from_iterable(corpus.values())


def _read(source: Source, test_percent: int) -> tuple[Corpus, Corpus, dict[str, int]]:
    """Return the documents of a source within its limit and beyond it, and the number of those left out, by reason.

    Raises ValueError if there are none.
    """
    left_out: dict[str, int] = {}

    def documents() -> Iterator[Document]:
        reserves = test_percent and hasattr(source, "with_test")
        found: Any = source.with_test(test_percent) if reserves else source.documents()  # type: ignore[attr-defined]
        left_out.update((yield from found) or {})

    corpus, beyond = defaultdict[str, list[Document]](list), defaultdict[str, list[Document]](list)
    for document in tqdm(documents(), "read", unit=" documents", leave=False, disable=None):
        (beyond if document.beyond else corpus)[document.domain].append(document)
    counts = ", ".join(f"{number} {reason}" for reason, number in left_out.items() if number)
    if not corpus:
        place, value = next(iter(vars(source).items()), ("_target_", type(source).__name__))
        value = list(value) if isinstance(value, tuple) else value
        left = f" (left out: {counts})" if counts else ""
        raise ValueError(f"data.source.{place}={value}: must have text, but yields no documents{left}")
    if counts:
        rule = f"; {DuplicateFilter.RULE}" if left_out.get(DUPLICATES) else ""
        read = sum(len(documents) for part in (corpus, beyond) for documents in part.values())
        log.info("left out: %s, of %d documents%s", counts, sum(left_out.values()) + read, rule)
    return corpus, beyond, left_out


def _counts(
    split: dict[str, list[Document]], blocks: dict[str, Blocks], domain_of_block: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return the entries of the manifest about each domain of one split."""
    return {
        domain: {
            "documents": len(documents),
            "chars": sum(len(document.text) for document in documents),
            **blocks[domain].counts,
            "blocks": int((domain_of_block == number).sum()),
        }
        for number, (domain, documents) in enumerate(split.items())
    }


def _table(domains: list[Blocks], max_blocks: int | None, *, with_document: bool) -> BlockTable:
    """Return the blocks domain by domain, at most `max_blocks` of them, with the column `document` if asked for."""
    columns = {name: np.concatenate([blocks.columns[name] for blocks in domains]) for name in domains[0].columns}
    columns["domain"] = np.repeat(np.arange(len(domains)), [len(blocks.document) for blocks in domains])
    if with_document:
        numbers: dict[tuple[int, str], int] = {}
        pairs = [(domain, name) for domain, blocks in enumerate(domains) for name in blocks.document]
        columns["document"] = np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], dtype=np.int32)
    if max_blocks is not None:
        selected = evenly_spaced(len(columns["domain"]), max_blocks)
        columns = {name: column[selected] for name, column in columns.items()}
    return BlockTable(columns)


def _predicted_bytes(data: BlockTable, tokenizer: PreTrainedTokenizerFast, domains: int) -> list[int]:
    """Return for each domain the length of the text that a model predicts, in bytes of UTF-8.

    It is the text of all tokens that are the target of a prediction, as the tokenizer decodes them. Tokens that stand
    for no text, such as the end of a document, have a length of 0.
    """
    lengths = [0] * domains
    for first in range(0, len(data), 256):
        blocks = batch(data, range(first, min(first + 256, len(data))))
        targets = [row[row != IGNORED].tolist() for row in next_token(blocks.labels)]
        texts = tokenizer.batch_decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for domain, text in zip(blocks.domain.tolist(), texts, strict=True):
            lengths[domain] += len(text.encode(errors="replace"))
    return lengths


def _refuse_padding(table: BlockTable, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Raise ValueError if the blocks contain padding tokens, unless the tokenizer pads with a token that ends texts."""
    if tokenizer.pad_token_id in end_ids(tokenizer):
        return
    found = sum((ids == tokenizer.pad_token_id).mean(1).sum() for ids in table.parts("input_ids", 4096))
    if found:
        share = found / len(table)
        raise ValueError(
            f"data.tokenizer: {share:.1%} of the tokens of the {name} blocks are its padding token "
            f"{tokenizer.pad_token!r}; it must pad with a token that no text contains"
        )


def _digest(documents: Iterable[Document]) -> str:
    """Return the sha256 of the domains, ids, texts and turns of the documents, in order."""
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.domain, document.id, document.text, *chain(*document.turns)):
            digest.update(field.encode() + b"\0")
    return digest.hexdigest()


def _load(folder: Path) -> Prepared:
    manifest = json.loads(read_text(folder / "manifest.json"))
    names = ["train", "val", *(["test"] if manifest["test_sha256"] else [])]
    splits = {name: BlockTable.load(folder / name) for name in names}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return Prepared(**splits, domains=tuple(manifest["domains"]), tokenizer=tokenizer, manifest=manifest)
