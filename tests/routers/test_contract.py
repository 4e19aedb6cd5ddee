"""Tests of what must hold for every router: for each yaml in conf/router and each arm of the SPECTRA ablation."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor, nn
from waiting import WaitingOperators

from moe.checks import build
from moe.config.options import CONF
from moe.config.schema import OFF, Config
from moe.model.decoder import MoEOutput
from moe.model.experts import Experts
from moe.model.layer import LayerOutput, MoELayer
from moe.routers.base import Router
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs, Routing, document_positions
from moe.routing.dispatch import dispatch
from moe.routing.losses import auxiliary
from moe.routing.stats import RoutingStats
from moe.training.objective import total_loss

B, S, D, E, F = 3, 8, 16, 8, 12
YAMLS = sorted((CONF / "router").glob("*.yaml"))
IN_EVALUATION = {"sinkhorn": "inference", "spectra": "sinkhorn_inference"}  # use the batch in evaluation too


class Spec(NamedTuple):
    """The name of a router and the settings in its yaml."""

    name: str
    settings: dict[str, Any]


SPECS = [Spec(path.stem, yaml.safe_load(path.read_text())) for path in YAMLS]
for arm in sorted((CONF / "variant").glob("spectra_*.yaml")):
    [base] = [spec.settings for spec in SPECS if spec.name == "spectra"]
    SPECS.append(Spec(arm.stem, base | yaml.safe_load(arm.read_text()).get("router", {})))
SPECS += [Spec(f"{name}_{key}", dict(SPECS)[name] | {key: True}) for name, key in IN_EVALUATION.items()]


def make_router(spec: Spec, *, num_experts: int = E) -> Router:
    """Build the router. Draw all its parameters and buffers at random, so that each of them has an effect."""
    torch.manual_seed(0)
    router = build(spec.settings, "router", D, num_experts)
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5)
    return router


def make_layer(spec: Spec, *, num_experts: int = E) -> MoELayer:
    router = make_router(spec, num_experts=num_experts)
    experts = Experts(num_experts, D, hidden=F, kind="silu")
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    return MoELayer(router, experts)


def context(ids: Tensor, *, noise: float = 0.0, capacity: float | None = None) -> Context:
    return Context(ids, Knobs.of(noise=noise), capacity)


def run_as_second_layer(layer: MoELayer, x: Tensor, context: Context) -> LayerOutput:
    """Run the layer twice. The second time, its router gets the state that it returned the first time."""
    return layer(x, context._replace(state=layer(x, context).routing[-1].state))


def dense_weights(routing: Routing) -> Tensor:
    """Return the weight of each expert for each token (T, E), or for each slot (B * M, E) if experts process slots."""
    weights = torch.zeros(rows_of(routing), E)
    return weights.index_put((routing.token, routing.expert), routing.weight, accumulate=True)


def rows_of(routing: Routing) -> int:
    """Return how many vectors the experts choose from: tokens, or slots if experts process slots."""
    return B * S if routing.slots is None else routing.slots.dispatch.shape[:2].numel()


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> Spec:
    return request.param


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 1000, (B, S), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_yaml_begins_with_its_purpose_whether_it_is_causal_and_its_equation(path: Path) -> None:
    purpose, equation = path.read_text().splitlines()[:2]
    assert purpose.startswith("# ")
    [spec] = [spec for spec in SPECS if spec.name == path.stem]
    assert ("not causal" in purpose) != make_router(spec).causal
    assert "causal" in purpose
    assert equation.startswith("# ")
    assert "=" in equation


def test_tokens_experts_and_weights_of_assignments_are_valid_and_no_pair_occurs_twice(
    spec: Spec, x: Tensor, ids: Tensor
) -> None:
    routing = make_router(spec).eval().chain[0](x.view(-1, D), context(ids))
    assert routing.token.shape == routing.expert.shape == routing.weight.shape
    assert routing.weight.dtype == torch.float32
    assert routing.token.min() >= 0
    assert routing.token.max() < rows_of(routing)
    assert routing.expert.min() >= 0
    assert routing.expert.max() < E
    assert (routing.weight >= 0).all()
    assert routing.state is None or len(routing.state) == B * S
    pairs = torch.stack([routing.token, routing.expert])
    assert pairs.unique(dim=1).shape == pairs.shape, "a token asks for the same expert twice"


def test_probabilities_are_a_distribution_over_all_experts_in_fp32(spec: Spec, x: Tensor, ids: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        layer = make_layer(spec)
        routings: list[Routing] = []
        layer.router.chain[0].register_forward_hook(lambda module, inputs, output: routings.append(output))
        layer(x.bfloat16(), context(ids))
    [routing] = routings
    if routing.probs is None:
        return
    assert routing.probs.shape == (B * S, E)
    assert routing.probs.dtype == torch.float32
    assert (routing.probs >= 0).all()
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(B * S))


def test_every_parameter_gets_a_gradient_from_the_output_alone(spec: Spec, x: Tensor, ids: Tensor) -> None:
    """Every parameter of a router gets a gradient from the layer's output, without auxiliary losses.

    With k=1 and renormalized weights that gradient would be exactly zero.
    """
    layer = make_layer(spec)
    run_as_second_layer(layer, x, context(ids)).y.square().sum().backward()
    for name, p in layer.router.named_parameters():
        assert p.grad is not None, name
        assert p.grad.norm() > 1e-4, name


def test_each_auxiliary_loss_has_a_gradient_on_the_router(spec: Spec, x: Tensor, ids: Tensor) -> None:
    """Every auxiliary loss has a gradient on at least one parameter of the router.

    A balance loss would have no gradient if it used only integer counts, and almost none with a softmax of a softmax.
    One parameter is enough, because not every loss depends on all of them. The z-loss, for example, does not depend on
    learned noise.
    """
    router = make_router(spec)
    if not list(router.parameters()):
        return
    routing = router.chain[0](x.view(-1, D), context(ids))
    offered = dispatch(routing, E, capacity=None, seq_len=S).offered
    losses = auxiliary(routing, offered, seq_len=S)
    assert losses
    if len(offered.unique()) == 1:  # a router that balances by construction: its balance loss is constant
        assert losses.pop("load_balance").item() == losses.pop("load_balance_global").item() == pytest.approx(1)
    for name, loss in losses.items():
        parameters = list(router.chain[0].parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        assert max(g.norm() for g in gradients if g is not None) > 1e-4, name


def test_evaluation_is_deterministic_and_ignores_noise_and_changes_no_state(spec: Spec, x: Tensor, ids: Tensor) -> None:
    layer = make_layer(spec).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first, second = (run_as_second_layer(layer, x, context(ids, noise=noise)).y for noise in (0.0, 9.0))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_forward_and_backward_wait_for_the_device_only_where_sizes_depend_on_values(
    spec: Spec, x: Tensor, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for the device once per `Routing.masked` and once per capacity limit, and nowhere else.

    The test counts, on a CPU, the operators that would wait on a GPU.
    """
    masked = Routing.masked
    masked_calls: list[str] = []
    monkeypatch.setattr(
        Routing, "masked", lambda *args, **kwargs: masked_calls.append("nonzero") or masked(*args, **kwargs)
    )
    monkeypatch.setattr(Experts, "kernel", lambda self, dtype: "grouped")  # the kernel that runs on a GPU
    layer = make_layer(spec)
    for capacity in (None, 1.0):
        layer_context = context(ids, noise=0.1, capacity=capacity)
        with WaitingOperators() as waiting:
            packed = layer_context._replace(document_position=document_positions((torch.arange(S) % 5).expand(B, S)))
            output = layer(x.requires_grad_(), packed)
            torch.stack([output.y.square().mean(), *output.aux.values()]).sum().backward()
        capacity_calls = ["index"] * len(layer.router.chain) if capacity else []
        assert sorted(waiting.calls) == sorted([*masked_calls, *capacity_calls])
        masked_calls.clear()


