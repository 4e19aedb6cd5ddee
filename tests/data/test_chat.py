"""Tests of conversations: only the assistant's words have labels, and no conversation attends to another."""

import gzip
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import AutoTokenizer

from moe.config.model import ModelConfig
from moe.data.blocks import Batch, Prepared, _read, batch, prepare
from moe.data.chat import CHATML, set_template, tokenize_conversations
from moe.data.documents import Document, Turn
from moe.data.embedded import Solutions
from moe.data.labels import IGNORED, next_token
from moe.data.limits import BlockSettings
from moe.data.packing import best_fit, pack
from moe.data.sources import Conversations
from moe.data.tokenizer import train_bpe
from moe.launch.command_line import read_cells
from moe.launch.run import run
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.runs.events import read_events
from moe.runs.signals import Signals
from moe.specialization.study import study
from moe.training.evaluate import evaluate
from moe.training.loop import train
from moe.training.step import label_weights

BPE = train_bpe(["one two three"], 259)  # all bytes and the special tokens
set_template(BPE)


def words(name: str, count: int) -> str:
    return " ".join(f"{name}{number}" for number in range(count))


def messages_of_row(row: int) -> list[dict[str, str]]:
    """Return the messages of one to three exchanges of varying lengths.

    Every second conversation begins with the same system message.
    """
    system = [{"role": "system", "content": "Answer in one line."}]
    turns = [system[0]] * (row % 2)
    for turn in range(1 + row % 3):
        turns += [{"role": "user", "content": words(f"q{row}t{turn}n", 2 + row % 4)}]
        turns += [{"role": "assistant", "content": words(f"a{row}t{turn}n", 2 + 7 * row % 9)}]
    return turns


def smoltalk(path: Path, rows: list[list[dict[str, str]]]) -> Path:
    table = {"messages": rows, "source": [("everyday", "rewrite")[row % 2] for row in range(len(rows))]}
    parquet.write_table(pa.table(table), path)
    return path


def source(path: Path, **changes: Any) -> Conversations:
    fields = {"name": "all", "split": "train", "messages": "messages", "domain": "source", "max_samples": 60}
    return Conversations(**{"path": str(path), **fields, **changes})


def prepare_small(source: Any, cache: Path, **changes: Any) -> Prepared:
    settings = {"tokenizer": "bpe", "vocab_size": 400, "seq_len": 64, "val_percent": 20, "max_val_blocks": None}
    return prepare(source, BlockSettings(**{**settings, **changes}), cache=str(cache))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smoltalk(tmp_path_factory.mktemp("smoltalk") / "shard.parquet", [messages_of_row(row) for row in range(60)])


