"""Tests of each part of SPECTRA: state, expression, repulsion, plan, quota, bias, losses, and the switches of parts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.metrics.summary import summarize
from moe.routers.spectra import Spectra, srip
from moe.routing.decision import Context, Knobs, Routing
from moe.routing.dispatch import dispatch
from moe.routing.losses import auxiliary
from moe.routing.measurement import collect_stats
from moe.routing.stats import RoutingStats
from moe.training.evaluate import router_gram

T, D, E, N = 48, 16, 8, 6
BARE = {
    "gru": False,
    "osr_repulsion_weight": 0.0,
    "sinkhorn_iterations": 0,
    "expert_choice_routing": False,
    "ema_bias_weight": 0.0,
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def make(**settings: Any) -> Spectra:
    torch.manual_seed(2)
    router = Spectra(D, E, **{"router_dim": N, **settings})
    router.initialize(0.3)
    return router


def route(router: Spectra, x: Tensor, state: Tensor | None = None) -> Routing:
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of(), state=state))


def selection_mask(routing: Routing, tokens: int = T) -> Tensor:
    """Return which experts each token selected, a mask (T, E)."""
    mask = torch.zeros(tokens, E, dtype=torch.bool)
    mask[routing.token, routing.expert] = True
    return mask


def sums(routing: Routing, tokens: int = T) -> RoutingStats:
    return collect_stats(routing, dispatch(routing, E, capacity=None, seq_len=tokens), tokens)


def vectors(router: Spectra, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the routing vectors and the expression vectors of a router without GRU, each (T, E, N)."""
    assert router.linear is not None
    assert router.projector is not None
    return (x @ router.linear.T).view(T, E, N), (x @ router.projector.T).view(T, E, N)


def test_logits_are_cosines_divided_by_epsilon(x: Tensor) -> None:
    router = make(**BARE, sinkhorn_epsilon=0.2)
    heads, expression = vectors(router, x)
    expected = torch.cosine_similarity(heads, expression, dim=-1) / 0.2
    torch.testing.assert_close(route(router, x).logits, expected)


def test_without_expression_logits_are_cosines_to_the_vector_of_ones(x: Tensor) -> None:
    router = make(**BARE, expression=False, sinkhorn_epsilon=0.2)
    assert router.linear is not None
    heads = (x @ router.linear.T).view(T, E, N)
    expected = torch.cosine_similarity(heads, torch.ones(N), dim=-1) / 0.2
    torch.testing.assert_close(route(router, x).logits, expected)


def test_the_state_equals_a_gru_cell_that_starts_at_zero_and_runs_over_the_layers() -> None:
    routers = [make() for _ in range(3)]
    assert routers[0].gru is not None
    cell = nn.GRUCell(D, E * N)
    nn.init.normal_(routers[0].gru.bias_hh)
    cell.load_state_dict(routers[0].gru.state_dict())
    state, expected = None, torch.zeros(T, E * N)
    for depth, router in enumerate(routers):
        router.tie_to(routers[0])
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(depth))
        state, expected = route(router, x, state).state, cell(x, expected)
        torch.testing.assert_close(state, expected)


def test_recurrent_weights_of_each_gru_gate_start_orthogonal_and_input_weights_xavier() -> None:
    gru = make().gru
    assert gru is not None
    for gate in gru.weight_hh.chunk(3):
        torch.testing.assert_close(gate @ gate.T, torch.eye(E * N), atol=1e-5, rtol=0)
    for gate in gru.weight_ih.chunk(3):
        bound = math.sqrt(6 / (D + E * N))
        assert 0.9 * bound < gate.abs().max() <= bound
    assert not gru.bias_ih.any()
    assert not gru.bias_hh.any()


def test_the_projector_starts_as_a_tenth_of_an_orthogonal_matrix() -> None:
    projector = make().projector
    assert projector is not None
    torch.testing.assert_close(projector.T @ projector, 0.01 * torch.eye(D), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "fixed"),
    [
        ({"expert_choice_capacity_factor": 0.5}, False),
        ({"expert_choice_capacity_factor": 4.0}, True),  # the quota is T, so no token is rejected
        ({"expert_choice_capacity_factor": 0.5, "expert_choice_routing": False}, True),
    ],
)
def test_fixed_k_is_none_only_if_a_quota_can_reject_tokens(settings: dict[str, Any], fixed: bool) -> None:
    router = make(**settings)
    assert router.fixed_k == (2 if fixed else None)
    assert router.experts_per_token(T) == 2
    numbers = selection_mask(route(router, torch.ones(T, D))).sum(1).unique().tolist()
    assert (numbers == [2]) == fixed