def test_no_tensor_is_created_on_the_default_device(spec: Spec, x: Tensor, ids: Tensor) -> None:
    """The layer and its router create all tensors on the device of their input.

    On a GPU the default device (the CPU) is another one. Here the default device is `meta`, because mixing it with the
    CPU is an error.
    """
    layer = make_layer(spec)
    for capacity in (None, 1.0):
        layer_context = context(ids, noise=0.1, capacity=capacity)._replace(
            orthogonality=True, compared=torch.arange(0, ids.numel(), 3)
        )
        with torch.device("meta"):
            output = layer(x.requires_grad_(), layer_context)
            torch.stack([output.y.square().mean(), *output.aux.values()]).sum().backward()
            for router in layer.router.chain:
                router.after_step(output.stats)


# Settings with which a router ignores keys that it uses with others, each with the number of experts.
CORNERS = [(spec, E) for spec in SPECS] + [
    (Spec(f"{name} {changes} of {experts}", dict(SPECS)[name] | changes), experts)
    for name, changes, experts in (
        ("random", {"k": E}, E),
        ("top_p", {"p": 1.0, "k_max": E}, E),
        ("top_p", {"k_max": 1}, E),
        ("expert_choice", {"capacity_factor": float(E)}, E),
        ("spectra", {"k": 1}, E),
        ("sigmoid_bias", {"k": 1}, 1),
        ("sinkhorn", {"k": 1}, 1),
        ("expert_threshold", {"k": 1}, 1),
        ("null_experts", {"k": 2}, 1),
        ("relu", {"target": 0.5}, 1),
    )
]


