"""Random models of odd sizes for the tests of exports."""

from typing import Any

import torch

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


def make(router: str, **changes: Any) -> MoEForCausalLM:
    """Return a random model, with norms that are not 1 and biases that are not 0."""
    settings = SIZES | {"router": ROUTERS[router]} | changes
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig(**settings, router_temperature=ROUTERS[router].get("temp", 1.0))).eval()
    for tensor in [*model.parameters(), *(layer.router.bias for layer in model.moe_layers if "biased" in router)]:
        if tensor.ndim == 1:
            tensor.data += 0.3 * torch.randn_like(tensor)
    return model
