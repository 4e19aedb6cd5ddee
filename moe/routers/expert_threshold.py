"""Expert threshold: a causal form of expert choice, with thresholds learned from earlier batches."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.routers.base import LinearRouter, check_k
from moe.routing.decision import Context, Routing
from moe.routing.stats import RoutingStats


class ExpertThreshold(LinearRouter):
    """Router in which a token takes every expert whose threshold its logit exceeds (Sun et al. 2603.11535).

    Logits are W x, and gates are sigmoid(W x), not normalized. An expert's threshold is a moving average, with decay
    `decay`, of the (1 - k/E) quantile of the logits in a batch. Each of the E experts takes T·k/E tokens, so a token
    has k experts on average, but any number from 0 to E. A token that exceeds no threshold has no expert. (Thresholds
    of sigmoid(W x) would round to 1, and select nobody, where logits are large.)

    Thresholds are updated once per step, with the mean over micro-batches of the quantiles of the logits that selected
    (noise included). In the first step there are no thresholds yet, and tokens take their top-k experts. (The paper
    starts with expert choice, which is not causal.)

    Expect balanced loads without a balance loss; `lb` is 0 by default. Causal when dropless. Not causal under a
    capacity limit, which is a share of the number of assignments in the micro-batch, and that number varies.

    k: mean number of experts per token.
    decay: share of the old threshold in the moving average after a step.
    """

    expects_load = True
    threshold: Tensor

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, decay: float = 0.9) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        check_k(k, num_experts)
        require(0 <= decay < 1, "router.decay", decay, "at least 0, below 1")
        self.k, self.decay = k, decay
        self.mean_k = float(k)
        self.register_buffer("threshold", torch.full((num_experts,), torch.inf))  # inf: no estimate yet

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        log_scores = F.logsigmoid(noisy)
        top = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, noisy.topk(self.k).indices, True)
        return Routing.masked(
            torch.where(self.threshold.isinf(), top, noisy > self.threshold),
            log_scores.exp(),
            probs=log_scores.softmax(-1),
            logits=logits,
            aux=self.expected_load(logits, noisy, self.k, context),
            feedback=len(x) * noisy.detach().quantile(1 - self.k / self.num_experts, dim=0),
        )

    def bars(self, noisy: Float[Tensor, "T E"], k: int) -> Float[Tensor, "T E"]:
        """Return the thresholds, or in the first step what a top-k asks for."""
        return torch.where(self.threshold.isinf(), super().bars(noisy, k), self.threshold)

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        latest = stats.feedback[: self.num_experts] / stats.tokens
        average = self.decay * self.threshold + (1 - self.decay) * latest
        self.threshold.copy_(torch.where(self.threshold.isinf(), latest, average))