@pytest.mark.parametrize("settings", [{"log_sinkhorn_enabled": True}, {"log_sinkhorn_enabled": False}])
def test_the_plan_prefers_similar_experts_and_is_balanced(settings: dict[str, bool], x: Tensor) -> None:
    """The plan selects similar experts, at equal loads. With the wrong sign of the cost it would select the least
    similar ones.
    """
    router = make(**{**BARE, "sinkhorn_iterations": 200}, **settings)
    routing = route(router, x)
    assert routing.probs is not None
    similarity = torch.cosine_similarity(*vectors(router, x), dim=-1)
    mask = selection_mask(routing)
    assert similarity[mask].mean() > 0.2 > -0.05 > similarity[~mask].mean()
    torch.testing.assert_close(routing.probs.mean(0), torch.full((E,), 1 / E), atol=1e-3, rtol=0)


def test_repulsion_lowers_an_experts_logits_by_its_overlap_with_the_other_experts(x: Tensor) -> None:
    bare, repelled = (route(make(**{**BARE, "osr_repulsion_weight": weight}), x).logits for weight in (0.0, 0.7))
    heads, expression = vectors(make(**BARE), x)
    similarity = torch.cosine_similarity(heads, expression, dim=-1)
    mean = nn.functional.normalize(expression, dim=-1).mean(0)
    for e in range(E):
        others = [f for f in range(E) if f != e]
        overlaps = [torch.cosine_similarity(mean[f], mean[e], dim=0).square() for f in others]
        extra = sum(similarity[:, f].abs() * overlap for f, overlap in zip(others, overlaps, strict=True))
        torch.testing.assert_close(bare[:, e] - repelled[:, e], 0.7 * extra / 0.1, atol=1e-4, rtol=1e-4)


def test_in_evaluation_repulsion_uses_the_running_mean_over_steps(x: Tensor) -> None:
    """After one step on the same batch, training and evaluation have equal logits.

    The running mean then has the direction of the batch's mean, for any `ema_alpha`.
    """
    router = make(**{**BARE, "osr_repulsion_weight": 0.7})
    trained = route(router, x)
    before = route(router.eval(), x).logits
    router.after_step(sums(trained))
    torch.testing.assert_close(route(router, x).logits, trained.logits)
    assert not torch.allclose(before, trained.logits)


