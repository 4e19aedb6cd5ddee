"""Document pools: all tokens of a document choose from the same few experts."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.checks import require
from moe.routers.base import LinearRouter, check_k
from moe.routing.decision import Context, Routing, fill_places, picked


class DocumentPool(LinearRouter):
    """Router whose tokens take their top-k from the pool of their document (EMO, Wang et al. 2605.06663).

    The pool holds the experts with the largest sum of softmax(W x) over the document. Gates are the softmax of W x over
    the pool, not renormalized. In training the size of each document's pool is drawn from `pool_min` ... `pool_max`,
    all equally likely; evaluation uses `pool`. Documents are those that blocks of conversations mark; in other blocks
    the whole sequence is one document.

    causal=false is the method of the paper. It is not causal, in training and in evaluation: the pool of a token
    depends on later tokens, so a lower loss than that of other routers can be due to them. With causal=true the sums
    for a token go from the start of its document to the token itself.

    The sums are computed in fp64. `probs` is the softmax over the pool. Balance it over many documents, with `lb` or
    `lb_global`; `lb_sequence` and `lb_document` work against the pools.

    k: experts per token.
    pool: experts in a pool in evaluation. With all of them there is no pool.
    pool_min: fewest experts in a pool in training, at least k.
    pool_max: most experts in a pool in training.
    causal: whether a pool depends on the token and those before it alone.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        pool: int = 3,
        pool_min: int = 2,
        pool_max: int = 4,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        for name, number in (("pool", pool), ("pool_min", pool_min), ("pool_max", pool_max)):
            check_k(number, num_experts, key=f"router.{name}")
            require(number >= k, f"router.{name}", number, f"at least router.k={k}")
        require(pool_min <= pool_max, "router.pool_min", pool_min, f"at most router.pool_max={pool_max}")
        allowed = f"below model.num_experts={num_experts}, or there are no pools in training"
        require(pool_min < num_experts, "router.pool_min", pool_min, allowed)
        self.k, self.pool, self.pool_min, self.pool_max = k, pool, pool_min, pool_max
        self.causal = causal
        self.reads_earlier_tokens = causal and pool < num_experts

    @property
    def causal_in_evaluation(self) -> bool:
        return self.causal or self.pool == self.num_experts

    def require_documents_apart(self) -> None:
        """Return: documents are what this router keeps apart."""

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        within = noisy.masked_fill(~self._pools(noisy.detach(), context), -torch.inf)
        probs = torch.softmax(within, -1)
        expert = within.topk(self.k).indices
        return Routing.token_choice(expert, picked(probs, expert), probs=probs, logits=logits)

    def _pools(self, logits: Float[Tensor, "T E"], context: Context) -> Bool[Tensor, "T E"]:
        """Return which experts are in the pool of each token."""
        sequences, length = context.ids.shape
        start = document_starts(context)
        index = torch.arange(length, device=logits.device)
        counted = start[:, :, None] == start[:, None, :]  # (B, S, S): token s counts in the pool of token t
        if self.causal:
            counted = counted & (index <= index[:, None])
        probs = fill_places(torch.softmax(logits.double(), -1), context.place, sequences * length)
        sums = counted.to(probs.dtype) @ probs.view(sequences, length, -1)
        rank = sums.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        if not self.training:
            return context.routed((rank < self.pool).flatten(0, 1))
        drawn = torch.randint(
            self.pool_min, self.pool_max + 1, (len(logits), 1), device=logits.device
        )  # not for padding
        sizes = fill_places(drawn.to(probs.dtype), context.place, sequences * length).view(sequences, length)
        return context.routed((rank < sizes.gather(1, start)[:, :, None]).flatten(0, 1))


def document_starts(context: Context) -> Int[Tensor, "B S"]:
    """Return where in its sequence the document of each token begins. A sequence without marks is one document."""
    index = torch.arange(context.ids.shape[1], device=context.ids.device)
    if context.document_position is None:
        return torch.zeros_like(index).expand(context.ids.shape)
    return (index * (context.document_position == 0)).cummax(1).values
