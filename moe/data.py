"""Documents to token blocks: split, tokenise, cut, cache as Arrow; and the order in which training reads the blocks.

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
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe.corpus import Document, Source, checksums
from moe.record import sha256, sync

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it whenever the same arguments give other blocks or other files
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as in SmolLM


class Prepared(NamedTuple):
    """Token blocks of one corpus.

    train, val: columns input_ids (seq_len) and domain (an index into `domains`); no block mixes domains.
    manifest: what the blocks were made of: counts, licences, versions, checksums.
    """

    train: datasets.Dataset
    val: datasets.Dataset
    domains: tuple[str, ...]
    tokenizer: PreTrainedTokenizerFast
    manifest: dict[str, Any]


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
        "tokenizer": {"name": tokenizer, "vocab_size": vocab_size, "files": _tokenizer_files(tokenizer)},
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


def batch(dataset: datasets.Dataset, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (B, S) and domain (B) of the blocks at `indices` (B), both int64."""
    rows = dataset[indices]
    return torch.from_numpy(rows["input_ids"]), torch.from_numpy(rows["domain"])


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
        pretrained = _train_bpe([document.text for documents in train.values() for document in documents], vocab_size)
    else:
        pretrained = _pretrained_tokenizer(tokenizer)
    pretrained.save_pretrained(folder / "tokenizer")

    counts: dict[str, Any] = {domain: {"sha256": _digest(documents)} for domain, documents in corpus.items()}
    for name, split, max_blocks in (("train", train, None), ("val", val, max_val_blocks)):
        tokens = {
            domain: _tokenise(documents, pretrained, f"tokenise {name} {domain}") for domain, documents in split.items()
        }
        dataset = _cut(tokens, seq_len, max_blocks)
        if not len(dataset):
            raise ValueError(f"data.seq_len={seq_len}: no {name} block is that long; give more or longer documents")
        dataset.save_to_disk(folder / name)
        labels = np.asarray(dataset["domain"])
        for label, (domain, documents) in enumerate(split.items()):
            counts[domain][name] = {
                "documents": len(documents),
                "chars": sum(len(document.text) for document in documents),
                "tokens": len(tokens[domain]),
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


def _train_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
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


def _pretrained_tokenizer(name: str) -> PreTrainedTokenizerFast:
    pretrained = AutoTokenizer.from_pretrained(name)
    if not isinstance(pretrained, PreTrainedTokenizerFast) or pretrained.eos_token_id is None:
        raise ValueError(f"data.tokenizer={name}: must be a fast tokenizer that has an end-of-text token")
    return pretrained


def _tokenizer_files(name: str) -> dict[str, str]:
    """Checksums of a local tokenizer; none for "bpe" and for a name on the hub."""
    return checksums(sorted(Path(name).glob("*token*.json")))


def _tokenise(documents: list[Document], tokenizer: PreTrainedTokenizerFast, label: str) -> np.ndarray:
    """Ids of the documents, each followed by the end-of-text token. Text that spells a special token stays text."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, to leave the tokenizer as it was
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    ids = [np.empty(0, dtype=np.int32)]
    for start in tqdm(range(0, len(documents), 64), label, leave=False, disable=None):
        texts = [document.text for document in documents[start : start + 64]]
        for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
            ids.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int32))
    return np.concatenate(ids)


def _cut(tokens: dict[str, np.ndarray], seq_len: int, max_blocks: int | None) -> datasets.Dataset:
    """Blocks of `seq_len` tokens, domain by domain, each domain's tail dropped; `max_blocks` of them, evenly spaced."""
    blocks = [ids[: len(ids) // seq_len * seq_len].reshape(-1, seq_len) for ids in tokens.values()]
    input_ids = np.concatenate(blocks)
    domain = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
    if max_blocks is not None and max_blocks < len(domain):
        kept = np.arange(max_blocks) * len(domain) // max_blocks
        input_ids, domain = input_ids[kept], domain[kept]
    features = {"input_ids": datasets.List(datasets.Value("int32"), length=seq_len), "domain": datasets.Value("int32")}
    return datasets.Dataset.from_dict({"input_ids": input_ids, "domain": domain}, features=datasets.Features(features))


def _digest(documents: Iterable[Document]) -> str:
    """sha256 of the documents' domains, ids and texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.domain, document.id, document.text):
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
