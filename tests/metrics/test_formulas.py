"""Tests of the routing metrics against closed forms, most of them at both ends of the range."""

import functools
import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from docstrings import run_examples

from moe.metrics import agreement, formulas
from moe.metrics.catalog import ROUTING_METRICS
from moe.metrics.summary import drop_rate_by_position, summarize, utilization
from moe.routers.hash import Hash
from moe.routers.topk import TopK
from moe.routing.decision import Routing, document_positions
from moe.routing.dispatch import dispatch
from moe.routing.measurement import collect_stats, mean_cosine
from moe.routing.stats import RoutingStats
from moe.training.evaluate import router_gram

E, K, T = 8, 2, 64
LN_E = math.log(E)


def sums(
    routing: Routing, tokens: int, *, seq_len: int | None = None, capacity: float | None = None, **options: Any
) -> RoutingStats:
    """Return the sums of one layer, with a leading axis for the layer."""
    dispatched = dispatch(routing, E, capacity=capacity, seq_len=seq_len or tokens)
    return RoutingStats.stack([collect_stats(routing, dispatched, tokens, seq_len=seq_len, **options)])


def stats_of(expert: torch.Tensor, probs: torch.Tensor | None = None, **options: Any) -> RoutingStats:
    """Return the sums of a choice of experts (T, K). The clean logits are the logarithms of `probs`."""
    logits = probs.log() if probs is not None else None
    routing = Routing.token_choice(expert, torch.ones(expert.shape), probs=probs, logits=logits)
    return sums(routing, len(expert), **options)


def value(stats: RoutingStats, name: str) -> float | None:
    return summarize(stats)[f"routing/{name}"]


def balanced() -> RoutingStats:
    expert = (torch.arange(T)[:, None] + torch.arange(K)) % E
    return stats_of(expert, torch.full((T, E), 1 / E))


def collapsed() -> RoutingStats:
    probs = torch.full((T, E), 1e-12)
    probs[:, 0] = 1
    return stats_of(torch.zeros(T, 1, dtype=torch.long), probs)


def plug_in_information(counts: torch.Tensor) -> float:
    joint = (counts / counts.sum()).double()
    independent = joint.sum(0) * joint.sum(1, keepdim=True)
    return float((joint * (joint / independent).clamp(min=1e-300).log()).sum())


