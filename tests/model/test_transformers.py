"""Tests of what users of transformers expect of the model: precision, outputs, losses of a Trainer, and generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, Trainer, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe.checks import ConfigError
from moe.config.model import ModelConfig
from moe.config.options import complete, router_spec
from moe.model.causal_lm import MoEConfig, MoEForCausalLM
from moe.model.routed import _inputs
from moe.routing.decision import LABELS

V, S = 97, 16
ROUTERS = {name: router_spec(name) for name in complete("router")}
TOPK = ROUTERS["topk"]
TOLD = torch.zeros(3, len(LABELS), dtype=torch.long)  # the domains of three texts, which only oracles read


def make(router: dict[str, Any] = TOPK, **changes: Any) -> MoEForCausalLM:
    """Return a small model in evaluation mode. The buffers of its routers are random."""
    sizes = {"dim": 16, "heads": 2, "layers": 2, "ffn": 16, "num_experts": 8, "dense_ffn": 16}
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig.of(ModelConfig(**{**sizes, **changes}), router, vocab_size=V, seq_len=S))
    for buffer in (buffer for layer in model.moe_layers for buffer in layer.router.buffers()):
        if buffer.is_floating_point():
            nn.init.normal_(buffer, std=0.3)
    return model.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(1))


# ---- Precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
def test_a_bf16_model_has_its_router_in_fp32_unchanged_and_runs(name: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """Only routers stay in fp32, with all their parameters and buffers, however the model came to bf16."""
    model = make(ROUTERS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    for low in (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16)):
        for key, value in low.state_dict().items():
            if ".router." in key:
                assert torch.equal(value, before[key]), key
                assert value.dtype == before[key].dtype, key
            else:
                assert value.dtype == torch.bfloat16, key
        output = low.train()(ids, ids, told=TOLD)
        sum([output.loss, *(values.sum() for values in output.aux.values())]).backward()
        assert output.logits.dtype == torch.bfloat16
        assert output.loss.isfinite()
    assert AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)(ids, ids, told=TOLD).loss.isfinite()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_model_of_fp64_trains_with_its_router_in_fp64(name: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = make(ROUTERS[name])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    model.double()
    assert torch.equal(loaded(ids, told=TOLD).logits, model(ids, told=TOLD).logits)
    output = model.train()(ids, ids, told=TOLD)
    sum([output.loss, *(values.sum() for values in output.aux.values())]).backward()
    for number, layer in enumerate(model.moe_layers):
        layer.router.after_step(output.stats.layer(number, layer.router.num_experts))
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float64}


# ---- Arguments and outputs of forward ----------------------------------------------------------------------------


def test_hidden_states_attentions_and_router_logits_are_those_of_each_layer(ids: torch.Tensor) -> None:
    """Hidden states are what each layer gets, and then the vectors from which logits are computed."""
    model = make(attention="eager", first_k_dense_replace=1)
    seen: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    output = model(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    *states, last = output.hidden_states
    assert all(torch.equal(*pair) for pair in zip(states, seen, strict=True))
    assert torch.equal(model.lm_head(last), output.logits)
    assert [weights.shape for weights in output.attentions] == 2 * [(3, 2, S, S)]
    torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(3, 2, S))
    assert torch.equal(*output.router_logits, output.routing[0][0].logits)
    plain = model(ids)
    assert plain.hidden_states is plain.attentions is plain.router_logits is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3


def test_a_router_of_a_chain_has_logits_of_its_own_and_hash_has_none(ids: torch.Tensor) -> None:
    assert len(make(ROUTERS["chain_of_experts"])(ids, output_router_logits=True).router_logits) == 2 * 2
    with pytest.raises(ConfigError, match=r"^output_router_logits=True: must be False for a router without logits"):
        make(ROUTERS["hash"])(ids, output_router_logits=True)


def test_router_logits_and_the_auxiliary_loss_have_the_meaning_of_mixtral(ids: torch.Tensor) -> None:
    """Mixtral's function computes k times our loss from our router logits, also with padding, which has logits of 0.

    Mixtral joins the tokens of all layers, where we take the mean over layers, so one layer is compared.
    """
    model, mask = make(layers=1), torch.ones_like(ids)
    mask[0, :5] = 0
    for attention_mask in (None, mask):
        output = model(ids, attention_mask=attention_mask, output_router_logits=True)
        [logits] = output.router_logits
        assert logits.shape == (ids.numel(), 8)
        theirs = load_balancing_loss_func(output.router_logits, 8, model.config.num_experts_per_tok, attention_mask)
        torch.testing.assert_close(theirs, 2 * output.aux_loss)
    assert not logits[:5].any()
    assert logits[5:].all()
    two = make()(ids, output_router_logits=True)
    torch.testing.assert_close(two.aux_loss, two.aux["load_balance"].mean())


def test_the_auxiliary_loss_is_part_of_the_loss_if_router_logits_are_asked_for(ids: torch.Tensor) -> None:
    """Its weight is 0 unless the configuration sets it. In a step of several micro-batches it has their share."""
    model = make()
    plain = model(ids, ids).loss
    assert torch.equal(model(ids, ids, output_router_logits=True).loss, plain)
    model.config.router_aux_loss_coef = 0.5
    assert torch.equal(model(ids, ids).loss, plain)
    output = model(ids, ids, output_router_logits=True)
    torch.testing.assert_close(output.loss, plain + 0.5 * output.aux_loss)
    model.config.output_router_logits = True
    torch.testing.assert_close(model(ids, ids, num_items_in_batch=90).loss, output.loss * 45 / 90)
    assert make(ROUTERS["soft_moe"])(ids).aux_loss is None
    with pytest.raises(AttributeError, match="num_experts_per_tok: these routers have no common number"):
        _ = make(ROUTERS["top_p"]).config.num_experts_per_tok


def test_the_base_model_takes_the_arguments_of_transformers(ids: torch.Tensor) -> None:
    """Trainers of TRL call it by name, and compute the logits themselves."""
    model = make()
    for arguments in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        hidden = model.base_model(**arguments, attention_mask=torch.ones_like(ids), use_cache=False)
        torch.testing.assert_close(model.lm_head(hidden.last_hidden_state), model(ids).logits)
    assert torch.equal(model.base_model(ids, return_dict=False)[0], hidden.last_hidden_state)


def test_activation_checkpointing_is_that_of_transformers(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers run twice in training, but once with a cache. A kind that loses gradients of the routers is refused."""
    model, runs = make().train(), []
    forward = type(model.model.layers[0]).forward
    monkeypatch.setattr(type(model.model.layers[0]), "forward", lambda *args: runs.append(1) or forward(*args))
    for enable, expected in (("enable", 4), ("disable", 2)):
        getattr(model, f"activation_checkpointing_{enable}")()
        runs.clear()
        model(ids, ids).loss.backward()
        assert len(runs) == expected
    model.activation_checkpointing_enable()
    runs.clear()
    cached = model(ids, ids, use_cache=True)
    cached.loss.backward()
    assert len(runs) == 2
    assert cached.past_key_values.get_seq_length() == S
    with pytest.raises(ConfigError, match=r"^use_reentrant=True: must be False, or the losses of routers"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match=r"^every_n_layers=2: must be 1"):
        model.activation_checkpointing_enable(every_n_layers=2)


