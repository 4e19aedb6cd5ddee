"""Hash routing: the token id alone determines the experts."""

import heapq

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.checks import require
from moe.routers.base import Router
from moe.routing.decision import Context, Routing
from moe.routing.loss_table import PROBABILITY_WEIGHTS


class Hash(Router):
    """Router that maps each token id to k fixed, distinct experts with gates 1/k (Roller et al. 2106.04426).

    Nothing is learned. The router has no probabilities and no logits, so metrics and losses of those are null. Causal.

    balanced: before training, assign ids to experts, the most frequent id first, each to the k experts that have the
        fewest training tokens so far ("balanced" in the paper; known as longest processing time first). Loads are then
        even over the training text. If false, an integer hash spreads ids evenly, and tokens unevenly.
    vocab_size: ids from `vocab_size` on share the experts of id % vocab_size.
    """

    uses_ids = True
    ignores = PROBABILITY_WEIGHTS | {"noise", "z"}
    table: Tensor

    def __init__(
        self, dim: int, num_experts: int, *, k: int = 2, balanced: bool = True, vocab_size: int = 65_536
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(vocab_size >= 1, "router.vocab_size", vocab_size, "at least 1")
        self.k, self.balanced = k, balanced
        pairs = torch.arange(vocab_size)[:, None] * num_experts + torch.arange(num_experts)
        self.register_buffer("table", scramble(pairs).topk(k).indices.to(torch.int32))

    def before_training(self, counts: Int[Tensor, "V"]) -> None:
        if self.balanced:
            folded = torch.zeros(len(self.table), dtype=counts.dtype)
            folded.index_add_(0, torch.arange(len(counts)) % len(self.table), counts.cpu())
            seen = int((folded > 0).sum())
            order = folded.argsort(descending=True, stable=True)[:seen]
            chosen = lightest(folded[order].tolist(), self.num_experts, self.k)
            self.table[order] = torch.tensor(chosen, dtype=torch.int32).to(self.table.device)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        expert = self.table[context.routed(context.ids.flatten()) % len(self.table)].long()
        return Routing.token_choice(expert, torch.full(expert.shape, 1 / self.k, device=x.device))


def lightest(weights: list[int], bins: int, k: int) -> list[list[int]]:
    """For each weight in turn, choose the k bins with the smallest sums and add the weight to each. Return the bins."""
    heap = [(0, b) for b in range(bins)]
    chosen = []
    for weight in weights:
        taken = [heapq.heappop(heap) for _ in range(k)]
        for load, b in taken:
            heapq.heappush(heap, (load + weight, b))
        chosen.append([b for _, b in taken])
    return chosen


def scramble(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return a fixed pseudo-random 32-bit number for each integer (the finalizer of murmur3)."""
    h = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)
