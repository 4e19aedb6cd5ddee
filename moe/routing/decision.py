"""Routing as values: what a router is given, what it decides, and the sums by which it is remembered.

Letters, everywhere in this package: T tokens, E experts, K experts per token, A assignments a router asks for,
R assignments that are kept, D model width, F expert width, L layers, B sequences of S tokens (T = B*S).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Knobs(NamedTuple):
    """What a schedule may turn while a run goes on; 0-dim tensors, so that compiled code need not specialize.

    noise: None where there is none, and then none is drawn either.
    """

    temperature: Float[Tensor, ""]
    noise: Float[Tensor, ""] | None

    @staticmethod
    def of(*, temperature: float = 1.0, noise: float = 0.0, device: torch.device | str | None = None) -> "Knobs":
        drawn = torch.full((), float(noise), device=device) if noise else None  # filled there, not copied there
        return Knobs(torch.full((), float(temperature), device=device), drawn)


class Context(NamedTuple):
    """What a layer knows besides the hidden states.

    ids: token ids; their shape says which tokens share a sequence.
    capacity: the capacity factor, None: dropless; drop: the drop policy, a key of `moe.routing.dispatch.DROP_POLICIES`.
    load: of this layer's experts in earlier micro-batches of the optimizer step (None: this is the first).
    state: what the router of the MoE layer before handed on of each token (None: this is the first, or it keeps none).
    orthogonality: whether to compute the loss on expert outputs, the only one that costs more than it may stay unused.
    probe_stride: run every so-manieth token through all experts, to compare what they do (None: no token).
    place: of each token in its text, from `places`, where a sequence may hold several (None: it is one text).
    """

    ids: Int[Tensor, "B S"]
    knobs: Knobs
    capacity: float | None = None
    drop: str = "position"
    load: Float[Tensor, "E"] | None = None
    state: Float[Tensor, "T H"] | None = None
    orthogonality: bool = False
    probe_stride: int | None = None
    place: Int[Tensor, "B S"] | None = None


def places(position_ids: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """How many tokens of its own text precede each token of a sequence: a text begins wherever positions do not go on
    by 1. Places are below S whatever the positions are."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    begins = F.pad(position_ids.diff() != 1, (1, 0), value=True)
    return index - (index * begins).cummax(1).values


class Slots(NamedTuple):
    """What experts work on where they do not work on tokens: M slots a sequence, each a mixture of its tokens.

    dispatch: slot m is sum_s dispatch[m, s] x_s; combine: token s gets sum_m combine[s, m] y_m.
    """

    dispatch: Float[Tensor, "B M S"]
    combine: Float[Tensor, "B S M"]

    def gather(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "BM D"]:
        """The slots of all sequences, one after another, as rows."""
        return (self.dispatch.to(x.dtype) @ x.unflatten(0, (len(self.dispatch), -1))).flatten(0, 1)

    def scatter(self, y: Float[Tensor, "BM D"]) -> Float[Tensor, "T D"]:
        """Rows of slots back to rows of tokens."""
        return (self.combine.to(y.dtype) @ y.unflatten(0, (len(self.combine), -1))).flatten(0, 1)


class Routing(NamedTuple):
    """A router's wish: a flat list of (token, expert, weight) assignments, before capacity.

    token, expert, weight: (A); weights are fp32 and differentiable.
    probs: (T, E) the distribution that the decision came from (noise and temperature applied), or None where the
        router has none (hash); a metric of a missing distribution is null, never zero.
    logits: (T, E) clean scores, before noise and temperature, or None.
    aux: auxiliary losses of this router alone, unweighted means over tokens; its `loss_weights` weight them.
    renormalize: whether a token's weights are to sum to 1 again over the experts that keep it after drops.
    feedback: (N) sums over tokens of whatever this router's `after_step` learns from, beside the loads, or None.
    state: (T, H) what the router of the next MoE layer is to know of each token, or None.
    slots: None, or mixtures of tokens that experts work on instead; `token` then numbers the slots of the batch.
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
    def token_choice(expert: Int[Tensor, "T K"], weight: Float[Tensor, "T K"], **rest: Any) -> "Routing":
        """Every token names K experts: the common case in one line; `rest` are the other fields."""
        tokens, k = expert.shape
        token = torch.arange(tokens, device=expert.device).repeat_interleave(k)
        return Routing(token, expert.flatten(), weight.flatten(), **{"probs": None, "logits": None, **rest})

    @staticmethod
    def masked(chosen: Bool[Tensor, "T E"], weight: Float[Tensor, "T E"], **rest: Any) -> "Routing":
        """A token takes every expert where `chosen` is true: a varying number of them."""
        token, expert = chosen.nonzero(as_tuple=True)
        return Routing(token, expert, weight[token, expert], **{"probs": None, "logits": None, **rest})


def count(index: Int[Tensor, "N"], bins: int) -> Int[Tensor, "bins"]:
    """How often each of 0 ... bins-1 occurs: `bincount`, which on CUDA would read its largest number back."""
    return index.new_zeros(bins).index_add_(0, index, torch.ones_like(index))
