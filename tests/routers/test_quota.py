"""Tests of selection under a quota: no expert exceeds the quota, and the selection equals the greedy one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.routers.quota import choose_within_quota


def greedy(scores: Tensor, k: int, quota: int) -> Tensor:
    """Return the selection of slow reference code: take one (token, expert) pair after another, highest score first."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for pair in scores.flatten().argsort(descending=True).tolist():
        token, expert = divmod(pair, scores.shape[1])
        if chosen[token].sum() < k and chosen[:, expert].sum() < quota:
            chosen[token, expert] = True
    return chosen


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Draw scores, k and a quota. In some cases all tokens prefer the same experts."""
    tokens, experts = draw(st.integers(1, 30)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    skew = draw(st.sampled_from([0.0, 1.0, 10.0]))
    scores = torch.randn(tokens, experts, generator=generator) + skew * torch.randn(experts, generator=generator)
    return scores, draw(st.integers(1, experts)), draw(st.integers(1, tokens + 1))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_the_selection_equals_the_greedy_selection(case: tuple[Tensor, int, int]) -> None:
    assert torch.equal(choose_within_quota(*case), greedy(*case))


@given(cases(), st.sampled_from([0.0, 1.0, 3.0]))
@settings(max_examples=100, deadline=None)
def test_with_ties_the_selection_exceeds_neither_quota_nor_k(case: tuple[Tensor, int, int], grain: float) -> None:
    scores, k, quota = case
    chosen = choose_within_quota((scores * grain).round(), k, quota)
    assert chosen.sum(0).max() <= quota
    assert chosen.sum(1).max() <= k


def test_a_load_of_three_times_the_quota_is_reduced_to_the_quota_and_all_tokens_get_k_experts() -> None:
    """Nearly all of 1024 tokens prefer the same expert, and the quota of 320 still holds.

    Code that runs rounds in parallel and applies the quota only to later rounds gives this expert 938 tokens.
    """
    scores = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 3
    assert choose_within_quota(scores, 2, 1024)[:, 0].sum() > 900
    chosen = choose_within_quota(scores, 2, 320)
    assert chosen[:, 0].sum() == 320
    assert chosen.sum(0).max() == 320
    assert (chosen.sum(1) == 2).all()


def test_with_a_quota_that_no_expert_reaches_the_selection_equals_top_k() -> None:
    scores = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    top = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(3).indices, True)
    assert torch.equal(choose_within_quota(scores, 3, 20), top)
    assert torch.equal(choose_within_quota(scores, 3, 19), top)
