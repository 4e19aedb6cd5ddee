"""Tests of looks: their shares, the error of adding seeds, and what a report says of earlier looks and of plans."""

import contextlib
import json
import os
import re
import stat
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
from filelock import Timeout
from scipy import stats

from moe.analysis.claims import planned_claims
from moe.analysis.comparisons import compared
from moe.analysis.looks import (
    FURTHER,
    SMALLEST,
    Known,
    Looks,
    Question,
    Seen,
    Study,
    group_of,
    level_as_text,
    share_of_look,
    spent,
)
from moe.analysis.recorded import Written, record_look, study_of, take_back
from moe.analysis.report.blocks import Cards
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import OF_CLAIMS, EarlierTests, ReportInputs, ReportOptions
from moe.analysis.report.judgments import cards, on_contrast
from moe.analysis.report.markdown import block_as_markdown
from moe.analysis.report.report import _with_look, write_report
from moe.analysis.report.sections.answer import answer
from moe.analysis.report.sections.answers import answers
from moe.analysis.report.sections.asked import asked
from moe.analysis.report.sections.commands import command_for_more
from moe.analysis.report.sections.headline import headline
from moe.analysis.report.sections.planned import (
    _judged,
    decisions,
    error_of_more,
    look_in_words,
    margin_facts,
    name_in_looks,
    planned_facts,
    price_of_more,
    warnings_of_decisions,
    warnings_of_looks,
    warnings_of_margins,
)
from moe.analysis.report.sections.verdicts import claim_verdicts, contrast_verdicts, how_it_decides
from moe.analysis.report.tested import with_comparisons
from moe.analysis.sentences import DETERMINISTIC, level_text
from moe.bench.candidates import RULES, p_of_looks
from moe.bench.errors import null_runs, write_record
from moe.config.cell import Grid
from moe.config.claim import ClaimConfig
from moe.config.question import Part
from moe.runs.planned import (
    ENDED_FILE,
    Ended,
    Look,
    LooksRecord,
    PlannedStudy,
    PlansRecord,
    looks_in,
)
from moe.runs.record import FORMAT, RecordError, SweepRecord

CLAIM = ClaimConfig("a", "val/loss", "noise", [0.5], "higher", than=[0.0])


def test_what_is_spent_is_the_function_of_lan_and_demets() -> None:
    assert spent(0.5) * 0.05 == pytest.approx(2 * stats.norm.sf(1.959964 / np.sqrt(0.5)))
    assert spent(0.5) * 0.05 == pytest.approx(0.0056, abs=1e-4)  # published: 0.00557 for a two-sided 0.05
    assert (spent(0.0), spent(1.0), spent(2.0)) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("looks", [(8,), (3, 8), (2, 3, 5, 8), (4, 9)])
def test_the_shares_of_planned_looks_add_up_to_one(looks: tuple[int, ...]) -> None:
    assert sum(share_of_look(n, looks[:place], 8) for place, n in enumerate(looks)) == pytest.approx(1)


def test_looks_beyond_the_planned_seeds_share_a_quarter_more() -> None:
    assert [share_of_look(n, (3, 5)[:place], None) for place, n in enumerate((3, 5, 8))] == [1, FURTHER, FURTHER**2]
    assert sum(share_of_look(n, range(3, n), 3) for n in range(3, 40)) == pytest.approx(1.25)
    assert study({"": [7]}).looks.share() == 1
    assert Looks([3], 0, 3).next_share == FURTHER
    assert Looks([3, 5], 1, 3).next_share == FURTHER**2
    assert Looks([3], 0, 8).next_share == 1 - spent(3 / 8)


Sets = dict[str, list[int]]  # setting -> its seeds


def group(sets: Sets) -> frozenset[str]:
    """Return the folders of runs."""
    return frozenset(f"/{setting}/{seed}" for setting, seeds in sets.items() for seed in seeds)


def study(now: Sets, *earlier: Sets, planned: int | None = None, awaited: Sets | None = None) -> Study:
    """Return a study of the runs `now` after looks at others, one a day. awaited: runs that have not ended."""
    looks: list[Seen] = []
    for day, sets in enumerate((*earlier, now), 1):
        runs = {f"/{setting}/{seed}": Known(setting, seed, True) for setting, seeds in sets.items() for seed in seeds}
        if day > len(earlier) and awaited:
            runs |= {f"/{name}/{seed}": Known(name, seed, False) for name, seeds in awaited.items() for seed in seeds}
        found = Study(planned, runs, list(looks))
        looks.append(found.present._replace(time=f"2026-01-{day:02}"))
    return found


def shares_at(sets: list[list[int]], planned: int | None) -> list[float]:
    """Return the shares of looks at two settings, which have the same seeds. Other runs have no folder any more."""
    looks = [both(*seeds) for seeds in sets]
    return [study(now, *looks[:day], planned=planned).share(group(now)) for day, now in enumerate(looks)]


def both(*seeds: int) -> Sets:
    return {"x=0": [*seeds], "x=1": [*seeds]}


def test_a_look_at_other_seeds_or_at_fewer_is_not_free() -> None:
    eight = list(range(8))
    others = [eight, [*range(8, 16)], eight[1:], eight[:4]]
    assert shares_at(others, 8) == shares_at(others, None) == [1, FURTHER, FURTHER**2, FURTHER**3]
    early = shares_at([[0, 1, 2], [3, 4, 5], [0, 4], eight], 8)
    assert early == [spent(3 / 8), spent(6 / 8) - spent(3 / 8), SMALLEST, 1 - spent(6 / 8)]
    assert shares_at([[0, 1, 2], [3, 4, 5], [2, 1, 0], [3, 4, 5]], None) == [1, FURTHER, 1, FURTHER]


def test_choosing_among_sets_of_seeds_keeps_the_error() -> None:
    """Whoever may leave out any one seed of eight finds something too often, unless each set counts as a look."""
    sets = [list(range(8)), *([each for each in range(8) if each != left] for left in range(8))]
    differences = np.random.default_rng(0).normal(size=(4000, 8))
    p = np.stack([stats.ttest_1samp(differences[:, seeds], 0, axis=1).pvalue for seeds in sets], axis=1)
    assert (p <= 0.05).any(1).mean() > 0.12
    assert (p <= 0.05 * np.array(shares_at(sets, 8))).any(1).mean() <= 0.0625


def test_runs_of_seeds_that_other_settings_had_are_a_look() -> None:
    """One setting has eight seeds from the start. The other one gets its own one after the other, after three."""
    eight, numbers = list(range(8)), (3, 4, 5, 6, 7, 8)
    looks: list[Sets] = [{"x=0": eight, "x=1": eight[:n]} for n in numbers]
    own = group(both(*eight))
    p = p_of_looks(numbers, 0.0, studies := 4000)
    assert (p <= 0.05).any(1).mean() > 0.13
    noise = 2 * np.sqrt(0.05 * 0.95 / studies)
    for planned, most in ((8, 0.05), (None, 0.0625)):
        shares = [study(now, *looks[:day], planned=planned).share(own) for day, now in enumerate(looks)]
        assert (p <= 0.05 * np.array(shares)).any(1).mean() <= most + noise
        two = [shares[0], study(looks[-1], looks[0], planned=planned).share(own)]
        assert two == [spent(5.5 / 8), 1 - spent(5.5 / 8)] if planned else [1, FURTHER]
        assert (p[:, [0, -1]] <= 0.05 * np.array(two)).any(1).mean() <= most + noise


def test_settings_that_are_added_after_a_look_keep_the_error_of_all_reports_together() -> None:
    """Each report has one setting more, and compares each with a reference that all have in common, as Holm does."""
    values = np.random.default_rng(0).normal(size=(studies := 4000, 8, 3))
    p = stats.ttest_1samp(values[:, 1:] - values[:, :1], 0, axis=2).pvalue  # (studies, contrasts)
    looks: list[Sets] = [{f"x={number}": [0, 1, 2] for number in range(last + 1)} for last in range(1, 8)]
    free, shared = np.zeros(studies, dtype=bool), np.zeros(studies, dtype=bool)
    for day, now in enumerate(looks):
        later, tests = study(now, *looks[:day]), len(now) - 1
        shares = [later.share(group({name: now[name] for name in ("x=0", f"x={k}")})) for k in range(1, tests + 1)]
        of_looks = [FURTHER**each for each in range(day + 1)]
        assert shares == [min(1, sum(of_looks[k:])) for k in range(tests)], "those of the looks that had the test"
        free |= (p[:, :tests] <= 0.05 / tests).any(1)
        shared |= (p[:, :tests] <= 0.05 / tests * np.array(shares)).any(1)
    assert free.mean() > 0.09
    assert shared.mean() <= 0.0625


def test_what_is_averaged_over_combinations_has_a_look_at_some_of_them() -> None:
    first: Sets = {"x=0, y=0": [1, 2, 3, 4], "x=1, y=0": [1, 2, 3, 4], "x=0, y=1": [1, 2], "x=1, y=1": [1, 2]}
    now = first | {"x=0, y=1": [1, 2, 3, 4], "x=1, y=1": [1, 2, 3, 4]}
    assert study(now, first).share(group(now)) == FURTHER
    assert study(now, first, planned=4).share(group(now)) == 1 - spent(3 / 4)
    only = {name: first[name] for name in ("x=0, y=0", "x=1, y=0")}
    assert study(now, only, planned=4).share(group(now)) == FURTHER, "the planned seeds were there, at y=0"


def test_what_happens_to_other_settings_costs_a_test_nothing() -> None:
    """A setting is added, then it gets seeds of its own. The comparison of the old ones sees the same runs again."""
    old = both(0, 1, 2)
    with_new, now = old | {"x=2": [0, 1, 2]}, old | {"x=2": [*range(9)]}
    for planned in (None, 3):
        later = study(now, old, with_new, planned=planned)
        assert later.share(group(old)) == 1
        assert later.share(group({name: now[name] for name in ("x=0", "x=2")})) == FURTHER**2
        assert later.share(group(now)) == later.looks.share() == FURTHER**2
        assert study(with_new, old, planned=planned).share(group(with_new)) == FURTHER
        assert study(both(0, 1), old, planned=planned).share(group(both(0, 1))) == FURTHER


def test_a_test_whose_runs_stay_the_same_has_the_shares_of_all_looks() -> None:
    """It was early only because another setting was not complete. At the end it has all of its level."""
    early, complete = both(*range(8)) | {"x=2": [0]}, both(*range(8)) | {"x=2": [*range(8)]}
    own = group(both(*range(8)))
    first = study(early, planned=8)
    assert first.share(own) == first.looks.share() == spent(17 / 24)
    assert study(complete, early, planned=8).share(own) == 1
    without = study(both(*range(8)), early, planned=8)
    assert without.share(own) == 1 - spent(17 / 24), "the other setting is gone"
    more = study(both(*range(12)), early, both(*range(8)), planned=8)
    assert more.share(group(both(*range(12)))) == FURTHER


@pytest.mark.parametrize("planned", [None, 4, 8])
def test_the_shares_of_a_test_add_up_to_no_more_than_the_rule_says(planned: int | None) -> None:
    """Runs are added to settings at random, some of which end later, and some are removed. Each look has a report.

    It tests some metrics, each once, and divides its level among these and those that reports before it tested.
    """
    settings = ["x=0, y=0", "x=1, y=0", "x=0, y=1", "x=1, y=1", "x=2, y=0"]
    for schedule in range(100):
        rng = np.random.default_rng(schedule)
        runs = {f"/{name}/{seed}": Known(name, seed, True) for name in settings[:4] for seed in range(3)}
        looks, used, ever = list[Seen](), dict[tuple[frozenset[str], str], float](), set[str]()
        for day in range(8):
            name, seed = settings[rng.integers(5)], int(rng.integers(12))
            if rng.integers(2):
                runs[f"/{name}/{seed}"] = Known(name, seed, bool(rng.integers(3)))
            if rng.integers(3) == 0:
                runs.pop(rng.choice(sorted(runs)))
            asked = ["a", "b", "c"][rng.integers(3) :][: rng.integers(1, 4)]
            ever.update(asked)
            found = Study(planned, dict(runs), list(looks), metrics=asked)
            own = frozenset(folder for folder, run in runs.items() if not run.setting.startswith("x=2"))
            seen = frozenset(own & found.present.runs.keys())
            for metric in asked:
                share = found.share(own, {Question(metric)}) / len(ever)
                used[seen, metric] = max(used.get((seen, metric), 0.0), share)
            looks.append(found.present._replace(time=f"{day}"))
        assert sum(used.values()) <= 1.25 + 1e-9


def test_a_look_of_which_any_run_is_gone_gives_its_tests_nothing() -> None:
    """Otherwise whoever leaves all but one seed of other settings out has fewer tests, and each keeps its share."""
    every: Sets = {f"x={number}": [*range(5)] for number in range(8)}
    p, looks = np.random.default_rng(0).uniform(size=(4000, 7)), [every]
    found = (p <= 0.05 / 7).any(1)
    for number in range(1, 8):
        now = {name: seeds if name in ("x=0", f"x={number}") else [0] for name, seeds in every.items()}
        own = group({name: every[name] for name in ("x=0", f"x={number}")})
        found |= p[:, number - 1] <= 0.05 * study(now, *looks).share(own)
        looks.append(now)
    assert found.mean() <= 0.0625


