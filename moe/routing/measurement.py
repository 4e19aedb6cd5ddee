"""Summarize the routing of a layer in sums over tokens. `moe.metrics.catalog` computes metrics from them."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe.fused import fused
from moe.routing.decision import Routing, count
from moe.routing.dispatch import Dispatch
from moe.routing.losses import router_entropy
from moe.routing.stats import DECILES, RoutingStats


@torch.no_grad()
def collect_stats(
    routing: Routing,
    dispatched: Dispatch,
    tokens: int,
    *,
    seq_len: int | None = None,
    document_position: Int[Tensor, " T"] | None = None,
    sequence: Int[Tensor, " T"] | None = None,
    similarity: Float[Tensor, " N"] | None = None,
    flipped: Int[Tensor, "2"] | None = None,
    forward_only: int = 0,
) -> RoutingStats:
    """Compute the sums of one layer over one micro-batch of `tokens` tokens.

    seq_len: length of the sequences. None if all tokens are one sequence.
    document_position: position of each token in its document, from `moe.routing.decision.document_positions`. If
        given, positions and neighbors are counted inside each document. If None, they are counted inside each sequence.
        Blocks of plain text have None: they can hold several documents, but do not mark where one begins.
        `max_violation_sequence` always covers whole sequences, because a single document may be too short to be
        balanced.
    sequence: `Context.sequence`. If it is given, `document_position` must be given too.
    similarity: mean cosine of the experts' outputs for N of these tokens, from `mean_cosine`.
    flipped: from `moe.model.router_precision.flips`, for all of these tokens. None if it was not measured.
    forward_only: as in `RoutingStats`.
    """
    experts = len(dispatched.offered)
    nan = dispatched.weight.new_full((), math.nan)
    offered = dispatched.offered.float()
    assignments = offered.sum()
    routed = (assignments > 0).float()
    return RoutingStats(
        tokens=nan.new_full((), tokens),
        assignments=assignments,
        offered=offered,
        kept=dispatched.kept.float(),
        forward_only=nan.new_full((), forward_only),
        capacity=nan if dispatched.places is None else dispatched.places.to(nan.dtype),
        micro_batches=routed,
        max_violation=routed * (offered.amax() * experts / assignments.clamp(min=1) - 1),
        **_choices(routing, dispatched, tokens, seq_len or tokens, document_position, sequence),
        **_probabilities(routing, nan.expand(experts)),
        **_clean_logits(routing.logits, nan),
        feedback=nan.expand(experts) if routing.feedback is None else routing.feedback,
        probed=nan.new_full((), 0 if similarity is None else len(similarity)),
        rechecked=nan.new_full((), 0 if flipped is None else tokens),
        flipped=nan.new_zeros(()) if flipped is None else flipped[0].to(nan.dtype),
        reordered=nan.new_zeros(()) if flipped is None else flipped[1].to(nan.dtype),
        output_similarity=nan.new_zeros(()) if similarity is None else similarity.sum(),
    )


def _choices(
    routing: Routing,
    dispatched: Dispatch,
    tokens: int,
    seq_len: int,
    document_position: Int[Tensor, " T"] | None,
    sequence: Int[Tensor, " T"] | None,
) -> dict[str, Tensor]:
    """Compute the sums that depend on which tokens chose which experts. NaN for Soft MoE, whose experts take slots.

    Counting the assignments (K per token) is faster than counting a mask (T, E), and is done where possible.
    """
    experts = len(dispatched.offered)
    if routing.slots is not None:
        nan = dispatched.weight.new_full((), math.nan)
        return {
            **dict.fromkeys(("sequences", "max_violation_sequence", "repeatable", "repeated", "unrouted"), nan),
            "offered_by_position": nan.expand(DECILES, experts),
            "kept_by_position": nan.expand(DECILES),
            "coactivation": nan.expand(experts, experts),
            "tokens_by_active": nan.expand(experts + 1),
            "gate_entropy": nan,
        }
    token, expert = routing.token, routing.expert
    if sequence is None:
        sequence_of_assignment, sequences = token // seq_len, tokens // seq_len
    else:
        sequence_of_assignment, sequences = sequence[token], int(sequence[-1]) + 1
    loads = count(sequence_of_assignment * experts + expert, sequences * experts).view(-1, experts).float()
    assignments = loads.sum(1)
    violation = loads.amax(1) * experts / assignments.clamp(min=1) - 1
    if document_position is None:
        document_position = torch.arange(seq_len, device=token.device).repeat(tokens // seq_len)
    decile, follows = document_position * DECILES // seq_len, (document_position > 0).to(dispatched.weight.dtype)
    by_decile = count(decile[token] * experts + expert, DECILES * experts).view(DECILES, experts)
    one = dispatched.weight.new_ones(())  # a Python number would be copied to the device
    chosen = dispatched.weight.new_zeros(tokens, experts).index_put_((token, expert), one)
    tiny = torch.finfo(chosen.dtype).tiny
    weights = chosen.index_put((token, expert), routing.weight).sum(1)  # of each token, added in a fixed order
    gates = routing.weight / weights.clamp(min=tiny)[token]
    with torch.autocast(chosen.device.type, enabled=False):  # bfloat16 does not represent all integers above 256
        coactivation = chosen.T @ chosen
        active = chosen.sum(1)
        repeatable = active @ follows
        repeated = torch.linalg.vecdot(chosen[1:], chosen[:-1]) @ follows[1:]  # faster than multiplying and summing
    return {
        "sequences": (assignments > 0).float().sum(),
        "max_violation_sequence": ((assignments > 0) * violation).sum(),
        "offered_by_position": by_decile.float(),
        "kept_by_position": count(decile[dispatched.token], DECILES).float(),
        "coactivation": coactivation,
        "repeatable": repeatable,
        "repeated": repeated,
        "tokens_by_active": count(active.long(), experts + 1).float(),
        "gate_entropy": -(gates * gates.clamp(min=tiny).log()).sum(),
        "unrouted": tokens - chosen.new_zeros(tokens).index_fill_(0, dispatched.token, 1.0).sum(),
    }


def _probabilities(routing: Routing, nan: Float[Tensor, " E"]) -> dict[str, Tensor]:
    """Compute the sums over the router's probabilities. NaN for a router without probabilities."""
    probs = routing.probs
    if probs is None:
        return {"importance": nan, **dict.fromkeys(("entropy", "confidence", "margin", "top_k_mass"), nan[0])}
    return {
        "importance": probs.sum(0),  # not with the others, because torch 2.11 cannot join it with an argmax
        **_of_probabilities(probs),
        **({"margin": nan[0]} if probs.shape[-1] == 1 else {}),
        "top_k_mass": nan[0] if routing.slots is not None else probs[routing.token, routing.expert].sum(),
    }


