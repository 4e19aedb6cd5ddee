"""Auxiliary losses of one layer, unweighted: the training loop weights them in one line and logs them as they are.

Each is a mean over the tokens of the micro-batch. A loss that a router cannot have (no probabilities) is left out.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.routing import Routing


def load_balance(probs: Float[Tensor, "T E"], offered: Int[Tensor, "E"]) -> Float[Tensor, ""]:
    """E * sum_i f_i P_i: f the share of all A assignments (before drops), P the mean probability over all experts.

    1 when either is uniform, for every K and E; E when one expert has everything. Gradient flows through P only.
    Switch Transformer (2101.03961, eq. 4-6), with f normalised by T*K as in GShard-style top-k.
    """
    share = offered / offered.sum().clamp(min=1)  # a router may ask for nothing at all
    return len(offered) * (share * probs.mean(0)).sum()


def router_z(logits: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Mean squared log-sum-exp of the clean logits: keeps them small (ST-MoE 2202.08906, eq. 5)."""
    return torch.logsumexp(logits, -1).square().mean()


def auxiliary(routing: Routing, offered: Int[Tensor, "E"]) -> dict[str, Float[Tensor, ""]]:
    """Every auxiliary loss that this routing has, by name."""
    losses = dict(routing.aux)
    if routing.probs is not None:
        losses["load_balance"] = load_balance(routing.probs, offered)
    if routing.logits is not None:
        losses["router_z"] = router_z(routing.logits)
    return losses
