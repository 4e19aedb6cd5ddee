"""Expert choice made causal: each expert has a threshold learnt from earlier batches."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.routers.base import LinearRouter, check_k
from moe.routing.decision import Context, Routing
from moe.routing.stats import RoutingStats


class ExpertThreshold(LinearRouter):
    """A token takes every expert whose score s = sigmoid(W x) exceeds that expert's threshold (Sun et al. 2603.11535).

    The threshold is a moving average, with `decay`, of the (1 - k/E) quantile of a batch's scores, which T k / E tokens
    exceed. So experts are balanced without a balance loss, and a token has k of them on average, 0 ... E in fact; one
    that passes no threshold gets none. Gates are s, not normalized. Thresholds are learnt once per step from the scores
    that selected (noise included), as the mean over micro-batches; the first step, without any, is routed by top-k (the
    paper warms up with expert choice, which is not causal). A capacity limit is a share of the batch's assignments,
    whose number varies here: causal when dropless. Use lb=0.
    """

    threshold: Tensor

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, decay: float = 0.9) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        check_k(k, num_experts)
        require(0 <= decay < 1, "router.decay", decay, "at least 0, below 1")
        self.quota, self.decay = k, decay
        self.mean_k = float(k)
        self.register_buffer("threshold", torch.full((num_experts,), torch.inf))  # infinite: not yet estimated

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        log_scores = F.logsigmoid(self.perturb(logits, context.knobs))
        scores = log_scores.exp()
        top = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(self.quota).indices, True)
        return Routing.masked(
            torch.where(self.threshold.isinf(), top, scores > self.threshold),
            scores,
            probs=log_scores.softmax(-1),
            logits=logits,
            feedback=len(x) * scores.detach().quantile(1 - self.quota / self.num_experts, dim=0),
        )

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        latest = stats.feedback / stats.tokens
        average = self.decay * self.threshold + (1 - self.decay) * latest
        self.threshold.copy_(torch.where(self.threshold.isinf(), latest, average))
