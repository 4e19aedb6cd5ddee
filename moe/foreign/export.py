"""Write a model of this project as a plain model of the transformers library, which loads it without our code.

Letters in shapes: T tokens, D width of a hidden state, E experts.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from moe.checks import ConfigError, one_of, require
from moe.foreign.anatomy import Anatomy, anatomy_of
from moe.foreign.restore import can_restore, own_layout, restore
from moe.foreign.rules import Rule, bias_of, matrix_of, rule_of
from moe.foreign.target_config import positions_of, settings_of
from moe.foreign.target_weights import residual_scale, weights_of
from moe.foreign.targets import GGUF_TARGETS, TARGETS, Target
from moe.model.causal_lm import MoEForCausalLM
from moe.routers.base import Router
from moe.routing.decision import Context, Routing

TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit, that an exported model may have

# The texts that are compared. They are longer than what a model reads by `MORE` tokens, unless one is too much work
# (weights times tokens) or needs too much memory (numbers of logits, or of attention in a layer).
MORE, WORK, NUMBERS = 32, 2e10, 2.0**26

# The precisions of a checkpoint that are read as fp32, as its config.json names them.
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Difference(NamedTuple):
    """How far the logits of two models are apart on two texts of random tokens.

    absolute: the largest difference. largest: the largest absolute logit of the first model. tokens: the length of a
    text.
    """

    absolute: float
    largest: float
    tokens: int

    @property
    def relative(self) -> float:
        return self.absolute / max(self.largest, 1e-30)

    def __str__(self) -> str:
        return f"{self.absolute:.2g}, where the largest logit is {self.largest:.2g}"


def to_transformers(model: MoEForCausalLM, target: str = "auto") -> PreTrainedModel:
    """Return `model` as a model of the architecture `target`, in evaluation mode.

    target: a key of `TARGETS`, or `auto` for the first one that expresses the model. A Mixture of Experts that was
        imported is first of all one of its own architecture (`restore`), if that follows its router.

    Its weights have the precision of the model, or that of the checkpoint from which it was imported, if that holds
    them exactly. Otherwise they are in fp32.

    Raises ConfigError, with one line, if the target does not express the model, or if the logits differ by more than
    `TOLERANCE`.
    """
    return convert(model, target)[0]


def convert(model: MoEForCausalLM, target: str) -> tuple[PreTrainedModel, Difference]:
    """Return what `to_transformers` returns, and how far its logits are from those of `model`.

    Where two scores that decide about an expert are equal but for rounding, a text has other logits from there on. This
    is rare, and the logits of a wrong model differ in all texts. So if the first texts differ, others decide.
    """
    require_plain(model)
    layout = own_layout(model)
    own = layout is not None and target in ("auto", layout.name) and can_restore(model, layout)
    found = restore(model) if own else _rewritten(model, target)
    found.generation_config = copy.deepcopy(model.generation_config)
    difference = compare(model, found.eval())
    if not difference.relative <= TOLERANCE:
        difference = compare(model, found, seed=1)
    if not difference.relative <= TOLERANCE:
        raise ConfigError(f"--to {target}: the logits of {found.config.model_type} are off by up to {difference}")
    stored = HALVES.get(str((model.config.imported or {}).get("dtype")))
    for dtype in (stored, next(p for p in model.parameters() if p.ndim == 2).dtype):
        if dtype is not None and all(torch.equal(p.to(dtype).to(p.dtype), p) for p in found.parameters()):
            for p in found.parameters():  # not found.to(dtype), which would round the frequencies of positions
                p.data = p.data.to(dtype)
            break
    return found, difference


def require_plain(model: MoEForCausalLM) -> None:
    """Raise ConfigError for a model with an adapter of its own, which no architecture of transformers has.

    A saved model has none of LoRA, because a run merges it into the weights.
    """
    kind = None if model.adapter is None else f"{type(model.adapter).__module__}.{type(model.adapter).__qualname__}"
    require(kind is None, "adapter", kind, "none, or LoRA that is merged into the weights, as in a saved model")


def _rewritten(model: MoEForCausalLM, target: str) -> PreTrainedModel:
    """Return a model in the form of the target, in fp32."""
    layout = own_layout(model)
    one_of("--to", target, dict.fromkeys(("auto", *TARGETS, *([layout.name] if layout else []))))
    anatomy = parts_of(model, to=target)
    chosen = choose(model, anatomy, list(TARGETS.values()) if target == "auto" else [TARGETS[target]], to=target)
    scale = residual_scale(anatomy, chosen)
    config = getattr(transformers, f"{chosen.prefix}Config")(**settings_of(anatomy, chosen, scale=scale))
    for name, value in positions_of(anatomy, chosen).items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):  # the model draws initial weights, which are replaced
        found = getattr(transformers, f"{chosen.prefix}ForCausalLM")(config)
    found.load_state_dict(weights_of(anatomy, chosen, scale=scale), strict=True)
    return cast(PreTrainedModel, found)


def parts_of(model: MoEForCausalLM, *, to: str) -> Anatomy:
    """Return the parts of `model`. `to`: what the user wants to write it as.

    Raises ConfigError for an imported model with other parts. It says whether the model can be given back as what it
    was, or why not.
    """
    try:
        return anatomy_of(model)
    except ConfigError as error:
        layout, advice = own_layout(model), ""
        if layout is not None and can_restore(model, layout):
            advice = f"; --to {layout.name} gives it back as what it was"
        elif layout is not None:
            rule = rule_of(model.moe_layers[0].router, temperature=model.config.router_temperature)
            advice = f"; {_routers_reason(model, rule, [layout], [layout])}"
        raise ConfigError(f"--to {to}: {error}{advice}") from None


def choose(model: MoEForCausalLM, anatomy: Anatomy, targets: list[Target], *, to: str) -> Target:
    """Return the first of the `targets` that expresses `model`, which has these parts.

    Raises ConfigError if there is none. `to`: how the user named them.
    """
    if found := expressing(anatomy, targets):
        return found[0]
    others = [each.name for each in expressing(anatomy, list(TARGETS.values()))]
    others += ["gguf"] if expressing(anatomy, GGUF_TARGETS) else []
    advice = f"; --to {others[0]} expresses this model" if others else ""
    raise ConfigError(f"--to {to}: {_reason(model, anatomy, targets)}{advice}")


def expressing(anatomy: Anatomy, targets: list[Target]) -> list[Target]:
    """Return those of the `targets` that express a model with these parts."""
    return [each for each in targets if each.expresses(anatomy)]


def _router_named(model: MoEForCausalLM) -> str:
    """Return the router's class and settings as a call, such as router=TopK(k=2)."""
    spec = model.config.router or {}
    settings = ", ".join(f"{name}={value}" for name, value in spec.items() if name != "_target_")
    return f"router={str(spec.get('_target_', '')).rpartition('.')[2]}({settings})"


