"""Measure the loss of a finished model when its tokens get fewer or more experts than in training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe.analysis.bootstrap import bootstrap
from moe.checks import ConfigError
from moe.data.blocks import Batch
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.layer import MoELayer
from moe.model.routed import build_router
from moe.routers.base import Router
from moe.routers.imported import Imported
from moe.routing.decision import Knobs, Routing
from moe.specialization.observation import experts_of_layers, next_token_nats
from moe.training.progress import counted

MOST = 9  # numbers of experts per token that are tried


def loss_by_k(
    model: MoEForCausalLM, blocks: Batch, knobs: Knobs, *, document: Int[np.ndarray, " B"]
) -> list[dict[str, Any]]:
    """Return the loss (nats per token) for several numbers k of experts per token, with its interval over documents.

    All MoE layers have the same k, at most the experts of the layer with the fewest. The weights of the router follow
    from its own rule, with one exception: if the weights of each token have the same sum with the k of the model, a
    single expert gets that sum as its weight. Our routers use a probability there, which a router needs in training.
    difference: from the loss with the k of the model, paired by block. Empty for a router without a setting `k`, with
    `model.routers`, and if another k changes nothing in evaluation.
    """
    router, settings = model.moe_layers[0].router, model.config.router or {}
    if "k" not in settings or model.config.router_layers:
        return []
    of_model = router.fixed_k or settings["k"]
    sums: dict[MoELayer, list[Tensor]] = {layer: [] for layer in model.moe_layers}
    with ExitStack() as stack:
        for layer, found_sums in sums.items():
            stack.callback(layer.router.register_forward_hook(partial(_keep_sums, found_sums)).remove)
        own = next_token_nats(model, blocks, knobs).cpu().numpy()
    constants = {layer: _constant(torch.cat(each)) for layer, each in sums.items() if each}
    found, acts = [], False
    for k in counted(numbers(of_model, min(experts_of_layers(model))), "numbers of experts per token:"):
        try:
            with _experts_per_token(model, k, constants):
                nats = next_token_nats(model, blocks, knobs).cpu().numpy()
        except ConfigError:  # its other settings do not allow this k
            continue
        mean, difference = np.nanmean(nats, axis=1), np.nanmean(nats - own, axis=1)
        acts |= bool(np.any(difference))
        found.append({"k": k, "loss": bootstrap(mean, document), "difference": bootstrap(difference, document)})
    return found if acts or len(found) == 1 else []


def numbers(own: int, most: int) -> list[int]:
    """Return the numbers k to try: powers of two, all experts, and the model's own k with its neighbors."""
    powers = [2**power for power in range(most.bit_length())]
    near = [k for k in (own - 1, own, own + 1) if 1 <= k <= most]
    tried = sorted({*(k for k in powers if k <= most), most, *near})
    far = sorted((k for k in tried if k not in near), key=lambda k: abs(np.log2(k / own)))
    return sorted({*near, *far[: MOST - len(near)]})


@contextmanager
def _experts_per_token(model: MoEForCausalLM, k: int, sums: dict[MoELayer, float | None]) -> Iterator[None]:
    """Give each token k experts inside the `with` block. Raises ConfigError if the router's settings forbid it.

    sums: of the weights of a token in each layer, None if tokens differ.
    """
    with ExitStack() as stack:
        for number, layer in enumerate(model.moe_layers):
            if isinstance(layer.router, Imported):
                continue
            other = stack.enter_context(_other_router(model, number, k))
            if k == 1 and (total := sums.get(layer)) is not None:
                other.register_forward_hook(partial(_with_weight, total))
        for block in model.model.deciding_blocks:
            stack.enter_context(_other_number(block, k))
        yield


def _keep_sums(sums: list[Tensor], router: Router, inputs: Any, routing: Routing) -> None:
    """Add the sum of the weights of each token to `sums`. A forward hook of a router."""
    tokens = len(inputs[0])
    sums.append(routing.weight.new_zeros(tokens).index_add(0, routing.token, routing.weight))


def _with_weight(weight: float, router: Router, inputs: Any, routing: Routing) -> Routing:
    """Return a routing with the same weight for all assignments. A forward hook of a router."""
    return routing._replace(weight=torch.full_like(routing.weight, weight), log_weight=None)


def _constant(values: Float[Tensor, " N"]) -> float | None:
    """Return the number that all values are, up to rounding, or None."""
    mean = values.mean()
    return mean.item() if torch.allclose(values, mean, rtol=1e-4) else None


@contextmanager
def _other_router(model: MoEForCausalLM, number: int, k: int) -> Iterator[Router]:
    """Replace the router of an MoE layer by one with the same weights and another k, and yield it."""
    layer, config = model.moe_layers[number], cast(MoEConfig, model.config)
    before = layer.router
    spec = config.router
    config.router = {**(spec or {}), "k": k}
    try:
        other = build_router(config, config.first_k_dense_replace + number, trusted=True)
        other = other.to(next(model.parameters()).device).eval()
    finally:
        config.router = spec
    weights, shapes = before.state_dict(), {name: tensor.shape for name, tensor in other.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != shapes:
        raise ConfigError(f"router.k={k}: this router has other weights for another k")
    other.load_state_dict(weights)
    layer.router = other
    try:
        yield other
    finally:
        layer.router = before


@contextmanager
def _other_number(block: nn.Module, k: int) -> Iterator[None]:
    """Change the number of experts per token in the code of an imported block, whose router decides by itself."""
    names = ("top_k", "num_experts_per_tok")
    holders = [(part, name) for part in block.modules() for name in names if name in vars(part)]
    if not holders:
        raise ConfigError(f"{type(block).__name__}: has no number of experts per token that can be changed")
    before = [getattr(part, name) for part, name in holders]
    for part, name in holders:
        setattr(part, name, k)
    try:
        yield
    finally:
        for (part, name), value in zip(holders, before, strict=True):
            setattr(part, name, value)
