"""Tests of models whose layers have different numbers of experts.

Each layer is compared with a layer of the same weights, of a model in which all layers have its number of experts.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_runs import run
from transformers import AutoModelForCausalLM

from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.config.checkpoints import saved
from moe.config.classes import build
from moe.config.model import ModelConfig
from moe.config.options import CONF, options
from moe.data.blocks import Batch
from moe.launch.command_line import read_cells
from moe.metrics.summary import summarize
from moe.model.causal_lm import MoEConfig, MoEForCausalLM, load_model
from moe.model.cost import count_parameters, flops_per_token
from moe.routing.decision import Knobs
from moe.routing.stats import RoutingStats
from moe.runs.events import read_events
from moe.runs.signals import Interrupted
from moe.specialization.geometry import expert_outputs, projections
from moe.specialization.knockout import knockouts
from moe.specialization.next_layer import next_layer
from moe.specialization.observation import observe
from moe.specialization.saliency import saliency
from moe.specialization.study import routing_statistics
from tests.adapters.models import disturb

V, S = 61, 8
TOPK = {"_target_": "moe.routers.topk.TopK", "k": 2}
SPECTRA = {"_target_": "moe.routers.spectra.Spectra", "k": 2}
BY_LAYER = "1-2:4"
NUMBERS = [8, 4, 4, 8]


def make(by_layer: str | None, router: dict[str, Any] = TOPK, *, experts: int = 8, **changes: Any) -> MoEForCausalLM:
    sizes: dict[str, Any] = {"dim": 16, "heads": 2, "layers": 4, "ffn": 8, "num_experts": experts, "dense_ffn": 16}
    model = ModelConfig(**{**sizes, "experts_by_layer": by_layer, **changes})
    torch.manual_seed(0)
    return MoEForCausalLM(MoEConfig.of(model, router, vocab_size=V, seq_len=S)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (2, S), generator=torch.Generator().manual_seed(1))


def calls(model: MoEForCausalLM) -> list[tuple[Any, ...]]:
    """Return the list to which the model will add what each MoE layer gets."""
    seen: list[tuple[Any, ...]] = []
    for layer in model.moe_layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    return seen


@pytest.mark.parametrize(
    "name", ["topk.TopK", "spectra.Spectra", "soft_moe.SoftMoE", "chain_of_experts.ChainOfExperts"]
)
def test_each_layer_is_that_of_a_model_in_which_all_layers_have_its_number(name: str, ids: torch.Tensor) -> None:
    """So are its output, its losses and its metrics, also under a capacity limit and with an earlier micro-batch."""
    router = {"_target_": f"moe.routers.{name}"}
    model, uniform = make(BY_LAYER, router), {experts: make(None, router, experts=experts) for experts in {*NUMBERS}}
    options = {"costly": frozenset(("output_orthogonality",)), "compared": torch.arange(3)}
    options |= {"load": model(ids).load, "capacity": 1.0}
    inputs = calls(model)
    output = model(ids, labels=ids, **options)
    metrics = summarize(output.stats)
    assert [layer.router.num_experts for layer in model.moe_layers] == NUMBERS
    for number, (experts, given) in enumerate(zip(NUMBERS, [*inputs], strict=True)):
        same = uniform[experts].moe_layers[number]
        same.load_state_dict(model.moe_layers[number].state_dict())
        expected = same(*given)
        torch.testing.assert_close(model.moe_layers[number](*given).y, expected.y, rtol=0, atol=1e-6)
        assert {name: loss[number] for name, loss in output.aux.items()} == expected.aux
        for name, value in summarize(RoutingStats.stack([expected.stats]), per_layer=False).items():
            found = metrics[f"{name}/layer{number:02d}"]
            assert found == (value if value is None else pytest.approx(value, rel=1e-12)), name
    output.loss.backward()


def test_parameters_and_flops_are_those_of_the_layers() -> None:
    """Half of the layers have 4 experts, and half 8: the numbers lie in the middle between those of uniform models."""
    mixed, four, eight = make(BY_LAYER), make(None, experts=4), make(None)
    assert 2 * flops_per_token(mixed, S) == flops_per_token(four, S) + flops_per_token(eight, S)
    both = zip(count_parameters(four), count_parameters(eight), strict=True)
    assert [2 * number for number in count_parameters(mixed)] == [sum(pair) for pair in both]


def test_a_layer_that_is_given_the_number_of_the_others_changes_no_bit(ids: torch.Tensor) -> None:
    assert torch.equal(make(None)(ids).logits, make("1:8")(ids).logits)


def test_two_spellings_of_the_same_numbers_are_one_model(ids: torch.Tensor) -> None:
    one, other = make("0:4", layers=2), make("1:8", layers=2, experts=4)
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_dense_layers_count_as_layers(ids: torch.Tensor) -> None:
    model = make("1:4", first_k_dense_replace=1)
    assert [layer.router.num_experts for layer in model.moe_layers] == [4, 8, 8]
    assert model.config.most_experts == 8
    model(ids)


def test_routers_share_modules_and_state_only_with_those_of_as_many_experts(ids: torch.Tensor) -> None:
    """In SPECTRA, all layers share a GRU, whose state goes from layer to layer."""
    model = make(BY_LAYER, SPECTRA)
    parameters = [{*layer.router.parameters()} for layer in model.moe_layers]
    assert [[bool(a & b) for b in parameters] for a in parameters] == [
        [experts == other for other in NUMBERS] for experts in NUMBERS
    ]
    inputs = calls(model)
    model(ids)
    assert [context.state is None for _, context, *_ in inputs] == [True, True, False, True]


def test_a_saved_model_has_the_numbers_of_its_layers(ids: torch.Tensor, tmp_path: Path) -> None:
    model = make(BY_LAYER)
    model.save_pretrained(tmp_path)
    for loaded in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert saved.resolve(str(tmp_path), None)["experts_by_layer"] == BY_LAYER
    settings = tmp_path / "config.json"
    content = json.loads(settings.read_text())
    for text, message in (
        ("0:4", "config.json describes .* as .*, but in the weights it is"),
        ("x", "must be entries"),
    ):
        settings.write_text(json.dumps(content | {"experts_by_layer": text}))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_a_study_has_an_entry_for_each_expert_of_each_layer_and_for_no_other(ids: torch.Tensor) -> None:
    model, document, knobs = make(BY_LAYER), np.arange(2), Knobs.of()
    blocks = Batch(ids, torch.arange(2), ids, None)
    seen = observe(model, blocks, knobs)
    assert [chosen.shape for chosen in seen.chosen] == [(2 * S, experts) for experts in NUMBERS]
    found = routing_statistics(seen, ("a", "b"), document=document)
    removed = knockouts(model, seen, knobs, document=document)["zeroed"]["delta"]["mean"]
    vectors = expert_outputs(model, blocks, knobs)
    points = projections([of_layer.numpy() for of_layer in vectors])
    assert points is not None
    for entries in (found["load"], found["coactivation"], removed, saliency(model, blocks, knobs), points["tsne"]):
        assert [len(of_layer) for of_layer in entries] == NUMBERS
    tables = [entry["transitions"].shape for entry in next_layer(model, seen, knobs, document=document)]
    assert tables == [(8, 4), (4, 4), (4, 8)]


def gradients(model: MoEForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of a training pass under a capacity limit, with dropout, by name."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model.train()(ids, labels=ids, capacity=1.0, knobs=Knobs.of(noise=0.5))
    (output.loss + output.aux["load_balance"].sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("router", [TOPK, SPECTRA], ids=lambda router: router["_target_"])
def test_gradient_checkpointing_changes_no_bit_of_a_gradient(router: dict[str, Any], ids: torch.Tensor) -> None:
    model = make(BY_LAYER, router, dropout=0.2)
    stored = gradients(model, ids)
    model.activation_checkpointing_enable()
    computed_again = gradients(model, ids)
    assert stored.keys() == computed_again.keys()
    assert all(torch.equal(gradient, computed_again[name]) for name, gradient in stored.items())


@pytest.mark.parametrize("name", [name for name in options("adapter") if name != "none"])
def test_an_adapter_starts_with_the_logits_of_its_base_and_all_of_it_learns(name: str, ids: torch.Tensor) -> None:
    """Where each expert has parameters of its own, they are as many as the experts of their layer."""
    spec = yaml.safe_load((CONF / f"adapter/{name}.yaml").read_text())
    base, model = make(BY_LAYER, expert="swiglu"), make(BY_LAYER, expert="swiglu")
    model.attach(build(spec, "adapter", trusted=True), spec, trusted=True)
    torch.testing.assert_close(model.eval()(ids).logits, base(ids).logits, rtol=0, atol=1e-6)
    disturb(model)
    assert {*model.adapter_names} <= gradients(model, ids).keys()
    if name == "perft_e":
        assert [len(layer.beside_experts.up) for layer in model.moe_layers] == NUMBERS


def test_what_needs_one_number_for_all_layers_says_so(tmp_path: Path) -> None:
    make(None, experts=4).save_pretrained(tmp_path / "run/model")
    with pytest.raises(ConfigError, match=r"^experts_by_layer in config.json of .*=null: must be 1:2, as in this run$"):
        read_cells(
            ["router=replay", f"router.run={tmp_path / 'run'}", "model.num_experts=4", "model.experts_by_layer=1:2"]
        )


def test_a_run_is_replayed_whose_layer_of_more_experts_takes_more_than_the_others_have(tmp_path: Path) -> None:
    words = ["model.num_experts=2", "model.experts_by_layer=1:8", "model.layers=2", "model.dim=16", "model.heads=2"]
    [one] = read_cells([*words, "model.routers=1:k:5"]) or []
    config = MoEConfig.of(one.config.model, one.config.router, vocab_size=V, seq_len=one.config.data.seq_len)
    MoEForCausalLM(config).save_pretrained(tmp_path / "run/model")
    cells = read_cells([*words, "router=replay", f"router.run={tmp_path / 'run'}"])
    assert cells is not None
    assert cells[0].config.model.experts_of_layers == [2, 8]


def test_a_run_trains_resumes_and_measures_layers_of_different_numbers(cell: Callable[..., Cell]) -> None:
    """Its router learns without a gradient from the sums of its own layer. `lb_global` needs the load so far."""
    words = ["router=quantile_balancing", "model.experts_by_layer=1:8", "lb_global=0.01", "grad_accum=2"]
    one = cell(*words, "steps=2", "eval_every=2")
    with pytest.raises(Interrupted):
        run(one, stop_after=1)
    run(one)
    routers = [layer.router for layer in load_model(one.folder / "model").moe_layers]
    assert [len(router.bias) for router in routers] == [4, 8]
    assert all(router.bias.isfinite().all() and router.bias.abs().sum() > 0 for router in routers)
    last = [event for event in read_events(one.folder / "events.jsonl") if event["kind"] == "eval"][-1]
    assert [len(shares) for shares in last["routing/utilization"]] == [4, 8]
    assert last["routing/load_cv/pooled"] is None
    assert 0 <= last["routing/load_entropy/layer01"] <= 1
