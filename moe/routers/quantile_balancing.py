"""Balance without a balance loss or a step size: biases that solve the balanced assignment of the last batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import require
from moe.routers.base import Router, check_k
from moe.routing import Context, Routing, RoutingStats


class QuantileBalancing(Router):
    """Select the k largest s + b, weight by s alone, with s = sigmoid(W x) (Su, kexue.fm/archives/11619; Megatron-LM).

    To give tokens k experts each, and experts T k / E tokens each, at the largest total score is a linear program; its
    dual has a cutoff a per token and a bias b per expert. Each step minimises it exactly over a, then over b, by the
    same quantile q = 1 - k/E along either axis: a_t = q of s_te + b_e over e, -b_e = q of s_te - a_t over t. b is
    averaged over micro-batches and, with `decay`, over steps, and centred, because adding a constant to it changes
    nothing. It acts from the next step on, never on the one it was learnt from. Gates are s over the selected,
    normalised to sum 1 (s itself for k=1). Expect load_cv to fall without `lb`; use lb=0.
    """

    bias: Tensor

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, decay: float = 0.9) -> None:
        super().__init__(dim, num_experts)
        check_k(k, num_experts)
        require(0 <= decay < 1, "router.decay", decay, "at least 0, below 1")
        self.k, self.decay = k, decay
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = F.linear(x, self.weight.float())
        scores = torch.sigmoid(self.perturb(logits, context.knobs))
        expert = (scores + self.bias).topk(self.k).indices
        weight = scores.gather(-1, expert)
        if self.k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        return Routing.token_choice(
            expert,
            weight,
            probs=scores / scores.sum(-1, keepdim=True),
            logits=logits,
            evidence=len(x) * balanced_bias(scores.detach(), self.bias, self.k),
        )

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        self.bias.lerp_(stats.evidence / stats.tokens, 1 - self.decay)
        self.bias -= self.bias.mean()


def balanced_bias(scores: Float[Tensor, "T E"], bias: Float[Tensor, "E"], k: int) -> Float[Tensor, "E"]:
    """The bias of each expert that minimises the dual beside the tokens' cutoffs under the `bias` of before."""
    q = 1 - k / scores.shape[1]
    cutoff = (scores + bias).quantile(q, dim=1, keepdim=True)
    return -(scores - cutoff).quantile(q, dim=0)
