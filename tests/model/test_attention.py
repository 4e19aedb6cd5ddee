"""On a CPU, attention and norm compute bitwise what those of transformers' Llama compute."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from moe.model.attention import Attention, RMSNorm

CONFIG = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa")
CONFIG._attn_implementation = "sdpa"


def attend(attention: LlamaAttention, x: Tensor, first: int, cache: Cache | None) -> Tensor:
    """Return the output for tokens whose first position is `first`."""
    positions = torch.arange(first, first + x.shape[1])[None]
    output: Tensor = attention(x, LlamaRotaryEmbedding(CONFIG)(x, positions), None, cache)[0]
    return output


def test_attention_is_that_of_llama() -> None:
    """Two heads of queries share one of keys. A cache holds the first four tokens when the last one comes."""
    torch.manual_seed(0)
    x, ours, llama = torch.randn(2, 5, 32), Attention(CONFIG, layer_idx=0), LlamaAttention(CONFIG, layer_idx=0)
    llama.load_state_dict(ours.state_dict())
    results = []
    for attention in (ours, llama):
        cache = DynamicCache(config=CONFIG)
        parts = [attend(attention, x[:, :4], 0, cache), attend(attention, x[:, 4:], 4, cache)]
        results.append([attend(attention, x, 0, None), *parts])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    whole, *parts = results[0]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_the_norm_is_that_of_llama_and_of_the_kernel_that_a_gpu_uses() -> None:
    x, norms = torch.randn(3, 32), (RMSNorm(32, eps=1e-5), LlamaRMSNorm(32, eps=1e-5))
    assert torch.equal(*(norm(x) for norm in norms))
    torch.testing.assert_close(F.rms_norm(x, (32,), norms[0].weight, 1e-5), norms[0](x))
