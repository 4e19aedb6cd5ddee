"""The language model: size, shift, causality, saving, generation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe.config.schema import ModelConfig, OptimizerConfig
from moe.data.labels import IGNORED, next_token
from moe.metrics.summary import summarize
from moe.model.cost import count_parameters, flops_per_token
from moe.model.decoder import MoEConfig, MoEForCausalLM, neftune_noise
from moe.routing.decision import Context, Knobs
from moe.routing.loss_table import LOSSES
from moe.training.optim import build_optimizers

TOPK = {"_target_": "moe.routers.topk.TopK", "k": 2}
HASH = {"_target_": "moe.routers.hash.Hash"}
RANDOM = {"_target_": "moe.routers.random.Random"}
V, S = 97, 16


def make(router: dict[str, Any] = TOPK, *, vocab_size: int = V, **changes: Any) -> MoEForCausalLM:
    sizes = {"dim": 32, "heads": 2, "layers": 2, "ffn": 32, "num_experts": 4, "dense_ffn": 64}
    torch.manual_seed(0)
    config = MoEConfig.of(ModelConfig(**{**sizes, **changes}), router, vocab_size=vocab_size, seq_len=S)
    return MoEForCausalLM(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(1))


def test_the_sources_model_has_exactly_their_parameters() -> None:
    """79,059,840 as printed; 36,592,512 active, 46.3 %: "28.4 %" leaves all experts out."""
    sizes = {"dim": 384, "heads": 8, "layers": 6, "ffn": 1536, "num_experts": 8}
    with torch.device("meta"):
        parameters = count_parameters(make(vocab_size=49_152, **sizes))
    assert parameters == (79_059_840, 36_592_512)
    assert round(100 * parameters.active / parameters.total, 1) == 46.3


def test_active_parameters_count_shared_experts_and_dense_layers_fully() -> None:
    plain, shared, dense = make(), make(shared_experts=1), make(first_k_dense_replace=1)
    expert = 2 * 32 * 32
    assert count_parameters(plain).total - count_parameters(plain).active == 2 * 2 * expert
    assert count_parameters(shared).active - count_parameters(plain).active == 2 * expert
    assert count_parameters(dense).total - count_parameters(dense).active == 2 * expert


def test_the_dense_control_has_the_active_flops_of_the_routed_model_less_its_router() -> None:
    routed, dense = make(), make(first_k_dense_replace=2)
    assert flops_per_token(routed, S) - flops_per_token(dense, S) == 2 * 2 * 4 * 32
    assert dense(torch.zeros(1, S, dtype=torch.long)).stats is None


def test_the_total_control_has_the_parameters_of_the_routed_model_less_its_router() -> None:
    routed, dense = make(), make(first_k_dense_replace=2, dense_ffn=4 * 32)
    assert count_parameters(routed).total - count_parameters(dense).total == 2 * 4 * 32


@pytest.mark.parametrize("kind", ["silu", "swiglu"])
def test_every_single_expert_begins_with_the_standard_deviation_of_all_matrices(kind: str) -> None:
    """In stacks too, of which rules that go by the fan-in take that of the whole stack; and no two begin alike."""
    model = make(expert=kind, shared_experts=1, first_k_dense_replace=1)
    std = model.config.initializer_range
    assert std == 0.02
    stacks = [p for name, p in model.named_parameters() if ".experts." in name]
    assert len(stacks) == (3 if kind == "swiglu" else 2) * 3  # of a dense layer, routed and shared experts
    for matrix in (matrix for stack in stacks for matrix in stack):
        count = matrix.numel()
        assert matrix.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count))
        assert matrix.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(count))
    one, other = model.moe_layers[0].experts.up[:2]
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 5 / math.sqrt(one.numel())


def test_flops_of_a_linear_model_by_hand() -> None:
    """dim 32, 2 layers: attention 4 D^2, two active experts 2 * 2 D F, router E D, head V D; scores 2 D S a layer."""
    matrices = 2 * (4 * 32 * 32 + 2 * 2 * 32 * 32 + 4 * 32) + V * 32
    assert flops_per_token(make(), S) == 2 * matrices + 2 * 2 * 32 * S


def test_flops_are_those_of_the_experts_that_tokens_asked_for() -> None:
    """Half an expert more in one layer. In a chain of two routers a token counts twice, so it is one expert more."""
    half, chain = 2 * 2 * 32 * 32 // 2, {"_target_": "moe.routers.chain_of_experts.ChainOfExperts", "k": 2}
    for router, extra in ((TOPK, half), (chain, 2 * half)):
        model = make(router)
        assert flops_per_token(model, S, active=[2.0, 2.0]) == flops_per_token(model, S)
        assert flops_per_token(model, S, active=[None, 2.5]) == flops_per_token(model, S) + extra


def test_a_number_of_experts_that_no_one_can_say_costs_what_it_is_at_most() -> None:
    top_p = make({"_target_": "moe.routers.top_p.TopP", "k_max": 2})
    assert flops_per_token(top_p, S) == flops_per_token(make(), S)
    assert count_parameters(top_p) == count_parameters(make())


def test_no_tensor_is_made_on_the_default_device(ids: torch.Tensor) -> None:
    """The default device is `meta` here, where mixing devices is an error. With every optional part of the model."""
    model = make(layers=3, first_k_dense_replace=1, shared_experts=1, dropout=0.1, neftune_noise_alpha=5.0)
    model.model.recompute = True
    packed = torch.tensor([*range(9), *range(S - 9)]).expand_as(ids)
    optimizers = build_optimizers(model, OptimizerConfig(muon_lr=0.02, adamw_lr=0.01))
    with torch.device("meta"):
        output = model.train()(ids, ids, position_ids=packed)
        output.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        summarize(output.stats)
        model.eval().generate(ids[:1, :4], attention_mask=torch.ones(1, 4, device="cpu"), max_new_tokens=2)


def test_initial_loss_is_that_of_guessing(ids: torch.Tensor) -> None:
    assert make()(ids, ids).loss.item() == pytest.approx(math.log(V), abs=0.15)


def test_labels_are_shifted_once() -> None:
    ids = torch.arange(10).view(2, 5)
    assert next_token(ids).tolist() == [[1, 2, 3, 4, IGNORED], [6, 7, 8, 9, IGNORED]]
    model, ids = make(), torch.randint(0, V, (2, S))
    logits = model(ids).logits
    pairs = [(logits[b, s], ids[b, s + 1]) for b in range(2) for s in range(S - 1)]
    by_hand = torch.stack([-torch.log_softmax(row, -1)[target] for row, target in pairs]).mean()
    torch.testing.assert_close(model(ids, ids).loss, by_hand)


def test_copying_the_input_cannot_be_learned_and_random_text_stays_at_chance() -> None:
    """With unshifted labels a few steps would bring the loss of random tokens near zero."""
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        batch = torch.randint(0, V, (8, S), generator=generator)
        loss = model(batch, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() > math.log(V) - 0.1


def test_ignored_labels_do_not_count(ids: torch.Tensor) -> None:
    model, labels = make(), ids.clone()
    labels[:, 8:] = IGNORED
    torch.testing.assert_close(model(ids, labels).loss, model(ids[:, :8], ids[:, :8]).loss)


def test_the_future_does_not_leak(ids: torch.Tensor) -> None:
    model, changed = make(), ids.clone()
    changed[:, 9:] = 5
    torch.testing.assert_close(model(ids).logits[:, :9], model(changed).logits[:, :9], atol=1e-5, rtol=0)


@pytest.mark.parametrize("router", [TOPK, HASH, RANDOM], ids=lambda spec: spec["_target_"])
def test_saving_and_loading_gives_the_same_model(router: dict[str, Any], ids: torch.Tensor, tmp_path: Path) -> None:
    model = make(router, expert="swiglu", shared_experts=1, first_k_dense_replace=1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MoEForCausalLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_saved_model_remembers_its_temperature(ids: torch.Tensor, tmp_path: Path) -> None:
    model = make({"_target_": "moe.routers.topk.Temperature", "temp": 3.0})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids, knobs=Knobs.of(temperature=3.0)).logits)
    assert not torch.allclose(loaded(ids).logits, model(ids, knobs=Knobs.of(temperature=1.0)).logits)


@pytest.mark.parametrize("router", [TOPK, HASH], ids=lambda spec: spec["_target_"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_a_cache_equals_recomputing_everything(
    router: dict[str, Any], attention: str, ids: torch.Tensor
) -> None:
    model = make(router, attention=attention)
    prompt, settings = ids[:1, :5], {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    settings["return_dict_in_generate"] = True
    cached, fresh = (model.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached.sequences, fresh.sequences)
    for a, b in zip(cached.logits, fresh.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_auxiliary_losses_are_per_layer_and_unweighted(ids: torch.Tensor) -> None:
    output = make()(ids, ids, orthogonality=True)
    assert set(output.aux) == set(LOSSES)
    assert all(values.shape == (2,) for values in output.aux.values())
    assert output.aux["load_balance"].mean().item() == pytest.approx(1, abs=0.2)


def test_the_recorded_load_is_that_of_what_the_router_really_sees(ids: torch.Tensor) -> None:
    """The load is that of the normalized output of attention. The layer's own input would give another load."""
    model = make()
    block = model.model.layers[1]
    seen: list[torch.Tensor] = []
    block.mlp.router.register_forward_hook(lambda module, inputs, routing: seen.append(routing.expert))
    inputs: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    offered = model(ids).stats.offered[1]
    assert torch.equal(torch.bincount(seen[0], minlength=4).float(), offered)
    raw = block.mlp.router(inputs[0].view(-1, 32), Context(ids, Knobs.of())).expert
    assert not torch.equal(torch.bincount(raw, minlength=4).float(), offered)