def training_gradients(spec: Spec, x: Tensor, ids: Tensor, *, num_experts: int = E, **settings: Any) -> Tensor:
    """Return the gradient of a training step on all weights of a layer, under these keys of the configuration."""
    config = Config(**(OFF | settings))
    layer = make_layer(spec, num_experts=num_experts)
    layer_context = context(ids, noise=config.noise, capacity=config.capacity)
    torch.manual_seed(0)
    output = layer(x, layer_context._replace(drop=config.drop, orthogonality=config.output_orthogonality > 0))
    aux = {name: value[None] for name, value in output.aux.items()}
    loss = output.y.square().mean()
    total_loss(config, [layer.router.loss_weights], MoEOutput(loss=loss, aux=aux)).backward()
    return torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in layer.parameters()])


@pytest.mark.parametrize(("spec", "experts"), CORNERS, ids=lambda value: getattr(value, "name", str(value)))
def test_every_key_changes_what_a_router_learns_or_is_one_that_it_ignores(
    spec: Spec, experts: int, x: Tensor, ids: Tensor
) -> None:
    """A key changes the gradient of a training step if and only if the router does not declare that it ignores the key.

    The exception are capacity limits of routers whose experts take equally many slots or tokens by construction: a
    limit below that number would drop some of them, but the keys are ignored.
    """
    values = {"noise": 2.0, "capacity": 0.6, "drop": "score"}
    ignored = make_router(spec, num_experts=experts).ignored_keys()
    assert ignored <= {*OFF, *(f"router.{name}" for name in spec.settings)}
    gradients = partial(training_gradients, spec, x, ids, num_experts=experts)
    dropless, limited = gradients(), gradients(capacity=0.6)
    for key in OFF:
        off, base = (limited, {"capacity": 0.6}) if key == "drop" else (dropless, {})
        on = gradients(**base, **{key: values.get(key, 1.0)})
        difference = (on - off).norm() / off.norm()
        if key not in ignored:
            assert difference > 1e-3, f"{key} changes nothing; the router should declare it in `ignores`"
        elif key != "capacity" and not (key == "drop" and "capacity" in ignored):
            assert difference < 1e-5, f"{key} changes something, although the router ignores it"


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
    name: str, settings: dict[str, Any], key: str, values: tuple[Any, Any], x: Tensor, ids: Tensor
) -> None:
    specs = [Spec(name, dict(SPECS)[name] | settings | {key: value}) for value in values]
    assert all(f"router.{key}" in make_router(spec).ignored_keys() for spec in specs)
    assert torch.equal(*(training_gradients(spec, x, ids) for spec in specs))


