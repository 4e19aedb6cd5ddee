"""Attention and norm compute what those of transformers' Llama compute, and have the right gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from moe.model import attention as module
from moe.model.attention import Attention, RMSNorm, _Attended, rotated

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
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    whole, *parts = results[0]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_the_norm_is_that_of_llama_and_of_the_kernel_that_a_gpu_uses() -> None:
    x, norms = torch.randn(3, 32), (RMSNorm(32, eps=1e-5), LlamaRMSNorm(32, eps=1e-5))
    torch.testing.assert_close(*(norm(x) for norm in norms), rtol=0, atol=1e-6)
    assert torch.equal(*(norm.bfloat16()(x.bfloat16()) for norm in norms))
    norms[0].float()
    one = torch.randn(32, requires_grad=True)
    assert norms[0](one).sum().backward() is None  # a single row, without other axes, has a gradient too
    torch.testing.assert_close(F.rms_norm(x, (32,), norms[0].weight, 1e-5), norms[0](x))


def test_the_gradient_of_the_norm_agrees_with_finite_differences() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(6, eps=1e-2).double()
    x, weight = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), weight.requires_grad_()))


def test_rotation_is_that_of_llama_and_its_gradient_agrees_with_finite_differences() -> None:
    """The gradient is right for any sine, also if its halves differ."""
    torch.manual_seed(0)
    x, cos, sin = (torch.randn(2, size, 5, 6, dtype=torch.float64) for size in (3, 1, 1))
    expected, _ = apply_rotary_pos_emb(x, x, cos[:, 0], sin[:, 0])
    torch.testing.assert_close(rotated(x, cos, sin), expected)
    assert torch.autograd.gradcheck(lambda x: rotated(x, cos, sin), x.requires_grad_())
    in_bf16 = rotated(x.bfloat16(), cos.float(), sin.float())
    assert in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bf16.double(), rotated(x.bfloat16().double(), cos, sin), rtol=2**-8, atol=1e-6)


def test_attention_by_products_is_that_of_pytorch_with_the_same_gradients() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.7).transpose(1, 2)
    torch.testing.assert_close(_Attended.apply(*inputs, 0.7), expected)
    assert torch.autograd.gradcheck(_Attended.apply, (*inputs, 0.7))


def test_attention_by_products_rounds_no_scores() -> None:
    """In bf16, even if scores are large, the result is as exact as rounding shares and outputs allows."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 64, 32).bfloat16() for _ in range(3)]
    exact = F.scaled_dot_product_attention(*(each.double() for each in inputs), is_causal=True, scale=2.0)
    error = _Attended.apply(*inputs, 2.0).double() - exact.transpose(1, 2)
    assert error.norm() < 0.004 * exact.norm()


@pytest.mark.parametrize("longest", [256, 4], ids=["products", "SDPA"])
def test_attention_in_bf16_agrees_with_fp32(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, outputs and gradients agree with those of fp32 within a few roundings, both ways."""
    monkeypatch.setattr(module, "LONGEST", longest)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, attn_implementation="sdpa")
    config._attn_implementation = "sdpa"
    attention, results = Attention(config, layer_idx=0), []
    calls: list[int] = []
    apply = _Attended.apply
    monkeypatch.setattr(_Attended, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
    for enabled in (False, True):
        x = torch.linspace(-1, 1, 2 * 5 * 32).view(2, 5, 32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = attend(attention, x, 0, None)
        output.float().backward(torch.linspace(1, 2, 2 * 5 * 32).view(2, 5, 32))
        results.append([output.float(), x.grad, *(p.grad for p in attention.parameters())])
        attention.zero_grad()
    assert len(calls) == (longest == 256)
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03 * exact.abs().max().item())
