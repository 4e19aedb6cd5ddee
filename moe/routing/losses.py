"""Auxiliary losses of one layer, unweighted. The training loop logs them as they are and weights them in its total.

Each loss is a mean over the tokens of the micro-batch. A loss is left out if the router lacks what it is computed from,
for example probabilities. `moe.routing.loss_table` lists all losses with the keys that weight them and their papers.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moe.fused import fused
from moe.routing.decision import Routing, count
from moe.routing.dispatch import sum_by_group


def load_balance(probs: Float[Tensor, "T E"], offered: Shaped[Tensor, " E"]) -> Float[Tensor, ""]:
    """Compute E * sum_e f_e P_e.

    f_e is the expert's share of all assignments, before drops. P_e is its mean probability. The loss is 1 when f or P
    is uniform, for every K and E, and E when one expert has everything. The gradient flows through P only. Unlike in
    the paper, f is divided by T*K, so that K may be larger than 1.
    """
    share = offered / offered.sum().clamp(min=1)  # some routers can leave every token without an expert
    return len(offered) * (share * probs.mean(0)).sum()


def load_balance_sequence(
    probs: Float[Tensor, "T E"], token: Int[Tensor, " A"], expert: Int[Tensor, " A"], seq_len: int
) -> Float[Tensor, ""]:
    """Compute the load-balance loss of each sequence by itself and average: 1 when every sequence is balanced.

    In the paper, the probabilities are sigmoid scores normalized over experts. A block with several conversations
    counts as one sequence, because a single conversation may be too short to be balanced.
    """
    experts = probs.shape[1]
    mean_probs = probs.view(-1, seq_len, experts).mean(1)
    offered = count(token // seq_len * experts + expert, mean_probs.numel()).view_as(mean_probs)
    share = offered / offered.sum(1, keepdim=True).clamp(min=1)
    return experts * (share * mean_probs).sum(1).mean()


def load_balance_group(
    probs: Float[Tensor, "T E"],
    token: Int[Tensor, " A"],
    expert: Int[Tensor, " A"],
    group: Int[Tensor, " T"],
    *,
    by_token: bool,
) -> Float[Tensor, ""]:
    """Compute the load-balance loss of each group of tokens by itself and average over groups.

    group: the group of each token, such as its document: ascending numbers below T.
    by_token: whether a group weighs as much as it has tokens. Otherwise all groups weigh the same.
    """
    groups, experts = probs.shape
    sizes = count(group, groups)
    offered = count(group[token] * experts + expert, probs.numel()).view_as(probs)
    share = offered / offered.sum(1, keepdim=True).clamp(min=1)
    losses = experts * (share * sum_by_group(probs, group)).sum(1) / sizes.clamp(min=1)
    weights = sizes if by_token else sizes.sign()
    return (weights * losses).sum() / weights.sum()


def importance_cv(probs: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Compute the squared coefficient of variation of the experts' summed probabilities: E * sum_e P_e^2 - 1.

    P_e is the mean probability. The loss is 0 if all P_e are equal and E - 1 if one expert has everything. A CV^2 of
    the load with straight-through counts is no loss of its own: E * sum_e f_e^2 - 1 would have the gradient 2 E f_e on
    P_e, twice that of the load-balance loss.
    """
    return probs.shape[1] * probs.mean(0).square().sum() - 1


def negative_information(probs: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Compute minus the mutual information of token and expert in nats: mean_t H(p_t) - H(P).

    P is the mean of p. The loss is -ln E if every token is certain of one expert and all experts are used equally, and
    0 if all tokens have the same probabilities.
    """
    return router_entropy(probs) - router_entropy(probs.mean(0, keepdim=True))


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


def expert_router_coupling(
    rows: Float[Tensor, "E D"], first: Float[Tensor, "E H D"], *, noisy: bool
) -> Float[Tensor, ""]:
    """Compute the mean over all pairs i, j of experts of [M_ij - M_ii]_+ + [M_ji - M_ii]_+, where [.]_+ is relu.

    M_ij = ||W_j r_i|| says how strongly row i of the router excites expert j, as a stand-in for its tokens. The loss is
    0 if each row excites its own expert most, and each expert is excited most by its own row.

    rows: router rows. first: the matrices W that act on the input of each expert.
    noisy: whether r_i is `add_row_noise` of row i, as in training, and not row i itself.
    """
    strength = torch.einsum("jhd,id->ijh", first, add_row_noise(rows) if noisy else rows).norm(dim=-1)
    own = strength.diagonal()[:, None]
    return (F.relu(strength - own) + F.relu(strength.T - own)).mean()


def add_row_noise(rows: Float[Tensor, "E D"]) -> Float[Tensor, "E D"]:
    """Return row i times numbers from U(1 - eps_i, 1 + eps_i), drawn for each entry.

    eps_i is half the distance to the nearest other row, divided by the length of row i. So a row with noise is still
    nearest to the row that it comes from.
    """
    fixed = rows.detach()
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    nearest = torch.cdist(fixed, fixed).masked_fill(itself, torch.inf).amin(1)
    nearest = nearest.masked_fill(nearest.isinf(), 0.0)  # a single row has no other one
    eps = nearest / (2 * fixed.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny))
    return rows * (1 + eps[:, None] * (2 * torch.rand_like(rows) - 1))


def output_orthogonality(rows: Float[Tensor, "R D"], token: Int[Tensor, " R"]) -> Float[Tensor, ""]:
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
    offered: Int[Tensor, " E"],
    *,
    seq_len: int,
    load: Shaped[Tensor, " E"] | None = None,
    sequence: Int[Tensor, " T"] | None = None,
    document_position: Int[Tensor, " T"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Return every auxiliary loss that this routing has, by name.

    load: load of the earlier micro-batches of the optimizer step. `load_balance_global` adds it, so that the whole
        batch has to be balanced and single micro-batches may specialize.
    sequence: `Context.sequence`.
    document_position: the position of each token in its document. None: documents are sequences.
    """
    losses = dict(routing.aux)
    if routing.probs is not None:
        losses["load_balance"] = load_balance(routing.probs, offered)
        if routing.slots is None:
            choices = routing.probs, routing.token, routing.expert
            by_sequence = (
                load_balance_sequence(*choices, seq_len)
                if sequence is None
                else load_balance_group(*choices, sequence, by_token=False)
            )
            losses["load_balance_sequence"] = losses["load_balance_document"] = by_sequence
            if document_position is not None:
                document = (document_position == 0).cumsum(0) - 1
                losses["load_balance_document"] = load_balance_group(*choices, document, by_token=True)
            first = count(routing.probs.argmax(-1), len(offered))
            losses["load_balance_first"] = load_balance(routing.probs, first)
        losses |= _of_probabilities(routing.probs, offered if load is None else offered + load)
        if routing.slots is not None:
            losses.pop("importance_cv")
    if routing.logits is not None:
        losses["router_z"] = router_z(routing.logits)
    return losses


@fused(least=2**16)
def _of_probabilities(probs: Float[Tensor, "T E"], offered: Shaped[Tensor, " E"]) -> dict[str, Float[Tensor, ""]]:
    """Return the losses that depend on probabilities, and on the load of the optimizer step so far."""
    return {
        "importance_cv": importance_cv(probs),
        "negative_information": negative_information(probs),
        "load_balance_global": load_balance(probs, offered),
        "router_entropy": router_entropy(probs),
        "gate_variance": gate_variance(probs),
    }
