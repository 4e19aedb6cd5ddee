"""A varying number of experts per token, by letting tokens choose nothing."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.checks import finite, require
from moe.routers.base import Router
from moe.routing.decision import Context, Routing


class NullExperts(Router):
    """Each token takes its k largest of E + `nulls` logits W x; slots after the E-th are null experts, which cost and
    add nothing, so a token has 0 ... k experts, k E / (E + nulls) on average when balanced (AdaMoE, Zeng 2406.13233).

    Gates are the softmax of the logits of the real experts selected: 1 for a token with a single one, which gives the
    router no gradient through the output. Balance over all slots is the auxiliary loss `null_balance`, with weight
    `balance`: S * sum_s f_s P_s over the S = E + nulls slots, f a slot's share of the T k choices, for nulls their mean
    share (no need to balance them among each other), P the mean softmax over all slots; 1 is balanced. It replaces
    `lb`: use lb=0. `probs` and `logits` are those of the real experts, so that metrics, and `z`, are of them alone. A
    capacity limit is a share of the batch's assignments, which vary here: causal when dropless.
    """

    def __init__(self, dim: int, num_experts: int, *, k: int = 4, nulls: int = 8, balance: float = 0.01) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        require(nulls >= 1, "router.nulls", nulls, "at least 1")
        slots = num_experts + nulls
        require(2 <= k <= slots, "router.k", k, f"between 2 and model.num_experts + router.nulls={slots}")
        require(finite(balance) and balance >= 0, "router.balance", balance, "a finite number >= 0")
        self.slots_per_token = k
        self.mean_k = k * num_experts / slots
        self.balance = balance
        self.weight = nn.Parameter(torch.empty(slots, dim))

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"null_balance": self.balance}

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = F.linear(x, self.weight.float())
        noisy = self.perturb(logits, context.knobs)
        chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, noisy.topk(self.slots_per_token).indices, True)
        real, noisy_real = chosen[:, : self.num_experts], noisy[:, : self.num_experts]
        gated = real | ~real.any(-1, keepdim=True)  # a row of nothing would have no softmax
        return Routing.masked(
            real,
            torch.softmax(noisy_real.masked_fill(~gated, -torch.inf), -1),
            probs=torch.softmax(noisy_real, -1),
            logits=logits[:, : self.num_experts],
            aux={"null_balance": self._balance(chosen, torch.softmax(noisy, -1))},
        )

    def _balance(self, chosen: Bool[Tensor, "T S"], probs: Float[Tensor, "T S"]) -> Float[Tensor, ""]:
        share = chosen.float().mean(0) / self.slots_per_token
        share[self.num_experts :] = share[self.num_experts :].mean()
        return len(share) * (share * probs.mean(0)).sum()
