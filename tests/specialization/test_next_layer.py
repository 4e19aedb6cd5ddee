"""Tests of what a layer tells about the next one: constructed routings, and early decisions of real routers."""

from typing import Any

import numpy as np
import pytest
import torch

from moe.data.blocks import Prepared
from moe.routing.decision import Context, Knobs
from moe.specialization.next_layer import next_layer, predicted_by_choice, transitions
from moe.specialization.observation import documents_of_blocks, observe, validation_blocks
from moe.training.setup import build_model, prepare_data

KNOBS = Knobs.of()
BLOCKS = 4
N, E = 4000, 6


def one_of(experts: np.ndarray) -> np.ndarray:
    return np.eye(E, dtype=bool)[experts]


@pytest.fixture
def first() -> np.ndarray:
    """Return the experts of tokens with uneven loads."""
    return np.random.default_rng(0).choice(E, size=N, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05])


HALF = np.arange(N) % 2 == 0


def test_independent_layers_have_transitions_at_chance_whatever_the_loads(first: np.ndarray) -> None:
    other = np.random.default_rng(1).permutation(first)
    table = transitions(one_of(first), one_of(other))
    load = np.bincount(first) / N
    weights = np.outer(load, load)
    assert (weights * table).sum() == pytest.approx(1)
    assert np.abs(table - 1)[weights > 0.02].max() < 0.2


def test_a_permutation_of_experts_has_transitions_of_one_over_the_load(first: np.ndarray) -> None:
    table = transitions(one_of(first), one_of((first + 1) % E))
    load = np.bincount(first) / N
    np.testing.assert_allclose(table, np.roll(np.diag(1 / load), 1, axis=1))


def test_experts_without_tokens_have_no_transitions() -> None:
    table = transitions(one_of(np.array([0, 1])), one_of(np.array([2, 2])))
    assert np.isnan(table).sum() == E * E - 2
    assert table[0, 2] == table[1, 2] == 1


def test_two_experts_of_a_token_count_half_each() -> None:
    before = np.zeros((2, E), dtype=bool)
    before[0, :2] = before[1, 2:4] = True
    np.testing.assert_allclose(transitions(before, one_of(np.array([4, 5])))[:4, 4:], [[2, 0]] * 2 + [[0, 2]] * 2)


def test_a_function_of_the_experts_is_always_predicted(first: np.ndarray) -> None:
    before, after = one_of(first), one_of((first * 5 + 1) % E)
    assert (predicted_by_choice(before, after, HALF) == after).all()
    pair = after | one_of((first * 5 + 3) % E)  # two experts per token
    assert (predicted_by_choice(before, pair, HALF) == pair).all()


def test_no_token_predicts_itself() -> None:
    """Each half knows only the other one, in which every expert goes somewhere else."""
    before = np.tile(np.arange(E), 2)
    half = np.arange(2 * E) < E
    after = one_of(np.where(half, before, (before + 1) % E))
    assert not (predicted_by_choice(one_of(before), after, half) & after).any()


@pytest.fixture
def data(cell: Any) -> Prepared:
    return prepare_data(cell("data.max_val_blocks=12").config)


def measured(cell: Any, data: Prepared, *words: str, shifted: bool = False) -> list[dict[str, Any]]:
    """Return what the layers of a random model tell. shifted: the attention and experts of all layers add nothing."""
    model = build_model(cell("model.layers=3", *words).config, vocab_size=len(data.tokenizer)).eval()
    if shifted:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "mlp.experts" in name or "self_attn" in name:
                    p.zero_()
    seen = observe(model, validation_blocks(data, BLOCKS), KNOBS)
    return next_layer(model, seen, KNOBS, document=documents_of_blocks(data, BLOCKS))


def test_hidden_states_that_do_not_change_predict_the_next_experts_exactly(cell: Any, data: Prepared) -> None:
    exact = measured(cell, data, shifted=True)
    assert [entry["by_state"]["overlap"] for entry in exact] == [1, 1]
    assert [entry["by_state"]["kappa"] for entry in exact] == [1, 1]


def test_an_early_decision_is_that_of_the_next_router_for_the_states_of_this_layer(cell: Any, data: Prepared) -> None:
    model = build_model(cell().config, vocab_size=len(data.tokenizer)).eval()
    blocks = validation_blocks(data, BLOCKS)
    seen = observe(model, blocks, KNOBS)
    states: list[torch.Tensor] = []
    hook = model.moe_layers[0].router.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with hook, torch.no_grad():
        model(**blocks.inputs, knobs=KNOBS)
    early = model.moe_layers[1].router(states[0], Context(blocks.ids, KNOBS)).expert.view(-1, 2)
    hits = np.take_along_axis(seen.chosen[1], early.numpy(), axis=1).mean()
    [found] = next_layer(model, seen, KNOBS, document=documents_of_blocks(data, BLOCKS))
    assert found["by_state"]["overlap"] == pytest.approx(hits)


def test_hash_routing_is_known_one_layer_early_and_a_chain_has_no_early_decision(cell: Any, data: Prepared) -> None:
    assert [entry["by_state"]["kappa"] for entry in measured(cell, data, "router=hash")] == [1, 1]
    assert [entry["by_state"] for entry in measured(cell, data, "router=chain_of_experts")] == [None, None]
