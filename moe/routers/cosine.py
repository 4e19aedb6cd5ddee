"""Cosine routing: neither the length of a hidden state nor that of an expert embedding matters."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import finite, require
from moe.routers.base import Router, renormalized_top
from moe.routing.decision import Context, Routing

MIN_TAU = 0.01


class CosineRouter(Router):
    """Router that takes the top-k of cos(P x, e) / tau (X-MoE, Chi et al. 2204.09179).

    P projects to `proj_dim` dimensions, and e are the expert embeddings. The temperature tau is learned, as its
    logarithm, and never falls below 0.01. It alone sets the scale of the logits, which stay within +-1/tau. Gates are
    the softmax over the selected experts. With k=1 they are the softmax over all experts, because the gate would
    otherwise be the constant 1 and the router would get no gradient. Causal.

    proj_dim: dimensions of the space in which the cosine is taken.
    tau: the temperature before training.
    """

    expects_load = True

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, proj_dim: int = 16, tau: float = 0.3) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(1 <= proj_dim <= dim, "router.proj_dim", proj_dim, f"between 1 and model.dim={dim}")
        require(finite(tau) and tau >= MIN_TAU, "router.tau", tau, f"a finite number >= {MIN_TAU}")
        self.k = k
        if num_experts == 1:
            self.ignores = frozenset(("noise",))
        self.projection = nn.Parameter(torch.empty(proj_dim, dim))
        self.embedding = nn.Parameter(torch.empty(num_experts, proj_dim))
        self.log_tau = nn.Parameter(torch.full((1,), math.log(tau)))

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        direction = F.normalize(F.linear(x, self.projection.to(x.dtype)), dim=-1)
        cosine = F.linear(direction, F.normalize(self.embedding.to(x.dtype), dim=-1))
        logits = cosine / self.log_tau.to(x.dtype).clamp(min=math.log(MIN_TAU)).exp()
        noisy = self.add_noise(logits, context.knobs)
        probs, expert, weight = renormalized_top(noisy, self.k)
        aux = self.expected_load(logits, noisy, self.k, context)
        return Routing.token_choice(expert, weight, probs=probs, logits=logits, aux=aux)
