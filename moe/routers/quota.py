"""Token choice under a quota: no expert is asked for by more tokens than it may serve."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@torch.no_grad()
def choose_within_quota(scores: Float[Tensor, "T E"], k: int, quota: int) -> Bool[Tensor, "T E"]:
    """Take (token, expert) pairs from the highest score down, unless the token has k experts or the expert is full.

    An expert is full at `quota` tokens; a token gets fewer than k experts only when all others are full. The same by
    rounds, without reading anything back from the device: every token wishes for its k best, every expert accepts its
    best `quota` wishes and is closed to whatever scores no higher than the last of them, and those turned away wish
    again. In each round the wishes of one more expert become final, of the one that is filled next on the way down, so
    E rounds suffice.
    """
    tokens, experts = scores.shape
    if quota >= tokens:
        return _best(scores, k)
    for _ in range(experts):
        wishes = scores.masked_fill(~_best(scores, k), -torch.inf)
        top = wishes.T.topk(quota)
        accepted = torch.zeros_like(wishes.T, dtype=torch.bool).scatter(1, top.indices, True).T
        scores = scores.masked_fill(~accepted & (scores <= top.values[:, -1]), -torch.inf)
    return _best(scores, k)


def _best(scores: Float[Tensor, "T E"], k: int) -> Bool[Tensor, "T E"]:
    """The k highest finite scores of each token."""
    top = scores.topk(k)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter(1, top.indices, top.values > -torch.inf)
