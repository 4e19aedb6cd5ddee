"""The sums by which routing is remembered: what every metric is computed from."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DECILES = 10  # tenths of a sequence's length, by which positions in a text are told apart


class RoutingStats(NamedTuple):
    """Detached sums over tokens. Sums add up exactly over micro-batches, ranks and windows; ratios would not.
    `batches` and `max_violation` are sums over micro-batches, so they alone depend on how tokens were cut into them.

    Every metric is a function of these sums and is defined in `moe.metrics.catalog`. Shapes are of one layer; a
    model stacks
    its layers in front: (L, ...). A sum that does not exist for a router is NaN.
    """

    tokens: Float[Tensor, "*L"]
    assignments: Float[Tensor, "*L"]
    offered: Float[Tensor, "*L E"]  # assignments asked for, before capacity
    kept: Float[Tensor, "*L E"]  # assignments carried out
    slots: Float[Tensor, "*L"]  # assignments that fit, all experts together; NaN when dropless
    batches: Float[Tensor, "*L"]  # micro-batches with an assignment
    max_violation: Float[Tensor, "*L"]  # over those, the largest load / mean load - 1 of each
    sequences: Float[Tensor, "*L"]  # sequences with an assignment
    max_violation_sequence: Float[Tensor, "*L"]  # over those, the same of each
    offered_by_position: Float[Tensor, "*L P E"]  # `offered`, by P deciles of the position, see DECILES
    kept_by_position: Float[Tensor, "*L P"]  # assignments carried out, of all experts together
    coactivation: Float[Tensor, "*L E E"]  # tokens that asked for both experts
    repeatable: Float[Tensor, "*L"]  # assignments asked for by tokens that are not the first of their text
    repeated: Float[Tensor, "*L"]  # those of them that the token before asked for too
    tokens_by_active: Float[Tensor, "*L E+1"]  # tokens that asked for 0, 1 ... E experts
    unrouted: Float[Tensor, "*L"]  # tokens that no expert processed
    importance: Float[Tensor, "*L E"]  # sum of probabilities
    entropy: Float[Tensor, "*L"]  # sum of token entropies, nats, of `probs`
    confidence: Float[Tensor, "*L"]  # sum of largest probabilities, of `probs`
    margin: Float[Tensor, "*L"]  # sum of the largest less the second largest, of `probs`
    chosen_mass: Float[Tensor, "*L"]  # sum of the probabilities of the experts asked for, of `probs`
    entropy_t1: Float[Tensor, "*L"]  # entropy and confidence of softmax(logits): clean, at temperature 1
    confidence_t1: Float[Tensor, "*L"]
    logit_squared: Float[Tensor, "*L"]  # sum of mean squared logits
    logsumexp_squared: Float[Tensor, "*L"]
    feedback: Float[Tensor, "*L N"]  # of `Routing.feedback`
    probed: Float[Tensor, "*L"]  # tokens that every expert was run on
    output_similarity: Float[Tensor, "*L"]  # over those, the mean cosine of two experts' outputs

    def merge(self, other: "RoutingStats") -> "RoutingStats":
        """The sums over the tokens of both."""
        return RoutingStats(*(a + b for a, b in zip(self, other, strict=True)))

    def pool(self) -> "RoutingStats":
        """All layers as if they were one, by adding them: opposite imbalances of two layers cancel here."""
        return RoutingStats(*(field.sum(0, keepdim=True) for field in self))

    def layer(self, index: int) -> "RoutingStats":
        """The sums of one layer of a stack."""
        return RoutingStats(*(field[index] for field in self))

    @staticmethod
    def stack(layers: "list[RoutingStats]") -> "RoutingStats":
        """(L, ...) from L layers."""
        return RoutingStats(*(torch.stack(fields) for fields in zip(*layers, strict=True)))
