"""Tests of runs that start from a checkpoint: they log how far their routing has moved from that of the base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny
from small_runs import run, untimed

from moe.config.cell import Cell
from moe.launch.command_line import read_cells
from moe.metrics.catalog import lookup
from moe.model.causal_lm import load_model
from moe.routing.decision import Knobs
from moe.runs.signals import Interrupted
from moe.training.probe import probe_blocks
from moe.training.setup import build_model, prepare_data


@pytest.fixture
def read(small: list[str], tmp_path: Path) -> Callable[..., Cell]:
    """Return a function that reads a small command that fine-tunes an imported Mixtral."""
    [one] = read_cells(small) or []
    tokenizer = prepare_data(one.config).tokenizer
    tiny("mixtral", vocab_size=len(tokenizer), initializer_range=0.05).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    kept = [word for word in small if not word.startswith(("model", "data.vocab_size"))]
    words = [*kept, "model=imported", f"model.checkpoint={tmp_path / 'base'}", "optimizer=adamw", "steps=4"]

    def command(*more: str) -> Cell:
        [cell] = read_cells([*words, "optimizer.adamw_lr=0.01", f"out={tmp_path / 'runs'}", *more]) or []
        return cell

    return command


def evaluations(cell: Cell) -> list[dict[str, Any]]:
    return [event for event in untimed(cell.folder) if "val/loss" in event]


def test_the_drift_is_that_of_the_saved_model_from_the_checkpoint(read: Callable[..., Cell]) -> None:
    cell = read()
    run(cell)
    first, *_, last = evaluations(cell)
    names = {name for name in last if name.startswith("routing/drift")}
    kinds = [f"routing/drift_{kind}" for kind in ("kl", "churn", "kappa")]
    assert names == {f"{kind}{end}" for kind in kinds for end in ("", "/layer00", "/layer01", "/layer02")}
    assert all(lookup(name) for name in names)
    assert [first[kind] for kind in kinds] == [0, 0, 1]
    data = prepare_data(cell.config)
    ids = torch.from_numpy(data.val["input_ids"][:][probe_blocks(data)])
    base, now = build_model(cell.config).eval(), load_model(cell.folder / "model")
    with torch.no_grad():
        before, after = (model(ids, knobs=Knobs.of(device=ids.device)).routing for model in (base, now))
    for layer, ((old,), (new,)) in enumerate(zip(before, after, strict=True)):
        kl = (old.probs * (old.probs / new.probs).log()).sum(-1).mean().item()
        assert last[f"routing/drift_kl/layer{layer:02d}"] == pytest.approx(kl, rel=1e-3)
        pairs = zip(old.expert.view(-1, 3).tolist(), new.expert.view(-1, 3).tolist(), strict=True)
        churn = np.mean([len({*b} - {*a}) / 3 for a, b in pairs])
        assert last[f"routing/drift_churn/layer{layer:02d}"] == pytest.approx(churn, abs=1e-3)
    assert last["routing/drift_kl"] > 0


def test_a_resumed_run_compares_with_the_same_base(read: Callable[..., Cell], tmp_path: Path) -> None:
    whole, stopped = (read(f"out={tmp_path / name}") for name in ("whole", "stopped"))
    run(whole)
    with pytest.raises(Interrupted):
        run(stopped, stop_after=2)
    run(stopped)
    assert untimed(stopped.folder) == untimed(whole.folder)


def test_a_frozen_router_whose_input_is_frozen_does_not_move(read: Callable[..., Cell]) -> None:
    """The input of the first router depends on embeddings, attention and norms, but not on experts."""
    cell = read("trainable=experts")
    run(cell)
    last = evaluations(cell)[-1]
    assert last["routing/drift_kl/layer00"] == 0
    assert last["routing/drift_churn/layer00"] == 0
    assert last["routing/drift_kl/layer01"] > 0


def test_runs_that_start_from_no_checkpoint_pay_nothing(cell: Callable[..., Cell], monkeypatch: Any) -> None:
    monkeypatch.setattr("moe.training.setup.routes", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr("moe.training.evaluate.routes", lambda *_, **__: pytest.fail("asked"))
    one = cell("steps=2")
    run(one)
    assert not any("drift" in name for event in untimed(one.folder) for name in event)
