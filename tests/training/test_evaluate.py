"""Tests of evaluation: every router has the same metric names, and metrics that do not apply are null."""

import collections
import math

import numpy as np
import pytest
import torch

from moe.config.model import ModelConfig
from moe.config.options import complete, router_spec
from moe.data.blocks import Batch, batch
from moe.data.table import BlockTable
from moe.metrics.catalog import ROUTING_METRICS
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.routing.decision import TrainingText
from moe.training.evaluate import compared_tokens, evaluate

S, V = 16, 50
SIZE = ModelConfig(dim=16, heads=2, layers=1, ffn=8, num_experts=8, dense_ffn=16)


def make(router: str) -> tuple[MoEForCausalLM, BlockTable]:
    """Return an untrained small model with this router, and six random blocks, three of each domain."""
    torch.manual_seed(0)
    spec = router_spec(router)
    model = MoEForCausalLM(MoEConfig.of(SIZE, spec, vocab_size=V, seq_len=S)).eval()
    ids = torch.randint(0, V, (6, S)).numpy()
    blocks = BlockTable({"input_ids": ids, "domain": np.array([0, 0, 0, 1, 1, 1])})
    for layer in model.moe_layers:
        layer.router.before_training(TrainingText(torch.ones(V, dtype=torch.long), ("a", "b")))
    return model, blocks


def evaluate_router(router: str) -> dict[str, object]:
    """Return the metrics of the model of `make` on its blocks."""
    model, blocks = make(router)
    return evaluate(model, blocks, domains=("a", "b"), text_bytes=(90, 0), batch_size=4, temperature=1.0)


@pytest.fixture(scope="module")
def metric_names() -> set[str]:
    return set(evaluate_router("topk"))


@pytest.mark.parametrize("router", complete("router"))
def test_every_router_has_the_same_metric_names(router: str, metric_names: set[str]) -> None:
    values = evaluate_router(router)
    assert set(values) == metric_names
    assert {f"{name}/layer00" for name in ROUTING_METRICS} < metric_names


def test_an_oracle_is_pure_and_the_others_are_as_pure_as_the_experts_of_a_second_pass_say() -> None:
    """The second pass runs all blocks at once, and its assignments are counted one by one."""
    oracle = evaluate_router("oracle")
    assert (oracle["routing/purity"], oracle["routing/domain_information"]) == pytest.approx((1, 1))
    for router in ("topk", "top_p", "chain_of_experts"):
        values, (model, blocks) = evaluate_router(router), make(router)
        counted: collections.Counter[tuple[int, int]] = collections.Counter()
        for decision in model(**batch(blocks, range(6)).inputs).routing[0]:
            for token, expert in zip(decision.token.tolist(), decision.expert.tolist(), strict=True):
                counted[int(token // S >= 3), expert] += 1
        pure = sum(max(counted[0, expert], counted[1, expert]) for expert in range(8))
        assert values["routing/purity/layer00"] == pytest.approx(pure / counted.total()), router
    assert evaluate_router("soft_moe")["routing/purity"] is None


def test_a_metric_that_does_not_apply_to_a_router_is_null() -> None:
    hashed, soft, topk = evaluate_router("hash"), evaluate_router("soft_moe"), evaluate_router("topk")
    assert hashed["routing/entropy"] is hashed["routing/router_gram"] is hashed["routing/entropy_t1"] is None
    assert soft["routing/jaccard"] is soft["routing/unrouted_rate"] is soft["routing/position_information"] is None
    assert soft["routing/entropy"] is not None
    assert topk["val/bits_per_byte"] == pytest.approx(topk["val/loss"] / math.log(2) * 6 * (S - 1) / 90)
    assert topk["val/bits_per_byte/a"] == pytest.approx(topk["val/loss/a"] / math.log(2) * 3 * (S - 1) / 90)
    assert topk["val/bits_per_byte/b"] is None, "the text of this domain has no bytes"
    assert None not in (topk["routing/entropy"], topk["routing/router_gram"], topk["routing/output_similarity"])
    assert hashed["routing/drop_rate_by_position"] == [0.0] * 10
    assert soft["routing/drop_rate_by_position"] == [None] * 10


@pytest.mark.parametrize(("count", "batch_size", "seq_len"), [(456, 16, 128), (300, 7, 502), (251, 64, 64)])
def test_experts_are_compared_at_all_positions_evenly_for_every_batch_size(
    count: int, batch_size: int, seq_len: int
) -> None:
    """The tokens on which experts are compared are the same for every batch size, and lie at all positions."""
    batches = math.ceil(count / batch_size)
    found: list[tuple[int, int]] = []
    for first in range(batches):
        blocks = range(first, count, batches)
        tokens = compared_tokens(blocks, seq_len).tolist()
        found += [(blocks[token // seq_len], token % seq_len) for token in tokens]
    whole = compared_tokens(range(count), seq_len).tolist()
    assert sorted(found) == [(token // seq_len, token % seq_len) for token in whole]
    times = collections.Counter(position for _, position in found)
    assert len(times) == seq_len
    assert max(times.values()) - min(times.values()) <= 1
    assert len(found) == pytest.approx(count * seq_len / 251, rel=0.01)


def test_evaluation_batches_mix_domains_and_read_every_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch has blocks of several domains, and every block is read exactly once.

    The blocks are sorted by domain. A batch of consecutive blocks would have a single domain, whose experts would then
    exceed their capacity.
    """
    read: list[list[int]] = []

    def recording_batch(data: BlockTable, indices: range) -> Batch:
        read.append(list(indices))
        return batch(data, indices)

    monkeypatch.setattr("moe.training.evaluate.batch", recording_batch)
    evaluate_router("topk")
    assert sorted(index for indices in read for index in indices) == list(range(6))
    assert all(len(indices) <= 4 for indices in read)
    assert all(min(indices) < 3 <= max(indices) for indices in read)
