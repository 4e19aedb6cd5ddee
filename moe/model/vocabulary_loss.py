"""The loss over the vocabulary, with or without all logits in memory at once."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe.data.labels import IGNORED
from moe.fused import fused, uncompiled

ROWS = 512  # of a chunk on a CPU: enough for products near full speed
CACHED = 2**18  # logits at a time that a CPU differentiates, so that they stay in its cache from pass to pass
LOGITS = 2**30  # of a chunk on a GPU, which is slower with smaller chunks: 2 GB in bf16


def cross_entropy(logits: Float[Tensor, "*B V"], targets: Int[Tensor, "*B"]) -> Float[Tensor, ""]:
    """Return the summed cross-entropy in nats of the rows whose target is not IGNORED."""
    rows = logits.float().flatten(0, -2)
    return F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED, reduction="sum")


@uncompiled
def linear_cross_entropy(
    x: Float[Tensor, "*B D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "*B"]
) -> Float[Tensor, ""]:
    """Return `cross_entropy(F.linear(x, weight), targets)`, computed in chunks of rows.

    The gradients are computed in the forward pass, from the logits of a chunk while they are there. So there are never
    logits, or gradients of logits, of more than one chunk. Products have the type of `F.linear` under autocast, all
    else is in fp32 (or fp64). Only the first derivative exists.
    """
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    total: Tensor = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten())
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " T"]) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=exact, device=x.device)
        length, differentiate = (LOGITS // len(weight), _on_gpu) if x.is_cuda else (ROWS, _on_cpu)
        with torch.autocast(x.device.type, enabled=False):
            buffer = x.new_empty(min(length, len(x)), len(weight))
            for first in range(0, len(x), length):
                rows = x[first : first + length]
                logits = torch.mm(rows, weight.mT, out=buffer[: len(rows)])
                loss, gradient, scale = differentiate(logits, targets[first : first + length])
                total += loss
                if of_x is not None:
                    of_x[first : first + length] = (gradient @ weight) * scale
                if of_weight is not None:
                    _add_product(of_weight, gradient.mT, (rows * scale).to(x.dtype))
        ctx.save_for_backward(of_x, of_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        of_x, of_weight = ctx.saved_tensors
        return (
            None if of_x is None else of_x * upstream.to(of_x.dtype),
            None if of_weight is None else (of_weight * upstream).to(ctx.dtype),
            None,
        )


Differentiated = tuple[Float[Tensor, ""], Float[Tensor, "R V"], Float[Tensor, "R 1"] | float]


def _on_cpu(logits: Float[Tensor, "R V"], targets: Int[Tensor, " R"]) -> Differentiated:
    """Return the summed loss of some rows, and the gradient of their logits as a product of two factors.

    The first factor takes the place of the logits.
    """
    rows = max(1, CACHED // logits.shape[1])
    parts = [_differentiate(*part) for part in zip(logits.split(rows), targets.split(rows), strict=True)]
    losses, scales = zip(*parts, strict=True)
    return torch.stack(losses).sum(), logits, torch.cat(scales)


def _differentiate(
    logits: Float[Tensor, "R V"], targets: Int[Tensor, " R"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "R 1"]]:
    """Replace the logits by the first factor of their gradient. Return their summed loss and the second factor.

    With e = exp(logits - their maximum) and z = sum of e, the gradient of a row's logits is (e - z [target]) / z. The
    division by z is left to the D columns of the products, because there are fewer of them than logits.
    """
    target = targets[:, None]
    counts = target != IGNORED
    index = target.clamp(min=0)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, at_target = exact.amax(1, keepdim=True), exact.gather(1, index)
    e = exact.sub_(top).exp_()
    z = e.sum(1, keepdim=True)
    loss = (z.log() + top - at_target).masked_fill(~counts, 0.0).sum()
    logits.copy_(e.scatter_add_(1, index, -z))
    return loss, counts / z


def _on_gpu(logits: Float[Tensor, "R V"], targets: Int[Tensor, " R"]) -> Differentiated:
    """Return the same. The gradient takes the place of the logits, so that they are read twice and written once."""
    losses = _to_gradient(logits, targets)
    return losses.sum(), logits, 1.0


@fused(least=2**22)
def _to_gradient(logits: Float[Tensor, "R V"], targets: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Return the loss of each row, and replace its logits by their gradient."""
    target = targets[:, None]
    counts = target != IGNORED
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_z = exact.logsumexp(1, keepdim=True)
    losses = (log_z - exact.gather(1, target.clamp(min=0))).masked_fill(~counts, 0.0)[:, 0]
    expected = torch.arange(logits.shape[1], device=logits.device) == target
    gradient = ((exact - log_z).exp() - expected.to(exact.dtype)).masked_fill(~counts, 0.0)
    logits.copy_(gradient)
    return losses


def _add_product(total: Float[Tensor, "N M"], a: Float[Tensor, "N R"], b: Float[Tensor, "R M"]) -> None:
    """Add a b to `total`, which has a longer type than a and b if these are of 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
