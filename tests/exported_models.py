"""Random models of odd sizes for the tests of exports."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.config.model import ModelConfig
from moe.model.architecture import MoEConfig
from moe.model.causal_lm import MoEForCausalLM

ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {"_target_": "moe.routers.topk.TopK", "k": 3},
    "switch": {"_target_": "moe.routers.topk.TopK", "k": 1, "gate": "softmax_all"},
    "softmax_all": {"_target_": "moe.routers.topk.TopK", "k": 3, "gate": "softmax_all"},
    "uniform": {"_target_": "moe.routers.topk.TopK", "k": 3, "gate": "uniform"},
    "random": {"_target_": "moe.routers.random.Random", "k": 3},
    "temperature": {"_target_": "moe.routers.topk.Temperature", "k": 3, "temp": 0.5},
    "gumbel": {"_target_": "moe.routers.gumbel.Gumbel", "k": 1, "temp": 2.0},
    "biased": {"_target_": "moe.routers.sigmoid_bias.SigmoidBias", "k": 3},
    "biased_raw": {"_target_": "moe.routers.sigmoid_bias.SigmoidBias", "k": 3, "normalize": False},
    "biased_groups": {"_target_": "moe.routers.sigmoid_bias.SigmoidBias", "k": 2, "groups": 2, "top_groups": 1},
    "groups": {"_target_": "moe.routers.group_limited.GroupLimited", "k": 2, "groups": 2, "top_groups": 1},
    "relu": {"_target_": "moe.routers.relu.ReLU"},
    "cosine": {"_target_": "moe.routers.cosine.CosineRouter", "proj_dim": 8},
    "hash": {"_target_": "moe.routers.hash.Hash"},
}
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "num_experts": 5,
    "expert": "swiglu",
    "dense_ffn": 36,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}

# Dense models that are upcycled, and what config.json of each says beside the sizes.
PARENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"head_dim": 4}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3 with a window": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {}),
}


def make(router: str, **changes: Any) -> MoEForCausalLM:
    """Return a random model, with norms that are not 1 and biases that are not 0."""
    settings = SIZES | {"router": ROUTERS[router]} | changes
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig(**settings, router_temperature=ROUTERS[router].get("temp", 1.0))).eval()
    for tensor in [*model.parameters(), *(layer.router.bias for layer in model.moe_layers if "biased" in router)]:
        if tensor.ndim == 1:
            tensor.data += 0.3 * torch.randn_like(tensor)
    return model


def upcycle(parent: str, router: str, *, vocab_size: int = 300, **changes: Any) -> MoEForCausalLM:
    """Return a dense model of `PARENTS` whose MLPs are replaced by random experts. Norms and biases are random too."""
    kind, special = PARENTS[parent]
    sizes = {name: value for name, value in SIZES.items() if "expert" not in name}
    sizes |= {"intermediate_size": 36, "vocab_size": vocab_size}
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | special), dtype=torch.float32)
    for tensor in dense.parameters():
        if tensor.ndim == 1:
            tensor.data += 0.3 * torch.randn_like(tensor)
    ours = ModelConfig(dim=24, heads=6, layers=2, ffn=20, num_experts=5)
    config = MoEConfig.around(dense.config, ours, ROUTERS[router])
    for name, value in {
        "expert": "geglu" if "gemma" in kind else "swiglu",
        "initializer_range": 0.3,
        **changes,
    }.items():
        setattr(config, name, value)
    return MoEForCausalLM(config, causal_lm=dense).eval()
