"""The configuration of an exported model: what its config.json says."""

import math
from collections.abc import Callable
from typing import Any

import torch

from moe.config.checkpoints.dense import FORMS
from moe.foreign.anatomy import Anatomy, Heads
from moe.foreign.targets import Target, rope_of

NO_SHARED = 8  # width of the shared expert of zeros, in targets that always have one
ALPHA = 1.702  # gpt_oss gates with x sigmoid(ALPHA x)

# Form of the experts -> activation. Those of gpt_oss, which have another form, do not read it.
ACTIVATIONS = {form: activation for activation, form in FORMS.items()} | {"silu": "silu"}


def settings_of(anatomy: Anatomy, target: Target, *, scale: float) -> dict[str, Any]:
    """Return the keyword arguments of the target's configuration. `scale`: that of the residual stream."""
    config, rule = anatomy.config, anatomy.rule
    assert rule is not None, "a target that expresses the model follows its rule"
    names = """vocab_size hidden_size num_hidden_layers max_position_embeddings initializer_range bos_token_id
        eos_token_id pad_token_id""".split()
    settings = {name: getattr(config, name) for name in names}
    heads = Heads.of(config)
    settings |= {
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.keys,
        "head_dim": heads.width,
        "rope_parameters": rope_of(config),
        "rms_norm_eps": config.rms_norm_eps * scale**2,
        "hidden_act": ACTIVATIONS[config.expert],
        "attention_bias": bool(anatomy.biases),
        "attention_dropout": 0.0,
        "tie_word_embeddings": is_tied(anatomy, target),
        "num_experts_per_tok": rule.k,
        target.experts: config.most_experts,
        target.width: config.intermediate_size,
    }
    if target.width != "intermediate_size":
        settings["intermediate_size"] = config.dense_ffn
    if "raw" in target.weights:
        settings["norm_topk_prob"] = rule.weights == "normalized"
    if target.grouped:
        settings |= {
            "n_group": rule.groups,
            "topk_group": rule.top_groups,
            "routed_scaling_factor": rule.factor,
            "n_shared_experts": max(1, config.shared_experts),
            "first_k_dense_replace": config.first_k_dense_replace,
            "num_nextn_predict_layers": 0,
        }
    elif target.dense:
        settings["mlp_only_layers"] = list(range(config.first_k_dense_replace))
    return settings | OWN_SETTINGS.get(target.name, lambda anatomy: {})(anatomy)


def positions_of(anatomy: Anatomy, target: Target) -> dict[str, float]:
    """Return what config.json says about positions in its older form too, which other programs may read.

    transformers 5 has moved these keys to `rope_parameters`.
    """
    rope = rope_of(anatomy.config)
    if rope.get("rope_type", "default") != "default" or target.attention == "latent":
        return {}
    found = {"rope_theta": float(rope["rope_theta"])} if "rope_theta" in rope else {}
    return found | ({"partial_rotary_factor": 1.0} if target.name == "glm4_moe" else {})


def is_tied(anatomy: Anatomy, target: Target) -> bool:
    """Return whether the target has one matrix for embedding and output. With a factor, only one of them has it."""
    config = anatomy.config
    has_factor = config.embed_scale or is_rescaled(anatomy, target)
    return bool(config.tie_word_embeddings) and (target.name == "granitemoe" or not has_factor)


def is_rescaled(anatomy: Anatomy, target: Target) -> bool:
    """Return whether the target norms queries and keys, which the model does not."""
    return target.attention in ("row_norm", "head_norm") and anatomy.query_norm == "none"


def _window(anatomy: Anatomy) -> int | None:
    return next((window for window in anatomy.windows if window is not None), None)


def _granite(anatomy: Anatomy) -> dict[str, Any]:
    return {
        "embedding_multiplier": math.sqrt(anatomy.config.hidden_size) if anatomy.config.embed_scale else 1.0,
        "attention_multiplier": Heads.of(anatomy.config).width ** -0.5,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def _qwen2(anatomy: Anatomy) -> dict[str, Any]:
    width = anatomy.config.shared_experts * anatomy.config.intermediate_size or NO_SHARED
    types = ["full_attention" if layer.window is None else "sliding_attention" for layer in anatomy.layers]
    return {
        "shared_expert_intermediate_size": width,
        "qkv_bias": bool(anatomy.biases),
        "use_sliding_window": _window(anatomy) is not None,
        "sliding_window": _window(anatomy),
        "layer_types": types,
    }


def _qwen3(anatomy: Anatomy) -> dict[str, Any]:
    return {"use_sliding_window": _window(anatomy) is not None, "sliding_window": _window(anatomy)}


def _gpt_oss(anatomy: Anatomy) -> dict[str, Any]:
    layers = ["full_attention"] * len(anatomy.layers)
    unused = anatomy.config.max_position_embeddings  # no layer has a window, but transformers makes a mask for one
    return {"layer_types": layers, "sliding_window": unused, "swiglu_alpha": ALPHA, "swiglu_limit": 1e30}


def _latent(anatomy: Anatomy) -> dict[str, Any]:
    """Return the sizes of latent attention that holds ours, and the frequencies of its one key."""
    config = anatomy.config
    heads, rope = Heads.of(config), rope_of(config)
    width = heads.keys * heads.width
    if heads.keys > 1:
        factors = rope_factors(rope["rope_theta"], heads.width, heads.keys)
        length = config.max_position_embeddings
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}
        rope |= {"attention_factor": 1.0, "original_max_position_embeddings": length}
    return {
        "rope_parameters": rope,
        "num_key_value_heads": heads.queries,
        "head_dim": width,
        "kv_lora_rank": width,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": width,
        "v_head_dim": heads.width,
        "rope_interleave": False,
    }


OWN_SETTINGS: dict[str, Callable[[Anatomy], dict[str, Any]]] = {
    "mixtral": lambda anatomy: {"sliding_window": _window(anatomy)},
    "granitemoe": _granite,
    "qwen2_moe": _qwen2,
    "glm4_moe": lambda anatomy: {"use_qk_norm": anatomy.query_norm == "head", "partial_rotary_factor": 1.0},
    "gpt_oss": _gpt_oss,
    "qwen3_moe": _qwen3,
    "deepseek_v3": _latent,
}


def rope_factors(theta: float, head_dim: int, key_heads: int) -> list[float]:
    """Return the numbers by which longrope divides the frequencies of a key that holds the keys of all heads.

    Part g of that key gets the frequencies theta^(-2i/head_dim) of a key of its own. Each factor is the one, among the
    neighbors of its rounded value, that gives the nearest frequency in fp32.
    """
    wanted = (1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))).repeat(key_heads)
    width = key_heads * head_dim
    powers = theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    first = (1.0 / (wanted.double() * powers.double())).float()
    tried = torch.stack([first * (1 + step * 2.0**-24) for step in range(-4, 5)])
    error = (1.0 / (tried * powers) - wanted).abs()
    return tried.gather(0, error.argmin(0)[None])[0].tolist()
