"""Tests of the loss at other numbers of experts per token."""

from typing import Any

import numpy as np
import pytest
import torch
from architectures import E, V, around, router_of, tiny

from moe.config.checkpoints.transformers_config import PER_TOKEN, number
from moe.config.model import ModelConfig
from moe.data.blocks import Batch
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.routing.decision import Knobs
from moe.specialization.experts_per_token import loss_by_k, numbers
from moe.specialization.observation import next_token_nats
from moe.training.setup import build_model

DOCUMENT = np.arange(4)
KNOBS = Knobs.of()


def blocks_of(vocabulary: int) -> Batch:
    ids = torch.randint(3, vocabulary, (4, 8), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.zeros(4, dtype=torch.long), ids, None)


def losses(model: MoEForCausalLM, blocks: Batch) -> dict[int, float]:
    return {row["k"]: row["loss"]["mean"] for row in loss_by_k(model, blocks, KNOBS, document=DOCUMENT)}


def test_numbers_are_powers_of_two_all_experts_and_the_neighbors_of_the_own_number() -> None:
    assert numbers(2, 8) == [1, 2, 3, 4, 8]
    assert numbers(6, 64) == [1, 2, 4, 5, 6, 7, 8, 16, 32]
    assert numbers(1, 1) == [1]


@pytest.mark.parametrize("router", ["topk", "sigmoid_bias", "gumbel", "matryoshka"])
def test_the_loss_with_another_k_is_that_of_a_model_built_with_it(router: str, cell: Any) -> None:
    models: dict[int, Any] = {}
    for k in (1, 2, 3):
        models[k] = build_model(cell(f"router={router}", f"router.k={k}").config, vocab_size=60).eval()
        models[k].load_state_dict(models[1].state_dict())
    blocks = blocks_of(60)
    found = losses(models[2], blocks)
    for k, model in ((2, models[2]), (3, models[3])):
        assert found[k] == pytest.approx(next_token_nats(model, blocks, KNOBS).nanmean().item(), rel=1e-5)
    again = loss_by_k(models[2], blocks, KNOBS, document=DOCUMENT)
    own = next(row for row in again if row["k"] == 2)
    assert own["difference"]["mean"] == 0
    assert models[2].moe_layers[0].router.k == 2  # the model has its router again


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "deepseek_v3"])
def test_the_loss_with_another_k_is_that_of_transformers(kind: str) -> None:
    """Where weights sum to 1, a single expert has the weight 1; where they do not, its own one."""
    source = tiny(kind)
    blocks = blocks_of(V)
    found = losses(around(source, router_of(source)), blocks)
    for k in (1, 2):
        other = tiny(kind, num_experts_per_tok=k)
        other.load_state_dict(source.state_dict())
        plain = around(other)
        assert found[k] == pytest.approx(next_token_nats(plain, blocks, KNOBS).nanmean().item(), rel=1e-5)


def test_an_imported_model_with_its_own_router_gets_another_k_in_its_own_code() -> None:
    source = tiny("gpt_oss")
    sizes = ModelConfig(dim=32, heads=4, layers=3, ffn=24, dense_ffn=40, num_experts=E)
    own = {"_target_": "moe.routers.imported.Imported", "k": 3}
    model = MoEForCausalLM(MoEConfig.around(source.config, sizes, own), causal_lm=source).eval()
    blocks = blocks_of(V)
    found = losses(model, blocks)
    assert found.keys() == {1, 2, 3, 4, 5}
    reference = tiny("gpt_oss", num_experts_per_tok=2, moe_k=2)
    assert number(reference.config, PER_TOKEN) == 2
    logits = reference(blocks.ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, blocks.ids[:, 1:].flatten())
    assert found[2] == pytest.approx(expected.item(), rel=1e-5)
    assert losses(model, blocks) == found


def test_a_router_without_a_number_k_has_no_such_curve(cell: Any) -> None:
    """The table of a hash router is made for one k, so that there is one value. The others have no setting k."""
    for router, values in (("hash", 1), ("balanced_random", 1), ("expert_choice", 0), ("top_p", 0)):
        model = build_model(cell(f"router={router}").config, vocab_size=60).eval()
        assert len(loss_by_k(model, blocks_of(60), KNOBS, document=DOCUMENT)) == values


def test_null_experts_count_as_choices(cell: Any) -> None:
    """The curve is over the number of choices k, at least 2, although the number of experts of a token varies."""
    model = build_model(cell("router=null_experts").config, vocab_size=60).eval()
    found = losses(model, blocks_of(60))
    assert found.keys() == {2, 3, 4}
    assert len(set(found.values())) == 3


def test_there_is_no_curve_if_another_k_changes_nothing(cell: Any) -> None:
    """The thresholds of a trained router decide alone. Before its first step it takes the top k."""
    model = build_model(cell("router=expert_threshold").config, vocab_size=60).eval()
    assert losses(model, blocks_of(60)).keys() == {1, 2, 3, 4}
    for layer in model.moe_layers:
        layer.router.threshold.fill_(0.0)
    assert not losses(model, blocks_of(60))
