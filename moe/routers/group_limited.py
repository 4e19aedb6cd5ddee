"""Group-limited top-k: the experts of a token come from few groups, so that a token is sent to few devices."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moe.routers.base import check_groups, largest
from moe.routers.topk import TopK
from moe.routing.decision import Context, Routing, picked
from moe.routing.expected_load import bar_in_groups


class GroupLimited(TopK):
    """Router that takes the top-k experts within the best `top_groups` of `groups` groups.

    Groups are equally large and consist of neighboring experts. The score of a group is the sum of its two largest
    probabilities (DeepSeek-V3 2412.19437; DeepSeek-V2 2405.04434 uses the largest). Gates are those of `TopK`. `probs`
    covers all experts, so a balance loss also acts on experts in groups that were not selected. Causal.

    groups: groups of experts, all equally large.
    top_groups: groups per token whose experts can be chosen.
    gate: the weight of a selected expert: renorm, softmax_all or uniform, see `TopK`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        groups: int = 4,
        top_groups: int = 2,
        gate: Literal["renorm", "softmax_all", "uniform"] = "renorm",
    ) -> None:
        super().__init__(dim, num_experts, k=k, gate=gate)
        check_groups(groups, top_groups, num_experts, k)
        self.groups, self.top_groups, self.size = groups, top_groups, num_experts // groups
        if top_groups == groups or self.size == 1:  # the k largest experts are always in the selected groups
            self.same_as = {"groups": 1, "top_groups": 1}

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        probs = torch.softmax(noisy, -1)
        expert = noisy.masked_fill(~self._open(noisy.detach()), -torch.inf).topk(self.k).indices
        aux = self.expected_load(logits, noisy, self.k, context)
        return Routing.token_choice(expert, self._gate(picked(probs, expert)), probs=probs, logits=logits, aux=aux)

    def bars(self, noisy: Float[Tensor, "T E"], k: int) -> Float[Tensor, "T E"]:
        """Return the bars of choosing groups first. They are found for exp(logit), which the scores of groups add."""
        exact = noisy.double()
        largest_logit = exact.detach().amax(-1, keepdim=True)
        values = (exact - largest_logit).exp()
        bars = bar_in_groups(values, k, groups=self.groups, top_groups=self.top_groups)
        return torch.where(bars > 0, largest_logit + bars.clamp(min=1e-300).log(), -torch.inf)

    def _open(self, logits: Float[Tensor, "T E"]) -> Tensor:
        """Return the mask (T, E) of the experts in selected groups.

        Groups are compared by the logarithm of their scores. It does not underflow, and if two are still equal, their
        second logits differ.
        """
        grouped = logits.double().unflatten(-1, (self.groups, self.size))
        best = grouped.topk(min(2, self.size)).values
        kept = largest(best.logsumexp(-1), self.top_groups, ties=best[..., -1])
        is_kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, kept, True)
        return is_kept.repeat_interleave(self.size, -1)
