"""Upcycling: an MoE made of a dense checkpoint computes the same, trains at its own rates, resumes and reloads."""

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moe.checks import ConfigError
from moe.commandline import read_cells
from moe.config import Cell
from moe.gradients import parts
from moe.ingredients import build_model, scale_learning_rates
from moe.loop import train
from moe.optim import build_optimizers
from moe.routing import Knobs
from moe.signals import Interrupted, Signals
from moe.tokenizer import train_bpe
from moe.trackers import Mirror

V, S = 400, 32


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A small random Llama whose settings are nobody's defaults, with a tokenizer; matrices large, to show mistakes."""
    settings: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-3,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**settings | changes)).save_pretrained(folder)
    train_bpe(list(topics.values()), V).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "tied")


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "untied", tie_word_embeddings=False)


@pytest.fixture
def upcycled(small: list[str], tmp_path: Path) -> Callable[..., Cell]:
    """Reads a cell that starts from a checkpoint; its sizes are given nowhere."""
    kept = [word for word in small if not word.startswith(("model.", "data.vocab_size"))]

    def read(folder: Path, *overrides: str) -> Cell:
        start = ["model=upcycled", f"model.dense={folder}", f"data.tokenizer={folder}", "data.vocab_size=null"]
        cells = read_cells([*kept, *start, "model.num_experts=4", f"out={tmp_path}", *overrides])
        assert cells is not None
        return cells[0]

    return read


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(1))


def made(cell: Cell) -> Any:
    return build_model(cell.config, vocab_size=V).eval()


def run(cell: Cell, *, stop_after: int | None = None) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    signals = Signals()

    class Watch(Mirror):
        def log(self, step: int, values: dict[str, Any]) -> None:
            if step == stop_after:
                signals.received = signal.SIGTERM

    train(cell.config, cell.folder, mirror=Watch(cell), signals=signals)