def test_running_means_use_all_tokens_of_a_step(x: Tensor) -> None:
    router = make(ema_alpha=0.75)
    halves = [sums(route(router, half), T // 2) for half in x.split(T // 2)]
    router.after_step(halves[0].merge(halves[1]))
    expression = nn.functional.normalize((x @ router.projector.T).view(T, E, N), dim=-1)
    torch.testing.assert_close(router.mean_expression, 0.25 * expression.mean(0))
    load = halves[0].offered + halves[1].offered
    torch.testing.assert_close(router.load, 0.75 / E + 0.25 * load / load.sum())


def test_the_bias_lowers_the_logits_of_experts_in_proportion_to_their_past_load(x: Tensor) -> None:
    router = make(**{**BARE, "ema_bias_weight": 0.4}).eval()
    unbiased = route(router, x).logits
    router.load.copy_(torch.tensor([0.5, 0.0] + [0.5 / (E - 2)] * (E - 2)))
    shift = (route(router, x).logits - unbiased) * 0.1
    torch.testing.assert_close(shift, (-0.4 * (router.load * E - 1)).expand(T, E), atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("iterations", [0, 3])
def test_no_expert_gets_more_than_its_quota_in_training(factor: float, iterations: int, x: Tensor) -> None:
    settings = {**BARE, "expert_choice_routing": True, "expert_choice_capacity_factor": factor}
    router = make(**{**settings, "sinkhorn_iterations": iterations, "ema_bias_weight": 1.0})
    router.load.copy_(torch.tensor([0.0, 1.0] + [0.5] * (E - 2)))  # all tokens prefer the first expert
    quota = math.ceil(factor * T * 2 / E)
    assert selection_mask(route(router, x)).sum(0).max() <= quota
    assert selection_mask(route(router.eval(), x)).sum(0).max() > quota, "evaluation has no quota, so that it is causal"


def test_gates_are_the_plan_renormalized_over_the_selected_experts(x: Tensor) -> None:
    router = make()
    routing = route(router, x)
    assert routing.probs is not None
    mask = selection_mask(routing)
    expected = (routing.probs * mask / (routing.probs * mask).sum(-1, keepdim=True))[mask]
    torch.testing.assert_close(routing.weight, expected)
    torch.testing.assert_close(
        route(make(k=1), x).weight, route(make(k=1), x).probs[selection_mask(route(make(k=1), x))]
    )


def test_with_sinkhorn_inference_evaluation_equals_training(x: Tensor) -> None:
    plain, sinkhorn_inference = make(), make(sinkhorn_inference=True)
    trained = route(sinkhorn_inference, x)
    torch.testing.assert_close(route(sinkhorn_inference.eval(), x).probs, trained.probs)
    assert torch.equal(selection_mask(route(sinkhorn_inference, x)), selection_mask(trained))
    assert not torch.equal(selection_mask(route(plain.eval(), x)), selection_mask(trained))


def test_evaluation_is_causal_unless_sinkhorn_inference_is_set(x: Tensor) -> None:
    """In evaluation, the routing of a token does not depend on other tokens. With `sinkhorn_inference` it does.

    The state never depends on other tokens.
    """
    state = torch.randn(T, E * N)
    for sinkhorn_inference in (False, True):
        router = make(sinkhorn_inference=sinkhorn_inference).eval()
        nn.init.normal_(router.mean_expression)
        full, first_tokens = route(router, x, state), route(router, x[:5], state[:5])
        torch.testing.assert_close(full.state[:5], first_tokens.state)
        assert torch.allclose(full.probs[:5], first_tokens.probs, atol=1e-6) is not sinkhorn_inference


@pytest.mark.parametrize(
    ("settings", "causal"),
    [
        (BARE, True),
        ({**BARE, "gru": True, "ema_bias_weight": 0.1}, True),
        ({**BARE, "osr_repulsion_weight": 0.1}, False),
        ({**BARE, "sinkhorn_iterations": 1}, False),
        ({**BARE, "expert_choice_routing": True}, False),
        ({**BARE, "expert_choice_routing": True, "expert_choice_capacity_factor": 4.0}, True),
    ],
)
def test_the_causal_label_is_true_for_training_with_each_configuration(settings: dict[str, Any], causal: bool) -> None:
    router = make(**settings)
    assert router.causal is causal
    x = torch.randn(T, D)
    other = torch.cat([x[:1], torch.full((T - 1, D), 0.7)])
    unaffected = torch.allclose(route(router, x).probs[0], route(router, other).probs[0], atol=1e-6)
    same = torch.equal(selection_mask(route(router, x))[0], selection_mask(route(router, other))[0])
    assert (unaffected and same) or not causal


def test_a_smaller_epsilon_gives_more_confidence_and_less_entropy(x: Tensor) -> None:
    """With a smaller epsilon, confidence (the mean of the largest probability) rises and normalized entropy falls.

    Other code calls normalized entropy "confidence" too, although it falls where confidence rises.
    """
    blurred, sharp = (
        summarize(RoutingStats.stack([sums(route(make(sinkhorn_epsilon=epsilon), x))])) for epsilon in (0.5, 0.05)
    )
    assert sharp["routing/confidence"] > blurred["routing/confidence"]
    assert sharp["routing/entropy"] < blurred["routing/entropy"]
    probs = route(make(sinkhorn_epsilon=0.05), x).probs
    assert sharp["routing/confidence"] == pytest.approx(probs.amax(-1).mean().item(), rel=1e-5)


def test_srip_is_zero_for_orthogonal_vectors_and_equals_a_hand_computed_value_for_equal_ones() -> None:
    assert srip(torch.eye(E, N + E)) == 0
    equal_vectors = torch.tensor([[1.0, 0.0]] * 3)  # G - I is 1 off the diagonal: norm^2 6, largest singular value 2
    assert srip(equal_vectors).item() == pytest.approx(0.7 * 6 + 0.3 * 4)


def test_the_weight_of_srip_rises_with_the_steps_up_to_its_maximum(x: Tensor) -> None:
    router = make(so_warmup_steps=4, so_lambda_max=0.2)
    stats = sums(route(router, x))
    weights = []
    for _ in range(6):
        weights.append(router.loss_weights["srip"])
        router.after_step(stats)
    assert weights == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2])
    assert "steps" in router.state_dict()


def test_the_metric_router_gram_is_computed_from_the_running_mean_of_expression(x: Tensor) -> None:
    router = make()
    assert router_gram(router) is None
    router.after_step(sums(route(router, x)))
    expression = nn.functional.normalize((x @ router.projector.T).view(T, E, N), dim=-1)
    unit = nn.functional.normalize(expression.mean(0), dim=-1)
    expected = (unit @ unit.T - torch.eye(E)).norm().item() / math.sqrt(E * (E - 1))
    assert router_gram(router) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "parameters", "losses"),
    [
        ({}, "", ""),
        ({"gru": False}, "gru.weight_ih gru.weight_hh gru.bias_ih gru.bias_hh", ""),
        ({"expression": False}, "projector", "srip"),
        ({"srip_enabled": False}, "", "srip"),
        ({"osr_repulsion_weight": 0.0}, "", ""),
        ({"expert_choice_routing": False}, "", ""),
    ],
    ids=str,
)
def test_each_switch_removes_its_part_and_nothing_else(
    settings: dict[str, Any], parameters: str, losses: str, x: Tensor
) -> None:
    binding_quota = {"expert_choice_capacity_factor": 0.8}  # so low that experts reach the quota
    full, reduced = make(**binding_quota), make(**binding_quota, **settings)
    missing = {name for name, _ in full.named_parameters()} - {name for name, _ in reduced.named_parameters()}
    added = {name for name, _ in reduced.named_parameters()} - {name for name, _ in full.named_parameters()}
    assert missing == set(parameters.split())
    assert added == ({"linear"} if "gru" in settings else set())
    assert set(route(full, x).aux) - set(route(reduced, x).aux) == set(losses.split())
    assert set(full.loss_weights) - set(reduced.loss_weights) == set(losses.split())
    assert (route(reduced, x).state is None) == ("gru" in settings)
    changed = not torch.equal(route(full, x).weight, route(reduced, x).weight)
    assert changed == (bool(settings) and "srip_enabled" not in settings)


