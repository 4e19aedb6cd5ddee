"""One MoE layer, forward and backward, beside its limits and transformers' Mixtral block."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

from moe.bench.timing import Table, Variant, interleave, relative
from moe.experts import Experts
from moe.layer import MoELayer
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
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=",".join(SHAPES), help="see docs/benchmarks.md")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)


def answer(arguments: argparse.Namespace) -> Iterator[Table]:
    for name in arguments.shapes.split(","):
        sizes = ", ".join(f"{letter}={size}" for letter, size in SHAPES[name]._asdict().items())
        variants = layer_variants(SHAPES[name], dtype=DTYPES[arguments.dtype], device=arguments.device)
        title = f"layer {name}: {sizes}, {arguments.dtype} on {arguments.device}"
        yield relative(title, interleave(variants, rounds=arguments.rounds), to="dense")


def layer_variants(shape: Shape, *, dtype: torch.dtype, device: str) -> list[Variant]:
    """Two limits (a dense layer of equal active FLOPs, and our experts on equal groups of rows, without routing), ours,
    and the block of transformers' Mixtral in its two implementations.

    All have three matrices of the same size an expert (SwiGLU), and fresh inputs every round.
    """
    torch.manual_seed(0)
    router = TopK(shape.dim, shape.experts, k=shape.k)
    experts = Experts(shape.experts, shape.dim, hidden=shape.ffn, kind="swiglu")
    dense = Experts(1, shape.dim, hidden=shape.k * shape.ffn, kind="swiglu")
    blocks = {name: MixtralSparseMoeBlock(mixtral_config(shape, name)) for name in ("grouped_mm", "eager")}
    ours = MoELayer(router, experts)
    for module in (ours, dense, *blocks.values()):
        module.to(device, dtype)
        for p in module.parameters():
            nn.init.normal_(p, std=0.02)
    context = Context(torch.zeros(1, shape.tokens, dtype=torch.long, device=device), Knobs.of(device=device))
    rows = shape.tokens * shape.k
    equal = torch.full((shape.experts,), rows // shape.experts, device=device)

    def backward(forward: Callable[[Tensor], Tensor], module: nn.Module, rows: int) -> Callable[[], object]:
        def run() -> None:
            x = torch.randn(1, rows, shape.dim, device=device, dtype=dtype, requires_grad=True)
            forward(x).square().mean().backward()
            module.zero_grad()

        return run

    return [
        ("dense", backward(lambda x: dense(x[0], torch.tensor([shape.tokens])), dense, shape.tokens)),
        ("our experts on equal groups", backward(lambda x: experts(x[0], equal), experts, rows)),
        ("ours", backward(lambda x: ours(x, context).y, ours, shape.tokens)),
        *((f"Mixtral, {name}", backward(_first_of(block), block, shape.tokens)) for name, block in blocks.items()),
    ]


def mixtral_config(shape: Shape, implementation: str, **others: Any) -> MixtralConfig:
    """transformers' configuration of experts of this shape; others: of the rest of a model."""
    config = MixtralConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.ffn,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
        tie_word_embeddings=True,
        use_cache=False,
        **others,
    )
    config._experts_implementation = implementation
    return config


def _first_of(block: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        output = block(x)
        return output[0] if isinstance(output, tuple) else output

    return forward
