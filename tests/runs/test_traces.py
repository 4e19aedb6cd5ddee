"""Tests of routing traces: they contain the router's choices and are read as they were written."""

from typing import Any

import numpy as np
import pytest
import torch

from moe.metrics.agreement import consistency
from moe.runs.signals import Signals
from moe.runs.traces import milestones, read_traces, write_trace
from moe.training.loop import train
from moe.training.probe import assigned_experts, probe_blocks
from moe.training.setup import build_model, prepare_data


def test_milestones_are_fractions_of_the_run_and_its_last_step() -> None:
    assert milestones(300) == {30, 75, 150, 225, 300}
    assert milestones(1) == {1}
    assert max(milestones(7)) == 7


@pytest.mark.parametrize("shape", [(1, 3, 5), (4, 100, 8), (2, 7, 129)])
def test_a_trace_is_read_as_it_was_written(shape: tuple[int, ...], tmp_path: Any) -> None:
    masks = [np.random.default_rng(seed).random(shape) < 0.3 for seed in (0, 1)]
    write_trace(tmp_path, 100, masks[1])
    write_trace(tmp_path, 20, masks[0])
    traces = read_traces(tmp_path)
    assert [trace.step for trace in traces] == [20, 100]
    assert all(np.array_equal(trace.chosen, mask) for trace, mask in zip(traces, masks, strict=True))
    assert read_traces(tmp_path / "none") == []


def test_a_trace_marks_the_experts_of_the_largest_logits(cell: Any) -> None:
    config = cell("model.layers=1").config
    data = prepare_data(config)
    model = build_model(config, vocab_size=len(data.tokenizer)).train()
    mask = assigned_experts(model, data, temperature=1.0)
    assert mask is not None
    assert model.training
    ids = torch.from_numpy(data.val[probe_blocks(data)]["input_ids"])
    [(routing,)] = model.eval()(ids).routing
    assert mask.shape == (1, ids.numel(), 4)
    assert torch.equal(mask[0].long().topk(2).values.sum(-1), torch.full((ids.numel(),), 2))
    assert torch.equal(mask[0], torch.zeros_like(mask[0]).scatter(-1, routing.logits.topk(2).indices, True))


def test_a_run_writes_a_trace_at_every_milestone_and_a_soft_moe_run_writes_none(cell: Any, tmp_path: Any) -> None:
    with Signals() as signals:
        for name, router in (("top", "topk"), ("soft", "soft_moe")):
            one = cell(f"router={router}")
            (tmp_path / name).mkdir()
            train(one.config, tmp_path / name, signals=signals)
    traces = read_traces(tmp_path / "top" / "trace")
    assert [trace.step for trace in traces] == sorted(milestones(one.config.steps))
    assert not np.array_equal(traces[0].chosen, traces[-1].chosen)
    assert read_traces(tmp_path / "soft" / "trace") == []


def test_consistency_compares_the_last_two_traces_and_kappa_corrects_it_for_chance() -> None:
    rng = np.random.default_rng(0)
    first, last = (np.eye(8, dtype=bool)[rng.integers(8, size=(2, 5000))] for _ in range(2))
    half = np.where(np.arange(5000)[:, None] < 2500, last, first)  # half of the tokens keep their experts
    found = consistency([first, half, last])
    assert found["routing/consistency"] == pytest.approx(0.5 + 0.5 / 8, abs=0.02)
    assert found["routing/consistency_kappa"] == pytest.approx(0.5, abs=0.02)
    all_experts = np.ones((2, 10, 8), dtype=bool)
    assert consistency([all_experts, all_experts]) == {"routing/consistency": 1.0, "routing/consistency_kappa": None}
    assert set(consistency([all_experts]).values()) == {None}