def test_return_dict_false_gives_a_tuple_of_loss_logits_and_the_rest(ids: torch.Tensor) -> None:
    model = make()
    output, fields = model(ids, ids), model(ids, ids, return_dict=False)
    assert isinstance(fields, tuple)
    assert torch.equal(fields[0], output.loss)
    assert torch.equal(fields[1], output.logits)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


def test_the_cache_is_returned_if_it_is_asked_for_or_was_given(ids: torch.Tensor) -> None:
    model = make()
    _, cache = model(ids[:, :9], use_cache=True, return_dict=False)[:2]
    assert cache.get_seq_length() == 9
    following = model(ids[:, 9:], past_key_values=cache, return_dict=False)
    torch.testing.assert_close(following[0], model(ids).logits[:, 9:], atol=1e-5, rtol=0)
    assert following[1] is cache
    assert not any(field is cache for field in model(ids, cache=cache, use_cache=False, return_dict=False))
    assert not any(isinstance(field, Cache) for field in model(ids, return_dict=False))


def test_embeddings_can_replace_token_ids_except_for_a_router_of_token_ids(ids: torch.Tensor) -> None:
    """The vectors of the embedding matrix give what the token ids give, in `forward` and in `generate`."""
    model = make(neftune_noise_alpha=5.0)
    vectors = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=vectors).logits, model(ids).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(inputs_embeds=vectors, **settings), model.generate(ids, **settings)[:, S:])
    with pytest.raises(ConfigError, match=r"^inputs_embeds: must be input_ids, because Hash routes token ids"):
        make(ROUTERS["hash"])(inputs_embeds=vectors)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": vectors}):
        with pytest.raises(ConfigError, match=r"^input_ids, inputs_embeds: give exactly one of them"):
            model(**inputs)


