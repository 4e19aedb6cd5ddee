"""Every metric against a closed form, at both ends of its range."""

import functools
import itertools
import math
from typing import Any

import pytest
import torch

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
    routing: Routing, tokens: int, *, seq_len: int | None = None, capacity: float | None = None, **rest: Any
) -> RoutingStats:
    """One layer's sums, with a leading layer axis."""
    todo = dispatch(routing, E, capacity=capacity, seq_len=seq_len or tokens)
    return RoutingStats.stack([collect_stats(routing, todo, tokens, seq_len=seq_len, capacity=capacity, **rest)])


def stats_of(expert: torch.Tensor, probs: torch.Tensor | None = None, **rest: Any) -> RoutingStats:
    """Of a choice (T, K); clean logits are the logs of `probs`."""
    logits = probs.log() if probs is not None else None
    routing = Routing.token_choice(expert, torch.ones(expert.shape), probs=probs, logits=logits)
    return sums(routing, len(expert), **rest)


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


RING = torch.zeros(10, E)  # where `balanced` sends its tokens, by decile of their place
for place in range(T):
    for slot in range(K):
        RING[place * 10 // T, (place + slot) % E] += 1
RING_INFORMATION = plug_in_information(RING)

CLOSED_FORMS = {  # metric: (balanced and undecided, everything to one expert with certainty)
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
    "active_experts": (K, 1),
    "active_experts_std": (0, 0),
    "drop_rate": (0, 0),
    "capacity_usage": (None, None),  # dropless
    "unrouted_rate": (0, 0),
    "entropy": (LN_E, 0),
    "entropy_t1": (LN_E, 0),
    "confidence": (1 / E, 1),
    "confidence_t1": (1 / E, 1),
    "margin": (0, 1),
    "top_k_mass": (K / E, 1),
    "mutual_information": (0, 0),
    "position_information": (-(9 * (E - 1)) / (2 * T * K) + RING_INFORMATION, 0),
    "output_similarity": (None, None),  # no token was run through all experts
    "logsumexp_squared": (0, 0),
    "logit_rms": (LN_E, 12 * math.log(10) * math.sqrt(1 - 1 / E)),
    "jaccard": (8 / 28 * 1 / 3, None),  # a ring: of all pairs the neighbors share half of their tokens
    "jaccard_chance": ((K - 1) / (2 * (E - 1) - (K - 1)), None),
    "sequential_overlap": (1 / 2, 1),
    "sequential_overlap_chance": (K / E, 1 / E),
    "sequential_overlap_kappa": ((1 / 2 - K / E) / (1 - K / E), None),
}


@pytest.mark.parametrize("name", ROUTING_METRICS)
def test_closed_forms(name: str) -> None:
    low, high = CLOSED_FORMS[name.removeprefix("routing/")]
    assert summarize(balanced())[name] == pytest.approx(low, abs=1e-5)
    assert summarize(collapsed())[name] == pytest.approx(high, abs=1e-5)


def test_top_2_cannot_be_less_balanced_than_its_attainable_maximum() -> None:
    values = summarize(stats_of(torch.tensor([[0, 1]]).expand(T, 2)))
    assert values["routing/load_cv"] == pytest.approx(math.sqrt(E / K - 1))
    assert values["routing/load_gini"] == pytest.approx(1 - K / E)
    assert values["routing/load_max_violation"] == pytest.approx(E / K - 1)
    for name in ("load_cv", "load_gini", "load_max_violation"):
        assert values[f"routing/{name}_normalized"] == pytest.approx(1), name


def test_where_every_token_takes_every_expert_no_imbalance_is_attainable() -> None:
    values = summarize(stats_of(torch.arange(E).expand(T, E)))
    for name in ("load_cv", "load_gini", "load_max_violation"):
        assert values[f"routing/{name}"] == 0, name
        assert values[f"routing/{name}_normalized"] is None, name
    assert values["routing/load_cv_floor"] == 0
    for name in ("jaccard", "sequential_overlap"):
        assert values[f"routing/{name}"] == values[f"routing/{name}_chance"] == 1, name


def test_an_expert_for_some_tokens_and_none_for_the_rest_is_as_unbalanced_as_can_be() -> None:
    """K = 1/2: no expert can have more than all assignments, so the maximum is that of K = 1."""
    chosen = torch.zeros(T, E, dtype=torch.bool)
    chosen[::2, 0] = True
    values = summarize(sums(Routing.masked(chosen, torch.ones(T, E)), T))
    for name in ("load_cv", "load_gini", "load_max_violation"):
        assert values[f"routing/{name}_normalized"] == pytest.approx(1), name
    assert values["routing/load_cv_floor"] == pytest.approx(math.sqrt((E - 1) / (T / 2)))


def test_the_floor_is_the_cv_of_routing_at_random() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [stats_of(torch.rand(T, E, generator=generator).topk(K).indices) for _ in range(500)]
    floor = value(draws[0], "load_cv_floor")
    assert sum(value(draw, "load_cv") ** 2 for draw in draws) / len(draws) == pytest.approx(floor**2, rel=0.05)


def test_only_the_two_sided_violation_sees_an_unused_expert_among_equals() -> None:
    stats = stats_of((torch.arange(7 * E) % (E - 1))[:, None])
    assert value(stats, "load_max_violation") == pytest.approx(1 / (E - 1))
    assert value(stats, "load_max_violation_two_sided") == pytest.approx(1)


def test_the_violation_of_a_batch_is_not_that_of_all_batches() -> None:
    """Every batch to one expert, each to another: balanced in the end, collapsed at any time."""
    parts = [stats_of(torch.full((T, 1), e)) for e in range(E)]
    stats = functools.reduce(RoutingStats.merge, parts)
    assert value(stats, "load_max_violation") == 0
    assert value(stats, "load_max_violation_batch") == E - 1


def test_the_violation_of_a_sequence_is_not_that_of_all_sequences() -> None:
    """Every sequence to one expert, each to another; and a sequence that asks for nothing counts nowhere."""
    expert = torch.arange(E).repeat_interleave(4)[:, None]
    stats = stats_of(expert, seq_len=4)
    assert value(stats, "load_max_violation") == 0
    assert value(stats, "load_max_violation_sequence") == E - 1
    assert value(stats_of(expert, seq_len=4 * E), "load_max_violation_sequence") == 0
    chosen = torch.zeros(8, E, dtype=torch.bool)
    chosen[:4, 0] = True
    half = sums(Routing.masked(chosen, torch.ones(8, E)), 8, seq_len=4)
    assert value(half, "load_max_violation_sequence") == E - 1


def test_position_information_sees_routing_by_position_and_corrects_for_chance() -> None:
    length, rounds = 40, 50
    decile = (torch.arange(length) * 10 // length).repeat(rounds)
    by_place = stats_of((decile % E)[:, None], seq_len=length)
    known = plug_in_information(by_place.offered_by_position[0])
    assert value(by_place, "position_information") == pytest.approx(known, abs=0.02)
    assert known > 1.9
    generator = torch.Generator().manual_seed(0)
    draws = [
        value(stats_of(torch.rand(400, E, generator=generator).topk(1).indices, seq_len=40), "position_information")
        for _ in range(200)
    ]
    assert sum(draws) / len(draws) == pytest.approx(0, abs=0.008)  # the plug-in estimate would be 0.08


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize(("seq_len", "text_len"), [(1, 1), (16, 16), (T, T), (16, 7), (T, 30)])
def test_the_sums_of_choices_token_by_token(capacity: float | None, seq_len: int, text_len: int) -> None:
    """Tokens that ask for none to four experts, some without room, in texts of which a sequence may hold several."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(T, E, generator=generator) < torch.rand(T, 1, generator=generator) / 2
    probs = torch.rand(T, E, generator=generator)
    routing = Routing.masked(chosen, probs, probs=probs)
    kept = dispatch(routing, E, capacity=capacity, seq_len=seq_len)
    names = ("repeatable", "repeated", "top_k_mass", "margin", "entropy", "sequences", "max_violation_sequence")
    expected = {name: torch.zeros(()) for name in names}
    expected |= {"offered_by_position": torch.zeros(10, E), "kept_by_position": torch.zeros(10)}
    expected |= {"coactivation": torch.zeros(E, E), "tokens_by_active": torch.zeros(E + 1)}
    expected["unrouted"] = torch.tensor(float(T - len(set(kept.token.tolist()))))
    for token in kept.token:
        expected["kept_by_position"][token % seq_len % text_len * 10 // seq_len] += 1
    for t in range(T):
        mine = [e for e in range(E) if chosen[t, e]]
        place = t % seq_len % text_len
        expected["tokens_by_active"][len(mine)] += 1
        for e in mine:
            expected["offered_by_position"][place * 10 // seq_len, e] += 1
            expected["top_k_mass"] += probs[t, e]
            expected["repeatable"] += place > 0
            expected["repeated"] += place > 0 and chosen[t - 1, e]
            for other in mine:
                expected["coactivation"][e, other] += 1
        second, first = probs[t].sort().values[-2:]
        expected["margin"] += first - second
        expected["entropy"] -= (probs[t] * probs[t].log()).sum()
    for rows in chosen.view(-1, seq_len, E):
        loads = rows.sum(0).float()
        if loads.sum() > 0:
            expected["sequences"] += 1
            expected["max_violation_sequence"] += loads.max() / loads.mean() - 1
    within = None if text_len == seq_len else (torch.arange(seq_len) % text_len).repeat(T // seq_len)
    stats = collect_stats(routing, kept, T, seq_len=seq_len, document_position=within, capacity=capacity)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name), value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_step_fetches_its_sums_from_the_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[torch.Tensor] = []
    fetch = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: fetched.append(tensor) or fetch(tensor))
    summarize(balanced(), per_layer=False)
    assert len(fetched) == 1


def test_active_experts_are_counted_before_drops_and_over_all_tokens() -> None:
    """Tokens that ask for 0, 1, 3 and 4 experts: a mean of 2 and a variance of (4 + 1 + 1 + 4) / 4."""
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
def test_a_fixed_number_of_experts_does_not_vary_over_however_many_tokens(k: int) -> None:
    """Of sums of squares in single precision the rounding would be seen: here of 3 million tokens' squares."""
    many = functools.reduce(RoutingStats.merge, [stats_of(torch.arange(k).expand(10_007, k))] * 301)
    assert value(many, "active_experts") == k
    assert value(many, "active_experts_std") == 0


def test_drops_by_position_under_each_policy() -> None:
    """One expert wanted by all, room for half: by position the late half is lost, in every sequence alike."""
    expert = torch.zeros(40, 1, dtype=torch.long)
    stats = stats_of(expert, seq_len=20, capacity=E / 2)
    assert drop_rate_by_position(stats) == [0] * 5 + [1] * 5
    assert value(stats, "drop_rate") == 1 / 2
    assert drop_rate_by_position(stats_of(expert, seq_len=20)) == [0] * 10


def test_output_similarity_against_all_pairs() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(4, 3, 6)
    expected = [
        sum(torch.cosine_similarity(outputs[i, n], outputs[j, n], dim=0) for i in range(4) for j in range(i)) / 6
        for n in range(3)
    ]
    torch.testing.assert_close(mean_cosine(outputs), torch.stack(expected))
    assert mean_cosine(outputs[:1]).tolist() == [0, 0, 0]
    alike = mean_cosine(outputs[:1].repeat(5, 1, 1) * torch.arange(1, 6)[:, None, None])
    torch.testing.assert_close(alike, torch.ones(3))


def test_capacity_usage() -> None:
    even = (torch.arange(T)[:, None] + torch.arange(K)) % E
    assert value(stats_of(even, capacity=1.0), "capacity_usage") == 1
    assert value(stats_of(even, capacity=2.0), "capacity_usage") == 1 / 2
    assert value(stats_of(torch.zeros_like(even[:, :1]), capacity=1.0), "capacity_usage") == 1 / E


def test_jaccard_is_of_all_pairs_whatever_their_rank() -> None:
    """All pairs alike: its chance level. Fixed partners: 1 for those pairs and 0 for the rest."""
    everyone = stats_of(torch.tensor(list(itertools.combinations(range(E), 2))))
    assert value(everyone, "jaccard") == pytest.approx(value(everyone, "jaccard_chance"))
    assert value(stats_of(torch.arange(E).view(-1, 2)), "jaccard") == pytest.approx((E / 2) / math.comb(E, 2))
    triples = stats_of(torch.tensor([[0, 1, 2]]).expand(T, 3))
    assert value(triples, "jaccard") == pytest.approx(3 / (math.comb(E, 2) - math.comb(E - 3, 2)))


def test_pairs_are_counted_exactly_in_reduced_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        stats = stats_of(torch.tensor([[0, 1]]).expand(1001, 2))
    assert stats.coactivation[0, 0, 1] == 1001


def test_sequential_overlap_never_crosses_into_the_next_sequence() -> None:
    expert = torch.tensor([0, 1, 1, 0]).repeat(T // 4)[:, None]
    assert value(stats_of(expert, seq_len=2), "sequential_overlap") == 0
    assert value(stats_of(expert.roll(1), seq_len=2), "sequential_overlap") == 1
    assert value(stats_of(expert, seq_len=1), "sequential_overlap") is None


def test_overlap_beyond_chance_does_not_rise_with_an_uneven_load() -> None:
    """Of tokens that choose without regard to each other, one expert four times as often as the seven others together;
    in the same choices, sorted, tokens nearly always agree with the one before."""
    torch.manual_seed(0)
    uneven = torch.tensor([28.0, *[1.0] * 7]).log() + torch.distributions.Gumbel(0.0, 1.0).sample((20_000, E))
    for k in (1, 2):
        chosen = uneven.topk(k).indices
        stats = stats_of(chosen, seq_len=20_000)
        assert value(stats, "sequential_overlap") > 2 * k / E
        assert value(stats, "sequential_overlap_kappa") == pytest.approx(0, abs=0.02)
    alike = stats_of(uneven.argmax(-1).sort().values[:, None], seq_len=20_000)
    assert value(alike, "sequential_overlap_kappa") > 0.99


def test_a_text_begins_wherever_positions_do_not_go_on() -> None:
    """At 0 again, after padding on the left, and at the start of a sequence, where generation may be far into one."""
    positions = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 1, 2], [5, 6, 7, 8, 9]])
    assert document_positions(positions).tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert document_positions(positions[:, -1:]).tolist() == [[0], [0], [0]]


