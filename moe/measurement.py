"""What is summed of a layer's routing while running; `moe.metrics` makes numbers of the sums."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.dispatch import Plan, slots
from moe.routing import DECILES, Routing, RoutingStats


@torch.no_grad()
def measure(
    routing: Routing,
    plan: Plan,
    tokens: int,
    *,
    seq_len: int | None = None,
    capacity: float | None = None,
    similarity: Float[Tensor, "N"] | None = None,
) -> RoutingStats:
    """The sums of one layer over one micro-batch of `tokens` tokens, in sequences of `seq_len` (None: a single one).

    similarity: of the outputs of all experts for N of these tokens, from `mean_cosine`.
    """
    experts = len(plan.offered)
    nan = plan.weight.new_full((), math.nan)
    probs, logits = routing.probs, routing.logits
    at_t1 = torch.softmax(logits, -1) if logits is not None else None
    offered = plan.offered.float()
    assignments = offered.sum()
    routed = (assignments > 0).float()
    chosen = nan.expand(tokens, experts)
    if routing.slots is None:
        chosen = nan.new_zeros(tokens, experts)
        chosen[routing.token, routing.expert] = 1.0
    return RoutingStats(
        tokens=nan.new_full((), tokens),
        assignments=assignments,
        offered=offered,
        kept=plan.kept.float(),
        slots=nan if capacity is None else nan.new_full((), experts * slots(len(routing.expert), experts, capacity)),
        batches=routed,
        max_violation=routed * (offered.amax() * experts / assignments.clamp(min=1) - 1),
        **_choices(chosen, plan, seq_len or tokens, by_token=routing.slots is None),
        importance=nan.expand(experts) if probs is None else probs.sum(0),
        entropy=nan if probs is None else torch.special.entr(probs).sum(),
        confidence=nan if probs is None else probs.amax(-1).sum(),
        margin=nan if probs is None or experts == 1 else -probs.topk(2).values.diff().sum(),
        chosen_mass=nan if probs is None else (probs * chosen).sum(),
        entropy_t1=nan if at_t1 is None else torch.special.entr(at_t1).sum(),
        confidence_t1=nan if at_t1 is None else at_t1.amax(-1).sum(),
        logit_squared=nan if logits is None else logits.square().sum() / experts,
        logsumexp_squared=nan if logits is None else torch.logsumexp(logits, -1).square().sum(),
        evidence=nan.expand(experts) if routing.evidence is None else routing.evidence,
        probed=nan.new_full((), 0 if similarity is None else len(similarity)),
        output_similarity=nan.new_zeros(()) if similarity is None else similarity.sum(),
    )


def _choices(chosen: Float[Tensor, "T E"], plan: Plan, seq_len: int, *, by_token: bool) -> dict[str, Tensor]:
    """The sums that depend on which tokens chose which experts (1 in `chosen`): NaN where experts take no tokens."""
    tokens, experts = chosen.shape
    sequences = chosen.unflatten(0, (-1, seq_len))
    loads = sequences.sum(1)
    asked = loads.sum(1)
    violation = loads.amax(1) * experts / asked.clamp(min=1) - 1
    decile = torch.arange(seq_len, device=chosen.device) * DECILES // seq_len
    by_place = chosen.new_zeros(DECILES, experts).index_add_(0, decile, sequences.sum(0))
    reached = kept = chosen.sum()  # NaN
    if by_token:
        reached = chosen.new_zeros(tokens).index_fill_(0, plan.token, 1.0).sum()
        kept = chosen.new_zeros(DECILES).index_add_(0, decile[plan.token % seq_len], torch.ones_like(plan.weight))
    with torch.autocast(chosen.device.type, enabled=False):  # bfloat16 cannot count beyond 256
        coactivation = chosen.T @ chosen
    return {
        "sequences": (asked > 0).sum() + 0 * reached,
        "max_violation_sequence": ((asked > 0) * violation).sum(),
        "offered_by_position": by_place,
        "kept_by_position": kept.expand(DECILES),
        "coactivation": coactivation,
        "repeatable": sequences[:, 1:].sum(),
        "repeated": (sequences[:, 1:] * sequences[:, :-1]).sum(),
        "unrouted": tokens - reached,
    }


def mean_cosine(outputs: Float[Tensor, "E N D"]) -> Float[Tensor, "N"]:
    """Mean cosine over pairs of experts of their outputs for each of N tokens; 0 for a single expert."""
    experts = len(outputs)
    unit = F.normalize(outputs.float(), dim=-1)
    pairs = unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))  # a zero output is alike to none
    return pairs / max(1, experts * (experts - 1))
