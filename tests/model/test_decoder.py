"""Tests of the language model: size and FLOPs, labels, causality, saving, loading and generation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from waiting import WaitingOperators

from moe.config.model import ModelConfig
from moe.config.sections import OptimizerConfig
from moe.data.labels import IGNORED, next_token
from moe.metrics.summary import summarize
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.cost import count_parameters, flops_per_token
from moe.model.experts import Experts
from moe.model.routed import neftune_noise
from moe.routing.decision import Context, Knobs
from moe.routing.loss_table import COSTLY, LOSSES
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


def test_the_model_of_the_source_studies_has_their_number_of_parameters() -> None:
    """The model has 79,059,840 parameters, as the source studies print. Of them 36,592,512 are active: 46.3 %.

    The studies print 28.4 %, because they leave out all experts.
    """
    sizes = {"dim": 384, "heads": 8, "layers": 6, "ffn": 1536, "num_experts": 8}
    with torch.device("meta"):
        parameters = count_parameters(make(vocab_size=49_152, **sizes))
    assert parameters[:2] == (79_059_840, 36_592_512)
    assert round(100 * parameters.active / parameters.total, 1) == 46.3


def test_all_parameters_of_shared_experts_and_dense_layers_are_active() -> None:
    plain, shared, dense = make(), make(shared_experts=1), make(first_k_dense_replace=1)
    expert = 2 * 32 * 32
    assert count_parameters(plain).total - count_parameters(plain).active == 2 * 2 * expert
    assert count_parameters(shared).active - count_parameters(plain).active == 2 * expert
    assert count_parameters(dense).total - count_parameters(dense).active == 2 * expert


def test_the_dense_control_has_the_flops_of_the_routed_model_without_its_routers() -> None:
    routed, dense = make(), make(first_k_dense_replace=2)
    assert flops_per_token(routed, S) - flops_per_token(dense, S) == 2 * 2 * 4 * 32
    assert dense(torch.zeros(1, S, dtype=torch.long)).stats is None


def test_the_dense_control_of_equal_size_has_the_parameters_of_the_routed_model_without_its_routers() -> None:
    routed, dense = make(), make(first_k_dense_replace=2, dense_ffn=4 * 32)
    assert count_parameters(routed).total - count_parameters(dense).total == 2 * 4 * 32


def test_forward_and_backward_of_the_model_never_wait_for_the_device(
    ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a capacity limit, a whole forward and backward pass calls no operator that would wait for a GPU.

    The test counts such operators on a CPU. transformers calls one if it gets positions.
    """
    monkeypatch.setattr(Experts, "kernel", lambda self, dtype: "grouped")  # the kernel that runs on a GPU
    model = make().train()
    with WaitingOperators() as waiting:
        model(ids, labels=ids).loss.backward()
    assert waiting.calls == []


@pytest.mark.parametrize("kind", ["silu", "swiglu"])
def test_each_expert_starts_with_the_standard_deviation_of_all_other_matrices(kind: str) -> None:
    """Each expert of a stack of experts starts with the configured standard deviation, and no two start equal.

    A rule based on the fan-in would be wrong here, because it would take the fan-in of the whole stack.
    """
    model = make(expert=kind, shared_experts=1, first_k_dense_replace=1)
    std = model.config.initializer_range
    assert std == 0.02
    stacks = [p for name, p in model.named_parameters() if ".experts." in name]
    assert len(stacks) == (3 if kind == "swiglu" else 2) * 3  # stacks of a dense layer, of routed and of shared experts
    for matrix in (matrix for stack in stacks for matrix in stack):
        count = matrix.numel()
        assert matrix.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count))
        assert matrix.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(count))
    one, other = model.moe_layers[0].experts.up[:2]
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 5 / math.sqrt(one.numel())


def test_flops_equal_a_hand_computed_value() -> None:
    """FLOPs are 2 per weight that a token uses, plus 2 D S per layer for the attention scores.

    With D = 32 and F = 32, each of the two layers has 4 D^2 weights of attention, 2 * 2 D F of two active experts and
    E D of the router. The head has V D.
    """
    matrices = 2 * (4 * 32 * 32 + 2 * 2 * 32 * 32 + 4 * 32) + V * 32
    assert flops_per_token(make(), S) == 2 * matrices + 2 * 2 * 32 * S


