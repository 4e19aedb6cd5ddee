"""Record which experts a fixed set of validation tokens is assigned to."""

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from moe.data.blocks import Prepared, batch, evenly_spaced
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Knobs, Routing

BLOCKS = 32


def probe_blocks(data: Prepared) -> np.ndarray:
    """Return the indices of at most `BLOCKS` validation blocks at equal distances.

    Blocks are sorted by domain, so the domains keep their shares. All runs on the same data have the same blocks.
    """
    return evenly_spaced(len(data.val), BLOCKS)


@torch.no_grad()
def assigned_experts(model: MoEForCausalLM, data: Prepared, *, temperature: float) -> Bool[Tensor, "L N E"] | None:
    """Return which experts each of the N tokens of the probe blocks asks for, in each MoE layer, before any drops.

    None if there is no MoE layer, or if experts process slots (Soft MoE) instead of tokens.
    """
    blocks = batch(data.val, probe_blocks(data)).to(model.device)
    knobs = Knobs.of(temperature=temperature, device=model.device)
    training = model.training
    model.eval()
    parts = []
    for ids, _, _, positions in blocks.split(4):
        routing = model(ids, position_ids=positions, knobs=knobs).routing
        if not routing or any(decision.slots is not None for layer in routing for decision in layer):
            break
        experts = model.config.num_experts
        parts.append(torch.stack([assignment_mask(layer, tokens=ids.numel(), experts=experts) for layer in routing]))
    model.train(training)
    return torch.cat(parts, 1).cpu() if parts else None


def assignment_mask(decisions: tuple[Routing, ...], *, tokens: int, experts: int) -> Bool[Tensor, "N E"]:
    """Return which experts each token asks for in any of the decisions (a chain of experts decides several times)."""
    mask = torch.zeros(tokens, experts, dtype=torch.bool, device=decisions[0].token.device)
    for decision in decisions:
        mask[decision.token, decision.expert] = True
    return mask