def _reason(model: MoEForCausalLM, anatomy: Anatomy, wanted: list[Target]) -> str:
    """Return why none of the targets expresses the model. If it is the router alone, say how far it would be off."""
    lacking = list(dict.fromkeys(lack for each in wanted if (lack := each.lacks(anatomy)) is not None))
    apart_from_router = [each for each in wanted if each.lacks(anatomy) is None]
    if not apart_from_router:
        return "; ".join(lacking)
    return _routers_reason(model, anatomy.rule, wanted, apart_from_router, lacking)


def _routers_reason(
    model: MoEForCausalLM, rule: Rule | None, wanted: list[Target], fitting: list[Target], lacking: Sequence[str] = ()
) -> str:
    """Return why none of the targets follows the routers, and how far the nearest rule would be off.

    rule: that of the routers, if they have one. fitting: those of the `wanted` targets that have all other parts.
    lacking: what the others lack.
    """
    router = _router_named(model)
    followers = [each.name for each in wanted if rule is not None and each.follows(rule)]
    if rule is None:
        reason = f"{router}: what it does in evaluation is not the rule of any target"
    elif followers:
        reason = f"{router}: its rule ({rule.describe()}) is that of {', '.join(followers)}, but {'; '.join(lacking)}"
    else:
        refusal = f"{wanted[0].name} does not follow" if len(wanted) == 1 else "no target follows"
        reason = f"{router}: {refusal} its rule ({rule.describe()})"
    if matrix_of(model.moe_layers[0].router) is None:
        return f"{reason}; no target is near, because this router has no matrix that gives the scores of its experts"
    near = nearest(model, rule, fitting)
    if near is None:
        return reason
    target, other, difference = near
    rule_there = f"the nearest rule, {target.name} with {other.describe()}"
    return f"{reason}; with {rule_there}, the logits would be off by up to {difference}"


