"""Token choice under a quota: no expert is assigned more tokens than the quota."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@torch.no_grad()
def choose_within_quota(scores: Float[Tensor, "T E"], k: int, quota: int) -> Bool[Tensor, "T E"]:
    """Return which experts each token takes if the pairs of highest score are served first.

    Take (token, expert) pairs from the highest score down. Skip a pair if the token already has k experts or the expert
    is full. An expert is full at `quota` tokens. A token gets fewer than k experts only if all others are full,
    or if some of its scores are exactly equal.

    The same result is computed in rounds, without reading anything back from the device. In each round every token
    applies to its k best experts that are open to it. Every expert accepts its best `quota` applications and closes to
    all scores up to the last of them. Rejected tokens apply again in the next round. Each round settles at least one
    more expert, the one that the greedy order fills next, so E rounds are enough.
    """
    tokens, experts = scores.shape
    if quota >= tokens:
        return _best(scores, k)
    for _ in range(experts):
        applications = scores.masked_fill(~_best(scores, k), -torch.inf)
        top = applications.T.topk(quota)
        accepted = torch.zeros_like(applications.T, dtype=torch.bool).scatter(1, top.indices, True).T
        scores = scores.masked_fill(~accepted & (scores <= top.values[:, -1]), -torch.inf)
    return _best(scores, k)


def _best(scores: Float[Tensor, "T E"], k: int) -> Bool[Tensor, "T E"]:
    """Return the mask (T, E) of the k highest finite scores of each token."""
    top = scores.topk(k)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter(1, top.indices, top.values > -torch.inf)
