"""Tests of what must hold for every router: for each yaml in conf/router and each arm of the SPECTRA ablation."""

import inspect
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import torch
import yaml
from torch import Tensor, nn
from waiting import WaitingOperators

from moe import testing
from moe.checks import ConfigError
from moe.config.classes import build, locate
from moe.config.keys import OFF
from moe.config.options import CONF, router_spec
from moe.config.schema import Config
from moe.metrics.catalog import METRICS
from moe.model.causal_lm import MoEOutput
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.base import Router
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs, Routing, TrainingText, document_positions
from moe.routing.dispatch import dispatch
from moe.routing.stats import RoutingStats
from moe.testing import inputs, learning
from moe.testing.inputs import B, E, S, context
from moe.training.objective import total_loss

YAMLS = sorted((CONF / "router").glob("*.yaml"))
IN_EVALUATION = {"sinkhorn": "inference", "spectra": "sinkhorn_inference"}  # use the batch in evaluation too


class Spec(NamedTuple):
    """The name of a router, the settings in its yaml, and the number of experts."""

    name: str
    settings: dict[str, Any]
    num_experts: int = E

    def make(self, dim: int) -> Router:
        return build(self.settings, "router", dim, self.num_experts)


SPECS = [Spec(path.stem, router_spec(path.stem)) for path in YAMLS]
for arm in sorted((CONF / "variant").glob("spectra_*.yaml")):
    [base] = [spec.settings for spec in SPECS if spec.name == "spectra"]
    SPECS.append(Spec(arm.stem, base | yaml.safe_load(arm.read_text()).get("router", {})))
SPECS += [
    Spec(f"{name}_{key}", {spec.name: spec for spec in SPECS}[name].settings | {key: True})
    for name, key in IN_EVALUATION.items()
]
BY_NAME = {spec.name: spec for spec in SPECS}
# Routers whose k may not be any number from 1 to E.
OTHER_LIMITS = {"group_limited", "null_experts", "moe_plus_plus", "document_pool", "document_pool_causal"}
OTHER_LIMITS |= {"oracle", "shuffled_oracle"}
TOP_K = [path.stem for path in YAMLS if "k" in BY_NAME[path.stem].settings and path.stem not in OTHER_LIMITS]
# Routers that declare what a single expert makes useless. Others, such as those of docs/extending.md, need not.
WITH_ONE_EXPERT = """
    chain_of_experts cosine expert_threshold gumbel hash mlp noisy_topk quantile_balancing random sigmoid_bias sinkhorn
    phi_balancing smebu spectra sqrt_softplus_bias switch switch_jitter temperature top2 topk topk_hard
""".split()
# Settings with which a router ignores keys that it uses with others.
CORNERS = [
    Spec(f"{name} {changes} of {experts}", BY_NAME[name].settings | changes, experts)
    for name, changes, experts in (
        ("top_p", {"p": 1.0, "k_max": E}, E),
        ("top_p", {"k_max": 1}, E),
        ("expert_choice", {"capacity_factor": float(E)}, E),
        ("spectra", {"k": 1}, E),
        ("spectra", {"so_lambda_max": 0.0}, E),
        ("spectra", {"expert_choice_capacity_factor": 5.0}, E),
        ("spectra", {"k": E, "expert_choice_routing": False}, E),
        ("spectra", {"expert_choice_routing": False, "expert_choice_capacity_factor": 5.0}, E),
        ("group_limited", {"k": 1}, E),
        ("group_limited", {"k": E, "top_groups": 4}, E),
        ("group_limited", {"top_groups": 4}, E),
        ("group_limited", {"groups": E}, E),
        *((name, {"k": E}, E) for name in TOP_K),
        *((name, {"k": 1}, 1) for name in WITH_ONE_EXPERT),
        ("group_limited", {"k": 1, "groups": 1, "top_groups": 1}, 1),
        ("expert_choice", {"capacity_factor": 0.5}, 1),
        ("top_p", {"k_max": 1}, 1),
        ("soft_moe", {}, 1),
        ("null_experts", {"k": 2}, 1),
        ("moe_plus_plus", {"k": 2}, 1),
        ("relu", {"target": 0.5}, 1),
    )
]
# Settings with which each part of a router has an effect on few tokens in two steps.
STRONG: dict[str, dict[str, Any]] = {
    "dtop_p": {"p": 0.9, "k_p": 1.0, "k_i": 0.5},
    "hash": {"vocab_size": 64},
    "relu": {"coefficient": 1.0},
    "phi_balancing": {"balance": 1.0, "decay": 0.5},
    "sigmoid_bias": {"rate": 0.3},
    "smebu": {"rate": 0.3},
    "sqrt_softplus_bias": {"rate": 0.3},
    "spectra": {
        "ema_bias_weight": 0.5,
        "sinkhorn_epsilon": 1.0,
        "sinkhorn_iterations": 0,
        "expert_choice_capacity_factor": 1.1,
        "router_dim": 4,
    },
}
# Settings that choose how something is computed. They change the rounding alone.
ROUNDING = {("spectra", "log_sinkhorn_enabled")}
# Settings with which costs count, see tests/model/test_decoder.py.
COSTS = {("top_p", "mean_k")}
# Of these, only the settings that are declared are turned, because the others take long and are those of "spectra".
DECLARED_ONLY = [
    *(f"spectra_no_{part}" for part in ("expression", "gru", "ortho", "quota", "repulsion")),
    "spectra_reference",
    *(f"spectra {changes} of {E}" for changes in ({"k": 1}, {"so_lambda_max": 0.0})),
    f"spectra {{'expert_choice_capacity_factor': 5.0}} of {E}",
    f"spectra {{'expert_choice_routing': False, 'expert_choice_capacity_factor': 5.0}} of {E}",
]
ON_THE_CPU = ("base_layers",)  # routers that compute their decision on the CPU and copy it to the device
# test_spectra.py tests the exception: with a quota the number of experts varies only under skewed loads
EXCEPTIONS = {
    ("without_fixed_k_the_number_of_experts_varies", spec.name)
    for spec in SPECS
    if spec.settings.get("expert_choice_routing")
}


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> Spec:
    return request.param


