"""Tests of what plan.json holds beside the plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe.checks import ConfigError
from moe.planning.written import as_written, without_paths, write_plan
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


def test_no_plan_takes_the_place_of_another_one(tmp_path: Path) -> None:
    """The same plan at a later time, and with another measured time, is no other plan."""
    path, plan = tmp_path / "plan.json", {"command": COMMAND, "pilot": None, "claims": [], "runs": 3, "seconds": 60}
    assert write_plan(path, plan) == f"plan: {path}"
    first = path.read_text()
    assert write_plan(path, plan | {"seconds": 70}).startswith(f"plan: {path}, which plans the same since 20")
    assert path.read_text() == first
    assert write_plan(path, plan | {"runs": 4}).endswith(f"(the earlier plan is now {tmp_path}/plan-1.json)")
    assert write_plan(path, plan | {"runs": 5}).endswith(f"now {tmp_path}/plan-2.json)")
    kept = [json.loads(each.read_text())["runs"] for each in sorted(tmp_path.iterdir())]
    assert kept == [3, 4, 5]  # plan-1.json, plan-2.json, plan.json
    assert (tmp_path / "plan-1.json").read_text() == first
    with pytest.raises(ConfigError, match=r"^--out .*/none/plan.json: cannot be written"):
        write_plan(tmp_path / "none" / "plan.json", plan)


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
