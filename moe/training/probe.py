"""Record which experts a fixed set of validation tokens is assigned to, and with which probabilities."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from moe.data.blocks import Prepared, batch, evenly_spaced
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Knobs, Routing

BLOCKS = 32
TOKENS = 4096  # most tokens on which routing is compared with that of the base


def probe_blocks(data: Prepared) -> np.ndarray:
    """Return the indices of at most `BLOCKS` validation blocks at equal distances.

    Blocks are sorted by domain, so the domains keep their shares. All runs on the same data have the same blocks.
    """
    return evenly_spaced(len(data.val), BLOCKS)


class Routes(NamedTuple):
    """How a model routes the N compared tokens, by MoE layer.

    chosen: which experts a token asks for. probs: the routers' distributions, C routers in a chain; None without any.
    Experts that a layer lacks are never chosen, and have the probability 0.
    """

    chosen: Bool[np.ndarray, "L N E"]
    probs: Float[np.ndarray, "L C N E"] | None


@torch.no_grad()
def assigned_experts(model: MoEForCausalLM, data: Prepared, *, temperature: float) -> Bool[Tensor, "L N E"] | None:
    """Return which experts each of the N tokens of the probe blocks asks for, in each MoE layer, before any drops.

    None if there is no MoE layer, or if experts process slots (Soft MoE) instead of tokens.
    """
    found = _decisions(model, data, temperature=temperature)
    return None if found is None else found[0]


@torch.no_grad()
def routes(model: MoEForCausalLM, data: Prepared, *, temperature: float) -> Routes | None:
    """Return how a model routes at most `TOKENS` tokens of the probe blocks, at equal distances.

    None as for `assigned_experts`. All ranks call this together, and each computes all of it.
    """
    found = _decisions(model, data, temperature=temperature)
    if found is None:
        return None
    chosen, probs = found
    distance = -(-chosen.shape[1] // TOKENS)
    return Routes(chosen[:, ::distance].numpy(), None if probs is None else probs[:, :, ::distance].numpy())


def _decisions(
    model: MoEForCausalLM, data: Prepared, *, temperature: float
) -> tuple[Bool[Tensor, "L N E"], Float[Tensor, "L C N E"] | None] | None:
    """Return choices and distributions of all tokens of the probe blocks, on the CPU, or None as `routes` does."""
    blocks = batch(data.val, probe_blocks(data)).to(model.device)
    knobs = Knobs.of(temperature=temperature, device=model.device)
    training = model.training
    model.eval()
    parts: list[Tensor] = []
    probs: list[Tensor] = []
    for part in blocks.split(4):
        routing = model(**part.inputs, knobs=knobs).routing
        if not routing or any(decision.slots is not None for layer in routing for decision in layer):
            break
        experts = model.config.most_experts
        masks = [assignment_mask(layer, tokens=part.ids.numel(), experts=experts) for layer in routing]
        parts.append(torch.stack(masks).cpu())
        known = [[decision.probs for decision in layer if decision.probs is not None] for layer in routing]
        if all(map(len, known)):
            widened = [[F.pad(each, (0, experts - each.shape[-1])) for each in layer] for layer in known]
            probs.append(torch.stack([torch.stack(layer) for layer in widened]).cpu())
    model.train(training)
    if not parts:
        return None
    return torch.cat(parts, 1), torch.cat(probs, 2) if probs else None


def assignment_mask(decisions: tuple[Routing, ...], *, tokens: int, experts: int) -> Bool[Tensor, "N E"]:
    """Return which experts each token asks for in any of the decisions (a chain of experts decides several times)."""
    mask = torch.zeros(tokens, experts, dtype=torch.bool, device=decisions[0].token.device)
    for decision in decisions:
        mask[decision.token, decision.expert] = True
    return mask
