"""Tests of the saliency of experts, and of its agreement with knock-outs."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from moe.data.blocks import Prepared
from moe.routing.decision import Knobs
from moe.specialization.geometry import expert_outputs, similarities
from moe.specialization.observation import observe, validation_blocks
from moe.specialization.saliency import against_knockouts, agreement, saliency
from moe.training.setup import build_model, prepare_data
from tests.adapters.models import disturb

KNOBS = Knobs.of()
BLOCKS = 4


@pytest.fixture
def data(cell: Any) -> Prepared:
    return prepare_data(cell("data.max_val_blocks=12").config)


@pytest.mark.parametrize(
    "words", [(), ("model.latent_dim=16",), ("model.router_input=attention",), ("adapter=perft_e",)]
)
def test_saliency_is_the_mean_of_gate_times_norm_over_the_tokens_of_an_expert(
    words: tuple[str, ...], cell: Any, data: Prepared
) -> None:
    """Compared with a loop over tokens and experts."""
    model = build_model(cell(*words).config, vocab_size=len(data.tokenizer)).eval()
    if model.adapter_names:
        disturb(model)  # a new adapter adds nothing
    blocks = validation_blocks(data, BLOCKS)
    seen = observe(model, blocks, KNOBS)
    states: list[torch.Tensor] = []
    hook = model.moe_layers[1].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].flatten(0, 1)))
    with hook, torch.no_grad():
        model(**blocks.inputs, knobs=KNOBS)
    layer, found = model.moe_layers[1], saliency(model, blocks, KNOBS)
    for expert in range(4):
        products = []
        for token in np.flatnonzero(seen.chosen[1][:, expert]):
            output = layer.outputs_of_all(states[0][token][None])[expert, 0]
            products.append(seen.weight[1][token, expert] * output.norm().item())
        assert found[1][expert] == pytest.approx(np.mean(products), rel=1e-4)


def test_an_expert_without_tokens_has_no_saliency_and_is_left_out_of_the_correlation() -> None:
    values = [np.array([1, 2, 3, 4, 5, np.nan])]
    found = against_knockouts(values, {"zeroed": {"delta": {"mean": [np.array([1, 2, 3, 5, 4, 99.0])]}}})
    rho = spearmanr(values[0][:5], [1, 2, 3, 5, 4]).statistic
    assert found["rho"]["zeroed"]["all"]["rho"] == pytest.approx(rho)
    assert against_knockouts(values, None)["rho"] == {}


def test_the_interval_of_the_correlation_covers_the_true_one_at_its_nominal_rate() -> None:
    """Three layers of twelve experts each, whose values have a known rank correlation (normal distribution)."""
    rng, r, covered = np.random.default_rng(0), 0.6, 0
    true = 6 / np.pi * np.arcsin(r / 2)
    for _ in range(300):
        a = rng.normal(size=(3, 12))
        b = r * a + np.sqrt(1 - r * r) * rng.normal(size=(3, 12)) + np.arange(3)[:, None] * 9  # layers differ in level
        found = agreement([*zip(a, b, strict=True)])
        covered += found["low"] <= true <= found["high"]
    assert 0.91 < covered / 300 < 0.99


def test_perfect_agreement_and_too_few_experts() -> None:
    values = np.arange(6.0)
    assert agreement([(values, rankdata(values**3))])["rho"] == pytest.approx(1)
    assert np.isnan(agreement([(values[:3], values[:3])])["rho"])


def test_similarity_compares_outputs_on_the_same_tokens_and_weights_as_stored(cell: Any, data: Prepared) -> None:
    model = build_model(cell().config, vocab_size=len(data.tokenizer)).eval()
    experts = model.moe_layers[0].experts
    with torch.no_grad():
        order = torch.randperm(experts.up.shape[1], generator=torch.Generator().manual_seed(0))
        experts.up[1] = experts.up[0][order]  # the same network with its hidden units in another order
        experts.down[1] = experts.down[0][..., order] if experts.down.shape[2] == len(order) else experts.down[0][order]
    found = similarities(model, expert_outputs(model, validation_blocks(data, BLOCKS), KNOBS))
    assert found["outputs"][0][0, 1] == pytest.approx(1, abs=1e-5)
    assert found["weights"][0][0, 1] < 0.5
    assert np.diagonal(found["outputs"], axis1=1, axis2=2) == pytest.approx(np.ones((2, 4)), abs=1e-5)
    np.testing.assert_allclose(found["outputs"], [table.T for table in found["outputs"]], atol=1e-6)