def test_flops_of_experts_in_a_latent_and_of_a_shared_gate_equal_a_hand_computed_value() -> None:
    """Of width N = 8, an expert has 2 N F weights, and each layer 2 D N around them. The gate has D."""
    matrices = 2 * (4 * 32 * 32 + 2 * 2 * 8 * 32 + 2 * 32 * 8 + 4 * 32 + 2 * 32 * 32 + 32) + V * 32
    model = make(latent_dim=8, shared_experts=1, shared_gate=True)
    assert flops_per_token(model, S) == 2 * matrices + 2 * 2 * 32 * S
    idle = 2 * 2 * (2 * 8 * 32)
    assert count_parameters(model).total - count_parameters(model).active == idle


def test_routers_that_read_the_input_of_attention_see_the_first_token_alone_in_the_first_layer(
    ids: torch.Tensor,
) -> None:
    """There the choice depends on the token id alone. In the same layer after attention, it depends on the context."""
    alone = {}
    for read in ("attention", "feed_forward"):
        model = make(router_input=read)
        whole = model(ids).routing[0][0].logits.view(*ids.shape, -1)
        alone[read] = [model(ids[:, t : t + 1]).routing[0][0].logits for t in range(S)]
        alone[read] = torch.allclose(torch.stack(alone[read], 1), whole, atol=1e-6)
    assert alone == {"attention": True, "feed_forward": False}


def test_flops_count_the_given_mean_number_of_experts_per_token() -> None:
    """FLOPs follow a given mean number of experts per token, here half an expert more in one layer.

    In a chain of two routers a layer processes each token twice. Half an expert more per router is then one expert
    more per token.
    """
    half_expert, chain = 2 * 2 * 32 * 32 // 2, {"_target_": "moe.routers.chain_of_experts.ChainOfExperts", "k": 2}
    for router, extra in ((TOPK, half_expert), (chain, 2 * half_expert)):
        model = make(router)
        assert flops_per_token(model, S, active=[2.0, 2.0]) == flops_per_token(model, S)
        assert flops_per_token(model, S, active=[None, 2.5]) == flops_per_token(model, S) + extra


@pytest.mark.parametrize("settings", [{"mean_k": 2}, {"k_max": 2, "p": 1.0}])
def test_a_varying_number_of_experts_counts_with_the_mean_that_is_set(settings: dict[str, float]) -> None:
    top_p = make({"_target_": "moe.routers.top_p.TopP"} | settings)
    assert flops_per_token(top_p, S) == flops_per_token(make(), S)
    assert count_parameters(top_p) == count_parameters(make())


def test_no_tensor_is_created_on_the_default_device(ids: torch.Tensor) -> None:
    """The model and its optimizers create all tensors on the device of their inputs.

    The default device is `meta` here, because mixing it with the CPU is an error. The model has every optional part.
    """
    model = make(layers=3, first_k_dense_replace=1, shared_experts=1, dropout=0.1, neftune_noise_alpha=5.0)
    model.model.gradient_checkpointing = True
    packed = torch.tensor([*range(9), *range(S - 9)]).expand_as(ids)
    optimizers = build_optimizers(model, OptimizerConfig(muon_lr=0.02, adamw_lr=0.01))
    with torch.device("meta"):
        output = model.train()(ids, ids, position_ids=packed)
        output.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        summarize(output.stats)
        model.eval().generate(ids[:1, :4], attention_mask=torch.ones(1, 4, device="cpu"), max_new_tokens=2)


def test_the_initial_loss_is_that_of_equal_probabilities_for_all_tokens(ids: torch.Tensor) -> None:
    assert make()(ids, ids).loss.item() == pytest.approx(math.log(V), abs=0.15)


def test_labels_are_shifted_by_exactly_one_position() -> None:
    ids = torch.arange(10).view(2, 5)
    assert next_token(ids).tolist() == [[1, 2, 3, 4, IGNORED], [6, 7, 8, 9, IGNORED]]
    model, ids = make(), torch.randint(0, V, (2, S))
    logits = model(ids).logits
    pairs = [(logits[b, s], ids[b, s + 1]) for b in range(2) for s in range(S - 1)]
    by_hand = torch.stack([-torch.log_softmax(row, -1)[target] for row, target in pairs]).mean()
    torch.testing.assert_close(model(ids, ids).loss, by_hand)


