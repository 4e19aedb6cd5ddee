"""Sums over tokens that describe the routing of a layer. Every routing metric is computed from them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe.routing.axes import DECILES as DECILES
from moe.routing.axes import without_absent


class RoutingStats(NamedTuple):
    """Sums over tokens, without gradient. Sums can be added over micro-batches and ranks; ratios could not.

    `micro_batches` and `max_violation` are sums over micro-batches. Only they depend on how tokens were divided into
    micro-batches. `moe.metrics.catalog` defines the metrics that are computed from these sums. The shapes below are
    those of one layer. A model stacks its layers in front, (L, ...), see `stack`. A sum that a router does not have is
    NaN.

    "Document" below means a packed conversation. Blocks of plain text do not mark where a document begins, so there it
    means the whole sequence.
    """

    tokens: Float[Tensor, "*L"]
    assignments: Float[Tensor, "*L"]
    offered: Float[Tensor, "*L E"]  # the load: assignments that tokens asked for, before capacity
    kept: Float[Tensor, "*L E"]  # assignments carried out
    forward_only: Float[Tensor, "*L"]  # runs of an expert on a token for the router alone, without a backward pass
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
    feedback: Float[Tensor, "*L N"]  # `Routing.feedback`
    probed: Float[Tensor, "*L"]  # tokens that all experts were run on
    rechecked: Float[Tensor, "*L"]  # tokens that the router decided in fp32 too, because it runs in lower precision
    flipped: Float[Tensor, "*L"]  # those of them that have other experts in fp32
    reordered: Float[Tensor, "*L"]  # those of them that have other experts in fp32, or the same in another order
    output_similarity: Float[Tensor, "*L"]  # mean cosine of two experts' outputs for each of those tokens

    def merge(self, other: "RoutingStats") -> "RoutingStats":
        """Return the sums over the tokens of both."""
        return RoutingStats(*(a + b for a, b in zip(self, other, strict=True)))

    def layer(self, index: int, experts: int) -> "RoutingStats":
        """Return the sums of one layer of a stack. experts: the number of experts of this layer."""
        absent = self.offered.shape[-1] - experts
        fields = zip(self._fields, self, strict=True)
        return RoutingStats(*(without_absent(name, field[index], absent) for name, field in fields))

    @staticmethod
    def stack(layers: "list[RoutingStats]") -> "RoutingStats":
        """Stack the sums of L layers into (L, ...).

        NaN follows the numbers of a layer that has fewer of them than another, such as those of experts.
        """
        return RoutingStats(*(stack_padded(fields) for fields in zip(*layers, strict=True)))


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of different sizes. NaN follows the numbers of a smaller one, or 0 if they are whole numbers."""
    sizes = [max(axis) for axis in zip(*(tensor.shape for tensor in tensors), strict=True)]
    if all(tensor.shape == torch.Size(sizes) for tensor in tensors):
        return torch.stack([*tensors])
    padding = math.nan if tensors[0].is_floating_point() else 0
    stacked = tensors[0].new_full((len(tensors), *sizes), padding)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[tuple(map(slice, tensor.shape))] = tensor
    return stacked
