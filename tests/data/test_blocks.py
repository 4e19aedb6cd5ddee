"""Tests of blocks of tokens: they are made once, are the same in every process, and are read without state.

No source file has blocks in both training and validation.
"""

import json
import logging
import os
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe.data.blocks import Prepared, batch, batch_indices, prepare
from moe.data.cache import locked
from moe.data.documents import Document
from moe.data.embedded import DOMAINS, Embedded
from moe.data.limits import BlockSettings
from moe.data.sources import Files, Hub
from moe.data.tokenizer import text_encoder

ROOT = Path(__file__).parents[2]
EMBEDDED = Embedded(list(DOMAINS), 20_000)


@dataclass(frozen=True)
class NamedGroups:
    """Source with two documents per group. Each repeats one word that names its group, so a block shows its groups."""

    domains: int = 3
    groups: int = 8
    changed: str = ""  # names of the groups whose word ends in `suffix`, separated by spaces
    suffix: str = ""

    def documents(self) -> Iterator[Document]:
        for domain in range(self.domains):
            for group in range(self.groups):
                name = f"d{domain}g{group}"
                word = f"{name}{self.suffix}" if name in self.changed.split() else name
                for number in range(2):
                    yield Document(f"domain{domain}", f"{name}:{number}", f"{word} " * (40 + number), name)

    def describe(self) -> dict[str, dict]:
        return {}


def prepare_small(source, cache: Path, **changes) -> Prepared:
    settings = {"tokenizer": "bpe", "vocab_size": 300, "seq_len": 16, "val_percent": 20, "max_val_blocks": None}
    return prepare(source, BlockSettings(**{**settings, **changes}), cache=str(cache))


