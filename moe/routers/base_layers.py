"""BASE layers: every expert gets equally many tokens in training, by the best balanced assignment."""

import itertools

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.fused import uncompiled
from moe.routers.base import LinearRouter
from moe.routing.decision import Context, Routing
from moe.routing.dispatch import capacity_per_expert


class BaseLayers(LinearRouter):
    """Router whose training takes the best of all balanced assignments, one expert per token (Lewis et al. 2103.16716).

    Balanced means that no expert has more than ceil(T / E) of the T tokens of the micro-batch. The best assignment has
    the largest sum of logits W x. In evaluation each token takes its largest logit. The gate is sigmoid(logit) in both.

    This is the exact form of what `Sinkhorn` approximates. In training the load is even if E divides T, so the keys
    `lb` and `lb_global` do not apply. Evaluation can be less balanced. Not causal: in training the expert of a token
    depends on the whole micro-batch. The assignment is computed on the CPU, so a GPU waits for it.
    """

    causal = False
    ignores = frozenset(("lb", "lb_global"))
    why = "each expert takes equally many tokens in training"

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, fixed_k=1)

    @property
    def causal_in_evaluation(self) -> bool:
        return True

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        expert = balanced_assignment(noisy.detach()) if self.training else noisy.argmax(-1)
        weight = torch.sigmoid(noisy.gather(-1, expert[:, None]))
        return Routing.token_choice(expert[:, None], weight, probs=torch.softmax(noisy, -1), logits=logits)


@uncompiled
def balanced_assignment(scores: Float[Tensor, "T E"]) -> Int[Tensor, " T"]:
    """Return the expert of each token, so that the sum of scores is the largest and none has over ceil(T / E) tokens.

    Every token begins with its best expert. Then tokens leave experts that have too many, one at a time. Each time the
    cheapest chain is found that ends at an expert with a free place: a token moves from the first expert of the chain
    to the second one, another token from the second to the third, and so on. Such successive shortest paths keep an
    assignment the best one for its loads. Costs are whole numbers of up to 40 bits, so that their sums are exact and
    never make a cycle. Waits for the device.
    """
    values = np.nan_to_num(scores.double().cpu().numpy())
    values = np.rint(values / max(np.abs(values).max(), np.finfo(float).tiny) * 2.0**40)
    tokens, experts = values.shape
    limit = capacity_per_expert(tokens, experts, 1.0)
    expert = values.argmax(1)
    load = np.bincount(expert, minlength=experts)
    cost = np.full((experts, experts), np.inf)  # the cheapest move from an expert to another one
    mover = np.zeros((experts, experts), dtype=np.int64)  # the token that would move
    changed = np.arange(experts)
    while (load > limit).any():
        for e in changed:
            members = np.flatnonzero(expert == e)
            losses = values[members, e, None] - values[members]
            cost[e] = losses.min(0, initial=np.inf)
            mover[e] = members[losses.argmin(0)] if len(members) else 0
        chain = _cheapest_chain(cost, load > limit, load < limit)
        for source, target in itertools.pairwise(chain):
            expert[mover[source, target]] = target
        load[chain[0]] -= 1
        load[chain[-1]] += 1
        changed = np.array(chain)
    return torch.from_numpy(expert).to(scores.device)


def _cheapest_chain(
    cost: Float[np.ndarray, "E E"], sources: Bool[np.ndarray, " E"], targets: Bool[np.ndarray, " E"]
) -> list[int]:
    """Return the experts on the shortest path from any source to any target (Bellman-Ford: costs may be negative)."""
    distance = np.where(sources, 0.0, np.inf)
    before = np.full(len(distance), -1)
    for _ in range(len(distance) - 1):
        through = distance[:, None] + cost
        nearest = through.argmin(0)
        shorter = through.min(0) < distance
        if not shorter.any():
            break
        distance = np.where(shorter, through.min(0), distance)
        before = np.where(shorter, nearest, before)
    chain = [int(np.where(targets, distance, np.inf).argmin())]
    while before[chain[-1]] >= 0:
        chain.append(int(before[chain[-1]]))
    return chain[::-1]
