"""Tiny models with random weights of every Mixture of Experts in transformers that is tested, at odd sizes."""

import copy
import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe.config.checkpoints.transformers_config import EXPERTS, PER_TOKEN, number
from moe.config.model import ModelConfig
from moe.foreign import plain
from moe.model.causal_lm import MoEConfig, MoEForCausalLM

V, E, K = 61, 5, 3
COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), K),
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough that a wrong weight is noticed
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Six experts in three groups, multi-head latent attention, a dense first layer, a shared expert.
DEEPSEEK = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LINEAR = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
# Architectures that need no further keys, and those with the keys of DeepSeek.
PLAIN = (
    *("afmoe", "aria_text", "cohere2_moe", "exaone_moe", "flint", "granitemoe_swa", "granitemoeshared"),
    *("hy_v3", "kolibri1", "laguna", "lara_mini", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text"),
    *("nemotron_h", "sarvam_moe", "solar_open"),
)
LATENT = ("axk1", "axk2", "deepseek_v32", "dots1", "glm4_moe_lite", "glm_moe_dsa", "hy_v4", "sarvam_mla")
SPECIAL: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 4},
    "olmoe": {"norm_topk_prob": False, "clip_qkv": 2.0},
    "flex_olmo": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 20, "norm_topk_prob": False, "mlp_only_layers": [1]},
    "qwen3_moe": {"norm_topk_prob": True, "tie_word_embeddings": True},
    "qwen3_next": {
        "shared_expert_intermediate_size": 20,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "full_attention_interval": 3,
        **LINEAR,
    },
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 12},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8},
    "granitemoe": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    "phimoe": {"num_experts_per_tok": 2},
    "jamba": {
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": E, "moe_top_k": K, "hidden_size": 32},
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_num_shared_experts": 1},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "minimax": {"layer_types": ["linear_attention", "full_attention", "full_attention"], "block_size": 8},
    "hunyuan_v1_moe": {"num_shared_expert": 1},
    **{kind: {} for kind in PLAIN},
    **{kind: {**DEEPSEEK, "q_lora_rank": 12} for kind in LATENT},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "shared_intermediate_size": 20,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "bailing_hybrid": {
        **DEEPSEEK,
        "q_lora_rank": 12,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "kimi_linear": {
        **DEEPSEEK,
        "linear_attn_config": {
            "kda_layers": [1, 2],
            "full_attn_layers": [3],
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
    },
    "qwen3_5_moe_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "shared_expert_intermediate_size": 20,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        **LINEAR,
    },
}
# Those that our own routers can express.
EXPRESSED = (
    *("mixtral", "olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v3", "granitemoe"),
    *("glm4_moe", "jamba", "minimax", "hunyuan_v1_moe"),
)


def tiny(kind: str, **changes: Any) -> PreTrainedModel:
    """Return a model of an architecture with random weights, in evaluation mode. Biases of selection are not zero."""
    torch.manual_seed(0)
    settings = {**COMMON, **SPECIAL[kind], **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.3)
    return model.eval()  # type: ignore[no-any-return]


def router_of(source: PreTrainedModel) -> dict[str, Any]:
    """Return the router of ours that decides like that of a model: what the words that its checkpoint implies say."""
    return plain.router_of(source.config)


def around(source: PreTrainedModel, router: dict[str, Any] | None = None, *, copied: bool = True) -> MoEForCausalLM:
    """Return an imported copy of a model, or the model itself, in evaluation mode: with its own router or another."""
    own = {
        "_target_": "moe.routers.imported.Imported",
        "k": number(source.config, PER_TOKEN),
    }
    sizes = ModelConfig(dim=source.config.hidden_size, heads=4, layers=3, ffn=24, dense_ffn=40)
    sizes.num_experts = number(source.config, EXPERTS)
    config = MoEConfig.around(source.config, sizes, router or own)
    return MoEForCausalLM(config, causal_lm=copy.deepcopy(source) if copied else source).eval()


def largest_difference(kind: str, *, ours: bool) -> float:
    """Return how far the logits of an imported model are from those of transformers, relative to the largest logit.

    ours: with the router of ours that decides like the model's own.
    """
    source = tiny(kind)
    model = around(source, router_of(source) if ours else None)
    ids = torch.randint(3, V, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source(ids).logits
        return ((model(ids).logits - expected).abs().max() / expected.abs().max()).item()


def table() -> str:
    """Return the table of architectures in docs/foreign-models.md. Differences are rounded up to a power of ten."""
    names = ("architecture", "largest difference of logits", "observed", "its router in a run", "given back")
    rows = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    kept = "its own code | with its own router"
    replaced = "one of ours that decides the same | with its own or another router"
    for kind in SPECIAL:
        ours = kind in EXPRESSED
        found = max(largest_difference(kind, ours=each) for each in {False, ours})
        below = f"below 1e{math.floor(math.log10(found)) + 1}" if found else "none"
        rows.append(f"| `{kind}` | {below} | yes | {replaced if ours else kept} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
