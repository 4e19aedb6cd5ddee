"""Running means: each expert is the mean of the hidden states that it got, as in k-means. The router has no weights."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import require
from moe.routers.base import Router
from moe.routing.decision import Context, Routing
from moe.routing.loss_table import PROBABILITY_WEIGHTS
from moe.routing.stats import RoutingStats


class RunningMeans(Router):
    """Router that takes the k experts whose running means have the largest cosine with x (Ahrac et al. 2605.12476).

    The running mean of an expert is a moving average, with decay `decay`, of the mean hidden state of its tokens in
    each optimizer step. This is k-means with cosines, learned online and without a gradient. An expert without a token
    keeps its mean. Means begin at random. Gates are the softmax of the cosines of the selected experts.

    The router has no parameters, so losses on its probabilities do not apply; `probs` is the softmax of the cosines,
    for metrics. Expect balanced loads without a balance loss. Causal.

    k: experts per token.
    decay: share of the old mean in the moving average after a step.
    """

    ignores = PROBABILITY_WEIGHTS | {"z"}
    why = "it has no weights that a loss could train"
    mean: Tensor

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, decay: float = 0.99) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(0 <= decay < 1, "router.decay", decay, "at least 0, below 1")
        self.k, self.decay = k, decay
        if num_experts == 1:
            self.ignores |= {"noise"}
        self.register_buffer("mean", torch.zeros(num_experts, dim))

    @property
    def expert_directions(self) -> Float[Tensor, "E D"]:
        return self.mean

    def draw(self, name: str, tensor: Tensor, std: float) -> None:
        """Draw the means from N(0, 1), the size of normalized hidden states. Only their directions matter at first."""
        nn.init.normal_(tensor)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.mean.to(x.dtype), dim=-1))
        noisy = self.add_noise(cosine, context.knobs)
        top = noisy.topk(self.k)
        chosen = torch.zeros_like(noisy).scatter(-1, top.indices, 1.0)
        return Routing.token_choice(
            top.indices,
            torch.softmax(top.values, -1),
            probs=torch.softmax(noisy.detach(), -1),
            logits=cosine.detach(),
            feedback=(chosen.T @ x.detach()).flatten().float(),
        )

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        count = stats.offered[:, None]
        average = self.decay * self.mean + (1 - self.decay) * stats.feedback[: self.mean.numel()].view_as(
            self.mean
        ) / count.clamp(min=1)
        self.mean.copy_(torch.where(count > 0, average, self.mean))
