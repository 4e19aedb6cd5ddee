"""Tests of padding and of packed documents for every router in conf/router: padding is no token, texts stay apart."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.checks import ConfigError
from moe.config.model import ModelConfig
from moe.config.options import options, router_spec
from moe.data.labels import IGNORED
from moe.model.causal_lm import MoEConfig, MoEForCausalLM, MoEOutput
from moe.routers.document_pool import DocumentPool
from moe.routing.decision import LABELS, Knobs

V, B, S, PADDING = 97, 3, 10, 4
ROUTERS = {name: router_spec(name) for name in options("router")}
# These fields of the statistics depend on the length of a sequence, which padding changes.
BY_DECILE = ("offered_by_position", "kept_by_position")


def make(router: dict[str, Any]) -> MoEForCausalLM:
    """Build a model whose routers have large weights, so that every token has clear preferences."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 16, "heads": 2, "layers": 2, "ffn": 8, "num_experts": 8, "dense_ffn": 8}
    settings = router | ({"slots": 3} if "slots" in router else {})
    model = MoEForCausalLM(MoEConfig.of(ModelConfig(**sizes), settings, vocab_size=V, seq_len=32))
    with torch.no_grad():
        for layer in model.moe_layers:
            for tensor in (*layer.router.parameters(), *layer.router.buffers()):
                if tensor.ndim >= 2 and tensor.is_floating_point():
                    tensor.mul_(20)
    return model


@pytest.fixture(scope="module", params=ROUTERS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoEForCausalLM:
    """Build the model of each router once for all tests, which get copies of it."""
    if request.param != "replay":
        return make(ROUTERS[request.param])
    folder = tmp_path_factory.mktemp("replayed")
    make(ROUTERS["topk"]).save_pretrained(folder / "model")
    return make(ROUTERS["replay"] | {"run": str(folder)})


@pytest.fixture
def model(built: MoEForCausalLM) -> MoEForCausalLM:
    return deepcopy(built)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, V, (B, S), generator=torch.Generator().manual_seed(1))


def run(model: MoEForCausalLM, ids: Tensor, **settings: Any) -> MoEOutput:
    torch.manual_seed(3)  # for routers that draw random numbers
    told = torch.zeros(len(ids), len(LABELS), dtype=torch.long)
    return model(ids, ids, told=told, **settings)


