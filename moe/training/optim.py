"""Optimizers: Muon, one update per expert, for matrices; AdamW for embeddings and vectors; the learning-rate curve."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.config.schema import OptimizerConfig
from moe.distributed.sharding import full, local, shard_like
from moe.model.parts import parts

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients (Jordan 2024)


def orthogonalize(gradients: Float[Tensor, "N rows cols"], *, steps: int = 5) -> Float[Tensor, "N rows cols"]:
    """Push the singular values of each of N matrices towards 1 (into about 0.7 ... 1.2).

    Quintic Newton-Schulz iteration, batched: one sequence of matrix products for all matrices of a shape. In bf16 on a
    GPU; in fp32 on a CPU, where bf16 products are emulated, 80 times slower, unless the processor has them.
    """
    x = gradients.to(torch.bfloat16 if gradients.is_cuda else torch.float32, copy=True)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    rows, cols = x.shape[-2:]
    iterate = _iterate_gram if x.dtype == torch.float32 and 2 * cols >= 3 * rows else _iterate
    x = iterate(x, steps)
    return x.mT if tall else x


def _iterate(x: Float[Tensor, "N rows cols"], steps: int) -> Float[Tensor, "N rows cols"]:
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: Float[Tensor, "N rows cols"], steps: int) -> Float[Tensor, "N rows cols"]:
    """The same as one product Q x at the end: Q is a polynomial of the Gram matrix, which is iterated instead of x.

    Five steps are 17 products of rows^3 and 2 of rows^2 cols instead of 5 and 10: less from cols = 1.5 rows on, 0.84 of
    the FLOPs at 2 rows, 0.56 at 4. Rounding errors in the Gram matrix grow twelvefold a step: not for bf16.
    """
    gram = x @ x.mT
    product = factor = _factor(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product @ x


def _factor(gram: Float[Tensor, "N rows rows"]) -> Float[Tensor, "N rows rows"]:
    """What a step multiplies x by: a I + b G + c G^2."""
    a, b, c = NEWTON_SCHULZ
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz (Jordan 2024), for parameters (rows, cols) and stacks (E, rows, cols).

    A stack gets E separate updates: flattening it, as 2-D implementations do, would mix its experts. Parameters of
    equal matrix shape are updated in one batch. Step size is lr * sqrt(max(1, rows/cols)); decay is decoupled.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "ns_steps": ns_steps})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim not in (2, 3):
                    raise ValueError(f"Muon takes matrices and stacks of matrices, not shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            by_shape: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[(*p.shape[-2:], p.device)].append(p)
            for params in by_shape.values():
                self._update(params, group)
        return None

    def _update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        directions = [self._direction(p, group) for p in params]
        rows, cols = params[0].shape[-2:]
        updates = orthogonalize(torch.cat(directions), steps=group["ns_steps"]).split([len(d) for d in directions])
        for p, update in zip(params, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            if p.ndim == 2:
                update = local(shard_like(update.view(p.shape), p))
            ours = local(p)
            ours.add_(update.view_as(ours).to(p.dtype), alpha=-group["lr"] * math.sqrt(max(1, rows / cols)))

    def _direction(self, p: nn.Parameter, group: dict[str, Any]) -> Float[Tensor, "N rows cols"]:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        direction = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        direction = local(direction) if p.ndim == 3 else full(direction)  # a rank's part of a stack is whole matrices
        return direction.reshape(-1, *p.shape[-2:])


def build_optimizers(model: nn.Module, settings: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon for every matrix but the embeddings (attention, experts, router), AdamW for the rest; AdamW for all if
    `muon_lr` is None, in groups of their own for routers and experts, which may have their own rates. Weight decay
    applies to AdamW's matrices and vectors alike, and not to Muon's. What is frozen is in neither."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = settings.muon_lr is not None and p.ndim >= 2 and "embed" not in name and "lm_head" not in name
            (matrices if matrix else others).append(p)
    rates = {"router": settings.router_lr, "experts": settings.experts_lr}
    rest = dict.fromkeys(others)
    own = {name: [p for p in params if p in rest] for name, params in parts(model).items()}
    taken = {p for params in own.values() for p in params}
    groups: list[dict[str, Any]] = [{"params": [p for p in rest if p not in taken]}]
    groups += [{"params": params, "lr": rates[name] or settings.adamw_lr} for name, params in own.items()]
    betas = (settings.beta1, settings.beta2)
    adamw = torch.optim.AdamW(groups, lr=settings.adamw_lr, betas=betas, weight_decay=settings.weight_decay, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if settings.muon_lr is not None:
        optimizers.insert(0, Muon(matrices, lr=settings.muon_lr, momentum=settings.momentum))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # the peak, which a checkpoint keeps with the rest of the group
    return optimizers


def learning_rate_scale(step: int, *, steps: int, warmup: float, floor: float) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based): linear warm-up over the first `warmup`
    fraction of steps, then a half cosine down to `floor` at the last step."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, steps - 1 - rising)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
