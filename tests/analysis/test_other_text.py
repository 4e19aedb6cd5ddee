"""Tests of the intervals over documents: the losses that runs write, and the report's table of them."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import change_record, write_metrics, write_record
from small_runs import run

from moe.analysis.report.blocks import BulletList, TableBlock
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.report import write_report
from moe.analysis.report.sections.other_text import other_seeds_and_other_text
from moe.analysis.statistics import contrasts
from moe.results.table import load_runs
from moe.runs.documents import DocumentLosses, read_documents, write_documents
from moe.runs.events import read_events

TOKENS = np.array([100.0, 50.0, 200.0, 0.0, 80.0, 120.0])


def test_the_losses_of_the_documents_add_up_to_the_validation_loss(cell: Any) -> None:
    """The file is written after the last step, from the evaluation that gives the final metrics."""
    one = cell("steps=3", "eval_every=2", "save_model=none", "data.max_val_blocks=12")
    run(one)
    losses = read_documents(one.folder)
    [*_, last] = read_events(one.folder / "events.jsonl")
    assert losses.nats.sum() / losses.tokens.sum() == pytest.approx(last["val/loss"], rel=1e-12)
    assert len(losses.tokens) > 3


def write_runs(sweep: Path, rises: list[float]) -> None:
    """Write runs of three seeds with and without noise; with noise, document n has `rises[n]` more nats per token."""
    rng = np.random.default_rng(0)
    for seed in range(3):
        base, shift = rng.normal(4, 0.5, len(TOKENS)), 0.001 * seed
        for noise, rise in ((0.0, np.zeros(len(TOKENS))), (0.5, np.array(rises) + shift)):
            folder = sweep / f"noise={noise},seed={seed}"
            folder.mkdir(parents=True)
            losses = DocumentLosses((base + rise) * TOKENS, TOKENS)
            write_record(folder, config={"noise": noise, "seed": seed})
            mean = losses.nats.sum() / TOKENS.sum()
            write_metrics(folder, {"val/loss": mean, "val/perplexity": math.exp(mean)})
            write_documents(folder, losses)


def table(sweep: Path) -> Any:
    """Return the only row of the table about other seeds and other text, and the problems named above it."""
    blocks = list(other_seeds_and_other_text(collect_inputs(load_runs([sweep]))[0]))
    rows = [block.frame.iloc[0] for block in blocks if isinstance(block, TableBlock)]
    problems = [line for block in blocks if isinstance(block, BulletList) for line in block.items]
    return (rows or [None])[0], problems


def test_a_difference_in_one_document_holds_for_other_seeds_and_not_for_other_text(tmp_path: Path) -> None:
    """All seeds agree on a rise that one long document makes alone. If all documents rise, both intervals say so."""
    write_runs(tmp_path / "one", [0, 0, 0.1, 0, 0, 0])
    write_runs(tmp_path / "all", [0.1, 0.11, 0.1, 0, 0.12, 0.1])
    (one, _), (each, _) = table(tmp_path / "one"), table(tmp_path / "all")
    assert one["over seeds"].startswith("[+")
    assert one["over documents"].startswith("[-")
    assert each["over seeds"].startswith("[+")
    assert each["over documents"].startswith("[+")
    assert (one["n"], one["documents"]) == (3, 5)


def test_a_factor_that_one_level_lacks_leaves_no_comparison_without_documents(tmp_path: Path) -> None:
    """A temperature is absent for top-k, and both of its contrasts have the intervals of the same pairs of runs."""
    write_runs(tmp_path / "x", [0.1, 0.11, 0.1, 0, 0.12, 0.1])
    for folder in (tmp_path / "x").iterdir():
        seed, hot = int(folder.name[-1]), "noise=0.5" in folder.name
        routers = {2.0: "temperature", 4.0: "temperature"} if hot else {None: "topk"}
        for temp, router in routers.items():
            settings = {"router._target_": router, "seed": seed} | ({"router.temp": temp} if temp else {})
            copied = tmp_path / "y" / f"{router} {temp} {seed}"
            shutil.copytree(folder, copied)
            write_record(copied, config=settings, choices={"router": router})
    blocks = other_seeds_and_other_text(collect_inputs(load_runs([tmp_path / "y"]))[0])
    [shown] = [block.frame for block in blocks if isinstance(block, TableBlock)]
    of_routers = shown[shown["factor"] == "router"]
    assert set(of_routers["within"]) == {"router.temp=2.0", "router.temp=4.0"}
    assert (shown["documents"] == 5).all()
    assert of_routers["over documents"].str.startswith("[").all()


def test_small_differences_and_their_intervals_have_as_many_digits_as_they_need(tmp_path: Path) -> None:
    write_runs(tmp_path / "x", [-0.001_03, -0.001_02, -0.001_01, 0, -0.001_04, -0.001])
    row, _ = table(tmp_path / "x")
    assert float(row["difference"]) == pytest.approx(-2e-5, abs=2e-5)
    texts = [row["difference"], *re.findall(r"[-+\d.]+", row["over seeds"] + row["over documents"])]
    assert len(texts) == 5
    assert len({len(text) for text in texts}) == 1, "all have the same digits"
    assert all(float(text) for text in texts), "none is rounded to zero"


@pytest.mark.parametrize("diverged", [0.0, 0.5], ids=["the reference", "the other level"])
@pytest.mark.usefixtures("undrawn")
def test_a_level_without_a_finished_run_leaves_the_report_without_contrasts(tmp_path: Path, diverged: float) -> None:
    """All sections about contrasts also work on a table without rows, and if no run at the reference finished."""
    write_runs(tmp_path / "x", [0.1] * 6)
    for folder in (tmp_path / "x").iterdir():
        losses = [{"kind": "eval", "step": step, "val/loss": 4.0} for step in (0, 2, 4)]
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in losses))
        if f"noise={diverged}" in folder.name:
            change_record(folder, status="failed", error="Diverged: step 3: the loss is not finite")
    report = write_report(load_runs([tmp_path]), tmp_path / "out")
    assert "3 of 6 runs did not finish" in report.read_text()
    assert "Other seeds and other text" not in report.read_text()
    assert "Over training" not in report.read_text()
    runs = load_runs([tmp_path])
    one_level = runs[runs["status"] == "finished"]
    assert list(contrasts(one_level, "val/loss", ["noise"])) == list(contrasts(runs, "val/loss", ["noise"]))
    with_margin = contrasts(one_level, "val/loss", ["noise"], margin=1)
    assert list(with_margin) == list(contrasts(runs, "val/loss", ["noise"], margin=1))


def test_other_documents_and_files_that_cannot_be_read_give_no_interval(tmp_path: Path) -> None:
    """The section says which runs have no interval over documents, and why."""
    write_runs(tmp_path / "x", [0.1] * 6)
    folder = tmp_path / "x" / "noise=0.5,seed=1"
    write_documents(folder, DocumentLosses(np.ones(6), TOKENS + 1))
    row, [problem] = table(tmp_path / "x")
    assert row is None
    assert problem == (
        f"{folder}: no interval over documents, because its 6 validation documents with 556 tokens are not the 6 with "
        f"550 tokens of {tmp_path / 'x' / 'noise=0.5,seed=0'}"
    )
    (folder / "documents.npz").write_bytes(b"PK\x03\x04 torn")
    row, [problem] = table(tmp_path / "x")
    assert row is None
    assert problem.startswith(f"{folder}/documents.npz: incomplete or not losses by document")
    with pytest.raises(ValueError, match=r"documents\.npz: incomplete or not losses by document"):
        read_documents(folder)


def test_levels_on_other_text_are_named(tmp_path: Path) -> None:
    """Runs that read another text cannot be compared, and the section says so instead of leaving them out."""
    write_runs(tmp_path / "x", [0.1] * 6)
    for folder in (tmp_path / "x").glob("noise=0.5,*"):
        change_record(folder, config={"noise": 0.5, "seed": int(folder.name[-1]), "data.max_val_blocks": 3})
    row, [problem] = table(tmp_path / "x")
    assert row is None
    assert problem.startswith("noise 0.5 vs 0.0: not comparable: the validation texts differ")