def test_every_token_gets_fixed_k_experts_and_without_fixed_k_the_number_varies(
    spec: Spec, x: Tensor, ids: Tensor
) -> None:
    """The declared `fixed_k` is correct for ordinary and extreme inputs, in training and evaluation.

    In a chain this holds for each of its routers.
    """
    flat = x.view(-1, D)
    inputs = [flat, 100 * flat, torch.full_like(flat, 0.7), torch.zeros_like(flat), torch.full_like(flat, 1e4)]
    router = make_router(spec)
    for link in router.chain:
        assert link.fixed_k == router.fixed_k
        counts = set()
        for mode in (True, False):
            link.train(mode)
            for tokens, noise in itertools.product(inputs, (0.0, 1.0)):
                routing = link(tokens, context(ids, noise=noise))
                counts |= set(torch.bincount(routing.token, minlength=rows_of(routing)).tolist())
                single_token = link(tokens[:1], context(ids[:1, :1], noise=noise))
                if routing.slots is None:
                    counts |= set(torch.bincount(single_token.token, minlength=1).tolist())
        if router.fixed_k is not None:
            assert counts == {router.fixed_k}
        elif routing.slots is None and not spec.settings.get("expert_choice_routing"):
            # test_spectra.py tests the exception: with a quota the number varies only under skewed loads
            assert len(counts) > 1, "the number of experts never varies, so the router should declare fixed_k"


def test_a_router_with_one_row_per_expert_declares_expert_rows(spec: Spec) -> None:
    """A router with a parameter of shape (num_experts, dim) says whether its rows produce the experts' logits.

    If it says nothing, the SimBal loss would be missing without a word. It can say no: by a property that is None.
    """
    for router in build(spec.settings, "router", 3 * D, E).chain:  # a width that no setting has by chance
        rows = [name for name, p in router.named_parameters() if p.shape == (E, 3 * D)]
        undeclared = type(router).expert_rows is Router.expert_rows
        assert not (rows and undeclared), f"{rows[0]}: return it from the property `expert_rows`, or return None there"


def test_each_row_of_expert_rows_is_trainable_and_changes_only_the_logits_of_its_expert(
    spec: Spec, x: Tensor, ids: Tensor
) -> None:
    for router in make_router(spec).eval().chain:
        rows = router.expert_rows
        if rows is None:
            continue
        assert rows.shape == (E, D)
        assert any(rows is p for p in router.parameters())
        if router(x.view(-1, D), context(ids)).logits is None:  # ReLU, whose gates are its positive logits
            continue
        before = router(x.view(-1, D), context(ids)).logits
        with torch.no_grad():
            rows[3] += 1.0
        changed = (router(x.view(-1, D), context(ids)).logits != before).any(0)
        assert changed.tolist() == [expert == 3 for expert in range(E)]


# Routers without fixed_k are left out under a capacity limit. The limit is a share of the number of assignments, and
# with them that number depends on every token.
FIXED_K = [spec for spec in SPECS if make_router(spec).fixed_k is not None]
CAPACITIES = [(spec, None) for spec in SPECS] + [(spec, 0.6) for spec in FIXED_K]


def test_under_a_capacity_a_router_is_causal_only_with_fixed_k_and_drops_by_position(spec: Spec) -> None:
    router = make_router(spec)
    assert router.is_causal(capacity=None, drop="score") == router.causal
    assert router.is_causal(capacity=1.0, drop="position") == (router.causal and router.fixed_k is not None)
    assert not router.is_causal(capacity=1.0, drop="score")


@pytest.mark.parametrize(("spec", "capacity"), CAPACITIES, ids=lambda value: getattr(value, "name", str(value)))
def test_outputs_of_causal_routers_do_not_depend_on_later_tokens_or_other_sequences(
    spec: Spec, capacity: float | None, x: Tensor, ids: Tensor
) -> None:
    """The label `causal` is true, in training (with equal noise) and in evaluation.

    The test replaces the last tokens of all sequences and compares the outputs of the tokens before them. Without a
    capacity limit it replaces all other sequences too. With one it does not, because sequences compete for capacity.
    """
    layer = make_layer(spec)
    changed_x, changed_ids = x.clone(), ids.clone()
    changed_x[:, 5:], changed_ids[:, 5:] = 3.0, 7
    if capacity is None:
        changed_x[1:], changed_ids[1:] = -2.0, 11

    def output(tokens: Tensor, token_ids: Tensor) -> Tensor:
        torch.manual_seed(0)  # so that a router that draws random numbers draws the same ones for both inputs
        return run_as_second_layer(layer, tokens, context(token_ids, capacity=capacity)).y

    def unaffected(mode: bool) -> bool:
        layer.train(mode)
        return torch.allclose(output(x, ids)[0, :5], output(changed_x, changed_ids)[0, :5], atol=1e-6)

    in_evaluation = unaffected(False)
    assert all([unaffected(True), in_evaluation]) == layer.router.causal
    assert in_evaluation == layer.router.causal_in_evaluation