@fused(least=2**16)
def _of_probabilities(probs: Float[Tensor, "T E"]) -> dict[str, Tensor]:
    first, index = probs.max(-1, keepdim=True)
    others = torch.arange(probs.shape[-1], device=probs.device) != index
    second = (probs * others).amax(-1, keepdim=True)  # two calls of max take half the time of `topk`
    return {
        "entropy": router_entropy(probs) * len(probs),  # takes half the time of `torch.special.entr`
        "confidence": first.sum(),
        "margin": (first - second).sum(),
    }


def _clean_logits(logits: Float[Tensor, "T E"] | None, nan: Float[Tensor, ""]) -> dict[str, Tensor]:
    """Compute the sums over the clean logits, at temperature 1. NaN for a router without logits."""
    if logits is None:
        return dict.fromkeys(("entropy_t1", "confidence_t1", "logit_squared", "logsumexp_squared"), nan)
    return _of_logits(logits)


@fused(least=2**16)
def _of_logits(logits: Float[Tensor, "T E"]) -> dict[str, Tensor]:
    log_probs = torch.log_softmax(logits, -1)
    probs = log_probs.exp()
    return {
        "entropy_t1": -(probs * log_probs).sum(),
        "confidence_t1": probs.amax(-1).sum(),
        "logit_squared": logits.square().sum() / logits.shape[-1],
        "logsumexp_squared": (logits[:, 0] - log_probs[:, 0]).square().sum(),
    }


def mean_cosine(outputs: Float[Tensor, "E N D"]) -> Float[Tensor, " N"]:
    """For each of N tokens, compute the mean cosine of two experts' outputs, over all pairs. 0 for one expert."""
    experts = len(outputs)
    unit = F.normalize(outputs.float(), dim=-1)
    # ||sum of unit vectors||^2 is the sum of all cosines; subtract those of an expert with itself. `normalize` keeps a
    # zero output zero, so its cosine with any other output is 0.
    pairs = unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))
    return pairs / max(1, experts * (experts - 1))
