"""Tests that interventions change only what they are meant to change, and restore the model afterwards."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe.analysis.bootstrap import bootstrap
from moe.data.blocks import Prepared
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Knobs, Routing
from moe.specialization.geometry import PROBE_TOKENS, expert_outputs
from moe.specialization.interventions import Intervention, intervene, remove, reroute, swap_experts
from moe.specialization.knockout import knockouts, rank_correlation
from moe.specialization.landscape import DISTANCES, landscape, moved_weights
from moe.specialization.observation import Observation, documents_of_blocks, next_token_nats, observe, validation_blocks
from moe.specialization.regret import route_regret
from moe.training.setup import build_model, prepare_data

KNOBS = Knobs.of()
BLOCKS = 5


@pytest.fixture
def data(cell: Any) -> Prepared:
    return prepare_data(cell("data.max_val_blocks=12").config)


@pytest.fixture
def model(cell: Any, data: Prepared) -> Iterator[MoEForCausalLM]:
    """Yield a random model whose experts have a large effect. Fails if the test leaves the model changed."""
    built = build_model(cell().config, vocab_size=len(data.tokenizer)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter *= 4 if parameter.ndim > 1 else 1
    before = {name: value.clone() for name, value in built.state_dict().items()}
    routers = [layer.router for layer in built.moe_layers]
    yield built
    assert before.keys() == built.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    assert all(layer.router is router for layer, router in zip(built.moe_layers, routers, strict=True))
    assert all(parameter.grad is None for parameter in built.parameters())


def observe_validation(model: MoEForCausalLM, data: Prepared) -> Observation:
    return observe(model, validation_blocks(data, BLOCKS), KNOBS)


def all_to(expert: int) -> Intervention:
    """Return the intervention that gives every token the same expert with weight 0.8."""

    def intervention(routing: Routing, x: Tensor) -> Routing:
        token = torch.arange(len(x))
        return routing._replace(token=token, expert=torch.full_like(token, expert), weight=torch.full((len(x),), 0.8))

    return intervention


def random_routing(tokens: int = 50, experts: int = 6, k: int = 3, *, logits: bool = True) -> Routing:
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    top = scores.softmax(-1).topk(k)
    return Routing.token_choice(top.indices, top.values, logits=scores if logits else None)


def test_an_observation_matches_the_outputs_of_the_model(model: MoEForCausalLM, data: Prepared) -> None:
    found = observe_validation(model, data)
    ids = torch.from_numpy(found.ids)
    output = model(ids, ids, knobs=KNOBS)
    assert np.nanmean(found.nats) == pytest.approx(output.loss.item(), rel=1e-5)
    assert np.isnan(found.nats[:, -1]).all()
    assert not np.isnan(found.nats[:, :-1]).any()
    for layer, (routing,) in enumerate(output.routing):
        assert np.array_equal(found.chosen[layer].sum(0), routing.expert.bincount(minlength=4).numpy())
        np.testing.assert_allclose(found.weight[layer].sum(-1), 1, rtol=1e-5)
    assert np.array_equal(found.predicted, output.logits.argmax(-1).numpy())


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rerouted_assignments_go_to_experts_that_the_token_does_not_use_yet(logits: bool, share: float) -> None:
    routing = random_routing(logits=logits)
    selected = torch.rand(len(routing.token), generator=torch.Generator().manual_seed(1)) < share
    after = reroute(routing, selected, num_experts=6)
    assert torch.equal(after.token, routing.token)
    assert torch.equal(after.weight, routing.weight)
    assert torch.equal(after.expert[~selected], routing.expert[~selected])
    for token in range(50):
        old, new = (r.expert[r.token == token].tolist() for r in (routing, after))
        selected_of_token = selected[routing.token == token].tolist()
        assert len(set(new)) == len(new)
        moved = [expert for expert, was_selected in zip(new, selected_of_token, strict=True) if was_selected]
        assert not set(moved) & set(old)
        if logits and routing.logits is not None:
            unused_experts = [e for e in routing.logits[token].argsort(descending=True).tolist() if e not in old]
            assert moved == unused_experts[: len(moved)]


def test_an_assignment_is_removed_if_its_token_uses_all_other_experts() -> None:
    routing = random_routing(tokens=5, experts=3, k=3)
    after = reroute(routing, routing.expert == 1, num_experts=3)
    assert len(after.token) == 10
    assert 1 not in after.expert


def test_swapped_tokens_get_their_new_experts_by_weight_and_other_tokens_stay_the_same() -> None:
    routing = random_routing()
    token, order = torch.tensor([7, 30]), torch.tensor([[5, 4, 3, 2, 1, 0], [0, 2, 4, 1, 3, 5]])
    after = swap_experts(routing, token, order)
    others = ~torch.isin(routing.token, token)
    assert torch.equal(after.expert[others], routing.expert[others])
    assert torch.equal(after.weight, routing.weight)
    assert routing.logits is not None
    for index, preference in zip(token, order, strict=True):
        of_token = after.token == index
        assert set(after.expert[of_token].tolist()) == set(preference[:3].tolist())
        by_weight = after.expert[of_token][after.weight[of_token].argsort(descending=True)]
        assert (routing.logits[index, by_weight].diff() <= 0).all()
    current = random_routing().expert.view(50, 3)
    same = swap_experts(routing, torch.arange(50), torch.cat([current, current], 1))
    assert torch.equal(same.expert, routing.expert)  # a token that gets the same experts again is unchanged


def test_removing_the_only_used_expert_removes_the_output_of_the_layer(model: MoEForCausalLM, data: Prepared) -> None:
    probes = validation_blocks(data, BLOCKS)
    layer = model.moe_layers[1]
    with intervene(model.moe_layers[1], all_to(2)):
        replaced_router = layer.router
        found = knockouts(model, observe(model, probes, KNOBS), KNOBS, document=np.arange(BLOCKS))["zeroed"]
        assert layer.router is replaced_router
        loss = next_token_nats(model, probes, KNOBS)[:, :-1].mean()
        down = layer.experts.down.detach().clone()
        with torch.no_grad():
            layer.experts.down.zero_()
        loss_without_layer = next_token_nats(model, probes, KNOBS)[:, :-1].mean()
        with torch.no_grad():
            layer.experts.down.copy_(down)
    expected = (loss_without_layer - loss).item()
    assert abs(expected) > 1e-4
    assert found["delta"]["mean"][1][2] == pytest.approx(expected, rel=1e-3)
    assert found["null"]["mean"][1][2] == pytest.approx(expected, rel=1e-3)  # all assignments are those of this expert
    assert (found["delta"]["mean"][1][[0, 1, 3]] == 0).all()  # removing an expert without tokens changes nothing
    assert (found["null"]["mean"][1][[0, 1, 3]] == 0).all()


def test_knockouts_are_means_over_blocks_and_also_given_by_domain(model: MoEForCausalLM, data: Prepared) -> None:
    document = documents_of_blocks(data, BLOCKS)
    found = knockouts(model, observed := observe_validation(model, data), KNOBS, document=document)
    for name, knock_out in (("zeroed", remove), ("rerouted", lambda r, hit: reroute(r, hit, num_experts=4))):
        with intervene(model.moe_layers[0], lambda routing, _, f=knock_out: f(routing, routing.expert == 3)):
            rise = (next_token_nats(model, observed.blocks, KNOBS).numpy() - observed.nats)[:, :-1].mean(1)
        result = found[name]
        assert result["delta"]["mean"][0][3] == pytest.approx(rise.mean(), abs=1e-6)
        assert result["delta"]["low"][0][3] <= rise.mean() <= result["delta"]["high"][0][3]
        assert result["delta"]["low"][0][3] == pytest.approx(bootstrap(rise.astype(float), document)["low"], abs=1e-6)
        for index, domain in enumerate(result["domains"]):
            expected = rise[observed.domain == domain].mean()
            assert result["by_domain"][0][3, index] == pytest.approx(expected, abs=1e-6)
        excess = np.subtract(result["delta"]["mean"], result["null"]["mean"])
        np.testing.assert_allclose(result["excess"]["mean"], excess, atol=1e-9)


def test_bootstrap_intervals_cover_the_mean_and_shrink_with_the_spread() -> None:
    values = np.random.default_rng(0).normal(size=(1, 400))
    found = bootstrap(np.concatenate([values, values / 10]), np.arange(400))
    half_width = 1.96 * values.std() / 20
    assert found["high"][0] - found["mean"][0] == pytest.approx(half_width, rel=0.1)
    assert (found["high"] - found["low"])[1] == pytest.approx((found["high"] - found["low"])[0] / 10)


def test_the_bootstrap_counts_a_document_once_and_a_weight_as_that_many_blocks() -> None:
    rng = np.random.default_rng(0)
    values, counts = rng.normal(size=(2, 30)), rng.integers(1, 6, size=30)
    unrepeated = bootstrap(values, np.arange(30))
    repeated = bootstrap(values.repeat(5, axis=1), np.arange(30).repeat(5))
    for name in ("mean", "low", "high"):
        np.testing.assert_allclose(repeated[name], unrepeated[name])
    assert unrepeated["documents"] == repeated["documents"] == 30
    document = np.arange(30) // 3
    weighted = bootstrap(values, document, weight=counts.astype(float))
    written_out = bootstrap(values.repeat(counts, axis=1), document.repeat(counts))
    for name in ("mean", "low", "high"):
        np.testing.assert_allclose(weighted[name], written_out[name])
    # Equal values give an interval of length 0, also with documents of different lengths.
    constant = bootstrap(np.full(30, 2.5), np.minimum(np.arange(30), 4))
    np.testing.assert_allclose([constant["low"], constant["high"]], 2.5)
    one_document = bootstrap(values, np.full(30, 7))
    np.testing.assert_allclose(one_document["mean"], values.mean(1))
    assert np.isnan([one_document["low"], one_document["high"]]).all()


def test_the_interval_over_documents_covers_the_mean_at_its_nominal_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.analysis.bootstrap.RESAMPLES", 300)
    rng, covered, missed_over_blocks = np.random.default_rng(0), 0, 0
    document = np.arange(40).repeat(5)
    for _ in range(200):
        values = rng.normal(size=40).repeat(5) + 0.3 * rng.normal(size=200)
        found, over_blocks = bootstrap(values, document), bootstrap(values, np.arange(200))
        covered += found["low"] < 0 < found["high"]
        missed_over_blocks += not over_blocks["low"] < 0 < over_blocks["high"]
    assert 0.88 < covered / 200 < 0.99
    assert missed_over_blocks / 200 > 0.2


@pytest.mark.parametrize("documents", [5, 12])
def test_the_interval_covers_the_mean_with_few_documents_too(documents: int) -> None:
    """Of 1000 samples of five documents, quantiles of the resampled means cover the true mean in about 810."""
    rng = np.random.default_rng(0)
    document = np.arange(documents).repeat(rng.integers(1, 8, documents))
    values = rng.normal(size=(1000, documents))[:, document] + 0.5 * rng.normal(size=(1000, len(document)))
    found = bootstrap(values, document)
    covered = ((found["low"] < 0) & (found["high"] > 0)).mean()
    assert 0.92 < covered < 0.98
    few = bootstrap(values[:, document < 3], document[document < 3])
    assert np.isnan([few["low"], few["high"]]).all()


def test_rank_correlation_is_nan_for_constant_values_and_for_two_values() -> None:
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 10, 100])) == 1
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))
    assert np.isnan(rank_correlation(np.arange(2.0), np.arange(2.0)))


def test_regret_is_zero_with_equal_experts(model: MoEForCausalLM, data: Prepared) -> None:
    stacks = [p for layer in model.moe_layers for p in layer.experts.parameters()]
    before = [p.detach().clone() for p in stacks]
    with torch.no_grad():
        for p in stacks:
            p.copy_(p[:1].expand_as(p).clone())
    equal = route_regret(
        model, observe_validation(model, data), KNOBS, document=documents_of_blocks(data, BLOCKS), samples=10
    )
    with torch.no_grad():
        for p, old in zip(stacks, before, strict=True):
            p.copy_(old)
    for layer in equal:
        np.testing.assert_allclose(layer["values"], 0, atol=1e-4)
        assert layer["better"]["mean"] < 0.5
    unequal = route_regret(
        model, observe_validation(model, data), KNOBS, document=documents_of_blocks(data, BLOCKS), samples=10
    )
    for layer in unequal:
        assert layer["tokens"] == len(layer["values"]) == 10
        assert (layer["values"] >= 0).all()
        assert layer["values"].max() > 1e-3


def test_regret_with_one_expert_per_token_matches_a_trial_of_every_expert(
    model: MoEForCausalLM, data: Prepared
) -> None:
    probe = validation_blocks(data, 1)
    with intervene(model.moe_layers[0], all_to(1)):
        observed = observe(model, probe, KNOBS)
        [found, _] = route_regret(model, observed, KNOBS, document=documents_of_blocks(data, 1), samples=1)
        position = np.random.default_rng(0).integers(observed.ids.shape[1] - 1, size=(1, 1)).item()
        nats_of_expert = []
        for expert in range(4):
            swap = torch.tensor([position]), torch.tensor([[expert, *(e for e in range(4) if e != expert)]])
            with intervene(model.moe_layers[0], lambda routing, _, swap=swap: swap_experts(routing, *swap)):
                nats_of_expert.append(next_token_nats(model, probe, KNOBS)[0, position].item())
    assert found["routes"] == 4
    assert found["regret"]["mean"] == pytest.approx(nats_of_expert[1] - min(nats_of_expert), abs=1e-5)
    assert found["advantage"]["mean"] == pytest.approx(np.mean(nats_of_expert) - nats_of_expert[1], abs=1e-5)


def test_the_landscape_at_distance_zero_is_the_loss_and_the_loss_rises_along_the_gradient(
    model: MoEForCausalLM, data: Prepared
) -> None:
    probes = validation_blocks(data, BLOCKS)
    ids = probes.ids
    found = landscape(model, probes, KNOBS)
    assert found is not None
    zero = DISTANCES.index(0.0)
    for curve in found["curves"].values():
        assert curve["loss"][zero] == pytest.approx(model(ids, ids, knobs=KNOBS).loss.item(), rel=1e-5)
        assert curve["flipped"][zero] == 0
        assert curve["flipped"][0] > 0.1
    assert set(found["curves"]) == {"random0", "random1", "random2", "gradient"}
    weights = [layer.router.weight for layer in model.moe_layers]
    gradient = torch.autograd.grad(model(ids, ids, knobs=KNOBS).loss, weights)
    losses = []
    for distance in (-1e-3, 1e-3):
        with moved_weights(weights, list(gradient), distance):
            losses.append(model(ids, ids, knobs=KNOBS).loss.item())
    assert losses[0] < losses[1]


def test_weights_move_relative_to_their_norm_and_are_restored_even_after_an_error() -> None:
    weight = torch.randn(3, 5)
    before = weight.clone()
    with contextlib.suppress(KeyError), moved_weights([weight], [torch.randn(3, 5)], -0.5):
        assert (weight - before).norm() == pytest.approx(0.5 * before.norm().item(), rel=1e-5)
        raise KeyError
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    "router", ["chain_of_experts", "expert_choice", "hash", "moe_plus_plus", "null_experts", "relu"]
)
def test_every_kind_of_router_can_be_studied(router: str, cell: Any, data: Prepared) -> None:
    config = cell(f"router={router}").config
    model = build_model(config, vocab_size=len(data.tokenizer)).eval()
    observed = observe_validation(model, data)
    for result in knockouts(model, observed, KNOBS, document=documents_of_blocks(data, BLOCKS)).values():
        for rise, chosen in zip(result["delta"]["mean"], observed.chosen, strict=True):
            assert np.isfinite(rise).all()
            assert (rise[chosen.sum(0) == 0] == 0).all()
    for layer in route_regret(model, observed, KNOBS, document=documents_of_blocks(data, BLOCKS), samples=BLOCKS):
        assert (layer["values"] >= 0).all()


def test_outputs_of_experts_are_normalized_to_unit_vectors(model: MoEForCausalLM, data: Prepared) -> None:
    vectors = expert_outputs(model, validation_blocks(data, BLOCKS), KNOBS)
    torch.testing.assert_close([of_layer.norm(dim=-1) for of_layer in vectors], [torch.ones(4)] * 2)
    assert vectors[0][0] @ vectors[0][1] < 0.99


def test_experts_work_on_their_own_input_where_routers_read_another_one(cell: Any, data: Prepared) -> None:
    """The outputs of single experts are those that the layer adds up."""
    config = cell("model.router_input=attention", "router.k=1").config
    model = build_model(config, vocab_size=len(data.tokenizer)).eval()
    blocks = validation_blocks(data, BLOCKS)
    added: list[Tensor] = []
    hook = model.moe_layers[0].register_forward_hook(lambda _, inputs, output: added.append(output))
    vectors = expert_outputs(model, blocks, KNOBS)[0]
    hook.remove()
    stride = max(1, added[0].y[..., 0].numel() // PROBE_TOKENS)
    [routing] = added[0].routing
    y = added[0].y.flatten(0, 1)[::stride]
    for expert in range(len(vectors)):
        own = vectors[expert].view(len(y), -1)
        taken = (routing.expert[routing.token.argsort()] == expert)[::stride]
        cosine = torch.nn.functional.cosine_similarity(own[taken], y[taken])
        torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-4, rtol=0)
