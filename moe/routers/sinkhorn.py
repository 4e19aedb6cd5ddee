"""Sinkhorn routing: balanced assignment by optimal transport in training, greedy routing in evaluation."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import finite, require
from moe.routers.base import LinearRouter
from moe.routing.decision import Context, Routing


class Sinkhorn(LinearRouter):
    """Router that takes the top-k of a transport plan in training, and of the logits in evaluation.

    Known as S-BASE (Clark et al. 2202.01169). The plan is a matrix (tokens of the micro-batch x experts). Every row has
    the same sum, and every column has the same sum. It is computed with Sinkhorn's algorithm from (noisy logits) /
    epsilon, in fp64. No gradient flows through it. If epsilon is small compared with the spread of the logits, the plan
    is close to the best balanced assignment but needs more iterations.

    The plan only decides which experts are chosen. It does not affect gate weights. These are sigmoid(logit) for k=1,
    otherwise the softmax of the chosen logits. With k > 1, evaluation therefore equals `TopK`.

    inference: use the plan in evaluation too. Text is then generated with use_cache=False, because a plan for a single
        new token would give every token the same experts.

    Expect a low load_cv in training. Evaluation takes the largest logits and can be less balanced. `lb` is 0 by
    default, because the plan already balances the load. Not causal: in training the experts of a token depend on the
    whole micro-batch.

    epsilon: temperature of the plan.
    iterations: iterations of Sinkhorn's algorithm.
    """

    causal = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        epsilon: float = 1.0,
        iterations: int = 10,
        inference: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(finite(epsilon) and epsilon > 0, "router.epsilon", epsilon, "a finite number > 0")
        require(1 <= iterations <= 1000, "router.iterations", iterations, "between 1 and 1000")
        self.k, self.epsilon, self.iterations, self.inference = k, epsilon, iterations, inference
        if k == num_experts:  # no expert is left to be chosen
            self.ignores = frozenset(("router.epsilon", "router.iterations", "router.inference"))

    @property
    def causal_in_evaluation(self) -> bool:
        return not self.inference

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        planned = self.training or self.inference
        selection_scores = log_plan(noisy.detach().double() / self.epsilon, self.iterations) if planned else noisy
        expert = selection_scores.topk(self.k).indices
        top = noisy.gather(-1, expert)
        weight = torch.sigmoid(top) if self.k == 1 else torch.softmax(top, -1)
        return Routing.token_choice(expert, weight, probs=torch.softmax(noisy, -1), logits=logits)


def log_plan(scores: Float[Tensor, "T E"], iterations: int) -> Float[Tensor, "T E"]:
    """Return the logarithm of the plan that `iterations` of Sinkhorn's algorithm make of exp(scores).

    Each iteration scales the rows to sum 1/T, then the columns to sum 1/E. In the result the columns sum to 1/E, and
    the rows approach 1/T with more iterations.
    """
    tokens, experts = scores.shape
    for _ in range(iterations):
        scores = scores.log_softmax(1) - math.log(tokens)
        scores = scores.log_softmax(0) - math.log(experts)
    return scores


def plain_plan(scores: Float[Tensor, "T E"], iterations: int) -> Float[Tensor, "T E"]:
    """Return what `log_plan` returns, computed with exp(scores) instead of logarithms.

    `Spectra` uses it with log_sinkhorn_enabled=false. Entries that are too small for fp32, compared with the token's
    largest entry, become zero.
    """
    tokens, experts = scores.shape
    tiny = torch.finfo(scores.dtype).tiny
    plan = (scores - scores.amax(1, keepdim=True)).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True).clamp(min=tiny) / tokens
        plan = plan / plan.sum(0, keepdim=True).clamp(min=tiny) / experts
    return plan.clamp(min=tiny).log()
