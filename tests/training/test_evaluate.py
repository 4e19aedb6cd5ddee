"""Evaluation returns the same metric names for every router, with null where a metric does not apply."""

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


def evaluated(router: str) -> dict[str, object]:
    torch.manual_seed(0)
    spec = yaml.safe_load((CONF / "router" / f"{router}.yaml").read_text())
    model = MoEForCausalLM(MoEConfig.of(SIZE, spec, vocab_size=V, seq_len=S)).eval()
    ids = torch.randint(0, V, (6, S)).tolist()
    blocks = Dataset.from_dict({"input_ids": ids, "domain": [0, 0, 0, 1, 1, 1]}).with_format("numpy")
    return evaluate(model, blocks, domains=("a", "b"), batch_size=4, temperature=1.0)


@pytest.fixture(scope="module")
def schema() -> set[str]:
    return set(evaluated("topk"))


@pytest.mark.parametrize("router", sorted(path.stem for path in (CONF / "router").glob("*.yaml")))
def test_every_router_has_the_same_metric_names(router: str, schema: set[str]) -> None:
    values = evaluated(router)
    assert set(values) == schema
    assert {f"{name}/layer00" for name in ROUTING_METRICS} < schema


def test_a_metric_that_does_not_apply_to_a_router_is_null() -> None:
    hashed, soft, top = evaluated("hash"), evaluated("soft_moe"), evaluated("topk")
    assert hashed["routing/entropy"] is hashed["routing/router_gram"] is hashed["routing/entropy_t1"] is None
    assert soft["routing/jaccard"] is soft["routing/unrouted_rate"] is soft["routing/position_information"] is None
    assert soft["routing/entropy"] is not None
    assert None not in (top["routing/entropy"], top["routing/router_gram"], top["routing/output_similarity"])
    assert hashed["routing/drop_rate_by_position"] == [0.0] * 10
    assert soft["routing/drop_rate_by_position"] == [None] * 10


def test_outputs_of_experts_are_compared_on_tokens_of_all_positions() -> None:
    for seq_len in (64, 128, 512, 2048):
        assert len({place % seq_len for place in range(0, 251 * seq_len, PROBE_STRIDE)}) == seq_len


def test_batches_mix_the_domains_and_read_every_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are sorted by domain. Batches of neighbors would have one domain each, and overflow its experts."""
    read: list[list[int]] = []

    def noted(data: Dataset, indices: range) -> Batch:
        read.append(list(indices))
        return batch(data, indices)

    monkeypatch.setattr("moe.training.evaluate.batch", noted)
    evaluated("topk")
    assert sorted(index for indices in read for index in indices) == list(range(6))
    assert all(len(indices) <= 4 for indices in read)
    assert all(min(indices) < 3 <= max(indices) for indices in read)
