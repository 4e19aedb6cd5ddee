"""Documents to token blocks: split, tokenize, cut, cache as Arrow; and the order in which training reads the blocks.

Everything here is a pure function of its arguments, so every seed, rank and resumed run sees the same validation set,
and the batch of a step needs no state.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Int
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from moe.data.chat import set_template
from moe.data.packing import Blocks, cut, pack
from moe.data.sources import Document, Source, checksums
from moe.data.tokenizer import SPECIAL_TOKENS, pretrained_tokenizer, tokenizer_files, train_bpe
from moe.files import sha256, sync

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it whenever the same arguments give other blocks or other files


class Prepared(NamedTuple):
    """Token blocks of one corpus.

    train, val: columns input_ids (seq_len) and domain (an index into `domains`); no block mixes domains. Blocks of
        conversations have labels and position_ids (seq_len) too, see `Batch`.
    val: document too, a number for each source file (`Document.group`, which the split never parts; a conversation is
        its own). A block has that of its first token, whatever follows. Blocks of one document are not independent.
    manifest: what the blocks were made of: counts, licenses, versions, checksums.
    """

    train: datasets.Dataset
    val: datasets.Dataset
    domains: tuple[str, ...]
    tokenizer: PreTrainedTokenizerFast
    manifest: dict[str, Any]

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of the text and of the tokenizer: with the configuration, all that the blocks depend on."""
        return {name: self.manifest[name] for name in ("corpus_sha256", "tokenizer_sha256")}


