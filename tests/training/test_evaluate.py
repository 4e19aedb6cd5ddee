"""Tests of evaluation: every router has the same metric names, and metrics that do not apply are null."""

import pytest
import torch
import yaml
from datasets import Dataset

from moe.config.options import CONF
from moe.config.schema import ModelConfig
from moe.data.blocks import Batch, batch
from moe.metrics.catalog import ROUTING_METRICS
from moe.model.decoder import MoEConfig, MoEForCausalLM
from moe.training.evaluate import PROBE_STRIDE, evaluate

S, V = 16, 50
SIZE = ModelConfig(dim=16, heads=2, layers=1, ffn=8, num_experts=8, dense_ffn=16)


def evaluate_router(router: str) -> dict[str, object]:
    """Return the metrics of an untrained small model with this router on six random blocks."""
    torch.manual_seed(0)
    spec = yaml.safe_load((CONF / "router" / f"{router}.yaml").read_text())
    model = MoEForCausalLM(MoEConfig.of(SIZE, spec, vocab_size=V, seq_len=S)).eval()
    ids = torch.randint(0, V, (6, S)).tolist()
    blocks = Dataset.from_dict({"input_ids": ids, "domain": [0, 0, 0, 1, 1, 1]}).with_format("numpy")
    return evaluate(model, blocks, domains=("a", "b"), batch_size=4, temperature=1.0)


@pytest.fixture(scope="module")
def metric_names() -> set[str]:
    return set(evaluate_router("topk"))


@pytest.mark.parametrize("router", sorted(path.stem for path in (CONF / "router").glob("*.yaml")))
def test_every_router_has_the_same_metric_names(router: str, metric_names: set[str]) -> None:
    values = evaluate_router(router)
    assert set(values) == metric_names
    assert {f"{name}/layer00" for name in ROUTING_METRICS} < metric_names


def test_a_metric_that_does_not_apply_to_a_router_is_null() -> None:
    hashed, soft, topk = evaluate_router("hash"), evaluate_router("soft_moe"), evaluate_router("topk")
    assert hashed["routing/entropy"] is hashed["routing/router_gram"] is hashed["routing/entropy_t1"] is None
    assert soft["routing/jaccard"] is soft["routing/unrouted_rate"] is soft["routing/position_information"] is None
    assert soft["routing/entropy"] is not None
    assert None not in (topk["routing/entropy"], topk["routing/router_gram"], topk["routing/output_similarity"])
    assert hashed["routing/drop_rate_by_position"] == [0.0] * 10
    assert soft["routing/drop_rate_by_position"] == [None] * 10


def test_the_tokens_on_which_experts_are_compared_cover_all_positions() -> None:
    for seq_len in (64, 128, 512, 2048):
        assert len({index % seq_len for index in range(0, 251 * seq_len, PROBE_STRIDE)}) == seq_len


def test_evaluation_batches_mix_domains_and_read_every_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch has blocks of several domains, and every block is read exactly once.

    The blocks are sorted by domain. A batch of consecutive blocks would have a single domain, whose experts would then
    exceed their capacity.
    """
    read: list[list[int]] = []

    def recording_batch(data: Dataset, indices: range) -> Batch:
        read.append(list(indices))
        return batch(data, indices)

    monkeypatch.setattr("moe.training.evaluate.batch", recording_batch)
    evaluate_router("topk")
    assert sorted(index for indices in read for index in indices) == list(range(6))
    assert all(len(indices) <= 4 for indices in read)
    assert all(min(indices) < 3 <= max(indices) for indices in read)
