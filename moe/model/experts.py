"""Experts: E feed-forward networks with stacked weights. Each processes its own group of rows."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe.distributed.exchange import run_distributed_experts
from moe.distributed.sharding import local_part
from moe.fused import product_type, uncompiled
from moe.routers.seeding import seeded

Linear = Callable[[Tensor, Tensor], Tensor]
Stacks = tuple[Tensor | None, ...]

# In bf16, a CPU compiles a kernel for each new number of rows, which takes ten times as long as the product of such a
# group. Group sizes differ at every step, so they are rounded up to a multiple of ROWS, and small ones to one of FEW.
ROWS, FEW = 32, 8
PADDING = 2**24  # FLOPs that such a CPU spends on padding in the time that the call of one product takes


class Experts(nn.Module):
    """E feed-forward networks without biases. Weights are stacked as (E, out, in), like E `nn.Linear` weights.

    kind: `silu` computes down(silu(up x)) with two matrices, `swiglu` computes down(silu(gate x) * up x) with three,
        and `geglu` the same with gelu in the place of silu, in the tanh form (Shazeer 2002.05202).
    """

    activation: Callable[[Tensor], Tensor] = staticmethod(F.silu)

    def __init__(self, num_experts: int, dim: int, *, hidden: int, kind: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, dim)) if kind != "silu" else None
        self.up = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.dropout = dropout
        if kind == "geglu":
            self.activation = functools.partial(F.gelu, approximate="tanh")

    @property
    def first(self) -> Float[Tensor, "E H D"] | None:
        """The matrices that act on the input and decide how far each expert is excited. None if they are not known."""
        return self.up if self.gate is None else self.gate

    @torch.no_grad()
    def initialize(self, std: float, names: dict[Tensor, str]) -> None:
        """Draw every matrix from N(0, std), see `Initializable`."""
        for p in self.parameters():
            if p in names:
                with seeded(names[p], p.shape):
                    nn.init.normal_(p, std=std)

    def kernel(self, dtype: torch.dtype) -> str:
        """Return which kernel multiplies in `dtype` on the device of the weights: see `choose_kernel`."""
        return choose_kernel(self.up.device.type, dtype, local_part(self.up).shape)

    def forward(self, x: Float[Tensor, "R D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "R D"]:
        """Return the outputs for rows that are sorted by expert, `counts` rows for each expert."""
        return run_experts(x, counts, (self.gate, self.up, self.down), self._expert)

    def _expert(self, x: Tensor, linear: Linear, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        hidden = self.activation(linear(x, up)) if gate is None else self.activation(linear(x, gate)) * linear(x, up)
        return linear(F.dropout(hidden, self.dropout, self.training), down)


@uncompiled  # group sizes change at every step, and compiled grouped_mm takes only bf16 (torch 2.13)
def run_experts(
    x: Float[Tensor, "R D"], counts: Int[Tensor, " E"], stacks: Stacks, expert: Callable[..., Tensor]
) -> Float[Tensor, "R D"]:
    """Return the outputs of E experts for rows that are sorted by expert, `counts` rows for each expert.

    stacks: their weights, each stacked as (E, out, in), or (E, out) for a bias. The last one is a stack of matrices.
    expert: computes `expert(rows, linear, *weights)`. It multiplies by `linear(rows, matrix)` alone, and gets the
        weights of one expert with its rows, or whole stacks with all rows, as the kernel wants it.

    An expert without rows gets a gradient of 0.
    """
    if isinstance(stacks[-1], DTensor):  # this rank holds only some of the experts
        local = tuple(None if stack is None else local_part(stack) for stack in stacks)
        return run_distributed_experts(x, counts, functools.partial(_run_local, stacks=local, expert=expert))
    return _run_local(x, counts, stacks, expert)


def _run_local(x: Tensor, counts: Tensor, stacks: Stacks, expert: Callable[..., Tensor]) -> Tensor:
    """Return the outputs of the experts on this rank."""
    dtype = product_type(x)
    x, stacks = x.to(dtype), tuple(None if stack is None else stack.to(dtype) for stack in stacks)
    padded = (x.device.type, dtype) == ("cpu", torch.bfloat16) and len(x) >= ROWS
    return (_run_padded if padded else _run_groups)(x, counts, stacks, expert)


def _run_padded(x: Tensor, counts: Tensor, stacks: Stacks, expert: Callable[..., Tensor]) -> Tensor:
    """Run all experts, each on so many rows that few sizes occur. The rows that are added are 0."""
    sizes, last = counts.tolist(), stacks[-1]
    assert last is not None
    evenly = _batch_pays(sizes, last.shape)
    largest = _rounded_up(max(sizes), FEW)
    padded = [largest if evenly else _rounded_up(size, FEW if size < ROWS else ROWS) for size in sizes]
    run = _run_batch if evenly else _run_groups
    if padded == sizes:
        return run(x, counts, stacks, expert)
    added = torch.tensor(padded) - counts
    place = torch.arange(len(x)) + (added.cumsum(0) - added).repeat_interleave(counts)
    rows = _Spread.apply(x, place, sum(padded))
    return _Pick.apply(run(rows, torch.tensor(padded), stacks, expert), place)


def _run_groups(x: Tensor, counts: Tensor, stacks: Stacks, expert: Callable[..., Tensor]) -> Tensor:
    """Run all experts, each on its own number of rows, by the kernel that `choose_kernel` names."""
    if len(x) and choose_kernel(x.device.type, x.dtype, stacks[-1].shape) == "grouped":  # type: ignore[union-attr]
        return _run_grouped(x, counts, stacks, expert)
    return _run_loop(x, counts.tolist(), stacks, expert)


def _run_grouped(x: Tensor, counts: Tensor, stacks: Stacks, expert: Callable[..., Tensor]) -> Tensor:
    ends = counts.to(x.device).cumsum(0, dtype=torch.int32)

    def linear(rows: Tensor, stack: Tensor) -> Tensor:
        return _GroupedLinear.apply(rows, stack, ends)

    return expert(x, linear, *(_for_each_row(stack, counts) for stack in stacks))


def _run_loop(x: Tensor, sizes: list[int], stacks: Stacks, expert: Callable[..., Tensor]) -> Tensor:
    # unbind, because indexing would create E gradients of full size; unbind stacks the E slices once
    columns = [[None] * len(sizes) if stack is None else stack.unbind() for stack in stacks]
    outputs = []
    for rows, *weights in zip(x.split(sizes), *columns, strict=True):
        if len(rows) or not len(x):  # without any rows, all experts run on none, and get a gradient of 0
            outputs.append(expert(rows, F.linear, *weights))
    return torch.cat(outputs)


def _run_batch(x: Tensor, counts: Tensor, stacks: Stacks, expert: Callable[..., Tensor]) -> Tensor:
    """Run all experts at once, on equal numbers of rows."""
    weights = (stack if stack is None or stack.ndim == 3 else stack[:, None] for stack in stacks)
    return expert(x.unflatten(0, (len(counts), -1)), _BatchedLinear.apply, *weights).flatten(0, 1)


def _batch_pays(sizes: list[int], stack: tuple[int, ...]) -> bool:
    """Return whether padding all groups to the size of the largest costs less than separate products.

    It does if there are then at most three times as many rows, and if the FLOPs of the padding are less than PADDING
    for each product that is saved: one for each expert that has rows.
    """
    experts, *matrix = stack
    rows, products = sum(sizes), sum(size > 0 for size in sizes)
    added = experts * _rounded_up(max(sizes), FEW) - rows
    return products > 1 and added <= 2 * rows and 2 * added * math.prod(matrix) < PADDING * products


def _rounded_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


class _Spread(torch.autograd.Function):
    """Put each row of x at its place among `number` rows. The others are 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(number, x.shape[1]).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return gradient.index_select(0, place), None, None


