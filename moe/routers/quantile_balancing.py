"""Balance without a balance loss or a step size: biases that solve the balanced assignment of the last batch."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.routers.sigmoid_bias import BiasedSigmoid
from moe.routing.stats import RoutingStats


class QuantileBalancing(BiasedSigmoid):
    """Select the k largest s + b, weight by s alone, with s = sigmoid(W x) (Su, kexue.fm/archives/11619; Megatron-LM).

    To give tokens k experts each, and experts T k / E tokens each, at the largest total score is a linear program; its
    dual has a cutoff a per token and a bias b per expert. Each step minimizes it exactly over a, then over b, by the
    same quantile q = 1 - k/E along either axis: a_t = q of s_te + b_e over e, -b_e = q of s_te - a_t over t. b is
    averaged over micro-batches and, with `decay`, over steps, and centered, because adding a constant to it changes
    nothing. It acts from the next step on, never on the one it was learnt from. Gates are s over the selected,
    normalized to sum 1 (s itself for k=1). Expect load_cv to fall without `lb`; use lb=0.
    """

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, decay: float = 0.9) -> None:
        super().__init__(dim, num_experts, k=k)
        require(0 <= decay < 1, "router.decay", decay, "at least 0, below 1")
        self.decay = decay

    def feedback(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "E"]:
        return len(scores) * balanced_bias(scores, self.bias, self.k)

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        self.bias.lerp_(stats.feedback / stats.tokens, 1 - self.decay)
        self.bias -= self.bias.mean()


def balanced_bias(scores: Float[Tensor, "T E"], bias: Float[Tensor, "E"], k: int) -> Float[Tensor, "E"]:
    """The bias of each expert that minimizes the dual beside the tokens' cutoffs under the `bias` of before."""
    q = 1 - k / scores.shape[1]
    cutoff = (scores + bias).quantile(q, dim=1, keepdim=True)
    return -(scores - cutoff).quantile(q, dim=0)
