"""Expert choice: experts choose tokens, which gives perfect balance but is not causal."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.routers.base import LinearRouter
from moe.routing.decision import Context, Routing
from moe.routing.dispatch import capacity_per_expert


class ExpertChoice(LinearRouter):
    """Router in which each expert takes the tokens that score highest for it (Zhou et al. 2202.09368).

    With p = softmax(W x), each expert takes the ceil(capacity_factor * T / E) tokens of largest p. T is the number of
    tokens in the micro-batch. The gate weight is p, not renormalized. A token gets 0 ... E experts, `capacity_factor`
    on average. `capacity_factor` alone limits what an expert takes; the key `capacity` does not apply.

    All loads are equal, so load_cv is 0, and `lb` and `lb_global` do not apply: these losses are the constant 1. Tokens
    that no expert takes are counted by unrouted_rate. Not causal: whether an expert takes a token depends on all other
    tokens of the micro-batch. Results therefore change with its size, and a token alone gets every expert. Text is
    generated with use_cache=False, so that experts choose from the text so far. `ExpertThreshold` is a causal form of
    this router.

    capacity_factor: mean number of experts per token.
    """

    causal = False
    ignores = frozenset(("lb", "lb_global", "capacity"))
    why = "each expert takes equally many tokens"

    def __init__(self, dim: int, num_experts: int, *, capacity_factor: float = 2.0) -> None:
        allowed = f"above 0, at most model.num_experts={num_experts}"
        require(0 < capacity_factor <= num_experts, "router.capacity_factor", capacity_factor, allowed)
        super().__init__(dim, num_experts, fixed_k=num_experts if capacity_factor == num_experts else None)
        self.capacity_factor = self.mean_k = capacity_factor
        if num_experts == 1:
            self.ignores |= {"noise"}

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        probs = torch.softmax(noisy, -1)
        quota = capacity_per_expert(len(x), self.num_experts, self.capacity_factor)
        token = log_odds(noisy.detach()).topk(quota, dim=0).indices
        expert = torch.arange(self.num_experts, device=x.device).expand_as(token)
        weight = probs.gather(0, token)
        return Routing(token.flatten(), expert.flatten(), weight.flatten(), probs=probs, logits=logits)


def log_odds(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return ln(p / (1 - p)) for p = softmax(logits), in fp64.

    It is ordered as p is, but does not round to equal numbers where p is near 0 or 1.
    """
    logits = logits.double()
    top, index = logits.max(-1, keepdim=True)
    log_probs = torch.log_softmax(logits, -1)
    odds = log_probs - torch.log1p(-log_probs.exp())  # inaccurate only for the largest p
    return odds.scatter(-1, index, top - logits.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True))
