"""Tests of what an evaluation shows of collapsed layers, and of what it adds to what training steps showed."""

import pytest

from moe.runs.collapse import Collapse, sentences
from moe.runs.evaluated import collapse_lines, in_evaluation, not_told

FEW, UNUSED = Collapse(0, "few", [0, 1], 4, 0, None), Collapse(0, "unused", [2, 3], 4, 0, None)


def test_an_evaluated_model_tells_its_collapsed_layers() -> None:
    values = {"routing/utilization": [[0.5, 0.5, 0, 0], [0.25] * 4, [None] * 4]}
    values |= {"routing/collapsed/layer00": 1.0, "routing/collapsed/layer01": 0.0, "routing/collapsed/layer02": None}
    assert in_evaluation(values) == [FEW, UNUSED]
    assert sentences([FEW, UNUSED]) == [
        "layer 0: 2 of 4 experts (0, 1) take 90 % of the assignments",
        "layer 0: no token takes 2 of 4 experts (2, 3)",
    ]
    assert in_evaluation({"routing/utilization": None}) == []


def test_an_evaluation_adds_what_training_did_not_show_at_its_end() -> None:
    assert not_told([FEW, UNUSED], []) == [FEW, UNUSED]
    assert not_told([FEW, UNUSED], [Collapse(0, "same", [1], 4, 30, None)]) == []
    assert not_told([FEW], [Collapse(0, "few", [0, 1], 4, 30, 50)]) == [FEW], "it was over"
    assert not_told([FEW], [Collapse(1, "few", [0, 1], 4, 30, None)]) == [FEW], "another layer"
    in_training = [Collapse(0, "unused", [2], 4, 30, None)]
    assert not_told([UNUSED], in_training) == [UNUSED], "expert 3 is new"
    assert not_told([UNUSED], [*in_training, Collapse(0, "unused", [3], 4, 40, None)]) == []


def test_the_lines_of_terminal_and_report_have_what_training_and_the_last_evaluation_showed() -> None:
    values = {"routing/utilization": [[0.5, 0.5, 0, 0]], "routing/collapsed/layer00": 0.0}
    assert collapse_lines(values, [Collapse(0, "unused", [2], 4, 30, None)], steps=60, warmup=0.1) == [
        "layer 0: no token takes 1 of 4 experts (2) since step 30",
        "layer 0: no token takes 2 of 4 experts (2, 3) in the last evaluation",
    ]


@pytest.mark.parametrize(
    ("steps", "warmup", "told"), [(2, 0.0, 0), (19, 0.0, 0), (20, 0.0, 1), (20, 0.99, 0), (200, 0.99, 1), (0, 0.1, 1)]
)
def test_an_evaluation_tells_no_collapse_of_a_run_that_training_could_not_tell(
    steps: int, warmup: float, told: int
) -> None:
    values = {"routing/utilization": [[0.5, 0.5, 0, 0]], "routing/collapsed/layer00": 0.0}
    assert len(collapse_lines(values, [], steps=steps, warmup=warmup)) == told