@pytest.mark.parametrize(("k", "factor"), [(2, 4.0), (4, 2.0), (E, 1.25), (E, 1.0)])
def test_a_quota_that_binds_nowhere_is_the_same_run_as_no_quota(k: int, factor: float) -> None:
    """The switch is then ignored at both of its values, and what remains of the settings has no quota either."""
    key, size = "router.expert_choice_routing", "router.expert_choice_capacity_factor"
    kept = []
    for switch in (True, False):
        ignored = make(k=k, expert_choice_routing=switch, expert_choice_capacity_factor=factor).ignored_keys()
        assert key in ignored
        kept.append({} if size in ignored else {"expert_choice_capacity_factor": factor})
    assert kept[0] == kept[1]
    assert make(k=k, **kept[0]).quota_factor is None


@pytest.mark.parametrize(
    "settings",
    [
        {"router_dim": 0},
        {"sinkhorn_epsilon": 0.0},
        {"sinkhorn_iterations": -1},
        {"expert_choice_capacity_factor": math.inf},
        {"osr_repulsion_weight": -1.0},
        {"ema_alpha": 1.0},
        {"so_warmup_steps": 0},
        {"so_lambda_max": math.nan},
        {"k": E + 1},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        Spectra(D, E, **settings)


@pytest.mark.parametrize("loss", ["load_balance", "load_balance_sequence", "load_balance_global"])
def test_balance_losses_have_no_gradient_with_all_experts(loss: str, x: Tensor) -> None:
    """With k=E every load is equal. What the losses then change in fp32 is rounding: in fp64 nothing is left of it."""
    router = make(k=E).double()
    routing = route(router, x.double())
    offered = dispatch(routing, E, capacity=None, seq_len=T).offered
    value = auxiliary(routing, offered, seq_len=T)[loss]
    gradients = torch.autograd.grad(value, list(router.parameters()), allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-14 for g in gradients)