def test_runs_that_are_gone_may_have_been_left_out_for_their_results() -> None:
    old = both(0, 1, 2)
    assert study(old, old | {"x=2": [0, 1, 2]}).share(group(old)) == FURTHER, "the test shared its level with others"
    assert study(old | {"x=2": [3]}, old | {"x=2": [0, 1, 2]}).share(group(old)) == FURTHER
    assert study(old, old | {"x=0": [0, 1, 2, 3]}).share(group(old)) == FURTHER
    three = old | {"x=2": [0, 1, 2]}
    fewer = study(three, three | {"x=3": [0, 1, 2]})
    assert fewer.share(group(three)) == fewer.share(group(old)) == FURTHER
    again = Study(
        None, {f: run._replace(ended=f != "/x=0/2") for f, run in study(old).runs.items()}, [study(old).present]
    )
    assert again.share(group(both(0, 1))) == FURTHER, "a run was removed, and the sweep still awaits it"


def test_a_run_that_was_trained_again_with_another_result_is_another_run(runs: pd.DataFrame) -> None:
    record_look(runs, study_of(runs))
    assert study_of(runs).looks.share() == 1, "the same result is the same run"
    again = runs.assign(**{"val/perplexity": runs["val/perplexity"] + (runs["noise"] == 0.5)})
    later = study_of(again)
    assert later.looks.share() == later.share(group_of(runs)) == FURTHER
    assert later.present.seeds == pytest.approx(5 * 8 / 6), "ten of thirty runs are new"


def test_for_the_test_of_a_speed_a_run_that_was_trained_again_is_another_run(runs: pd.DataFrame) -> None:
    """The loss is the same, and the speed is new. Whoever repeats it until it is significant has new chances."""
    runs = runs.assign(**{"time/tokens_per_s": np.random.default_rng(1).normal(1000, 10, size=len(runs))})
    again = runs.assign(started="2026-03-01T00:00:00+00:00")
    _with_look(collect_inputs(runs)[0])
    assert collect_inputs(again)[0].study.looks.share() == 1, "no speed was tested, and the loss is the same"
    speed = ReportOptions(metrics=("time/tokens_per_s",))
    assert _with_look(collect_inputs(runs, speed)[0]).study.looks.share() == FURTHER, "a new question"
    assert collect_inputs(runs, speed)[0].study.looks.share() == FURTHER, "the same look"
    found = collect_inputs(again, speed)[0]
    assert found.study.looks.share() == FURTHER**2
    rows = found.contrasts[found.contrasts["metric"] == "time/tokens_per_s"]
    assert (rows["tests"] >= len(rows) / FURTHER**2).all()


def test_a_report_that_has_no_run_of_an_earlier_look_is_written(runs: pd.DataFrame) -> None:
    """They were left out, or all of them were trained again with another result."""
    first, second = runs[runs["seed"] < 2], runs[runs["seed"] > 2]
    _with_look(collect_inputs(first)[0])
    for later in (second, first.assign(**{"val/perplexity": first["val/perplexity"] + 1})):
        inputs = collect_inputs(later)[0]
        assert inputs.study.looks.share() == FURTHER
        assert inputs.earlier_tests == EarlierTests(0, 0)


def test_an_analysis_of_variance_keeps_its_level_if_its_runs_stay_the_same(runs: pd.DataFrame) -> None:
    """One run of a further seed leaves this seed incomplete, so the analysis has the same F as before."""
    first = _with_look(collect_inputs(runs[runs["seed"] < 4])[0])
    later = collect_inputs(runs[(runs["seed"] < 4) | (runs.index == runs.index[runs["seed"] == 4][0])])[0]
    assert later.study.looks.share() == FURTHER
    assert later.variance["F"].tolist() == pytest.approx(first.variance["F"].tolist(), nan_ok=True)
    assert later.variance["p Holm"].tolist() == pytest.approx(first.variance["p Holm"].tolist(), nan_ok=True)


def test_reports_about_two_folders_and_about_one_of_them_know_of_each_other(runs: pd.DataFrame, tmp_path: Path) -> None:
    """Each report is written into the folders of its own runs alone. The one about both names the runs of both."""
    second = tmp_path / "sweeps" / "second"
    second.mkdir()
    for folder in runs.loc[runs["lb"] == 0.01, "folder"]:
        Path(folder).rename(second / Path(folder).name)
    both_folders = runs.assign(
        folder=runs["folder"].where(runs["lb"] != 0.01, runs["folder"].str.replace("/noise/", "/second/"))
    )
    record_look(both_folders, study_of(both_folders))
    for place, lb in enumerate((0.0, 0.01, 0.0), 1):
        alone = both_folders[both_folders["lb"] == lb]
        assert study_of(alone).looks.share() == FURTHER ** (place if place < 3 else 1)
        record_look(alone, study_of(alone))


def test_looks_that_did_not_know_of_each_other_are_added_up(runs: pd.DataFrame) -> None:
    """Two sweep folders are looked at apart, each with the whole level, and then together."""
    first, second = (runs[runs["lb"] == lb] for lb in (0.0, 0.01))
    looks = [
        study_of(each).present._replace(time=f"2026-01-0{day}", share=1.0)
        for day, each in enumerate((first, second), 1)
    ]
    both_folders = replace(study_of(runs), earlier=looks)
    assert both_folders.looks.share() == FURTHER**2
    assert both_folders.spent == pytest.approx(2 + FURTHER**2)
    assert "chance decides something in at most 10.2 % of studies" in one_line(both_folders)
    assert "all such reports together err in up to 10.2 % of studies" in " ".join(price_of_more(both_folders).split())


def test_looks_within_the_plan_that_did_not_know_of_each_other_do_not_keep_the_level() -> None:
    """Three of eight planned seeds of two sweep folders are looked at apart. Then both are looked at together."""
    early: Sets = {"x=0, y=0": [0, 1, 2], "x=1, y=0": [0, 1, 2]}
    first = study(early, planned=8).present._replace(time="2026-01-01", share=spent(3 / 8))
    second = study({f"{name[:-1]}1": seeds for name, seeds in early.items()}, planned=8).present._replace(
        time="2026-01-02", share=spent(3 / 8)
    )
    knowing = replace(study({"x=0, y=0": [*range(7)], "x=1, y=0": [*range(7)]}, planned=8), earlier=[first])
    assert knowing.excess == 0
    assert "all looks up to that number together keep the 5 %" in one_line(knowing)
    assert "1 of the 8 planned seeds is left. Reports up to that number, all together, keep the 5 %." in price_of_more(
        knowing
    )
    apart = replace(knowing, earlier=[first, second])
    assert apart.excess == pytest.approx(spent(3 / 8))
    total = f"err in up to {5 * (1 + spent(3 / 8)):.3g} % of studies, because one of them did not know of another"
    assert total == "err in up to 5.14 % of studies, because one of them did not know of another"
    assert f"all looks up to that number together {total}" in one_line(apart)
    price = " ".join(price_of_more(apart).split())
    assert f"Reports up to that number, all together, {total}." in price
    assert f"all together err in up to {5 * (1.25 + spent(3 / 8)):.3g} %" in price


def test_reports_of_two_folders_keep_the_error_once_a_report_was_about_both(runs: pd.DataFrame) -> None:
    """Reports about each folder alone know of a report about both, and by it of each other. Else their levels add up.

    The shares are those of the reports in this order.
    """
    parts = {"A": runs[runs["lb"] == 0.0], "B": runs[runs["lb"] == 0.01], "AB": runs}
    folders = {name: runs["folder"].str.replace("/noise/", f"/{name}/") for name in "AB"}
    moved = runs.assign(folder=folders["A"].where(runs["lb"] == 0.0, folders["B"]))
    parts = {"A": moved[moved["lb"] == 0.0], "B": moved[moved["lb"] == 0.01], "AB": moved}
    for order, expected in (
        (("AB", "A", "B"), [1, FURTHER, FURTHER**2]),
        (("A", "AB", "B"), [1, FURTHER, FURTHER**2]),
        (("A", "B", "AB"), [1, 1, FURTHER**2]),
    ):
        for folder in moved["folder"]:
            Path(folder).mkdir(parents=True, exist_ok=True)
        shares = []
        for name in order:
            shares.append(study_of(parts[name]).looks.share())
            record_look(parts[name], study_of(parts[name]))
        assert shares == pytest.approx(expected)
        assert study_of(moved).excess == pytest.approx(max(0.0, sum(expected) - sum(FURTHER**n for n in range(3))))
        for path in {Path(folder).parent / "looks.json" for folder in moved["folder"]}:
            path.unlink()


def test_runs_that_a_report_lacks_are_said_to_count(runs: pd.DataFrame) -> None:
    """Eight seeds are planned. The runs of one setting are trained again, with other results, or some are left out."""
    counted = "This counts runs of earlier looks that are not in this report ({}): left out, gone or trained again."
    first = runs.assign(planned_seeds=8)
    record_look(first, study_of(first))
    again = study_of(first.assign(**{"val/perplexity": runs["val/perplexity"] + (runs["noise"] == 0.5)}))
    assert f"a setting has 6.67 of the 8 planned seeds, on average. {counted.format(10)}" in one_line(again)
    assert f"2 of the 8 planned seeds are left. {counted.format(10)}" in price_of_more(again).replace("\n", " ")
    assert "trained again" not in one_line(study_of(first.assign(started="2026-03-01T00:00:00+00:00")))
    only_new = study_of(first[first["noise"] != 0.5])
    assert not only_new.absent, "their setting is not in this report"
    three = study_of(first[first["seed"] < 3])
    assert f"than before, on average** (5 of the 8 planned seeds). {counted.format(12)}" in one_line(three)


def test_a_number_of_seeds_is_said_to_count_only_runs_that_it_counts() -> None:
    """The look at seeds 0 to 2 is repeated after looks at others. Its number of seeds is that of its time."""
    repeated = study(both(0, 1, 2), both(0, 1, 2), both(3, 4, 5), planned=8)
    assert "This is look 1 at these runs: a setting has 3 of the 8 planned seeds, on average. In" in one_line(repeated)
    left = price_of_more(repeated).replace("\n", " ")
    assert "2 of the 8 planned seeds are left. This counts runs of earlier looks that are not in this report (6)" in (
        left
    )


def test_planned_seeds_are_those_that_somebody_planned() -> None:
    """In place of them, the seeds of the first look decide, and no sentence calls these planned."""
    alone = study(both(0, 1, 2))
    plan = PlannedStudy("2026-01-01T00:00:00+00:00", "a", [], [0, 1, 2], None, ["a"])
    late = replace(study(both(*range(5)), both(0, 1, 2)), planned=8)
    for each in (replace(alone, plans=[plan]), study(both(*range(5)), both(0, 1, 2)), late):
        texts = [*warnings_of_looks(each), price_of_more(each), error_of_more(each, 16)]
        assert "seeds of the first look" in " ".join(texts)
        assert "planned seeds" not in " ".join(texts)
    [(_, fact)] = planned_facts(replace(alone, plans=[plan]))
    assert fact.endswith("; planned number of seeds: none")
    [(_, fact)] = planned_facts(replace(alone, plans=[plan], planned=3))
    assert fact.endswith("; planned number of seeds: 3")


def test_the_terminal_says_what_the_next_look_costs(runs: pd.DataFrame) -> None:
    def line(inputs: ReportInputs) -> str:
        return look_in_words(_with_look(inputs))

    planned = runs.assign(planned_seeds=5)
    early, *_ = collect_inputs(planned[planned["seed"] < 3])
    share = 5 * (1 - spent(0.6))
    at = "in the next look (at the 5 planned seeds), new tests together have"
    assert line(early) == f"look 1 at noise_lb_seed; {at} {share:.3g} % instead of 5 %"
    assert line(collect_inputs(planned)[0]) == (
        "look 2 at noise_lb_seed; in the next look, new tests together have 1 % instead of 5 %"
    )
    one_seed, *_ = collect_inputs(runs[runs["seed"] == 0])
    assert line(one_seed) == "", "nothing can be compared"
    unwritten = early._replace(study=replace(early.study, unwritten="noise/looks.json.lock: Permission denied"))
    assert look_in_words(unwritten) == (
        "look 1 at noise_lb_seed, which was not written down (noise/looks.json.lock: Permission denied): "
        "a later report will not know of it"
    )


def test_a_level_that_is_a_whole_number_is_asked_beside_levels_with_fractions(runs: pd.DataFrame) -> None:
    """A table of contrasts whose levels are all numbers has 1 as 1.0."""
    mixed = runs.assign(noise=runs["noise"].map({0.0: 1, 0.1: 2, 0.5: 3}).astype(int))
    inputs = collect_inputs(mixed)[0]
    assert {*inputs.contrasts["factor"]} == {"noise", "lb"}
    assert {*inputs.families[-1].looks} == {1.0}
    assert [level_as_text(each) for each in (1, 1.0, np.float64(0.5), True, "top_k")] == [
        "1",
        "1",
        "0.5",
        "True",
        "top_k",
    ]


