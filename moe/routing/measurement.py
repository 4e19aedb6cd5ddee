"""What is summed of a layer's routing while running; `moe.metrics.catalog` makes numbers of the sums."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe.routing.decision import Routing, count
from moe.routing.dispatch import Dispatch, capacity_slots
from moe.routing.losses import router_entropy
from moe.routing.stats import DECILES, RoutingStats


@torch.no_grad()
def measure(
    routing: Routing,
    plan: Dispatch,
    tokens: int,
    *,
    seq_len: int | None = None,
    place: Int[Tensor, "T"] | None = None,
    capacity: float | None = None,
    similarity: Float[Tensor, "N"] | None = None,
) -> RoutingStats:
    """The sums of one layer over one micro-batch of `tokens` tokens, in sequences of `seq_len` (None: a single one).

    place: of each token in its text, from `moe.routing.decision.places` (None: a sequence is one text). Positions,
    and which
        token follows which, are counted within a text; `max_violation_sequence` is of a sequence with all its texts,
        for a single one may be too short to be balanced.
    similarity: of the outputs of all experts for N of these tokens, from `mean_cosine`.
    """
    experts = len(plan.offered)
    nan = plan.weight.new_full((), math.nan)
    offered = plan.offered.float()
    assignments = offered.sum()
    routed = (assignments > 0).float()
    return RoutingStats(
        tokens=nan.new_full((), tokens),
        assignments=assignments,
        offered=offered,
        kept=plan.kept.float(),
        slots=nan
        if capacity is None
        else nan.new_full((), experts * capacity_slots(len(routing.expert), experts, capacity)),
        batches=routed,
        max_violation=routed * (offered.amax() * experts / assignments.clamp(min=1) - 1),
        **_choices(routing, plan, tokens, seq_len or tokens, place),
        **_probabilities(routing, nan.expand(experts)),
        **_clean_logits(routing.logits, nan),
        feedback=nan.expand(experts) if routing.feedback is None else routing.feedback,
        probed=nan.new_full((), 0 if similarity is None else len(similarity)),
        output_similarity=nan.new_zeros(()) if similarity is None else similarity.sum(),
    )


def _choices(
    routing: Routing, plan: Dispatch, tokens: int, seq_len: int, place: Int[Tensor, "T"] | None
) -> dict[str, Tensor]:
    """The sums that depend on which tokens chose which experts: NaN where experts take no tokens.

    Whatever can be is counted over assignments, K a token, instead of over (T, E).
    """
    experts = len(plan.offered)
    if routing.slots is not None:
        nan = plan.weight.new_full((), math.nan)
        return {
            **dict.fromkeys(("sequences", "max_violation_sequence", "repeatable", "repeated", "unrouted"), nan),
            "offered_by_position": nan.expand(DECILES, experts),
            "kept_by_position": nan.expand(DECILES),
            "coactivation": nan.expand(experts, experts),
            "tokens_by_active": nan.expand(experts + 1),
        }
    token, expert = routing.token, routing.expert
    loads = count(token // seq_len * experts + expert, tokens // seq_len * experts).view(-1, experts).float()
    asked = loads.sum(1)
    violation = loads.amax(1) * experts / asked.clamp(min=1) - 1
    if place is None:
        place = torch.arange(seq_len, device=token.device).repeat(tokens // seq_len)
    decile, follows = place * DECILES // seq_len, (place > 0).float()
    by_decile = count(decile[token] * experts + expert, DECILES * experts).view(DECILES, experts)
    one = plan.weight.new_ones(())  # a Python number would be copied to the device
    chosen = plan.weight.new_zeros(tokens, experts).index_put_((token, expert), one)
    with torch.autocast(chosen.device.type, enabled=False):  # bfloat16 cannot count beyond 256
        coactivation = chosen.T @ chosen
        active = chosen.sum(1)
        repeatable = active @ follows
        repeated = torch.linalg.vecdot(chosen[1:], chosen[:-1]) @ follows[1:]  # faster than product and sum
    return {
        "sequences": (asked > 0).float().sum(),
        "max_violation_sequence": ((asked > 0) * violation).sum(),
        "offered_by_position": by_decile.float(),
        "kept_by_position": count(decile[plan.token], DECILES).float(),
        "coactivation": coactivation,
        "repeatable": repeatable,
        "repeated": repeated,
        "tokens_by_active": count(active.long(), experts + 1).float(),
        "unrouted": tokens - chosen.new_zeros(tokens).index_fill_(0, plan.token, 1.0).sum(),
    }


def _probabilities(routing: Routing, nan: Float[Tensor, "E"]) -> dict[str, Tensor]:
    """The sums over the distribution that decided: NaN without one."""
    probs = routing.probs
    if probs is None:
        return {"importance": nan, **dict.fromkeys(("entropy", "confidence", "margin", "chosen_mass"), nan[0])}
    first, at = probs.max(-1, keepdim=True)
    second = probs.scatter(-1, at, 0.0).amax(-1, keepdim=True)  # two maxima take half the time of `topk`
    return {
        "importance": probs.sum(0),
        "entropy": router_entropy(probs) * len(probs),  # half the time of `entr`
        "confidence": first.sum(),
        "margin": nan[0] if probs.shape[-1] == 1 else (first - second).sum(),
        "chosen_mass": nan[0] if routing.slots is not None else probs[routing.token, routing.expert].sum(),
    }


def _clean_logits(logits: Float[Tensor, "T E"] | None, nan: Float[Tensor, ""]) -> dict[str, Tensor]:
    """The sums over the clean logits, at temperature 1: NaN without any."""
    if logits is None:
        return dict.fromkeys(("entropy_t1", "confidence_t1", "logit_squared", "logsumexp_squared"), nan)
    log_probs = torch.log_softmax(logits, -1)
    probs = log_probs.exp()
    return {
        "entropy_t1": -(probs * log_probs).sum(),
        "confidence_t1": probs.amax(-1).sum(),
        "logit_squared": logits.square().sum() / logits.shape[-1],
        "logsumexp_squared": (logits[:, 0] - log_probs[:, 0]).square().sum(),
    }


def mean_cosine(outputs: Float[Tensor, "E N D"]) -> Float[Tensor, "N"]:
    """Mean cosine over pairs of experts of their outputs for each of N tokens; 0 for a single expert."""
    experts = len(outputs)
    unit = F.normalize(outputs.float(), dim=-1)
    pairs = unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))  # a zero output is alike to none
    return pairs / max(1, experts * (experts - 1))
