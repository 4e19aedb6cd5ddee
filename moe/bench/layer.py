"""Compare one MoE layer, forward and backward, with its limits and with the Mixtral block of transformers."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

from moe.bench.questions import DTYPES, SHAPES, Shape
from moe.bench.timing import UNCOUNTED, TimingTable, Variant, relative_table, time_in_turns, timed_device, touch_memory
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.seeding import seed_all
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs

RECORDED = ("dense", "experts alone, equal groups", "MoE", "Mixtral, grouped_mm")  # also timed as CUDA graphs


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    touch_memory()
    for name, tokens, dtype in itertools.product(arguments.shapes, arguments.tokens, arguments.dtype):
        shape = SHAPES[name]._replace(tokens=tokens or SHAPES[name].tokens)
        sizes = ", ".join(f"{letter}={size}" for letter, size in shape._asdict().items())
        passes = layer_passes(shape, dtype=getattr(torch, DTYPES[dtype]))
        variants: list[Variant] = [(title, layer_pass.forward_and_backward) for title, layer_pass in passes.items()]
        recorded = [title for title in passes if title in RECORDED and timed_device().type == "cuda"]
        variants += [(f"{title}, CUDA graph", as_graph(passes[title].forward_and_backward)) for title in recorded]
        seconds = time_in_turns(variants, rounds=arguments.rounds)
        table = relative_table(f"layer {name}: {sizes}, {dtype} on {timed_device()}", seconds, to="dense")
        for row, title in zip(table.rows, [*passes, *recorded], strict=True):
            layer_pass = passes[title]
            least = least_saved_bytes(shape, layer_pass.dtype)
            row["saved for the backward pass / least"] = layer_pass.saved_bytes() / least
        yield table


class LayerPass(NamedTuple):
    """Layer with its input: new random numbers (1, rows, dim) for every pass."""

    forward: Callable[[Tensor], Tensor]
    module: nn.Module
    rows: int
    dim: int
    dtype: torch.dtype

    def forward_and_backward(self) -> None:
        """Run forward and backward, with a loss that costs almost nothing."""
        self.forward(self._input()).square().mean().backward()
        self.module.zero_grad()

    def saved_bytes(self) -> int:
        """Return the bytes that the forward pass saves for the backward pass, parameters excluded."""
        parameters = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage
            return tensor

        with saved_tensors_hooks(save, lambda tensor: tensor):
            self.forward(self._input())
        return sum(storage.nbytes() for storage in saved.values())

    def _input(self) -> Tensor:
        return torch.randn(1, self.rows, self.dim, device=timed_device(), dtype=self.dtype, requires_grad=True)


def as_graph(run: Callable[[], None]) -> Callable[[], None]:
    """Return a function that starts all kernels of `run` at once, as a training step with `cuda_graph` does."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(UNCOUNTED):
            run()  # creates what libraries need, and compiles
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def least_saved_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Return the fewest bytes that a backward pass needs: the tokens, and for each assignment its products with two
    matrices of its expert. All other values follow from them."""
    return (shape.tokens * shape.dim + 2 * shape.tokens * shape.k * shape.ffn) * dtype.itemsize


def layer_passes(shape: Shape, *, dtype: torch.dtype) -> dict[str, LayerPass]:
    """Return the variants by name: two limits, `MoELayer`, and transformers' Mixtral block in two implementations.

    The limits are a dense layer of equal active FLOPs, and the experts alone, which get equal groups of rows without
    routing. In all variants an expert has three matrices of the same sizes (SwiGLU).
    """
    seed_all(0)
    router = TopK(shape.dim, shape.experts, k=shape.k)
    experts = Experts(shape.experts, shape.dim, hidden=shape.ffn, kind="swiglu")
    dense = Experts(1, shape.dim, hidden=shape.k * shape.ffn, kind="swiglu")
    blocks = {name: MixtralSparseMoeBlock(mixtral_config(shape, name)) for name in ("grouped_mm", "eager")}
    moe_layer = MoELayer(router, experts)
    for module in (moe_layer, dense, *blocks.values()):
        module.to(timed_device(), dtype)
        for p in module.parameters():
            nn.init.normal_(p, std=0.02)
    context = Context(
        torch.zeros(1, shape.tokens, dtype=torch.long, device=timed_device()), Knobs.of(device=timed_device())
    )
    limited = context._replace(capacity=1.25)
    rows = shape.tokens * shape.k
    equal = torch.full((shape.experts,), rows // shape.experts, device=timed_device())
    forward: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module, int]] = {
        "dense": (lambda x: dense(x[0], torch.tensor([shape.tokens])), dense, shape.tokens),
        "experts alone, equal groups": (lambda x: experts(x[0], equal), experts, rows),
        "MoE": (lambda x: moe_layer(x, context).y, moe_layer, shape.tokens),
        "MoE, capacity 1.25": (lambda x: moe_layer(x, limited).y, moe_layer, shape.tokens),
        **{f"Mixtral, {name}": (_first_of(block), block, shape.tokens) for name, block in blocks.items()},
    }
    return {name: LayerPass(*variant, shape.dim, dtype) for name, variant in forward.items()}


def mixtral_config(shape: Shape, implementation: str, **others: Any) -> MixtralConfig:
    """Return Mixtral's configuration for experts of this shape; `others` are settings of the other parts of a model."""
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
    """Return a function that gives the first output of a block, which may return a tuple."""

    def forward(x: Tensor) -> Tensor:
        output = block(x)
        return output[0] if isinstance(output, tuple) else output

    return forward