@pytest.mark.parametrize("checkpoint", ["tied", "untied"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.shared_experts=1"],
        ["model.shared_experts=2", "router=spectra"],
        ["model.first_k_dense_replace=1", "router=sigmoid_bias"],
        ["model.attention=eager", "router=temperature", "router.temp=3.0"],
    ],
    ids=" ".join,
)
def test_before_training_the_logits_are_those_of_the_dense_model(
    checkpoint: str, overrides: list[str], upcycled: Any, ids: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(checkpoint)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(folder)(ids).logits
        found = made(upcycled(folder, *overrides))(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_first_layers_alone_are_those_of_the_shortened_dense_model(
    upcycled: Any, untied: Path, ids: torch.Tensor
) -> None:
    dense = LlamaForCausalLM.from_pretrained(untied)
    dense.model.layers = dense.model.layers[:2]
    with torch.no_grad():
        torch.testing.assert_close(
            made(upcycled(untied, "model.layers=2"))(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4
        )


def test_shared_experts_are_frozen_and_a_resumed_run_is_bitwise_the_undisturbed_one(
    upcycled: Any, tied: Path, tmp_path: Path
) -> None:
    settings = [tied, "model.shared_experts=1", "optimizer=finetune", "gradient_checkpointing=true", "noise=0.2"]
    straight, stopped = (upcycled(*settings, f"out={tmp_path / name}") for name in "ab")
    run(straight)
    with pytest.raises(Interrupted):
        run(stopped, stop_after=3)
    run(stopped)
    after, again = (load_file(cell.folder / "model" / "model.safetensors") for cell in (straight, stopped))
    before = made(straight).state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    frozen = {name for name in after if ".shared." in name}
    assert len(frozen) == 3 * 3
    assert moved.isdisjoint(frozen)
    assert {name for name in after if ".mlp.experts." in name or ".router." in name} <= moved
    mlp = load_file(tied / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(after["model.layers.1.mlp.shared.experts.down"][0], mlp / 2)


def test_routers_experts_and_the_rest_have_their_own_rates_through_the_whole_curve(upcycled: Any, tied: Path) -> None:
    config = upcycled(tied, "optimizer=finetune", "router=spectra", "model.shared_experts=1").config
    model = made(upcycled(tied, "optimizer=finetune", "router=spectra", "model.shared_experts=1"))
    (optimizer,) = build_optimizers(model, config.optimizer)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert set(rate) == set(trainable)
    of = parts(model)
    assert {rate[p] for p in of["router"]} == {5e-5}
    assert {rate[p] for p in of["experts"]} == {1e-5}
    assert {rate[p] for p in trainable if p not in {*of["router"], *of["experts"]}} == {1e-5}
    scale_learning_rates(config, [optimizer], step=config.steps - 1)
    last = [group["lr"] / rate[group["params"][0]] for group in optimizer.param_groups]
    assert last == pytest.approx([config.optimizer.floor] * 3)


@pytest.mark.parametrize("router", ["topk", "spectra", "noisy_topk", "gumbel", "chain_of_experts"])
def test_gradient_checkpointing_changes_no_gradient(cell: Any, router: str) -> None:
    """With noise, dropout, a capacity limit at random, and what layers hand to each other."""
    overrides = [f"router={router}", "noise=0.5", "model.dropout=0.2", "capacity=1.0", "drop=random"]
    ids = torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(1))
    seen = []
    for recompute in ("false", "true"):
        model = build_model(cell(*overrides, f"gradient_checkpointing={recompute}").config, vocab_size=V).train()
        assert model.model.recompute == (recompute == "true")
        torch.manual_seed(5)
        output = model(ids, ids, knobs=Knobs.of(noise=0.5), capacity=1.0, drop="random")
        (output.loss + sum(value.sum() for value in output.aux.values())).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        seen.append((output.loss.item(), output.stats.kept, copy.deepcopy(model.state_dict()), gradients))
    (loss, kept, state, plain), (loss_again, kept_again, state_again, recomputed) = seen
    assert loss == loss_again
    assert torch.equal(kept, kept_again)
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_a_saved_model_reloads_by_itself_and_writes_what_the_dense_one_writes(
    upcycled: Any, untied: Path, tmp_path: Path
) -> None:
    made(upcycled(untied, "model.shared_experts=1")).save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    dense = LlamaForCausalLM.from_pretrained(untied).eval()
    prompt = AutoTokenizer.from_pretrained(untied)("The class statement", return_tensors="pt")
    written = [
        model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1) for model in (again, dense)
    ]
    assert torch.equal(*written)
    assert again.config.num_key_value_heads == 2
    assert again.config.rope_parameters["rope_theta"] == 500.0


def test_another_checkpoint_in_the_same_folder_is_another_run(upcycled: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "dense")
    first = upcycled(folder).config.identity()
    torch.manual_seed(4)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    second = upcycled(folder).config.identity()
    assert {key for key in first if first[key] != second[key]} == {"model.dense_digest"}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.dim=64"], r"model\.dim=64: .*32"),
        (["model.layers=4"], r"model\.layers=4: .*at most 3"),
        (["router.k=5"], r"router\.k=5: .*between 1 and model\.num_experts=4"),
        (["data.seq_len=65"], r"data\.seq_len=65: .*at most 64"),
        (["data.tokenizer=bpe", "data.vocab_size=400"], r"data\.tokenizer=bpe: .*that of model\.dense"),
        (
            ["optimizer=muon", "optimizer.router_lr=1e-4"],
            r"optimizer\.router_lr=0\.0001: .*null with optimizer\.muon_lr",
        ),
        (["model.attention=flash_attention_2"], r"model\.attention=flash_attention_2: .*flash-attn"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused_in_one_line(
    upcycled: Any, tied: Path, overrides: list[str], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as refused:
        upcycled(tied, *overrides)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_no_dense_llama_is_refused_in_one_line(upcycled: Any, tied: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    with pytest.raises(ConfigError, match=r"model\.dense=.*config\.json"):
        upcycled(odd)
    settings = json.loads((tied / "config.json").read_text())
    for change in ({"model_type": "mixtral"}, {"mlp_bias": True}, {"hidden_act": "gelu"}):
        (odd / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ConfigError, match=r"model\.dense=.*a Llama with SwiGLU without bias"):
            upcycled(odd)
    (odd / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        upcycled(odd)


@pytest.mark.checkpoint
def test_the_real_model_answers_and_its_first_layers_become_experts(
    upcycled: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from moe.smollm2 import make

    folder = tmp_path_factory.mktemp("real") / "smollm2"
    make(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"], "every digit is a token"
    dense = LlamaForCausalLM.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = dense.generate(**prompt, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])

    config = upcycled(folder, "model.layers=3", "model.num_experts=2", "model.shared_experts=1").config
    assert (config.model.dim, config.model.ffn, config.model.heads) == (576, 1536, 9)
    ids = tokenizer("The state of the union is strong.", return_tensors="pt").input_ids
    model = build_model(config, vocab_size=len(tokenizer)).eval()
    dense.model.layers = dense.model.layers[:3]
    with torch.no_grad():
        expected, found = dense(ids).logits, model(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
