"""Quantile balancing: biases that solve the balanced assignment of the last batch, without a step size."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.routers.sigmoid_bias import BiasedSigmoid
from moe.routing.stats import RoutingStats


class QuantileBalancing(BiasedSigmoid):
    """Router that selects the k largest s + b and weights by s alone (Su, kexue.fm/archives/11619; Megatron-LM).

    s = sigmoid(W x). To give each token k experts and each expert T k / E tokens at the largest total score is a linear
    program. Its dual problem has one cutoff a per token and one bias b per expert. Each step minimizes the dual exactly
    over a, then over b. Both minima are the same quantile q = 1 - k/E: a_t is the q-quantile of s_te + b_e over e, and
    -b_e is the q-quantile of s_te - a_t over t. b is averaged over micro-batches and, with decay `decay`, over steps.
    It is centered, because adding a constant to it changes nothing.

    A bias acts from the step after the one from which it was learned. Gates are s over the selected experts, normalized
    to sum 1 (s itself for k=1). Expect load_cv to fall without a balance loss; `lb` is 0 by default. Causal.

    decay: share of the old bias in the moving average after a step.
    """

    of_updates = frozenset(("router.decay",))

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, decay: float = 0.9) -> None:
        super().__init__(dim, num_experts, k=k)
        require(0 <= decay < 1, "router.decay", decay, "at least 0, below 1")
        self.decay = decay

    def feedback(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, " E"]:
        return len(scores) * balanced_bias(scores, self.bias, self.k).to(self.bias)

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        self.bias.lerp_((stats.feedback[: self.num_experts] / stats.tokens).to(self.bias), 1 - self.decay)
        self.bias -= self.bias.mean()


def balanced_bias(scores: Float[Tensor, "T E"], bias: Float[Tensor, " E"], k: int) -> Float[Tensor, " E"]:
    """Return the biases that minimize the dual, given the cutoffs of the tokens under the previous `bias`."""
    q = 1 - k / scores.shape[1]
    cutoff = (scores + bias).quantile(q, dim=1, keepdim=True)
    return -(scores - cutoff).quantile(q, dim=0)
