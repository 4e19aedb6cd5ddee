"""Attention and norm of transformers' Llama, with fewer kernels on a GPU. Weights and results are those of Llama."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, eager_attention_forward

from moe.fused import fused, product_type

Rotary = tuple[Float[Tensor, "#B S N"], Float[Tensor, "#B S N"]]


class RMSNorm(LlamaRMSNorm):
    """x / sqrt(mean of x^2 + eps) * weight, over the last axis."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        if x.is_cuda and x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        normed: Tensor = super().forward(x)
        return normed


class Attention(LlamaAttention):
    """Causal attention with rotary position embeddings."""

    def forward(
        self, x: Float[Tensor, "B S D"], rotary: Rotary, mask: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Float[Tensor, "B S D"], Tensor | None]:
        """Return the result, and the attention weights if attention is eager.

        rotary: cosine and sine for each position and each of the N dimensions of a head.
        mask: as transformers makes it.
        """
        x = x.to(product_type(x))  # once, and not for each product
        projections = self.q_proj, self.k_proj, self.v_proj
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (project(x).view(heads).transpose(1, 2) for project in projections)
        cos, sin = (each[:, None] for each in rotary)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(attended.reshape(*x.shape[:-1], -1).contiguous()), weights


@fused(least=2**22)
def rotated(
    x: Float[Tensor, "B H S N"], cos: Float[Tensor, "#B 1 S N"], sin: Float[Tensor, "#B 1 S N"]
) -> Float[Tensor, "B H S N"]:
    """Return queries or keys, rotated by their positions (Su et al. 2104.09864), as transformers' Llama does.

    On a GPU the result has the type of x, in which attention is computed there.
    """
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    result = x * cos + turned * sin
    return result.to(x.dtype) if x.is_cuda else result
