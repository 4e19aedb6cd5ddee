"""The interface that every router implements."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe.checks import ConfigError, require
from moe.routers.seeding import seeded
from moe.routing.decision import Context, Knobs, Routing, TrainingText, picked
from moe.routing.expected_load import bar, expected_load_cv
from moe.routing.loss_table import CHOICE_WEIGHTS, COSTLY, PROBABILITY_WEIGHTS
from moe.routing.stats import RoutingStats

# How the optimizers treat a parameter. matrix: Muon, or AdamW with weight decay where AdamW trains everything. other,
# such as an embedding whose rows are looked up one by one: AdamW with weight decay. scale, such as a learned
# temperature: AdamW without weight decay, which would pull it to 0 although 0 is no neutral value.
Role = Literal["matrix", "other", "scale"]


class Router(nn.Module):
    """Base class of all routers: a module that maps the hidden states (T, D) of T tokens to a `Routing`.

    A subclass must
    - call `super().__init__(dim, num_experts, fixed_k=...)` and take `dim` and `num_experts` itself as its first two
      arguments. All other arguments are keyword-only settings and get their values from the router's yaml file.
      `fixed_k` is the number of experts that every token gets, for every input, in training and in evaluation. It is
      None if that number can vary from token to token. The argument has no default, so that nobody forgets it.
    - implement `forward(x, context)`. It receives x in fp32, or in fp64 in a model of fp64, computes in that precision,
      and returns the assignments before any capacity limit.
    - set `causal = False` if the experts that a token asks for, in training or in evaluation, depend on later tokens of
      the sequence or on other sequences of the micro-batch. The class variable holds for all instances; `__init__` may
      set it for one instance.

    A subclass may declare, where the default does not fit,
    - `expert_rows`: the matrix (E, D) whose rows produce the experts' logits. Default: None. A router that declares it
      gets the losses `simbal` and `erc`, and the metric `routing/router_gram`. `LinearRouter` declares it.
    - `expert_directions`: one vector per expert, for `routing/router_gram` alone. Default: `expert_rows`.
    - `causal_in_evaluation`: what `causal` says, for evaluation alone. Default: `causal`. If it is false, the model
      refuses to generate with a cache, and blocks of several conversations.
    - `reads_earlier_tokens = True`: the experts of a token depend on earlier tokens of its sequence too, as in a router
      with a running mean. It may still be causal. The model then generates without a cache, because with one a router
      sees only the newest token, and it refuses blocks of several conversations.
    - `weights_elsewhere = True`: it has no parameters, but an imported model has them, so that they train nevertheless.
    - `learns_from_outputs = True`: the layer sets `Routing.feedback` to the sum of the outputs of each expert (E * D).
      `after_step` then finds it in the sums of the step.
    - `trains_all_experts = True`: it gives `Routing.dense_weight`, so that in training all experts run on all tokens. A
      training step then costs more than three forward passes.
    - `adds_output = True`: `Routing.added` is not zero before anything is learned, such as a share of the input.
    - `replays`: the folder of the run whose model decides, and the checksum of that model. The decoder then sets
      `Context.given`.
    - `uses_ids = True`: the router reads the token ids in `Context.ids`, and not only their shape.
    - `told`: the labels of `moe.routing.decision.LABELS` that it reads in `Context.told`, such as the domain of a text.
      `__init__` may set it for one instance.
    - `ignores`: the keys of the configuration that change nothing with this router, such as "noise", "capacity", the
      weight of a loss, or a setting of its own that the others make useless ("router.gate" with one expert per token).
      A value that is given for such a key is refused, or recorded as not applicable in a sweep over routers. Default:
      none; the keys that follow from the other declarations are added (`ignored_keys`). `__init__` may set it for one
      instance.
    - `why`: why `ignores` names keys of the whole configuration, as the end of "router=hash ignores noise, because". It
      completes the message that refuses such a key. `__init__` may set it too.
    - `ignores_without_capacity`: those that change nothing without a capacity limit. `__init__` may set it too.
    - `same_as`: other values of its settings that mean the same as the given ones, such as {"quota": False} for a quota
      so large that it limits nothing. Cells of a sweep that are equal with these values are trained once. Default: {}.
      `__init__` sets it.
    - `mean_k`: the mean number of experts per token that a router with `fixed_k=None` aims at. Default: None, unknown.
    - `schedulable = True`: the schedule of the temperature changes what this router does.
    - `expects_load = True`: it chooses an expert if the logit of the expert, after `add_noise`, exceeds a bar (`bars`)
      that does not depend on this logit, as in a top-k. `forward` returns `expected_load` in `Routing.aux`, which the
      key `load` weights.
    - `loss_weights`: the weights of the auxiliary losses that `forward` returns in `Routing.aux`.
    - `chain`: the routers of a layer that routes several times in a row.
    - `experts_per_token`, `mixing_flops`: the work per token, for FLOPs and parameter counts.

    A subclass may implement, where it has something to do,
    - `role`: how the optimizers treat a parameter. Default: Muon trains matrices and stacks of matrices; AdamW trains
      vectors and numbers, without weight decay.
    - `bars`: what a logit has to exceed, if its choice is no plain top-k.
    - `draw`: draw the initial values of a parameter or buffer. Default: N(0, std) for each matrix.
    - `check_domains`: refuse a text whose domains it cannot use.
    - `before_training`: learn from token frequencies or from the names of the domains, once.
    - `after_step`: learn without a gradient, after each optimizer step.
    - `tie_to`: use modules of the first MoE layer's router.

    The code uses only those attributes of a router that this docstring lists. All other attributes may have any name.
    `moe.testing.check_router` holds a router to all of this. The test tests/routers/test_contract.py does so for each
    router in conf/router.

    k: experts per token.
    """

    causal: bool = True
    reads_earlier_tokens: bool = False
    weights_elsewhere: bool = False
    learns_from_outputs: bool = False
    trains_all_experts: bool = False
    adds_output: bool = False
    replays: tuple[str, str | None] | None = None
    uses_ids: bool = False
    schedulable: bool = False
    expects_load: bool = False
    told: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    why: str = ""
    ignores_without_capacity: frozenset[str] = frozenset()
    mean_k: float | None = None

    def __init__(self, dim: int, num_experts: int, *, fixed_k: int | None) -> None:
        """Raises ConfigError unless `fixed_k` is None or a whole number from 1 to num_experts."""
        super().__init__()
        if fixed_k is not None:
            has_k = "k" in inspect.signature(type(self)).parameters
            check_k(fixed_k, num_experts, key="router.k" if has_k else f"fixed_k of {type(self).__name__}")
        self.dim = dim
        self.num_experts = num_experts
        self.fixed_k = fixed_k
        self.same_as: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        declared = getattr(type(self), name, None)
        if isinstance(declared, property) and declared.fset is None:
            own = type(self).__name__
            raise TypeError(f"{own}.{name} is a property: store the value by another name and return it from `{name}`")
        super().__setattr__(name, value)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        """Return the assignments of T tokens, before capacity."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Move and convert as any module does, but keep parameters and buffers in fp32 where fn would round them.

        `model.to(torch.bfloat16)` and `model.half()` call this.
        """

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            rounded = converted.is_floating_point() and converted.dtype.itemsize < torch.float32.itemsize
            return tensor.to(converted.device) if rounded else converted

        return super()._apply(convert, recurse)

    def is_causal(self, *, capacity: float | None, drop: str) -> bool:
        """Return whether routing is causal under this capacity factor (None: dropless) and drop policy.

        Causal means that the experts that process a token never depend on later tokens. A capacity limit is a share of
        the number of assignments in the micro-batch. The limit is therefore independent of later tokens only if every
        token has the same number of experts. The dropped assignments are independent of later tokens only with the
        policy `position`. Even then they can depend on other sequences of the micro-batch, namely on their tokens at
        the same or an earlier position. Documents that positions mark, such as conversations, do not share the limit.
        """
        return self.causal and (capacity is None or (drop == "position" and self.fixed_k is not None))

    def require_documents_apart(self) -> None:
        """Raise ConfigError if this router lets the documents of a block influence each other in evaluation."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        allowed = "a router that keeps the conversations of a block apart; this one compares their tokens"
        require(self.decides_alone, "router._target_", name, allowed)

    @property
    def causal_in_evaluation(self) -> bool:
        """Whether the experts that a token asks for in evaluation depend on that token and earlier ones alone."""
        return self.causal

    @property
    def decides_alone(self) -> bool:
        """Whether a token gets the same experts in evaluation when the router sees no other token."""
        return self.causal_in_evaluation and not self.reads_earlier_tokens

    @property
    def chain(self) -> "list[Router]":
        """The routers that a layer runs one after another.

        Each router gets the input of the layer plus the outputs of all experts that ran before it.

        All routers of a chain have the same `fixed_k` as the router that returns the chain.
        """
        return [self]

    def ignored_keys(self) -> frozenset[str]:
        """Return `ignores`, and the keys that change nothing because of what else the router declares."""
        return frozenset(self.why_ignored())

    def why_ignored(self) -> dict[str, str]:
        """Return {key: why it changes nothing} for each of `ignored_keys`; "" for a key in `ignores` without a `why`.

        With one expert per token there are no two outputs to compare. With all experts per token the load is even, and
        the balance losses are constant. A single expert has always the probability 1.
        """
        found = dict.fromkeys(self.ignores, self.why)
        if not self.expects_load:
            found["load"] = "it does not choose by learned logits with Gaussian noise, each by itself"
        if any(router.expert_rows is None for router in self.chain):
            found |= dict.fromkeys(("simbal", "erc"), "its logits are no products of its input with one row per expert")
        if self.fixed_k == 1:
            found["output_orthogonality"] = "each token has one expert"
        if self.fixed_k == self.num_experts:
            found |= dict.fromkeys(CHOICE_WEIGHTS | ({"noise"} & found.keys()), "every token goes to all experts")
        if self.num_experts == 1:
            keys = PROBABILITY_WEIGHTS | COSTLY | ({"noise"} & found.keys())
            found |= dict.fromkeys(keys, "there is one expert")
        return found

    @classmethod
    def setting_keys(cls) -> frozenset[str]:
        """Return the keys of the configuration that this class or a base class of it takes, such as "router.k"."""
        kinds = [kind for kind in cls.__mro__ if issubclass(kind, Router)]
        return frozenset(f"router.{name}" for kind in kinds for name in inspect.signature(kind).parameters)

    def check_class(self) -> None:
        """Raise ConfigError for a class that lacks what every router must have, and for a wrong `chain`."""
        own = f"router._target_={type(self).__module__}.{type(self).__qualname__}"
        if "num_experts" not in vars(self):
            raise ConfigError(f"{own}: its __init__ must call super().__init__(dim, num_experts, fixed_k=...)")
        self.check_chain()
        if any(type(link).forward is Router.forward for link in self.chain):
            raise ConfigError(f"{own}: must implement forward(x, context)")

    def check_chain(self) -> None:
        """Raise ConfigError unless `chain` is a list of at least one router, all with this router's `fixed_k`."""
        links, own = self.chain, type(self).__name__
        if not (isinstance(links, list) and links and all(isinstance(link, Router) for link in links)):
            raise ConfigError(f"chain of {own}={links!r:.80}: must be a list of one or more routers")
        for link in links:
            require(link.fixed_k == self.fixed_k, f"fixed_k in the chain of {own}", link.fixed_k, f"{self.fixed_k}")

    def experts_per_token(self, seq_len: int) -> float:
        """Return how many experts process a token of a sequence of `seq_len` tokens, over the whole chain.

        If that number varies, return the mean that the router aims at; without one, the number of experts.
        """
        k = self.mean_k if self.fixed_k is None else self.fixed_k
        return float(self.num_experts if k is None else k * len(self.chain))

    def mixing_flops(self) -> int:
        """Return the forward FLOPs per token in addition to 2 for each weight of a matrix, as for mixing tokens."""
        return 0

    def check_domains(self, domains: Sequence[str]) -> None:
        """Raise ConfigError if the router cannot be used with a text of these domains."""

    def before_training(self, text: TrainingText) -> None:
        """Learn about the training text. Called once, before the first step.

        Store what this changes in a persistent buffer, so that checkpoints contain it.
        """

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each auxiliary loss that only this router has, by name. It may change from step to step.

        If the name is that of a loss that all routers share, this weight is added to the one in the configuration.
        """
        return {}

    @property
    def expert_rows(self) -> Float[Tensor, "E D"] | None:
        """The matrix whose rows produce the experts' logits, for losses on its geometry. None if there is none."""
        return None

    @property
    def expert_directions(self) -> Float[Tensor, "E N"] | None:
        """One vector per expert by which this router tells experts apart, for metrics. None if there is none."""
        return self.expert_rows

    def tie_to(self, first: "Router") -> None:
        """Replace the modules that all layers share by those of the router in the model's first MoE layer."""

    def role(self, name: str, p: nn.Parameter) -> Role:
        """Return how the optimizers treat the parameter `name`, see `Role`."""
        return "matrix" if p.ndim >= 2 else "scale"

    def initialize(self, std: float, names: dict[Tensor, str] | None = None) -> None:
        """Draw the initial values of all parameters and buffers, each by `draw` of the router that has it.

        names: the name of each tensor in the model, on which its random numbers depend (see `seeded`). Tensors that it
            leaves out keep their values. By default, names in this router.
        """
        routers = {f"{path}." if path else "": part for path, part in self.named_modules() if isinstance(part, Router)}
        for path, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if names is None or tensor in names:
                owner = max((prefix for prefix in routers if path.startswith(prefix)), key=len)
                with seeded(path if names is None else names[tensor], tensor.shape):
                    routers[owner].draw(path.removeprefix(owner), tensor, std)

    def draw(self, name: str, tensor: Tensor, std: float) -> None:
        """Draw the initial values of the parameter or buffer `name` of this router.

        By default, matrices of parameters are drawn from N(0, std). Other parameters and all buffers keep the values
        from the constructor.
        """
        if isinstance(tensor, nn.Parameter) and tensor.ndim >= 2:
            nn.init.normal_(tensor, std=std)

    def after_step(self, stats: RoutingStats) -> None:
        """Learn without a gradient from this layer's sums over all tokens of an optimizer step.

        Called once after each step, never in evaluation. Store what this changes in a persistent buffer, so that
        checkpoints contain it.
        """

    def bars(self, noisy: Float[Tensor, "T N"], k: int) -> Float[Tensor, "T N"]:
        """Return what each of the noisy logits has to exceed, if the others keep their values, to be chosen.

        By default, this is the k-th largest of the others. An infinite value is one that cannot be exceeded, or that
        always is.
        """
        return bar(noisy, k)

    def expected_load(
        self, clean: Float[Tensor, "T N"], noisy: Float[Tensor, "T N"], k: int, context: Context
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the loss `expected_load_cv` for `Routing.aux`, if it is weighted and there is noise, as in training.

        clean, noisy: logits before and after `add_noise`, first those of the E experts, then those of other choices.
        k: how many of the largest noisy logits a token takes.
        """
        noise = context.knobs.noise
        if "load" not in context.costly or noise is None or not self.training:
            return {}
        real = slice(0, self.num_experts)
        return {"expected_load_cv": expected_load_cv(clean[:, real], self.bars(noisy, k)[:, real], noise)}

    def add_noise(self, logits: Float[Tensor, "T E"], knobs: Knobs) -> Float[Tensor, "T E"]:
        """Return logits + N(0, noise^2) in training; return the logits unchanged in evaluation or without noise.

        Noise comes before temperature, softmax and selection. It therefore affects the selection, the gate weights and
        the balance loss.
        """
        if knobs.noise is None or not self.training:
            return logits
        return logits + knobs.noise * torch.randn_like(logits)


class LinearRouter(Router):
    """Base class of routers whose logits are W x: `weight` is W (E, D) and declared as `expert_rows`."""

    def __init__(self, dim: int, num_experts: int, *, fixed_k: int | None) -> None:
        super().__init__(dim, num_experts, fixed_k=fixed_k)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    @property
    def expert_rows(self) -> Float[Tensor, "E D"]:
        return self.weight

    def logits(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return W x in fp32."""
        return F.linear(x, self.weight.to(x.dtype))


def largest(scores: Float[Tensor, "T N"], k: int, *, ties: Float[Tensor, "T N"]) -> Int[Tensor, "T k"]:
    """Return the indices of the k largest scores of each token, the largest first. Equal scores are ordered by `ties`.

    Scores that are computed from logits round to equal numbers where logits are large.
    """
    order = ties.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True)[:, :k])


