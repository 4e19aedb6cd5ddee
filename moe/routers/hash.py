"""Hash routing: the token id alone determines the experts."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.checks import require
from moe.routers.base import Router
from moe.routing.decision import Context, Routing, TrainingText
from moe.routing.loss_table import PROBABILITY_WEIGHTS


class Hash(Router):
    """Router that maps each token id to k fixed, distinct experts with gates 1/k (Roller et al. 2106.04426).

    Nothing is learned. The router has no probabilities and no logits, so metrics and losses of those are null. Causal.

    balanced: before training, assign ids to experts, the most frequent id first, to experts that have the fewest
        training tokens so far ("balanced" in the paper; known as longest processing time first). Loads are then even
        over the training text. Experts with nearly equal loads are combined so that all sets of experts occur: with
        the k lightest experts alone, the same experts would share their tokens for ever, as one larger expert. If
        false, an integer hash spreads ids evenly, and tokens unevenly.
    vocab_size: ids from `vocab_size` on share the experts of id % vocab_size.
    """

    uses_ids = True
    ignores = PROBABILITY_WEIGHTS | {"noise", "z"}
    why = "a table from token ids to experts decides"
    table: Tensor

    def __init__(
        self, dim: int, num_experts: int, *, k: int = 2, balanced: bool = True, vocab_size: int = 65_536
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(vocab_size >= 1, "router.vocab_size", vocab_size, "at least 1")
        self.k, self.balanced = k, balanced
        if k == num_experts:
            self.ignores |= {"router.balanced", "router.vocab_size"}
        self.register_buffer("table", torch.empty(vocab_size, k, dtype=torch.int32))
        if not self.table.is_meta:  # PyTorch's arange on the meta device imports its compiler, which takes seconds
            pairs = torch.arange(vocab_size)[:, None] * num_experts + torch.arange(num_experts)
            self.table.copy_(scramble(pairs).topk(k).indices)

    def before_training(self, text: TrainingText) -> None:
        if self.balanced:
            counts = text.counts
            folded = torch.zeros(len(self.table), dtype=counts.dtype)
            folded.index_add_(0, torch.arange(len(counts)) % len(self.table), counts.cpu())
            seen = int((folded > 0).sum())
            order = folded.argsort(descending=True, stable=True)[:seen]
            chosen = spread(folded[order].numpy(), self.num_experts, self.k)
            self.table[order] = torch.from_numpy(chosen).to(self.table)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        expert = self.table[context.routed(context.ids.flatten()) % len(self.table)].long()
        return Routing.token_choice(expert, torch.full(expert.shape, 1 / self.k, device=x.device))


def spread(weights: Int[np.ndarray, " N"], bins: int, k: int) -> Int[np.ndarray, "N k"]:
    """For each weight in turn, choose k distinct bins and add the weight to each. Return the bins.

    The first one is the lightest bin. Each further one is, among those that are less than one weight heavier than the
    lightest bin left, the bin that has the least weight in common with those already chosen. Weights are positive.
    """
    load, shared = np.zeros(bins), np.zeros((bins, bins))
    chosen = np.empty((len(weights), k), dtype=np.int64)
    for row, weight in zip(chosen, weights, strict=True):
        left = load.copy()
        for place in range(k):
            if place == 0:
                row[0] = left.argmin()
            else:
                common = shared[row[:place]].sum(0)
                row[place] = np.where(left < left.min() + weight, common, np.inf).argmin()
            left[row[place]] = np.inf
        load[row] += weight
        shared[row[:, None], row] += weight
    return chosen


def scramble(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return a fixed pseudo-random 32-bit number for each integer (the finalizer of murmur3)."""
    h = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)
