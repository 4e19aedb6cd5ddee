"""Tests of what a run prints while it trains, and of what the runs of a sweep know of each other."""

import re

import pytest

from moe.runs import place
from moe.runs.place import Place, duration
from moe.training.progress import TIMED, Progress, counted


def test_an_evaluation_prints_its_time_and_the_layers_that_route_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"val/loss": 2.0, "val/perplexity": 7.0, "time/elapsed": 18.2, "routing/load_cv": 0.5}
    values |= {"routing/active_experts/layer00": 2.0, "routing/active_experts/layer01": 0.0}
    with Progress(done=0, steps=9) as progress:
        progress.evaluated(8, values)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("load CV 0.500  no token takes an expert in layer01  after 18 s")


def test_after_the_last_step_the_remaining_time_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"train/loss": 1.0, "temperature": 1.0, "time/tokens_per_s": 1.0}
    with Progress(done=0, steps=TIMED + 1) as progress:
        for _ in range(TIMED + 1):
            progress.trained(values)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("done", [0, 40])
def test_the_speed_is_printed_once_after_the_first_few_steps(done: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A new run and a resumed run say how long a step takes and how long the rest takes, before any evaluation."""
    values = {"train/loss": 1.0, "temperature": 1.0, "time/tokens_per_s": 1.0}
    with Progress(done=done, steps=300) as progress:
        for _ in range(3 * TIMED):
            progress.trained(values)
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"step +{done + 1 + TIMED}/300  \S+ s per step, about \d+ (s|min) left", line)


def test_a_count_is_printed_ever_more_rarely_and_says_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each item takes six seconds here. Work that is soon done prints nothing."""
    moments = iter([0.0, *range(0, 48, 6), 0.0, 0.0, 6.0])  # the beginning, and before each item
    monkeypatch.setattr("time.monotonic", lambda: float(next(moments)))
    assert [*counted("abcdefgh", "removals")] == [*"abcdefgh"]
    assert capsys.readouterr().out.splitlines() == [
        "removals 2/8 after 12 s, about 36 s left",
        "removals 3/8 after 18 s, about 30 s left",
        "removals 5/8 after 30 s, about 18 s left",
    ]
    assert [*counted("ab", "removals")] == ["a", "b"]
    assert capsys.readouterr().out == ""


EVALUATED = {"val/loss": 2.0, "val/perplexity": 7.39, "time/elapsed": 18.2}


def test_a_single_run_ends_with_what_its_perplexity_can_be_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run reads in its log what it was before training, and says it at once."""
    first = EVALUATED | {"val/perplexity": 50.0}
    for done in (0, 4):
        with Progress(done=done, steps=9) as progress:
            progress.read([], unigram=20.0)
            progress.resumed([{"step": 0, **first}, {"step": 3, **EVALUATED}] if done else [])
            said = "step     4/9  perplexity so far: 50.00 before training, 7.39 after step 3\n"
            assert capsys.readouterr().out == (said if done else "")
            if done == 0:
                progress.evaluated(0, first)
            progress.evaluated(9, EVALUATED)
        last = capsys.readouterr().out.splitlines()[-1]
        assert (
            last
            == "perplexity 7.39; for comparison: 50.00 before training, 20.00 by a unigram model of the training text"
        )


def test_each_line_names_its_run_and_what_was_read_is_said_once_for_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs with other text say what they read, too. Without a terminal there are no bars and no carriage returns."""
    with place.command(3, 3):
        for number, text in ((1, "text: a"), (2, "text: a"), (3, "text: b")):
            with Progress(done=0, steps=9, place=Place.of(number)) as progress:
                progress.read([text], unigram=20.0)
                progress.evaluated(9, EVALUATED)
    printed = capsys.readouterr()
    line = "step     9/9  val loss 2.0000  perplexity 7.39  after 18 s"
    assert printed.out.splitlines() == [
        "text: a",
        f"run 1 of 3: {line}",
        f"run 2 of 3: {line}",
        "text: b",
        f"run 3 of 3: {line}",
    ]
    assert printed.err == ""


def test_without_bars_a_line_says_where_the_sweep_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several workers, or in a file, an evaluation in the middle of a run tells the progress of all runs."""
    with place.command(4, 4):
        here = Place.of(2)
        monkeypatch.setattr("time.time", lambda: here.began + 60)
        here.begin()
        with Progress(done=0, steps=10, place=here) as progress:
            for step in (0, 5, 10):
                progress.evaluated(step, EVALUATED)
    endings = [line.partition("after 18 s")[2] for line in capsys.readouterr().out.splitlines()]
    assert endings == ["", "; 0 of 4 ended after 60 s, about 7 min left", ""]


def test_a_sweep_estimates_its_end_from_the_runs_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of six runs were finished before. A run that goes on counts as half done, the own one as far as it is."""
    with place.command(6, 4):
        first, second = Place.of(3), Place.of(4)
        monkeypatch.setattr("time.time", lambda: first.began + 60)
        assert first.standing() == "2 of 6 ended after 60 s"
        first.begin()
        assert first.standing(0.5) == "2 of 6 ended after 60 s, about 7 min left"
        first.end()
        assert second.standing() == "3 of 6 ended after 60 s, about 3 min left"
        second.begin()
        assert first.standing() == "3 of 6 ended after 60 s, about 2 min left"
        assert first.has_terminal
        assert not first._replace(process=1).has_terminal
    assert Place.of(1) == Place()


def test_a_duration_has_the_unit_that_suits_it() -> None:
    assert [duration(seconds) for seconds in (4.4, 99.0, 100.0, 5940.0, 9000.0)] == [
        "4 s",
        "99 s",
        "2 min",
        "99 min",
        "2.5 h",
    ]
