"""Tests of what configurations compute from FLOPs: widths of equal cost, and steps of a budget."""

import re

import pytest
import torch
import yaml

from moe.config.options import CONF, options
from moe.launch import resolvers
from moe.launch.command_line import read_cells
from moe.launch.flops import equal_flops, forward_flops
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.cost import TrainingFlops

LEAGUE = (CONF / "experiment" / "router_league.yaml").read_text()


def cost_of(cell) -> int:
    config = cell.config
    model = {
        name: getattr(config.model, name) for name in ("dim", "heads", "layers", "ffn", "num_experts", "dense_ffn")
    }
    return forward_flops(model, config.router, vocab_size=config.data.vocab_size, seq_len=config.data.seq_len)


def test_routers_of_the_league_cost_the_same() -> None:
    routers = ["topk", "switch", "soft_moe", "mlp", "moe_plus_plus"]
    cells = read_cells(["experiment=router_league", f"router={','.join(routers)}", "seed=42", "tune=null"]) or []
    costs = {cell.choices["router"]: cost_of(cell) for cell in cells}
    assert list(costs) == routers
    for router, cost in costs.items():
        assert cost == pytest.approx(costs["topk"], rel=0.02), router
    assert next(cell.config.model.ffn for cell in cells if cell.choices["router"] == "topk") == 256


def test_a_width_of_equal_flops_is_computed_once_for_each_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """To compute it takes a quarter of the time in which the cells of the league are checked."""
    computed = []
    monkeypatch.setattr(resolvers, "equal_flops", lambda *each: computed.append(each) or equal_flops(*each))
    cells = read_cells(["experiment=router_league", "router=topk,switch", "seed=42", "tune=null"]) or []
    assert len(cells) == len(computed) == 2


def test_the_league_has_every_router_but_those_that_it_names_as_left_out() -> None:
    [left_out] = re.findall(r"# Left out are (.*):", LEAGUE)
    league = yaml.safe_load(LEAGUE)
    listed = league["hydra"]["sweeper"]["params"]["router"].split(",")
    assert sorted([*listed, *re.split(r", | and ", left_out)]) == sorted(options("router"))
    trials = len(league["tune"]["optimizer.muon_lr"]) * len(league["tune_seeds"])
    assert f": {trials * len(listed)} + {3 * len(listed)} runs" in LEAGUE


def test_the_runs_of_a_budget_cost_the_budget() -> None:
    cells = read_cells(["experiment=scaling", "seed=42", "variant=budget_small", "model.dim=32,96"]) or []
    assert len(cells) == 4
    for cell in cells:
        tokens = cell.config.steps * cell.config.batch_size * cell.config.grad_accum * cell.config.data.seq_len
        assert 3 * tokens * cost_of(cell) == pytest.approx(1e12, rel=0.02)
    assert len({cell.config.steps for cell in cells}) > 1


@pytest.mark.parametrize("router", ["topk", "dense_mixer", "matryoshka", "soft_moe", "chain_of_experts"])
def test_a_budget_counts_what_training_spends(router: str) -> None:
    """It counts the experts that the steps ran, those that run for a router alone too; k may be drawn at random."""
    words = ["variant=budget_small", "seed=42", f"router={router}", "model.dim=16", "model.ffn=32", "model.heads=2"]
    [cell] = read_cells([*words, "model.layers=2", "data.seq_len=32", "batch_size=2"]) or []
    config, draws = cell.config, 200 if router == "matryoshka" else 1
    settings = MoEConfig.of(config.model, config.router, vocab_size=config.data.vocab_size, seq_len=32)
    model = MoEForCausalLM(settings, trusted=True).train()
    ids = torch.randint(config.data.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    spent = TrainingFlops(model, 32)
    for _ in range(draws):
        stats = model(input_ids=ids).stats
        spent.add(64, stats.kept.sum(-1).tolist(), stats.forward_only.tolist())
    assert 64 * config.steps * spent.total / (64 * draws) == pytest.approx(1e12, rel=0.02)
