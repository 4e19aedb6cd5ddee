"""Tests that a GGUF file has the weights, sizes and tokens of the model. The suite `served` tests what it computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import make
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe.checks import ConfigError
from moe.data.tokenizer import train_bpe
from moe.foreign.export import to_transformers
from moe.foreign.export_command import main
from moe.foreign.gguf import write_gguf

TEXT = "if x in range(12): # 2 words, 345 Ünïts\n\treturn x  "


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe([TEXT, "words return more words than units"], 290)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the fields and the tensors of a file."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_down_exps": "mlp.experts.down_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}


def as_transformers(tensors: dict[str, torch.Tensor], *, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return the weights under transformers' names. heads: of queries and keys, if their pairs are neighbors."""
    found = {}
    for name, weight in tensors.items():
        if not name.startswith("blk."):
            whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
            found[f"{whole[name.removesuffix('.weight')]}.weight"] = weight
            continue
        _, number, part, kind = name.split(".")
        if part in heads:
            weight = weight.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        layer = f"model.layers.{number}"
        if part == "ffn_up_exps":
            both = torch.cat((tensors[f"blk.{number}.ffn_gate_exps.weight"], weight), 1)
            found[f"{layer}.mlp.experts.gate_up_proj"] = both
        elif part == "exp_probs_b":
            found[f"{layer}.mlp.gate.e_score_correction_bias"] = weight
        elif part != "ffn_gate_exps":
            suffix = "" if part == "ffn_down_exps" else f".{kind}"
            found[f"{layer}.{NAMES[part]}{suffix}"] = weight
    return found


@pytest.mark.parametrize(
    ("router", "changes", "target"),
    [
        ("topk", {}, "mixtral"),
        ("temperature", {"embed_scale": False}, "mixtral"),
        ("biased", {"shared_experts": 2, "first_k_dense_replace": 1}, "glm4_moe"),
        ("biased", {"experts_by_layer": "1:3"}, "glm4_moe"),
    ],
)
def test_a_file_has_the_weights_of_the_transformers_model_of_its_architecture(
    router: str, changes: dict[str, Any], target: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """In `llama`, rows of queries and keys are in another order. A tied output matrix is left out."""
    model = make(router, **changes)
    write_gguf(model, tokenizer, tmp_path / "file", name="a name")
    fields, tensors = read(tmp_path / "file")
    assert fields["general.architecture"] == {"mixtral": "llama", "glm4_moe": "glm4moe"}[target]
    expected = dict(to_transformers(model, target).state_dict())
    if not model.config.embed_scale:
        del expected["lm_head.weight"]
    found = as_transformers(tensors, heads={"attn_q": 6, "attn_k": 3} if target == "mixtral" else {})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("router", "changes", "fields"),
    [
        ("topk", {}, {"expert_count": 5, "expert_used_count": 3, "feed_forward_length": 20, "context_length": 64}),
        ("topk", {"head_dim": 6}, {"attention.key_length": 6, "rope.dimension_count": 6, "rope.freq_base": 10_000.0}),
        ("softmax_all", {}, {"expert_gating_func": 1, "expert_weights_norm": False, "expert_shared_count": 1}),
        ("uniform", {}, {"expert_gating_func": 3, "expert_weights_norm": False, "expert_feed_forward_length": 20}),
        ("biased", {"first_k_dense_replace": 1}, {"expert_gating_func": 2, "leading_dense_block_count": 1}),
        (
            "groups",
            {"num_experts": 6},
            {"expert_gating_func": 1, "expert_group_count": 2, "expert_group_used_count": 1},
        ),
    ],
)
def test_a_file_says_what_the_router_does(
    router: str,
    changes: dict[str, Any],
    fields: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    architecture = write_gguf(make(router, **changes), tokenizer, tmp_path / "file", name="a name")
    found, _ = read(tmp_path / "file")
    assert {key: found[f"{architecture}.{key}"] for key in fields} == fields


def test_experts_of_two_matrices_are_written_without_a_third(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("topk", expert="silu", attention_bias=True)
    assert write_gguf(model, tokenizer, tmp_path / "file", name="a name") == "llama"
    _, tensors = read(tmp_path / "file")
    assert not [name for name in tensors if "gate_exps" in name]
    assert torch.equal(tensors["blk.1.ffn_up_exps.weight"], model.moe_layers[1].experts.up)
    bias = tensors["blk.0.attn_k.bias"].view(3, -1, 2).transpose(1, 2).flatten()
    assert torch.equal(bias, model.model.layers[0].self_attn.k_proj.bias)


def test_the_tokens_of_a_file_give_the_same_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Rows of the embedding without a token are unused tokens. No token is added in front of a text."""
    write_gguf(make("topk"), tokenizer, tmp_path / "file", name="a name")
    fields, _ = read(tmp_path / "file")
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items() if "tokenizer" in name}
    assert (own["model"], own["pre"], own["add_bos_token"]) == ("gpt2", "smollm", False)
    assert own["bos_token_id"] == own["eos_token_id"] == own["padding_token_id"] == 0
    assert own["token_type"] == [3] * 3 + [1] * 287 + [5] * 10
    assert own["tokens"][-1] == "[unused 299]"
    vocabulary = {token: number for number, token in enumerate(own["tokens"])}
    again = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in own["merges"]]))
    again.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    assert again.encode(TEXT).ids == tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize(
    ("pre", "normalizer", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), None, "gpt-2"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC(), None),
        (pre_tokenizers.Whitespace(), None, None),
    ],
)
def test_a_tokenizer_whose_words_the_format_does_not_know_is_refused(
    pre: Any, normalizer: Any, name: str | None, tmp_path: Path
) -> None:
    backend = Tokenizer(models.BPE({"<e>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    if name is None:
        with pytest.raises(ConfigError, match=r"^--to gguf: the tokenizer must be byte-level BPE .*$"):
            write_gguf(make("topk"), other, tmp_path / "file", name="a name")
        assert not (tmp_path / "file").exists()
    else:
        write_gguf(make("topk"), other, tmp_path / "file", name="a name")
        assert read(tmp_path / "file")[0]["tokenizer.ggml.pre"] == name


def test_the_command_writes_a_folder_with_the_file_and_a_card(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a tokenizer, and for a router without a rule, it writes nothing."""
    saved, out = tmp_path / "saved", tmp_path / "out"
    make("topk").save_pretrained(saved)
    assert main([str(saved), "--to", "gguf", "--out", str(out)]) == 2
    assert "has no tokenizer, which is a part of a GGUF file" in capsys.readouterr().err
    tokenizer.save_pretrained(saved)
    assert main([str(saved), "--to", "gguf", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: model.gguf, architecture llama\n"
    assert {path.name for path in out.iterdir()} == {"model.gguf", "README.md"}
    assert read(out / "model.gguf")[0]["general.name"] == "a saved model"
    make("relu").save_pretrained(saved)
    assert main([str(saved), "--to", "gguf", "--out", str(tmp_path / "new")]) == 2
    assert "what it does in evaluation is not the rule of any target; with the nearest rule" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(tmp_path), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "moe export: --to gguf: needs the package gguf: python -m pip install 'moe-routing[gguf]'\n"
    )
