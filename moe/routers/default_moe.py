"""Default MoE: experts that a token did not choose are replaced by the mean of their earlier outputs."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.routers.base import LinearRouter
from moe.routing.decision import Context, Routing, picked
from moe.routing.stats import RoutingStats


class DefaultMoE(LinearRouter):
    """Router that weights all experts and computes the k most probable (Default MoE, Panda et al. 2504.12463).

    y = sum_i p_i E_i(x) over the k largest p = softmax(W x), plus sum_i p_i m_i over all others. m_i is the default
    output of expert i: a moving average, with decay `decay`, of the mean output of the expert in each optimizer step.
    It begins at 0, and stays as it is in a step without a token for the expert. So the router gets a gradient from
    every expert of every token, although k are computed. Evaluation adds the defaults too. Causal.

    decay: share of the old default output in the moving average after a step.
    """

    learns_from_outputs = True
    default: Tensor

    expects_load = True

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, decay: float = 0.9) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(0 <= decay < 1, "router.decay", decay, "at least 0, below 1")
        self.k, self.decay = k, decay
        if k == num_experts:  # no expert is replaced
            self.ignores = frozenset(("router.decay",))
        if num_experts == 1:
            self.ignores |= {"noise"}
        self.register_buffer("default", torch.zeros(num_experts, dim))

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        probs = torch.softmax(noisy, -1)
        expert = noisy.topk(self.k).indices
        added = probs.scatter(-1, expert, 0.0) @ self.default.to(x.dtype)
        aux = self.expected_load(logits, noisy, self.k, context)
        return Routing.token_choice(expert, picked(probs, expert), probs=probs, logits=logits, added=added, aux=aux)

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        count = stats.kept[:, None]
        mean = stats.feedback[: self.default.numel()].view_as(self.default) / count.clamp(min=1)
        average = self.decay * self.default + (1 - self.decay) * mean
        self.default.copy_(torch.where(count > 0, average, self.default))