def test_the_loss_of_random_tokens_stays_at_chance_in_training() -> None:
    """Training does not lower the loss of random tokens. With unshifted labels, the model could copy its input, and
    the loss would be near zero after a few steps.
    """
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


def test_logits_do_not_depend_on_later_tokens(ids: torch.Tensor) -> None:
    model, changed = make(), ids.clone()
    changed[:, 9:] = 5
    torch.testing.assert_close(model(ids).logits[:, :9], model(changed).logits[:, :9], atol=1e-5, rtol=0)


@pytest.mark.parametrize("router", [TOPK, HASH, RANDOM], ids=lambda spec: spec["_target_"])
def test_a_saved_and_loaded_model_has_equal_outputs(router: dict[str, Any], ids: torch.Tensor, tmp_path: Path) -> None:
    model = make(router, expert="swiglu", shared_experts=1, first_k_dense_replace=1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MoEForCausalLM)
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())  # otherwise some processors add in another order
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_loaded_model_uses_the_temperature_of_its_router_settings(ids: torch.Tensor, tmp_path: Path) -> None:
    model = make({"_target_": "moe.routers.topk.Temperature", "temp": 3.0})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids, knobs=Knobs.of(temperature=3.0)).logits)
    assert not torch.allclose(loaded(ids).logits, model(ids, knobs=Knobs.of(temperature=1.0)).logits)


@pytest.mark.parametrize("router", [TOPK, HASH], ids=lambda spec: spec["_target_"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_a_cache_equals_generation_without(
    router: dict[str, Any], attention: str, ids: torch.Tensor
) -> None:
    model = make(router, attention=attention)
    prompt, settings = ids[:1, :5], {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    settings["return_dict_in_generate"] = True
    cached, uncached = (model.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for a, b in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_auxiliary_losses_are_per_layer_and_unweighted(ids: torch.Tensor) -> None:
    output = make().train()(ids, ids, costly=COSTLY, knobs=Knobs.of(noise=0.1))
    assert set(output.aux) == set(LOSSES)
    assert all(values.shape == (2,) for values in output.aux.values())
    assert output.aux["load_balance"].mean().item() == pytest.approx(1, abs=0.2)


def test_the_recorded_load_is_computed_from_the_routers_real_input(ids: torch.Tensor) -> None:
    """The recorded load is that of the router's real input, the normalized output of attention.

    The input of the block would give another load.
    """
    model = make()
    block = model.model.layers[1]
    experts: list[torch.Tensor] = []
    block.mlp.router.register_forward_hook(lambda module, inputs, routing: experts.append(routing.expert))
    inputs: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    offered = model(ids).stats.offered[1]
    assert torch.equal(torch.bincount(experts[0], minlength=4).float(), offered)
    from_block_input = block.mlp.router(inputs[0].view(-1, 32), Context(ids, Knobs.of())).expert
    assert not torch.equal(torch.bincount(from_block_input, minlength=4).float(), offered)


def test_dropout_and_noise_act_in_training_only(ids: torch.Tensor) -> None:
    model, knobs = make(dropout=0.5), Knobs.of(noise=1.0)
    assert torch.equal(model(ids, knobs=knobs).logits, model(ids, knobs=knobs).logits)
    model.train()
    assert not torch.equal(model(ids, knobs=knobs).logits, model(ids, knobs=knobs).logits)


def test_embedding_noise_has_the_published_size_and_acts_in_training_only(ids: torch.Tensor) -> None:
    """With alpha 5 the noise of a sequence has the norm 5 / sqrt(3), for any sequence length and model width."""
    noise = neftune_noise(torch.empty(64, 10, 40), 5.0)
    assert noise.abs().max() <= 5 / math.sqrt(10 * 40)
    assert noise.flatten(1).norm(dim=1).mean().item() == pytest.approx(5 / math.sqrt(3), rel=0.02)
    quiet, noisy = make(), make(neftune_noise_alpha=5.0)
    assert torch.equal(noisy(ids).logits, quiet(ids).logits)
    assert not torch.equal(noisy.train()(ids).logits, quiet.train()(ids).logits)


def test_losses_are_fp32_under_autocast(ids: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = make()(ids, ids)
    assert output.aux["load_balance"].dtype == torch.float32
    assert output.loss.dtype == torch.float32