def test_a_router_reads_token_ids_only_if_it_declares_so(spec: Spec, x: Tensor, ids: Tensor) -> None:
    layer = make_layer(spec).eval()
    output, with_other_ids = (run_as_second_layer(layer, x, context(each)).y for each in (ids, ids + 1))
    assert torch.equal(output, with_other_ids) != layer.router.uses_ids


def test_permuting_sequences_permutes_the_output(spec: Spec, x: Tensor, ids: Tensor) -> None:
    layer = make_layer(spec).eval()
    order = torch.tensor([2, 0, 1])
    permuted = run_as_second_layer(layer, x[order], context(ids[order])).y
    torch.testing.assert_close(permuted, run_as_second_layer(layer, x, context(ids)).y[order])


def test_a_router_that_is_causal_in_evaluation_gives_a_token_the_same_output_alone_and_in_a_batch(
    spec: Spec, x: Tensor, ids: Tensor
) -> None:
    """Only a router that is causal in evaluation gives a token the same output alone and in a batch.

    Generation with a cache relies on this.
    """
    layer = make_layer(spec).eval()
    alone = run_as_second_layer(layer, x[:1, 4:5], context(ids[:1, 4:5])).y
    in_batch = run_as_second_layer(layer, x, context(ids)).y[:1, 4:5]
    assert torch.allclose(alone, in_batch, rtol=1.3e-6, atol=1e-5) == layer.router.causal_in_evaluation


@pytest.mark.parametrize("batch", ["one token", "identical tokens", "zeros", "huge", "far below 0"])
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_unusual_batches_have_finite_outputs_and_gradients_and_all_assignments_are_counted(
    spec: Spec, batch: str, capacity: float | None
) -> None:
    """Outputs and gradients are finite with ties, with all tokens at one expert, and with experts that get no token.

    The gradient of an expert that gets no token is 0. Every assignment is counted.
    """
    shape = (1, 1, D) if batch == "one token" else (B, S, D)
    fill = {"one token": 1.0, "identical tokens": 0.7, "zeros": 0.0, "huge": 1e4, "far below 0": 1e4}[batch]
    x = torch.full(shape, fill).requires_grad_()
    layer = make_layer(spec)
    if batch == "far below 0":  # every logit of a linear router is then so negative that its sigmoid is 0 in fp32
        with torch.no_grad():
            for p in layer.router.parameters():
                p.copy_(-p.abs())
    output: LayerOutput = layer(x, context(torch.full(shape[:2], 3), capacity=capacity))
    (output.y.mean() + sum(output.aux.values())).backward()
    assert output.y.isfinite().all()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert output.stats.offered.sum() == output.stats.assignments
    assert output.stats.kept.sum() <= output.stats.assignments
    empty = output.stats.kept == 0
    assert layer.experts.up.grad is not None
    assert (layer.experts.up.grad[empty] == 0).all()


def test_the_layers_output_is_the_weighted_sum_of_every_expert_run_on_every_token_or_slot(
    spec: Spec, x: Tensor, ids: Tensor
) -> None:
    layer = make_layer(spec).eval()
    flat = x.view(-1, D)
    for router in layer.router.chain:
        routing = router(flat, context(ids))
        rows = flat
        if routing.slots is not None:
            rows = torch.einsum("bms,bsd->bmd", routing.slots.dispatch, x).reshape(-1, D)
        counts = torch.full((E,), len(rows))
        expert_outputs = layer.experts(rows.repeat(E, 1), counts).view(E, -1, D)
        out = torch.einsum("te,etd->td", dense_weights(routing), expert_outputs)
        if routing.slots is not None:
            out = torch.einsum("bsm,bmd->bsd", routing.slots.combine, out.view(B, -1, D)).reshape(-1, D)
        flat = flat + out
    torch.testing.assert_close(layer(x, context(ids)).y.view(-1, D), flat - x.view(-1, D))


# ---- Large logits, and a resume ----------------------------------------------------------------------------------


