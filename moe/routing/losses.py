"""Auxiliary losses of one layer, unweighted. The training loop logs them as they are and weights them in its total.

Each loss is a mean over the tokens of the micro-batch. A loss is left out if the router lacks what it is computed from,
for example probabilities. `moe.routing.loss_table` lists all losses with the keys that weight them and their papers.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moe.routing.decision import Routing, count


def load_balance(probs: Float[Tensor, "T E"], offered: Shaped[Tensor, "E"]) -> Float[Tensor, ""]:
    """Compute E * sum_e f_e P_e.

    f_e is the expert's share of all assignments, before drops. P_e is its mean probability. The loss is 1 when f or P
    is uniform, for every K and E, and E when one expert has everything. The gradient flows through P only. Unlike in
    the paper, f is divided by T*K, so that K may be larger than 1.
    """
    share = offered / offered.sum().clamp(min=1)  # some routers can leave every token without an expert
    return len(offered) * (share * probs.mean(0)).sum()


def load_balance_sequence(
    probs: Float[Tensor, "T E"],
    token: Int[Tensor, "A"],
    expert: Int[Tensor, "A"],
    seq_len: int,
    sequence: Int[Tensor, "T"] | None = None,
) -> Float[Tensor, ""]:
    """Compute the load-balance loss of each sequence by itself and average: 1 when every sequence is balanced.

    In the paper, the probabilities are sigmoid scores normalized over experts. A block with several conversations
    counts as one sequence, because a single conversation may be too short to be balanced.

    sequence: `Context.sequence`.
    """
    experts = probs.shape[1]
    if sequence is None:
        sequence_of_assignment, mean_probs = token // seq_len, probs.view(-1, seq_len, experts).mean(1)
    else:
        tokens = sequence.bincount()
        sequence_of_assignment = sequence[token]
        sums = probs.new_zeros(len(tokens), experts).index_add(0, sequence, probs)
        mean_probs = sums / tokens[:, None]
    offered = count(sequence_of_assignment * experts + expert, mean_probs.numel()).view_as(mean_probs)
    share = offered / offered.sum(1, keepdim=True).clamp(min=1)
    return experts * (share * mean_probs).sum(1).mean()


def router_entropy(probs: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Compute the mean entropy of the tokens in nats. A positive weight sharpens the router, up to collapse."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1).mean()


def gate_variance(probs: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Compute minus the variance over tokens of an expert's probability, summed over experts.

    A positive weight makes routing decisions differ between tokens.
    """
    return -(probs - probs.mean(0)).square().mean(0).sum()  # `var` over the first dimension takes ten times as long


def similarity_preserving(weight: Float[Tensor, "E D"]) -> Float[Tensor, ""]:
    """Compute the entrywise L1 norm of W W^T - I, which is 0 for orthonormal router rows W.

    With orthonormal rows similar tokens keep similar routing, and the load balances.
    """
    gram = weight @ weight.T
    return (gram - torch.eye(len(weight), device=weight.device)).abs().sum()


def output_orthogonality(rows: Float[Tensor, "R D"], token: Int[Tensor, "R"]) -> Float[Tensor, ""]:
    """Compute the mean squared cosine of the outputs that two experts give for the same token; 0 without any pair.

    rows: expert outputs before they are weighted.
    token: the token of each row.

    The paper sums projections. Those are vectors and shrink with the outputs. The squared cosine is the share of
    squared length that a projection keeps: 0 for orthogonal outputs and 1 for parallel ones. The function reads the
    largest number of experts per token back from the device.
    """
    order = torch.argsort(token, stable=True)
    token = token[order]
    rows = F.normalize(rows.float()[order], dim=-1)
    most_experts = int(token.bincount().amax()) if len(token) else 0
    total, pairs = rows.new_zeros(()), rows.new_zeros(())
    for distance in range(1, most_experts):
        same = token[distance:] == token[:-distance]
        cosine = (rows[distance:] * rows[:-distance]).sum(-1)
        total = total + (same * cosine.square()).sum()
        pairs = pairs + same.sum()
    return total / pairs.clamp(min=1)


def router_z(logits: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Compute the mean squared log-sum-exp of the clean logits, which keeps them small."""
    return torch.logsumexp(logits, -1).square().mean()


def auxiliary(
    routing: Routing,
    offered: Int[Tensor, "E"],
    *,
    seq_len: int,
    load: Shaped[Tensor, "E"] | None = None,
    sequence: Int[Tensor, "T"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Return every auxiliary loss that this routing has, by name.

    load: load of the earlier micro-batches of the optimizer step. `load_balance_global` adds it, so that the whole
        batch has to be balanced and single micro-batches may specialize.
    sequence: `Context.sequence`.
    """
    losses = dict(routing.aux)
    if routing.probs is not None:
        losses["load_balance"] = load_balance(routing.probs, offered)
        if routing.slots is None:
            by_sequence = load_balance_sequence(routing.probs, routing.token, routing.expert, seq_len, sequence)
            losses["load_balance_sequence"] = by_sequence
        losses["load_balance_global"] = load_balance(routing.probs, offered if load is None else offered + load)
        losses["router_entropy"] = router_entropy(routing.probs)
        losses["gate_variance"] = gate_variance(routing.probs)
    if routing.logits is not None:
        losses["router_z"] = router_z(routing.logits)
    return losses
