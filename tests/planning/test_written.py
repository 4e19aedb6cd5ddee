"""Tests of what plan.json holds beside the plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe.planning.written import as_written, without_paths
from moe.runs.planned import digest_of_plan

COMMAND = "python train.py -m experiment=x out=/tmp/a/runs data.cache=~/c 'lab=[/home/me/lab,b/c]'"


def test_a_plan_has_its_time_and_digest_and_no_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    differs = [f"model.checkpoint is {tmp_path}/a/b there, and /srv/models/big in the plan", "val/loss is 1/2"]
    plan: dict[str, Any] = {
        "command": COMMAND,
        "pilot": f"{COMMAND} x=1",
        "sources": [{"differs": differs}],
        "seeds": [1],
    }
    written = as_written(plan)
    assert written["command"] == ("python train.py -m experiment=x 'data.cache=~/c' 'lab=[.../lab,b/c]'")
    assert written["sources"][0]["differs"] == [
        "model.checkpoint is a/b there, and .../big in the plan",
        "val/loss is 1/2",
    ]
    assert written["pilot"] == written["command"] + " x=1"
    assert str(tmp_path) not in json.dumps(written)
    assert written["digest"] == digest_of_plan(json.loads(json.dumps(written)))
    assert digest_of_plan(written | {"time": "later"}) == written["digest"]
    assert digest_of_plan(written | {"seeds": [2]}) != written["digest"]
    assert as_written(plan | {"command": None})["command"] is None


@pytest.mark.parametrize("text", ["effect=0.5%", "val/loss=1%", "out=../runs", "${oc.env:HOME}/x", "a // b"])
def test_what_is_no_absolute_path_stays(text: str) -> None:
    assert without_paths(text) == text


def test_the_shipped_plans_name_no_path_and_are_as_they_were_made() -> None:
    shipped = sorted((Path(__file__).parents[2] / "docs" / "studies").glob("*/plan.json"))
    assert shipped
    for file in shipped:
        plan = json.loads(file.read_text())
        assert without_paths(plan["command"]) == plan["command"]
        assert plan["digest"] == digest_of_plan(plan)
