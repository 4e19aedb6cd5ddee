"""Tests of commands that import a Mixture of Experts: what `model.checkpoint` implies, and what is refused."""

import gc
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from architectures import tiny
from safetensors.torch import load_file, save_file
from train_processes import TRAIN, run_script
from transformers import AutoModelForCausalLM

from moe import observe
from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.config.words import quoted
from moe.data.blocks import batch
from moe.data.labels import IGNORED, next_token
from moe.launch.command_line import read_cells
from moe.launch.run import run
from moe.model.cost import count_parameters
from moe.runs.record import MetricsRecord, RunRecord
from moe.runs.traces import write_trace
from moe.training.setup import build_model, prepare_data

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(small: list[str]) -> Any:
    """Return the tokenizer of the small corpus."""
    [one] = read_cells(small) or []
    return prepare_data(one.config).tokenizer


@pytest.fixture(scope="module")
def write(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return a function that writes a model of an architecture with the tokenizer of the small corpus."""

    def written(kind: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        tiny(kind, vocab_size=len(tokenizer) + 3, initializer_range=0.05, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return written


@pytest.fixture(scope="module")
def mixtral(write: Write) -> Path:
    return write("mixtral")


@pytest.fixture
def words(small: list[str]) -> list[str]:
    """Return the words of a small command without those that a checkpoint implies."""
    return [word for word in small if not word.startswith(("model", "data.vocab_size"))]


def read(words: list[str], folder: Path, *more: str) -> list[Cell]:
    return read_cells([*words, "model=imported", f"model.checkpoint={folder}", *more]) or []


def test_a_checkpoint_implies_its_sizes_its_router_and_its_tokenizer(words: list[str], write: Write) -> None:
    folder = write("deepseek_v3")
    [cell] = read(words, folder)
    model = cell.config.model
    assert (model.dim, model.layers, model.num_experts, model.first_k_dense_replace) == (32, 3, 6, 1)
    assert cell.config.data.tokenizer == str(folder)
    assert cell.config.data.vocab_size is None
    assert cell.config.router == {
        "_target_": "moe.routers.sigmoid_bias.SigmoidBias",
        "k": 3,
        "rate": 0.001,
        "update": "sign",
        "normalize": True,
        "scale": 2.5,
        "groups": 3,
        "top_groups": 2,
        "scores": "sigmoid",
    }


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_what_a_checkpoint_implies_is_not_in_the_name_of_a_run(kind: str, write: Write) -> None:
    """gpt_oss keeps its own router. A setting that the command changes is in the name, and so is another router."""
    folder, small = write(kind), ["data.seq_len=32"]
    [first, second] = read(small, folder, "-m", "seed=1,2")
    path = f"data.seq_len=32,model.checkpoint={folder.parent.name}_{folder.name},model=imported"
    for seed, cell in ((1, first), (2, second)):
        assert re.fullmatch(f"{re.escape(path)},seed={seed}-[0-9a-f]{{8}}", cell.folder.name)
    [other] = read(small, folder, "router.k=1")
    assert "router.k=1" in other.folder.name
    if kind != "gpt_oss":
        assert "router=sinkhorn" in read(small, folder, "router=sinkhorn")[0].folder.name
    [shown] = read(small, folder, f"data.tokenizer={folder}", "seed=1")
    assert shown.folder.name == first.folder.name


@pytest.mark.parametrize("name", ["a,b=c", "o'r", "m[d]", "run(1)", "my model"])
def test_a_folder_of_a_checkpoint_may_have_any_name(name: str, words: list[str], mixtral: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.symlink_to(mixtral)
    [cell] = read_cells([*words, "model=imported", f"model.checkpoint={quoted(str(folder))}"]) or []
    assert cell.config.data.tokenizer == cell.config.model.checkpoint == str(folder)


def test_a_model_whose_loss_is_not_finite_is_not_studied(
    words: list[str], write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write("mixtral")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    data = [word for word in words if word.startswith("data")]
    assert observe.main([str(folder), *data, "--out", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err.endswith(f"{folder}: its validation loss is nan, so there is nothing to study\n")


def test_a_command_may_choose_another_router_or_change_the_implied_one(words: list[str], mixtral: Path) -> None:
    [cell] = read(words, mixtral, "router.k=1")
    assert cell.config.router == {"_target_": "moe.routers.topk.TopK", "k": 1}
    cells = read(words, mixtral, "-m", "router=sinkhorn,temperature")
    assert [cell.choices["router"] for cell in cells] == ["sinkhorn", "temperature"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.dim=64", "model.dim=64: must be 32, as in .*; leave it out"),
        ("model.dropout=0.1", "model.dropout=0.1: must be 0.0, as in .*; leave it out"),
        ("model.shared_experts=1", "model.shared_experts=1: must be 0, as in .*; leave it out"),
        ("data.seq_len=65", "data.seq_len=65: must be at most 64, the number of positions"),
        ("data.tokenizer=bpe", "data.vocab_size=null: must be a whole number, because data.tokenizer=bpe is trained"),
        ("model.checkpoint_digest=abc", "model.checkpoint_digest"),
        ("expert_parallel=true", "expert_parallel"),
    ],
)
def test_a_setting_that_the_checkpoint_fixes_is_refused(
    words: list[str], mixtral: Path, change: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(words, mixtral, change)


def test_two_checkpoints_in_a_command_are_refused(words: list[str], mixtral: Path) -> None:
    with pytest.raises(ConfigError, match="must be one checkpoint for a command"):
        read_cells([*words, "-m", "model=imported", f"model.checkpoint={mixtral},other"])
    with pytest.raises(ConfigError, match=r"model\.checkpoint=null: must be the folder"):
        read_cells([*words, "model=imported"])


def test_a_damaged_checkpoint_is_refused_in_one_line(words: list[str], write: Write) -> None:
    folder = write("olmoe")
    [cell] = read(words, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read") as caught:
        build_model(cell.config, vocab_size=0)
    assert "\n" not in str(caught.value)


def test_a_run_without_steps_has_the_validation_loss_of_transformers(
    words: list[str], mixtral: Path, tmp_path: Path
) -> None:
    others = [word for word in words if not word.startswith(("steps", "eval_every", "save_every"))]
    more = ["model=imported", f"model.checkpoint={mixtral}", "steps=0", f"out={tmp_path}"]
    done = run_script(TRAIN, *others, *more)
    assert done.returncode == 0, done.stderr
    assert "0 steps: the model is evaluated as it is, and not trained" in done.stdout
    assert ": evaluating" in done.stdout
    for said_of_training in (": training", "while it trains", "before training"):
        assert said_of_training not in done.stdout
    [folder] = tmp_path.glob("*/*/")
    record = RunRecord.read(folder / RunRecord.FILE)
    assert record.status == "finished"
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    data = prepare_data(record.typed_config())
    blocks = batch(data.val, range(len(data.val)))
    targets = next_token(blocks.labels).flatten()
    with torch.no_grad():
        loss = F.cross_entropy(model(blocks.ids).logits.flatten(0, 1), targets, ignore_index=IGNORED).item()
    final = MetricsRecord.read(folder / MetricsRecord.FILE).final_metrics
    assert math.isclose(final["val/loss"], loss, rel_tol=1e-5)
    assert final["train/loss"] is None
    assert len([*(folder / "trace").glob("*.npz")]) == 1


def test_a_run_whose_experts_stay_on_the_disk_has_the_same_numbers(
    words: list[str], mixtral: Path, tmp_path: Path
) -> None:
    others = [word for word in words if not word.startswith(("steps", "eval_every", "save_every"))]
    finals = []
    for name, offload in (("memory", "null"), ("disk", str(tmp_path / "experts"))):
        [cell] = read(
            [*others, f"out={tmp_path / name}", "save_model=none"], mixtral, "steps=0", f"model.offload={offload}"
        )
        run(cell)
        finals.append(MetricsRecord.read(cell.folder / MetricsRecord.FILE).final_metrics)
        gc.collect()
    timed = {name for name in finals[0] if name.startswith("time/")}
    assert len(finals[0]) > 50
    assert [{k: v for k, v in final.items() if k not in timed} for final in finals] == 2 * [
        {k: v for k, v in finals[0].items() if k not in timed}
    ]
    assert not any((tmp_path / "experts").iterdir())  # the copies are gone with the model
    with pytest.raises(ConfigError, match=r"model\.offload=x: must be null with steps > 0"):
        read(words, mixtral, "model.offload=x")


@pytest.mark.pages  # half a minute, most of it for the report
def test_an_observed_model_has_the_tables_and_pages_of_a_run(
    words: list[str], write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = write("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"]), tmp_path / "seen"
    data = [word for word in words if word.startswith("data")]
    more = ["--out", str(out), "--blocks", "4", "--samples", "4", "--other", str(folder), "--offload"]
    assert observe.main([str(folder), *data, *more]) == 0, capfd.readouterr().err
    printed = capfd.readouterr().out
    assert "next:" not in printed
    assert "overlap: the share of equal choices. kappa_shuffled: 1 if all are equal" in printed
    assert observe.main([str(folder), *data, *more]) == 0
    printed = capfd.readouterr().out
    assert "nothing is computed again" in printed
    assert ": evaluating" not in printed
    assert "routing/load_cv" in (out / "runs.csv").read_text()
    for name in ("report.html", "tokens.html"):
        assert (out / name).stat().st_size > 10_000
    assert re.search(rf"<title>[^<]*{folder.name}", (out / "report.html").read_text())
    assert re.search(rf"<h1>[^<]*{folder.name}</h1>", (out / "tokens.html").read_text())
    [found] = out.glob("runs/*/*/specialization.json")
    measured = json.loads(found.read_text())["measured"]
    assert [row["k"] for row in measured["loss_by_k"]] == [1, 2, 3, 4, 5]
    agreement = pd.read_csv(out / "agreement.csv")
    assert agreement[["overlap", "kappa_shuffled"]].to_numpy().tolist() == [[1.0, 1.0]]


def test_routing_of_two_checkpoints_is_compared_by_layer(tmp_path: Path) -> None:
    chosen = np.zeros((2, 4, 3), dtype=bool)
    chosen[:, range(4), [0, 1, 2, 0]] = True
    other = chosen.copy()
    other[1] = np.roll(other[1], 1, axis=-1)
    for name, mask in (("one", chosen), ("two", other), ("three", chosen[:1])):
        (tmp_path / name).mkdir()
        write_trace(tmp_path / name / "trace", 0, mask)
    assert observe.compare_routing(tmp_path / "one", tmp_path / "two")["overlap"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="--other: has layers, tokens and experts"):
        observe.compare_routing(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 4, "num_local_experts": 4}, "experts 4: must be 5, as in the model"),
        ({"num_hidden_layers": 2}, "MoE layers 2: must be 3, as in the model"),
    ],
)
def test_another_model_of_another_shape_is_refused_before_any_work(
    write: Write, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    other, data = write("mixtral", **change), [word for word in words if word.startswith("data")]
    command = [str(write("mixtral")), *data, "--other", str(other), "--out", str(tmp_path / "out")]
    capfd.readouterr()  # what transformers printed when it saved the models
    assert observe.main(command) == 2
    printed = capfd.readouterr()
    assert printed.err == f"moe observe: --other {other}: {message}\n"
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused_before_any_work(
    write: Write, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other, data = write("granitemoe"), [word for word in words if word.startswith("data")]
    command = [str(write("mixtral")), *data, "--other", str(other), "--out", str(tmp_path / "out")]
    capfd.readouterr()  # what transformers printed when it saved the models
    assert observe.main(command) == 2
    assert capfd.readouterr().err == (
        f"moe observe: --other {other}: architecture granitemoe: must be mixtral, as in the model\n"
    )


@pytest.mark.parametrize(
    "word", ["steps=2", "out=elsewhere", "model.checkpoint=other", "+save_model=last", "question=x"]
)
def test_what_the_command_sets_itself_is_refused_before_any_work(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert observe.main(["model", word, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"moe observe: {word}: must be left out, because")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_observed_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert observe.main([str(tmp_path / "missing"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_arms_of_the_study_of_fine_tuning_train_equally_many_parameters(words: list[str], write: Write) -> None:
    """At the sizes of its base. Full fine-tuning, the routers and the experts are there for comparison."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    base = write("mixtral", **sizes, **heads, num_local_experts=8, num_experts=8, num_experts_per_tok=2)
    more = ["-m", "experiment=finetuning", f"model.checkpoint={base}", "data.train_domains=[late]", "seed=1"]
    cells = read_cells([*words, *more]) or []
    found = {str(cell.choices["variant"]): count_parameters(build_model(cell.config)).trainable for cell in cells}
    assert len(found) == len({str(sorted(cell.config.identity().items(), key=str)) for cell in cells}) == 8
    assert found["finetune_router"] == 4 * 8 * 128
    for arm in (name for name in found if "lora" in name or "perft" in name):
        assert found[arm] == pytest.approx(4 * 8192, rel=0.02), arm
    claims = cells[0].config.claims
    assert {level for claim in claims for level in (*claim.levels, *claim.than)} <= found.keys()


def test_an_arm_of_the_study_of_fine_tuning_can_be_trained(words: list[str], mixtral: Path, tmp_path: Path) -> None:
    more = ["experiment=finetuning", "variant=finetune_perft_r", f"model.checkpoint={mixtral}", f"out={tmp_path}"]
    [cell] = read_cells([*words, *more, "data.train_domains=[late]", "seed=1", "steps=1"]) or []
    run(cell)
    values = MetricsRecord.read(cell.folder / MetricsRecord.FILE).final_metrics
    assert values["val/loss_in_domain"] == pytest.approx(values["val/loss/late"])
