"""Tests of the watch over collapsing routers: what is told, since when, and what is not told."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from small_runs import untimed

from moe.analysis.report.blocks import BulletList
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.sections.collapse import collapse
from moe.launch.run import run
from moe.metrics.formulas import Sums, collapsed, constant
from moe.results.table import load_runs
from moe.runs.collapse import HOLD, Collapse, sentences
from moe.runs.record import RunRecord
from moe.training.watch import LoadWatch

E, T = 8, 100


def loads(*layers: list[float], k: int = 1) -> Sums:
    """Return the sums of layers with these loads, of tokens that each ask for k experts."""
    offered = np.array(layers, dtype=float)
    tokens = offered.sum(1) / k
    active = np.zeros((len(layers), offered.shape[1] + 1))
    active[:, k] = tokens
    return Sums({"offered": offered, "assignments": offered.sum(1), "tokens": tokens, "tokens_by_active": active})


EVEN = [T / E] * E
CROWDED = [0, 45, 2, 2, 2, 45, 2, 2.0]
ONE = [0, 0, 0, T, 0, 0, 0, 0.0]
NO_THIRD = [20, 20, 0, 20, 10, 10, 10, 10.0]


@pytest.mark.parametrize(
    ("row", "k", "few"),
    [
        (EVEN, 1, 0),
        (CROWDED, 1, 1),  # 2 of 8 take 90 %; with one expert per token, up to 1 + (8 - 1) / 4 are few
        ([40, 30, 20, 2, 2, 2, 2, 2.0], 1, 0),  # 3 of 8
        ([60, 60, 60, 4, 4, 4, 4, 4.0], 2, 1),  # 3 of 8 take 90 %; with two per token, up to 2 + (8 - 2) / 4 are few
        ([45, 45, 45, 45, 5, 5, 5, 5.0], 2, 0),
        ([T] * 7 + [0.0], 7, 0),  # 7 of 8 are the fewest possible, but more than half
        ([T] * E, E, 0),
        ([1, 1, 1, 1, 0, 0, 0, 0.0], 1, 0),  # four tokens cannot use more than four experts
        ([2, 2, 0, 0, 0, 0, 0, 0.0], 1, 0),
    ],
)
def test_few_experts_are_judged_against_what_k_and_the_tokens_make_unavoidable(
    row: list[float], k: int, few: int
) -> None:
    assert collapsed(loads(row, k=k)).tolist() == [few]


def test_a_constant_router_gives_all_tokens_the_same_experts() -> None:
    assert constant(loads(ONE, EVEN, CROWDED)).tolist() == [1, 0, 0]
    assert constant(loads([T, 0, T, 0, 0, 0, 0, 0.0], [T, 0, T - 1, 1, 0, 0, 0, 0.0], k=2)).tolist() == [1, 0]
    assert constant(loads([T] * E, k=E)).tolist() == [0]  # the router cannot do otherwise


def watch(*, layers: int = 1, quiet: int = 0, watched: bool = True) -> LoadWatch:
    return LoadWatch([E] * layers, watched=[watched] * layers, quiet=quiet)


def told(watching: LoadWatch, series: list[list[float]], *, start: int = 1) -> dict[int, list[str]]:
    """Return what is told at which step, for one layer with these loads at the steps from `start` on."""
    steps = {start + n: sentences(watching.see(start + n, loads(row))) for n, row in enumerate(series)}
    return {step: lines for step, lines in steps.items() if lines}


def test_a_collapse_is_told_once_it_has_held_and_again_when_it_is_over() -> None:
    watching = watch()
    series = [EVEN] * 39 + [CROWDED] * 60 + [EVEN] * 50
    words = "2 of 8 experts (1, 5)"
    assert told(watching, series) == {
        39 + HOLD: [
            f"layer 0: {words} take 90 % of the assignments since step 40",
        ],
        99 + HOLD: [
            f"layer 0: {words} took 90 % of the assignments from step 40 to step 99, and no longer",
        ],
    }
    few, unused = Collapse(0, "few", [1, 5], 8, 40, 99), Collapse(0, "unused", [0], 8, 40, 99)
    assert watching.findings() == [few, unused]


def test_short_interruptions_neither_begin_nor_end_a_collapse() -> None:
    assert told(watch(), ([CROWDED] * (HOLD - 1) + [EVEN]) * 5) == {}
    watching = watch()
    told(watching, [CROWDED] * HOLD + ([EVEN] * (HOLD - 1) + [CROWDED]) * 5)
    assert {each.since: each.until for each in watching.findings()} == {1: None}


def test_the_first_steps_are_quiet_and_a_collapse_that_lasts_is_told_after_them() -> None:
    assert told(watch(quiet=50), [CROWDED] * 50 + [EVEN] * 50) == {}
    [(step, lines)] = told(watch(quiet=50), [ONE] * 60).items()
    assert step == 51
    assert lines == [
        "layer 0: all tokens take 1 of 8 experts (3) and no others since step 1"
    ]  # what follows is left out


def test_an_expert_without_tokens_is_told_only_where_chance_cannot_do_it() -> None:
    """Of a hundred tokens an even load is 12.5 for each expert, and of four tokens 0.5, so that 40 steps are needed."""
    assert list(told(watch(), [NO_THIRD] * 60)) == [HOLD]
    assert list(told(watch(), [[1, 1, 0, 1, 1, 0, 0, 0.0]] * 60)) == [40]


def test_experts_that_die_one_after_another_are_told_together() -> None:
    alive = [[0.0] * dead + [T / (E - dead)] * (E - dead) for dead in range(4)]
    watching = watch()
    assert told(watching, [alive[0]] + [alive[1]] * 5 + [alive[2]] * 5 + [alive[3]] * 60) == {
        21: ["layer 0: no token takes 1 of 8 experts (0) since step 2"],
        41: ["layer 0: no token takes 2 of 8 experts (1, 2) since step 12"],
    }
    assert watching.findings() == [Collapse(0, "unused", [0, 1, 2], 8, 12, None)]


def test_random_routing_is_never_told() -> None:
    rng = np.random.default_rng(0)
    for tokens in (4, 40, 400):
        rows = rng.multinomial(tokens, [1 / E] * E, size=100).astype(float).tolist()
        assert told(watch(), rows) == {}, tokens


def test_a_router_whose_experts_are_given_is_not_watched() -> None:
    assert told(watch(watched=False), [ONE] * 60) == {}


def test_a_resumed_watch_tells_what_an_uninterrupted_one_tells() -> None:
    series = [EVEN] * 20 + [CROWDED] * 40 + [NO_THIRD] * 60
    whole, first, second = watch(), watch(), watch()
    expected = told(whole, series)
    for cut in (25, 70):
        first, second = watch(), watch()
        before = told(first, series[:cut])
        second.load(json.loads(json.dumps(first.state())))
        assert before | told(second, series[cut:], start=cut + 1) == expected
        assert second.findings() == whole.findings()


def test_a_layer_with_fewer_experts_is_judged_by_its_own_number() -> None:
    """In the sums of both layers, NaN stands for the four experts that layer 0 lacks."""
    watching = LoadWatch([4, E], watched=[True] * 2, quiet=0)
    both = vars(loads([94, 6, 0, 0, *[math.nan] * 4], CROWDED))
    both["assignments"][0] = both["tokens"][0] = T
    both["tokens_by_active"][0] = [0, T, 0, 0, 0, *[math.nan] * 4]
    told = [line for step in range(1, HOLD + 1) for line in sentences(watching.see(step, Sums(both)))]
    assert told == [
        "layer 0: 1 of 4 experts (0) takes 90 % of the assignments since step 1",
        "layer 1: 2 of 8 experts (1, 5) take 90 % of the assignments since step 1",
    ]
    assert [(each.layer, each.kind, each.experts, each.of) for each in watching.findings()] == [
        (0, "few", [0], 4),
        (0, "unused", [2, 3], 4),
        (1, "few", [1, 5], 8),
        (1, "unused", [0], 8),
    ]


def test_more_than_four_experts_are_counted_and_not_named() -> None:
    [line] = sentences([Collapse(2, "unused", [0, 1, 2, 3, 4], 8, 7, None)])
    assert line == "layer 2: no token takes 5 of 8 experts since step 7"


COLLAPSING = (
    "router.k=1",
    "lb=0",
    "router_entropy=3",
    "optimizer=adamw",
    "optimizer.adamw_lr=0.03",
    "model.num_experts=8",
    "model.experts_by_layer=1:4",
)


def test_a_run_that_collapses_says_so_in_the_terminal_in_events_and_in_the_report(
    cell: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three have the same sentences: what begins and ends in the first two, and at the end the whole of the report.

    A layer has 8 experts, the other one 4.
    """
    monkeypatch.setattr("moe.training.watch.HOLD", 5)
    one = cell(*COLLAPSING, "steps=26", "optimizer.warmup=0", "eval_every=26", "save_model=none")
    run(one)
    events = {event["step"]: event["collapse"] for event in untimed(one.folder) if "collapse" in event}
    printed = capsys.readouterr().out
    assert all(f"step {step:>5}/26  {text}" in printed for step, text in events.items())
    told = {sentence for text in events.values() for sentence in text.split("; ")}
    facts = RunRecord.read(one.folder / "run.json").facts
    assert facts is not None
    few = [each for each in facts.collapses if each.kind == "few"]
    assert {each.of for each in few} == {4, 8}
    assert told >= {each._replace(until=None).sentence() for each in few} | {each.sentence() for each in few}
    [inputs] = collect_inputs(load_runs([one.folder.parent]))
    lines = [line for block in collapse(inputs) if isinstance(block, BulletList) for line in block.items]
    assert lines
    assert [f"collapse: {line}" for line in lines] == re.findall("^collapse: .*", printed, re.MULTILINE)
