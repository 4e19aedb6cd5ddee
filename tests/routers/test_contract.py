"""The laws that every router keeps, whatever it does: each yaml of conf/router is held to all of them, and each arm of
an ablation that changes a router's parts."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe.checks import build
from moe.config.options import CONF
from moe.model.experts import Experts
from moe.model.layer import LayerOutput, MoELayer
from moe.routers.base import Router
from moe.routing.decision import Context, Knobs, Routing, document_positions
from moe.routing.dispatch import dispatch
from moe.routing.losses import auxiliary

B, S, D, E, F = 3, 8, 16, 8, 12
# operators whose result, or its size, the host waits for; lift_fresh: `torch.tensor`, whose copy it waits for
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "lift_fresh"),
    "repeat_interleave",
}
YAMLS = sorted((CONF / "router").glob("*.yaml"))


class Spec(NamedTuple):
    """A router's name and its settings."""

    name: str
    settings: dict[str, Any]


SPECS = [Spec(path.stem, yaml.safe_load(path.read_text())) for path in YAMLS]
for arm in sorted((CONF / "variant").glob("spectra_*.yaml")):
    [base] = [spec.settings for spec in SPECS if spec.name == "spectra"]
    SPECS.append(Spec(arm.stem, base | yaml.safe_load(arm.read_text()).get("router", {})))


def make_router(spec: Spec, *, num_experts: int = E) -> Router:
    torch.manual_seed(0)
    router = build(spec.settings, "router", D, num_experts)
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5)
    return router


def make_layer(spec: Spec) -> MoELayer:
    router = make_router(spec)
    experts = Experts(E, D, hidden=F, kind="silu")
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    return MoELayer(router, experts)


def context(ids: Tensor, *, noise: float = 0.0, capacity: float | None = None) -> Context:
    return Context(ids, Knobs.of(noise=noise), capacity)


def as_second(layer: MoELayer, x: Tensor, context: Context) -> LayerOutput:
    """Run the layer as the second of two: it gets the state that the router of the first returned."""
    return layer(x, context._replace(state=layer(x, context).routing[-1].state))


def dense_weights(routing: Routing) -> Tensor:
    """Return the weight of each expert for each token (T, E), or for each slot if experts process slots."""
    weights = torch.zeros(rows_of(routing), E)
    return weights.index_put((routing.token, routing.expert), routing.weight, accumulate=True)


def rows_of(routing: Routing) -> int:
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
def test_the_yaml_states_its_purpose_with_the_true_causal_flag_and_its_equation(path: Path) -> None:
    purpose, equation = path.read_text().splitlines()[:2]
    assert purpose.startswith("# ")
    [spec] = [spec for spec in SPECS if spec.name == path.stem]
    assert ("not causal" in purpose) != make_router(spec).causal
    assert "causal" in purpose
    assert equation.startswith("# ")
    assert "=" in equation


def test_assignments_are_well_formed(spec: Spec, x: Tensor, ids: Tensor) -> None:
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
    assert pairs.unique(dim=1).shape == pairs.shape, "an expert is asked for twice by one token"


