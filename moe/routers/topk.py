"""Top-k softmax routing, with and without a temperature."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import finite, require
from moe.routers.base import LinearRouter
from moe.routing.decision import Context, Routing, picked


class TopK(LinearRouter):
    """Router in which each token takes the k experts of largest logit W x (Shazeer 1701.06538; k=1: Switch 2101.03961).

    Expect imbalance (a high load_cv) unless a balance loss is used. Causal.

    gate: the weight of a selected expert, with p = softmax over all experts.
        renorm: p divided by its sum over the selected experts (Mixtral). With k=1 that would be the constant 1 and give
            the router no gradient, so k=1 always uses p itself.
        softmax_all: p itself.
        uniform: 1/k in the forward pass; the gradient is that of p (straight through).
    jitter: in training, each number that the router reads is multiplied by a random one, uniform on 1 +- jitter
        (0.01 in Switch). Experts read the numbers themselves. Unlike the knob `noise`, it is in proportion to them.
    after_drops: if a token loses experts to a capacity limit, renormalize its weights to sum 1 over those it keeps.
    """

    ignores_without_capacity = frozenset(("router.after_drops",))
    expects_load = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        gate: Literal["renorm", "softmax_all", "uniform"] = "renorm",
        after_drops: bool = False,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(0 <= jitter < 1, "router.jitter", jitter, "at least 0, below 1")
        self.jitter = jitter
        require(not after_drops or k > 1, "router.after_drops", after_drops, "false for router.k=1, whose gate is p")
        self.k = k
        self.gate = gate
        self.after_drops = after_drops
        if num_experts == 1:
            self.ignores = frozenset(("noise", "router.gate"))
        elif k in (1, num_experts) and gate != "uniform":  # p itself has the sum 1 if all experts are selected
            self.ignores = frozenset(("router.gate",))

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        if self.jitter and self.training:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self.logits(x)
        return self.choose(self.add_noise(logits, context.knobs), logits, context)

    def choose(self, noisy: Float[Tensor, "T E"], logits: Float[Tensor, "T E"], context: Context) -> Routing:
        """Return the k experts of largest `noisy`, which is -inf for experts that are out of the question."""
        tempered = noisy / context.knobs.temperature if self.schedulable else noisy
        probs = torch.softmax(tempered, -1)
        expert = noisy.topk(self.k).indices  # not of probs, which at low temperature round to ties
        weight = self._gate(picked(probs, expert))
        log_weight = picked(tempered, expert).flatten() if self.after_drops else None
        aux = self.expected_load(logits.masked_fill(noisy == -torch.inf, -torch.inf), noisy, self.k, context)
        return Routing.token_choice(expert, weight, probs=probs, logits=logits, log_weight=log_weight, aux=aux)

    def _gate(self, top: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
        if self.gate == "uniform":
            return 1 / self.k + top - top.detach()
        if self.gate == "renorm" and self.k > 1:
            return top / top.sum(-1, keepdim=True)
        return top


class Temperature(TopK):
    """`TopK` with p = softmax(logits / temp). A temperature schedule ends at `temp`.

    Temperature never changes which experts have the largest logits. It acts through gate weights, the balance loss and
    the size of the router's gradient (1/temp), so it can change the load only through training. Entropy and confidence
    are reported both at `temp` and at temperature 1. Causal.

    temp: temperature by which logits are divided; a temperature schedule ends at it.
    """

    schedulable = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        gate: Literal["renorm", "softmax_all", "uniform"] = "renorm",
        temp: float = 1.0,
    ) -> None:
        require(finite(temp) and temp > 0, "router.temp", temp, "a finite number > 0")
        super().__init__(dim, num_experts, k=k, gate=gate)
        self.temp = temp
        if num_experts == 1:
            self.ignores |= {"router.temp"}
