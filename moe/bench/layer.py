"""One MoE layer, forward and backward, beside its limits and transformers' Mixtral block."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

from moe.bench.timing import Table, device, interleave, relative
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs


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
    parser.add_argument("--rounds", type=int, default=15)


def answer(arguments: argparse.Namespace) -> Iterator[Table]:
    for name in arguments.shapes.split(","):
        sizes = ", ".join(f"{letter}={size}" for letter, size in SHAPES[name]._asdict().items())
        passes = layer_passes(SHAPES[name], dtype=DTYPES[arguments.dtype])
        seconds = interleave([(title, one.both_ways) for title, one in passes.items()], rounds=arguments.rounds)
        table = relative(f"layer {name}: {sizes}, {arguments.dtype} on {device()}", seconds, to="dense")
        for row, one in zip(table.rows, passes.values(), strict=True):
            row["kept for the backward pass / least"] = one.bytes_kept() / least_bytes(SHAPES[name], one.dtype)
        yield table


class Pass(NamedTuple):
    """A layer with what it takes: `rows` fresh random rows of width `dim` every time."""

    forward: Callable[[Tensor], Tensor]
    module: nn.Module
    rows: int
    dim: int
    dtype: torch.dtype

    def both_ways(self) -> None:
        """Forward and backward, of a loss that costs next to nothing."""
        self.forward(self._input()).square().mean().backward()
        self.module.zero_grad()

    def bytes_kept(self) -> int:
        """What the forward pass leaves in memory for the backward pass, parameters apart."""
        parameters = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            self.forward(self._input())
        return sum(storage.nbytes() for storage in kept.values())

    def _input(self) -> Tensor:
        return torch.randn(1, self.rows, self.dim, device=device(), dtype=self.dtype, requires_grad=True)


def least_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """The tokens, and of each assignment the products with two matrices of its expert: all else follows from them."""
    return (shape.tokens * shape.dim + 2 * shape.tokens * shape.k * shape.ffn) * dtype.itemsize


def layer_passes(shape: Shape, *, dtype: torch.dtype) -> dict[str, Pass]:
    """Two limits (a dense layer of equal active FLOPs, and our experts on equal groups of rows, without routing), ours,
    and the block of transformers' Mixtral in its two implementations.

    All have three matrices of the same size an expert (SwiGLU).
    """
    torch.manual_seed(0)
    router = TopK(shape.dim, shape.experts, k=shape.k)
    experts = Experts(shape.experts, shape.dim, hidden=shape.ffn, kind="swiglu")
    dense = Experts(1, shape.dim, hidden=shape.k * shape.ffn, kind="swiglu")
    blocks = {name: MixtralSparseMoeBlock(mixtral_config(shape, name)) for name in ("grouped_mm", "eager")}
    ours = MoELayer(router, experts)
    for module in (ours, dense, *blocks.values()):
        module.to(device(), dtype)
        for p in module.parameters():
            nn.init.normal_(p, std=0.02)
    context = Context(torch.zeros(1, shape.tokens, dtype=torch.long, device=device()), Knobs.of(device=device()))
    limited = context._replace(capacity=1.25)
    rows = shape.tokens * shape.k
    equal = torch.full((shape.experts,), rows // shape.experts, device=device())
    forward: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module, int]] = {
        "dense": (lambda x: dense(x[0], torch.tensor([shape.tokens])), dense, shape.tokens),
        "our experts on equal groups": (lambda x: experts(x[0], equal), experts, rows),
        "ours": (lambda x: ours(x, context).y, ours, shape.tokens),
        "ours, capacity 1.25": (lambda x: ours(x, limited).y, ours, shape.tokens),
        **{f"Mixtral, {name}": (_first_of(block), block, shape.tokens) for name, block in blocks.items()},
    }
    return {name: Pass(*one, shape.dim, dtype) for name, one in forward.items()}


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
