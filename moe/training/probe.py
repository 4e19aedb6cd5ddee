"""Which experts a fixed set of validation tokens asks for."""

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from moe.data.blocks import Prepared, batch, evenly_spaced
from moe.model.decoder import MoEForCausalLM
from moe.routing.decision import Knobs, Routing

BLOCKS = 32


def probe_blocks(data: Prepared) -> np.ndarray:
    """Evenly spaced validation blocks, so that domains keep their shares: the same for every run on the same data."""
    return evenly_spaced(len(data.val), BLOCKS)


@torch.no_grad()
def choices(model: MoEForCausalLM, data: Prepared, *, temperature: float) -> Bool[Tensor, "L N E"] | None:
    """Which experts the N tokens of the probe blocks ask for in each MoE layer; None where experts take no tokens."""
    probes = batch(data.val, probe_blocks(data)).to(model.device)
    knobs = Knobs.of(temperature=temperature, device=model.device)
    training = model.training
    model.eval()
    parts = []
    for ids, _, _, positions in probes.split(4):
        routing = model(ids, position_ids=positions, knobs=knobs).routing
        if not routing or any(decision.slots is not None for layer in routing for decision in layer):
            break
        experts = model.config.num_experts
        parts.append(torch.stack([chosen(layer, tokens=ids.numel(), experts=experts) for layer in routing]))
    model.train(training)
    return torch.cat(parts, 1).cpu() if parts else None


def chosen(decisions: tuple[Routing, ...], *, tokens: int, experts: int) -> Bool[Tensor, "N E"]:
    """Which experts each token asks for, in any iteration of a chain."""
    mask = torch.zeros(tokens, experts, dtype=torch.bool, device=decisions[0].token.device)
    for decision in decisions:
        mask[decision.token, decision.expert] = True
    return mask