def test_inputs_of_a_wrong_kind_shape_or_range_are_refused_in_one_line(ids: torch.Tensor) -> None:
    """On a GPU the range is not checked, because the host would wait for the device."""
    model = make()
    vectors = model.get_input_embeddings()(ids)
    for key, wrong, message in (
        (
            "input_ids",
            ids[0],
            r"must be whole numbers .* of shape \(sequences, tokens\); it has int64 and shape \(16,\)",
        ),
        ("input_ids", ids.float(), r"must be whole numbers .*; it has float32 and shape \(3, 16\)"),
        ("inputs_embeds", vectors[0], r"must be floating-point numbers of shape \(sequences, tokens, 16\); it has"),
        ("inputs_embeds", vectors[..., 1:], r"must be floating-point numbers .* and shape \(3, 16, 15\)"),
    ):
        with pytest.raises(ConfigError, match=f"^{key}: {message}"):
            _inputs(*(wrong if key == name else None for name in ("input_ids", "inputs_embeds")), 16)
    for value in (V, -1):
        with pytest.raises(
            ConfigError, match=f"^input_ids: must be from 0 to {V - 1}, .*; they are {value} to {value}$"
        ):
            model(torch.full_like(ids, value))


def test_logits_to_keep_is_a_number_of_last_positions_or_a_tensor_of_positions(ids: torch.Tensor) -> None:
    model = make()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3])).logits, logits[:, [3]])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3, 7])).logits, logits[:, [0, 3, 7]])
    for kept in (3, torch.tensor([0])):
        with pytest.raises(ConfigError, match=r"^logits_to_keep: must be 0 with labels"):
            model(ids, ids, logits_to_keep=kept)


def test_what_forward_does_not_know_or_cannot_do_is_refused_by_name(ids: torch.Tensor) -> None:
    model = make()
    for name in ("token_type_ids", "shift_labels", "is_causal", "output_router_logit"):
        with pytest.raises(TypeError, match=name):
            model(ids, **{name: None})
    with pytest.raises(ConfigError, match=r'^output_attentions=True: must be False, or .* attn_implementation="eager"'):
        model(ids, output_attentions=True)


# ---- transformers' Trainer ---------------------------------------------------------------------------------------