def test_probabilities_are_a_distribution_over_all_experts_in_fp32(spec: Spec, x: Tensor, ids: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        layer = make_layer(spec)
        seen: list[Routing] = []
        layer.router.chain[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
        layer(x.bfloat16(), context(ids))
    [routing] = seen
    if routing.probs is None:
        return
    assert routing.probs.shape == (B * S, E)
    assert routing.probs.dtype == torch.float32
    assert (routing.probs >= 0).all()
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(B * S))


def test_gradient_reaches_a_trainable_router_through_the_output_alone(spec: Spec, x: Tensor, ids: Tensor) -> None:
    """The gradient would be exactly zero with k=1 and renormalized weights."""
    layer = make_layer(spec)
    as_second(layer, x, context(ids)).y.square().sum().backward()
    for name, p in layer.router.named_parameters():
        assert p.grad is not None, name
        assert p.grad.norm() > 1e-4, name


def test_gradient_reaches_a_trainable_router_through_each_auxiliary_loss(spec: Spec, x: Tensor, ids: Tensor) -> None:
    """A balance loss from integer counts, or of a softmax of a softmax, would have none.

    One parameter is enough: learned noise, say, is no part of the clean logits that the z-loss sees.
    """
    router = make_router(spec)
    if not list(router.parameters()):
        return
    routing = router.chain[0](x.view(-1, D), context(ids))
    offered = dispatch(routing, E, capacity=None, seq_len=S).offered
    losses = auxiliary(routing, offered, seq_len=S)
    assert losses
    if len(offered.unique()) == 1:  # by construction: nothing to learn
        assert losses.pop("load_balance").item() == losses.pop("load_balance_global").item() == pytest.approx(1)
    for name, loss in losses.items():
        parameters = list(router.chain[0].parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        assert max(g.norm() for g in gradients if g is not None) > 1e-4, name


def test_evaluation_is_deterministic_ignores_noise_and_changes_no_state(spec: Spec, x: Tensor, ids: Tensor) -> None:
    layer = make_layer(spec).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first, second = (as_second(layer, x, context(ids, noise=noise)).y for noise in (0.0, 9.0))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_forward_and_backward_wait_for_the_device_only_where_sizes_depend_on_values(
    spec: Spec, x: Tensor, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per `Routing.masked` and once per capacity limit. Counts on a CPU the operators that would wait."""
    asked: list[str] = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
            if by_mask or name in WAITING:
                asked.append(name)
            return func(*args, **(kwargs or {}))

    masked = Routing.masked
    made: list[str] = []
    monkeypatch.setattr(Routing, "masked", lambda *args, **rest: made.append("nonzero") or masked(*args, **rest))
    monkeypatch.setattr(Experts, "kernel", lambda self, dtype: "grouped")  # what runs on a GPU
    layer = make_layer(spec)
    for capacity in (None, 1.0):
        situation = context(ids, noise=0.1, capacity=capacity)
        with Listen():
            packed = situation._replace(document_position=document_positions((torch.arange(S) % 5).expand(B, S)))
            output = layer(x.requires_grad_(), packed)
            torch.stack([output.y.square().mean(), *output.aux.values()]).sum().backward()
        limits = ["index"] * len(layer.router.chain) if capacity else []
        assert sorted(asked) == sorted([*made, *limits])
        asked.clear()
        made.clear()


def test_no_tensor_is_made_on_the_default_device(spec: Spec, x: Tensor, ids: Tensor) -> None:
    """On a GPU the default device differs from the layer's. Here it is `meta`, where mixing devices is an error."""
    layer = make_layer(spec)
    for capacity in (None, 1.0):
        situation = context(ids, noise=0.1, capacity=capacity)._replace(orthogonality=True, probe_stride=3)
        with torch.device("meta"):
            output = layer(x.requires_grad_(), situation)
            torch.stack([output.y.square().mean(), *output.aux.values()]).sum().backward()
            for router in layer.router.chain:
                router.after_step(output.stats)


def test_noise_changes_routing_in_training(spec: Spec, x: Tensor, ids: Tensor) -> None:
    router = make_router(spec)
    routings = [router.chain[0](x.view(-1, D), context(ids, noise=n)) for n in (0.0, 5.0)]
    weights = [dense_weights(r) if r.slots is None else r.slots.combine for r in routings]
    assert torch.equal(*weights) == (spec.name == "hash"), "only a router that never looks at the states is immune"


def test_every_token_gets_fixed_k_experts_and_a_router_without_it_is_seen_to_vary(
    spec: Spec, x: Tensor, ids: Tensor
) -> None:
    """For ordinary and extreme inputs, in training and in evaluation, in each link of a chain."""
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
                alone = link(tokens[:1], context(ids[:1, :1], noise=noise))
                if routing.slots is None:
                    counts |= set(torch.bincount(alone.token, minlength=1).tolist())
        if router.fixed_k is not None:
            assert counts == {router.fixed_k}
        elif routing.slots is None and not spec.settings.get("expert_choice_routing"):  # a quota: see test_spectra.py
            assert len(counts) > 1, "it could declare a fixed_k"


def test_expert_rows_are_one_trainable_row_per_expert_that_moves_its_logit_alone(
    spec: Spec, x: Tensor, ids: Tensor
) -> None:
    for router in make_router(spec).eval().chain:
        rows = router.expert_rows
        if rows is None:
            continue
        assert rows.shape == (E, D)
        assert any(rows is p for p in router.parameters())
        if router(x.view(-1, D), context(ids)).logits is None:  # ReLU: its gates are what is left of them
            continue
        before = router(x.view(-1, D), context(ids)).logits
        with torch.no_grad():
            rows[3] += 1.0
        changed = (router(x.view(-1, D), context(ids)).logits != before).any(0)
        assert changed.tolist() == [expert == 3 for expert in range(E)]


# Where the number of experts varies, the limit is a share of assignments, which depend on every token.
FIXED = [spec for spec in SPECS if make_router(spec).fixed_k is not None]
CAPACITIES = [(spec, None) for spec in SPECS] + [(spec, 0.6) for spec in FIXED]


def test_a_capacity_limit_keeps_causal_what_has_a_fixed_number_of_experts_and_drops_by_position(spec: Spec) -> None:
    router = make_router(spec)
    assert router.is_causal(capacity=None, drop="score") == router.causal
    assert router.is_causal(capacity=1.0, drop="position") == (router.causal and router.fixed_k is not None)
    assert not router.is_causal(capacity=1.0, drop="score")


@pytest.mark.parametrize(("spec", "capacity"), CAPACITIES, ids=lambda value: getattr(value, "name", str(value)))
def test_causal_routers_do_not_see_the_future_or_other_sequences(
    spec: Spec, capacity: float | None, x: Tensor, ids: Tensor
) -> None:
    """The audit behind the label, in training (with equal noise) and in evaluation: replace the last tokens of all
    sequences and, where nothing is dropped, all other sequences, which compete for capacity by design."""
    layer = make_layer(spec)
    changed_x, changed_ids = x.clone(), ids.clone()
    changed_x[:, 5:], changed_ids[:, 5:] = 3.0, 7
    if capacity is None:
        changed_x[1:], changed_ids[1:] = -2.0, 11

    def output(tokens: Tensor, token_ids: Tensor) -> Tensor:
        torch.manual_seed(0)  # what a router draws by itself is the same for both
        return as_second(layer, tokens, context(token_ids, capacity=capacity)).y

    def unaffected(mode: bool) -> bool:
        layer.train(mode)
        return torch.allclose(output(x, ids)[0, :5], output(changed_x, changed_ids)[0, :5], atol=1e-6)

    assert all([unaffected(True), unaffected(False)]) == layer.router.causal


def test_permuting_sequences_permutes_the_output(spec: Spec, x: Tensor, ids: Tensor) -> None:
    layer = make_layer(spec).eval()
    order = torch.tensor([2, 0, 1])
    permuted = as_second(layer, x[order], context(ids[order])).y
    torch.testing.assert_close(permuted, as_second(layer, x, context(ids)).y[order])


def test_a_token_is_routed_alike_alone_and_in_company(spec: Spec, x: Tensor, ids: Tensor) -> None:
    """Generation with a cache relies on this."""
    layer = make_layer(spec).eval()
    if layer.router.causal:
        alone = as_second(layer, x[:1, 4:5], context(ids[:1, 4:5])).y
        torch.testing.assert_close(alone, as_second(layer, x, context(ids)).y[:1, 4:5])


@pytest.mark.parametrize("batch", ["one token", "identical tokens", "zeros", "huge", "far below 0"])
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_degenerate_batches_are_finite_and_counted(spec: Spec, batch: str, capacity: float | None) -> None:
    """Ties, one expert taking everything, empty experts: finite output, zero and not NaN gradients, all counted."""
    shape = (1, 1, D) if batch == "one token" else (B, S, D)
    fill = {"one token": 1.0, "identical tokens": 0.7, "zeros": 0.0, "huge": 1e4, "far below 0": 1e4}[batch]
    x = torch.full(shape, fill).requires_grad_()
    layer = make_layer(spec)
    if batch == "far below 0":  # every logit of a linear router, where each sigmoid is 0 in fp32
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


def test_the_layer_is_the_weighted_sum_of_every_expert_run_on_every_row(spec: Spec, x: Tensor, ids: Tensor) -> None:
    layer = make_layer(spec).eval()
    flat = x.view(-1, D)
    for router in layer.router.chain:
        routing = router(flat, context(ids))
        rows = flat
        if routing.slots is not None:
            rows = torch.einsum("bms,bsd->bmd", routing.slots.dispatch, x).reshape(-1, D)
        counts = torch.full((E,), len(rows))
        everywhere = layer.experts(rows.repeat(E, 1), counts).view(E, -1, D)
        out = torch.einsum("te,etd->td", dense_weights(routing), everywhere)
        if routing.slots is not None:
            out = torch.einsum("bsm,bmd->bsd", routing.slots.combine, out.view(B, -1, D)).reshape(-1, D)
        flat = flat + out
    torch.testing.assert_close(layer(x, context(ids)).y.view(-1, D), flat - x.view(-1, D))
