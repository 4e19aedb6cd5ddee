"""MoE++: experts that cost nothing, which return zero, their input or a learned vector; routing scores as residuals."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.checks import finite, require
from moe.routers.base import Role, Router
from moe.routers.null_experts import softmax_over
from moe.routing.decision import Context, Routing


class MoEPlusPlus(Router):
    """Router that takes the top-k of E experts and some that compute nothing (MoE++, Jin et al. 2410.07348).

    After the E experts come `copy` copy experts, which return x, `constant` constant experts, which return
    a_1 x + a_2 v with (a_1, a_2) = softmax(W_c x) and a learned vector v (eq. 5), and `zero` zero experts, which return
    0 (eq. 3). Logits are z = W x + W_g z', where z' are the logits of the previous MoE layer, 0 in the first (eq. 6).

    Gates are the softmax over the choices that are not zero experts, as in the authors' code. So a zero expert beside a
    single expert leaves that one the gate 1. A token has 0 ... k of the E experts.

    The auxiliary loss `heterogeneous_balance`, with weight `balance`, is (sum_s 1/eta_s) sum_s eta_s f_s P_s over all
    choices s. eta is 1 for experts and `tau` for those that compute nothing, f is the share in the T k choices made,
    and P the mean softmax over all choices (eq. 7, scaled so that 1 is balanced). With a small tau more tokens choose
    experts that compute nothing. The loss replaces the balance loss, and `lb` is 0 by default. The paper's capacities
    by kind of expert do not exist here.

    `probs` and `logits` are those of the E experts. Expect active_experts_std above 0. Causal when dropless. Not causal
    under a capacity limit, which is a share of the number of assignments, and that number varies.

    k: choices per token, those that compute nothing included.
    zero: number of zero experts.
    copy: number of copy experts.
    constant: number of constant experts.
    residual: whether the logits of the previous MoE layer are added.
    tau: weight of choices that compute nothing in the balance loss.
    balance: weight of the auxiliary loss.
    """

    adds_output = True
    expects_load = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        zero: int = 1,
        copy: int = 1,
        constant: int = 2,
        residual: bool = True,
        tau: float = 0.75,
        balance: float = 0.01,
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        for name, number in (("zero", zero), ("copy", copy), ("constant", constant)):
            require(number >= 0, f"router.{name}", number, "at least 0")
        require(zero + copy + constant >= 1, "router.zero", zero, "at least 1 without copy and constant experts")
        choices = num_experts + zero + copy + constant
        allowed = f"between 2 and {choices}, the number of all experts"
        require(2 <= k <= choices, "router.k", k, allowed)
        require(finite(tau) and tau > 0, "router.tau", tau, "a finite number > 0")
        require(finite(balance) and balance >= 0, "router.balance", balance, "a finite number >= 0")
        self.k, self.zero, self.copy, self.tau, self.balance = k, zero, copy, tau, balance
        self.mean_k = k * tau * num_experts / (tau * num_experts + choices - num_experts)
        if k == choices:
            self.ignores = frozenset(("load",))
            self.why = "every token makes all choices"
        self.weight = nn.Parameter(torch.empty(choices, dim))
        self.residual = nn.Parameter(torch.empty(choices, choices)) if residual else None
        self.constant = nn.Parameter(torch.empty(constant, dim)) if constant else None
        self.proportion = nn.Parameter(torch.empty(constant, 2, dim)) if constant else None

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"heterogeneous_balance": self.balance}

    @property
    def expert_rows(self) -> None:
        """None: the rows of `weight` produce logits together with the residuals, and some are of no real expert."""
        return None

    def role(self, name: str, p: nn.Parameter) -> Role:
        return "other" if name == "constant" else super().role(name, p)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = F.linear(x, self.weight.to(x.dtype))
        if self.residual is not None:
            before = torch.zeros_like(logits) if context.state is None else context.state
            logits = logits + F.linear(before, self.residual.to(x.dtype))
        noisy = self.add_noise(logits, context.knobs)
        chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, noisy.topk(self.k).indices, True)
        loud = len(self.weight) - self.zero
        gates = softmax_over(chosen[:, :loud], noisy[:, :loud]) * chosen[:, :loud]
        real, balance = slice(0, self.num_experts), self._balance(chosen, torch.softmax(noisy, -1))
        return Routing.masked(
            chosen[:, real],
            gates[:, real],
            probs=torch.softmax(noisy[:, real], -1),
            logits=logits[:, real],
            aux={"heterogeneous_balance": balance} | self.expected_load(logits, noisy, self.k, context),
            state=None if self.residual is None else logits,
            added=self._without_computation(x, gates[:, self.num_experts :]),
        )

    def _without_computation(self, x: Float[Tensor, "T D"], gates: Float[Tensor, "T N"]) -> Float[Tensor, "T D"]:
        """Return the weighted sum of the outputs of copy and constant experts."""
        kept = gates[:, : self.copy].sum(-1)
        if self.constant is None or self.proportion is None:
            return kept[:, None] * x
        gates = gates[:, self.copy :]
        share = torch.softmax(torch.einsum("td,cpd->tcp", x, self.proportion.to(x.dtype)), -1)
        kept = kept + (gates * share[..., 0]).sum(-1)
        return kept[:, None] * x + (gates * share[..., 1]) @ self.constant.to(x.dtype)

    def _balance(self, chosen: Bool[Tensor, "T N"], probs: Float[Tensor, "T N"]) -> Float[Tensor, ""]:
        products = chosen.to(probs.dtype).mean(0) / self.k * probs.mean(0)
        real, others = products[: self.num_experts].sum(), products[self.num_experts :].sum()
        number = len(products) - self.num_experts
        return (self.num_experts + number / self.tau) * (real + self.tau * others)