def renormalized_top(
    logits: Float[Tensor, "T E"], k: int
) -> tuple[Float[Tensor, "T E"], Int[Tensor, "T k"], Float[Tensor, "T k"]]:
    """Return p = softmax of the logits, the k experts of largest logit, and their gates: p over its sum over them.

    With k=1 the gate is p itself, because it would otherwise be the constant 1.
    """
    probs = torch.softmax(logits, -1)
    expert = logits.topk(k).indices
    weight = picked(probs, expert)
    if k > 1:
        weight = weight / weight.sum(-1, keepdim=True)
    return probs, expert, weight


def check_groups(groups: int, top_groups: int, num_experts: int, k: int) -> None:
    """Raise ConfigError unless E experts form so many equal groups, and k of them are in `top_groups` groups."""
    divides = groups >= 1 and num_experts % groups == 0
    require(divides, "router.groups", groups, f"a divisor of model.num_experts={num_experts}")
    require(1 <= top_groups <= groups, "router.top_groups", top_groups, f"between 1 and router.groups={groups}")
    within = top_groups * (num_experts // groups)
    require(k <= within, "router.k", k, f"at most {within}, the experts in router.top_groups={top_groups} groups")


def check_k(k: int, num_experts: int, *, key: str = "router.k") -> None:
    """Raise ConfigError if the number of experts per token is no whole number from 1 to E."""
    require(type(k) is int, key, k, "a whole number")
    require(1 <= k <= num_experts, key, k, f"between 1 and model.num_experts={num_experts}")
