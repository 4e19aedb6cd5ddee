"""Balance without a balance loss: a bias per expert that affects selection only."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.checks import finite, require
from moe.routers.base import LinearRouter, largest
from moe.routing.decision import Context, Routing
from moe.routing.stats import RoutingStats


class BiasedSigmoid(LinearRouter):
    """Base class of routers that select the k largest s + b and weight by s alone, with s = sigmoid(W x).

    Subclasses learn the bias b in `after_step`. Gates are s over the selected experts, normalized to sum 1 if
    `normalize` is set (never for k=1). `probs` is s normalized over all experts, so that a balance loss can be added.
    """

    bias: Tensor

    def __init__(self, dim: int, num_experts: int, *, k: int, normalize: bool = True) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        self.k, self.normalize = k, normalize
        if k == 1:
            self.ignores = frozenset(("router.normalize",))
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        log_scores = F.logsigmoid(noisy)  # in logs, because a sum of scores can be 0
        scores = log_scores.exp()
        exact = torch.sigmoid(noisy.detach().double())  # in fp32 it is 1 for all logits above 17
        expert = largest(exact + self.bias, self.k, ties=noisy.detach())
        normalize = self.normalize and self.k > 1
        weight = log_scores.gather(-1, expert).softmax(-1) if normalize else scores.gather(-1, expert)
        probs = log_scores.softmax(-1)
        return Routing.token_choice(expert, weight, probs=probs, logits=logits, feedback=self.feedback(exact))

    def feedback(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "E"] | None:
        """Return sums over tokens from which `after_step` learns in addition to the loads, or None.

        scores: s in fp64.
        """
        return None


class SigmoidBias(BiasedSigmoid):
    """Router whose biases take a small step towards balance after each optimizer step (Wang 2408.15664; DeepSeek-V3).

    b_e += rate * sign(mean load - load_e), with the loads of the whole optimizer step. With update=proportional the
    sign is replaced by the difference relative to the mean load. Then b is centered, because adding a constant to it
    changes nothing. Expect load_cv to fall without a balance loss; use lb=0. Causal.

    rate: how far a bias moves in a step.
    update: sign, or proportional to the load's distance from the mean.
    normalize: whether the gates of a token sum to 1.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        rate: float = 1e-3,
        update: Literal["sign", "proportional"] = "sign",
        normalize: bool = True,
    ) -> None:
        super().__init__(dim, num_experts, k=k, normalize=normalize)
        require(finite(rate) and rate >= 0, "router.rate", rate, "a finite number >= 0")
        self.rate, self.update = rate, update
        if k == num_experts:
            self.ignores |= {"router.rate"}
        if k == num_experts or rate == 0:
            self.ignores |= {"router.update"}

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        error = stats.offered.mean() - stats.offered
        step = error.sign() if self.update == "sign" else error / stats.offered.mean()
        self.bias += self.rate * step
        self.bias -= self.bias.mean()