@pytest.fixture
def x() -> Tensor:
    return inputs.hidden_states()


@pytest.fixture
def ids() -> Tensor:
    return inputs.token_ids()


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_yaml_begins_with_its_purpose_whether_it_is_causal_and_its_equation(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line != "# @package _global_"]
    purpose, equation = lines[:2]
    assert purpose.startswith("# ")
    [spec] = [spec for spec in SPECS if spec.name == path.stem]
    assert ("not causal" in purpose) != spec.make(inputs.D).causal
    assert "causal" in purpose
    assert equation.startswith("# ")
    assert "=" in equation


@pytest.mark.parametrize("law", testing.LAWS)
def test_every_router_holds_every_law(spec: Spec, law: str) -> None:
    if (law, spec.name) not in EXCEPTIONS:
        settings = {key: value for key, value in spec.settings.items() if key != "_target_"}
        testing.check_law(law, spec.settings["_target_"], **settings)


def test_the_metric_of_the_load_names_the_routers_that_make_it_even_by_construction() -> None:
    """Their loads are exactly even in evaluation, whatever the parameters and the tokens are."""

    def is_even(spec: Spec) -> bool:
        router = inputs.random_router(spec.make).eval()
        states = [torch.randn(B * S, inputs.D, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        routed = [router.chain[0](x, context(inputs.token_ids())) for x in states]
        loads = [dispatch(routing, E, capacity=None, seq_len=S).offered for routing in routed]
        return all(len(load.unique()) == 1 for load in loads)

    even = [path.stem for path in YAMLS if is_even(BY_NAME[path.stem])]
    assert set(re.findall("`(\\w+)`", METRICS["routing/load_cv"].meaning)) == set(even)


@pytest.mark.parametrize("corner", CORNERS, ids=lambda spec: spec.name)
def test_keys_that_change_nothing_in_corner_cases_are_declared(corner: Spec) -> None:
    learning.keys_that_change_nothing_are_declared(corner.make)


@pytest.mark.parametrize(
    ("name", "settings", "key", "values"),
    [
        ("topk", {"k": 1}, "gate", ("renorm", "softmax_all")),
        ("group_limited", {"k": 1}, "gate", ("renorm", "softmax_all")),
        ("sigmoid_bias", {"k": 1}, "normalize", (True, False)),
        ("top_p", {"k_max": 1}, "p", (0.1, 0.9)),
    ],
)
def test_a_setting_that_a_router_ignores_changes_nothing(
    name: str, settings: dict[str, Any], key: str, values: tuple[Any, Any]
) -> None:
    specs = [Spec(name, BY_NAME[name].settings | settings | {key: value}) for value in values]
    assert all(f"router.{key}" in spec.make(inputs.D).ignored_keys() for spec in specs)
    assert torch.equal(*(learning.training_gradients(spec.make) for spec in specs))


def computed(settings: dict[str, Any], experts: int) -> Tensor:
    """Return what a layer computes in two training steps and then in evaluation: outputs, gradients, what is recorded.

    Gradients are those of the experts and of `weight`, which all settings leave alone.
    """
    torch.manual_seed(0)
    router = build(settings, "router", inputs.D, experts)
    for key, tensor in [*router.named_parameters(), *router.named_buffers()]:
        router.draw(key, tensor, 0.5)
    layer = MoELayer(router, Experts(experts, inputs.D, hidden=inputs.F, kind="silu"))
    for p in layer.experts.parameters():
        nn.init.normal_(p, std=0.3)
    router.before_training(TrainingText(torch.arange(1000) % 17, inputs.TEXT.domains))
    results: list[Tensor] = []
    for step in range(3):
        layer.train(step < 2)
        x = (1 + step) * torch.randn(B, S, inputs.D, generator=torch.Generator().manual_seed(step))
        knobs = Knobs.of(temperature=settings.get("temp", 1.0))
        output = layer(x, context(inputs.token_ids())._replace(knobs=knobs))
        results += [output.y, *output.aux.values()]
        if not layer.training:
            break
        aux = {name: value[None] for name, value in output.aux.items()}
        losses = MoEOutput(loss=output.y.square().mean(), aux=aux)
        layer.zero_grad()
        loss = total_loss(Config(**OFF), [router.loss_weights], losses)
        loss.backward()
        results += [
            loss,
            *(p.grad for name, p in layer.named_parameters() if name.startswith(("experts", "router.weight"))),
        ]
        for link in router.chain:
            link.after_step(output.stats)
        results += [router.expert_directions] if router.expert_directions is not None else []
    return torch.cat([result.detach().flatten().double() for result in results])


def others(annotation: Any, value: Any) -> list[Any]:
    """Return other values of a setting."""
    if get_origin(annotation) is Literal:
        return [each for each in get_args(annotation) if each != value]
    if annotation in (str, str | None):  # another run and its digest, which tests/model/test_replay.py turns
        return []
    numbers = {bool: [not value], int: [value + 1, value - 1, 1], float: [value / 10, 20 * value, value + 0.5]}
    return [each for each in numbers[annotation] if each != value]


def test_a_router_says_why_it_ignores_a_key_of_the_whole_configuration() -> None:
    """A command that gives the key is refused with this reason. For a key of the router, its other settings are one."""
    found = {spec.name: spec.make(inputs.D).why_ignored() for spec in SPECS + CORNERS}
    assert [(name, key) for name, why in found.items() for key in why if key in OFF and not why[key]] == []
    assert sum(key == "noise" for why in found.values() for key in why) > len(WITH_ONE_EXPERT)


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.name != "spectra_full"] + CORNERS, ids=lambda spec: spec.name
)
def test_every_setting_of_a_router_changes_something_or_is_declared(spec: Spec) -> None:
    """A setting changes what a layer computes or what is recorded if and only if the router does not ignore it.

    Settings that are ignored are left out of a run. All together, they change nothing either. The router may also name
    other values that mean the same as those given (`same_as`), such as for quotas that limit nothing.
    """
    kind = locate(spec.settings["_target_"], "router", trusted=True)
    name = kind.__module__.rpartition(".")[2]
    off = {key for key, value in spec.settings.items() if key in STRONG.get(name, {}) and value in (0, 5.0)}
    settings = spec.settings | {key: value for key, value in STRONG.get(name, {}).items() if key not in off}

    def ignored(values: dict[str, Any]) -> frozenset[str]:
        router = build(values, "router", inputs.D, spec.num_experts)
        return router.ignored_keys() | router.ignores_without_capacity

    def changes(values: dict[str, Any]) -> bool:
        result = computed(values, spec.num_experts)
        return result.shape != before.shape or not torch.allclose(result, before, rtol=1e-4, atol=1e-6)

    before, unused = computed(settings, spec.num_experts), ignored(settings)
    same_as = build(settings, "router", inputs.D, spec.num_experts).same_as
    assert not changes(settings | same_as)
    assert not changes({key: value for key, value in settings.items() if f"router.{key}" not in unused})
    for key, parameter in list(inspect.signature(kind, eval_str=True).parameters.items())[2:]:
        if spec.name in DECLARED_ONLY and f"router.{key}" not in unused:
            continue
        tried: list[bool] = []
        for value in others(parameter.annotation, settings.get(key, parameter.default)):
            try:
                still_unused = f"router.{key}" in ignored(settings | {key: value})
            except ConfigError:  # the value is not allowed
                continue
            if f"router.{key}" in unused and not still_unused:
                continue
            tried.append(changes(settings | {key: value}))
            if tried[-1]:
                break
        told = (name, key) in ROUNDING | COSTS or (key in same_as and not any(tried))
        if tried and not told:  # without any, no other value is allowed
            assert any(tried) != (f"router.{key}" in unused), key


