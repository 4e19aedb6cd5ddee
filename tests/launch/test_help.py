"""Tests of `--help` and `--list`."""

import re
from pathlib import Path

import pytest
import torch

from moe.checks import ConfigError
from moe.config import meanings
from moe.launch import listing
from moe.launch.command_line import help_text, read_cells
from moe.model.cost import flops_per_token
from moe.training.setup import build_model


def test_help_explains_every_key_with_its_default() -> None:
    lines = help_text().splitlines()
    for key in meanings.all_keys():
        assert any(line.startswith(f"  {key}=") for line in lines), key
    said = meanings.meaning("batch_size", {})
    assert next(line for line in lines if "batch_size=" in line).split() == f"batch_size=16 {said}".split()
    assert (
        next(line for line in lines if "model.dim=" in line).split()
        == "model.dim=128 width D of the hidden states".split()
    )
    assert "router=  (usually topk)" in lines


@pytest.mark.parametrize(
    "words", [(), ("router=topk",), ("experiment=noise_lb_seed",), ("data.source.paths", "router.k")]
)
def test_help_fits_a_terminal_of_80_columns(words: tuple[str, ...]) -> None:
    """Only a word that is longer stands out."""
    assert [line for line in help_text(["--help", *words]).splitlines() if len(line) > 80 and " " in line.strip()] == []


@pytest.mark.parametrize(
    ("option", "lines"),
    [
        (
            "router=switch",
            [
                "router.k=1 experts per token",
                "router.after_drops=false if a token loses",
                "class: moe.routers.topk.TopK",
            ],
        ),
        (
            "schedule=linear",
            ["schedule.start=5.0 its value at", "class: moe.training.schedules.LinearSchedule"],
        ),
        ("data=text", ["data.source.paths=(required) names of files", "data.seq_len=128 tokens of a block"]),
        ("model=tiny", ["model.ffn=256 hidden width F of one expert"]),
        (
            "experiment=quick_demo",
            ["router=temperature", "noise=0.1 std of the Gauss", "varied: seed=42,43,44"],
        ),
        (
            "experiment=noise_lb_seed",
            ["question: Do router noise and", "- Noise 0.5 raises perplexity (test/perplexity, noise study, 9)"],
        ),
    ],
)
def test_help_on_an_option_explains_its_keys(option: str, lines: list[str]) -> None:
    """Settings that the option leaves to the default of its class are explained, too."""
    text = help_text(["--help", option])
    assert text.startswith(f"{option}: ")
    for line in lines:
        assert line in " ".join(text.split())


@pytest.mark.parametrize(
    ("word", "lines"),
    [
        ("noise", ["noise=0.0 std of the Gaussian noise on router logits", "It takes a number."]),
        ("noise=0.3", ["noise=0.0 std of the Gaussian noise on router logits"]),
        ("model.dim", ["model.dim=128 width D", "model=base: 384"]),
        (
            "router.temp",
            ["router.temp=1.0 temperature by which logits", "with router=gumbel", "with router=temperature"],
        ),
        ("data.source.paths", ["data.source.paths=(required) names of files", "with data=text"]),
        ("schedule", ["schedule= (usually constant)", "linear Temperature or noise goes"]),
    ],
)
def test_help_on_a_key_or_a_group_is_about_nothing_else(word: str, lines: list[str]) -> None:
    text = " ".join(help_text(["--help", word]).split())
    for line in lines:
        assert line in text
    assert "batch_size" not in text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nosie", "unknown key 'nosie'; nearest: noise"),
        ("router.tmp", "unknown key 'router.tmp'; nearest: router.temp"),
        ("temp=2", "unknown key 'temp'; write router.temp, with router=temperature or router=gumbel"),
    ],
)
def test_help_on_an_unknown_key_names_the_nearest(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        help_text(["--help", word])
    assert str(error.value) == message


def test_help_on_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^router=topc: must be one of .*topk"):
        help_text(["--help", "router=topc"])


def test_the_list_of_experiments_says_what_their_runs_read_and_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run reads steps x batch_size x grad_accum x data.seq_len tokens, and computes what its record says later.

    The second time, nothing is composed: the numbers are kept.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("default", "quick_demo", "finetuning", "spectra_sweep_e")
    monkeypatch.setattr(listing, "options", lambda group: dict.fromkeys(names, "-"))
    text = help_text(["--list"])
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[:9] if not line.startswith(" ")}
    [cell] = read_cells([]) or []
    with torch.device("meta"):
        model = build_model(cell.config, vocab_size=4096)
    flops = 3 * 614_400 * flops_per_token(model, 128)
    assert rows["default"] == ["1", "614k", f"{flops / 1e12:.3g}T", f"{flops / 1e12:.3g}T"]
    assert rows["quick_demo"][:2] == [str(len(read_cells(["experiment=quick_demo"]) or [])), "614k"]
    assert rows["quick_demo"][3] == f"{9 * flops / 1e12:.3g}T"
    assert rows["spectra_sweep_e"][:4] == ["18", "154k", "to", "614k"]
    assert rows["finetuning"][2:] == ["of", "checkpoint"]
    assert max(map(len, text.splitlines())) <= 80
    monkeypatch.setattr(listing, "composing", None)
    assert help_text(["--list"]) == text
    monkeypatch.setattr(listing, "_state", lambda: "other code")
    with pytest.raises(TypeError):
        help_text(["--list"])


def test_the_list_says_which_results_an_experiment_needs_and_keeps_the_others(
    finished_ablation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results come later. Then only this experiment is composed."""
    composed: list[str] = []
    plain_runs = listing._runs
    monkeypatch.setattr(listing, "_runs", lambda name: composed.append(name) or plain_runs(name))
    monkeypatch.setattr(listing, "options", lambda group: dict.fromkeys(("temperature_best_long", "default"), "-"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(finished_ablation / "cache"))
    monkeypatch.chdir(finished_ablation)
    text = help_text(["--list"])
    assert re.search(r"^temperature_best_long +\?\n  -\n  .*\btemperature_ablation/results.csv", text, re.M | re.S)
    assert re.search(r"^default +1 ", text, re.M)
    (finished_ablation / "multirun").symlink_to(".")
    assert re.search(r"^temperature_best_long +\d+ .*\n  -\ndefault +1 ", help_text(["--list"]), re.M)
    assert composed == ["temperature_best_long", "default", "temperature_best_long"]
