"""Tests of what a saved model says about itself: which tokens begin, end and pad a text, and how long it may be."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import run
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from moe.data.tokenizer import train_bpe
from moe.launch.command_line import read_cells

SHORT = "data.seq_len=32 data.val_percent=20 steps=60 eval_every=60 batch_size=8 optimizer.adamw_lr=0.02".split()


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def check_ids(model: Any, tokenizer: Any, *, bos: int | None, eos: int | list[int], pad: int) -> None:
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (bos, eos, pad)
    assert tokenizer.pad_token_id == pad
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 32


@pytest.fixture
def pairs(tmp_path: Path) -> list[dict[str, str]]:
    """Return short texts that differ, so that none is left out as a duplicate."""
    return [{"text": f"{a} {b} {c}"} for a in "abcdef" for b in "ghijkl" for c in "mnopqr"]


def test_a_model_stops_where_texts_end_whatever_ids_the_tokenizer_has(
    cell: Any, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    """Generation ends at the end-of-text token of the tokenizer, which is not token 0 here, also in a padded batch."""
    tokenizer = train_bpe([row["text"] for row in pairs], 300)
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token = "<|im_end|>", "<|im_start|>", None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    data = [f"data.source.paths=[{tmp_path}/pairs.jsonl]", "data.source.domain=null", "data.vocab_size=null"]
    one = cell(*data, f"data.tokenizer={tmp_path}/tokenizer", *SHORT)
    run(one)
    model, saved = load(one.folder / "model")
    check_ids(model, saved, bos=1, eos=2, pad=2)
    texts = saved(["b h", "c"], return_tensors="pt", padding=True)
    assert texts["attention_mask"][1, 0] == 0
    for ids in model.generate(**texts, max_new_tokens=20, do_sample=False):
        assert 2 in ids[texts["input_ids"].shape[1] :].tolist()
    [answer] = pipeline("text-generation", model=str(one.folder / "model"))("b h", max_new_tokens=20, do_sample=False)
    alone = saved("b h", return_tensors="pt")["input_ids"]
    [ids] = model.generate(alone, max_new_tokens=20, do_sample=False).tolist()
    assert ids.index(2, alone.shape[1]) == len(ids) - 1 < alone.shape[1] + 19
    assert answer["generated_text"] == saved.decode(ids, skip_special_tokens=True)


def test_a_chat_model_stops_at_the_end_of_its_turn(pairs: list[dict[str, str]], tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "yes"}] for row in pairs]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in rows))
    data = ["data=smoltalk", f"data.source.path={tmp_path}/chat.jsonl", "data.source.domain=null"]
    data += ["data.tokenizer=bpe", "data.vocab_size=300", f"data.cache={tmp_path}/cache", f"out={tmp_path}"]
    size = ["model.dim=32", "model.heads=2", "model.layers=2", "model.ffn=32", "model.num_experts=4"]
    cells = read_cells([*data, *size, "model.dense_ffn=64", "logger.mode=disabled", *SHORT])
    assert cells is not None
    run(cells[0])
    model, saved = load(cells[0].folder / "model")
    check_ids(model, saved, bos=0, eos=[0, 2], pad=0)
    chat = [{"role": "user", "content": "b h n"}]
    prompt = saved.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert ids[-1] == 2
    assert saved.decode(ids) == "yes<|im_end|>"
