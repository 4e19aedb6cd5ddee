"""A test with generated commands, 600 by default: each is refused in one line, or its model can be built."""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe.config.cell import Cell
from moe.config.keys import flatten
from moe.config.options import GROUPS, complete, options
from moe.launch import train
from moe.launch.command_line import read_cells
from moe.training.setup import build_model

VALUES = st.sampled_from(
    r"""0 -1 1 2 1e30 -1e30 1e-30 100000000000000000000 9999999999999999999999999999999999999999 nan inf -inf NaN null
    None true false abc '' "" [] [1] [1,2] [[1]] {} {a:1} {a:{b:c}} 1,2 0.5 .5 5. 0x10 1_000 12abc topk ../.. / a/b ä é✓
    ${seed} ${noise} ${nothing} ${.} ${oc.env:NOT_SET_ANYWHERE} ${oc.env:HOME} ${hydra:job.name} range(3) choice(1,2)
    glob(*) int(x) - + = == \\ $ ${ } ] 'x moe.routers.topk.TopK os.system""".split()
)


@cache
def keys() -> list[str]:
    """Return every key of the configuration, of every router, schedule and data source, and some unknown keys."""
    found = {"nois", "router.kk", "a.b.c", "model", "hydra.run.dir", "seed.x", "model.dim.x", "claims.0.text"}
    found |= {"router.run", "router.digest"}
    for arguments in (
        *([f"router={name}"] for name in complete("router")),
        *(["router=temperature", f"schedule={name}"] for name in options("schedule")),
        *([f"optimizer={name}"] for name in options("optimizer")),
    ):
        [cell] = read_cells(arguments) or []
        found |= set(flatten(cell.config.__dict__ | {"model": vars(cell.config.model), "data": vars(cell.config.data)}))
        found |= {f"optimizer.{name}" for name in vars(cell.config.optimizer)}
        found |= {f"logger.{name}" for name in vars(cell.config.logger)}
    return sorted(found - {"out"})


CHOICES = [f"{group}={name}" for group in GROUPS for name in options(group) if group != "experiment"]


def overrides() -> st.SearchStrategy[str]:
    one = st.builds("{}{}={}".format, st.sampled_from(["", "", "", "", "+", "++"]), st.sampled_from(keys()), VALUES)
    group = st.builds("{}={}".format, st.sampled_from(GROUPS), VALUES)
    deleted = st.builds("~{}".format, st.sampled_from([*keys(), *GROUPS]))
    return st.one_of(one, one, one, group, st.sampled_from(CHOICES), deleted, st.text(max_size=12))


def commands() -> st.SearchStrategy[tuple[list[str], list[str]]]:
    return st.tuples(st.sampled_from([[], [], ["-m"]]), st.lists(overrides(), min_size=1, max_size=3))


def test_any_command_is_refused_in_one_line_or_can_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], survived: Any, soak: int
) -> None:
    monkeypatch.chdir(tmp_path)
    accepted: list[Cell] = []
    monkeypatch.setattr(train.sweep, "carry_out", lambda cells, launch, **options: accepted.extend(cells) or 0)
    counts = {"refused": 0, "accepted": 0}

    @settings(max_examples=3 * soak, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(commands())
    def fuzz(command: tuple[list[str], list[str]]) -> None:
        accepted.clear()
        arguments = [*command[0], *(word for word in command[1] if not word.startswith("-"))]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        status = train.main()
        said = capsys.readouterr()
        assert list(tmp_path.iterdir()) == []
        if status == 2:
            counts["refused"] += 1
            assert said.err.startswith("train.py: ")
            assert said.err.count("\n") == 1
            assert len(said.err) < 1500
            assert said.out == ""
            return
        assert status == 0
        counts["accepted"] += 1
        for cell in accepted:
            json.dumps(cell.config.identity(), allow_nan=False)
            if cell.config.model.layers * cell.config.model.num_experts < 100:
                with torch.device("meta"):
                    build_model(cell.config, vocab_size=300)

    fuzz()
    assert counts["refused"] > soak
    assert counts["accepted"] > soak / 10
    end = f"{counts['refused']} refused in one line, exit 2; {counts['accepted']} could be built; nothing written"
    survived(17, f"fuzzed commands: {len(keys())} keys, all groups, additions, deletions", sum(counts.values()), end)