def test_making_blocks_leaves_nothing_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars are erased when what they count is done, and no library draws one of its own."""
    screen, terminal = os.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        termios.tcsetwinsize(terminal, (40, 100))
        prepare_small(NamedGroups(domains=1), tmp_path)
        stderr.flush()
        drawn = os.read(screen, 100_000).decode()
    os.close(screen)
    assert "tokenize train" in drawn
    assert "Saving the dataset" not in drawn
    assert "\n" not in drawn
    assert not drawn.rpartition("\r")[2].strip()


def texts(prepared: Prepared, name: str) -> list[str]:
    """Return the decoded tokens of a split, one string per domain."""
    blocks = getattr(prepared, name)[:]
    return [
        prepared.tokenizer.decode(blocks["input_ids"][blocks["domain"] == domain].ravel())
        for domain in range(len(prepared.domains))
    ]


def groups_in(prepared: Prepared, name: str) -> set[str]:
    """Return the groups of `NamedGroups` that have the start of a document in a split."""
    return {part.split()[0] for text in texts(prepared, name) for part in text.split("<|endoftext|>") if part.split()}


def column_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


@pytest.fixture(scope="module")
def named_groups(tmp_path_factory) -> Prepared:
    return prepare_small(NamedGroups(), tmp_path_factory.mktemp("named_groups"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Prepared:
    return prepare_small(EMBEDDED, tmp_path_factory.mktemp("embedded"), vocab_size=1024, seq_len=64, val_percent=10)


# ---- The split ---------------------------------------------------------------------------------------------------


def test_no_source_file_is_in_both_splits_and_every_domain_is_in_both(named_groups):
    train, val = groups_in(named_groups, "train"), groups_in(named_groups, "val")
    assert not train & val
    for split in (train, val):
        assert {name[:2] for name in split} == {"d0", "d1", "d2"}


@pytest.mark.parametrize("val_percent", [1, 99])
def test_two_source_files_per_domain_are_enough_for_both_splits(tmp_path, val_percent):
    prepared = prepare_small(NamedGroups(groups=2), tmp_path, val_percent=val_percent)
    assert len(groups_in(prepared, "train")) == len(groups_in(prepared, "val")) == 3


@pytest.mark.parametrize("val_percent", [10, 50])
def test_validation_holds_val_percent_of_each_domain(tmp_path, val_percent):
    prepared = prepare_small(NamedGroups(groups=40), tmp_path, val_percent=val_percent)
    for counts in prepared.manifest["domains"].values():
        share = counts["val"]["chars"] / (counts["train"]["chars"] + counts["val"]["chars"])
        assert val_percent - 3 < 100 * share <= val_percent  # a source file has 2.5 % of the text


@dataclass(frozen=True)
class OneFile(NamedGroups):
    """Source whose first domain has one source file, of two documents. The others have `groups`."""

    def documents(self) -> Iterator[Document]:
        for document in super().documents():
            if document.domain != "domain0" or document.group == "d0g0":
                yield document


def test_a_domain_with_one_source_file_is_used_for_training_only_with_a_warning(tmp_path, caplog):
    """If other domains have validation text, the only source file of a domain is not divided."""
    with caplog.at_level(logging.WARNING):
        prepared = prepare_small(OneFile(), tmp_path)
    assert "domain domain0 has only one source file" in caplog.text
    assert set(prepared.val["domain"][:]) == {1, 2}
    assert prepared.manifest["split"] == "by source file"


@pytest.mark.parametrize("val_percent", [1, 10, 50, 99])
def test_without_two_source_files_in_any_domain_the_end_of_the_text_is_for_validation(tmp_path, caplog, val_percent):
    """One long document is divided by position, at white space, and a sentence and the manifest say so."""
    (tmp_path / "poem.txt").write_text(text := " ".join(f"w{number:03}" for number in range(999)))
    source = Files([str(tmp_path / "poem.txt")], "text", None)
    with caplog.at_level(logging.WARNING):
        prepared = prepare_small(source, tmp_path / "cache", val_percent=val_percent, seq_len=4)
    [train], [val] = texts(prepared, "train"), texts(prepared, "val")
    assert text.startswith(train)
    assert abs(len(val) / len(text) - val_percent / 100) < 0.01
    assert val.removesuffix("<|endoftext|>")[:-10] in text[len(train) :]
    assert val[0] == "w"
    assert f"the last {val_percent} % of the characters" in caplog.text
    assert prepared.manifest["split"] == "by position"
    assert len(set(prepared.val["document"][:])) == 1


def test_the_manifest_counts_what_was_left_out(tmp_path, caplog):
    """The number of duplicates and of rows without text is in the manifest, and the log states the rule."""
    rows = [{"text": " ".join(f"r{row}w{word}" for word in range(60))} for row in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:4], {"text": None}]))
    with caplog.at_level(logging.INFO):
        prepared = prepare_small(Files([str(tmp_path / "a.jsonl")], "text", None), tmp_path / "cache")
    assert prepared.manifest["left_out"] == {"duplicates": 4, "files or rows without text": 1}
    assert "left out: 4 duplicates, 1 files or rows without text, of 14 documents; a duplicate has " in caplog.text
    assert "more than 30% of its sequences of 13 words" in caplog.text


def test_validation_text_hardly_occurs_in_training_text(tmp_path):
    """In the two domains with templated text, at most 5 % of the 13-word sequences of validation are in training."""
    prepared = prepare_small(Embedded(["math", "docs"], 200_000), tmp_path, vocab_size=1024)

    def sequences(name: str) -> set[tuple[str, ...]]:
        parts = [text.split() for text in texts(prepared, name)]
        return {tuple(words[start : start + 13]) for words in parts for start in range(len(words) - 12)}

    train, val = sequences("train"), sequences("val")
    assert len(val) > 1000
    assert len(train & val) <= 0.05 * len(val)


# ---- The tokenizer -----------------------------------------------------------------------------------------------


def test_special_tokens_come_first(embedded):
    assert embedded.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert embedded.tokenizer.eos_token_id == 0
    assert len(embedded.tokenizer) == 1024


def test_encoding_and_decoding_restores_every_document(embedded):
    for document in [
        *EMBEDDED.documents(),
        Document("", "", "\u4e2d\u00e9 n't ,\t\r\n 1234 \U0001f600 <|im_end|>", ""),
    ]:
        ids = embedded.tokenizer(document.text, add_special_tokens=False).input_ids
        assert embedded.tokenizer.decode(ids) == document.text


def test_the_predicted_bytes_are_those_of_the_text_for_every_vocabulary(
    named_groups: Prepared, embedded: Prepared
) -> None:
    """A block's text is counted but for its first token, which nothing predicts, and the ends of documents."""
    for prepared in (named_groups, embedded):
        lengths = [0] * len(prepared.domains)
        for row in prepared.val:
            tokens = prepared.tokenizer.convert_ids_to_tokens(row["input_ids"][1:])
            # In a byte-level vocabulary each character of a token stands for one byte.
            lengths[row["domain"]] += sum(len(token) for token in tokens if token != prepared.tokenizer.eos_token)
        # A character that is cut at the border of a block is counted as three bytes.
        assert prepared.predicted_bytes("val") == pytest.approx(lengths, rel=0.01)


