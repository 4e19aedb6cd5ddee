"""Tests of `--help` and `--list`."""

import pytest
import torch

from moe.checks import ConfigError
from moe.config import meanings
from moe.launch import help
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
    assert max(map(len, lines[: lines.index("router=  (usually topk)")])) <= 110


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
    ],
)
def test_help_on_an_option_explains_its_keys(option: str, lines: list[str]) -> None:
    """Settings that the option leaves to the default of its class are explained, too."""
    text = help_text(["--help", option])
    assert text.startswith(f"{option}: ")
    for line in lines:
        assert line in " ".join(text.split())


def test_help_on_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^router=topc: must be one of .*topk"):
        help_text(["--help", "router=topc"])


def test_the_list_of_experiments_says_what_their_runs_read_and_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run reads steps x batch_size x grad_accum x data.seq_len tokens, and computes what its record says later."""
    monkeypatch.setattr(help, "options", lambda group: dict.fromkeys(("default", "quick_demo", "spectra_sweep_e"), "-"))
    rows = {line.split("  ")[0]: line.split()[1:-1] for line in help_text(["--list"]).splitlines()[:4]}
    [cell] = read_cells([]) or []
    with torch.device("meta"):
        model = build_model(cell.config, vocab_size=4096)
    flops = 3 * 614_400 * flops_per_token(model, 128)
    assert rows["default"] == ["1", "614k", f"{flops / 1e12:.3g}T", f"{flops / 1e12:.3g}T"]
    assert rows["quick_demo"][:2] == [str(len(read_cells(["experiment=quick_demo"]) or [])), "614k"]
    assert rows["quick_demo"][3] == f"{9 * flops / 1e12:.3g}T"
    assert rows["spectra_sweep_e"][:4] == ["18", "154k", "to", "614k"]
