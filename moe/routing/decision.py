"""The input and the output of a router: `Context` and `Routing`.

Letters in shapes: T tokens, E experts, K experts per token, A assignments that a router asks for, R assignments that
are kept after capacity, D width of a hidden state, F width of an expert, L layers, B sequences of S tokens (T = B*S).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Knobs(NamedTuple):
    """The values that a schedule can change during training.

    They are tensors of shape (), so that compiled code is not compiled again for each value.

    temperature: the logits are divided by it before the softmax, in routers with `schedulable = True`.
    noise: standard deviation of the noise on the logits. None: no noise, and no random numbers are drawn.
    """

    temperature: Float[Tensor, ""]
    noise: Float[Tensor, ""] | None

    @staticmethod
    def of(*, temperature: float = 1.0, noise: float = 0.0, device: torch.device | str | None = None) -> "Knobs":
        """Return knobs from numbers. `torch.full` fills on the device; `torch.tensor` would copy to it and wait."""
        std = torch.full((), float(noise), device=device) if noise else None
        return Knobs(torch.full((), float(temperature), device=device), std)


class Context(NamedTuple):
    """The input of an MoE layer and its router besides the hidden states.

    ids: token ids. Their shape tells which tokens share a sequence.
    knobs: the current temperature and noise.
    capacity: the capacity factor. None: dropless.
    drop: which assignments are dropped under a capacity limit, a key of `moe.routing.dispatch.DROP_POLICIES`.
    load: the load of each expert of this layer in earlier micro-batches of the same optimizer step. None in the first.
    state: what the router of the previous MoE layer returned as `Routing.state`. None in the first MoE layer, and for
        routers without state.
    orthogonality: whether to compute the loss on expert outputs. The other losses are cheap and always computed.
    probe_stride: run every n-th token through all experts, to compare their outputs. None: no token.
    document_position: the position of each token in its document, from `document_positions`. None if `position_ids` do
        not mark documents; positions then count from the start of the sequence.
    """

    ids: Int[Tensor, "B S"]
    knobs: Knobs
    capacity: float | None = None
    drop: str = "position"
    load: Float[Tensor, "E"] | None = None
    state: Float[Tensor, "T H"] | None = None
    orthogonality: bool = False
    probe_stride: int | None = None
    document_position: Int[Tensor, "B S"] | None = None


def document_positions(position_ids: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Return how many tokens of the same document precede each token of a sequence.

    A new document begins wherever `position_ids` do not increase by 1. Results are below S for any positions.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    begins = F.pad(position_ids.diff() != 1, (1, 0), value=True)
    return index - (index * begins).cummax(1).values


class Slots(NamedTuple):
    """The M slots per sequence that experts process instead of tokens in Soft MoE. Each is a mixture of tokens.

    dispatch: the input of slot m is sum_s dispatch[m, s] x_s.
    combine: the output of token s is sum_m combine[s, m] y_m.
    """

    dispatch: Float[Tensor, "B M S"]
    combine: Float[Tensor, "B S M"]

    def gather(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "BM D"]:
        """Return the inputs of the slots of all sequences, one sequence after another."""
        return (self.dispatch.to(x.dtype) @ x.unflatten(0, (len(self.dispatch), -1))).flatten(0, 1)

    def scatter(self, y: Float[Tensor, "BM D"]) -> Float[Tensor, "T D"]:
        """Return the outputs of tokens from the outputs of slots."""
        return (self.combine.to(y.dtype) @ y.unflatten(0, (len(self.combine), -1))).flatten(0, 1)


class Routing(NamedTuple):
    """The decision of a router: a flat list of (token, expert, weight) assignments, before capacity.

    token, expert, weight: (A). Weights are fp32 and differentiable.
    probs: (T, E) the distribution that led to the decision, after noise and temperature. None if the router has none
        (hash). Metrics of a missing distribution are null, never zero.
    logits: (T, E) the scores before noise and temperature, or None.
    aux: the auxiliary losses that only this router has, as unweighted means over tokens. Their weights are the
        router's `loss_weights`.
    feedback: (N) sums over tokens from which the router's `after_step` learns, in addition to the loads, or None.
    state: (T, H) what the router of the next MoE layer gets as `Context.state`, or None.
    renormalize: whether the weights of a token are scaled to sum 1 again over the assignments left after drops.
    slots: mixtures of tokens that experts process instead of tokens, or None. With slots, `token` numbers the slots of
        the batch.
    """

    token: Int[Tensor, "A"]
    expert: Int[Tensor, "A"]
    weight: Float[Tensor, "A"]
    probs: Float[Tensor, "T E"] | None
    logits: Float[Tensor, "T E"] | None
    aux: dict[str, Float[Tensor, ""]] = {}
    feedback: Float[Tensor, "N"] | None = None
    state: Float[Tensor, "T H"] | None = None
    renormalize: bool = False
    slots: Slots | None = None

    @staticmethod
    def token_choice(expert: Int[Tensor, "T K"], weight: Float[Tensor, "T K"], **fields: Any) -> "Routing":
        """Return a routing in which every token has K experts, the common case. `fields`: the other fields."""
        tokens, k = expert.shape
        token = torch.arange(tokens, device=expert.device).repeat_interleave(k)
        return Routing(token, expert.flatten(), weight.flatten(), **{"probs": None, "logits": None, **fields})

    @staticmethod
    def masked(chosen: Bool[Tensor, "T E"], weight: Float[Tensor, "T E"], **fields: Any) -> "Routing":
        """Return a routing in which a token takes each expert for which `chosen` is true. Waits for the device."""
        token, expert = chosen.nonzero(as_tuple=True)
        return Routing(token, expert, weight[token, expert], **{"probs": None, "logits": None, **fields})


def count(index: Int[Tensor, "N"], bins: int) -> Int[Tensor, "bins"]:
    """Return how often each of 0 ... bins-1 occurs. Unlike `bincount`, it does not wait for the device on CUDA."""
    return index.new_zeros(bins).index_add_(0, index, torch.ones_like(index))