class _Pick(torch.autograd.Function):
    """Take the rows of x at some places, each at most once. The gradient is thus a copy, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.number = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.number, gradient.shape[1]).index_copy_(0, place, gradient), None


def _for_each_row(stack: Tensor | None, counts: Tensor) -> Tensor | None:
    """Return biases (E, out) with a row for each row of the experts. Return a stack of matrices as it is."""
    return stack if stack is None or stack.ndim == 3 else stack.repeat_interleave(counts.to(stack.device), dim=0)


def choose_kernel(device: str, dtype: torch.dtype, stack: tuple[int, ...]) -> str:
    """Return the name of the kernel for stacked weights (E, out, in). docs/benchmarks.md has the measurements.

    loop: one matrix product per expert, one after another.
    grouped: one `F.grouped_mm` for all experts. On CUDA in bf16 it starts one kernel instead of E and does not wait for
        group sizes. Otherwise it is a loop too (on CUDA, it waits), but one without Python calls and copies, which
        pays in bf16, and in fp32 from 16 experts. Rows must be multiples of 16 bytes.

    On a CPU in bf16, both pad groups with rows of zeros, so that few sizes occur. One batched product for all experts
    takes their place where loads are about even, see `_batch_pays`.
    """
    experts, *sizes = stack
    aligned = all(size * dtype.itemsize % 16 == 0 for size in sizes)
    least = 2 if dtype == torch.bfloat16 else 16
    return "grouped" if aligned and experts >= least and dtype in (torch.float32, torch.bfloat16) else "loop"


class _BatchedLinear(torch.autograd.Function):
    """`F.linear` of the rows of each expert (E, R, in) with its own matrix of a stack (E, out, in).

    The gradient is written by hand because autograd makes that of the stack transposed, and copying it takes as long as
    the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Tensor) -> Tensor:
        ctx.save_for_backward(x, stack)
        return x @ stack.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, stack = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return gradient @ stack if wanted[0] else None, gradient.mT @ x if wanted[1] else None


class _GroupedLinear(torch.autograd.Function):
    """`F.linear` of each group of rows with its own matrix of a stack (E, out, in). Group e ends before row ends[e].

    The gradient is written by hand because `F.grouped_mm` refuses the gradient of a sum, which has strides of 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
        x = _in_order(x)
        ctx.save_for_backward(x, stack, ends)
        return F.grouped_mm(x, stack.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, stack, ends = ctx.saved_tensors
        gradient = _in_order(gradient)
        wanted = ctx.needs_input_grad  # not of frozen experts, and not of the first layer below which nothing trains
        of_rows = F.grouped_mm(gradient, stack, offs=ends) if wanted[0] else None
        of_stack = F.grouped_mm(gradient.mT, x, offs=ends) if wanted[1] else None
        return of_rows, of_stack, None


def _in_order(x: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
    """Return x with its rows one after another in memory, as `F.grouped_mm` wants them, also a single row."""
    return x if x.stride() == (x.shape[1], 1) else x.new_empty(x.shape).copy_(x)
