"""Oracle routing: the domain of a text says which experts are open to its tokens."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import ConfigError, require
from moe.routers.topk import TopK
from moe.routing.decision import Context, Routing, TrainingText


class Oracle(TopK):
    """`TopK` among the experts of the text's domain, which the data tell: a reference for specialization (2604.07030).

    The E experts are shared out among the N domains of the data in order, E/N to each, rounded up or down: expert e
    belongs to domain floor(e N / E). A token takes the k experts of largest logit W x among those of its domain. With k
    experts for each domain, the label alone decides. p is the softmax over the experts of the domain.

    A label is no token: it comes with the text, before its first token. So the router is causal, but it knows more than
    a model that has to find out the domain while it reads. It cannot route a text without a label. The domains that
    `data.train_domains` leaves out keep their experts, which then do not train.

    label: domain, or shuffled_domain: the same labels shuffled over the blocks of the text. Loads stay, and so does the
        length for which a label holds, but a label says nothing about the text. A gain of one over the other is due to
        what the label says.
    gate: the weight of a selected expert, as in `TopK`.
    """

    owner: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 1,
        label: Literal["domain", "shuffled_domain"] = "domain",
        gate: Literal["renorm", "softmax_all", "uniform"] = "renorm",
    ) -> None:
        super().__init__(dim, num_experts, k=k, gate=gate)
        self.label = label
        self.told = frozenset((label,))
        self.register_buffer("owner", torch.zeros(num_experts, dtype=torch.long))

    def check_domains(self, domains: Sequence[str]) -> None:
        number, listed = len(domains), ", ".join(domains)
        if number < 2:
            raise ConfigError(
                f"router.label={self.label}: the text has one domain ({listed}); an oracle needs two or more"
            )
        require(self.num_experts >= number, "model.num_experts", self.num_experts, f"at least {number}, for {listed}")
        most = self.num_experts // number
        allowed = f"at most {most}: some of the {number} domains have {most} of the {self.num_experts} experts"
        require(self.k <= most, "router.k", self.k, allowed)

    def before_training(self, text: TrainingText) -> None:
        self.check_domains(text.domains)
        experts = torch.arange(self.num_experts)
        self.owner.copy_(experts * len(text.domains) // self.num_experts)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        closed = self.owner != context.label(self.label)[:, None]
        return self.choose(self.add_noise(logits, context.knobs).masked_fill(closed, -torch.inf), logits, context)