def test_of_two_texts_in_a_sequence_the_second_begins_anew() -> None:
    """Texts of 6 and 4 tokens, each from expert to expert; only across the border between them one is repeated."""
    expert = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0, 1, 0])[:, None]
    document_position = document_positions(torch.tensor([[*range(6), *range(4)]])).flatten()
    packed, one = stats_of(expert, seq_len=10, document_position=document_position), stats_of(expert, seq_len=10)
    assert value(packed, "sequential_overlap") == 0
    assert packed.repeatable == 8
    assert value(one, "sequential_overlap") == pytest.approx(1 / 9)
    assert packed.offered_by_position[0, :, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert packed.offered_by_position[0, :, 1].tolist() == [1, 1, 1, 1, 0, 1, 0, 0, 0, 0]
    assert packed.kept_by_position[0].tolist() == [2, 2, 2, 2, 1, 1, 0, 0, 0, 0]
    assert one.kept_by_position[0].tolist() == [1] * 10


def test_top_k_mass_is_of_the_experts_asked_for_and_not_of_the_largest() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2, *[0.0] * (E - 3)]])
    stats = stats_of(torch.tensor([[0, 2]]), probs)
    assert value(stats, "top_k_mass") == pytest.approx(0.7)
    assert value(stats, "margin") == pytest.approx(0.2)


