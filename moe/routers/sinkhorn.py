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

    Known as S-BASE (Clark et al. 2202.01169). In the plan over the batch all tokens have equal mass, and all experts
    get equal mass. The plan is Sinkhorn's of logits / epsilon, noise included, without a gradient. It selects experts
    and never weights them. Gates are sigmoid(logit) for k=1, otherwise the softmax of the selected logits, so that
    evaluation with k > 1 equals `TopK`. The smaller epsilon is relative to the spread of the logits, the closer the
    plan is to the best balanced assignment, and the more iterations it needs.

    inference: use the plan in evaluation too.

    Expect a low load_cv in training; evaluation is greedy and can be less balanced. Use lb=0. Not causal: in training
    the experts of a token depend on the whole batch.
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
        require(iterations >= 1, "router.iterations", iterations, "at least 1")
        self.k, self.epsilon, self.iterations, self.inference = k, epsilon, iterations, inference

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.perturb(logits, context.knobs)
        planned = self.training or self.inference
        order = log_plan(noisy.detach() / self.epsilon, self.iterations) if planned else noisy
        expert = order.topk(self.k).indices
        top = noisy.gather(-1, expert)
        weight = torch.sigmoid(top) if self.k == 1 else torch.softmax(top, -1)
        return Routing.token_choice(expert, weight, probs=torch.softmax(noisy, -1), logits=logits)


def log_plan(scores: Float[Tensor, "T E"], iterations: int) -> Float[Tensor, "T E"]:
    """Return the logarithm of the transport plan of exp(scores), after `iterations` of Sinkhorn's algorithm.

    Rows are scaled to sum 1/T and columns to sum 1/E in turn. Columns are scaled last; rows sum to 1/T in the limit.
    """
    tokens, experts = scores.shape
    for _ in range(iterations):
        scores = scores.log_softmax(1) - math.log(tokens)
        scores = scores.log_softmax(0) - math.log(experts)
    return scores


def plain_plan(scores: Float[Tensor, "T E"], iterations: int) -> Float[Tensor, "T E"]:
    """Return what `log_plan` returns, computed by scaling exp(scores) itself.

    Entries too small for fp32 relative to the best expert of their token are lost.
    """
    tokens, experts = scores.shape
    tiny = torch.finfo(scores.dtype).tiny
    plan = (scores - scores.amax(1, keepdim=True)).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True).clamp(min=tiny) / tokens
        plan = plan / plan.sum(0, keepdim=True).clamp(min=tiny) / experts
    return plan.clamp(min=tiny).log()