def test_dropout_and_noise_act_in_training_only(ids: torch.Tensor) -> None:
    model, knobs = make(dropout=0.5), Knobs.of(noise=1.0)
    assert torch.equal(model(ids, knobs=knobs).logits, model(ids, knobs=knobs).logits)
    model.train()
    assert not torch.equal(model(ids, knobs=knobs).logits, model(ids, knobs=knobs).logits)


def test_embedding_noise_is_uniform_of_the_published_size_and_acts_in_training_only(ids: torch.Tensor) -> None:
    """With alpha 5 the noise of a sequence has length 5 / sqrt(3), whatever its length and width."""
    noise = neftune_noise(torch.empty(64, 10, 40), 5.0)
    assert noise.abs().max() <= 5 / math.sqrt(10 * 40)
    assert noise.flatten(1).norm(dim=1).mean().item() == pytest.approx(5 / math.sqrt(3), rel=0.02)
    quiet, noisy = make(), make(neftune_noise_alpha=5.0)
    assert torch.equal(noisy(ids).logits, quiet(ids).logits)
    assert not torch.equal(noisy.train()(ids).logits, quiet.train()(ids).logits)


def test_routing_is_computed_in_fp32_under_autocast(ids: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = make()(ids, ids)
    assert output.aux["load_balance"].dtype == torch.float32
    assert output.loss.dtype == torch.float32
