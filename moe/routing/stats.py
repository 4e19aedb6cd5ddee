"""Sums over tokens that describe the routing of a layer. Every routing metric is computed from them."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.routing.positions import DECILES as DECILES


class RoutingStats(NamedTuple):
    """Sums over tokens, without gradient. Sums can be added over micro-batches and ranks; ratios could not.

    `micro_batches` and `max_violation` are sums over micro-batches. Only they depend on how tokens were divided into
    micro-batches. `moe.metrics.catalog` defines the metrics that are computed from these sums. The shapes below are
    those of one layer. A model stacks its layers in front, (L, ...). A sum that a router does not have is NaN.

    "Document" below means a packed conversation. Blocks of plain text do not mark where a document begins, so there it
    means the whole sequence.
    """

    tokens: Float[Tensor, "*L"]
    assignments: Float[Tensor, "*L"]
    offered: Float[Tensor, "*L E"]  # the load: assignments that tokens asked for, before capacity
    kept: Float[Tensor, "*L E"]  # assignments carried out
    capacity: Float[Tensor, "*L"]  # assignments that all experts together accept; NaN when dropless
    micro_batches: Float[Tensor, "*L"]  # micro-batches that have an assignment
    max_violation: Float[Tensor, "*L"]  # sum over those micro-batches of largest load / mean load - 1
    sequences: Float[Tensor, "*L"]  # sequences that have an assignment
    max_violation_sequence: Float[Tensor, "*L"]  # sum over those sequences of largest load / mean load - 1
    # `offered` by decile of the position in the document: position * DECILES // sequence length; P = DECILES
    offered_by_position: Float[Tensor, "*L P E"]
    kept_by_position: Float[Tensor, "*L P"]  # assignments carried out by decile, summed over experts
    coactivation: Float[Tensor, "*L E E"]  # tokens that asked for both experts
    repeatable: Float[Tensor, "*L"]  # assignments of tokens that have a token before them in their document
    repeated: Float[Tensor, "*L"]  # those of them whose expert the token before asked for too (sequential overlap)
    tokens_by_active: Float[Tensor, "*L E+1"]  # tokens that asked for 0, 1 ... E experts
    gate_entropy: Float[Tensor, "*L"]  # of the weights of each token's experts, which are made to sum to 1, in nats
    unrouted: Float[Tensor, "*L"]  # tokens that no expert processed
    importance: Float[Tensor, "*L E"]  # summed probability of each expert
    entropy: Float[Tensor, "*L"]  # of the probabilities of each token, in nats
    confidence: Float[Tensor, "*L"]  # largest probability of each token
    margin: Float[Tensor, "*L"]  # largest - second largest probability of each token
    top_k_mass: Float[Tensor, "*L"]  # probability of the experts that each token asked for
    entropy_t1: Float[Tensor, "*L"]  # like `entropy`, of softmax(logits): without noise, at temperature 1
    confidence_t1: Float[Tensor, "*L"]  # like `confidence`, of softmax(logits)
    logit_squared: Float[Tensor, "*L"]  # mean over experts of the squared logits of each token
    logsumexp_squared: Float[Tensor, "*L"]  # squared log-sum-exp of the logits of each token
    feedback: Float[Tensor, "*L N"]  # `Routing.feedback`; NaN follows in a layer that has fewer numbers than another
    probed: Float[Tensor, "*L"]  # tokens that all experts were run on
    rechecked: Float[Tensor, "*L"]  # tokens that the router decided in fp32 too, because it runs in lower precision
    flipped: Float[Tensor, "*L"]  # those of them that have other experts in fp32
    reordered: Float[Tensor, "*L"]  # those of them that have other experts in fp32, or the same in another order
    output_similarity: Float[Tensor, "*L"]  # mean cosine of two experts' outputs for each of those tokens

    def merge(self, other: "RoutingStats") -> "RoutingStats":
        """Return the sums over the tokens of both."""
        return RoutingStats(*(a + b for a, b in zip(self, other, strict=True)))

    def layer(self, index: int) -> "RoutingStats":
        """Return the sums of one layer of a stack."""
        return RoutingStats(*(field[index] for field in self))

    @staticmethod
    def stack(layers: "list[RoutingStats]") -> "RoutingStats":
        """Stack the sums of L layers into (L, ...)."""
        width = max(layer.feedback.shape[-1] for layer in layers)
        layers = [layer._replace(feedback=_padded(layer.feedback, width)) for layer in layers]
        return RoutingStats(*(torch.stack(fields) for fields in zip(*layers, strict=True)))


def _padded(feedback: Float[Tensor, "M"], width: int) -> Float[Tensor, "N"]:
    more = width - len(feedback)
    return F.pad(feedback, (0, more), value=math.nan) if more else feedback