def test_without_any_assignment_every_number_is_finite_or_null() -> None:
    nothing = sums(Routing.masked(torch.zeros(T, E, dtype=torch.bool), torch.ones(T, E)), T, capacity=1.0)
    values = summarize(nothing)
    assert all(number is None or math.isfinite(number) for number in values.values())
    assert values["routing/load_cv_floor"] is values["routing/load_max_violation_batch"] is None
    assert value(nothing.merge(balanced()), "load_max_violation_batch") == 0


def test_a_single_expert_has_no_runner_up() -> None:
    routing = Routing.token_choice(torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1), probs=torch.ones(T, 1))
    stats = collect_stats(routing, dispatch(routing, 1, capacity=None, seq_len=T), T)
    assert value(RoutingStats.stack([stats]), "margin") is None


def test_specialization_is_mutual_information() -> None:
    """Certain about each token, uniform over all: ln E."""
    probs = torch.eye(E).repeat(T // E, 1).clamp(min=1e-12)
    assert summarize(stats_of(probs.topk(1).indices, probs))["routing/mutual_information"] == pytest.approx(LN_E, 1e-4)


def test_pooling_lets_layers_cancel_and_the_layers_show_it() -> None:
    left, right = (torch.full((T, 1), e) for e in (0, 1))
    layers = [RoutingStats(*(field[0] for field in stats_of(expert, None))) for expert in (left, right)]
    values = summarize(RoutingStats.stack(layers))
    assert values["routing/load_cv/layer00"] == values["routing/load_cv/layer01"] == pytest.approx(math.sqrt(E - 1))
    assert values["routing/load_cv"] == values["routing/load_cv/worst"] == pytest.approx(math.sqrt(E - 1))
    assert values["routing/load_cv/pooled"] == pytest.approx(math.sqrt(E / 2 - 1))


def test_balance_is_judged_on_the_load_asked_for() -> None:
    """On kept assignments a tight capacity would look perfectly balanced."""
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
    """All but the one that is about micro-batches."""
    torch.manual_seed(0)
    probs = torch.softmax(torch.randn(T, E), -1)
    expert = probs.topk(K).indices
    parts = [stats_of(expert[part], probs[part], seq_len=4) for part in (slice(20), slice(20, T))]
    whole = summarize(stats_of(expert, probs, seq_len=4))
    for name, number in summarize(parts[0].merge(parts[1])).items():
        if name.endswith("load_max_violation_batch") or "violation_batch/" in name:
            single = name.replace("_batch", "")
            assert number == pytest.approx(sum(summarize(part)[single] for part in parts) / 2), name
        else:
            assert number == whole[name] or number == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name


def test_utilization_sums_to_one_per_layer() -> None:
    [shares] = utilization(balanced())
    assert shares == pytest.approx([1 / E] * E)


def test_router_gram_at_both_ends() -> None:
    def gram(rows: torch.Tensor) -> float | None:
        router = TopK(rows.shape[1], len(rows), k=1)
        router.weight = torch.nn.Parameter(rows)
        return router_gram(router)

    assert gram(7 * torch.linalg.qr(torch.randn(16, 5)).Q.T) == pytest.approx(0, abs=1e-6)
    assert gram(torch.ones(5, 16) * torch.arange(1, 6)[:, None]) == pytest.approx(1)
    assert gram(torch.ones(1, 16)) is None
    assert router_gram(Hash(16, 5)) is None
