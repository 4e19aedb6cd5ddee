"""Tests that the transcript docs/own-lab.md can be repeated, with smaller models, outside of the checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-lab.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(?:`(\S+)`:\n\n)?```(?:python|yaml|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = """
    model.dim=16 model.heads=2 model.layers=1 model.ffn=16 model.num_experts=4 model.dense_ffn=32
    data.seq_len=32 data.vocab_size=300 data.max_val_blocks=4 data.cache=../cache
    steps=2 batch_size=2 eval_every=1 logger.mode=disabled
""".split()
ELSEWHERE = ("pip ", "mkdir ")  # what the test does in its own way


def transcript(folder: Path, small: list[str]) -> list[tuple[str, str, int]]:
    """Do what the page says in a folder, and return each command with what it printed and its exit status.

    small: settings that are put into the experiment.
    """
    lab = folder / "lab"
    for name in ("mylab", "conf/router", "conf/experiment", "text"):
        (lab / name).mkdir(parents=True)
    (folder / "moe").write_text(f'#!/bin/sh\nexec {sys.executable} -m moe "$@"\n')
    (folder / "moe").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),  # stands for the installed package
        "HF_MODULES_CACHE": str(folder / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    printed = []
    for place, content in BLOCK.findall(PAGE):
        if place:
            text = content
            if "conf/experiment" in place:
                head, _, settings = text.partition("defaults:")
                config = OmegaConf.merge(OmegaConf.create(f"defaults:{settings}"), OmegaConf.from_dotlist(small))
                text = head + OmegaConf.to_yaml(config)
            (lab / place).write_text(text, encoding="utf-8")
            continue
        for command in re.findall(r"^\$ (.*)$", content, re.MULTILINE):
            if command.startswith("export "):
                name, _, value = command.removeprefix("export ").partition("=")
                environment[name] = value.replace("$PWD", str(lab))
            elif not command.startswith(ELSEWHERE):
                done = subprocess.run(command, shell=True, cwd=lab, env=environment, text=True, capture_output=True)
                printed.append((command, done.stdout + done.stderr, done.returncode))
    return printed


@pytest.mark.pages
@pytest.mark.long
def test_the_transcript_of_a_day_can_be_repeated(tmp_path: Path) -> None:
    results = transcript(tmp_path, SMALL)
    assert len(results) >= 8
    for command, printed, status in results:
        assert status == (2 if "stesp" in command else 0), f"{command}\n{printed}"
    assert len(list((tmp_path / "lab/multirun/nearest").glob("*/metrics.json"))) == 6
    report = (tmp_path / "lab/report/report.md").read_text(encoding="utf-8")
    assert "The nearest experts lower the validation loss" in report
    [refused] = [printed for command, printed, _ in results if "stesp" in command]
    assert refused.count("\n") == 1
    assert refused in PAGE
