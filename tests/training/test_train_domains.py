"""Tests of data.train_domains: some domains train, all validate."""

from typing import Any

import numpy as np
import pytest
from small_runs import read_events, run

from moe.checks import ConfigError
from moe.data.embedded import DOMAINS
from moe.launch.command_line import read_cells
from moe.runs.card import _tokens
from moe.training.setup import prepare_data


def test_one_domain_trains_and_all_validate(cell: Any) -> None:
    whole, part = (prepare_data(cell(*words).config) for words in ([], ["data.train_domains=[late]"]))
    assert np.array_equal(part.val["input_ids"][:], whole.val["input_ids"][:])
    blocks, domain = whole.train["input_ids"][:], whole.train["domain"][:]
    expected = blocks[domain == whole.domains.index("late")]
    assert np.array_equal(part.train["input_ids"][:], expected)
    assert 0 < len(expected) < len(blocks)
    assert part.digests == whole.digests
    counts = part.manifest["domains"]
    assert counts["late"] == whole.manifest["domains"]["late"]
    assert counts["early"]["val"] == whole.manifest["domains"]["early"]["val"]
    assert _tokens(counts)["early"] == "0"


def test_the_losses_inside_and_outside_are_means_over_tokens(cell: Any) -> None:
    one = cell("data.train_domains=[late]", "steps=2")
    run(one)
    first, *_, last = [event for event in read_events(one.folder / "events.jsonl") if "val/loss" in event]
    for values in (first, last):
        assert values["val/loss_in_domain"] == pytest.approx(values["val/loss/late"], rel=1e-12)
        assert values["val/loss_out_of_domain"] == pytest.approx(values["val/loss/early"], rel=1e-12)
    assert last["val/loss_in_domain"] < first["val/loss_in_domain"]


def test_without_the_key_there_are_no_such_losses(cell: Any) -> None:
    one = cell("steps=0")
    run(one)
    assert not any("of_domain" in name for event in read_events(one.folder / "events.jsonl") for name in event)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train_domains=[]"], "data.train_domains=[]: must be at least one domain, each once; or null for all"),
        (["data.train_domains=[late,late]"], "must be at least one domain, each once"),
        (["data.train_domains=[lat]"], "data.train_domains=lat: must be one of early, late; nearest: late"),
    ],
)
def test_wrong_domains_are_refused_before_training(cell: Any, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        prepare_data(cell(*words).config)
    assert message in str(error.value)


def test_the_default_source_knows_its_domains_before_it_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DOMAINS, "cpp", DOMAINS["cpp"]._replace(packages=("not-installed",)))
    with pytest.raises(ConfigError, match=r"data.train_domains=cpp: must be one of"):
        read_cells(["data.train_domains=[cpp]"])
    with pytest.raises(ConfigError, match=r"data.train_domains=pyton: must be one of .*; nearest: python"):
        read_cells(["data.train_domains=[pyton]"])
