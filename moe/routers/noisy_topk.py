"""Noisy top-k: the router learns how much noise each of its logits gets."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import finite, require
from moe.routers.topk import TopK
from moe.routing.decision import Context, Routing, picked
from moe.routing.expected_load import cv_squared, stay_probability

FLOOR = 0.01  # smallest standard deviation of the learned noise, as in the authors' code: the loss divides by it


class NoisyTopK(TopK):
    """Router that takes the top-k of logits with learned noise (Shazeer et al. 1701.06538).

    H = W x + eps * (softplus(W_noise x) + 0.01), with eps ~ N(0, 1) in training and 0 in evaluation. Gates are the
    softmax of H over the selected experts (k=1: over all, as in `TopK`). Two losses balance the load; `lb` is 0 by
    default:
        importance: weight of CV^2 over experts of the sum of gates.
        load: weight of CV^2 over experts of the expected number of tokens if the noise of that expert were drawn again.
            Unlike a count of tokens it has a gradient.
    The knob `noise` adds its N(0, noise^2) as in every router, and the loss `load` takes it into account. Causal.
    """

    expects_load = False  # its own loss `router.load` knows the noise that it learns

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, importance: float = 0.1, load: float = 0.1) -> None:
        for name, weight in (("importance", importance), ("load", load)):
            require(finite(weight) and weight >= 0, f"router.{name}", weight, "a finite number >= 0")
        super().__init__(dim, num_experts, k=k)
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))
        self.importance, self.load = importance, load
        if k == num_experts:  # every expert stays among the k
            self.ignores |= {"router.load"}
        if num_experts == 1:
            self.ignores |= {"router.importance"}

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"importance": self.importance, "load": self.load}

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        spread = F.softplus(F.linear(x, self.noise_weight.to(x.dtype))) + FLOOR
        noisy = self.add_noise(logits, context.knobs)
        if self.training:
            noisy = noisy + spread * torch.randn_like(spread)
        probs = torch.softmax(noisy, -1)
        expert = noisy.topk(self.k).indices
        weight = self._gate(picked(probs, expert))
        gates = torch.zeros_like(probs).scatter(-1, expert, weight)
        noise = context.knobs.noise
        both = spread if noise is None else torch.hypot(spread, noise)
        staying = stay_probability(logits, self.bars(noisy, self.k), both)
        aux = {"importance": cv_squared(gates.sum(0)), "load": cv_squared(staying.sum(0))}
        return Routing.token_choice(expert, weight, probs=probs, logits=logits, aux=aux)