def prepare(
    source: Source,
    *,
    tokenizer: str,
    vocab_size: int | None,
    seq_len: int,
    val_percent: int,
    max_val_blocks: int | None,
    cache: str,
) -> Prepared:
    """Token blocks of `source`, from `<cache>/<key>` if they are there and intact, else made and written there.

    tokenizer: "bpe" trains one of `vocab_size` tokens on the train documents; any other value is a path or hub name of
        a fast tokenizer, whose vocabulary is its own, so `vocab_size` must be None.
    val_percent: share of each domain's characters to validate on, in whole source files chosen by hash.
    max_val_blocks: evenly spaced blocks to keep of the validation set, which leaves the domains' shares as they are.

    Processes that prepare the same data at once wait for the first. Raises ValueError for a value outside its range.
    """
    if (tokenizer == "bpe") != (vocab_size is not None):
        raise ValueError(f"data.vocab_size={vocab_size}: an integer for data.tokenizer=bpe, null for {tokenizer!r}")
    if vocab_size is not None and vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(
            f"data.vocab_size={vocab_size}: at least {256 + len(SPECIAL_TOKENS)}, bytes and special tokens"
        )
    if seq_len < 2:
        raise ValueError(f"data.seq_len={seq_len}: at least 2, an input and a target")
    if not 0 < val_percent < 100:
        raise ValueError(f"data.val_percent={val_percent}: between 1 and 99")
    if max_val_blocks is not None and max_val_blocks < 1:
        raise ValueError(f"data.max_val_blocks={max_val_blocks}: at least 1, or null for all")

    recipe: dict[str, Any] = {
        "format": FORMAT,
        "source": {"class": type(source).__name__, **vars(source)},
        "documents": source.describe(),
        "tokenizer": {"name": tokenizer, "vocab_size": vocab_size, "files": tokenizer_files(tokenizer)},
        "blocks": {"seq_len": seq_len, "val_percent": val_percent, "max_val_blocks": max_val_blocks},
        "packages": {name: metadata.version(name) for name in ("datasets", "tokenizers")},
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(cache).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    with FileLock(root / f"{key}.lock"):
        if folder.exists() and not _intact(folder):
            logger.warning("%s is damaged: making it again", folder)
            shutil.rmtree(folder)
        if not folder.exists():
            unfinished = root / f"{key}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
            contents = _build(source, unfinished, tokenizer=tokenizer, vocab_size=vocab_size, **recipe["blocks"])
            _publish(unfinished, folder, {"key": key, **recipe, **contents})
    return _load(folder)


def batch_indices(num_blocks: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Indices (batch_size) of the blocks of one step: epochs are permutations, and a batch may straddle two of them."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_blocks)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        indices[now] = _permutation(num_blocks, seed, int(epoch))[places[now]]
    return indices


class Batch(NamedTuple):
    """Blocks as the model takes them.

    labels: unshifted, IGNORED where nothing is predicted; of plain text the ids themselves.
    position_ids: they start at 0 again with each conversation of a block, and none sees another; None: one text.
    """

    ids: Int[torch.Tensor, "B S"]
    domain: Int[torch.Tensor, "B"]
    labels: Int[torch.Tensor, "B S"]
    position_ids: Int[torch.Tensor, "B S"] | None

    def to(self, device: torch.device) -> "Batch":
        """On `device`; a GPU goes on with what it has to do meanwhile."""

        def move(values: torch.Tensor) -> torch.Tensor:
            return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)

        positions = None if self.position_ids is None else move(self.position_ids)
        return Batch(move(self.ids), move(self.domain), move(self.labels), positions)

    def take(self, blocks: slice) -> "Batch":
        positions = None if self.position_ids is None else self.position_ids[blocks]
        return Batch(self.ids[blocks], self.domain[blocks], self.labels[blocks], positions)

    def split(self, size: int) -> "list[Batch]":
        """Batches of `size` blocks, the last one maybe smaller."""
        return [self.take(slice(start, start + size)) for start in range(0, len(self.ids), size)]


def batch(dataset: datasets.Dataset, indices: Sequence[int] | np.ndarray) -> Batch:
    """The blocks at `indices` (B), all int64."""
    rows = {name: torch.from_numpy(column) for name, column in dataset[indices].items()}
    ids = rows["input_ids"]
    return Batch(ids, rows["domain"], rows.get("labels", ids), rows.get("position_ids"))


@lru_cache(maxsize=2)
def _permutation(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting the raw bits: unlike Generator.permutation, numpy never changes those between versions.
    bits = np.random.Philox(key=[seed, epoch]).random_raw(num_blocks)
    permutation = np.argsort(bits, kind="stable")
    permutation.setflags(write=False)
    return permutation


# ---- Making the blocks ------------------------------------------------------------------------------------------


def _build(
    source: Source,
    folder: Path,
    *,
    tokenizer: str,
    vocab_size: int | None,
    seq_len: int,
    val_percent: int,
    max_val_blocks: int | None,
) -> dict[str, Any]:
    """Write the folders tokenizer, train and val; returns what the manifest says about them."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # as tqdm(disable=None) does for our own
    corpus: dict[str, list[Document]] = defaultdict(list)
    for document in tqdm(source.documents(), "read", unit=" documents", disable=None):
        corpus[document.domain].append(document)
    if not corpus:
        raise ValueError(f"data.source={source}: not one document")
    train, val = {}, {}
    for domain, documents in corpus.items():
        train[domain], val[domain] = _split(documents, val_percent)
        if not val[domain]:
            logger.warning("domain %s has one source file only: all of it is train, none is val", domain)

    if vocab_size is not None:
        pretrained = train_bpe([document.text for documents in train.values() for document in documents], vocab_size)
    else:
        pretrained = pretrained_tokenizer(tokenizer)
    make = cut
    if any(document.turns for documents in corpus.values() for document in documents):
        set_template(pretrained)
        make = pack
    pretrained.save_pretrained(folder / "tokenizer")

    counts: dict[str, Any] = {domain: {"sha256": _digest(documents)} for domain, documents in corpus.items()}
    for name, split, max_blocks in (("train", train, None), ("val", val, max_val_blocks)):
        blocks = {
            domain: make(documents, pretrained, seq_len, f"tokenize {name} {domain}")
            for domain, documents in split.items()
        }
        dataset = _dataset(list(blocks.values()), max_blocks, documents=name == "val")
        if not len(dataset):
            raise ValueError(f"data.seq_len={seq_len}: no {name} block is that long; give more or longer documents")
        dataset.save_to_disk(folder / name)
        labels = np.asarray(dataset["domain"])
        for label, (domain, documents) in enumerate(split.items()):
            counts[domain][name] = {
                "documents": len(documents),
                "chars": sum(len(document.text) for document in documents),
                **blocks[domain].counts,
                "blocks": int((labels == label).sum()),
            }
    return {
        "corpus_sha256": _digest(document for documents in corpus.values() for document in documents),
        "tokenizer_sha256": sha256(folder / "tokenizer" / "tokenizer.json"),
        "domains": counts,
    }


def _split(documents: list[Document], val_percent: int) -> tuple[list[Document], list[Document]]:
    """One domain's train and val documents; both have some if there are two source files.

    In the order of a hash, source files go to val as long as they fit into `val_percent` of the characters (a huge file
    is passed over, else it could be most of either split); if none fits, the smallest goes.
    """
    chars: Counter[str] = Counter()
    for document in documents:
        chars[document.group] += len(document.text)
    val, val_chars = set(), 0
    for group in sorted(chars, key=lambda group: hashlib.sha256(f"{documents[0].domain}/{group}".encode()).digest()):
        if 100 * (val_chars + chars[group]) <= val_percent * chars.total():
            val.add(group)
            val_chars += chars[group]
    if not val and len(chars) > 1:
        val = {min(chars, key=lambda group: (chars[group], group))}
    train = [document for document in documents if document.group not in val]
    return train, [document for document in documents if document.group in val]


def _dataset(domains: list[Blocks], max_blocks: int | None, *, documents: bool) -> datasets.Dataset:
    """The blocks, domain by domain, with their `documents` or without; `max_blocks` of them, evenly spaced."""
    columns = {name: np.concatenate([blocks.columns[name] for blocks in domains]) for name in domains[0].columns}
    columns["domain"] = np.repeat(np.arange(len(domains)), [len(blocks.document) for blocks in domains])
    if documents:
        numbers: dict[tuple[int, str], int] = {}
        pairs = [(label, name) for label, blocks in enumerate(domains) for name in blocks.document]
        columns["document"] = np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], dtype=np.int32)
    count = len(columns["domain"])
    if max_blocks is not None and max_blocks < count:
        kept = np.arange(max_blocks) * count // max_blocks
        columns = {name: column[kept] for name, column in columns.items()}
    features = datasets.Features({name: datasets.Value("int32") for name in columns})
    for name in [name for name, column in columns.items() if column.ndim > 1]:
        features[name] = datasets.List(features[name], length=columns[name].shape[1])
    return datasets.Dataset.from_dict(columns, features=features)


def _digest(documents: Iterable[Document]) -> str:
    """sha256 of the documents' domains, ids, texts and turns, in order."""
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.domain, document.id, document.text, *chain(*document.turns)):
            digest.update(field.encode() + b"\0")
    return digest.hexdigest()


# ---- The cache --------------------------------------------------------------------------------------------------


def _publish(unfinished: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Move a complete folder to its name: whoever sees it, even after a power cut, sees all of it."""
    manifest["files"] = _file_sums(unfinished)
    (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    unfinished.rename(folder)
    sync(folder.parent)


def _file_sums(folder: Path) -> dict[str, str]:
    """Checksums of every file but the manifest, by path inside the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {Path(path).relative_to(folder).as_posix(): digest for path, digest in checksums(files).items()}


def _intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return manifest["files"] == _file_sums(folder)
    except (OSError, ValueError, KeyError):
        return False


def _load(folder: Path) -> Prepared:
    manifest = json.loads((folder / "manifest.json").read_text())
    train, val = (datasets.load_from_disk(folder / name).with_format("numpy") for name in ("train", "val"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return Prepared(train, val, tuple(manifest["domains"]), tokenizer, manifest)
