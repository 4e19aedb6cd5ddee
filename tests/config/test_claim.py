"""Tests of claims in a configuration: a wrong one is refused in one line, and they are not part of a run's identity."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe.checks import ConfigError
from moe.launch.command_line import read_cells


def claims_override(**changes: Any) -> str:
    fields = {"text": "x", "metric": "val/loss", "factor": "lb", "levels": [0.01], "than": [0.0], "kind": "higher"}
    text = ",".join(f"{name}:{json.dumps(value)}" for name, value in (fields | changes).items() if value is not None)
    return f"claims=[{{{text}}}]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, r"claims\[0\].text: required"),
        ({"sort": "x"}, "Key 'sort' not in 'ClaimConfig'"),
        ({"kind": "hihger"}, r"claims\[0\].kind=hihger: must be one of .*; nearest: higher"),
        ({"metric": "loss"}, r"claims\[0\].metric=loss: must be one of val, "),
        ({"factor": "nois"}, r"unknown factor of claims\[0\] 'nois'; nearest: noise"),
        ({"levels": []}, r"claims\[0\].levels=\[\]: must be a list of at least one"),
        ({"than": []}, r"claims\[0\].than=\[\]: must be a list of at least one"),
        ({"than": [0.01]}, r"claims\[0\].than=\[0.01\]: must be without \[0.01\]"),
        ({"kind": "lowest"}, r"claims\[0\].than=\[0.0\]: must be empty: lowest compares with all"),
        ({"kind": "equivalent"}, r"claims\[0\].margin=null: must be given, such as 1%"),
        ({"margin": "1%"}, r"claims\[0\].margin=1%: must be left out"),
        ({"kind": "equivalent", "margin": "-1%"}, r"claims\[0\].margin=-1%: must be positive"),
        (
            {"kind": "equivalent", "margin": "one"},
            r"claims\[0\].margin=one: must be a finite number, or a text such as 5%",
        ),
        (
            {"kind": "mixed"},
            r"claims\[0\].direction=null: must be higher or lower, with kind=",
        ),
        ({"at": "flop"}, r"claims\[0\].at=flop: must be one of flops, seconds; nearest: flops"),
        ({"size": ["15%", "5%"]}, r"claims\[0\].size=.*: must be positive and rising"),
        (
            {"size": ["0%", "5%"]},
            r"claims\[0\].size=.*: must be positive and rising; up to 5% is two claims: .* with margin=5%$",
        ),
        ({"size": [0, 0]}, r"claims\[0\].size=\[0, 0\]: must be positive and rising$"),
        ({"size": ["5%"]}, r"claims\[0\].size=.*: must be two amounts"),
    ],
)
def test_wrong_claims_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_cells([claims_override(**changes)])
    assert "\n" not in str(raised.value)


def test_valid_claims_are_accepted() -> None:
    arms = {"factor": "variant", "levels": ["top1"], "than": ["top2"]}
    for changes in ({}, arms, {"factor": "router.temp"}, {"kind": "equivalent", "margin": 0.5}):
        assert read_cells([claims_override(**changes)])


def test_claims_are_not_part_of_a_runs_identity(tmp_path: Path) -> None:
    one, two = ((read_cells([f"out={tmp_path}", *extra]) or [])[0] for extra in ([], [claims_override()]))
    assert one.folder == two.folder
    assert one.config.identity() == two.config.identity()
