"""Null experts: tokens may choose experts that do nothing, so the number of real experts varies."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.checks import finite, require
from moe.routers.base import Router
from moe.routing.decision import Context, Routing


class NullExperts(Router):
    """Router that takes the top-k of E experts and `nulls` null experts (AdaMoE, Zeng et al. 2406.13233).

    Logits are W x. Null experts come after the E real ones. They cost nothing and add nothing. A token therefore has
    0 ... k real experts, and k E / (E + nulls) on average if all are balanced. Gates are the softmax over the real
    experts selected. For a token with one real expert the gate is 1, and the router gets no gradient through the
    output.

    The auxiliary loss `null_balance`, with weight `balance`, balances all N = E + nulls choices: N * sum_n f_n P_n. P
    is the mean softmax over all choices. f is the share of each choice in the T k choices made; a null expert counts
    with the mean share of all nulls, because nulls need not be balanced among themselves. The loss is 1 if balanced. It
    replaces the balance loss, and `lb` is 0 by default.

    `probs` and `logits` are those of the real experts, so metrics and the z-loss ignore nulls. Expect
    active_experts_std above 0. Causal when dropless. Not causal under a capacity limit, which is a share of the number
    of assignments, and that number varies.

    k: choices per token, null experts included.
    nulls: number of null experts.
    balance: weight of the auxiliary loss.
    """

    expects_load = True

    def __init__(self, dim: int, num_experts: int, *, k: int = 4, nulls: int = 8, balance: float = 0.01) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        require(nulls >= 1, "router.nulls", nulls, "at least 1")
        choices = num_experts + nulls
        require(2 <= k <= choices, "router.k", k, f"between 2 and model.num_experts + router.nulls={choices}")
        require(finite(balance) and balance >= 0, "router.balance", balance, "a finite number >= 0")
        self.k = k
        self.mean_k = k * num_experts / choices
        self.balance = balance
        if k == choices:
            self.ignores = frozenset(("load",))
            self.why = "every token makes all choices"
        self.weight = nn.Parameter(torch.empty(choices, dim))

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"null_balance": self.balance}

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = F.linear(x, self.weight.to(x.dtype))
        noisy = self.add_noise(logits, context.knobs)
        chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, noisy.topk(self.k).indices, True)
        real, noisy_real = chosen[:, : self.num_experts], noisy[:, : self.num_experts]
        balance = self._balance(chosen, torch.softmax(noisy, -1))
        return Routing.masked(
            real,
            softmax_over(real, noisy_real),
            probs=torch.softmax(noisy_real, -1),
            logits=logits[:, : self.num_experts],
            aux={"null_balance": balance} | self.expected_load(logits, noisy, self.k, context),
        )

    def _balance(self, chosen: Bool[Tensor, "T N"], probs: Float[Tensor, "T N"]) -> Float[Tensor, ""]:
        share = chosen.float().mean(0) / self.k
        share[self.num_experts :] = share[self.num_experts :].mean()
        return len(share) * (share * probs.mean(0)).sum()


def softmax_over(chosen: Bool[Tensor, "T N"], logits: Float[Tensor, "T N"]) -> Float[Tensor, "T N"]:
    """Return the softmax of each row over its chosen entries, and over all entries if none is chosen."""
    gated = chosen | ~chosen.any(-1, keepdim=True)  # a row without any entry would have no softmax
    return torch.softmax(logits.masked_fill(~gated, -torch.inf), -1)
