"""Balance without a balance loss: a bias per expert that affects selection only."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from moe.checks import finite, require
from moe.routers.base import LinearRouter, check_groups, largest
from moe.routing.decision import Context, Routing
from moe.routing.expected_load import bar_in_groups
from moe.routing.stats import RoutingStats


class BiasedSigmoid(LinearRouter):
    """Base class of routers that select the k largest s + b and weight by s alone, with s = sigmoid(W x).

    Subclasses learn the bias b in `after_step`. Gates are s over the selected experts, normalized to sum 1 if
    `normalize` is set (never for k=1), times `scale`. `probs` is s normalized over all experts, so that a balance loss
    can be added. With several `groups` of neighboring experts, a token chooses within the `top_groups` groups with the
    largest sum of their two largest s + b (DeepSeek-V3 2412.19437).

    rate: the size of a step of b, for subclasses that have one; None for others. `of_updates` names the other keys by
        which b learns. All of them are ignored if a token takes all experts, because b then selects nothing.
    """

    expects_load = True
    bias: Tensor
    of_updates: frozenset[str] = frozenset()

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int,
        rate: float | None = None,
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(rate is None or (finite(rate) and rate >= 0), "router.rate", rate, "a finite number >= 0")
        require(finite(scale) and scale > 0, "router.scale", scale, "a finite number > 0")
        check_groups(groups, top_groups, num_experts, k)
        self.k, self.rate, self.normalize, self.scale = k, rate, normalize, scale
        self.groups, self.top_groups = groups, top_groups
        if top_groups == groups != 1:  # the k largest experts are always in the selected groups
            self.same_as = {"groups": 1, "top_groups": 1}
        if k == 1:
            self.ignores |= {"router.normalize"}
        if k == num_experts:
            self.ignores |= self.of_updates | {"router.rate"}
        elif rate == 0:
            self.ignores |= self.of_updates
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        log_scores = self.log_scores(noisy)  # in logs, because a sum of scores can be 0
        scores = log_scores.exp()
        exact = self.exact_scores(noisy.detach().double())
        scores_for_choice = exact + self.bias
        if self.top_groups < self.groups:
            scores_for_choice = scores_for_choice.masked_fill(~self._open(scores_for_choice), -torch.inf)
        expert = largest(scores_for_choice, self.k, ties=noisy.detach())
        normalize = self.normalize and self.k > 1
        weight = log_scores.gather(-1, expert).softmax(-1) if normalize else scores.gather(-1, expert)
        return Routing.token_choice(
            expert,
            self.scale * weight,
            probs=log_scores.softmax(-1),
            logits=logits,
            aux=self.expected_load(logits, noisy, self.k, context),
            feedback=self.feedback(exact),
        )

    def bars(self, noisy: Float[Tensor, "T E"], k: int) -> Float[Tensor, "T E"]:
        """Return the logits at which s + b is the bar for s + b, infinite where all logits, or none, exceed it."""
        values = self.exact_scores(noisy.double()) + self.bias
        return self.logits_of(bar_in_groups(values, k, groups=self.groups, top_groups=self.top_groups) - self.bias)

    def log_scores(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return the logarithm of s, also where s itself would round to 0."""
        return F.logsigmoid(logits)

    def exact_scores(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return s. The logits are in fp64, because in fp32 the sigmoid is 1 for all logits above 17."""
        return torch.sigmoid(logits)

    def logits_of(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return the inverse of `exact_scores`: -inf and inf for scores below and above all that logits have."""
        within = (scores > 0) & (scores < 1)
        outside = torch.where(scores <= 0, -torch.inf, torch.inf)
        return torch.where(within, torch.logit(torch.where(within, scores, 0.5)), outside)

    def _open(self, scores: Float[Tensor, "T E"]) -> Bool[Tensor, "T E"]:
        """Return the mask of the experts in selected groups."""
        grouped = scores.unflatten(-1, (self.groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1])).values
        kept = largest(best.sum(-1), self.top_groups, ties=best[..., 0])
        is_kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, kept, True)
        return is_kept.repeat_interleave(grouped.shape[-1], -1)

    def feedback(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, " E"] | None:
        """Return sums over tokens from which `after_step` learns in addition to the loads, or None.

        scores: s in fp64.
        """
        return None


class SigmoidBias(BiasedSigmoid):
    """Router whose biases take a small step towards balance after each optimizer step (Wang 2408.15664; DeepSeek-V3).

    b_e += rate * sign(mean load - load_e), with the loads of the whole optimizer step. With update=proportional the
    sign is replaced by the difference relative to the mean load. Then b is centered, because adding a constant to it
    changes nothing. Expect load_cv to fall without a balance loss; `lb` is 0 by default. Causal.

    rate: how far a bias moves in a step.
    scores: sigmoid, or sqrt_softplus: s = sqrt(ln(1 + exp(W x))) as in DeepSeek-V4, which does not saturate.
    update: sign, or proportional to the load's distance from the mean.
    normalize: whether the gates of a token sum to 1, before `scale`.
    scale: a factor on the gates. DeepSeek-V3 has 2.5.
    groups: groups of neighboring experts, all equally large. 1: no groups.
    top_groups: groups per token whose experts can be chosen.
    """

    of_updates = frozenset(("router.update",))
    rate: float

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        rate: float = 1e-3,
        scores: Literal["sigmoid", "sqrt_softplus"] = "sigmoid",
        update: Literal["sign", "proportional"] = "sign",
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        grouping = {"groups": groups, "top_groups": top_groups}
        super().__init__(dim, num_experts, k=k, rate=rate, normalize=normalize, scale=scale, **grouping)
        self.update, self.scores = update, scores

    def log_scores(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        return super().log_scores(logits) if self.scores == "sigmoid" else log_softplus(logits) / 2

    def exact_scores(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        if self.scores == "sigmoid":
            return super().exact_scores(logits)
        return torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()

    def logits_of(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        if self.scores == "sigmoid":
            return super().logits_of(scores)
        softplus = scores.clamp(min=1e-150).square()  # its inverse is x + ln(1 - exp(-x))
        return torch.where(scores > 0, softplus + (-torch.expm1(-softplus)).log(), -torch.inf)

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        error = stats.offered.mean() - stats.offered
        step = error.sign() if self.update == "sign" else error / stats.offered.mean()
        self.bias += self.rate * step
        self.bias -= self.bias.mean()


def log_softplus(z: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return ln(ln(1 + exp(z))), which is z - exp(z)/2 + ... far below 0, where exp(z) may round to 0."""
    return torch.where(z < -20, z, F.softplus(z.clamp(min=-20)).log())