def check_large_logits(router: Router, ids: Tensor) -> None:
    """Fail unless the router chooses in fp32 what it chooses in fp64, for hidden states and so for logits of any size.

    The logits themselves differ by more than their rounding. But probabilities of fp32 round to ties where logits
    differ by 104 (softmax) or are above 17 (sigmoid). Those of fp64 do so at 745 and 37.
    """
    exact = copy.deepcopy(router.eval()).double()
    for scale in (1.0, 4.0, 16.0, 64.0, 256.0):
        x = scale * torch.randn(B * S, D, generator=torch.Generator().manual_seed(3))
        for link, exact_link in zip(router.chain, exact.chain, strict=True):
            routing, reference = link(x, context(ids)), exact_link(x.double(), context(ids))
            for values in (reference.probs, reference.logits):
                assert values is None or values.dtype == torch.float64, "compute in the precision of x"
            chosen, expected = (
                sorted(zip(r.token.tolist(), r.expert.tolist(), strict=True)) for r in (routing, reference)
            )
            assert chosen == expected, (
                f"at {scale} times the hidden states fp64 chooses other experts: choose by logits"
            )


def check_resume(new_router: Callable[[], Router], x: Tensor, ids: Tensor) -> None:
    """Fail unless a second router that loads the state of a trained one decides and learns the same.

    The second one is made from another seed, so that random numbers outside of parameters and buffers differ.
    """
    layers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        router = new_router()
        router.initialize(0.5)
        layers.append(MoELayer(router, layers[0].experts if layers else Experts(E, D, hidden=F, kind="silu")))
    trained, resumed = layers
    nn.init.normal_(trained.experts.up)
    nn.init.normal_(trained.experts.down)
    trained.router.before_training(torch.arange(1000))

    def results(layer: MoELayer) -> list[Any]:
        """Return what the layer computes in training and in evaluation. Then let its router learn from a step."""
        torch.manual_seed(0)
        outputs = [run_as_second_layer(layer.train(mode), x, context(ids, noise=0.1)) for mode in (False, True)]
        weights = layer.router.loss_weights
        for link in layer.router.chain:
            link.after_step(outputs[1].stats)
        return [*(torch.stack([each.y.sum(), *each.aux.values()]).tolist() for each in outputs), weights]

    for _ in range(2):
        results(trained)
    resumed.router.load_state_dict(trained.router.state_dict())
    for _ in range(2):
        assert results(resumed) == results(trained), "keep all state in parameters and persistent buffers"


def test_large_logits_choose_as_in_fp64(spec: Spec, ids: Tensor) -> None:
    check_large_logits(make_router(spec), ids)


def test_a_router_that_loads_the_state_of_a_trained_one_decides_and_learns_the_same(
    spec: Spec, x: Tensor, ids: Tensor
) -> None:
    check_resume(lambda: build(spec.settings, "router", D, E), x, ids)


class ByProbability(TopK):
    """Wrong: takes the most probable experts, and probabilities round to ties."""

    def forward(self, x: Tensor, context: Context) -> Routing:
        probs = torch.softmax(self.logits(x), -1)
        weight, expert = probs.topk(self.k)
        return Routing.token_choice(expert, weight, probs=probs)


class Forgetful(TopK):
    """Wrong: what it learns after a step, and the numbers drawn for it, are no buffers."""

    def __init__(self, dim: int, num_experts: int, *, drawn: bool) -> None:
        super().__init__(dim, num_experts)
        self.bias = torch.randn(num_experts) if drawn else torch.zeros(num_experts)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) + self.bias

    def after_step(self, stats: RoutingStats) -> None:
        self.bias = self.bias + 0.0 * stats.offered if self.bias.any() else -stats.offered


def test_wrong_routers_fail(x: Tensor, ids: Tensor) -> None:
    router = ByProbability(D, E)
    router.initialize(0.5)
    with pytest.raises(AssertionError, match="choose by logits"):
        check_large_logits(router, ids)
    with pytest.raises(AssertionError, match="persistent buffers"):
        check_resume(lambda: Forgetful(D, E, drawn=True), x, ids)
    with pytest.raises(AssertionError, match="persistent buffers"):
        check_resume(lambda: Forgetful(D, E, drawn=False), x, ids)
