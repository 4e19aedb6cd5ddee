"""Auxiliary losses of one layer, unweighted: the training loop weights them in one line and logs them as they are.

Each is a mean over the tokens of the micro-batch. A loss that a router cannot have (no probabilities) is left out.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moe.routing.decision import Routing, count


def load_balance(probs: Float[Tensor, "T E"], offered: Shaped[Tensor, "E"]) -> Float[Tensor, ""]:
    """E * sum_i f_i P_i: f the share of all A assignments (before drops), P the mean probability over all experts.

    1 when either is uniform, for every K and E; E when one expert has everything. Gradient flows through P only.
    Switch Transformer (2101.03961, eq. 4-6), with f normalized by T*K as in GShard-style top-k.
    """
    share = offered / offered.sum().clamp(min=1)  # a router may ask for nothing at all
    return len(offered) * (share * probs.mean(0)).sum()


def load_balance_sequence(
    probs: Float[Tensor, "T E"], token: Int[Tensor, "A"], expert: Int[Tensor, "A"], seq_len: int
) -> Float[Tensor, ""]:
    """The load-balance loss of each sequence by itself, averaged: 1 when every sequence is balanced (DeepSeek-V3
    2412.19437, eq. 17-20, where probabilities are sigmoid scores normalized over experts). Several
    conversations in one block are one sequence here: a single one may be too short to be balanced."""
    sequences, experts = len(probs) // seq_len, probs.shape[1]
    offered = count(token // seq_len * experts + expert, sequences * experts)
    offered = offered.view(sequences, experts)
    share = offered / offered.sum(1, keepdim=True).clamp(min=1)
    return experts * (share * probs.view(sequences, seq_len, experts).mean(1)).sum(1).mean()


def router_entropy(probs: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Mean token entropy in nats; a positive weight sharpens the router, and lets it collapse."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1).mean()


def gate_variance(probs: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Minus the variance over tokens of an expert's probability, summed over experts: a positive weight makes routing
    decisions differ between tokens (Guo et al. 2505.22323, L_v)."""
    return -(probs - probs.mean(0)).square().mean(0).sum()  # `var` over the first dimension takes ten times as long


def similarity_preserving(weight: Float[Tensor, "E D"]) -> Float[Tensor, ""]:
    """Entrywise L1 norm of W W^T - I: experts' router rows orthonormal, so that similar tokens keep similar routing and
    load balances (SimBal, Omi et al. 2506.14038)."""
    gram = weight @ weight.T
    return (gram - torch.eye(len(weight), device=weight.device)).abs().sum()


def output_orthogonality(rows: Float[Tensor, "R D"], token: Int[Tensor, "R"]) -> Float[Tensor, ""]:
    """Mean squared cosine of the outputs that two experts give for the same token, over all such pairs; 0 without any.

    rows: expert outputs before they are weighted; token: whose they are. Guo et al. (2505.22323, L_o) sum projections,
    which are vectors and shrink with the outputs; the squared cosine is the share of squared length that a projection
    keeps, 0 for orthogonal outputs and 1 for parallel ones. Reads the largest number of experts per token back from the
    device.
    """
    order = torch.argsort(token, stable=True)
    token = token[order]
    rows = F.normalize(rows.float()[order], dim=-1)
    most = int(token.bincount().amax()) if len(token) else 0
    total, pairs = rows.new_zeros(()), rows.new_zeros(())
    for apart in range(1, most):
        same = token[apart:] == token[:-apart]
        cosine = (rows[apart:] * rows[:-apart]).sum(-1)
        total = total + (same * cosine.square()).sum()
        pairs = pairs + same.sum()
    return total / pairs.clamp(min=1)


def router_z(logits: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Mean squared log-sum-exp of the clean logits: keeps them small (ST-MoE 2202.08906, eq. 5)."""
    return torch.logsumexp(logits, -1).square().mean()


def auxiliary(
    routing: Routing, offered: Int[Tensor, "E"], *, seq_len: int, load: Float[Tensor, "E"] | None = None
) -> dict[str, Float[Tensor, ""]]:
    """Every auxiliary loss that this routing has, by name.

    load: of earlier micro-batches of the optimizer step; `load_balance_global` counts it in, so that balance is asked
    of the whole batch and single micro-batches may specialize (Qiu et al. 2501.11873).
    """
    losses = dict(routing.aux)
    if routing.probs is not None:
        losses["load_balance"] = load_balance(routing.probs, offered)
        if routing.slots is None:
            by_sequence = load_balance_sequence(routing.probs, routing.token, routing.expert, seq_len)
            losses["load_balance_sequence"] = by_sequence
        losses["load_balance_global"] = load_balance(routing.probs, offered if load is None else offered + load)
        losses["router_entropy"] = router_entropy(routing.probs)
        losses["gate_variance"] = gate_variance(routing.probs)
    if routing.logits is not None:
        losses["router_z"] = router_z(routing.logits)
    return losses
