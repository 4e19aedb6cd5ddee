"""Optimizers and the learning-rate curve.

Muon updates matrices, each expert's separately; AdamW updates embeddings and vectors. Routers say which of their
parameters are which.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moe.config.schema import Config
from moe.config.sections import OptimizerConfig
from moe.distributed.sharding import full_tensors, local_part, shard_like
from moe.model.parts import parts
from moe.routers.base import Role, Router
from moe.training.process import full_precision

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients (Jordan 2024)
CACHED = 2**20  # bytes of matrices that a CPU updates at a time, so that they stay in its cache from product to product


def orthogonalize(gradients: Float[Tensor, "N rows cols"], *, steps: int = 5) -> Float[Tensor, "N rows cols"]:
    """Return the N matrices with singular values moved towards 1, to between about 0.7 and 1.2.

    Uses the quintic Newton-Schulz iteration (Jordan 2024). A GPU iterates all N matrices in one batch, in bf16. A CPU
    iterates as many at a time as its cache holds, in fp32: most CPUs emulate bf16 products, which takes 80 times as
    long.
    """
    if gradients.is_cuda:
        return _orthogonalize(gradients.to(torch.bfloat16, copy=True), steps)
    parts = gradients.split(_number_in_cache(gradients.shape[-2:]))
    with full_precision():  # errors in the Gram matrices grow twelvefold per step
        return _concatenated([_orthogonalize(part.to(torch.float32), steps) for part in parts])


def _orthogonalize(x: Float[Tensor, "N rows cols"], steps: int) -> Float[Tensor, "N rows cols"]:
    rows, cols = x.shape[-2:]
    if x.dtype == torch.float32 and 2 * max(rows, cols) >= 3 * min(rows, cols):
        return _iterate_gram(x, steps)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    return _iterate(x.mT, steps).mT if rows > cols else _iterate(x, steps)


def _iterate(x: Float[Tensor, "N rows cols"], steps: int) -> Float[Tensor, "N rows cols"]:
    """Carry out `steps` iterations x <- (a I + b G + c G^2) x with G = x x^T."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: Float[Tensor, "N rows cols"], steps: int) -> Float[Tensor, "N rows cols"]:
    """Divide x by its norm and iterate it, but iterate its Gram matrix G, of the shorter side, and multiply x once.

    This works because the result is Q x (or x Q), where Q is a polynomial of G. Five steps take 17 products of rows^3
    and 2 of rows^2 cols, instead of 5 and 10. That is less work if cols >= 1.5 rows: 0.84 of the FLOPs at cols = 2
    rows, 0.56 at cols = 4 rows. Rounding errors in the Gram matrix grow by a factor of twelve in each step, which
    rules out bf16. What is iterated is sqrt(c) G, because the factor of a step then needs only its square, see
    `_factor`. The squared norm of x is the trace of its Gram matrix.
    """
    tall = x.shape[-2] > x.shape[-1]
    gram = x.mT @ x if tall else x @ x.mT
    squared_norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=1e-14)
    gram *= math.sqrt(NEWTON_SCHULZ[2]) / squared_norm
    product = factor = _factor(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    product *= squared_norm.rsqrt()
    return x @ product.mT if tall else product @ x  # in this order rounding errors stay small


def _factor(gram: Float[Tensor, "N rows rows"]) -> Float[Tensor, "N rows rows"]:
    """Return the factor of one step, a I + b G + c G^2, from `gram` = sqrt(c) G.

    It is (sqrt(c) G + shift I)^2 + rest I: the square is complete, so b G takes no pass over the matrices.
    """
    a, b, c = NEWTON_SCHULZ
    shift, rest = b / (2 * math.sqrt(c)), a - b**2 / (4 * c)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    before = diagonal.clone()
    diagonal.add_(shift)
    factor = gram @ gram
    diagonal.copy_(before)
    factor.diagonal(dim1=-2, dim2=-1).add_(rest)
    return factor


class Muon(torch.optim.Optimizer):
    """Optimizer that steps along the momentum, orthogonalized by Newton-Schulz iteration (Jordan 2024).

    Takes matrices (rows, cols) and stacks of experts (E, rows, cols); raises ValueError for other shapes. Each expert
    of a stack gets its own update: flattening the stack to 2-D, as other implementations do, would mix the experts.
    Matrices of equal shape are orthogonalized in one batch. The step size is lr * sqrt(max(1, rows/cols)). Weight
    decay is decoupled.

    An expert of a stack whose gradient is exactly 0 has seen no token in this step. It is left alone: no step, no
    weight decay, and its momentum stays. Without this rule it would go on at full speed along its old momentum, because
    the length of an orthogonalized step does not depend on the size of the gradient.

    expert_step: how far the other experts of a stack move.
        equal: all by the same length, however few tokens they have seen.
        gradient: by min(1, n_e / n) of that length. n_e is the norm of the expert's momentum, n the mean over the
            experts of the stack that have seen a token in this step. The momentum adds up over tokens, so an expert
            with few tokens moves less.
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
        expert_step: str = "equal",
    ) -> None:
        settings: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        settings["expert_step"] = expert_step
        super().__init__(params, {**settings, "ns_steps": ns_steps})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim not in (2, 3):
                    raise ValueError(f"Muon: parameters must have 2 or 3 dimensions, not shape {tuple(p.shape)}")
        self._rates = [torch.zeros((), device=group["params"][0].device) for group in self.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "closures are not supported"
        self.read_rates()
        self.update()
        return None

    def read_rates(self) -> None:
        """Copy the learning rates to the device, where `update` reads them."""
        for rate, group in zip(self._rates, self.param_groups, strict=True):
            rate.fill_(group["lr"])

    @torch.no_grad()
    def update(self) -> None:
        """Take the step, with the rates that were read last."""
        for rate, group in zip(self._rates, self.param_groups, strict=True):
            for params in _batches(p for p in group["params"] if p.grad is not None):
                self._update(params, group, rate)

    @property
    def recordable(self) -> bool:
        """Whether `update` starts the same kernels in each step. The factor of a weight decay follows the rate."""
        return not any(group["weight_decay"] for group in self.param_groups)

    def places(self) -> tuple[int, ...]:
        """Return the addresses of all tensors that `update` reads or changes."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        tensors = [tensor for p in params for tensor in (p, p.grad, *self.state[p].values())]
        return tuple(tensor.data_ptr() for tensor in tensors)

    def _update(self, params: list[nn.Parameter], group: dict[str, Any], rate: Float[Tensor, ""]) -> None:
        """Update parameters of equal shape together, so that a GPU starts few kernels."""
        rows, cols = params[0].shape[-2:]
        stacked = params[0].ndim == 3
        weights = [local_part(p) for p in params]
        if stacked:
            directions, active = self._stack_directions(params, group)
        else:
            directions = self._matrix_directions(params, group)
        updates = orthogonalize(directions, steps=group["ns_steps"])
        length, decay = -math.sqrt(max(1, rows / cols)), group["lr"] * group["weight_decay"]
        share: Tensor | float = 1.0
        if stacked:
            share = active * _relative_norms(params, directions, active, group["expert_step"])
        if decay:
            kept = list((1 - decay * active).chunk(len(params))) if stacked else [1 - decay] * len(params)
            torch._foreach_mul_(weights, kept)
        if updates.is_cuda:
            updates, length = updates * (length * rate * share).view(-1, 1, 1), 1.0
        else:
            updates, length = updates * share if stacked else updates, length * group["lr"]
        steps: Sequence[Tensor] = updates.to(weights[0].dtype).chunk(len(params))
        if not stacked:
            steps = [local_part(shard_like(step[0], p)) for step, p in zip(steps, params, strict=True)]
        torch._foreach_add_(weights, list(steps), alpha=length)

    def _matrix_directions(self, params: list[nn.Parameter], group: dict[str, Any]) -> Float[Tensor, "N rows cols"]:
        """Update the momenta of matrices, and return the directions to orthogonalize. The ranks put each together."""
        gradients, momenta = _gradients(params), self._momenta(params)
        torch._foreach_lerp_(
            [local_part(momentum) for momentum in momenta],
            [local_part(gradient) for gradient in gradients],
            1 - group["momentum"],
        )
        if not group["nesterov"]:
            return torch.stack([full_tensors(momentum) for momentum in momenta])
        if not isinstance(params[0], DTensor):
            return torch.stack(gradients).lerp_(torch.stack(momenta), group["momentum"])
        ahead = [g.lerp(m, group["momentum"]) for g, m in zip(gradients, momenta, strict=True)]
        return torch.stack([full_tensors(direction) for direction in ahead])

    def _stack_directions(
        self, params: list[nn.Parameter], group: dict[str, Any]
    ) -> tuple[Float[Tensor, "N rows cols"], Bool[Tensor, "N 1 1"]]:
        """Update the momenta of stacks of experts. Return the directions of all their matrices, and which move.

        These are the matrices whose gradient is not exactly 0. A rank's part of a stack consists of complete matrices.
        """
        gradients = _concatenated([local_part(gradient) for gradient in _gradients(params)])
        momenta = [local_part(momentum) for momentum in self._momenta(params)]
        active = gradients.abs().flatten(1).amax(1)[:, None, None] != 0  # the maximum norm takes ten times as long
        after = _concatenated(momenta).lerp(gradients, (1 - group["momentum"]) * active.to(gradients.dtype))
        torch._foreach_copy_(momenta, after.chunk(len(params)))
        return (gradients.lerp(after, group["momentum"]) if group["nesterov"] else after), active

    def _momenta(self, params: list[nn.Parameter]) -> list[Tensor]:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        return [self.state[p]["momentum"] for p in params]


def _batches(params: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield lists of parameters to update together, of equal shape. On a CPU, as many as its cache holds."""
    by_shape: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
    for p in params:
        by_shape[(*p.shape, p.device)].append(p)
    for same in by_shape.values():
        number = len(same) if same[0].is_cuda else _number_in_cache(same[0].shape)
        yield from (same[start : start + number] for start in range(0, len(same), number))


def _number_in_cache(shape: Sequence[int]) -> int:
    return max(1, CACHED // (4 * max(1, math.prod(shape))))


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors one after another, or a single tensor itself, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _gradients(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _relative_norms(
    stacks: list[nn.Parameter],
    directions: Float[Tensor, "N rows cols"],
    active: Bool[Tensor, "N 1 1"],
    expert_step: str,
) -> Float[Tensor, "N 1 1"] | float:
    """Return the share of the full step that each matrix of this rank's part of some stacks moves, see `Muon`."""
    if expert_step == "equal":
        return 1.0
    moving = active.view(len(stacks), -1)
    norms = directions.norm(dim=(-2, -1)).view_as(moving) * moving
    sums = torch.stack([norms.sum(1), moving.sum(1)])
    if isinstance(stacks[0], DTensor):  # the ranks hold different experts of a stack
        dist.all_reduce(sums, group=stacks[0].device_mesh.get_group())
    total, number = sums[0].clamp(min=torch.finfo(norms.dtype).tiny), sums[1]
    return (norms * number[:, None] / total[:, None]).clamp(max=1.0).view(-1, 1, 1)


def build_optimizers(model: nn.Module, settings: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers of all trainable parameters: AdamW, and Muon in front of it unless `muon_lr` is None.

    Muon updates matrices, without weight decay: those of attention and experts, and those of a router that the router
    does not declare otherwise (`Router.role`). With `router_lr`, AdamW updates all parameters of routers instead. AdamW
    updates the token embedding, the output layer, the gains of norms
    and the rest of the routers, or everything if `muon_lr` is None. It applies weight decay to all of them except to
    parameters that a router declares, or by default treats, as a scale. In AdamW, routers and experts are separate
    parameter groups, which may have their own learning rates. Without a matrix that trains there is no Muon.
    """
    role = roles(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    part = {p: name for name, params in parts(model).items() for p in params}
    rates = {"router": settings.router_lr, "experts": settings.experts_lr}

    def is_muons(p: nn.Parameter) -> bool:
        apart = settings.router_lr is not None and part.get(p) == "router"
        return settings.muon_lr is not None and role[p] == "matrix" and not apart

    matrices = [p for p in trainable if is_muons(p)]
    by_group: dict[tuple[str, bool], list[nn.Parameter]] = {("", True): [], ("router", True): [], ("experts", True): []}
    for p in trainable:
        if not is_muons(p):
            by_group.setdefault((part.get(p, ""), role[p] != "scale"), []).append(p)
    groups: list[dict[str, Any]] = [
        {
            "params": params,
            "lr": rates.get(name) or settings.adamw_lr,
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for (name, decayed), params in by_group.items()
    ]
    betas = (settings.beta1, settings.beta2)
    adamw = torch.optim.AdamW(groups, betas=betas, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if settings.muon_lr is not None and matrices:
        optimizers.insert(
            0, Muon(matrices, lr=settings.muon_lr, momentum=settings.momentum, expert_step=settings.expert_step)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # the peak of the learning-rate curve
    return optimizers


def roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """Return the role of every parameter: routers declare those of their own, modules decide all others.

    Of those, the weights of `nn.Embedding`, the output layer and the gains of norms are "other", and all matrices and
    stacks of matrices "matrix".
    """
    found: dict[nn.Parameter, Role] = {p: "matrix" if p.ndim >= 2 else "other" for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, Router):
            found |= {p: module.role(name, p) for name, p in module.named_parameters()}
        elif isinstance(module, nn.Embedding):
            found |= dict.fromkeys(module.parameters(), "other")
    adapter = getattr(model, "adapter", None)
    if adapter is not None:
        inside = {p for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
        new: Any = model.adapter_names
        named = {name: p for name, p in model.named_parameters() if name in new and p not in inside}
        found |= {p: adapter.role(name, p) for name, p in named.items()}
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]  # one inside of another
    for output in (module.get_output_embeddings() for module in models):
        if output is not None:
            found |= dict.fromkeys(output.parameters(), "other")
    return found


def learning_rate_scale(step: int, *, steps: int, warmup: float, floor: float) -> float:
    """Return the learning rate at optimizer step `step` (0-based) as a fraction of its peak.

    It rises linearly over the first `warmup` fraction of the steps, then falls as half a cosine to `floor` at the last
    step.
    """
    warmup_steps = math.ceil(warmup * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def scale_learning_rates(config: Config, optimizers: list[torch.optim.Optimizer], *, step: int) -> None:
    """Set the learning rate of every parameter group to its value at optimizer step `step`."""
    curve = config.optimizer
    scale = learning_rate_scale(step, steps=config.steps, warmup=curve.warmup, floor=curve.floor)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group["initial_lr"]


def learning_rate(optimizers: list[torch.optim.Optimizer]) -> float:
    """Return the present learning rate of the first parameter group. The event log contains only this one."""
    return optimizers[0].param_groups[0]["lr"]
