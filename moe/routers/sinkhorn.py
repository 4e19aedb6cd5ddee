"""Balanced assignment in training by optimal transport, greedy routing afterwards."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import finite, require
from moe.routers.base import LinearRouter
from moe.routing.decision import Context, Routing


class Sinkhorn(LinearRouter):
    """In training each token takes the k largest entries of a transport plan over the batch, in which tokens have equal
    mass and experts get equal mass (S-BASE, Clark et al. 2202.01169); in evaluation the k largest logits.

    The plan is Sinkhorn's of logits / epsilon, noise included, without gradient; it selects and never weights. Gates:
    sigmoid(logit) for k=1, else the softmax of the selected logits, so that in evaluation it is `TopK`. The smaller
    epsilon beside the spread of the logits, the closer the plan is to the best balanced assignment, and the more
    iterations it takes. `inference` uses the plan in evaluation too. Not causal: in training a token's experts depend
    on the whole batch. Use lb=0.
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
    """Scale rows and columns of exp(scores) in turn, in logs: columns sum to 1/E, rows to 1/T in the limit."""
    tokens, experts = scores.shape
    for _ in range(iterations):
        scores = scores.log_softmax(1) - math.log(tokens)
        scores = scores.log_softmax(0) - math.log(experts)
    return scores


def plain_plan(scores: Float[Tensor, "T E"], iterations: int) -> Float[Tensor, "T E"]:
    """`log_plan` by scaling exp(scores) itself: what is too small for fp32 beside the best of its token is lost."""
    tokens, experts = scores.shape
    tiny = torch.finfo(scores.dtype).tiny
    plan = (scores - scores.amax(1, keepdim=True)).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True).clamp(min=tiny) / tokens
        plan = plan / plan.sum(0, keepdim=True).clamp(min=tiny) / experts
    return plan.clamp(min=tiny).log()
