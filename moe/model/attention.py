"""Attention and norm of transformers' Llama, with fewer passes over memory. Weights and results are those of Llama."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, eager_attention_forward

from moe.fused import fused, product_type

LONGEST = 256  # tokens of a sequence up to which products of all scores are faster than SDPA, in bf16 on a CPU
Rotary = tuple[Float[Tensor, "#B S N"], Float[Tensor, "#B S N"]]


class RMSNorm(LlamaRMSNorm):
    """x / sqrt(mean of x^2 + eps) * weight, over the last axis."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        if x.dtype != self.weight.dtype or (x.dtype.itemsize < 4 and not x.is_cuda):
            normed: Tensor = super().forward(x)
        elif x.is_cuda:
            normed = F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        else:
            normed = _Norm.apply(x, self.weight, self.variance_epsilon)
        return normed


class _Norm(torch.autograd.Function):
    """`RMSNorm` on a CPU. Its gradient is written by hand, because autograd needs twice as many passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        product = gradient * normed
        mean = (product @ weight).div_(len(weight))[..., None]
        of_x = (gradient * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return of_x, product.sum_to_size(weight.shape), None


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
        elif mask is None and self._multiplies_all(query, key):
            attended = _Attended.apply(query, key, value, self.scaling)
            return self.o_proj(attended.flatten(2)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(attended.reshape(*x.shape[:-1], -1).contiguous()), weights

    def _multiplies_all(self, query: Float[Tensor, "B H S N"], key: Float[Tensor, "B G S N"]) -> bool:
        """Return whether causal attention computes all scores. In bf16 on a CPU, SDPA takes longer, see `LONGEST`."""
        plain = self.config._attn_implementation == "sdpa" and not (self.training and self.attention_dropout)
        in_bf16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
        return plain and in_bf16 and query.shape == key.shape and 1 < query.shape[2] <= LONGEST


class _Attended(torch.autograd.Function):
    """Causal attention. Scores of later tokens are computed too, and masked. Scores and softmax are in fp32 or fp64."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "B H S N"],
        key: Float[Tensor, "B H S N"],
        value: Float[Tensor, "B H S N"],
        scaling: float,
    ) -> Float[Tensor, "B S H N"]:
        ctx.scaling, ctx.heads, length = scaling, *query.shape[1:3]
        exact = torch.promote_types(query.dtype, torch.float32)
        query, key, value = (each.flatten(0, 1) for each in (query, key, value))
        later = torch.full((length, length), -torch.inf, dtype=exact).triu_(1)
        scores = torch.baddbmm(later, query.to(exact), key.to(exact).mT, alpha=scaling)
        shares = scores.softmax(-1).to(value.dtype)
        ctx.save_for_backward(query, key, value, shares)
        return (shares @ value).unflatten(0, (-1, ctx.heads)).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "B S H N"]) -> tuple[Float[Tensor, "B H S N"] | None, ...]:
        query, key, value, shares = ctx.saved_tensors
        gradient = gradient.transpose(1, 2).flatten(0, 1)
        of_scores = torch._softmax_backward_data(gradient @ value.mT, shares, -1, shares.dtype)
        products = (of_scores @ key).mul_(ctx.scaling), (of_scores.mT @ query).mul_(ctx.scaling), shares.mT @ gradient
        return *(each.unflatten(0, (-1, ctx.heads)) for each in products), None


def rotated(
    x: Float[Tensor, "B H S N"], cos: Float[Tensor, "#B 1 S N"], sin: Float[Tensor, "#B 1 S N"]
) -> Float[Tensor, "B H S N"]:
    """Return queries or keys, rotated by their positions (Su et al. 2104.09864), as transformers' Llama does."""
    result: Tensor = _rotate_fused(x, cos, sin) if x.is_cuda else _Rotated.apply(x, cos, sin)
    return result


class _Rotated(torch.autograd.Function):
    """`rotated` on a CPU, with fewer passes over memory, above all for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = sin.chunk(2, -1)
        cos, sin = (each.transpose(1, 2) for each in (cos, torch.cat((-first, second), -1)))
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, sin.roll(sin.shape[-1] // 2, -1)), None, None


def _rotate(x: Float[Tensor, "B H S N"], cos: Float[Tensor, "#B S 1 N"], sin: Float[Tensor, "#B S 1 N"]) -> Tensor:
    """Return x * cos + x' * sin, where x' has the halves of x exchanged. Reads x in the order in which it lies."""
    x, exact = x.transpose(1, 2), torch.promote_types(x.dtype, cos.dtype)
    exchanged = torch.cat(x.chunk(2, -1)[::-1], -1).to(exact)
    return exchanged.mul_(sin).addcmul_(x.to(exact), cos).to(x.dtype).transpose(1, 2)


@fused(least=2**22)
def _rotate_fused(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * cos + turned * sin).to(x.dtype)