def test_forward_and_backward_wait_for_the_device_only_where_sizes_depend_on_values(
    spec: Spec, x: Tensor, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for the device once per `Routing.masked` and once per capacity limit, and nowhere else.

    The exception are the routers `ON_THE_CPU`, which wait once more.

    The test counts, on a CPU, the operators that would wait on a GPU.
    """
    masked = Routing.masked
    masked_calls: list[str] = []
    monkeypatch.setattr(
        Routing, "masked", lambda *args, **kwargs: masked_calls.append("nonzero") or masked(*args, **kwargs)
    )
    monkeypatch.setattr(Experts, "kernel", lambda self, dtype: "grouped")  # the kernel that runs on a GPU
    layer = inputs.random_layer(spec.make)
    for capacity in (None, 1.0):
        layer_context = context(ids, noise=0.1, capacity=capacity)
        with WaitingOperators() as waiting:
            packed = layer_context._replace(document_position=document_positions((torch.arange(S) % 5).expand(B, S)))
            output = layer(x.requires_grad_(), packed)
            torch.stack([output.y.square().mean(), *output.aux.values()]).sum().backward()
        capacity_calls = ["index"] * len(layer.router.chain) if capacity else []
        copies = ["lift_fresh"] if spec.name in ON_THE_CPU else []
        assert sorted(waiting.calls) == sorted([*masked_calls, *capacity_calls, *copies])
        masked_calls.clear()


# ---- Wrong routers ------------------------------------------------------------------------------------------------


class ByProbability(TopK):
    """Wrong: takes the most probable experts, and probabilities round to ties."""

    def forward(self, x: Tensor, context: Context) -> Routing:
        probs = torch.softmax(self.logits(x), -1)
        weight, expert = probs.topk(self.k)
        return Routing.token_choice(expert, weight, probs=probs)


class Forgetful(TopK):
    """Wrong: what it learns after a step, and the numbers drawn for it, are no buffers."""

    def __init__(self, dim: int, num_experts: int, *, drawn: bool = False) -> None:
        super().__init__(dim, num_experts)
        self.bias = torch.randn(num_experts) if drawn else torch.zeros(num_experts)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) + self.bias

    def after_step(self, stats: RoutingStats) -> None:
        self.bias = self.bias + 0.0 * stats.offered if self.bias.any() else -stats.offered


class Renormalized(TopK):
    """Wrong: one expert with the constant weight 1, so that the router never learns from the output."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, k=1)

    def forward(self, x: Tensor, context: Context) -> Routing:
        routing = super().forward(x, context)
        return routing._replace(weight=torch.ones_like(routing.weight))


class Running(TopK):
    """Right: adds the mean of the earlier tokens of the sequence, and says so."""

    reads_earlier_tokens = True

    def forward(self, x: Tensor, context: Context) -> Routing:
        hidden = x.view(*context.ids.shape, -1)
        count = torch.arange(1, hidden.shape[1] + 1, device=x.device)
        mean = hidden.cumsum(1) / count[:, None]
        return super().forward((hidden + mean).reshape(x.shape), context)


class Undeclared(Running):
    """Wrong: does not say that it reads earlier tokens."""

    reads_earlier_tokens = False


class Backwards(TopK):
    """Wrong: adds the mean of the whole sequence and claims to be causal."""

    def forward(self, x: Tensor, context: Context) -> Routing:
        hidden = x.view(*context.ids.shape, -1)
        return super().forward((hidden + hidden.mean(1, keepdim=True)).reshape(x.shape), context)


class Negative(TopK):
    """Wrong: weights below 0."""

    def forward(self, x: Tensor, context: Context) -> Routing:
        routing = super().forward(x, context)
        return routing._replace(weight=-routing.weight)


class InPlace(TopK):
    """Wrong: changes the hidden states."""

    def forward(self, x: Tensor, context: Context) -> Routing:
        return super().forward(x.mul_(2), context)


class WithoutTemperature(TopK):
    """Wrong: claims to have a temperature."""

    schedulable = True

    def forward(self, x: Tensor, context: Context) -> Routing:
        return super().forward(x, context._replace(knobs=context.knobs._replace(temperature=torch.ones(()))))


class Raising(TopK):
    """Wrong: raises."""

    def forward(self, x: Tensor, context: Context) -> Routing:
        raise RuntimeError("boom\nand more")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ByProbability, "ByProbability breaks the law .*: noise changes nothing"),
        (Forgetful, "Forgetful breaks the law a_loaded_state_goes_on_as_the_saved_one: .*persistent buffers"),
        (
            Renormalized,
            "breaks the law every_parameter_learns_from_the_output: weight gets no gradient; .*do not renorm",
        ),
        (Undeclared, "breaks the law reading_other_tokens_is_declared: .*set `reads_earlier_tokens = True`"),
        (
            Backwards,
            "breaks the law causality_is_declared: .*later tokens change earlier outputs: set `causal = False`",
        ),
        (InPlace, "the law the_input_is_not_changed: forward changes x in place; work on a new tensor"),
        (
            WithoutTemperature,
            "the law a_schedulable_router_uses_the_temperature: context.knobs.temperature changes nothing: divide",
        ),
        (Raising, "Raising breaks the law assignments_are_valid: it raises RuntimeError: boom$"),
        (Negative, "breaks the law assignments_are_valid: a weight is negative"),
    ],
)
def test_wrong_routers_fail_with_advice(kind: type[Router], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_router(kind)


def test_choosing_by_probabilities_that_round_to_ties_is_found() -> None:
    with pytest.raises(AssertionError, match="choose by logits"):
        testing.check_law("large_logits_choose_as_in_fp64", ByProbability)


def test_random_numbers_outside_of_buffers_are_found() -> None:
    with pytest.raises(AssertionError, match="persistent buffers"):
        testing.check_law("a_loaded_state_goes_on_as_the_saved_one", Forgetful, drawn=True)


def test_a_router_that_reads_earlier_tokens_can_hold_every_law() -> None:
    state = torch.get_rng_state()
    testing.check_router(Running)
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of the caller are used up"


def test_a_router_can_be_named_and_its_settings_are_checked() -> None:
    testing.check_router("moe.routers.topk.TopK", k=3)
    with pytest.raises(ValueError, match=r"unknown key of router 'router\.kk'"):
        testing.check_router("moe.routers.topk.TopK", kk=3)
    with pytest.raises(ValueError, match=r"^router.k=x: must be a whole number$"):
        testing.check_router(TopK, k="x")
    with pytest.raises(ValueError, match=r"^unknown law 'causality'; nearest: causality_is_declared$"):
        testing.check_law("causality", TopK)
    with pytest.raises(ValueError, match=r"^target=Linear: must be a class that derives from moe.Router, or its name$"):
        testing.check_router(torch.nn.Linear)


class WrittenTypes(TopK):
    """Has the types of its settings as text, as with `from __future__ import annotations`. One has no default."""

    def __init__(self, dim: int, num_experts: int, *, k: "int", **settings: Any) -> None:
        super().__init__(dim, num_experts, k=k, **settings)


def test_the_laws_take_the_same_settings_as_a_configuration() -> None:
    testing.check_law("causality_is_declared", WrittenTypes, k=2, gate="renorm")
    with pytest.raises(ValueError, match=r"^router.k=x: must be a whole number$"):
        testing.check_law("causality_is_declared", WrittenTypes, k="x")
    with pytest.raises(ValueError, match=r"^router.k is missing$"):
        testing.check_law("causality_is_declared", WrittenTypes)


def test_a_router_that_takes_all_experts_can_hold_every_law() -> None:
    testing.check_router(TopK, k=E)