def test_looks_of_one_second_are_two(runs: pd.DataFrame) -> None:
    first = replace(study_of(runs), metrics=["val/perplexity", "a"])
    second = replace(study_of(runs), metrics=["val/perplexity", "b"])
    record_look(runs, first)
    record_look(runs, second)
    assert [[*look.metrics] for look in study_of(runs).earlier] == [["a", "val/perplexity"], ["b", "val/perplexity"]]


def test_new_seeds_that_are_given_by_their_folders_have_the_looks_of_their_grid(tmp_path: Path) -> None:
    made_up = null_runs("", "noise_lb_seed", 5, "equal", np.random.default_rng(0))
    sweep = tmp_path / "default"
    folders = [sweep / str(number) for number in range(len(made_up))]
    for folder in folders:
        folder.mkdir(parents=True)
        write_record(folder, "noise_lb_seed")
    cells = {folder.name: {"noise": 0.0, "seed": 1} for folder in folders}
    grid = Grid("default: noise", ["noise"], {}, [*cells])
    SweepRecord(grids=[grid], cells=cells).write(sweep / SweepRecord.FILE)
    by_grid = made_up.assign(folder=list(map(str, folders)), experiment="default: noise", varied='["noise"]')
    by_folder = by_grid.assign(experiment="default", varied=None)
    new = by_folder["seed"] > 2
    record_look(by_grid[~new], study_of(by_grid[~new]))
    assert study_of(by_folder[new]).looks.share() == FURTHER
    record_look(by_folder[new], study_of(by_folder[new]))
    assert study_of(by_grid).looks.share() == FURTHER**2


def test_runs_of_a_grid_that_are_given_by_their_folders_have_the_plans_of_that_grid(tmp_path: Path) -> None:
    """Another grid in the same folder was planned before, with fewer seeds."""
    sweep, names = tmp_path, [f"{x} {seed}" for x in (0, 1) for seed in (1, 2, 3)]
    cells = {name: {"noise": 0.0, "seed": 1} for name in names}
    grids = [Grid("default: lb", ["lb"], {}, ["another"]), Grid("default: noise", ["noise"], {}, names)]
    SweepRecord(grids=grids, cells=cells | {"another": {"seed": 1}}).write(sweep / SweepRecord.FILE)
    plans = [
        PlannedStudy(f"2026-01-0{day}T00:00:00+00:00", name, [], [1], seeds, [])
        for day, (name, seeds) in enumerate((("default: lb", 2), ("default: noise", 3)), 1)
    ]
    PlansRecord(plans=plans).write(sweep / "plans.json")
    rows = [{"folder": str(sweep / name), "noise": name[0], "seed": int(name[-1])} for name in names]
    by_folder = pd.DataFrame(rows).assign(experiment="default", status="finished", started="2026-01-03")
    assert [plan.experiment for plan in study_of(by_folder).plans] == ["default: noise"]


def test_runs_whose_folders_are_named_one_by_one_have_the_looks_of_their_sweep(runs: pd.DataFrame) -> None:
    """Their experiment then has another name, because no sweep tells which grid they are of."""
    record_look(runs[runs["seed"] < 3], study_of(runs[runs["seed"] < 3]))
    alone = study_of(runs.assign(experiment="default", varied=None))
    assert alone.looks.share() == study_of(runs.assign(varied="[]")).looks.share() == FURTHER
    others = runs[runs["seed"] >= 3].assign(experiment="default", varied=None)
    assert study_of(others).earlier == [], "the look was about none of these"


def test_a_report_about_two_folders_is_one_look_also_if_one_has_moved(runs: pd.DataFrame, tmp_path: Path) -> None:
    second = tmp_path / "sweeps" / "second"
    second.mkdir()
    for folder in runs.loc[runs["noise"] == 0.5, "folder"]:
        Path(folder).rename(second / Path(folder).name)
    folders = runs["folder"].where(runs["noise"] != 0.5, runs["folder"].str.replace("/noise/", "/second/"))
    both_folders = runs.assign(folder=folders)
    record_look(both_folders, study_of(both_folders))
    assert study_of(both_folders).looks.share() == 1
    (tmp_path / "elsewhere").mkdir()
    second.rename(tmp_path / "elsewhere" / "second")
    moved = both_folders.assign(folder=folders.str.replace("/sweeps/second/", "/elsewhere/second/"))
    assert study_of(moved).looks.share() == 1


def test_a_report_about_folders_of_runs_is_a_look_at_their_sweep(runs: pd.DataFrame) -> None:
    some = runs[runs["seed"] < 3].assign(experiment="default", varied=None)
    record_look(some, study_of(some))
    of_sweep = runs.assign(experiment="default: noise, batch_size=4", varied="[]")
    assert study_of(of_sweep).looks.share() == FURTHER
    assert study_of(of_sweep.assign(experiment="other: noise")).looks.share() == 1


def test_what_compares_nothing_is_no_look() -> None:
    """The baseline is trained first, alone, or with another setting of which it shares a single seed."""
    assert not study({"x=0": [*range(8)]}).testable
    assert not study({"x=0": [0, 1, 2], "x=1": [2, 3, 4]}).testable
    assert study({"x=0": [0, 1, 2], "x=1": [1, 2]}).testable


def test_leaving_settings_out_one_after_the_other_keeps_the_error() -> None:
    """Eight settings are compared with a reference in one report, and then each alone with it."""
    every: Sets = {f"x={number}": [*range(8)] for number in range(9)}
    looks, p = [every], np.random.default_rng(0).uniform(size=(4000, 8))
    found = (p <= 0.05 / 8).any(1)
    for number in range(1, 9):
        pair = {name: every[name] for name in ("x=0", f"x={number}")}
        found |= p[:, number - 1] <= 0.05 * study(pair, *looks).share(group(pair))
        looks.append(pair)
    assert found.mean() <= 0.0625


Asked = tuple[list[str], dict[str, str]]  # the tested metrics, and factor -> its reference


def after_questions(now: Asked, *earlier: Asked, planned: int | None = None) -> Study:
    """Return a study of the same eight seeds of two settings, of which earlier looks asked other questions."""
    study_of_eight = study(both(*range(8)), planned=planned)
    seen = [
        study_of_eight.present._replace(time=f"2026-01-{day:02}", metrics=asked[0], references=asked[1])
        for day, asked in enumerate(earlier, 1)
    ]
    return replace(study_of_eight, metrics=now[0], references=now[1], earlier=seen)


@pytest.mark.parametrize("planned", [None, 8])
def test_questions_that_are_asked_one_after_the_other_are_looks(planned: int | None) -> None:
    """Ten metrics are tested, one more in each report. No metric has an effect, and each report has 5 %."""
    names, own = [f"m{number}" for number in range(10)], group(both(*range(8)))
    p = np.random.default_rng(0).uniform(size=(4000, len(names)))
    free, shared = np.zeros(4000, dtype=bool), np.zeros(4000, dtype=bool)
    for day in range(10):
        looks: list[Asked] = [(["val/loss", each], {}) for each in names[: day + 1]]
        now = after_questions(looks[-1], *looks[:-1], planned=planned)
        assert now.share(own, {Question("val/loss")}) == 1, "it is asked in each report"
        share = now.share(own, {Question(names[day])})
        assert share == now.looks.share() == FURTHER**day
        free |= p[:, day] <= 0.05
        shared |= p[:, day] <= 0.05 * share
        again = after_questions((names[:1], {}), *looks, planned=planned)
        assert again.share(own, {Question(names[0])}) == 1, "a question that was asked before costs nothing"
        assert again.looks.place == 0
    assert free.mean() > 0.35
    assert shared.mean() <= 0.0625


def test_the_same_pair_with_the_other_level_as_reference_is_the_same_test() -> None:
    own = group(both(*range(8)))
    now = after_questions((["val/loss"], {"x": "1"}), (["val/loss"], {"x": "0"}))
    of_pair = [Question("val/loss", "x", level) for level in "01"]
    assert now.share(own, {*of_pair}) == 1
    assert now.share(own, {Question("val/loss", "x", "2"), of_pair[1]}) == FURTHER
    assert now.share(own) == now.share(own, {Question("val/loss")}) == 1, "claims, and the analysis of variance"
    both_at_once = (["val/loss", "val/accuracy"], {"x": "1"})
    crossed = after_questions(both_at_once, (["val/loss"], {"x": "1"}), (["val/accuracy"], {"x": "0"}))
    assert crossed.share(own, {Question("val/accuracy", "x", "1")}) == FURTHER**2


def test_questions_at_an_early_look_wait_for_more_seeds() -> None:
    three = study(both(0, 1, 2), planned=8)
    first = three.present._replace(time="2026-01-01", metrics=["a"])
    second = replace(three, metrics=["a", "b"], earlier=[first])
    own = group(both(0, 1, 2))
    assert second.share(own, {Question("a")}) == pytest.approx(spent(3 / 8))
    assert second.share(own, {Question("b")}) == SMALLEST
    assert "asked for b. Nothing of the 5 % is left for comparisons that are new in this look" in one_line(second)
    looks = [first, second.present._replace(time="2026-01-02")]
    eight = replace(study(both(*range(8)), planned=8), metrics=["a", "b", "c"], earlier=looks)
    assert eight.share(group(both(*range(8))), {Question("c")}) == 1 - spent(3 / 8), "all of its runs are new"
    assert eight.looks.share() == 1 - spent(3 / 8)


def test_looks_that_do_not_tell_what_they_asked_count_as_the_first_that_does() -> None:
    own, old = group(both(*range(8))), study(both(*range(8))).present._replace(time="2026-01-01")
    assert replace(study(both(*range(8))), metrics=["a"], earlier=[old]).share(own, {Question("a")}) == 1
    told = old._replace(time="2026-01-02", metrics=["a"])
    later = replace(study(both(*range(8))), metrics=["a", "b"], earlier=[old, told])
    assert (later.share(own, {Question("a")}), later.share(own, {Question("b")})) == (1, FURTHER)


def test_a_report_with_another_metric_or_reference_is_a_look(runs: pd.DataFrame) -> None:
    runs = runs.assign(**{"val/accuracy": np.random.default_rng(1).uniform(size=len(runs))})

    def report(*metrics: str, **references: object) -> ReportInputs:
        return _with_look(collect_inputs(runs, ReportOptions(metrics=metrics, references=references))[0])

    alone = report()
    assert (alone.study.looks.seeds, list(warnings_of_looks(alone.study))) == ([5], [])
    more = report("val/accuracy")
    new = more.contrasts["metric"] == "val/accuracy"
    tests = more.contrasts.groupby("metric")["tests"].first()
    assert new.any()
    assert tests["val/accuracy"] == pytest.approx(tests["val/perplexity"] / FURTHER)
    assert more.claims["tests"].equals(alone.claims["tests"])
    [warning] = (" ".join(text.split()) for text in warnings_of_looks(more.study))
    assert "No earlier look at these runs had asked for val/accuracy. In this look, all new comparisons" in warning
    assert "To keep 5 %, name all metrics and references in the first report." in warning
    two = report(lb=0.01)
    assert two.study.looks.place == 0, "of two levels, one as the reference asks the same as the other"
    other = report(noise=0.5)
    tests = other.contrasts[other.contrasts["factor"] == "noise"].groupby("level")["tests"].first()
    assert tests[0.1] == pytest.approx(tests[0.0] / FURTHER**2), "0.5 and 0.0 had been compared"
    [warning] = (" ".join(text.split()) for text in warnings_of_looks(other.study))
    assert "had asked for noise=0.5 as the reference." in warning
    assert report().study.looks.place == 0
    assert list(warnings_of_looks(report().study)) == []
    assert report("val/accuracy").study.looks.place == 1
    assert len(looks_in(Path(runs["folder"].iloc[0]).parent)["noise_lb_seed"]) == 3


def test_a_verdict_of_an_earlier_look_is_said_if_this_one_has_another(runs: pd.DataFrame) -> None:
    """With three seeds the load CV is lower by about the same in each of them, and with two more it is not."""
    rng = np.random.default_rng(0)
    cv = np.where((runs["lb"] == 0.01) & (runs["seed"] < 3), 0.2, 0.5) + rng.normal(0, 0.002, size=len(runs))
    runs = runs.assign(**{"routing/load_cv/pooled": cv})
    first = _with_look(collect_inputs(runs[runs["seed"] < 3])[0])
    claim = "Balance weight 0.01 lowers the load CV"
    assert [verdict for name, verdict in decisions(first).items() if name.startswith(f"{claim} [")] == ["supported"]
    assert list(warnings_of_decisions(first)) == []
    second = _with_look(collect_inputs(runs)[0])
    shown = [*answer(second)]
    [warning] = (" ".join(text.split()) for text in warnings_of_decisions(second))
    assert f"with 3 seeds on average, “{claim}” was supported" in warning
    assert "That verdict stays valid" in warning
    part = Part("Does the balance weight help?", (claim,))
    [(_, told)] = answers(second, [part])
    assert "but an earlier look found it supported, which stays valid" in told
    [(_, told)] = answers(first, [part])
    assert "earlier look" not in told
    [card] = [each for block in shown if isinstance(block, Cards) for each in block.cards if each.text == claim]
    assert card.effect.endswith("; but an earlier look found it supported, which stays valid")
    again = collect_inputs(runs[runs["seed"] < 3])[0]
    assert claim not in "".join(warnings_of_decisions(again)), "it has the same verdict"


