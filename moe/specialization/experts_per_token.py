"""Measure the loss of a finished model when its tokens get fewer or more experts than in training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
from jaxtyping import Int
from torch import nn

from moe.analysis.bootstrap import bootstrap
from moe.checks import ConfigError
from moe.data.blocks import Batch
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.layer import MoELayer
from moe.model.routed import build_router
from moe.routers.imported import Imported
from moe.routing.decision import Knobs
from moe.specialization.observation import next_token_nats

MOST = 9  # numbers of experts per token that are tried


def loss_by_k(
    model: MoEForCausalLM, blocks: Batch, knobs: Knobs, *, document: Int[np.ndarray, "B"]
) -> list[dict[str, Any]]:
    """Return the loss (nats per token) for several numbers k of experts per token, with its interval over documents.

    All MoE layers have the same k, and the weights of the router follow from its own rule. difference: from the loss
    with the k of the model, paired by block. Empty for a router whose number of experts per token is no setting `k`.
    """
    router = model.moe_layers[0].router
    if router.fixed_k is None or "k" not in (model.config.router or {}):
        return []
    own = next_token_nats(model, blocks, knobs).cpu().numpy()
    found = []
    for k in numbers(router.fixed_k, router.num_experts):
        try:
            with _experts_per_token(model, k):
                nats = next_token_nats(model, blocks, knobs).cpu().numpy()
        except ConfigError:  # its other settings do not allow this k
            continue
        mean, difference = np.nanmean(nats, axis=1), np.nanmean(nats - own, axis=1)
        found.append({"k": k, "loss": bootstrap(mean, document), "difference": bootstrap(difference, document)})
    return found


def numbers(own: int, most: int) -> list[int]:
    """Return the numbers k to try: powers of two, all experts, and the model's own k with its neighbors."""
    powers = [2**power for power in range(most.bit_length())]
    near = [k for k in (own - 1, own, own + 1) if 1 <= k <= most]
    tried = sorted({*(k for k in powers if k <= most), most, *near})
    far = sorted((k for k in tried if k not in near), key=lambda k: abs(np.log2(k / own)))
    return sorted({*near, *far[: MOST - len(near)]})


@contextmanager
def _experts_per_token(model: MoEForCausalLM, k: int) -> Iterator[None]:
    """Give each token k experts inside the `with` block. Raises ConfigError if the router's settings forbid it."""
    with ExitStack() as stack:
        for layer in model.moe_layers:
            if isinstance(layer.router, Imported):
                continue
            stack.enter_context(_other_router(model, layer, k))
        for block in model.model.deciding_blocks:
            stack.enter_context(_other_number(block, k))
        yield


@contextmanager
def _other_router(model: MoEForCausalLM, layer: MoELayer, k: int) -> Iterator[None]:
    """Replace a router by one with the same weights and another k."""
    before, config = layer.router, cast(MoEConfig, model.config)
    spec = config.router
    config.router = {**(spec or {}), "k": k}
    try:
        other = build_router(config, trusted=True).to(next(model.parameters()).device).eval()
    finally:
        config.router = spec
    weights, shapes = before.state_dict(), {name: tensor.shape for name, tensor in other.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != shapes:
        raise ConfigError(f"router.k={k}: this router has other weights for another k")
    other.load_state_dict(weights)
    layer.router = other
    try:
        yield
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