def nearest(model: MoEForCausalLM, rule: Rule | None, targets: list[Target]) -> tuple[Target, Rule, Difference] | None:
    """Return the rule of one of the `targets` whose logits are nearest to those of `model`, with the same matrices.

    rule: that of its routers, if they have one. They have a matrix. The result is None if no rule of a target is known.
    """
    router = model.moe_layers[0].router
    k = router.fixed_k or max(1, min(router.num_experts, round(router.experts_per_token(1))))
    known = rule or Rule(k, temperature=model.config.router_temperature, biased=bias_of(router) is not None)
    best: tuple[Target, Rule, Difference] | None = None
    tried: set[Rule] = set()
    for target in targets:
        for scores, weights in itertools.product(target.scores, target.weights):
            other = replace(known, scores=scores, weights=weights)
            other = other if target.biased else replace(other, biased=False)
            other = other if target.grouped else replace(other, groups=1, top_groups=1)
            if other in tried or not target.follows(other):
                continue
            tried.add(other)
            changed = copy.deepcopy(model)
            for layer in changed.moe_layers:
                layer.router = _Follower(layer.router, other)
            difference = compare(model, changed)
            if best is None or difference.absolute < best[2].absolute:
                best = target, other, difference
    return best


class _Follower(Router):
    """A router that follows a rule with the matrix and the bias of another one."""

    def __init__(self, other: Router, rule: Rule) -> None:
        super().__init__(other.dim, other.num_experts, fixed_k=rule.k)
        matrix = matrix_of(other)
        assert matrix is not None
        self.rule, self.matrix, self.bias = rule, matrix, bias_of(other) if rule.biased else None

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        gates = self.rule.gates(x @ self.matrix.to(x.dtype).T, self.bias).to(x.dtype)
        return Routing.masked(gates > 0, gates)


@torch.no_grad()
def compare(model: MoEForCausalLM, other: torch.nn.Module, *, seed: int = 0) -> Difference:
    """Return how far the logits of `other` are from those of `model` in fp32, on two texts of random tokens.

    seed: of the texts.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (2, compared_tokens(model)), generator=generator)
    ours, theirs = (_in_fp32(each)(input_ids=ids).logits for each in (model, other))
    return Difference((ours - theirs).abs().max().item(), ours.abs().max().item(), ids.shape[1])


def read_tokens(model: MoEForCausalLM) -> int:
    """Return how many tokens the model reads: the larger one of its positions and its window."""
    window = (model.config.imported or {}).get("sliding_window")
    return max(model.config.max_position_embeddings, window or 0)


def compared_tokens(model: MoEForCausalLM) -> int:
    """Return the length of the texts that are compared, see `MORE`."""
    config, weights = model.config, sum(p.numel() for p in model.parameters())
    most = min(WORK / weights, NUMBERS / config.vocab_size, math.sqrt(NUMBERS / config.num_attention_heads))
    return min(read_tokens(model) + MORE, max(MORE, int(most)))


def _in_fp32(model: Any) -> Any:
    """Return `model` if its weights are in fp32, otherwise a copy of it in fp32."""
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    return model.eval() if exact else copy.deepcopy(model).float().eval()
