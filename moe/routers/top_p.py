"""Top-p routing: a confident token takes one expert, an uncertain one takes several."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import finite, require
from moe.routers.base import LinearRouter
from moe.routing.decision import Context, Routing


class TopP(LinearRouter):
    """Router that takes the fewest experts whose probabilities sum to at least p (Huang et al. 2403.07652).

    Never more than `k_max` experts, and always `k_max` with p=1. Gates are the probabilities softmax(W x) themselves,
    not renormalized. They sum to about p, and the gate of a single expert keeps a gradient. The auxiliary loss
    `entropy`, the mean token entropy in nats, keeps the number of experts from growing to `k_max`.

    Expect `active_experts` to fall as the router becomes confident, to about 1 with the default p. That is what
    `mean_k` says for costs that are counted before training; training measures the true number.

    Causal when dropless. Not causal under a capacity limit, which is a share of the number of assignments in the
    micro-batch, and that number varies.

    p: probability that the experts of a token have together.
    k_max: most experts of a token.
    mean_k: experts of a token that costs count with; change it together with p.
    entropy: weight of the auxiliary loss.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        p: float = 0.4,
        k_max: int = 4,
        mean_k: float = 1.0,
        entropy: float = 1e-4,
    ) -> None:
        require(0 < p <= 1, "router.p", p, "more than 0 and at most 1")
        require(1 <= k_max <= num_experts, "router.k_max", k_max, f"between 1 and model.num_experts={num_experts}")
        require(1 <= mean_k <= k_max, "router.mean_k", mean_k, f"between 1 and router.k_max={k_max}")
        require(finite(entropy) and entropy >= 0, "router.entropy", entropy, "a finite number >= 0")
        super().__init__(dim, num_experts, fixed_k=k_max if p == 1 or k_max == 1 else None)
        self.p, self.k_max, self.mean_k, self.entropy = p, k_max, mean_k, entropy
        if self.fixed_k is not None:
            self.ignores |= {"router.mean_k"}
        if k_max == 1:
            self.ignores |= {"router.p"}
        if num_experts == 1:
            self.ignores |= {"noise", "router.entropy"}

    @property
    def threshold(self) -> float | Float[Tensor, ""]:
        """The probability p, or inf if it is 1: probabilities never sum to 1, but rounding may say so."""
        return math.inf if self.p == 1 else self.p

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"entropy": self.entropy}

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        log_probs = torch.log_softmax(noisy, -1)
        probs = log_probs.exp()
        expert = noisy.topk(self.k_max).indices
        top = torch.softmax(noisy.detach().double(), -1).gather(-1, expert)
        needed = top.cumsum(-1) - top < self.threshold  # the more probable experts alone sum to less than p
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, expert, needed)
        aux = {"entropy": -(probs * log_probs).sum(-1).mean()}  # not entr(probs): its gradient at 0 is infinite
        return Routing.masked(chosen, probs, probs=probs, logits=logits, aux=aux)