RING = torch.zeros(10, E)  # load of `balanced()` by decile of the position
for position in range(T):
    for number in range(K):
        RING[position * 10 // T, (position + number) % E] += 1
RING_INFORMATION = plug_in_information(RING)

CLOSED_FORMS = {  # metric: (value for `balanced()`, value for `collapsed()`)
    "load_cv": (0, math.sqrt(E - 1)),
    "load_cv_normalized": (0, 1),
    "load_cv_floor": (math.sqrt((E / K - 1) / T), math.sqrt((E - 1) / T)),
    "load_max_violation": (0, E - 1),
    "load_max_violation_normalized": (0, 1),
    "load_max_violation_two_sided": (0, E - 1),
    "load_max_violation_batch": (0, E - 1),
    "load_max_violation_sequence": (0, E - 1),
    "load_gini": (0, (E - 1) / E),
    "load_gini_normalized": (0, 1),
    "load_entropy": (1, 0),
    "effective_experts": (E, 1),
    "unused_experts": (0, (E - 1) / E),
    "busy_experts": (E, 1),
    "collapsed": (0, 1),
    "active_experts": (K, 1),
    "active_experts_std": (0, 0),
    "drop_rate": (0, 0),
    "capacity_usage": (None, None),  # dropless
    "unrouted_rate": (0, 0),
    "entropy": (LN_E, 0),
    "entropy_t1": (LN_E, 0),
    "gate_entropy": (math.log(K), 0),
    "confidence": (1 / E, 1),
    "confidence_t1": (1 / E, 1),
    "margin": (0, 1),
    "top_k_mass": (K / E, 1),
    "mutual_information": (0, 0),
    "position_information": (-(9 * (E - K)) / (2 * T * K) + RING_INFORMATION, 0),
    "flip_rate": (None, None),  # the router is in fp32
    "flip_rate_order": (None, None),
    "output_similarity": (None, None),  # no token was run through all experts
    "logsumexp_squared": (0, 0),
    "logit_rms": (LN_E, 12 * math.log(10) * math.sqrt(1 - 1 / E)),
    "jaccard": (8 / 28 * 1 / 3, None),  # 8 of 28 pairs share half of their tokens, a Jaccard index of 1/3
    "jaccard_chance": ((K - 1) / (2 * (E - 1) - (K - 1)), None),
    "sequential_overlap": (1 / 2, 1),
    "sequential_overlap_chance": (K / E, 1 / E),
    "sequential_overlap_kappa": ((1 / 2 - K / E) / (1 - K / E), None),
}


@pytest.mark.parametrize("name", ROUTING_METRICS)
def test_metrics_are_equal_to_closed_forms(name: str) -> None:
    low, high = CLOSED_FORMS[name.removeprefix("routing/")]
    assert summarize(balanced())[name] == pytest.approx(low, abs=1e-5)
    assert summarize(collapsed())[name] == pytest.approx(high, abs=1e-5)


def test_normalized_balance_metrics_are_1_at_the_largest_imbalance_of_top_2() -> None:
    values = summarize(stats_of(torch.tensor([[0, 1]]).expand(T, 2)))
    assert values["routing/load_cv"] == pytest.approx(math.sqrt(E / K - 1))
    assert values["routing/load_gini"] == pytest.approx(1 - K / E)
    assert values["routing/load_max_violation"] == pytest.approx(E / K - 1)
    for name in ("load_cv", "load_gini", "load_max_violation"):
        assert values[f"routing/{name}_normalized"] == pytest.approx(1), name


def test_normalized_balance_metrics_are_null_if_every_token_takes_every_expert() -> None:
    values = summarize(stats_of(torch.arange(E).expand(T, E)))
    for name in ("load_cv", "load_gini", "load_max_violation"):
        assert values[f"routing/{name}"] == 0, name
        assert values[f"routing/{name}_normalized"] is None, name
    assert values["routing/load_cv_floor"] == 0
    for name in ("jaccard", "sequential_overlap"):
        assert values[f"routing/{name}"] == values[f"routing/{name}_chance"] == 1, name


def test_one_expert_for_half_of_the_tokens_is_the_largest_imbalance() -> None:
    """With K = 1/2 the maximum is that of K = 1, because no expert can have more than all assignments."""
    chosen = torch.zeros(T, E, dtype=torch.bool)
    chosen[::2, 0] = True
    values = summarize(sums(Routing.masked(chosen, torch.ones(T, E)), T))
    for name in ("load_cv", "load_gini", "load_max_violation"):
        assert values[f"routing/{name}_normalized"] == pytest.approx(1), name
    assert values["routing/load_cv_floor"] == pytest.approx(math.sqrt((E - 1) / (T / 2)))


def at_random(numbers: torch.Tensor, generator: torch.Generator, **options: Any) -> RoutingStats:
    """Return the sums of tokens that each take as many experts as `numbers` (T) says, at random."""
    rank = torch.rand(len(numbers), E, generator=generator).argsort(1).argsort(1)
    return sums(Routing.masked(rank < numbers[:, None], torch.ones(len(numbers), E)), len(numbers), **options)


@pytest.mark.parametrize("choices", [[2], [1, 4], [0, 0, 1, 8]])
def test_chance_levels_are_what_random_routing_gives_also_if_k_varies(choices: list[int]) -> None:
    """Each chance level and correction is the mean over many random routings of 1,000 tokens."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor(choices).repeat(1000)[:1000]
    draws = []
    for _ in range(60):
        order = torch.randperm(1000, generator=generator)
        draws.append(summarize(at_random(numbers[order], generator, seq_len=100), per_layer=False))

    def mean(name: str, power: int = 1) -> float:
        return sum(draw[f"routing/{name}"] ** power for draw in draws) / len(draws)

    assert mean("load_cv", 2) == pytest.approx(mean("load_cv_floor", 2), rel=0.15)
    assert mean("jaccard") == pytest.approx(mean("jaccard_chance"), rel=0.01)
    assert mean("sequential_overlap") == pytest.approx(mean("sequential_overlap_chance"), rel=0.02)
    assert mean("sequential_overlap_kappa") == pytest.approx(0, abs=0.003)
    spread = statistics.stdev(draw["routing/position_information"] for draw in draws) / math.sqrt(len(draws))
    assert abs(mean("position_information")) < 3 * spread < 0.001


def test_position_information_is_0_if_every_token_takes_every_expert() -> None:
    assert value(stats_of(torch.arange(E).expand(T, E)), "position_information") == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("choices", [[1, 3], [0, 2, 5], [1, 1, 1, 8]])
def test_normalized_balance_metrics_are_at_most_1_if_k_varies_and_1_is_reached(choices: list[int]) -> None:
    """Tokens that always take the first experts have the largest imbalance that their numbers of experts allow."""
    numbers = torch.tensor(choices).repeat(T)[:T]
    chosen = torch.arange(E) < numbers[:, None]
    collapsed_values = summarize(sums(Routing.masked(chosen, torch.ones(T, E)), T))
    values = summarize(at_random(numbers, torch.Generator().manual_seed(0)))
    for name in ("load_cv", "load_gini", "load_max_violation"):
        assert collapsed_values[f"routing/{name}_normalized"] == pytest.approx(1), name
        assert 0 < values[f"routing/{name}_normalized"] < 0.8, name


def test_the_gate_entropy_is_that_of_the_weights_of_a_token() -> None:
    """Weights need not sum to 1, dropped assignments count, and tokens without an expert do not."""
    chosen = torch.zeros(3, E, dtype=torch.bool)
    chosen[0, :2] = chosen[1, 3] = True
    weight = torch.zeros(3, E)
    weight[0, :2], weight[1, 3] = torch.tensor([3.0, 1.0]), 0.2
    stats = sums(Routing.masked(chosen, weight), 3, capacity=0.1)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2
    assert value(stats, "gate_entropy") == pytest.approx(expected)


def test_only_the_two_sided_violation_is_1_with_an_unused_expert() -> None:
    stats = stats_of((torch.arange(7 * E) % (E - 1))[:, None])
    assert value(stats, "load_max_violation") == pytest.approx(1 / (E - 1))
    assert value(stats, "load_max_violation_two_sided") == pytest.approx(1)


def test_the_violation_of_a_micro_batch_is_not_that_of_all_micro_batches() -> None:
    """If each micro-batch goes to another expert, the total load is balanced but every micro-batch is collapsed."""
    parts = [stats_of(torch.full((T, 1), e)) for e in range(E)]
    stats = functools.reduce(RoutingStats.merge, parts)
    assert value(stats, "load_max_violation") == 0
    assert value(stats, "load_max_violation_batch") == E - 1


def test_the_violation_of_a_sequence_is_not_that_of_all_sequences() -> None:
    """If each sequence goes to another expert, the total load is balanced but every sequence is collapsed.

    A sequence without assignments does not count.
    """
    expert = torch.arange(E).repeat_interleave(4)[:, None]
    stats = stats_of(expert, seq_len=4)
    assert value(stats, "load_max_violation") == 0
    assert value(stats, "load_max_violation_sequence") == E - 1
    assert value(stats_of(expert, seq_len=4 * E), "load_max_violation_sequence") == 0
    chosen = torch.zeros(8, E, dtype=torch.bool)
    chosen[:4, 0] = True
    half = sums(Routing.masked(chosen, torch.ones(8, E)), 8, seq_len=4)
    assert value(half, "load_max_violation_sequence") == E - 1


def test_position_information_detects_routing_by_position_and_corrects_for_chance() -> None:
    length, rounds = 40, 50
    decile = (torch.arange(length) * 10 // length).repeat(rounds)
    by_position = stats_of((decile % E)[:, None], seq_len=length)
    expected = plug_in_information(by_position.offered_by_position[0])
    assert value(by_position, "position_information") == pytest.approx(expected, abs=0.02)
    assert expected > 1.9
    generator = torch.Generator().manual_seed(0)
    draws = [
        value(stats_of(torch.rand(400, E, generator=generator).topk(1).indices, seq_len=40), "position_information")
        for _ in range(200)
    ]
    assert sum(draws) / len(draws) == pytest.approx(0, abs=0.008)  # the plug-in estimate would be 0.08


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize(("seq_len", "document_len"), [(1, 1), (16, 16), (T, T), (16, 7), (T, 30)])
def test_sums_are_equal_to_those_of_a_loop_over_tokens(capacity: float | None, seq_len: int, document_len: int) -> None:
    """All sums are equal to those of a slow loop over tokens.

    The number of experts per token varies and can be 0. A capacity limit drops some assignments. A sequence may hold
    several documents of `document_len` tokens.
    """
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(T, E, generator=generator) < torch.rand(T, 1, generator=generator) / 2
    probs = torch.rand(T, E, generator=generator)
    routing = Routing.masked(chosen, probs, probs=probs)
    dispatched = dispatch(routing, E, capacity=capacity, seq_len=seq_len)
    names = ("repeatable", "repeated", "top_k_mass", "margin", "entropy", "sequences", "max_violation_sequence")
    expected = {name: torch.zeros(()) for name in names}
    expected |= {"offered_by_position": torch.zeros(10, E), "kept_by_position": torch.zeros(10)}
    expected |= {"coactivation": torch.zeros(E, E), "tokens_by_active": torch.zeros(E + 1)}
    expected["unrouted"] = torch.tensor(float(T - len(set(dispatched.token.tolist()))))
    for token in dispatched.token:
        expected["kept_by_position"][token % seq_len % document_len * 10 // seq_len] += 1
    for t in range(T):
        experts = [e for e in range(E) if chosen[t, e]]
        position = t % seq_len % document_len
        expected["tokens_by_active"][len(experts)] += 1
        for e in experts:
            expected["offered_by_position"][position * 10 // seq_len, e] += 1
            expected["top_k_mass"] += probs[t, e]
            expected["repeatable"] += position > 0
            expected["repeated"] += position > 0 and chosen[t - 1, e]
            for other in experts:
                expected["coactivation"][e, other] += 1
        second, first = probs[t].sort().values[-2:]
        expected["margin"] += first - second
        expected["entropy"] -= (probs[t] * probs[t].log()).sum()
    for rows in chosen.view(-1, seq_len, E):
        loads = rows.sum(0).float()
        if loads.sum() > 0:
            expected["sequences"] += 1
            expected["max_violation_sequence"] += loads.max() / loads.mean() - 1
    positions = (torch.arange(seq_len) % document_len).repeat(T // seq_len)
    document_position = None if document_len == seq_len else positions
    stats = collect_stats(routing, dispatched, T, seq_len=seq_len, document_position=document_position)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name), value, msg=lambda text, name=name: f"{name}: {text}")


def test_the_sums_of_a_step_are_copied_from_the_device_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[torch.Tensor] = []
    fetch = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: fetched.append(tensor) or fetch(tensor))
    summarize(balanced(), per_layer=False)
    assert len(fetched) == 1


def test_active_experts_are_counted_before_drops_and_over_all_tokens() -> None:
    """Active experts are the experts that a token asks for, also those that drop it.

    Tokens that ask for 0, 1, 3 and 4 experts have a mean of 2 and a variance of (4 + 1 + 1 + 4) / 4.
    """
    chosen = torch.arange(E) < torch.tensor([[0], [1], [3], [4]])
    parts = [
        sums(Routing.masked(chosen[part], torch.ones(len(chosen[part]), E)), len(chosen[part]), capacity=1.0)
        for part in (slice(4), slice(1), slice(1, 4))
    ]
    for stats in (parts[0], parts[1].merge(parts[2])):
        assert value(stats, "active_experts") == 2
        assert value(stats, "active_experts_std") == pytest.approx(math.sqrt(2.5))
        assert value(stats, "drop_rate") > 0
    assert value(parts[1], "active_experts") == value(parts[1], "active_experts_std") == 0


@pytest.mark.parametrize("k", [1, 3, E])
def test_active_experts_std_is_0_for_a_fixed_number_of_experts(k: int) -> None:
    """The standard deviation is exactly 0, also over 3 million tokens.

    With sums of squares in single precision, rounding errors would be visible.
    """
    merged = functools.reduce(RoutingStats.merge, [stats_of(torch.arange(k).expand(10_007, k))] * 301)
    assert value(merged, "active_experts") == k
    assert value(merged, "active_experts_std") == 0


def test_the_drop_rate_by_position_shows_which_half_of_a_sequence_is_dropped() -> None:
    """If all tokens ask for one expert and half of them fit, the second half of every sequence is dropped."""
    expert = torch.zeros(40, 1, dtype=torch.long)
    stats = stats_of(expert, seq_len=20, capacity=E / 2)
    assert drop_rate_by_position(stats) == [0] * 5 + [1] * 5
    assert value(stats, "drop_rate") == 1 / 2
    assert drop_rate_by_position(stats_of(expert, seq_len=20)) == [0] * 10


def test_output_similarity_is_the_mean_over_all_pairs_of_experts() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(4, 3, 6)
    expected = [
        sum(torch.cosine_similarity(outputs[i, n], outputs[j, n], dim=0) for i in range(4) for j in range(i)) / 6
        for n in range(3)
    ]
    torch.testing.assert_close(mean_cosine(outputs), torch.stack(expected))
    assert mean_cosine(outputs[:1]).tolist() == [0, 0, 0]
    parallel = mean_cosine(outputs[:1].repeat(5, 1, 1) * torch.arange(1, 6)[:, None, None])
    torch.testing.assert_close(parallel, torch.ones(3))


def test_capacity_usage() -> None:
    balanced_choice = (torch.arange(T)[:, None] + torch.arange(K)) % E
    assert value(stats_of(balanced_choice, capacity=1.0), "capacity_usage") == 1
    assert value(stats_of(balanced_choice, capacity=2.0), "capacity_usage") == 1 / 2
    assert value(stats_of(torch.zeros_like(balanced_choice[:, :1]), capacity=1.0), "capacity_usage") == 1 / E


def test_jaccard_is_the_mean_over_all_pairs_of_experts() -> None:
    """The metric is the mean over all pairs of experts.

    If all pairs are equally frequent, it is at its chance level. With fixed partners, it is 1 for these pairs and 0 for
    all others.
    """
    all_pairs = stats_of(torch.tensor(list(itertools.combinations(range(E), 2))))
    assert value(all_pairs, "jaccard") == pytest.approx(value(all_pairs, "jaccard_chance"))
    assert value(stats_of(torch.arange(E).view(-1, 2)), "jaccard") == pytest.approx((E / 2) / math.comb(E, 2))
    triples = stats_of(torch.tensor([[0, 1, 2]]).expand(T, 3))
    assert value(triples, "jaccard") == pytest.approx(3 / (math.comb(E, 2) - math.comb(E - 3, 2)))


def test_pairs_of_experts_are_counted_exactly_in_reduced_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        stats = stats_of(torch.tensor([[0, 1]]).expand(1001, 2))
    assert stats.coactivation[0, 0, 1] == 1001


def test_sequential_overlap_never_compares_tokens_of_two_sequences() -> None:
    expert = torch.tensor([0, 1, 1, 0]).repeat(T // 4)[:, None]
    assert value(stats_of(expert, seq_len=2), "sequential_overlap") == 0
    assert value(stats_of(expert.roll(1), seq_len=2), "sequential_overlap") == 1
    assert value(stats_of(expert, seq_len=1), "sequential_overlap") is None


def test_overlap_beyond_chance_does_not_rise_with_an_uneven_load() -> None:
    """Kappa is 0 if tokens choose independently, even if one expert is chosen four times as often as the seven others.

    If the same choices are sorted, tokens nearly always agree with the previous token, and kappa is almost 1.
    """
    torch.manual_seed(0)
    scores = torch.tensor([28.0, *[1.0] * 7]).log() + torch.distributions.Gumbel(0.0, 1.0).sample((20_000, E))
    for k in (1, 2):
        chosen = scores.topk(k).indices
        stats = stats_of(chosen, seq_len=20_000)
        assert value(stats, "sequential_overlap") > 2 * k / E
        assert value(stats, "sequential_overlap_kappa") == pytest.approx(0, abs=0.02)
    sorted_choices = stats_of(scores.argmax(-1).sort().values[:, None], seq_len=20_000)
    assert value(sorted_choices, "sequential_overlap_kappa") > 0.99


def test_a_document_begins_where_positions_do_not_continue() -> None:
    """A document begins where positions restart at 0, after padding on the left, and at the start of a sequence.

    In generation, a sequence may start far inside of a document. Positions then count from the start of the sequence.
    """
    positions = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 1, 2], [5, 6, 7, 8, 9]])
    assert document_positions(positions).tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert document_positions(positions[:, -1:]).tolist() == [[0], [0], [0]]


def test_the_second_document_of_a_sequence_starts_at_position_0() -> None:
    """Positions and overlap start again at the second document of a sequence.

    The documents have 6 and 4 tokens. Inside of a document, no two consecutive tokens choose the same expert. Only the
    last token of the first document and the first token of the second choose the same one.
    """
    expert = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0, 1, 0])[:, None]
    document_position = document_positions(torch.tensor([[*range(6), *range(4)]])).flatten()
    packed = stats_of(expert, seq_len=10, document_position=document_position)
    single = stats_of(expert, seq_len=10)
    assert value(packed, "sequential_overlap") == 0
    assert packed.repeatable == 8
    assert value(single, "sequential_overlap") == pytest.approx(1 / 9)
    assert packed.offered_by_position[0, :, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert packed.offered_by_position[0, :, 1].tolist() == [1, 1, 1, 1, 0, 1, 0, 0, 0, 0]
    assert packed.kept_by_position[0].tolist() == [2, 2, 2, 2, 1, 1, 0, 0, 0, 0]
    assert single.kept_by_position[0].tolist() == [1] * 10


def test_top_k_mass_is_of_the_chosen_experts_and_not_of_the_most_probable() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2, *[0.0] * (E - 3)]])
    stats = stats_of(torch.tensor([[0, 2]]), probs)
    assert value(stats, "top_k_mass") == pytest.approx(0.7)
    assert value(stats, "margin") == pytest.approx(0.2)


def test_without_any_assignment_every_number_is_finite_or_null() -> None:
    without_assignments = sums(Routing.masked(torch.zeros(T, E, dtype=torch.bool), torch.ones(T, E)), T, capacity=1.0)
    values = summarize(without_assignments)
    assert all(number is None or math.isfinite(number) for number in values.values())
    assert values["routing/load_cv_floor"] is values["routing/load_max_violation_batch"] is None
    assert value(without_assignments.merge(balanced()), "load_max_violation_batch") == 0


def test_the_margin_is_null_with_a_single_expert() -> None:
    routing = Routing.token_choice(torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1), probs=torch.ones(T, 1))
    stats = collect_stats(routing, dispatch(routing, 1, capacity=None, seq_len=T), T)
    assert value(RoutingStats.stack([stats]), "margin") is None


def test_mutual_information_of_perfect_specialization_is_the_logarithm_of_the_number_of_experts() -> None:
    """Mutual information is ln E if the router is certain about each token and uses all experts equally."""
    probs = torch.eye(E).repeat(T // E, 1).clamp(min=1e-12)
    assert summarize(stats_of(probs.topk(1).indices, probs))["routing/mutual_information"] == pytest.approx(LN_E, 1e-4)


def test_opposite_imbalances_cancel_in_the_pooled_metric_but_not_in_the_layers() -> None:
    left, right = (torch.full((T, 1), e) for e in (0, 1))
    layers = [RoutingStats(*(field[0] for field in stats_of(expert, None))) for expert in (left, right)]
    values = summarize(RoutingStats.stack(layers))
    assert values["routing/load_cv/layer00"] == values["routing/load_cv/layer01"] == pytest.approx(math.sqrt(E - 1))
    assert values["routing/load_cv"] == values["routing/load_cv/worst"] == pytest.approx(math.sqrt(E - 1))
    assert values["routing/load_cv/pooled"] == pytest.approx(math.sqrt(E / 2 - 1))


def test_balance_is_measured_before_drops() -> None:
    """Balance is measured on the load before drops. After drops, a small capacity would look perfectly balanced."""
    expert = torch.zeros(T, 1, dtype=torch.long)
    values = summarize(stats_of(expert, None, capacity=1.0))
    assert values["routing/load_cv"] == pytest.approx(math.sqrt(E - 1))
    assert values["routing/drop_rate"] == values["routing/unrouted_rate"] == pytest.approx(1 - 1 / E)


def test_a_router_without_probabilities_has_null_metrics_not_zeros() -> None:
    values = summarize(stats_of(torch.zeros(T, 1, dtype=torch.long), None))
    assert values["routing/entropy"] is None
    assert values["routing/mutual_information/layer00"] is None
    assert values["routing/load_cv"] is not None


def test_metrics_of_merged_sums_are_those_of_all_tokens() -> None:
    """All metrics of merged sums are those of all tokens at once, except the one that is a mean over micro-batches."""
    torch.manual_seed(0)
    probs = torch.softmax(torch.randn(T, E), -1)
    expert = probs.topk(K).indices
    parts = [stats_of(expert[part], probs[part], seq_len=4) for part in (slice(20), slice(20, T))]
    expected = summarize(stats_of(expert, probs, seq_len=4))
    for name, number in summarize(parts[0].merge(parts[1])).items():
        if name.endswith("load_max_violation_batch") or "violation_batch/" in name:
            metric_of_one_batch = name.replace("_batch", "")
            assert number == pytest.approx(sum(summarize(part)[metric_of_one_batch] for part in parts) / 2), name
        else:
            assert number == expected[name] or number == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def of_experts(experts: int, *, capacity: float | None) -> RoutingStats:
    """Return the sums of one layer of so many experts, the last of which gets no token."""
    logits = torch.randn(T, experts, generator=torch.Generator().manual_seed(experts))
    logits[:, -1] = -9
    probs = torch.softmax(logits, -1)
    expert = probs.topk(K).indices
    routing = Routing.token_choice(expert, probs.gather(-1, expert), probs=probs, logits=logits)
    dispatched = dispatch(routing, experts, capacity=capacity, seq_len=16)
    return collect_stats(routing, dispatched, T, seq_len=16, similarity=torch.rand(3))


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_each_layer_is_measured_with_its_own_number_of_experts(capacity: float | None) -> None:
    """The layers of a model have 4, 8 and 4 experts. Each has the metrics that it has alone."""
    layers = [of_experts(experts, capacity=capacity) for experts in (4, 8, 4)]
    together, stacked = summarize(RoutingStats.stack(layers)), RoutingStats.stack(layers)
    alone = [summarize(RoutingStats.stack([layer]), per_layer=False) for layer in layers]
    for name, metric in ROUTING_METRICS.items():
        values = [each[name] for each in alone]
        assert [together[f"{name}/layer{number:02d}"] for number in range(3)] == values, name
        if None in values:
            assert together[name] is None
        else:
            assert together[name] == pytest.approx(statistics.fmean(values))
        if "pooled" in metric.variants:
            assert together[f"{name}/pooled"] is None
            assert together[f"{name}/worst"] in values
    assert [together[f"routing/unused_experts/layer{number:02d}"] for number in range(3)] == [1 / 4, 1 / 8, 1 / 4]
    assert list(map(len, utilization(stacked))) == [4, 8, 4]
    assert [shares[-1] for shares in utilization(stacked)] == [0, 0, 0]
    rates = [drop_rate_by_position(RoutingStats.stack([layer])) for layer in layers]
    assert drop_rate_by_position(stacked) == pytest.approx([*map(statistics.fmean, zip(*rates, strict=True))])
    for number, layer in enumerate(layers):
        back = stacked.layer(number, len(layer.offered))._asdict() | {"feedback": layer.feedback}
        torch.testing.assert_close(back, layer._asdict(), rtol=0, atol=0, equal_nan=True)


def test_utilization_sums_to_one_per_layer() -> None:
    [shares] = utilization(balanced())
    assert shares == pytest.approx([1 / E] * E)


def test_router_gram_is_0_for_orthogonal_rows_and_1_for_parallel_rows() -> None:
    def gram(rows: torch.Tensor) -> float | None:
        router = TopK(rows.shape[1], len(rows), k=1)
        router.weight = torch.nn.Parameter(rows)
        return router_gram(router)

    assert gram(7 * torch.linalg.qr(torch.randn(16, 5)).Q.T) == pytest.approx(0, abs=1e-6)
    assert gram(torch.ones(5, 16) * torch.arange(1, 6)[:, None]) == pytest.approx(1)
    assert gram(torch.ones(1, 16)) is None
    assert router_gram(Hash(16, 5)) is None


def test_the_examples_in_docstrings_print_what_they_say() -> None:
    assert run_examples(formulas) == ["module"]
    assert run_examples(agreement) == ["beyond_chance", "divergence"]