@pytest.fixture(scope="module")
def prepared(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare_small(source(file), tmp_path_factory.mktemp("cache"), seq_len=512)


def conversations_in(blocks: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return ids and labels of every conversation in the blocks."""
    assert blocks.position_ids is not None
    found = []
    for ids, labels, positions in zip(blocks.ids, blocks.labels, blocks.position_ids, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append((ids[start:end], labels[start:end]))
    return found


def all_blocks(prepared: Prepared, split: str) -> Batch:
    dataset = getattr(prepared, split)
    return batch(dataset, range(len(dataset)))


# ---- Tokens and labels -------------------------------------------------------------------------------------------


def make_conversation(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> Document:
    turns = [Turn(roles[n % len(roles)], content) for n, content in enumerate(contents)]
    return Document.conversation("d", "row", turns)


def decode_labeled(ids: np.ndarray, labels: np.ndarray, tokenizer: Any = BPE) -> tuple[str, str]:
    """Return the text of a conversation and its labeled text. In the latter, | stands for tokens without a label."""
    labeled = "".join("|" if label == IGNORED else tokenizer.decode([label]) for label in labels)
    return tokenizer.decode(ids), re.sub(r"\|+", "|", labeled)


def test_only_the_assistants_words_and_end_tokens_have_labels():
    [tokens] = tokenize_conversations([make_conversation("Hi", "Ahoy\n", "assistant", " user")], BPE, "")
    text, labeled = decode_labeled(*tokens)
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nAhoy\n<|im_end|>\n"
        "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n user<|im_end|>\n"
    )
    assert labeled == "|Ahoy\n<|im_end|>| user<|im_end|>|"
    has_label = tokens.labels != IGNORED
    assert (tokens.labels[has_label] == tokens.ids[has_label]).all()


def test_special_tokens_and_template_code_in_a_message_are_ordinary_text():
    text = "<|im_end|>\n<|im_start|>assistant\n{{ 1 + 1 }}"
    [tokens] = tokenize_conversations([make_conversation(text, text)], BPE, "")
    assert decode_labeled(*tokens)[1] == f"|{text}<|im_end|>|"
    assert (tokens.ids == 1).sum() == (tokens.ids == 2).sum() == 2


def test_the_first_token_of_a_conversation_never_has_a_label():
    tokenizer = train_bpe(["one"], 259)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    [tokens] = tokenize_conversations([make_conversation("Ahoy", "Hi", roles=("assistant", "user"))], tokenizer, "")
    assert decode_labeled(*tokens) == ("Ahoy<|im_end|>Hi<|im_end|>", "|hoy<|im_end|>|")


def test_the_chat_template_of_the_tokenizer_is_used_and_saved(file, tmp_path):
    tokenizer = train_bpe([words(f"{letter}{row}t0n", 9) for row in range(9) for letter in "qa"], 350)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prepared = prepare_small(
        source(file), tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer"), vocab_size=None, seq_len=512
    )
    assert prepared.tokenizer.chat_template == tokenizer.chat_template
    checked = 0
    for ids, labels in conversations_in(all_blocks(prepared, "val")):
        text, labeled = decode_labeled(ids.numpy(), labels.numpy(), tokenizer)
        if labeled != "|":  # the filler at the end of a block has no label
            assert re.match(r"<\|endoftext\|>\[(user|system)\] ", text)
            assert labeled == "|" + "|".join(re.findall(r"\[assistant\] (.*?<\|endoftext\|>)", text))
            checked += 1
    assert checked == sum(counts["val"]["documents"] for counts in prepared.manifest["domains"].values())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}", "leaves out or reorders its turns"),
        ("{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}", "leaves out or reorders its turns"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "does not end the words of the assistant with a"),
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
    ],
)
def test_a_template_that_does_not_show_every_turn_or_how_it_ends_is_refused(template, message):
    tokenizer = train_bpe(["one"], 259)
    tokenizer.chat_template = template
    with pytest.raises(
        ValueError, match=f"the conversation with the id row: the chat template of data.tokenizer {message}"
    ):
        tokenize_conversations([make_conversation("Hi", "Ahoy")], tokenizer, "")


def test_a_tokenizer_without_template_and_markers_is_refused():
    plain = train_bpe(["one"], 259)
    backend = json.loads(plain.backend_tokenizer.to_str())
    backend["added_tokens"] = backend["added_tokens"][:2]
    other = type(plain)(tokenizer_object=type(plain.backend_tokenizer).from_str(json.dumps(backend)))
    with pytest.raises(ValueError, match=r"data\.tokenizer: has no chat template, and no special token"):
        set_template(other)


# ---- Blocks ------------------------------------------------------------------------------------------------------


def test_every_answer_is_labeled_once_and_in_full(prepared, file):
    labeled_answers = []
    for split in ("train", "val"):
        for ids, labels in conversations_in(all_blocks(prepared, split)):
            text, labeled = decode_labeled(ids.numpy(), labels.numpy(), prepared.tokenizer)
            if labeled != "|":  # the filler at the end of a block has no label
                assert text.startswith(("<|im_start|>user\n", "<|im_start|>system\n"))
                assert text.count("<|im_start|>assistant\n") == labeled.count("<|im_end|>")
            labeled_answers += [answer for answer in labeled.replace("<|im_end|>", "").split("|") if answer]
    rows = [turn for row in range(60) for turn in messages_of_row(row)]
    assert sorted(labeled_answers) == sorted(turn["content"] for turn in rows if turn["role"] == "assistant")


def test_the_counts_of_the_manifest_are_those_of_the_blocks(prepared):
    for split in ("train", "val"):
        blocks = all_blocks(prepared, split)
        for label, name in enumerate(prepared.domains):
            counts, of_domain = prepared.manifest["domains"][name][split], blocks.domain == label
            assert counts["blocks"] == of_domain.sum()
            assert counts["labeled_tokens"] == (blocks.labels[of_domain] != IGNORED).sum()
            assert counts["tokens"] == pytest.approx((1 - counts["filler_share"]) * blocks.ids[of_domain].numel())
            assert counts["truncated"] == counts["left_out"] == 0
            assert 0 < counts["filler_share"] < 0.5
            first = int(of_domain.nonzero()[0])  # blocks are ordered by domain
            bounds = first, first + int(of_domain.sum())
            assert counts["documents"] == sum(
                bool((labels != IGNORED).any()) for _, labels in conversations_in(blocks.take(slice(*bounds)))
            )
    assert prepared.domains == ("everyday", "rewrite")
    assert prepared.tokenizer.chat_template == CHATML


def test_long_conversations_are_truncated_and_those_without_a_label_left_out(tmp_path):
    rows = [
        [{"role": "user", "content": words(f"q{row}n", size)}, {"role": "assistant", "content": words(f"a{row}n", 9)}]
        for row, size in enumerate([2] * 10 + [5] * 3 + [60] * 4)
    ]
    prepared = prepare_small(source(smoltalk(tmp_path / "long.parquet", rows), domain=None), tmp_path, seq_len=48)
    counts = [prepared.manifest["domains"]["long"][split] for split in ("train", "val")]
    assert sum(count["left_out"] for count in counts) == 4
    assert sum(count["truncated"] for count in counts) > 4
    for split in ("train", "val"):
        assert all((row != IGNORED).any() for row in all_blocks(prepared, split).labels)


def test_a_packed_block_has_the_document_of_the_conversation_it_begins_with():
    contents = [words(f"c{row}n", 1 + 5 * row % 7) for row in range(12)]
    conversations = [
        make_conversation("Hi", content)._replace(group=f"group{row // 2}") for row, content in enumerate(contents)
    ]
    unlabeled = make_conversation("Hi", "Ahoy", roles=("user",))  # without a label, so it is left out
    blocks = pack([unlabeled, *conversations], BPE, 160, "")
    assert len(blocks.document) > 3
    for row, document in enumerate(blocks.document):
        end = [*np.flatnonzero(blocks.columns["position_ids"][row] == 0), 160][1]
        first = BPE.decode(blocks.columns["input_ids"][row, :end])
        [expected] = {
            conversation.group
            for conversation, content in zip(conversations, contents, strict=True)
            if f"\n{content}<" in first
        }
        assert document == expected


def test_every_conversation_is_a_document(prepared):
    numbers = prepared.val["document"][:]
    assert len(set(numbers.tolist())) == len(prepared.val) > 1  # each block begins with another conversation
    assert "document" not in prepared.train.column_names


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_places_every_length_once_and_overfills_no_block(seed):
    size, lengths = 50, np.random.default_rng(seed).integers(1, 51, 200).tolist()
    blocks = best_fit(lengths, size)
    assert sorted(index for block in blocks for index in block) == list(range(200))
    assert max(sum(lengths[index] for index in block) for block in blocks) <= size
    assert len(blocks) <= 11 / 9 * -(-sum(lengths) // size) + 4  # the guarantee of best-fit decreasing
    assert best_fit([50, 20, 25, 30, 25], 50) == [[0], [3, 1], [2, 4]]
    assert best_fit([], 50) == []


def test_two_preparations_are_the_same_and_use_the_first_samples(file, tmp_path):
    one, two = (prepare_small(source(file, max_samples=30), tmp_path / name) for name in "ab")
    assert one.manifest["files"] == two.manifest["files"]
    documents = [counts[s]["documents"] for counts in one.manifest["domains"].values() for s in ("train", "val")]
    assert sum(documents) == 30
    assert prepare_small(source(file, max_samples=29), tmp_path / "a").manifest["key"] != one.manifest["key"]
    assert {document.id for document in source(file, max_samples=7).documents()} == {f"train/{n}" for n in range(7)}


# ---- The model ---------------------------------------------------------------------------------------------------


def tiny(vocab: int, attention: str = "sdpa", **changes: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    size = ModelConfig(dim=16, heads=2, layers=2, ffn=8, num_experts=4, dense_ffn=16, attention=attention, **changes)
    router = {"_target_": "moe.routers.topk.TopK", "k": 2}
    model = MoEForCausalLM(MoEConfig.of(size, router, vocab_size=vocab, seq_len=512)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 8 if p.ndim > 1 else 1  # large weights make the model far from linear
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_conversation_attends_to_another(attention, prepared):
    model, blocks = tiny(400, attention), batch(prepared.train, [len(prepared.train) - 1, 0])
    assert blocks.position_ids is not None
    second = [(row == 0).nonzero()[1].item() for row in blocks.position_ids]
    changed = blocks.ids.clone()
    for row, start in enumerate(second):
        changed[row, :start] = (changed[row, :start] + 7) % 400
    with torch.no_grad():
        masked, masked_changed = (model(ids, position_ids=blocks.position_ids).logits for ids in (blocks.ids, changed))
        unmasked, unmasked_changed = (model(ids).logits for ids in (blocks.ids, changed))
    for row, start in enumerate(second):
        torch.testing.assert_close(masked[row, start:], masked_changed[row, start:], atol=1e-6, rtol=0)
        # Without the mask, earlier tokens change the output.
        assert (unmasked[row, start:] - unmasked_changed[row, start:]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_does_not_change_the_loss_of_a_conversation(attention, prepared):
    model, blocks = tiny(400, attention), all_blocks(prepared, "val")
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in conversations_in(blocks):
            predicted = int((next_token(labels[None]) != IGNORED).sum())
            if predicted:
                total += model(ids[None], labels[None]).loss.item() * predicted
                count += predicted
        packed = model(blocks.ids, blocks.labels, position_ids=blocks.position_ids).loss.item()
    texts = {"domains": prepared.domains, "text_bytes": prepared.predicted_bytes("val")}
    values = evaluate(model, prepared.val, **texts, batch_size=2, temperature=1.0)
    assert packed == pytest.approx(total / count, rel=1e-5)
    assert values["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert count == (blocks.labels != IGNORED).sum()  # no conversation begins with a label, so none is lost


def test_domain_losses_and_accuracy_are_over_labeled_tokens(prepared):
    model = tiny(400)
    texts = {"domains": prepared.domains, "text_bytes": prepared.predicted_bytes("val")}
    values = evaluate(model, prepared.val, **texts, batch_size=3, temperature=1.0)
    blocks = all_blocks(prepared, "val")
    with torch.no_grad():
        output = model(blocks.ids, position_ids=blocks.position_ids)
    targets = next_token(blocks.labels)
    hits = (output.logits.argmax(-1) == targets)[targets != IGNORED].double().mean().item()
    assert values["val/accuracy"] == pytest.approx(hits)
    labels = [(targets[blocks.domain == d] != IGNORED).sum().item() for d in range(2)]
    losses = [values[f"val/loss/{name}"] for name in prepared.domains]
    assert values["val/loss"] == pytest.approx(np.average(losses, weights=labels))
    assert output.stats is not None
    assert output.stats.tokens.sum() == 2 * blocks.ids.numel()  # routing statistics count all tokens


def test_routing_is_counted_within_each_conversation(prepared):
    """Positions and repeated experts are counted within each conversation, as in a slow loop over tokens."""
    model, blocks = tiny(400), all_blocks(prepared, "val")
    with torch.no_grad():
        output = model(blocks.ids, position_ids=blocks.position_ids)
    position, length = blocks.position_ids.flatten().tolist(), blocks.ids.shape[1]
    assert max(position) < length - 1
    for layer, [routing] in enumerate(output.routing):
        chosen = set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
        by_position, repeated = torch.zeros(10, 4), 0
        for token, expert in chosen:
            by_position[position[token] * 10 // length, expert] += 1
            repeated += position[token] > 0 and (token - 1, expert) in chosen
        assert torch.equal(output.stats.offered_by_position[layer], by_position)
        assert output.stats.repeated[layer] == repeated
        assert output.stats.repeatable[layer] == sum(position[token] > 0 for token, _ in chosen)


def test_flash_attention_is_refused_if_conversations_share_a_block(prepared):
    model, blocks = tiny(400), batch(prepared.train, [len(prepared.train) - 1])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"model\.attention=flash_attention_2: must be sdpa or eager"):
        model(blocks.ids, position_ids=blocks.position_ids)


def test_label_weights_are_proportional_to_labels_and_one_if_all_tokens_are_labeled():
    labels = torch.arange(1, 17).view(2, 8)
    all_labeled = Batch(labels, torch.zeros(2, dtype=torch.long), labels, None)
    assert label_weights([all_labeled] * 3) == [1.0, 1.0, 1.0]
    few_labeled = all_labeled._replace(labels=labels.masked_fill(labels % 8 > 2, IGNORED))
    weights = label_weights([all_labeled, few_labeled])
    assert sum(weights) == pytest.approx(2)
    assert weights[0] / weights[1] == pytest.approx(14 / 4)


# ---- Training ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(file: Path, tmp_path: Path):
    """Return a function that reads one small cell with `data=smoltalk` and the local file."""

    def read(*overrides: str) -> Any:
        data = ["data=smoltalk", f"data.source.path={file}", "data.tokenizer=bpe", "data.vocab_size=400"]
        data += ["data.seq_len=256", f"data.cache={tmp_path}/cache", "model.dim=16", "model.heads=2", "model.layers=2"]
        data += ["model.ffn=16", "model.num_experts=4", "model.dense_ffn=32", "steps=4", "eval_every=2"]
        cells = read_cells([*data, "batch_size=8", "logger.mode=disabled", f"out={tmp_path}/runs", *overrides])
        assert cells is not None
        return cells[0]

    return read


def events(cell: Any) -> list[dict[str, Any]]:
    cell.folder.mkdir(parents=True, exist_ok=True)
    train(cell.config, cell.folder, signals=Signals())
    return read_events(cell.folder / "events.jsonl")


def test_a_step_does_not_depend_on_its_division_into_micro_batches(chat, tmp_path):
    """One micro-batch of 8 blocks and four of 2 blocks give the same losses and gradients.

    Blocks have unequal numbers of labels, so a mean of the means of micro-batches would be another loss.
    """
    runs = [
        events(chat(f"batch_size={size}", f"grad_accum={8 // size}", "lb=0", "z=0.1", f"out={tmp_path}/{size}"))
        for size in (8, 2)
    ]
    for a, b in zip(*runs, strict=True):
        for key in {"train/loss", "train/router_z", "val/loss", "grad_norm"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=2e-4), key


def test_embedding_noise_acts_on_conversations_too(chat, tmp_path):
    quiet, noisy = (events(chat(f"model.neftune_noise_alpha={alpha}", f"out={tmp_path}/{alpha}")) for alpha in (0, 5))
    first = [
        next(event for event in run if event["kind"] == kind) for run in (quiet, noisy) for kind in ("eval", "train")
    ]
    assert first[0]["val/loss"] == first[2]["val/loss"]
    assert first[1]["train/loss"] != first[3]["train/loss"]


def test_a_run_on_conversations_learns_and_can_be_studied(chat):
    cell = chat("steps=12", "optimizer.adamw_lr=0.01")
    run(cell)
    metrics = json.loads((cell.folder / "metrics.json").read_text())
    losses = metrics["history"]["val_losses"]
    assert losses[-1] < losses[0] - 0.1
    assert {"val/loss/everyday", "val/loss/rewrite"} < set(metrics["final_metrics"])
    saved = AutoTokenizer.from_pretrained(cell.folder / "model")
    rendered = saved.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert study(cell.folder, blocks_wanted=4, samples=12)
    found = json.loads((cell.folder / "specialization.json").read_text())
    assert found["reason"] is None
    measured = found["measured"]
    assert all(value is not None for row in measured["knockout"]["zeroed"]["delta"]["mean"] for value in row)
    assert all(0 < layer["tokens"] <= 12 and layer["regret"]["mean"] >= 0 for layer in measured["regret"])
    assert measured["documents"] == measured["blocks"] == measured["knockout"]["zeroed"]["delta"]["documents"] == 4
    assert found["val_loss"]["mean"] == pytest.approx(metrics["final_metrics"]["val/loss"], rel=1e-4)


# ---- Sources -----------------------------------------------------------------------------------------------------


def test_a_shared_system_message_does_not_make_conversations_duplicates(tmp_path):
    system = {"role": "system", "content": words("rule", 200)}
    rows = [[system, *(turn for turn in messages_of_row(row) if turn["role"] != "system")] for row in range(6)]
    documents = list(source(smoltalk(tmp_path / "a.parquet", [*rows, rows[0]])).documents())
    assert [document.turns[0].content for document in documents] == [system["content"]] * 6


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "Hi"}], r"row 1 of .*bad\.jsonl has no message of an assistant"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}],
            r"row 1 of .*bad\.jsonl has no message of an assis",
        ),
        (
            [{"role": "tool", "content": "Hi"}],
            r"row 1 of .*bad\.jsonl has a message of role 'tool'; known: system, user, assistant",
        ),
        (
            [{"role": "assistant", "content": None}],
            r"row 1 of .*bad\.jsonl has a message of assistant whose content is not text",
        ),
        ([{"from": "human", "value": "Hi"}], r"row 1 of .*bad\.jsonl holds no list of messages with role and content"),
        ("Hi", r"row 1 of .*bad\.jsonl holds no list of messages with role and content"),
        (3, r"row 1 of .*bad\.jsonl holds no list of messages with role and content"),
    ],
)
def test_wrong_messages_get_a_one_line_error(tmp_path, messages, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ValueError, match=f"^data.source.messages=messages: {message}"):
        list(source(tmp_path / "bad.jsonl", domain=None).documents())


@pytest.mark.parametrize("domain", [None, "source"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_without_messages_are_left_out_and_counted(tmp_path, suffix, domain):
    """A conversation that is null or an empty list is left out and counted, like a row without text."""
    rows = [{"messages": messages_of_row(number), "source": "a"} for number in range(3)]
    rows[1:1] = [{"messages": None, "source": None}, {"messages": [], "source": None}]
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    conversations, _, left_out = _read(source(path, domain=domain), 0)
    [documents] = conversations.values()
    assert [document.id for document in documents] == ["train/0", "train/3", "train/4"]
    assert left_out == {"files or rows without text": 2}


def test_missing_columns_files_and_samples_are_named(file, tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.source\.messages=chat: row 1 of .* has no such column, only messages, source"
    ):
        list(source(file, messages="chat").documents())
    with pytest.raises(ValueError, match=r"data\.source\.domain=topic: row 1 of .* has no such column"):
        list(source(file, domain="topic").documents())
    with pytest.raises(ValueError, match=r"data\.source\.path=gone\.parquet: no such file"):
        list(source(Path("gone.parquet")).documents())
    with pytest.raises(ValueError, match=r"data\.source\.max_samples=0: must be at least 1"):
        source(file, max_samples=0)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a package with the name and layout of reasoning-gym that holds ten made-up problems with solutions."""
    folder = tmp_path / "reasoning_gym" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "reasoning_gym" / "__init__.py").write_text("raise RuntimeError('it must not run')")
    info = tmp_path / "reasoning_gym-0.1.25.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reasoning-gym\nVersion: 0.1.25\n")
    with gzip.open(folder / "codeio.jsonl.gz", "wt") as stream:
        for n in range(10):
            texts = {"task_description": words(f"task{n}n", 20), "input_output_spec": words(f"spec{n}n", 20)}
            stream.write(json.dumps({**texts, "code_sample": words(f"code{n}n", 20)}) + "\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_embedded_pairs_are_problem_and_solution(package):
    documents = list(Solutions(10).documents())
    assert sorted(document.id for document in documents) == [f"codeio/{n}" for n in range(10)]
    assert list(Solutions(4).documents()) == documents[:4]
    for document in documents:
        n = document.id.removeprefix("codeio/")
        problem = f"{words(f'task{n}n', 20)}\n\n{words(f'spec{n}n', 20)}"
        assert document.turns == (Turn("user", problem), Turn("assistant", words(f"code{n}n", 20)))
    assert Solutions(4).describe()["problems"]["packages"]["reasoning-gym"] == "0.1.25"
    assert "reasoning_gym" not in sys.modules


def test_without_the_package_the_error_gives_the_pip_command(monkeypatch):
    monkeypatch.setattr("moe.data.embedded.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs: pip install --no-deps reasoning-gym==0\.1\.25$"):
        Solutions(1)
    with pytest.raises(ValueError, match=r"data\.source\.max_samples=0: must be at least 1"):
        Solutions(0)
