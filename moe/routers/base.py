"""What every router is: a module from hidden states to a `Routing`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe.checks import require
from moe.routing.decision import Context, Knobs, Routing
from moe.routing.stats import RoutingStats


class Router(nn.Module):
    """Maps (T, D) hidden states to assignments; subclasses implement `forward`.

    causal: whether a token's routing, in training and in evaluation, is independent of later tokens and of other
        sequences; audited by the contract test and printed beside the router's name everywhere.
    schedulable: whether the knob `temperature` acts on it.
    mean_k: experts that a token is to use on average, where their number varies; None if no one can say beforehand.
    """

    causal: bool = True
    schedulable: bool = False
    mean_k: float | None = None

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        raise NotImplementedError

    def is_causal(self, *, capacity: float | None, drop: str) -> bool:
        """`causal`, under a capacity limit as well: if it drops by position, and if the number of assignments, of which
        the limit is a share, does not depend on later tokens."""
        return self.causal and (capacity is None or (drop == "position" and hasattr(self, "k")))

    @property
    def chain(self) -> "list[Router]":
        """The routers that a layer asks in turn, each seeing what the experts of the one before have added."""
        return [self]

    def experts_per_token(self, seq_len: int) -> float:
        """How many experts work for a token of a sequence of `seq_len`; where that varies, how many are to work on
        average, or can at most if no one can say."""
        k = getattr(self, "k", self.mean_k)
        return float(self.num_experts if k is None else k)

    def mixing_flops(self) -> int:
        """Forward FLOPs of a token beyond 2 per matrix weight."""
        return 0

    def before_training(self, counts: Int[Tensor, "V"]) -> None:
        """Learn from how often each token id occurs in the training text, once, before the first step.

        What it changes must be a persistent buffer, so that checkpoints hold it.
        """

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each auxiliary loss that this router alone has, by name; it may change from step to step.

        Of a loss that all routers share, what this one adds to the weight of the configuration.
        """
        return {}

    @property
    def rows(self) -> Float[Tensor, "E D"] | None:
        """The matrix whose rows give the experts' logits, for losses on its geometry; None if there is none."""
        weight = getattr(self, "weight", None)
        matches = isinstance(weight, nn.Parameter) and weight.shape == (self.num_experts, self.dim)
        return weight if matches else None

    @property
    def directions(self) -> Float[Tensor, "E N"] | None:
        """One vector an expert by which this router tells experts apart, for metrics; None if there are none."""
        return self.rows

    def share(self, first: "Router") -> None:
        """Take from the router of the model's first MoE layer the modules that all layers have in common."""

    def initialize(self, std: float) -> None:
        """N(0, std) for every matrix; other parameters and buffers stay as the constructor left them."""
        for p in self.parameters():
            if p.ndim >= 2:
                nn.init.normal_(p, std=std)

    def after_step(self, stats: RoutingStats) -> None:
        """Learn without gradient, once per optimizer step, from this layer's sums over all tokens of the step.

        Never called in evaluation. What it changes must be a persistent buffer, so that checkpoints hold it.
        """

    def perturb(self, logits: Float[Tensor, "T E"], knobs: Knobs) -> Float[Tensor, "T E"]:
        """logits + N(0, noise^2) in training, the logits themselves without noise and in evaluation.

        Noise enters before temperature, softmax and selection, so it moves selection, gates and balance loss alike.
        """
        if knobs.noise is None or not self.training:
            return logits
        return logits + knobs.noise * torch.randn_like(logits)


def check_k(k: int, num_experts: int) -> None:
    """Refuse a number of experts per token outside 1 ... E."""
    require(1 <= k <= num_experts, "router.k", k, f"between 1 and model.num_experts={num_experts}")
