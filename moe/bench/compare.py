"""Our layer and training step beside peers and limits, interleaved in one process.

Every round times each variant once on fresh inputs; medians over rounds and their ratios are reported, because a
shared machine makes absolute times meaningless. Peers come from installed packages.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralForCausalLM, MixtralSparseMoeBlock

from moe.config import ModelConfig, OptimizerConfig
from moe.experts import Experts
from moe.layer import MoELayer
from moe.model import MoEConfig, MoEForCausalLM
from moe.optim import build_optimizers
from moe.routers.topk import TopK
from moe.routing import Context, Knobs


class Shape(NamedTuple):
    """E experts, K of them per token, width D, expert width F, T tokens."""

    experts: int
    k: int
    dim: int
    ffn: int
    tokens: int


SHAPES = {
    "a": Shape(8, 2, 384, 1536, 4096),
    "b": Shape(32, 4, 256, 512, 2048),
    "c": Shape(8, 2, 128, 512, 2048),
    "d": Shape(128, 2, 128, 256, 2048),
}
Variant = tuple[str, Callable[[], object]]


def interleave(variants: list[Variant], *, rounds: int) -> dict[str, float]:
    """Median seconds of each variant over `rounds` rounds, after two that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in variants}
    for count in range(rounds + 2):
        for name, run in variants:
            tick = time.perf_counter()
            run()
            if count >= 2:
                seconds[name].append(time.perf_counter() - tick)
    return {name: median(values) for name, values in seconds.items()}


def layer_variants(shape: Shape) -> list[Variant]:
    """Forward and backward of one layer: ours, transformers' Mixtral block, and a dense layer of equal active FLOPs.

    Expert kinds differ (ours SwiGLU here, as Mixtral's), so all have three matrices of the same size.
    """
    torch.manual_seed(0)
    ours = MoELayer(
        TopK(shape.dim, shape.experts, k=shape.k),
        Experts(shape.experts, shape.dim, hidden=shape.ffn, kind="swiglu"),
    )
    dense = Experts(1, shape.dim, hidden=shape.k * shape.ffn, kind="swiglu")
    for module in (ours, dense):
        for p in module.parameters():
            nn.init.normal_(p, std=0.02)
    context = Context(torch.zeros(1, shape.tokens, dtype=torch.long), Knobs.of())

    def backward(forward: Callable[[Tensor], Tensor], module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            x = torch.randn(1, shape.tokens, shape.dim, requires_grad=True)
            forward(x).square().mean().backward()
            module.zero_grad()

        return run

    rows = torch.tensor([shape.tokens])
    variants: list[Variant] = [
        ("dense, equal active FLOPs", backward(lambda x: dense(x[0], rows), dense)),
        ("ours", backward(lambda x: ours(x, context).y, ours)),
    ]
    for implementation in ("grouped_mm", "eager"):
        block = _mixtral_block(shape, implementation)
        variants.append((f"transformers Mixtral, {implementation}", backward(_first_of(block), block)))
    return variants


def step_variants(vocab_size: int, batch: int, seq_len: int) -> list[Variant]:
    """A whole training step of model=tiny with SwiGLU experts: ours, Mixtral with its own experts, ours made dense."""
    sizes = ModelConfig(dim=128, heads=4, layers=4, ffn=256, num_experts=8, dense_ffn=512, expert="swiglu")
    router = {"_target_": "moe.routers.topk.TopK", "k": 2}
    routed = MoEForCausalLM(MoEConfig.of(sizes, router, vocab_size=vocab_size, seq_len=seq_len))
    sizes.first_k_dense_replace = sizes.layers
    dense = MoEForCausalLM(MoEConfig.of(sizes, router, vocab_size=vocab_size, seq_len=seq_len))
    mixtral = MixtralForCausalLM(_mixtral_config(Shape(8, 2, 128, 256, 0), vocab_size=vocab_size))
    mixtral.set_experts_implementation("grouped_mm")

    def step(model: nn.Module) -> Callable[[], object]:
        optimizers = build_optimizers(model, OptimizerConfig(muon_lr=0.02, adamw_lr=0.01))

        def run() -> None:
            ids = torch.randint(0, vocab_size, (batch, seq_len))
            output = model(input_ids=ids, labels=ids)
            balance = output.aux["load_balance"].sum() if getattr(output, "aux", None) else 0.0
            (output.loss + 0.01 * balance).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return run

    return [
        ("dense, equal active FLOPs", step(dense)),
        ("ours", step(routed)),
        ("transformers Mixtral, grouped_mm", step(mixtral)),
    ]


def _mixtral_config(shape: Shape, *, vocab_size: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
        tie_word_embeddings=True,
        use_cache=False,
    )


def _mixtral_block(shape: Shape, implementation: str) -> nn.Module:
    config = _mixtral_config(shape, vocab_size=64)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    return block


def _first_of(block: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        output = block(x)
        return output[0] if isinstance(output, tuple) else output

    return forward


def table(question: str, medians: dict[str, float]) -> str:
    """Markdown: each variant's time relative to the first, the limit."""
    limit = next(iter(medians.values()))
    lines = [f"| {question} | time / dense | dense / time |", "|---|--:|--:|"]
    lines += [f"| {name} | {value / limit:.2f} | {limit / value:.2f} |" for name, value in medians.items()]
    return "\n".join(lines)