@pytest.mark.parametrize("planned", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("reference", [0.0, 0.5])
def test_a_verdict_of_an_earlier_look_is_found_whatever_is_claimed_and_whichever_level_is_the_reference(
    planned: tuple[bool, bool], reference: float, runs: pd.DataFrame
) -> None:
    """With three seeds noise 0.5 has the lower perplexity, and with all of them a higher one."""
    claim = json.dumps([asdict(replace(CLAIM, text="a beats b", metric="val/perplexity", levels=[0.5], than=[0.0]))])
    runs = runs[(runs["lb"] == 0.0) & (runs["noise"] != 0.1)]
    early = runs["seed"] < 3
    lower = np.where(runs["noise"] == 0.5, np.where(early, 80.0, 300.0), 100.0)
    lower += np.random.default_rng(0).normal(0, 0.01, size=len(runs))
    claims = np.where(early, *(claim if each else "[]" for each in planned))
    runs = runs.assign(**{"val/perplexity": lower}, claims=claims)
    _with_look(collect_inputs(runs[early])[0])
    second = collect_inputs(runs, ReportOptions({"noise": reference}))[0]
    verdict = "better" if reference == 0.0 else "worse"
    levels = f"noise {0.5 - reference} vs {reference}"
    said = " ".join(" ".join(warnings_of_decisions(second)).split())
    assert re.search(f"{levels}” was {verdict}", said)


def test_a_difference_that_is_the_same_in_every_seed_is_no_verdict_of_a_look(runs: pd.DataFrame) -> None:
    """Nothing was tested, so more seeds may refute it, and no later report says that it stays valid."""
    runs = runs[(runs["lb"] == 0.0) & (runs["noise"] != 0.1)].assign(claims="[]")
    chance = np.random.default_rng(0).normal(0, 1, size=len(runs))
    same = np.where(runs["seed"] < 3, runs["seed"] + (runs["noise"] == 0.5), chance)
    runs = runs.assign(**{"val/perplexity": 100.0 + same})
    first = _with_look(collect_inputs(runs[runs["seed"] < 3])[0])
    assert first.judgments[0].verdict == DETERMINISTIC
    assert DETERMINISTIC not in decisions(first).values()
    second = collect_inputs(runs)[0]
    assert not any("the same in every seed" in text or DETERMINISTIC in text for text in warnings_of_decisions(second))
    assert "earlier look" not in headline(second)


def test_the_answer_names_the_verdict_of_an_earlier_look_on_a_comparison(runs: pd.DataFrame) -> None:
    """With three seeds the perplexity is lower in each of them, and with two more it is not."""
    rng = np.random.default_rng(0)
    runs = runs[(runs["lb"] == 0.0) & (runs["noise"] != 0.1)].assign(claims="[]")
    lower = np.where((runs["noise"] == 0.5) & (runs["seed"] < 3), 80.0, 100.0) + rng.normal(0, 0.01, size=len(runs))
    runs = runs.assign(**{"val/perplexity": lower})
    first = _with_look(collect_inputs(runs[runs["seed"] < 3])[0])
    assert "better" in decisions(first).values()
    second = collect_inputs(runs)[0]
    assert headline(second).endswith("; but an earlier look found it better, which stays valid.")
    assert "; but an earlier look found it better, which stays valid" in "".join(map(block_as_markdown, answer(second)))
    assert "earlier look" not in headline(first)


def test_a_verdict_of_an_earlier_look_belongs_to_the_claim_that_it_saw(runs: pd.DataFrame) -> None:
    """A later command changed the direction of a claim and kept its words, and the newest one changed it back."""
    higher = replace(CLAIM, text="a beats b", metric="val/perplexity", levels=[0.5], than=[0.0])
    of_seed = dict(enumerate([higher, higher, replace(higher, kind="lower"), replace(higher, kind="lower"), higher]))
    rng = np.random.default_rng(0)
    rise = np.where(runs["noise"] == 0.5, 9.0, 0.0) + rng.normal(0, 0.001, size=len(runs))
    runs = runs.assign(
        **{"val/perplexity": 100 + rise},
        claims=[json.dumps([asdict(of_seed[seed])]) for seed in runs["seed"]],
        started=[f"2026-02-0{seed + 1}T00:00:00+00:00" for seed in runs["seed"]],
    )
    first = _with_look(collect_inputs(runs[runs["seed"] < 2])[0])
    assert next(iter(decisions(first).values())) == "supported"
    every = _with_look(collect_inputs(runs)[0])
    verdicts = {each.title: each.verdict for each in every.judgments}
    assert sorted(verdicts.values()) == ["contradicted", "supported"]
    again = collect_inputs(runs)[0]
    looks = again.study.earlier
    assert len(looks) == 2
    of_look = [
        {each.title: look.decided.get(name_in_looks(each, again), "") for each in again.judgments} for look in looks
    ]
    [lower] = [title for title, verdict in verdicts.items() if verdict == "contradicted"]
    [claim] = [title for title, verdict in verdicts.items() if verdict == "supported"]
    assert of_look == [{claim: "supported", lower: ""}, verdicts]
    assert list(warnings_of_decisions(again)) == []
    open_ = again._replace(judgments=[each._replace(verdict="undecided") for each in again.judgments])
    [(_, answer)] = answers(open_, [Part("?", ("a beats b",))])
    assert answer.count("but an earlier look found it supported, which stays valid") == 1
    assert answer.count("but an earlier look found it contradicted, which stays valid") == 1


def test_a_verdict_on_a_metric_that_was_asked_for_is_said_once_if_a_later_look_has_another(runs: pd.DataFrame) -> None:
    rng = np.random.default_rng(0)
    rate = np.where((runs["lb"] == 0.01) & (runs["seed"] < 3), 0.2, 0.5) + rng.normal(0, 0.002, size=len(runs))
    options = ReportOptions(metrics=("train/routing/drop_rate",))
    runs = runs.assign(**{"train/routing/drop_rate": rate})
    first = _with_look(collect_inputs(runs[runs["seed"] < 3], options)[0])
    name = "drop rate, in training: lb 0.01 vs 0.0 at noise=0.5"
    assert decisions(first)["train/routing/drop_rate: lb 0.01 vs 0 at noise=0.5"] == "better"
    [look] = study_of(runs).earlier
    second = collect_inputs(runs, options)[0]
    second = second._replace(study=replace(second.study, earlier=[look, look._replace(time="2026-12-31")]))
    text = " ".join(" ".join(warnings_of_decisions(second)).split())
    assert text.count(f"“{name}” was better") == 1, "two looks at the same runs found the same"


def test_a_verdict_on_a_second_metric_is_recorded_and_said_if_a_later_look_has_another(runs: pd.DataFrame) -> None:
    """Nobody asked for the metric, and the claim is open, so that the answer quotes the comparison."""
    open_ = replace(CLAIM, text="a beats b", metric="val/perplexity", levels=[0.5], than=[0.0])
    rng = np.random.default_rng(0)
    rise = np.where((runs["lb"] == 0.01) & (runs["seed"] < 3), 0.2, 0.5) + rng.normal(0, 0.002, size=len(runs))
    columns = {"val/perplexity": rng.normal(100, 1, size=len(runs)), "routing/load_cv/pooled": rise}
    runs = runs.assign(**columns, claims=json.dumps([asdict(open_)]))
    first = collect_inputs(runs[runs["seed"] < 3])[0]
    assert "comparisons that nobody planned show more than chance: lb 0.01 instead of 0.0" in headline(first)
    _with_look(first)
    name = "load CV (layers pooled): lb 0.01 vs 0.0 at noise=0.5"
    assert decisions(first)["routing/load_cv/pooled: lb 0.01 vs 0 at noise=0.5"] == "more balanced"
    second = collect_inputs(runs)[0]
    text = " ".join(" ".join(warnings_of_decisions(second)).split())
    assert f"“{name}” was more balanced" in text
    page = " ".join(str(block) for block in contrast_verdicts(second))
    assert "but an earlier look found it more balanced, which stays valid" in page
    rows = second.contrasts[second.contrasts["metric"] == "routing/load_cv/pooled"]
    names = [name_in_looks(on_contrast(row), second) for _, row in rows.iterrows()]
    earlier = [look._replace(decided=dict.fromkeys(names, "odd")) for look in second.study.earlier]
    [warning] = warnings_of_decisions(second._replace(study=replace(second.study, earlier=earlier)))
    assert warning.count("” was odd") == 5
    assert f" and {len(names) - 5} more were decided" in warning


def test_a_verdict_on_a_comparison_that_a_second_factor_splits_is_said(runs: pd.DataFrame) -> None:
    """The first look saw one load-balancing weight, so that its comparisons have no "at lb=0.01" in their names."""
    rng = np.random.default_rng(0)
    rise = np.where((runs["noise"] == 0.5) & (runs["seed"] < 3), 9.0, 0.0) + rng.normal(0, 0.01, size=len(runs))
    runs = runs.assign(**{"val/perplexity": 100 + rise})
    one = runs[(runs["lb"] == 0.01) & (runs["seed"] < 3)]
    first = _with_look(collect_inputs(one)[0])
    assert decisions(first)["val/perplexity: noise 0.5 vs 0"] == "worse"
    second = _with_look(collect_inputs(runs)[0])
    said = " ".join(" ".join(warnings_of_decisions(second)).split())
    assert "**An earlier look decided what this report does not compare.** On " in said
    assert said.count("“validation perplexity: noise 0.5 vs 0” was worse") == 1
    assert "or makes a comparison at each level of another factor" in said
    again = collect_inputs(runs, ReportOptions(metrics=("val/perplexity",)))[0]
    assert " ".join(" ".join(warnings_of_decisions(again)).split()) == said
    look = again.study.earlier[0]
    name = "val/accuracy: noise 0.5 vs 0"  # not tested here
    claims = {"a beats b [01234567]": "supported", "a beats b [76543210]": "contradicted"}
    looks = [
        look._replace(decided={name: "worse"} | claims),
        look._replace(decided={name: "better"} | claims, time="2026-12-30T00:00:00+00:00"),
    ]
    first, second = warnings_of_decisions(again._replace(study=replace(again.study, earlier=looks)))
    assert "“validation accuracy: noise 0.5 vs 0” was worse, “a beats b” was supported and “a beats b” was" in (
        " ".join(first.split())
    )
    assert "on average, “validation accuracy: noise 0.5 vs 0” was better. That" in " ".join(second.split())
    equivalent = look._replace(decided={"val/accuracy: x [2] vs [1]": "equivalent"}, margins={"val/accuracy": "1%"})
    [third] = warnings_of_decisions(again._replace(study=replace(again.study, earlier=[equivalent])))
    assert "“validation accuracy: x [2] vs [1]” was equivalent within 1%. That" in " ".join(third.split())
    names = [name_in_looks(each, again) for each in _judged(again) if each.levels]
    both = [look._replace(decided=dict.fromkeys(names, "odd")), look._replace(decided=dict.fromkeys(names[:1], "odd"))]
    assert len(list(warnings_of_decisions(again._replace(study=replace(again.study, earlier=both))))) == 1, "said once"


def test_a_report_about_the_same_runs_alone_adds_its_verdicts_to_the_look(runs: pd.DataFrame, tmp_path: Path) -> None:
    """A report about them and another experiment has more tests, so it may leave open what the one alone decides."""
    path = tmp_path / "sweeps" / "noise" / "looks.json"
    study = study_of(runs)
    assert record_look(runs, study, decided={"a": "better"}) == ""
    written = list[Written]()
    assert record_look(runs, study, decided={"a": "worse", "b": "supported"}, written=written) == ""
    [look] = LooksRecord.read(path).looks["noise_lb_seed"]
    assert look.decided == {"a": "better", "b": "supported"}
    take_back(written)
    assert LooksRecord.read(path).looks["noise_lb_seed"] == [look], "the report that wrote the look was shown"


def test_runs_that_are_gone_keep_the_setting_of_those_that_are_there(runs: pd.DataFrame) -> None:
    """A second factor gives the runs that are there longer names. Both have one setting, so seeds are counted right."""
    first = runs[(runs["lb"] == 0.01) & (runs["seed"] < 3)]
    _with_look(collect_inputs(first)[0])
    gone = (runs["lb"] == 0.01) & (runs["noise"] == 0.5) & (runs["seed"] == 1)
    [look] = study_of(runs[~gone]).earlier
    assert len({*look.runs.values()}) == runs["noise"].nunique()
    assert all(setting.startswith("lb=0.01, noise=") for setting in look.runs.values())


def test_a_comparison_at_a_level_keeps_its_name_if_the_level_is_spelled_otherwise(runs: pd.DataFrame) -> None:
    """A level 0 becomes 0.0 as soon as the sweep gets a level 0.5."""
    inputs = collect_inputs(runs)[0]
    judged = next(each for each in _judged(inputs) if each.levels and each.levels[0] == "lb")
    names = {
        name_in_looks(judged._replace(levels=(*judged.levels[:-1], within)), inputs)
        for within in ("noise=0, router=v2.0 x", "noise=0.0, router=v2.0 x")
    }
    [name] = names
    assert name.endswith(" at noise=0, router=v2.0 x")
    other = name_in_looks(judged._replace(levels=(*judged.levels[:-1], "noise=1e-3, router=v2.0 x")), inputs)
    assert other.endswith("at noise=0.001, router=v2.0 x")


def test_what_earlier_reports_asked_counts_among_the_tests_of_later_ones(runs: pd.DataFrame) -> None:
    """Otherwise one report about three metrics, and three reports about one of them each, would have 15 %."""
    names = [f"val/m{number}" for number in range(3)]
    rng = np.random.default_rng(2)
    runs = runs.assign(**{name: rng.uniform(1, 2, size=len(runs)) for name in names})

    def report(*metrics: str, margins: tuple[str, ...] = (), **references: object) -> ReportInputs:
        options = ReportOptions(references, dict.fromkeys(margins, "1"), metrics)
        return _with_look(collect_inputs(runs, options)[0])

    def number(inputs: ReportInputs) -> int:
        return inputs.families[-1].tests

    every = report(*names, margins=tuple(names))
    assert every.earlier_tests == EarlierTests(0, 0)
    one = report(names[0], margins=(names[0],))
    contrasts = 2 * 2 + 3  # two levels of noise with each lb, and lb with each noise
    terms = every.variance.query("metric == 'val/m0'")["p GG"].count()
    assert one.earlier_tests == EarlierTests(2 * (contrasts + terms), 2 * contrasts)
    assert number(one) == number(every)
    assert one.families[-1].earlier == 2 * (contrasts + terms)
    assert one.families[-1].looks == (1.0, 1.0)
    smallest = [inputs.contrasts.query("metric == 'val/m0'")["p TOST"].idxmin() for inputs in (one, every)]
    corrected = [each.contrasts.loc[row, "p TOST Holm"] for each, row in zip((one, every), smallest, strict=True)]
    assert corrected[0] == pytest.approx(min(1, 3 * contrasts * one.contrasts.loc[smallest[0], "p TOST"]))
    assert any(
        f"{2 * (contrasts + terms)} of them were made by earlier reports alone" in str(block)
        for block in how_it_decides(one)
    )
    other = report(noise=0.5)
    pairs = 2  # 0.1 vs 0.0 at two lb; 0.5 vs 0.0 is asked again
    assert other.earlier_tests.unplanned == 3 * (contrasts + terms) + pairs * len(other.tested)
    assert report(*names).earlier_tests.unplanned == (len(names) + len(other.tested)) * pairs - pairs * len(names)


def test_a_level_that_came_later_was_compared_by_no_earlier_report(runs: pd.DataFrame) -> None:
    """The first report had two levels. Which of them was its reference does not matter then, but does later."""
    two = runs[runs["noise"].isin([0.0, 0.5])]
    first = _with_look(collect_inputs(two, ReportOptions({"noise": 0.5}))[0])
    later = collect_inputs(runs, ReportOptions({"noise": 0.5}))[0]
    assert len(first.study.references) == 2
    assert later.study.earlier[0].references["noise"] == "0"
    assert later.earlier_tests == EarlierTests(0, 0)


def test_tests_that_an_added_run_makes_impossible_still_count(runs: pd.DataFrame) -> None:
    """A level with one run leaves no analysis of variance, and no claim about the lowest level.

    If their tests did not count any more, the others would have a larger level than at the first look.
    """
    first = _with_look(collect_inputs(runs)[0])
    [look] = looks_in(Path(runs["folder"].iloc[0]).parent)["noise_lb_seed"]
    assert look.tests[OF_CLAIMS[1]] == sum(first.claims["source"].str.startswith("our own") & (first.claims["p"] > 0))
    assert look.tests["val/perplexity"] == 3, "noise, lb, and their interaction"
    folder = Path(runs["folder"].iloc[0]).parent / "added"
    folder.mkdir()
    write_record(folder, "noise_lb_seed")
    added = runs.iloc[:1].assign(noise=0.9, folder=str(folder))
    later = collect_inputs(pd.concat([runs, added], ignore_index=True))[0]
    assert later.variance.empty
    lost = sum(later.claims["p"].isna()) - sum(first.claims["p"].isna())
    assert lost > 0
    assert sum(later.earlier_tests.claims) == lost
    assert later.earlier_tests.unplanned == first.variance["p GG"].count() > 0
    for before, now in zip(first.families, later.families, strict=True):
        assert (now.tests, now.share) == (before.tests, before.share)
    assert (later.claims["tests"] >= first.claims["tests"]).all()
    fewer = later._replace(study=replace(later.study, earlier=[later.study.earlier[0]._replace(tests={})]))
    assert with_comparisons(fewer).earlier_tests == EarlierTests(0, 0), "a look that does not tell its tests"


def test_a_metric_in_which_nothing_can_be_tested_costs_no_look(runs: pd.DataFrame) -> None:
    runs = runs.assign(**{"routing/drop_rate": 0.0, "val/deterministic": 1.0 * runs["noise"]})
    first = _with_look(collect_inputs(runs)[0])
    options = ReportOptions(metrics=("routing/drop_rate", "val/deterministic"))
    second = collect_inputs(runs, options)[0]
    assert {"routing/drop_rate", "val/deterministic"} <= {*second.tested}
    assert second.study.metrics == first.study.metrics
    assert (second.study.looks.place, second.study.looks.next_share) == (0, first.study.looks.next_share)


def test_a_metric_that_was_asked_for_and_cannot_be_compared_has_its_mean(runs: pd.DataFrame) -> None:
    """Three levels were trained one after the other, so their speeds are not comparable. Each seed has three runs."""
    runs = runs[runs["lb"] == 0.0]
    days = pd.to_timedelta(10 * runs["noise"], "D")
    began = (pd.to_datetime("2026-02-01T00:00:00+00:00") + days).map(datetime.isoformat)
    speed = np.random.default_rng(1).normal(1000, 10, size=len(runs))
    runs = runs.assign(**{"time/tokens_per_s": speed, "seconds": 60.0, "started": began})
    [inputs] = collect_inputs(runs, ReportOptions(metrics=("time/tokens_per_s",)))
    [line] = asked(inputs)
    assert line.endswith(f"{speed.mean():.4g} in the mean of all runs; there is no comparison of it.")


@pytest.mark.parametrize("error", [OSError("no space"), ValueError("no number")])
def test_a_report_that_is_refused_is_no_look(
    runs: pd.DataFrame, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first report is one of another number of seeds, and its look stays."""
    path = tmp_path / "sweeps" / "noise" / "looks.json"
    for some, out in ((runs, "first"), (runs[runs["seed"] < 3], "second")):
        (tmp_path / out).touch()
        with pytest.raises(OSError, match="File exists"):
            write_report(some, tmp_path / out)
        with monkeypatch.context() as patched:
            patched.setattr("moe.analysis.report.report.Page", lambda: raising(error))
            with pytest.raises(type(error), match=str(error)):
                write_report(some, tmp_path / "other")
        looks = LooksRecord.read(path).looks
        assert [len(each) for each in looks.values()] == ([] if out == "first" else [1])
        if out == "first":
            record_look(some, study_of(some))


def raising(error: Exception) -> None:
    raise error


def test_the_planned_number_is_that_of_the_first_look() -> None:
    """Runs of the first look are gone, and the others were planned with more seeds."""
    three, eleven = both(0, 1, 2), both(*range(11))
    unplanned = study(three)
    later = Study(8, study(eleven).runs, [unplanned.present._replace(time="2026-01-01")])
    assert later.looks.planned == 3
    assert later.share(group(eleven)) == FURTHER


def test_a_report_while_runs_are_awaited_is_an_early_look() -> None:
    """A sweep of three seeds at two settings has ended at one of them, and has two seeds at the other."""
    early = study({"x=0": [0, 1, 2], "x=1": [0, 1]}, awaited={"x=1": [2]})
    assert early.looks.share() == spent(2.5 / 3)
    assert "a setting has 2.5 of the 3 seeds of the first look, on average" in one_line(early)
    assert "keeps the share" not in one_line(early), "there was no earlier look"
    later = replace(study(both(0, 1, 2)), earlier=[early.present._replace(time="2026-01-01")])
    assert later.share(group(both(0, 1, 2))) == later.looks.share() == 1 - spent(2.5 / 3)


def test_looks_at_other_runs_keep_the_error_of_a_test() -> None:
    """A test has looks at 3 seeds, at the same again, at 5, at the same 5 again and at 8; only three of them count."""
    numbers = (3, 3, 5, 5, 8)
    looks = [both(*range(n)) | {"x=2": [*range(others)]} for n, others in zip(numbers, (3, 4, 6, 7, 8), strict=True)]
    own = group(both(*range(8)))
    p = p_of_looks(numbers, 0.0, studies := 4000)
    noise = 2 * np.sqrt(0.05 * 0.95 / studies)
    for planned, most in ((8, 0.05), (None, 0.0625)):
        shares = [study(now, *looks[:day], planned=planned).share(own) for day, now in enumerate(looks)]
        assert shares[0] <= shares[1]
        assert shares[2] <= shares[3], "the same runs have no less than before"
        assert (p <= 0.05 * np.array(shares)).any(1).mean() <= most + noise
    assert (p <= 0.05).any(1).mean() > 0.09


def one_line(of: Study) -> str:
    return next(warnings_of_looks(of)).replace("\n", " ")


def test_a_report_says_which_looks_leave_it_less() -> None:
    nothing_new = study(both(0, 4), both(0, 1, 2), both(3, 4, 5), planned=8)
    assert "look 3 at these runs, and a setting has no more seeds than before, on average** (6 of the 8" in one_line(
        nothing_new
    )
    all_runs = study(both(*range(6)), both(0, 1, 2))
    assert "On 2026-01-01T00:00:00, the results of 6 runs (seeds 0, 1, 2) could be seen" in one_line(all_runs)
    gone = study(both(7, 8, 9), both(0, 1, 2))
    assert "the results of 6 runs could be seen" in one_line(gone)
    assert "the results of 1 run (seed 2) could be seen" in one_line(study(both(0, 1, 2), {"x=0": [2]}))
    assert "A comparison that an earlier look made with the same runs keeps at least the share" in one_line(all_runs)
    assert list(warnings_of_looks(study(both(2, 1, 0), both(0, 1, 2)))) == []
    [warning] = warnings_of_looks(replace(study(both(0, 1, 2)), unwritten="a_b: no"))
    assert warning.startswith("**This look was not written down** (a_b: no). A later report will not know of it")


def test_advice_says_what_more_seeds_cost_once_the_planned_ones_are_there() -> None:
    """Seeds cost nothing up to the plan. The first look after it has a fifth of the level, the next a fifth of that."""
    three, eight, early = both(0, 1, 2), both(*range(8)), both(0, 1, 2)
    assert price_of_more(study(both(0), planned=8)) == ""
    assert price_of_more(study(three, planned=8)).startswith(
        "5 of the 8 planned seeds are left. Reports up to that number"
    )
    of_four = study(three, planned=4)
    assert price_of_more(of_four).startswith("1 of the 4 planned seeds is left.")
    assert error_of_more(of_four, 4) == error_of_more(of_four, float("nan")) == ""
    more = error_of_more(of_four, 16)
    stricter = "A report on so many seeds is stricter: see “More seeds”."
    assert more == f"That makes 16 seeds, more than the 4 planned seeds. {stricter}"
    assert "all together err in up to 6.25 %" in price_of_more(of_four)
    planned = price_of_more(study(eight, early, planned=8))
    assert (
        "All of the 8 planned seeds have been used. In a report on more seeds, the new tests together have 1 % "
        "instead of 5 %,\nso they need a smaller p." in planned
    )
    assert "all such reports together err\nin up to 6.25 % of studies" in planned
    second = price_of_more(study(both(*range(5)), early))
    assert second.startswith(
        "These runs had no `planned_seeds`, so the number of the first look decides. All of the 3 seeds of the first "
    )
    assert "have been used. In a report on more seeds, the new tests together have 0.2 % instead of 5 %" in second


def test_reports_at_one_moment_lose_no_look(runs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lock, both read the file before the other one writes it."""
    both_have_read = threading.Barrier(2)

    def read_together(folder: Path) -> dict[str, list[Look]]:
        looks = looks_in(folder)
        with contextlib.suppress(threading.BrokenBarrierError):
            both_have_read.wait(timeout=0.3)
        return looks

    studies = [replace(study_of(runs), metrics=[metric]) for metric in ("a", "b")]
    monkeypatch.setattr("moe.analysis.recorded.looks_in", read_together)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(record_look, [runs, runs], studies)] == ["", ""]
    monkeypatch.undo()
    assert sorted(look.metrics for look in study_of(runs).earlier) == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (NotImplementedError(), "noise/looks.json.lock: the file system has no locks"),
        (Timeout("looks.json.lock"), "noise/looks.json.lock: another process had it for 60 s"),
        (OSError(28, "No space left on device"), "noise/looks.json: No space left on device"),
    ],
)
def test_a_look_that_is_written_down_needs_no_lock(
    error: Exception, why: str, runs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may have become one that cannot be written to, or whose files cannot be locked."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    first = study_of(runs)
    record_look(runs, first)
    monkeypatch.setattr("moe.analysis.recorded.FileLock", refuse)
    assert record_look(runs, study_of(runs)) == ""
    assert record_look(runs, replace(first, metrics=["a"])) == why


def test_a_lock_is_open_to_whoever_may_write_to_its_folder(runs: pd.DataFrame, tmp_path: Path) -> None:
    """Its mode is that of the folder, whatever the umask is. A lock that cannot be had is named as the reason."""
    folder = tmp_path / "sweeps" / "noise"
    folder.chmod(0o775)
    umask = os.umask(0o077)
    try:
        assert record_look(runs, study_of(runs)) == ""
    finally:
        os.umask(umask)
    lock = folder / "looks.json.lock"
    assert stat.S_IMODE(lock.stat().st_mode) == 0o664
    lock.unlink()
    lock.mkdir()
    assert record_look(runs, replace(study_of(runs), metrics=["a"])) == "noise/looks.json.lock: Is a directory"


@pytest.mark.parametrize("link", ["multirun", "multirun/sweep", "run"])
def test_a_folder_is_the_same_study_whatever_link_leads_to_it(link: str, runs: pd.DataFrame, tmp_path: Path) -> None:
    record_look(runs[runs["seed"] < 3], study_of(runs[runs["seed"] < 3]))
    places = {"multirun": tmp_path / "sweeps", "multirun/sweep": tmp_path / "sweeps" / "noise"}
    (tmp_path / "other").mkdir()
    if link == "run":
        folders = [tmp_path / "other" / Path(folder).name for folder in runs["folder"]]
        for folder, target in zip(folders, runs["folder"], strict=True):
            folder.symlink_to(target)
    else:
        (tmp_path / "other" / "link").symlink_to(places[link])
        folders = [tmp_path / "other" / "link" / Path(folder).relative_to(places[link]) for folder in runs["folder"]]
    linked = runs.assign(folder=[str(folder) for folder in folders])
    assert study_of(linked).looks.share() == study_of(linked).share(group_of(linked)) == FURTHER
    assert study_of(linked).share(group_of(runs)) == FURTHER
    tests = {compared(claim, members).runs for claim, members in planned_claims(linked)}
    assert {study_of(runs).share(test) for test in tests} == {FURTHER}
    record_look(linked, study_of(linked))
    assert study_of(runs).looks.share() == FURTHER, "it is the look that was just written down"
    assert len(looks_in(tmp_path / "sweeps" / "noise")["noise_lb_seed"]) == 2
    assert not [*(tmp_path / "other").glob("*.json")]


def test_a_folder_that_cannot_be_written_to_is_said(runs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", ".looks.json.1.tmp")

    monkeypatch.setattr(LooksRecord, "write", refuse)
    assert _with_look(collect_inputs(runs)[0]).study.unwritten == "noise/looks.json: Permission denied"


def test_adding_seeds_keeps_the_error_only_with_shares() -> None:
    seeds, studies = (3, 5, 8), 4000
    p = p_of_looks(seeds, 0.0, studies)
    error = {name: rule(p, seeds).any(1).mean() for name, rule in RULES.items()}
    assert error["5 % at each look"] > 0.09
    assert error["planned"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / studies)
    assert error["not planned"] <= 0.05 * (1 + FURTHER + FURTHER**2) + 2 * np.sqrt(0.05 * 0.95 / studies)


@pytest.fixture
def runs(tmp_path: Path) -> pd.DataFrame:
    """Five seeds of a made-up experiment, in a sweep folder of its own, that started after all plans of these tests."""
    made_up = null_runs("", "noise_lb_seed", 5, "equal", np.random.default_rng(0))
    folders = [tmp_path / "sweeps" / "noise" / str(number) for number in range(len(made_up))]
    for folder in folders:
        folder.mkdir(parents=True)
        write_record(folder, "noise_lb_seed")
    return made_up.assign(folder=list(map(str, folders)), started="2026-02-01T00:00:00+00:00")


def test_a_second_look_is_said_and_corrected(runs: pd.DataFrame, tmp_path: Path) -> None:
    first = runs[runs["seed"] < 3]
    alone = collect_inputs(runs)[0]
    assert record_look(first, study_of(first)) == ""
    assert record_look(first, study_of(first)) == ""  # the same report again is the same look
    [look] = LooksRecord.read(tmp_path / "sweeps" / "noise" / "looks.json").looks["noise_lb_seed"]
    assert look.seeds == [0, 1, 2]
    assert look.mean_seeds == look.planned == 3
    names = {Path(folder).name for folder in first["folder"]}
    assert {each for setting in look.runs.values() for each in setting} == names
    assert "lb=0.01, noise=0.5" in look.runs
    second = collect_inputs(runs)[0]
    assert second.claims["tests"].tolist() == (alone.claims["tests"] / FURTHER).tolist()
    assert (second.contrasts["tests"] == alone.contrasts["tests"] / FURTHER).all()
    assert (second.contrasts["p Holm"] >= alone.contrasts["p Holm"]).all()
    assert second.contrasts["p"].equals(alone.contrasts["p"])
    texts = [str(block) for block in how_it_decides(second)]
    for family in second.families:
        assert any(level_text(family.tests / family.share / FURTHER) in text for text in texts)
    [warning] = (" ".join(text.split()) for text in warnings_of_looks(second.study))
    assert (
        "look 2 at these runs, after the 3 seeds of the first look, which decide because no number was planned"
        in warning
    )
    assert "together have 1 % instead of 5 %" in warning
    assert "at most 6 % of studies" in warning
    assert list(warnings_of_looks(alone.study)) == []


def test_a_command_for_more_seeds_completes_those_that_some_settings_lack(
    runs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 3 is lacking once. A comparison without it has four seeds, and one of the seeds that it needs is seed 3."""
    command = "moe.analysis.report.sections.commands.training_command"
    monkeypatch.setattr(command, lambda runs, seeds, claims: " ".join(map(str, seeds)))
    lacking = collect_inputs(runs[~((runs["noise"] == 0.5) & (runs["lb"] == 0.01) & (runs["seed"] == 3))])[0]
    assert command_for_more(collect_inputs(runs)[0], 2) == "5 6"
    assert command_for_more(lacking, 2) == "3 5 6"
    assert command_for_more(lacking, 2, n=5) == "3 5 6", "this comparison has seed 3"
    assert command_for_more(lacking, 2, n=4) == "3 5"
    assert command_for_more(lacking, 1, n=4) == "3"
    assert command_for_more(lacking, 100) == " ".join(map(str, range(5, 105))), "a range, which names no single seed"
    monkeypatch.setattr(command, lambda runs, seeds, claims=None: f"train {seeds}")
    monkeypatch.setattr("moe.analysis.report.sections.answer.training_command", lambda runs, seeds: f"train {seeds}")
    text = " ".join(" ".join(map(block_as_markdown, answer(lacking))).split())
    assert "`train [3, 5" in text
    together = "A command above that lists its seeds trains them too."
    assert f"These seeds come first. {together} This command trains them alone: `train [3]`" in text


def test_advice_begins_with_seeds_that_some_settings_lack(runs: pd.DataFrame) -> None:
    complete = " ".join(map(block_as_markdown, answer(collect_inputs(runs)[0])))
    assert "lack seeds" not in complete
    lacking = runs[~((runs["noise"] == 0.5) & (runs["seed"] > 2)) & ~((runs["lb"] == 0.01) & (runs["seed"] == 4))]
    text = " ".join(" ".join(map(block_as_markdown, answer(collect_inputs(lacking)[0]))).split())
    assert "Some settings lack seeds that others have** (runs that are missing: 6; seeds 3 and 4)" in text
    assert (
        "Differences and means are over different seeds**, because some settings have no result of seeds 3, 4" in text
    )
    assert "over different seeds" not in complete
    diverged = runs.assign(status=runs["status"].where(runs.index != 0, "diverged"))
    text = " ".join(" ".join(map(block_as_markdown, answer(collect_inputs(diverged)[0]))).split())
    assert "lack seeds that others have" not in text, "such a run would diverge again"
    assert f"some settings have no result of seed {runs['seed'].iloc[0]}. A difference" in text
    assert "over the seeds that all of its settings have; only a mixed model uses other seeds too." in text
    running = runs.assign(status=runs["status"].where(runs["seed"] != 1, "running"))
    assert "lack seeds" not in " ".join(map(block_as_markdown, answer(collect_inputs(running)[0])))


@pytest.mark.parametrize("status", ["failed", "diverged", "running", "interrupted"])
def test_there_is_an_answer_if_no_run_has_finished(runs: pd.DataFrame, status: str) -> None:
    """Nothing is said to be uneven: neither the seeds of the settings, nor the code that trained them."""
    commits = ["a" * 40, "b" * 40] * (len(runs) // 2)
    unfinished = runs.assign(status=status, commit=commits, seconds=1.0, error="out of memory")
    text = " ".join(" ".join(map(block_as_markdown, answer(collect_inputs(unfinished)[0]))).split())
    assert f"**{len(runs)} of {len(runs)} runs did not finish**" in text
    assert "over different seeds" not in text
    assert "the same code" not in text


def test_a_run_without_a_partner_is_no_look_at_a_comparison(runs: pd.DataFrame) -> None:
    """All settings have three seeds at the first look. Then all but noise 0.5 get two more, and at last noise 0.5."""
    first, second = runs[runs["seed"] < 3], runs[(runs["seed"] < 3) | (runs["noise"] < 0.5)]
    alone = collect_inputs(runs)[0].contrasts["tests"].max()
    record_look(first, study_of(first))
    found = collect_inputs(second)[0].contrasts
    without = (found["factor"] == "noise") & (found["level"] == 0.5)
    assert found.loc[without, "tests"].unique() == pytest.approx(alone)
    assert found.loc[found["level"] == 0.1, "tests"].unique() == pytest.approx(alone / FURTHER)
    record_look(second, study_of(second))
    found = collect_inputs(runs)[0].contrasts
    assert found.loc[without, "tests"].unique() == pytest.approx(alone / FURTHER**2)
    assert found.loc[found["level"] == 0.1, "tests"].unique() == pytest.approx(alone / (FURTHER + FURTHER**2))


def test_a_run_without_a_partner_is_no_look_at_a_claim(runs: pd.DataFrame) -> None:
    """All settings have three seeds at the first look. Then noise 0 gets two more, which claims about lb use alone."""
    first, second = runs[runs["seed"] < 3], runs[(runs["seed"] < 3) | (runs["noise"] == 0)]
    alone = collect_inputs(first)[0].claims
    record_look(first, study_of(first))
    again = collect_inputs(second)[0].claims
    of_noise = alone["compared"].str.startswith("noise ")
    assert of_noise.value_counts().to_dict() == {True: 5, False: 3}
    assert again.loc[of_noise, "p"].tolist() == pytest.approx(alone.loc[of_noise, "p"].tolist())
    expected = (alone["tests"] / (~of_noise).map({True: FURTHER, False: 1})).tolist()
    assert again["tests"].tolist() == pytest.approx(expected)


Command = tuple[Sets, int | None, int]  # the runs that had not begun, planned_seeds, and how many of the runs ended


def study_after(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: Sets,
    *commands: Command,
    report: Look | None = None,
    results: Mapping[int, float] = MappingProxyType({}),
    missing: Mapping[str, list[int]] = MappingProxyType({}),
) -> Study:
    """Return the study of runs that are there, after one command a day, of each of which the first runs ended.

    A run that is there was trained by the last command that names it. The folders of all others were deleted. report:
    one that was written. results: the loss of all runs of a day; 1 by default. missing: runs of the sweep that no
    command began.
    """
    names = {f"{name} {seed}": (name, seed) for name, seeds in there.items() for seed in seeds}
    plans, started, planned_seeds = list[PlannedStudy](), dict[str, str](), dict[str, int | None]()
    days = dict[str, int]()
    folder.mkdir()
    with (folder / ENDED_FILE).open("w") as file:
        for day, (sets, planned, number) in enumerate(commands, 1):
            runs = [f"{name} {seed}" for name, seeds in sets.items() for seed in seeds]
            seeds = sorted({seed for each in sets.values() for seed in each})
            plans.append(PlannedStudy(f"2026-01-{day:02}T10:00:00+00:00", "x", [], seeds, planned, runs))
            started |= dict.fromkeys(runs, plans[-1].time)
            planned_seeds |= dict.fromkeys(runs, planned)
            days |= dict.fromkeys(runs, day)
            for run in runs[:number]:
                setting, _, seed = run.partition(" ")
                result = repr(results.get(day, 1.0))
                ended = Ended(f"2026-01-{day:02}T11:00:00.5+00:00", run, setting, int(seed), run, result)
                file.write(json.dumps(ended._asdict()) + "\n")
    PlansRecord(plans=plans).write(folder / "plans.json")
    if report:
        LooksRecord(looks={"x": [report]}).write(folder / "looks.json")
    for name in names:
        (folder / name).mkdir()
    monkeypatch.setattr("moe.analysis.recorded.digests_in", lambda _: {name: name for name in names})
    rows = [
        {
            "x": x,
            "seed": seed,
            "folder": str(folder / name),
            "started": started[name],
            "planned_seeds": planned_seeds[name],
            "val/loss": results.get(days[name], 1.0),
        }
        for name, (x, seed) in names.items()
    ]
    table = pd.DataFrame(rows).assign(status="finished")
    if missing:
        cells = [(name, seed) for name, seeds in missing.items() for seed in seeds]
        lacking = [{"x": name, "seed": seed, "folder": str(folder / f"{name} {seed}")} for name, seed in cells]
        table = pd.concat([table, pd.DataFrame(lacking).assign(status="missing")])
    return study_of(table.assign(experiment="x", varied='["x"]', seconds=1.0))


@pytest.mark.parametrize(
    ("number", "binds"), [(6, 8), (1, 8), (0, 3)], ids=["all had ended", "one had ended", "none had ended"]
)
def test_a_number_of_seeds_that_was_planned_binds_once_a_run_has_ended(
    number: int, binds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders of all runs are deleted, and a second command, with fewer planned seeds, trains the same runs."""
    three = both(1, 2, 3)
    again = study_after(tmp_path / "sweep", monkeypatch, three, (three, 8, number), (three, 3, 6))
    assert again.planned == binds
    assert len(again.distinct) == 1, "these runs have the same results"
    assert again.looks.share() == (spent(3 / 8) if binds == 8 else 1)


@pytest.mark.parametrize("stopped", [(both(4, 5), 0), (both(1, 2, 3) | {"x=2": [4]}, 6)], ids=["at once", "later"])
def test_a_run_that_a_stopped_command_did_not_end_costs_nothing(
    stopped: tuple[Sets, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then another level is added. The look at its start saw the runs that had ended, as the report before it did."""
    old, new, (sets, number) = both(1, 2, 3), {"x=3": [1, 2, 3]}, stopped
    commands: list[Command] = [(sets, None, number), (new, None, 3)]
    commands = [(old, None, 6), *commands] if number == 0 else commands
    added = study_after(tmp_path / "sweep", monkeypatch, old | new, *commands)
    own = frozenset(folder for folder, run in added.runs.items() if not run.setting.startswith("x=x=3"))
    assert [{*look.runs} for look in added.distinct[:-1]] == [{*own}]
    assert len(own) == 6
    assert added.share(own) == pytest.approx(1)


def test_runs_that_had_ended_before_more_were_added_are_a_look_also_if_they_were_trained_again_or_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, more, new = both(1, 2, 3), both(1, 2, 3, 4, 5), both(4, 5, 6)
    again = study_after(tmp_path / "again", monkeypatch, more, (old, None, 6), (more, None, 10))
    assert again.looks.share() == FURTHER
    assert again.absent == frozenset()
    gone = study_after(tmp_path / "gone", monkeypatch, new, (old, None, 6), (new, None, 6))
    assert gone.looks.share() == FURTHER
    assert len(gone.absent) == 6, "their settings are those of this report"
    planned = study_after(tmp_path / "planned", monkeypatch, new, (old, 6, 6), (new, 3, 6))
    assert planned.looks.share() == pytest.approx(1 - spent(3 / 6))
    three: Sets = old | {"x=2": [1, 2, 3]}
    for there, share in ((three | both(*range(1, 7)), 1), (both(*range(1, 7)), FURTHER)):
        level = study_after(tmp_path / f"level {share}", monkeypatch, there, (three, None, 9), (new, None, 6))
        own = frozenset(folder for folder, run in level.runs.items() if run.seed < 4 and "x=2" not in run.setting)
        assert level.share(own) == share, "the look gives nothing if it saw a level that is gone"
    for part in (both(1, 2, 3, 4, 5), both(1, 2), both(4, 5), {"x=0": [1, 2, 3]}):
        left_out = study_after(tmp_path / f"part {part}", monkeypatch, part, (old, None, 6), (more, None, 10))
        shown = FURTHER**2 if part in (both(1, 2), {"x=0": [1, 2, 3]}) else FURTHER
        assert left_out.looks.share() == pytest.approx(shown), "all results were seen, also those that are left out"


@pytest.mark.parametrize("run", ["is gone", "was trained again", "has another result"])
def test_a_run_of_a_report_that_is_gone_or_trained_again_makes_no_further_look_of_the_next_command(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report saw three seeds, and a command added two. That command saw what the report had seen, and no more."""
    old, more, one = both(1, 2, 3), both(4, 5), {"x=1": [3]}
    commands: list[Command] = [(old, None, 6), (more, None, 4), *([] if run == "is gone" else [(one, None, 1)])]
    there = {"x=0": [1, 2, 3, 4, 5], "x=1": [1, 2, 4, 5] if run == "is gone" else [1, 2, 3, 4, 5]}
    names = {name: [f"{name} {seed}" for seed in seeds] for name, seeds in old.items()}
    results = {"x=1 3": "another" if run == "has another result" else "1.0"}
    report = Look("2026-01-01T12:00:00+00:00", [1, 2, 3], 3.0, 3.0, names, results=results)
    later = study_after(tmp_path / "sweep", monkeypatch, there, *commands, report=report)
    assert [look.time for look in later.distinct[:-1]] == [report.time]
    assert later.looks.share() == FURTHER
    late = report._replace(time="2026-01-01T10:30:00+00:00")
    again = study_after(tmp_path / "early", monkeypatch, there, *commands, report=late)
    assert len(again.distinct) == (3 if run == "has another result" else 2), "that run ended after the report"


def test_runs_that_were_trained_again_after_a_second_command_are_not_those_that_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report leaves out the seed that the second command added. It is the same look only with the same results."""
    three, four = both(1, 2, 3), {"x=0": [4], "x=1": [4]}
    first = study_after(tmp_path / "first", monkeypatch, three, (three, None, 6), (four, None, 2))
    assert first.looks.share() == 1, "the look at the start of the second command is this one"
    commands: list[Command] = [(three, None, 6), (four, None, 2), (three, None, 6)]
    again = study_after(tmp_path / "again", monkeypatch, three, *commands)
    assert again.looks.share() == 1, "the same results"
    other = study_after(tmp_path / "other", monkeypatch, three, *commands, results={3: 2.0})
    assert other.looks.share() == pytest.approx(FURTHER**2), "one look before seed 4, and one before the last command"
    assert {*other.earlier[0].runs} == {f"{folder} (1.0)" for folder in other.runs}


def test_each_training_with_other_results_is_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders are deleted, and the same command trains the runs again, with other code. No report was written."""
    three = both(1, 2, 3)
    for number in (1, 2, 3):
        commands: list[Command] = [(three, None, 6)] * number
        same = study_after(tmp_path / f"same {number}", monkeypatch, three, *commands)
        assert same.looks.share() == 1
        results = {day: float(day) for day in range(1, number + 1)}
        other = study_after(tmp_path / f"other {number}", monkeypatch, three, *commands, results=results)
        assert other.looks.share() == pytest.approx(FURTHER ** (number - 1))
        results[number + 1] = 9.0
        four = both(4, 5, 6)
        gone = study_after(tmp_path / f"gone {number}", monkeypatch, four, *commands, (four, None, 6), results=results)
        assert gone.looks.share() == pytest.approx(FURTHER**number), "also if the runs are gone"


def test_levels_that_are_added_later_do_not_give_earlier_looks_their_level_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three seeds, then two more, then a level, then another one. The runs of the first two levels stay."""
    old, more = both(1, 2, 3), both(4, 5)
    commands: list[Command] = [(old, None, 6), (more, None, 4)]
    there, shares = both(1, 2, 3, 4, 5), list[float]()
    for level in (None, "x=2", "x=3"):
        if level:
            commands.append(({level: [1, 2, 3, 4, 5]}, None, 5))
            there |= {level: [1, 2, 3, 4, 5]}
        later = study_after(tmp_path / f"{level}", monkeypatch, there, *commands)
        shares.append(
            later.share(frozenset(each for each, run in later.runs.items() if run.setting in ("x=x=0", "x=x=1")))
        )
    assert shares == pytest.approx([0.2, 0.2 + 0.04, 0.2 + 0.04 + 0.008]), "the shares of all looks at these runs"


def test_a_command_that_was_stopped_before_a_run_began_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = both(1, 2, 3), {"x=2": [1, 2, 3]}
    later = study_after(tmp_path / "sweep", monkeypatch, old, (old, None, 6), (new, None, 0), missing=new)
    assert later.looks.share(0) == 1


def test_a_first_report_about_chosen_runs_is_the_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal showed the results of all eight seeds. Whoever leaves out one of them may have chosen it."""
    eight = both(*range(1, 9))
    every = study_after(tmp_path / "every", monkeypatch, eight, (eight, None, 16))
    assert (every.looks.share(), every.earlier) == (1, [])
    for part in (both(*range(1, 8)), both(5, 6, 7), eight | {"x=1": [*range(1, 8)]}):
        chosen = study_after(tmp_path / f"{part}", monkeypatch, part, (eight, None, 16))
        assert chosen.looks.share() == FURTHER
        [look] = chosen.earlier
        assert len(look.runs) == 16
    planned = study_after(tmp_path / "planned", monkeypatch, both(*range(1, 8)), (eight, 8, 16))
    assert planned.looks.share() == FURTHER


def test_a_copy_without_the_list_of_ended_runs_is_said(runs: pd.DataFrame, tmp_path: Path) -> None:
    sweep = tmp_path / "sweeps" / "noise"
    plan = PlannedStudy("2026-02-01T00:00:00+00:00", "noise_lb_seed", [], [0, 1, 2], None, ["a"])
    PlansRecord(plans=[plan]).write(sweep / "plans.json")
    [warning] = warnings_of_looks(study_of(runs))
    assert warning.startswith("**There is no `ended.jsonl` beside `plans.json`.** So this report does not know")
    (sweep / ENDED_FILE).touch()
    assert list(warnings_of_looks(study_of(runs))) == []


def test_a_study_of_other_settings_that_was_deleted_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pilot: Sets = {"y=0": [1, 2], "y=1": [1, 2]}
    three = both(1, 2, 3)
    later = study_after(tmp_path / "sweep", monkeypatch, three, (pilot, 2, 4), (three, 3, 6))
    assert (later.planned, later.earlier) == (3, [])


def test_each_earlier_look_with_another_verdict_is_named_with_its_own_seeds(runs: pd.DataFrame) -> None:
    inputs = collect_inputs(runs)[0]
    claim = next(each for each in inputs.judgments if not each.decided)
    text = claim.title
    looks = [
        study({"x=0": seeds, "x=1": seeds}).present._replace(
            time=f"2026-01-0{day}", seeds=4 * day, decided={name_in_looks(claim, inputs): verdict}
        )
        for day, (seeds, verdict) in enumerate((([0, 1, 2, 3], "supported"), ([4, 5, 6, 7], "contradicted")), 1)
    ]
    first, second = warnings_of_decisions(inputs._replace(study=replace(inputs.study, earlier=looks)))
    assert f"with 4 seeds on average, “{text}” was supported" in " ".join(first.split())
    assert f"with 4 seeds on average, “{text}” was contradicted" in " ".join(second.split())


def test_a_margin_is_judged_at_the_level_of_the_look_if_the_first_look_had_it(
    runs: pd.DataFrame, tmp_path: Path
) -> None:
    metric, first = "val/perplexity", runs[runs["seed"] < 3]
    options = ReportOptions(margins={metric: "3%"})
    early = collect_inputs(first, options)[0]
    [fact] = margin_facts(early)
    assert fact == ("Margin", "3% of val/perplexity, given at the first look at these runs")
    alone = collect_inputs(runs, options)[0].contrasts["p TOST Holm"]
    _with_look(early)
    path = tmp_path / "sweeps" / "noise" / "looks.json"
    [look] = LooksRecord.read(path).looks["noise_lb_seed"]
    assert look.margins == {metric: "3%"}
    later = collect_inputs(runs, options)[0]
    [seen] = later.study.earlier
    shared = (alone.dropna() / FURTHER).clip(upper=1)
    assert later.contrasts["p TOST Holm"].dropna().tolist() == pytest.approx(shared.tolist())
    assert list(warnings_of_margins(later)) == []
    assert Study(earlier=[seen]).late({metric: "3.0%"}) == [], "the same amount"
    assert Study(earlier=[seen]).late({metric: "3"}) == [metric], "units, and not a share"
    assert Study(earlier=[seen._replace(margins={metric: "0.50"})]).late({metric: 0.5}) == []
    assert Study(earlier=[seen._replace(margins={metric: "much"})]).late({metric: 0.5}) == [metric]
    LooksRecord(looks={"noise_lb_seed": [look._replace(margins={})]}).write(path)
    with pytest.raises(
        ValueError, match=f"^--margin {metric}=0%: must be positive"
    ):  # also if it came too late to judge
        collect_inputs(runs, options._replace(margins={metric: "0%"}))
    late = collect_inputs(runs, options)[0]
    assert "p TOST" not in late.contrasts or late.contrasts["p TOST"].isna().all()
    [warning] = warnings_of_margins(late)
    assert "**The margin 3% of val/perplexity was not given at the first look" in warning
    assert margin_facts(late) == []


def test_a_planned_look_keeps_the_level(runs: pd.DataFrame) -> None:
    early = study_of(runs[runs["seed"] < 3].assign(planned_seeds=5))
    study = replace(study_of(runs), planned=5, earlier=[early.present._replace(time="2026-01-01")])
    assert study.looks.share() + spent(0.6) == pytest.approx(1)
    assert study.share(group_of(runs)) == study.share(group_of(runs[runs["noise"] < 0.5])) == study.looks.share()
    [warning] = warnings_of_looks(study)
    assert "look 2 at these runs: a setting has 5 of the 5 planned seeds, on average" in warning.replace("\n", " ")


def test_an_early_look_has_one_level_everywhere(runs: pd.DataFrame) -> None:
    """The number by which 5 % are divided is no whole number at an early look, and nothing rounds it."""
    early = collect_inputs(runs.assign(planned_seeds=8))[0]
    claims = early.claims[early.claims["tests"] > 0]
    divided = [each.tests / each.share / each.looks[0] for each in early.families if each.name in OF_CLAIMS]
    assert all(each % 1 > 0.01 for each in divided)
    assert sorted({*claims["tests"]}) == pytest.approx(sorted({*divided}))
    text = "\n".join(map(block_as_markdown, claim_verdicts(early)))
    assert f"is multiplied by up to {max(divided):.3g} to give" in text.replace("\n", " ")
    for each in divided:
        assert f"its level in this look is {level_text(each)}" in text
    notes = {*re.findall(r"at the level ([\d.]+ %)", text)}
    assert notes
    assert notes <= {*map(level_text, divided)}


def test_cards_say_which_seeds_are_left_and_what_more_cost(runs: pd.DataFrame) -> None:
    [inputs] = collect_inputs(runs.assign(planned_seeds=6))
    text = "\n".join(map(block_as_markdown, answer(inputs)))
    assert "1 of the 6 planned seeds is left." in text
    price = "more than the 6 planned seeds. A report on so many seeds is stricter: see “More seeds”."
    for more, seeds in re.findall(rf"About (\d+) more seeds? would [^.]*\. That makes (\d+) seeds, {price}", text):
        assert int(seeds) == 5 + int(more)
        break
    else:
        pytest.fail("no advice says how many seeds there are with those that it advises")
    assert "; About" not in text
    [first] = cards(inputs.judgments[-1:], lambda each: "train.py seed=7", lambda each: price)
    assert first.advice.endswith(f", if the true difference is the estimated one. {price} `train.py seed=7`")
    [second] = cards(inputs.judgments[-1:], lambda each: "train.py seed=7")
    assert second.advice.endswith(", if the true difference is the estimated one: `train.py seed=7`")
    assert block_as_markdown(Cards([second])).count(f". {second.advice}") == 1


def look_with(field: str) -> str:
    """Return the text of a record of one look, of which a field is replaced."""
    look = {"time": "2026-01-01", "seeds": [1, 2], "mean_seeds": 2, "planned": 2, "runs": {}}
    return f'{{"looks": {{"a": [{json.dumps(look)[:-1]}, {field}}}]}}}}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("looks.json", '{"looks": {"noise_lb_', "incomplete or not JSON"),
        ("looks.json", '{"format": 1, "looks": {}}', "written by another version"),
        (
            "looks.json",
            '{"looks": {"a": [{"time": "", "seeds": [1, 2], "mean_seeds": 2, "planned": 2, "runs": {"c": 3}}]}}',
            "must be a list",
        ),
        (
            "looks.json",
            '{"looks": {"a": [{"time": "", "seeds": [1, 2], "mean_seeds": 2, "planned": 2, "runs": ["c"]}]}}',
            "must be an object",
        ),
        (
            "looks.json",
            '{"looks": {"a": [{"time": "", "seeds": 2, "mean_seeds": 2, "planned": 2, "runs": {}}]}}',
            "must be a list",
        ),
        (
            "looks.json",
            '{"looks": {"a": [{"time": "", "mean_seeds": 2, "planned": 2, "runs": {}}]}}',
            "seeds is missing",
        ),
        (
            "looks.json",
            '{"looks": {"a": [{"time": "", "seeds": [-1], "mean_seeds": 2, "planned": 2, "runs": {}}]}}',
            "seeds has -1",
        ),
        ("looks.json", look_with('"planned": Infinity'), "planned has inf: must be from 0 to 1000000000"),
        ("looks.json", look_with('"planned": 1e300'), "planned has 1e+300: must be from 0 to 1000000000"),
        ("looks.json", look_with('"mean_seeds": Infinity'), "mean_seeds has inf: must be from 0 to"),
        ("looks.json", look_with('"share": NaN'), "share has nan: must be from 0 to 1"),
        ("looks.json", look_with('"share": 50'), "share has 50"),
        ("looks.json", look_with('"share": -1'), "share has -1"),
        ("looks.json", look_with('"runs": {"c": ["a\\u0000b"]}'), r"runs has 'a\x00b': must be names of folders"),
        ("plans.json", "[]", "must be an object"),
        (
            "plans.json",
            f'{{"format": {FORMAT}, "plans": [{{"time": "2026-01-01T10:00:00", "experiment": "x", "claims": [], '
            '"seeds": [1], "planned_seeds": null, "runs": []}]}',
            "plans[0].time has '2026-01-01T10:00:00': must be a time such as",
        ),
        (
            "ended.jsonl",
            '{"time": "now", "run": "a", "setting": "b", "seed": 1, "folder": "c", "result": "1.0"}\n',
            "line 1: time has 'now': must be a time",
        ),
        (
            "ended.jsonl",
            '{"time": "2026-01-01T00:00Z", "run": "a", "setting": "b", "seed": "1", "folder": "c", "result": "1.0"}\n',
            "line 1: seed is '1'",
        ),
        ("ended.jsonl", "[]\n", "line 1: the content is []: must be an object"),
    ],
)
def test_a_damaged_file_is_named_and_kept(
    name: str, content: str, message: str, runs: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "sweeps" / "noise" / name
    path.write_text(content.replace('{"looks"', f'{{"format": {FORMAT}, "looks"'))
    damaged = path.read_text()
    with pytest.raises(RecordError) as error:
        study_of(runs)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "move this file away" in str(error.value)
    if name == "looks.json":
        with pytest.raises(RecordError):
            record_look(runs, study_of(runs))
    assert path.read_text() == damaged


def test_claims_that_were_changed_for_the_same_runs_are_shown(runs: pd.DataFrame, tmp_path: Path) -> None:
    beside = tmp_path / "sweeps" / "before"
    beside.mkdir()
    plan = PlannedStudy("2026-01-02T00:00:00+00:00", "noise_lb_seed", [asdict(CLAIM)], [0, 1], 5, ["a", "b"])
    other = plan._replace(time="2026-01-01T00:00:00+00:00", claims=[asdict(CLAIM) | {"kind": "lower"}], runs=["b", "c"])
    PlansRecord(plans=[plan]).write(tmp_path / "sweeps" / "noise" / "plans.json")
    PlansRecord(plans=[other]).write(beside / "plans.json")
    study = study_of(runs)
    assert study.changed == [(other, 1)]
    told = next(warnings_of_looks(study)).replace("\n", " ")
    assert "noise_lb_seed had other claims (1), planned for 1 of these runs" in told
    [(name, fact)] = planned_facts(study)
    assert name == "Planned"
    assert plan.digest not in fact, "a text shows eight characters"
    written = "1 claim, seeds {}, planned_seeds=5, written down {}, before the first step, fingerprint {}"
    of_first = written.format("0, 1", plan.time, plan.digest[:8])
    assert fact == f"{of_first}; planned number of seeds: none"
    later = plan._replace(time="2026-01-03T00:00:00+00:00", seeds=[2], runs=["d"])
    PlansRecord(plans=[plan, later]).write(tmp_path / "sweeps" / "noise" / "plans.json")
    assert study_of(runs).changed == [(other, 1)]  # also after seeds were added
    elsewhere = tmp_path / "other_out" / "noise"
    elsewhere.mkdir(parents=True)
    (beside / "plans.json").rename(elsewhere / "plans.json")
    assert study_of(runs).changed == [(other, 1)]
    PlansRecord(plans=[other._replace(time="2026-01-04T00:00:00+00:00")]).write(elsewhere / "plans.json")
    assert study_of(runs).changed == []  # the claims of that later plan were changed, not these
    [(_, fact)] = planned_facts(replace(study, plans=[plan, later]))
    assert f"{of_first}; the newest of 2 plans: {written.format('2', later.time, later.digest[:8])}; " in fact
    [(_, fact)] = planned_facts(replace(study, plans=[plan, later._replace(planned_seeds=3)], planned=5))
    assert fact.endswith("; planned number of seeds: 5 (that of the first plan of which a run has ended)")
    assert plan.digest == plan._replace(time="later").digest != other.digest


def test_plans_about_another_factor_or_metric_are_no_changed_claims(runs: pd.DataFrame, tmp_path: Path) -> None:
    """Such plans share a cell of the base with these runs, and their claims could not be chosen by its results."""
    beside = tmp_path / "sweeps" / "before"
    beside.mkdir()
    plan = PlannedStudy("2026-01-02T00:00:00+00:00", "noise_lb_seed", [asdict(CLAIM)], [0, 1], 5, ["a", "b"])
    PlansRecord(plans=[plan]).write(tmp_path / "sweeps" / "noise" / "plans.json")

    def changed(**claim: str) -> int:
        earlier = [asdict(CLAIM) | {"text": "b"} | claim]
        other = plan._replace(time="2026-01-01T00:00:00+00:00", experiment="other", claims=earlier)
        PlansRecord(plans=[other]).write(beside / "plans.json")
        return len(study_of(runs).changed)

    assert changed(kind="lower") == 1, "the same factor and metric"
    assert changed(factor="router", text="a") == 1, "the same words"
    assert changed(factor="router") == changed(metric="val/accuracy") == 0


def test_claims_that_were_changed_when_seeds_were_added_are_shown(runs: pd.DataFrame, tmp_path: Path) -> None:
    old = PlannedStudy("2026-01-01T00:00:00+00:00", "noise_lb_seed", [asdict(CLAIM)] * 8, [0, 1], None, ["a", "b"])
    new = old._replace(time="2026-01-02T00:00:00+00:00", claims=[asdict(CLAIM)], seeds=[0, 1, 2], runs=["c"])
    PlansRecord(plans=[old, new]).write(tmp_path / "sweeps" / "noise" / "plans.json")
    (tmp_path / "sweeps" / "noise" / ENDED_FILE).touch()
    study = study_of(runs)
    assert study.changed == []
    [told] = warnings_of_looks(study)
    assert f"On {old.time}, noise_lb_seed was planned with 8 claims, and on {new.time}\nwith others" in told
    assert list(warnings_of_looks(replace(study, plans=[old, old._replace(seeds=[2])]))) == []
    turned = new._replace(claims=[asdict(CLAIM) | {"kind": "lower"}])
    [told] = warnings_of_looks(replace(study, plans=[old._replace(claims=[asdict(CLAIM)]), turned]))
    assert "with others: “a” had kind higher then, and has lower now. Each claim" in told
    [(_, fact)] = planned_facts(study)
    assert (
        f"8 claims, seeds 0, 1, written down {old.time}, before the first step, fingerprint {old.digest[:8]}; " in fact
    )
    written = f"1 claim, seeds 0, 1, 2, written down {new.time}, before the first step"
    assert f"{written}, fingerprint {new.digest[:8]}; " in fact
    for begun, which in (([0, 1], "the runs of seed 2"), ([1], "the runs of seeds 0, 2"), ([0, 1, 2], "1 of its runs")):
        started = runs["started"].mask(runs["seed"].isin(begun), "2026-01-01T12:00:00+00:00")
        [(_, fact)] = planned_facts(study_of(runs.assign(started=started)))
        assert f"{written} of {which}, fingerprint {new.digest[:8]}; " in fact


def test_without_records_beside_the_runs_the_report_says_that_it_takes_its_look_for_the_first() -> None:
    alone = study(both(1, 2))
    [(name, fact)] = planned_facts(alone)
    assert name == "Planned"
    assert "no record of a plan or of an earlier look was found beside the runs" in fact
    assert planned_facts(replace(alone, earlier=[alone.present])) == [
        ("Planned", "unknown: no record of a plan was found beside the runs")
    ]
    assert planned_facts(study(both(1))) == planned_facts(replace(alone, here=False)) == []


def test_the_planned_number_of_seeds_is_that_of_the_run_that_started_first() -> None:
    """The tables of a shipped study are enough to know it: there are no run records."""
    runs = pd.DataFrame(
        {
            "folder": ["elsewhere/b", "elsewhere/a"],
            "experiment": "one",
            "status": "finished",
            "seed": [2, 1],
            "started": ["2026-01-02", "2026-01-01"],
            "planned_seeds": [9, 5],
        }
    )
    assert study_of(runs).planned == 5
    assert study_of(runs.assign(planned_seeds=None)).planned is None
    assert study_of(runs.drop(columns="planned_seeds")).planned is None
