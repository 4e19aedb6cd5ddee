"""Write a model of this project as a GGUF file, the format of llama.cpp and of the programs that are built on it.

Four of its architectures are used. `llama` with experts is that of Mixtral: softmax, weights that sum to 1. It also
takes experts of two matrices. `qwen3moe` and `olmoe` are for models that were imported or upcycled and have norms of
queries and keys. `glm4moe` reads from the file what its router does: softmax or sigmoid, whether weights sum to 1, a
bias, groups. It can have dense first layers and shared experts.

Letters in shapes: D width of a hidden state, N rows of a matrix.
"""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moe.checks import ConfigError
from moe.foreign.anatomy import Anatomy, Heads, Layer, Networks, Routed, Weights
from moe.foreign.export import choose, parts_of, require_plain
from moe.foreign.target_weights import selected
from moe.foreign.targets import GGUF_TARGETS, Target, rope_of
from moe.model.causal_lm import MoEForCausalLM

# Numbers of llama.cpp: the scores of a router, the last one over the chosen logits alone; and the kinds of tokens.
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def require_package() -> None:
    """Raise ConfigError unless the package that writes the format is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("--to gguf: needs the package gguf: python -m pip install 'moe-routing[gguf]'")


def write_gguf(model: MoEForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, *, name: str) -> str:
    """Write `model` and its tokenizer to a new file, with weights in fp32. Return the architecture of the file.

    name: what the file says that it contains.

    Raises ConfigError, with one line, for a model or a tokenizer that the format does not express.
    """
    import gguf

    require_plain(model)
    anatomy = parts_of(model, to="gguf")
    layout = choose(model, anatomy, GGUF_TARGETS, to="gguf")
    fields = {**_sizes(anatomy, layout), **_vocabulary(tokenizer, anatomy.config.vocab_size)}
    writer = gguf.GGUFWriter(path, layout.name)
    writer.add_name(name)
    for key, value in fields.items():
        _add(writer, key if key.startswith("tokenizer.") else f"{layout.name}.{key}", value)
    for key, tensor in tensors(anatomy, layout).items():
        writer.add_tensor(key, np.ascontiguousarray(tensor.detach().float().cpu().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return layout.name


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a field to the file. Whole numbers are unsigned and have 32 bits."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _sizes(anatomy: Anatomy, layout: Target) -> dict[str, Any]:
    """Return the fields of the architecture, without its name in front."""
    config, rule = anatomy.config, anatomy.rule
    assert rule is not None, "an architecture that expresses the model follows its rule"
    heads, rope = Heads.of(config), rope_of(config)
    fields: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads.queries,
        "attention.head_count_kv": heads.keys,
        "attention.key_length": heads.width,
        "attention.value_length": heads.width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": heads.width,
        "rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
        "vocab_size": config.vocab_size,
        "expert_count": config.most_experts,
        "expert_used_count": rule.k,
    }
    if layout.name != "glm4moe":
        return fields | {"expert_feed_forward_length": config.intermediate_size}
    gating = SIGMOID if rule.scores == "sigmoid" else SOFTMAX
    fields |= {
        "feed_forward_length": config.dense_ffn,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_shared_count": max(1, config.shared_experts),
        "expert_gating_func": SOFTMAX_OF_CHOSEN if rule.weights == "equal" else gating,
        "expert_weights_norm": rule.weights == "normalized",
        "expert_weights_scale": rule.factor,
    }
    if rule.groups > 1:
        fields |= {"expert_group_count": rule.groups, "expert_group_used_count": rule.top_groups}
    return fields


def tensors(anatomy: Anatomy, layout: Target) -> Weights:
    """Return the weights under their names in the file."""
    config, embedding = anatomy.config, anatomy.embedding
    found = {"output_norm.weight": anatomy.norm}
    found["token_embd.weight"] = embedding * math.sqrt(config.hidden_size) if config.embed_scale else embedding
    if config.embed_scale or not config.tie_word_embeddings:
        found["output.weight"] = anatomy.head
    second = "post_attention_norm" if layout.name == "glm4moe" else "ffn_norm"
    for number, layer in enumerate(anatomy.layers):
        own = {"attn_norm.weight": layer.attention_norm, f"{second}.weight": layer.feed_forward_norm}
        own |= _attention(layer.attention, Heads.of(config), interleaved=layout.name == "llama")
        if isinstance(layer.feed_forward, Routed):
            own |= _routed(layer.feed_forward, layer, anatomy, layout)
        else:
            own |= _feed_forward("", layer.feed_forward)
        found |= {f"blk.{number}.{name}": weight for name, weight in own.items()}
    return found


def _attention(attention: Weights, heads: Heads, *, interleaved: bool) -> Weights:
    """Return the weights of the attention.

    interleaved: in `llama` the two dimensions of a pair that is rotated are neighbors; here they are half a head apart.
    """
    rotated = {"q_proj": heads.queries, "k_proj": heads.keys}
    found: Weights = {}
    for name, weight in attention.items():
        part, kind = name.split(".")
        theirs = f"attn_{part.removesuffix('_proj') if part != 'o_proj' else 'output'}.{kind}"
        found[theirs] = _interleave(weight, rotated[part]) if interleaved and part in rotated else weight
    return found


def _interleave(rows: Shaped[Tensor, " N *D"], heads: int) -> Shaped[Tensor, " N *D"]:
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _routed(routed: Routed, layer: Layer, anatomy: Anatomy, layout: Target) -> Weights:
    """Return the weights of a Mixture of Experts, the feed-forward part of `layer`."""
    matrix, bias, experts = selected(routed, layer.feed_forward_norm, anatomy)
    found = {"ffn_gate_inp.weight": matrix, "ffn_up_exps.weight": experts.up, "ffn_down_exps.weight": experts.down}
    if experts.gate is not None:
        found["ffn_gate_exps.weight"] = experts.gate
    if layout.name != "glm4moe":
        return found
    found["exp_probs_b.bias"] = bias
    zeros = experts.up.new_zeros(1, *experts.up.shape[1:])  # the architecture always has a shared expert
    return found | _feed_forward("_shexp", routed.shared or Networks(zeros, zeros, zeros.mT))


def _feed_forward(suffix: str, network: Networks) -> Weights:
    """Return the matrices of a single network."""
    assert network.gate is not None, "glm4moe takes experts of three matrices alone"
    return {f"ffn_{part}{suffix}.weight": getattr(network, part)[0] for part in Networks._fields}


def _vocabulary(tokenizer: PreTrainedTokenizerFast, size: int) -> dict[str, Any]:
    """Return the fields of the tokenizer. `size`: the number of rows of the embedding."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    kinds = [
        UNUSED if number not in names else NORMAL if number not in added else CONTROL if added[number] else USER_DEFINED
        for number in range(size)
    ]
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": _splitting(content),
        "tokens": [names.get(number, f"[unused {number}]") for number in range(size)],
        "token_type": kinds,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]],
        "add_bos_token": tokenizer("").input_ids[:1] == [tokenizer.bos_token_id],
    }
    for role in ("bos", "eos", "unknown", "padding"):
        short = {"unknown": "unk", "padding": "pad"}.get(role, role)
        if (number := getattr(tokenizer, f"{short}_token_id")) is not None:
            fields[f"{role}_token_id"] = number
    found = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _splitting(content: dict[str, Any]) -> str:
    """Return llama.cpp's name of how the tokenizer splits text before it merges bytes.

    content: tokenizer.json. Raises ConfigError unless it is byte-level BPE whose words are those of GPT-2, and in which
    digits are split as those of GPT-2 or one by one.
    """
    model, splitter = content["model"], content.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    last = {key: (steps[-1] if steps else {}).get(key) for key in words}
    digits = [(step.get("type"), step.get("individual_digits")) for step in steps[:-1]]
    plain = model["type"] == "BPE" and not model.get("byte_fallback") and not model.get("ignore_merges")
    prefixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if plain and not prefixes and content.get("normalizer") is None and last == words:
        if not digits:
            return "gpt-2"
        if digits == [("Digits", True)]:
            return "smollm"
    allowed = "byte-level BPE with the words of GPT-2, as data.tokenizer=bpe trains it"
    raise ConfigError(f"--to gguf: the tokenizer must be {allowed}")
