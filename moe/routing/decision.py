"""The input and the output of a router: `Context` and `Routing`.

Letters in shapes: B sequences of S tokens; T tokens that are routed, B * S without padding; E experts; K experts per
token; A assignments that a router asks for; D width of a hidden state; H width of a router's state; C routers in the
chain of a layer; M slots per sequence; P tokens with those in the cache; N any number.

"Waits for the device" marks functions that need a value on the CPU. A GPU works through a queue of operations, and such
a function returns only when all earlier ones are done.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# The labels of a sequence that routers can be told. domain: the number of its domain, in the order of the data.
# shuffled_domain: the same numbers after they were shuffled over all blocks of the text. They say nothing about the
# content, and each domain has as many blocks as before.
LABELS = ("domain", "shuffled_domain")


class TrainingText(NamedTuple):
    """What a router can learn about the training text before the first step.

    counts: how often each token id occurs. domains: the names of the domains of all data, in order.
    """

    counts: Int[Tensor, " V"]
    domains: tuple[str, ...]


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
    capacity: the capacity factor. None: dropless. Each `document` has places of its own.
    drop: which assignments are dropped under a capacity limit, a key of `moe.routing.dispatch.DROP_POLICIES`.
    told: labels of the sequences that the data know and the tokens do not say, a column for each name in `LABELS`, for
        routers that declare them. None for texts without labels.
    load: the load of each expert in earlier micro-batches of the same optimizer step, one row for each router of this
        layer's chain. None in the first.
    state: what the router of the previous MoE layer returned as `Routing.state`. None in the first MoE layer, and for
        routers without state.
    costly: the weights of those losses in `moe.routing.loss_table.COSTLY` that are computed. The others are cheap and
        always computed.
    compared: the indices of the routed tokens that all experts are run on, to compare their outputs. None: no token.
    document_position: the position of each token in its document, from `document_positions`. None if `position_ids` do
        not mark documents; positions then count from the start of the sequence.
    given: the decision that `Imported` returns, of the router that an imported model has had since before its import,
        and the one that `Replay` returns, of another model.
    alone: the load of other micro-batches of the step, here and on other ranks, does not count in `lb_global`.
    place: where the T tokens that are routed stand in the flattened (B * S) sequences, in ascending order. Padding is
        left out: it is not routed, takes no capacity and is not counted. None: all tokens are routed.
    """

    ids: Int[Tensor, "B S"]
    knobs: Knobs
    capacity: float | None = None
    drop: str = "position"
    told: Int[Tensor, "B 2"] | None = None
    load: Shaped[Tensor, "C E"] | None = None
    state: Float[Tensor, "T H"] | None = None
    costly: frozenset[str] = frozenset()
    compared: Int[Tensor, " N"] | None = None
    document_position: Int[Tensor, "B S"] | None = None
    place: Int[Tensor, " T"] | None = None
    given: "Routing | None" = None
    alone: bool = False

    def beside(self) -> "Context":
        """Return the context of a layer that an adapter has put beside this one.

        It has no capacity limit, and nothing is known of other layers or of earlier micro-batches.
        """
        return self._replace(
            capacity=None, load=None, state=None, costly=frozenset(), compared=None, given=None, alone=True
        )

    def without_padding(self, attention_mask: Tensor) -> "Context":
        """Return the context in which only those tokens are routed for which the mask is not 0. Waits for the device.

        attention_mask: (B, P). Its last S columns are those of the tokens; columns before them are those of a cache.
            Positions in documents count from the first token of a sequence that is not padding.

        Raises ValueError for another shape and if all tokens are padding.
        """
        length = self.ids.shape[1]
        if attention_mask.ndim != 2 or len(attention_mask) != len(self.ids) or attention_mask.shape[1] < length:
            shape, allowed = tuple(attention_mask.shape), f"({len(self.ids)}, {length} + tokens in the cache)"
            raise ValueError(f"attention_mask has the shape {shape}: must be {allowed}")
        real = attention_mask[:, -length:] != 0
        place = real.flatten().nonzero()[:, 0]
        if len(place) == self.ids.numel():
            return self
        if not len(place):
            raise ValueError("attention_mask is 0 for all tokens: at least one must not be padding")
        return self._replace(place=place, document_position=(real.cumsum(1) - 1).clamp(min=0))

    def routed(self, rows: Shaped[Tensor, " BS *N"]) -> Shaped[Tensor, " T *N"]:
        """Return the rows of the tokens that are routed, given a row for each token of the flattened sequences."""
        return rows if self.place is None else rows[self.place]

    def label(self, name: str) -> Int[Tensor, " T"]:
        """Return the label `name` of each routed token, from `told`, which must be given."""
        assert self.told is not None
        return self.routed(self.told[:, LABELS.index(name)].repeat_interleave(self.ids.shape[1]))

    @property
    def document(self) -> Int[Tensor, " T"] | None:
        """The number of each token's document in the micro-batch, ascending. None if positions do not mark documents.

        It is also None with padding, which leaves no room for several documents in a sequence.
        """
        if self.document_position is None or self.place is not None:
            return None
        return (self.document_position.flatten() == 0).cumsum(0) - 1

    @property
    def sequence(self) -> Int[Tensor, " T"] | None:
        """The index of each routed token's sequence, without sequences that are padding alone.

        None if all tokens are routed, so that token t belongs to sequence t // S.
        """
        if self.place is None:
            return None
        return torch.unique_consecutive(self.place // self.ids.shape[1], return_inverse=True)[1]


def fill_places(
    rows: Float[Tensor, "T N"], place: Int[Tensor, " T"] | None, places: int, *, value: float = 0.0
) -> Float[Tensor, "BS N"]:
    """Return a row for each of B * S `places`: those of the routed tokens, and `value` for padding.

    This is the inverse of `Context.routed`.
    """
    if place is None:
        return rows
    return rows.new_full((places, rows.shape[1]), value).index_copy(0, place, rows)


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
    place: `Context.place`. Padding has the dispatch weight 0.
    """

    dispatch: Float[Tensor, "B M S"]
    combine: Float[Tensor, "B S M"]
    place: Int[Tensor, " T"] | None = None

    def gather(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "BM D"]:
        """Return the inputs of the slots of all sequences, one sequence after another."""
        sequences, _, seq_len = self.dispatch.shape
        grid = fill_places(x, self.place, sequences * seq_len).unflatten(0, (sequences, seq_len))
        return (self.dispatch.to(x.dtype) @ grid).flatten(0, 1)

    def scatter(self, y: Float[Tensor, "BM D"]) -> Float[Tensor, "T D"]:
        """Return the outputs of tokens from the outputs of slots."""
        grid = (self.combine.to(y.dtype) @ y.unflatten(0, (len(self.combine), -1))).flatten(0, 1)
        return grid if self.place is None else grid[self.place]


class Routing(NamedTuple):
    """The decision of a router: a flat list of (token, expert, weight) assignments, before capacity.

    T is the number of tokens that are routed. It does not include padding.

    token, expert, weight: (A). Weights are fp32 and differentiable.
    probs: (T, E) the distribution that led to the decision, after noise and temperature. None if the router has none
        (hash). Metrics of a missing distribution are null, never zero.
    logits: (T, E) the scores before noise and temperature, or None.
    aux: the auxiliary losses that only this router has, as unweighted means over tokens. Their weights are the
        router's `loss_weights`.
    feedback: (N) sums over tokens from which the router's `after_step` learns, in addition to the loads, or None.
    state: (T, H) what the router of the next MoE layer gets as `Context.state`, or None.
    log_weight: (A) the logarithms of the weights, up to a constant for each token. If a router gives them, the weights
        of a token sum to 1 again over the assignments left after drops. None: weights stay as they are.
    slots: mixtures of tokens that experts process instead of tokens, or None. With slots, `token` holds
        the indices of slots in the batch.
    added: (T, D) what the router itself adds to the output of the layer, such as the input of the token, or None.
    each: every token has this many experts, and its assignments follow each other, those of token 0 first. None where
        numbers vary or the order is another.
    dense_weight: (T, E) the weights as if each token used all experts, or None. If a router gives them, it also learns
        from the experts that a token did not choose: in training the layer runs all experts on all tokens, and the
        gradient reaches these weights too. The output of the layer stays as it is.
    """

    token: Int[Tensor, " A"]
    expert: Int[Tensor, " A"]
    weight: Float[Tensor, " A"]
    probs: Float[Tensor, "T E"] | None
    logits: Float[Tensor, "T E"] | None
    aux: dict[str, Float[Tensor, ""]] = {}
    feedback: Float[Tensor, " N"] | None = None
    state: Float[Tensor, "T H"] | None = None
    log_weight: Float[Tensor, " A"] | None = None
    slots: Slots | None = None
    added: Float[Tensor, "T D"] | None = None
    dense_weight: Float[Tensor, "T E"] | None = None
    each: int | None = None

    @staticmethod
    def token_choice(expert: Int[Tensor, "T K"], weight: Float[Tensor, "T K"], **fields: Any) -> "Routing":
        """Return a routing in which every token has K experts, the common case. `fields`: the other fields."""
        tokens, k = expert.shape
        token = torch.arange(tokens, device=expert.device).repeat_interleave(k)
        fields = {"probs": None, "logits": None, "each": k, **fields}
        return Routing(token, expert.flatten(), weight.flatten(), **fields)

    @staticmethod
    def masked(chosen: Bool[Tensor, "T E"], weight: Float[Tensor, "T E"], **fields: Any) -> "Routing":
        """Return a routing in which a token takes each expert for which `chosen` is true. Waits for the device."""
        token, expert = chosen.nonzero(as_tuple=True)
        return Routing(token, expert, weight[token, expert], **{"probs": None, "logits": None, **fields})

    def take(self, selected: Bool[Tensor, " A"]) -> "Routing":
        """Return the routing with the selected assignments alone."""
        return self._replace(
            token=self.token[selected],
            expert=self.expert[selected],
            weight=self.weight[selected],
            log_weight=None if self.log_weight is None else self.log_weight[selected],
            each=None,
        )


def count(index: Int[Tensor, " N"], bins: int) -> Int[Tensor, " bins"]:
    """Return how often each of 0 ... bins-1 occurs. Unlike `bincount`, it does not wait for the device on CUDA."""
    return index.new_zeros(bins).index_add_(0, index, torch.ones_like(index))


def picked(scores: Float[Tensor, "T N"], index: Int[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """Return the scores at K different indices of each token: `scores.gather(-1, index)`.

    The gradient that PyTorch would use sorts the indices on a GPU if it has to be repeatable, see `_Picked`.
    """
    return _Picked.apply(scores, index) if scores.is_cuda else scores.gather(-1, index)


class _Picked(torch.autograd.Function):
    """Each place gets the gradient of at most one of the K indices, so the order of the sum does not matter."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = scores.shape[-1]
        return scores.gather(-1, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        places = index[..., None] == torch.arange(ctx.size, device=index.device)
        return (gradient[..., None] * places).sum(-2), None