def trainer(folder: Path, side: str = "right", **settings: Any) -> Trainer:
    """Return a Trainer of a small model on texts of different lengths, without dropout and in a fixed order.

    side: where a text is padded that is shorter than another one of its micro-batch.
    """
    rows = [{"input_ids": list(range(n, n + S - n)), "attention_mask": [1] * (S - n)} for n in range(12)]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)

        def pad(key: str, value: int) -> torch.Tensor:
            padded = [(row[key], [value] * (longest - len(row[key]))) for row in batch]
            return torch.tensor([gap + text if side == "left" else text + gap for text, gap in padded])

        ids, mask = pad("input_ids", 0), pad("attention_mask", 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    fixed = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_grad_norm": 1e9}
    arguments = TrainingArguments(output_dir=str(folder), max_steps=2, **fixed, **settings)
    return Trainer(make(), arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize(
    ("side", "size", "accumulation"), [("right", 2, 2), ("right", 1, 4), ("left", 1, 4), ("left", 4, 1)]
)
def test_a_trainer_reports_the_same_losses_for_any_gradient_accumulation(
    side: str, size: int, accumulation: int, tmp_path: Path
) -> None:
    """The loss of a step is the mean over its labels, however the step is divided into micro-batches and padded."""
    whole = trainer(tmp_path, per_device_train_batch_size=4)
    divided = trainer(tmp_path, side, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    for one in (whole, divided):
        one.train()
    for a, b in zip(whole.state.log_history[:2], divided.state.log_history[:2], strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)


def test_micro_batches_padded_on_the_left_have_their_share_of_the_trainers_number_of_labels(ids: torch.Tensor) -> None:
    """The Trainer counts the first token after padding on the left, which nothing predicts, in all micro-batches."""
    model, labels, mask = make(), ids.clone(), torch.ones_like(ids)
    mask[0, :5] = mask[1, :2] = 0
    labels[mask == 0] = -100
    mean = model(ids, labels, attention_mask=mask).loss
    loss = model(ids, labels, attention_mask=mask, num_items_in_batch=100).loss
    torch.testing.assert_close(loss, mean * (11 + 14 + 15) / 100)
    assert model(ids, torch.full_like(ids, -100), num_items_in_batch=100).loss == 0


def test_a_trainer_predicts_logits_and_evaluates_with_metrics(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    one.compute_metrics = lambda predicted: {"shape": predicted.predictions.shape}
    assert one.predict(one.eval_dataset).predictions.shape == (12, S, V)
    assert one.evaluate()["eval_shape"] == (12, S, V)


def test_a_trainer_smooths_the_labels_of_the_next_tokens(tmp_path: Path) -> None:
    """With the factor s the loss is (1 - s) times the model's loss, plus s times the mean of -ln p over all tokens."""
    one = trainer(tmp_path, label_smoothing_factor=0.25)
    batch = next(iter(one.get_eval_dataloader()))
    output = one.model(**batch)
    labels = batch["labels"][:, 1:]
    uniform = -output.logits[:, :-1].log_softmax(-1).mean(-1)[labels != -100].mean()
    torch.testing.assert_close(one.compute_loss(one.model, dict(batch)), 0.75 * output.loss + 0.25 * uniform)


# ---- Generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("expert_choice", {}),
        ("soft_moe", {}),
        ("document_pool", {}),
        ("sinkhorn", {"inference": True}),
        ("spectra", {"sinkhorn_inference": True}),
    ],
)
def test_a_router_that_compares_tokens_in_evaluation_generates_without_a_cache_only(
    name: str, changes: dict[str, Any], ids: torch.Tensor
) -> None:
    """With a cache the router would see single tokens. Without one, each token follows from the whole text so far."""
    model, prompt = make(ROUTERS[name] | changes), ids[:1, :5]
    with pytest.raises(ConfigError, match=r"^use_cache=True: must be False, because \w+ compares tokens of a text"):
        model.generate(prompt, max_new_tokens=4)
    text = model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=False)
    for end in range(5, 9):
        assert model(text[:, :end]).logits[0, -1].argmax() == text[0, end]


def test_caches_of_a_fixed_size_and_masks_of_four_dimensions_are_refused_by_name(ids: torch.Tensor) -> None:
    model = make()
    with pytest.raises(ConfigError, match=r"^past_key_values=StaticCache: must be .*cache_implementation=\"dynamic\""):
        model.generate(ids[:, :5], max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match=r"^attention_mask has the shape \(3, 1, 16, 16\): must be \(3, 16 \+ tokens"):
        model(ids, attention_mask=torch.ones(3, 1, S, S).tril())


@pytest.mark.parametrize(
    "name", sorted({*ROUTERS} - {"document_pool", "document_pool_causal", "expert_choice", "soft_moe"})
)
def test_every_other_router_generates_the_same_with_and_without_a_cache(name: str, ids: torch.Tensor) -> None:
    model = make(ROUTERS[name])
    cached, uncached = (
        model.generate(ids[:1, :5], told=TOLD[:1], max_new_tokens=6, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, uncached)