def test_no_token_has_more_than_one_digit(named_groups, tmp_path):
    years = prepare_small(NamedGroups(changed=" ".join(groups_in(named_groups, "train")), suffix="-1789"), tmp_path)
    assert not [token for token in years.tokenizer.get_vocab() if sum(map(str.isdigit, token)) > 1]


def test_the_tokenizer_is_trained_on_training_text_only(named_groups, tmp_path):
    val = " ".join(groups_in(named_groups, "val"))
    train = " ".join(groups_in(named_groups, "train"))
    digest = named_groups.manifest["tokenizer_sha256"]
    assert prepare_small(NamedGroups(changed=val, suffix="xyz"), tmp_path).manifest["tokenizer_sha256"] == digest
    assert prepare_small(NamedGroups(changed=train, suffix="xyz"), tmp_path).manifest["tokenizer_sha256"] != digest


def pad_and_truncate(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer(["a", "b c"], padding="max_length", max_length=512, truncation=True)
    tokenizer.save_pretrained(folder)


def add_special_tokens(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save_pretrained(folder)


def split_special_tokens(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"split_special_tokens": True, "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def leave_out_merges_at_random(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.backend_tokenizer.model.dropout = 0.5
    tokenizer.save_pretrained(folder)


USES = [pad_and_truncate, add_special_tokens, split_special_tokens, leave_out_merges_at_random]


@pytest.mark.parametrize("use", USES)
def test_settings_that_were_left_in_a_tokenizer_change_neither_blocks_nor_the_saved_tokenizer(
    named_groups: Prepared, tmp_path: Path, use: Callable[[PreTrainedTokenizerFast, Path], None]
) -> None:
    tokenizer = deepcopy(named_groups.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    use(tokenizer, tmp_path / "used")
    prepared = prepare_small(NamedGroups(), tmp_path, tokenizer=str(tmp_path / "used"), vocab_size=None)
    for split in ("train", "val"):
        blocks, expected = (getattr(each, split)["input_ids"] for each in (prepared, named_groups))
        assert np.array_equal(blocks, expected)
    backend = Tokenizer.from_str(prepared.tokenizer.backend_tokenizer.to_str())
    assert backend.padding is backend.truncation is backend.model.dropout is None
    prepared.tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "d0g1 <|im_start|> " * 9
    expected = named_groups.tokenizer(text).input_ids
    assert backend.encode(text).ids == saved(text).input_ids == expected
    assert text_encoder(prepared.tokenizer, parse_special=True).encode(text).ids == expected
    assert saved(["d0 g1", "d"], padding=True)["attention_mask"][1][0] == 0


def test_a_padding_token_that_occurs_in_texts_is_refused(named_groups: Prepared, tmp_path: Path) -> None:
    tokenizer = deepcopy(named_groups.tokenizer)
    tokenizer.pad_token = "d"
    tokenizer.save_pretrained(tmp_path / "padding")
    with pytest.raises(
        ValueError, match=r"^data\.tokenizer: \d+\.\d% of the tokens of the train blocks are .* token 'd'"
    ):
        prepare_small(NamedGroups(), tmp_path, tokenizer=str(tmp_path / "padding"), vocab_size=None)


def test_a_saved_tokenizer_gives_the_same_blocks_as_before(named_groups, tmp_path):
    named_groups.tokenizer.save_pretrained(tmp_path / "bpe")
    prepared = prepare_small(NamedGroups(), tmp_path, tokenizer=str(tmp_path / "bpe"), vocab_size=None)
    assert prepared.manifest["key"] != named_groups.manifest["key"]
    for name in ("train", "val"):
        np.testing.assert_array_equal(getattr(prepared, name)["input_ids"], getattr(named_groups, name)["input_ids"])


# ---- The blocks --------------------------------------------------------------------------------------------------


def test_every_block_has_one_domain_and_only_the_last_tokens_fill_no_block(named_groups):
    for name in ("train", "val"):
        for domain, text in enumerate(texts(named_groups, name)):
            assert {word[:2] for word in text.replace("<|endoftext|>", " ").split()} <= {
                f"d{domain}",
                "d",
                f"d{domain}g",
            }
        for counts in named_groups.manifest["domains"].values():
            assert counts[name]["blocks"] == counts[name]["tokens"] // 16


def test_one_end_of_text_token_follows_each_document_even_if_its_text_contains_that_token(tmp_path):
    @dataclass(frozen=True)
    class WithSpecialTokens(NamedGroups):
        def documents(self) -> Iterator[Document]:
            for document in super().documents():
                yield document._replace(text=f"<|endoftext|>{document.text}<|im_end|>")

    prepared = prepare_small(WithSpecialTokens(), tmp_path, seq_len=2)
    for name in ("train", "val"):
        ids = getattr(prepared, name)["input_ids"][:]
        documents = sum(counts[name]["documents"] for counts in prepared.manifest["domains"].values())
        # In each domain, one end-of-text token may be among the last tokens, which fill no block.
        assert documents - len(prepared.domains) <= (ids == 0).sum() <= documents
        assert not np.isin(ids, [1, 2]).any()


@pytest.mark.parametrize("cap", [7, 40])
def test_a_capped_validation_set_keeps_the_shares_of_the_domains(named_groups, tmp_path, cap):
    uncapped = np.bincount(named_groups.val["domain"][:], minlength=3)
    capped = prepare_small(NamedGroups(), tmp_path, max_val_blocks=cap).val
    assert len(capped) == cap < len(named_groups.val)
    assert (np.abs(np.bincount(capped["domain"][:], minlength=3) - cap * uncapped / uncapped.sum()) < 1).all()
    document = {tuple(block["input_ids"]): block["document"] for block in named_groups.val}
    assert all(document[tuple(block["input_ids"])] == block["document"] for block in capped)


def groups_of_first_tokens(prepared: Prepared, source) -> list[tuple[int, str]]:
    """Return domain and group of the first token of each validation block, found by decoding the documents."""
    groups = {document.text: document.group for document in source.documents()}
    blocks, found = prepared.val[:], []
    for domain in range(len(prepared.domains)):
        ids = blocks["input_ids"][blocks["domain"] == domain]
        ends = np.flatnonzero(ids.ravel() == 0)
        parts = np.split(ids.ravel(), ends + 1)
        texts = [prepared.tokenizer.decode(part[part != 0]) for part in parts]
        # An end-of-text token belongs to the document that it ends.
        for place in np.searchsorted(ends, np.arange(len(ids)) * ids.shape[1]):
            [group] = {group for text, group in groups.items() if text.startswith(texts[place].rstrip("\ufffd"))}
            found.append((domain, group))
    return found


@pytest.mark.parametrize("source", [NamedGroups(), Embedded(list(DOMAINS), 40_000)])
def test_a_validation_block_has_the_number_of_its_first_tokens_document(source, tmp_path):
    prepared = prepare_small(source, tmp_path, val_percent=50)
    numbers, expected = prepared.val["document"][:].tolist(), groups_of_first_tokens(prepared, source)
    assert len(set(zip(numbers, expected, strict=True))) == len(set(numbers)) == len(set(expected))
    assert len(prepared.domains) < len(set(numbers)) < len(numbers)
    assert prepared.train.column_names == ["domain", "input_ids"]  # training needs no other column


def test_shuffled_domains_are_the_domains_in_another_order_and_those_of_a_block_never_change(named_groups):
    data = named_groups.train
    whole = batch(data, range(len(data)))
    true, shuffled = whole.told.unbind(1)
    assert torch.equal(true.bincount(), shuffled.bincount())
    shares = true.bincount() / len(data)
    agree = (true == shuffled).double().mean()  # as often as two independent labels
    assert agree < 1
    assert abs(agree - (shares**2).sum()) < 4 * (0.25 / len(data)) ** 0.5
    some = np.array([7, 2, 2])
    assert torch.equal(batch(data, some).told[:, 1], shuffled[some])
    parts = [part.told[:, 1] for part in whole.split(3)]
    assert torch.equal(torch.cat(parts), shuffled)


def test_a_batch_has_the_requested_blocks_and_domains(named_groups):
    indices = np.array([5, 0, 5, len(named_groups.train) - 1])
    input_ids, domain, labels, positions, told = batch(named_groups.train, indices)
    assert input_ids.shape == (4, 16)
    assert domain.shape == (4,)
    assert input_ids.dtype == domain.dtype == torch.int64
    assert torch.equal(labels, input_ids)
    assert positions is None
    assert torch.equal(told[:, 0], domain)
    for row, index in enumerate(indices.tolist()):
        assert input_ids[row].tolist() == list(named_groups.train[index]["input_ids"])
        assert domain[row] == named_groups.train[index]["domain"]


# ---- The order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "batch_size"), [(10, 3), (12, 4), (5, 16), (1, 1)])
def test_each_epoch_reads_each_block_once(num_blocks, batch_size):
    steps = -(-3 * num_blocks // batch_size)
    order = np.concatenate([batch_indices(num_blocks, batch_size, seed=0, step=step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * num_blocks : (epoch + 1) * num_blocks]) == list(range(num_blocks))


def test_the_order_depends_on_seed_and_step_only():
    def order(seed: int, steps: list[int]) -> dict[int, list[int]]:
        return {step: batch_indices(50, 8, seed=seed, step=step).tolist() for step in steps}

    forwards = order(3, list(range(20)))
    assert order(3, list(range(19, -1, -1))) == forwards
    assert order(3, [11]) == {11: forwards[11]}
    assert order(4, list(range(20))) != forwards
    epochs = np.concatenate(list(order(3, list(range(25))).values())).reshape(4, 50).tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 4, "every epoch has another order"


def test_the_order_does_not_depend_on_the_batch_size():
    small = [batch_indices(30, 2, seed=1, step=step) for step in range(40)]
    large = [batch_indices(30, 8, seed=1, step=step) for step in range(10)]
    assert np.concatenate(small).tolist() == np.concatenate(large).tolist()


# ---- The cache ---------------------------------------------------------------------------------------------------


def test_two_preparations_make_the_same_blocks(embedded, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        again = prepare_small(EMBEDDED, tmp_path, vocab_size=1024, seq_len=64, val_percent=10)
    for field in ("key", "corpus_sha256", "tokenizer_sha256", "domains"):
        assert again.manifest[field] == embedded.manifest[field]
    assert [path.name for path in (tmp_path / again.manifest["key"]).rglob("*.npy")]
    for name in ("train", "val"):
        np.testing.assert_array_equal(getattr(again, name)["input_ids"], getattr(embedded, name)["input_ids"])


def test_the_manifest_counts_every_document(embedded):
    manifest, documents = embedded.manifest, list(EMBEDDED.documents())
    assert tuple(manifest["domains"]) == embedded.domains == tuple(EMBEDDED.describe())
    assert manifest["documents"] == EMBEDDED.describe()
    for domain, counts in manifest["domains"].items():
        members = [document for document in documents if document.domain == domain]
        assert counts["train"]["documents"] + counts["val"]["documents"] == len(members)
        assert counts["train"]["chars"] + counts["val"]["chars"] == sum(len(document.text) for document in members)
        assert counts["train"]["blocks"] > 0
        assert (counts["val"]["blocks"] > 0) == (len({document.group for document in members}) > 1)


@dataclass(frozen=True)
class ReadOnce(NamedGroups):
    """Source that raises FileExistsError when it is read a second time."""

    marker: str = ""  # file that the first reading creates

    def documents(self) -> Iterator[Document]:
        Path(self.marker).open("x").close()
        return super().documents()


def test_a_second_preparation_reads_no_document(tmp_path):
    source = ReadOnce(marker=str(tmp_path / "read"))
    first, second = prepare_small(source, tmp_path), prepare_small(source, tmp_path)
    assert first.manifest == second.manifest
    assert first.domains == second.domains
    assert second.tokenizer("d0g1").input_ids == first.tokenizer("d0g1").input_ids


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 8},
        {"val_percent": 30},
        {"max_val_blocks": 5},
        {"vocab_size": 290},
        {"source": NamedGroups(groups=9)},
    ],
)
def test_every_argument_changes_the_key_of_the_cache(named_groups, tmp_path, change):
    source = change.pop("source", NamedGroups())
    assert prepare_small(source, tmp_path, **change).manifest["key"] != named_groups.manifest["key"]


def test_caches_of_an_earlier_format_are_not_used(named_groups, tmp_path, monkeypatch):
    monkeypatch.setattr("moe.data.blocks.CACHE_FORMAT", 1)  # an earlier format
    assert prepare_small(NamedGroups(), tmp_path).manifest["key"] != named_groups.manifest["key"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("file", ["train/input_ids.npy", "tokenizer/tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_cache_is_made_again_with_a_warning(tmp_path, caplog, file, damage):
    folder = tmp_path / prepare_small(NamedGroups(), tmp_path).manifest["key"]
    before, manifest = column_files(folder), (folder / "manifest.json").read_text()
    damage(folder / file)
    with caplog.at_level(logging.WARNING, logger="moe.data.blocks"):
        prepare_small(NamedGroups(), tmp_path)
    assert f"{folder} is damaged" in caplog.text
    assert column_files(folder) == before
    assert json.loads((folder / "manifest.json").read_text())["domains"] == json.loads(manifest)["domains"]


def test_a_complete_cache_is_read_without_its_lock(tmp_path):
    """Somebody else's cache can be read although its lock file cannot be opened for writing."""
    key = prepare_small(NamedGroups(), tmp_path).manifest["key"]
    lock = tmp_path / f"{key}.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()  # opening it fails for every user, root too
    assert prepare_small(NamedGroups(), tmp_path).manifest["key"] == key


def test_a_cache_that_cannot_be_written_is_named_in_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(ValueError, match=r"^data\.cache=.*cache: cannot be written \(.*\); choose another folder$"):
        prepare_small(NamedGroups(), tmp_path / "cache")


def test_files_of_the_cache_have_the_permissions_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        prepare_small(NamedGroups(), tmp_path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_files_of_a_killed_preparation_are_not_used(named_groups, tmp_path):
    unfinished = tmp_path / f"{named_groups.manifest['key']}.unfinished"
    (unfinished / "train").mkdir(parents=True)
    (unfinished / "train" / "input_ids.npy").write_text("half")
    assert prepare_small(NamedGroups(), tmp_path).manifest["domains"] == named_groups.manifest["domains"]
    assert not unfinished.exists()


def test_the_lock_of_a_cache_is_open_to_whoever_may_write_to_its_folder(tmp_path):
    tmp_path.chmod(0o775)
    umask = os.umask(0o077)
    try:
        with locked(tmp_path, "key", "cache"):
            assert (tmp_path / "key.lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(umask)


CONCURRENT = """
import sys, time
from pathlib import Path
from tests.data.test_blocks import ReadOnce, prepare_small

class SlowReadOnce(ReadOnce):
    def documents(self):
        time.sleep(1)  # long enough for the other process to find the cache locked
        return super().documents()

cache, name, other = sys.argv[1:]
Path(cache, name).touch()
while not Path(cache, other).exists():
    time.sleep(0.01)
manifest = prepare_small(SlowReadOnce(marker=cache + "/read"), Path(cache, "data")).manifest
print(manifest["key"], manifest["corpus_sha256"], *sorted(manifest["files"].values()))
"""


@pytest.mark.faults
def test_processes_that_start_together_make_one_cache(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONCURRENT, str(tmp_path), *pair],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for pair in (("a", "b"), ("b", "a"))
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert len([path for path in (tmp_path / "data").iterdir() if path.is_dir()]) == 1


# ---- Other sources, and refusals ---------------------------------------------------------------------------------


def test_cosmopedia_from_a_local_parquet(tmp_path):
    rows = [
        {
            "prompt": "Write.",
            "text_token_length": 60,
            "text": " ".join(f"r{row}w{word}" for word in range(60)),
            "seed_data": "web",
            "format": ("blogpost", "textbook")[row % 2],
            "audience": "general",
        }
        for row in range(30)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "shard.parquet")
    source = Hub(str(tmp_path / "shard.parquet"), "cosmopedia-v2", "train", "text", "format", 20)
    prepared = prepare_small(source, tmp_path / "cache")
    assert prepared.domains == ("blogpost", "textbook")
    assert (
        sum(counts[name]["documents"] for counts in prepared.manifest["domains"].values() for name in ("train", "val"))
        == 20
    )
    parquet.write_table(pa.Table.from_pylist(rows[::-1]), tmp_path / "shard.parquet")
    assert prepare_small(source, tmp_path / "cache").manifest["key"] != prepared.manifest["key"], (
        "the key depends on the bytes of the file"
    )


def test_a_source_without_documents_is_refused(tmp_path):
    """The message names the key that says where the text is."""
    with pytest.raises(ValueError, match=r"^data\.source\.domains=0: must have text, but yields no documents$"):
        prepare_small(NamedGroups(domains=0), tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text(" ")
    paths = [str(tmp_path / name) for name in ("empty.jsonl", "blank.txt")]
    with pytest.raises(ValueError, match="yields no documents") as raised:
        prepare_small(Files(paths, "text", None), tmp_path)
    left_out = "yields no documents (left out: 1 files or rows without text)"
    assert str(raised.value) == f"data.source.paths={paths}: must have text, but {left_out}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None}, r"data\.vocab_size=null: must be a whole number, because data\.tokenizer=bpe"),
        ({"tokenizer": "some/name"}, r"data\.vocab_size=300: must be null, because data\.tokenizer=some/name"),
        ({"vocab_size": 258}, r"data\.vocab_size=258: must be at least 259"),
        ({"seq_len": 1}, r"data\.seq_len=1: must be at least 2"),
        ({"seq_len": 10_000}, r"data\.seq_len=10000: no train block is that long"),
        ({"val_percent": 0}, r"data\.val_percent=0: must be between 1 and 99"),
        ({"val_percent": 100}, r"data\.val_percent=100: must be between 1 and 99"),
        ({"max_val_blocks": 0}, r"data\.max_val_blocks=0: must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        prepare_small(NamedGroups(), tmp_path, **change)