def assert_equal_apart_from_rounding(one: MoEOutput, other: MoEOutput) -> None:
    """Compare losses and sums for metrics."""
    torch.testing.assert_close(one.loss, other.loss)
    for name, values in one.aux.items():
        torch.testing.assert_close(values, other.aux[name], msg=lambda message, name=name: f"{name}: {message}")
    for name, a, b in zip(one.stats._fields, one.stats, other.stats, strict=True):
        if name not in BY_DECILE:
            torch.testing.assert_close(a, b, equal_nan=True, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("training", [False, True])
def test_a_padded_batch_computes_what_the_batch_without_padding_does(
    model: MoEForCausalLM, ids: Tensor, training: bool
) -> None:
    """Logits, losses and metrics of a batch are those of the same batch without its padding, under a capacity limit.

    Padding takes no capacity and no expert, and does not queue before the other tokens.
    """
    model.train(training)
    padding = torch.full((B, PADDING), 5)
    for settings in ({}, {"capacity": 1.0}):
        expected = run(model, ids, **settings)
        for parts in ([padding, ids], [ids, padding]):
            padded = torch.cat(parts, 1)
            mask = torch.cat([torch.zeros_like(p) if p is padding else torch.ones_like(p) for p in parts], 1)
            output = run(model, padded, attention_mask=mask, **settings)
            torch.testing.assert_close(output.logits[mask.bool()].view(B, S, V), expected.logits, atol=2e-5, rtol=1e-4)
            assert_equal_apart_from_rounding(output, expected)


def test_sequences_of_different_lengths_are_routed_equally_with_padding_on_either_side(
    model: MoEForCausalLM, ids: Tensor
) -> None:
    """It makes no difference on which side a short sequence is padded, nor which tokens are padding."""
    model.eval()
    lengths = [S, S - 7, S - 3]
    batches = []
    for left, token in ((True, 5), (False, 60)):
        padded, mask = torch.full((B, S), token), torch.zeros(B, S, dtype=torch.long)
        for row, length in enumerate(lengths):
            columns = slice(S - length, S) if left else slice(0, length)
            padded[row, columns], mask[row, columns] = ids[row, :length], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = run(model, padded, attention_mask=mask, position_ids=positions, capacity=0.5)
        batches.append((output, output.logits[mask.bool()]))
    (left_output, left_logits), (right_output, right_logits) = batches
    torch.testing.assert_close(left_logits, right_logits, atol=2e-5, rtol=1e-4)
    assert_equal_apart_from_rounding(left_output, right_output)
    assert left_output.stats.tokens.tolist() == [sum(lengths) * len(layer.router.chain) for layer in model.moe_layers]


def test_a_batch_padded_on_the_left_computes_what_its_texts_alone_do(model: MoEForCausalLM, ids: Tensor) -> None:
    """In fp64, logits are equal for every router that decides causally in evaluation.

    Padding shifts the positions, whose rotary angles are rounded to fp32. A model that replays another one has the
    weights of that one, which stays in fp32.
    """
    model.double().eval()
    if not model.moe_layers[0].router.causal_in_evaluation or model.moe_layers[0].router.replays:
        return
    short = ids[1:2, : S - PADDING]
    padded = torch.stack([ids[0], torch.cat([torch.full((PADDING,), 5), short[0]])])
    mask = torch.ones_like(padded)
    mask[1, :PADDING] = 0
    output, first, second = run(model, padded, attention_mask=mask), run(model, ids[:1]), run(model, short)
    torch.testing.assert_close(output.logits[0], first.logits[0], atol=1e-11, rtol=0)
    torch.testing.assert_close(output.logits[1, PADDING:], second.logits[0], atol=1e-11, rtol=0)
    labels = torch.tensor([S - 1, S - PADDING - 1])
    mean = (torch.stack([first.loss, second.loss]) * labels).sum() / labels.sum()
    torch.testing.assert_close(output.loss, mean)


def test_the_loss_leaves_out_labels_of_padding_and_predictions_from_padding(ids: Tensor) -> None:
    model = make(ROUTERS["topk"]).eval()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.clone()
    labels[0, :4] = IGNORED  # the first token that is no padding has no token before it
    expected = model(ids, labels, attention_mask=mask).loss
    assert torch.equal(model(ids, ids, attention_mask=mask).loss, expected)


def test_masks_of_wrong_shape_and_masks_without_any_token_are_refused(ids: Tensor) -> None:
    model = make(ROUTERS["topk"])
    for mask, message in ((torch.ones(B, S - 1), r"attention_mask has the shape \(3, 9\)"), (0 * ids, "is 0 for all")):
        with pytest.raises(ValueError, match=message):
            model(ids, attention_mask=mask)


def test_generation_with_a_padded_prompt_equals_generation_without_padding(ids: Tensor) -> None:
    """With expert choice, a padding token would displace other tokens."""
    model = make(ROUTERS["expert_choice"]).eval()
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    mask = torch.ones_like(ids[:1])
    expected = model.generate(ids[:1], attention_mask=mask, **settings)[:, S:]
    padded = torch.cat([torch.full((1, PADDING), 5), ids[:1]], 1)
    mask = torch.cat([torch.zeros(1, PADDING, dtype=torch.long), mask], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, S + PADDING :], expected)


def test_documents_of_a_block_are_apart_or_refused(model: MoEForCausalLM, ids: Tensor) -> None:
    """In evaluation, the logits of a document do not depend on the other documents of its block.

    Routers that compare tokens in evaluation refuse such blocks, and so does one that replays. Document pools compare
    those of one document.
    """
    model.eval()
    positions = torch.cat([torch.arange(6), torch.arange(S - 6)])
    router = model.moe_layers[0].router
    if not router.decides_alone and not isinstance(router, DocumentPool):
        with pytest.raises(ConfigError, match="must be a router that keeps the conversations of a block apart"):
            run(model, ids, position_ids=positions[None])
        return
    changed = ids.clone()
    changed[:, :6] = torch.randint(1, V, (B, 6), generator=torch.Generator().manual_seed(2))
    for capacity in (None, 0.5):
        one, other = (
            run(model, block, position_ids=positions[None], capacity=capacity).logits[:, 6:] for block in (ids, changed)
        )
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
        alone = run(model, ids[:, 6:], position_ids=positions[None, 6:], capacity=capacity)
        torch.testing.assert_close(one, alone.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("drop", ["position", "score"])
def test_under_a_capacity_packed_documents_have_the_places_that_each_has_alone(drop: str) -> None:
    """It makes no difference for outputs and sums whether documents share a block, a micro-batch, or neither."""
    model = make(ROUTERS["topk"])
    ids = torch.randint(1, V, (2, S), generator=torch.Generator().manual_seed(4))
    positions, settings = torch.arange(S)[None], {"capacity": 0.5, "drop": drop, "knobs": Knobs.of()}
    packed = model(ids.view(1, 2 * S), position_ids=positions.repeat(1, 2), **settings)
    alone = [model(text[None], **settings) for text in ids]
    for same in (packed, model(ids, position_ids=positions, **settings)):
        logits = torch.cat([one.logits for one in alone])
        torch.testing.assert_close(same.logits.view(2, S, V), logits, atol=1e-5, rtol=0)
        for name in ("kept", "capacity", "unrouted"):
            assert torch.equal(getattr(same.stats, name), sum(getattr(one.stats, name) for one in alone)), name
    assert 0 < packed.stats.kept.sum() < packed.stats.offered.sum()
