"""What a router does in evaluation, described so that it can be compared with the routers of transformers' models.

Letters in shapes: T tokens, E experts, D width of a hidden state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moe.routers.base import Router
from moe.routers.base_layers import BaseLayers
from moe.routers.chain_of_experts import ChainOfExperts
from moe.routers.dense_mixer import DenseMixer
from moe.routers.group_limited import GroupLimited
from moe.routers.gumbel import Gumbel
from moe.routers.matryoshka import Matryoshka
from moe.routers.noisy_topk import NoisyTopK
from moe.routers.phi_balancing import PhiBalancing
from moe.routers.quantile_balancing import QuantileBalancing
from moe.routers.random import Random
from moe.routers.sigmoid_bias import BiasedSigmoid, SigmoidBias
from moe.routers.sinkhorn import Sinkhorn
from moe.routers.smebu import Smebu
from moe.routers.top_p import TopP
from moe.routers.topk import Temperature, TopK


@dataclass(frozen=True)
class Rule:
    """How a router with the logits W x chooses and weights the experts of a token in evaluation.

    k: experts per token.
    scores: the scores s of the experts, softmax or sigmoid of the logits.
    weights: the weight of a chosen expert: its score (raw), its score divided by the sum over the chosen experts
        (normalized), or 1/k (equal).
    temperature: the logits are divided by it before the scores are computed.
    factor: a number by which all weights are multiplied.
    biased: whether a bias b for each expert is added to the scores to choose experts. It never changes the weights.
    groups, top_groups: experts are chosen in the best `top_groups` of `groups` groups of neighbors. The score of a
        group is the sum of the two largest s + b in it.
    """

    k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    weights: Literal["raw", "normalized", "equal"] = "normalized"
    temperature: float = 1.0
    factor: float = 1.0
    biased: bool = False
    groups: int = 1
    top_groups: int = 1

    def describe(self) -> str:
        """Return the rule in words, for messages."""
        weights = {
            "raw": "the scores themselves as weights",
            "normalized": "weights that sum to 1",
            "equal": "weights 1/k",
        }
        parts = [f"top {self.k} of the {self.scores} scores", weights[self.weights]]
        parts += ["a bias that moves the selection"] if self.biased else []
        parts += [f"the best {self.top_groups} of {self.groups} groups"] if self.groups > 1 else []
        return ", ".join(parts)

    def gates(self, logits: Float[Tensor, "T E"], bias: Float[Tensor, " E"] | None = None) -> Float[Tensor, "T E"]:
        """Return the weight of every expert for every token, 0 where it is not chosen, in fp64.

        This is the reference that tests compare routers with. It is written to be read, not to be fast.
        """
        logits = logits.double() / self.temperature
        scores = torch.softmax(logits, -1) if self.scores == "softmax" else torch.sigmoid(logits)
        choice = scores if bias is None else scores + bias.double()
        if self.groups > 1:
            grouped = choice.unflatten(-1, (self.groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(self.top_groups, -1).indices
            is_open = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            choice = grouped.masked_fill(~is_open[..., None], -torch.inf).flatten(-2)
        expert = choice.topk(self.k, -1).indices
        weight = scores.gather(-1, expert)
        if self.weights == "normalized":
            weight = weight / weight.sum(-1, keepdim=True)
        elif self.weights == "equal":
            weight = torch.full_like(weight, 1 / self.k)
        return torch.zeros_like(scores).scatter(-1, expert, self.factor * weight)


def rule_of(router: Router, *, temperature: float = 1.0) -> Rule | None:
    """Return the rule that `router` follows in evaluation, or None if it is not of this kind.

    temperature: the knob of the model (`router_temperature` of its config.json).

    A class that is not named here has no rule, even if it inherits from one that is: it may do something else.
    """
    read = RULES.get(type(router))
    return None if read is None else read(router, temperature)


def matrix_of(router: Router) -> Float[Tensor, "E D"] | None:
    """Return the matrix W whose rows produce the logits of the experts, or None if there is none."""
    weight = getattr(router.chain[0], "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != router.dim:
        return None
    return weight.detach()[: router.num_experts]  # what follows are null experts


def bias_of(router: Router) -> Float[Tensor, " E"] | None:
    """Return the bias that moves the selection, or None."""
    return router.bias if isinstance(router, BiasedSigmoid) else None


def _top_k(router: Any, temperature: float) -> Rule:
    normalized = router.gate == "renorm" and router.k > 1
    return Rule(
        router.k,
        weights="equal" if router.gate == "uniform" else "normalized" if normalized else "raw",
        temperature=temperature if router.schedulable else 1.0,
    )


def _at_temperature_1(router: Any, temperature: float) -> Rule:
    return _top_k(router, 1.0)


def _grouped(router: Any, temperature: float) -> Rule:
    limited = router.top_groups < router.groups and router.size > 1  # else the k best are always in the best groups
    groups = {"groups": router.groups, "top_groups": router.top_groups} if limited else {}
    return Rule(router.k, weights=_top_k(router, 1.0).weights, **groups)


def _biased(router: BiasedSigmoid, temperature: float) -> Rule:
    return Rule(
        router.k,
        scores="sigmoid",
        weights="normalized" if router.normalize and router.k > 1 else "raw",
        factor=router.scale,
        biased=True,
        groups=router.groups if router.top_groups < router.groups else 1,
        top_groups=router.top_groups if router.top_groups < router.groups else 1,
    )


def _without_plan(router: Any, temperature: float) -> Rule | None:
    if router.inference:
        return None
    return Rule(1, scores="sigmoid", weights="raw") if router.k == 1 else Rule(router.k)


def _fixed_number(router: Any, temperature: float) -> Rule | None:
    return None if router.fixed_k is None else Rule(router.fixed_k, weights="raw")


def _single(router: Any, temperature: float) -> Rule | None:
    return rule_of(router.chain[0], temperature=temperature) if len(router.chain) == 1 else None


RULES: dict[type[Router], Callable[[Any, float], Rule | None]] = {
    TopK: _top_k,
    Temperature: _top_k,
    Gumbel: lambda router, temperature: Rule(router.k, temperature=temperature),  # with k=1 its weight is 1
    NoisyTopK: _at_temperature_1,
    DenseMixer: _top_k,
    PhiBalancing: _top_k,
    GroupLimited: _grouped,
    SigmoidBias: lambda router, temperature: _biased(router, temperature) if router.scores == "sigmoid" else None,
    QuantileBalancing: _biased,
    Smebu: _biased,
    Sinkhorn: _without_plan,
    BaseLayers: lambda router, temperature: Rule(1, scores="sigmoid", weights="raw"),
    Matryoshka: lambda router, temperature: Rule(router.k),
    Random: lambda router, temperature: Rule(router.k, weights="equal"),
    TopP: _fixed_number,
    ChainOfExperts: _single,
}
