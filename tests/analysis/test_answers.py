"""Tests of the answer to each part of a question, in reports about made-up runs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from run_folders import write_metrics, write_record

from moe.analysis.claims import judge_planned
from moe.analysis.league import League
from moe.analysis.learned import TOO_LITTLE
from moe.analysis.report.blocks import BulletList, Cards, Paragraph
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportInputs, ReportOptions, reference_levels
from moe.analysis.report.judgments import Judgment
from moe.analysis.report.markdown import block_as_markdown
from moe.analysis.report.question import question_of
from moe.analysis.report.sections import league
from moe.analysis.report.sections.answer import _numbers, answer, index_of_verdicts
from moe.analysis.report.sections.answers import NO_CLAIM, answers
from moe.analysis.report.sections.provenance import _value_text
from moe.analysis.report.sections.verdicts import claim_verdicts, contrast_verdicts
from moe.config.claim import ClaimConfig
from moe.config.question import text_of
from moe.results.learned import learned_little
from moe.results.sweep_tables import console_table
from moe.results.table import load_runs

WORSE = ClaimConfig("noise hurts", "val/perplexity", "noise", [0.5], "higher", "us", than=[0.0])
BALANCED = replace(WORSE, text="noise balances", metric="routing/load_cv", kind="lower")
ABSENT = replace(WORSE, text="much noise hurts", levels=[1.0])
QUESTION = [
    {"ask": "Does noise hurt,", "claims": ["noise hurts"]},
    {"ask": "and does it help the balance,", "claims": ["noise balances", "much noise hurts", "of another command"]},
    {"ask": "and why?"},
]


def inputs_of(
    place: Path,
    question: Any = QUESTION,
    experiment: str = "made_up",
    claims: Sequence[ClaimConfig] = (BALANCED, WORSE, ABSENT),
    levels: Sequence[float] = (0.0, 0.5),
    **facts: Any,
) -> ReportInputs:
    for seed, noise in product((1, 2, 3), levels):
        folder = place / experiment / f"{seed},{noise}"
        folder.mkdir(parents=True)
        config = {"seed": seed, "noise": noise, "claims": [*map(asdict, claims)], "question": question}
        write_record(folder, config=config, **facts)
        values = {
            "val/perplexity": 100 + seed + noise * (9 + 0.1 * seed),
            "routing/load_cv": 0.5 - noise * (seed - 1.5),
        }
        write_metrics(folder, values)
        (folder / "events.jsonl").touch()
    [inputs] = collect_inputs(load_runs([place]))
    return inputs


def test_each_part_is_answered_by_its_claims_and_not_by_the_most_certain_one(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path)
    found = dict(answers(inputs, question_of(inputs)))
    assert list(found) == ["Does noise hurt?", "Does it help the balance?", "Why?"]
    assert found["Does noise hurt?"].startswith(
        "“noise hurts” is supported: noise 0.5 instead of 0.0 raises the validation perplexity by 4.6 (+4.5%, 95 % int"
    )
    balance = found["Does it help the balance?"]
    assert balance.startswith("The runs do not decide “noise balances” (noise 0.5 vs 0.0, ")
    assert "more seeds would support it, if the true difference is the estimated one). Not tested: “much" in balance
    assert balance.endswith("“much noise hurts” (noise=1.0 is in no run).")
    assert found["Why?"] == NO_CLAIM
    shown = [block for block in answer(inputs) if isinstance(block, Paragraph | BulletList)]
    assert shown[0] == Paragraph("**Question:** Does noise hurt, and does it help the balance, and why?")
    assert isinstance(shown[2], BulletList)
    assert shown[2].items[0].startswith("**Does noise hurt?** “noise hurts” is supported: ")
    [_, table] = index_of_verdicts({"made_up": inputs})
    assert table.frame["answer"].tolist() == [" ".join(found.values())]


def test_a_report_warns_if_no_setting_is_better_than_a_unigram_model(tmp_path: Path) -> None:
    """The means are 102 and 106.6. The best run has 101, but what counts is the mean of a setting."""
    found = {}
    for unigram in (101.5, 102.1, None):
        inputs = inputs_of(tmp_path / str(unigram), unigram_perplexity=unigram)
        [_, index] = index_of_verdicts({"made_up": inputs})
        found[unigram] = learned_little(inputs.runs)
        last = console_table(inputs.loaded).splitlines()[-1]
        assert last == (found[unigram] or "6 of 6 runs finished")
        assert index.frame["answer"][0].startswith(found[unigram] or "“noise hurts”")
        second = [block.text for block in answer(inputs) if isinstance(block, Paragraph)][1]
        assert second.startswith(f"**{found[unigram]}**" if found[unigram] else "**Answer:**")
    assert found == {
        101.5: "In the mean over seeds, no setting is better than a unigram model (val perplexity 101.5): these models "
        "have learned too little for a verdict about their quality.",
        102.1: "",
        None: "",
    }


def test_claims_about_quality_are_not_judged_if_no_model_is_better_than_a_unigram_model(tmp_path: Path) -> None:
    """The load is judged all the same, and the claim about it does not share its 5 % with the others."""
    of_load = replace(WORSE, text="noise unbalances", metric="routing/load_cv")
    claims = (of_load, WORSE, replace(WORSE, text="alike", kind="equivalent", margin="1%"), ABSENT)
    enough, little = (
        inputs_of(tmp_path / str(unigram), claims=claims, unigram_perplexity=unigram) for unigram in (200.0, 101.0)
    )
    assert enough.claims["verdict"].tolist() == ["undecided", "supported", "contradicted", "not tested"]
    judged = little.claims.set_index("claim")
    assert judged["verdict"].tolist() == ["undecided", "not tested", "not tested", "not tested"]
    assert judged["reason"].tolist()[1:] == [TOO_LITTLE, TOO_LITTLE, "noise=1.0 is in no run"]
    assert judged["seeds needed"].isna().tolist() == [False, True, True, True]
    assert judge_planned(little.loaded)["verdict"].tolist() == judged["verdict"].tolist()
    blocks = list(answer(little))
    [cards] = [block.cards for block in blocks if isinstance(block, Cards)]
    [card] = [each for each in cards if each.text == "noise hurts"]
    assert card.verdict == "not tested"
    assert card.effect.endswith(", n=3"), "the first screen says once why"
    answered = " ".join(text for _, text in answers(little, question_of(little)))
    assert TOO_LITTLE not in answered
    assert "is supported" not in answered
    quality = little.contrasts["metric"] == "val/perplexity"
    assert little.contrasts.loc[quality, ["p", "p Holm", "p Welch", "p sign-flip"]].isna().all(axis=None)
    assert little.contrasts.loc[~quality, ["p", "p Holm"]].notna().all(axis=None)
    assert little.contrasts["difference"].notna().all(), "numbers stay"
    for unigram, told in ((200.0, True), (101.0, False)):
        of_three = inputs_of(tmp_path / f"{unigram} three", levels=(0.0, 0.2, 0.5), unigram_perplexity=unigram)
        assert of_three.variance[["p", "p GG", "p Holm"]].notna().any(axis=None) == told
    assert enough.contrasts["p"].notna().all()
    named = [block.text for block in blocks if isinstance(block, Paragraph) and "Best setting" in block.text]
    assert named == [f"**Best setting here:** not named, because {TOO_LITTLE}."]
    words = " ".join(map(block_as_markdown, [*contrast_verdicts(little), *claim_verdicts(little)]))
    assert "better" not in words.replace("no setting is better than a unigram model", "")
    assert words.count(TOO_LITTLE) == 0


def test_comparisons_have_the_reference_of_the_claims_unless_the_reader_names_one(tmp_path: Path) -> None:
    """Noise 0 would be the usual reference."""
    without = replace(WORSE, text="less noise helps", levels=[0.0], than=[0.5], kind="lower")
    inputs = inputs_of(tmp_path, claims=(without, BALANCED, replace(without, metric="routing/load_cv")))
    assert {*inputs.contrasts["reference"]} == {0.5}
    assert reference_levels(inputs) == {"noise": 0.5}
    words = " ".join(map(block_as_markdown, contrast_verdicts(inputs)))
    assert "The reference levels are noise=0.5: " in words
    [inputs] = collect_inputs(inputs.loaded, ReportOptions(references={"noise": 0.0}))
    assert {*inputs.contrasts["reference"]} == {0.0}


def test_a_report_warns_if_other_code_trained_some_of_the_settings(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path)
    runs, noisy = inputs.loaded, inputs.loaded["noise"] == 0.5

    def words(commits: pd.Series) -> str:
        [found] = collect_inputs(runs.assign(commit=commits))
        return " ".join(" ".join(map(block_as_markdown, answer(found))).split())

    assert "trained by the same code" not in words(noisy.map({True: "a" * 40, False: "a" * 40}))
    assert "trained by the same code" not in words(runs["seed"].map({1: "a" * 40, 2: "b" * 40, 3: "b" * 40}))
    told = words(noisy.map({True: "a" * 40, False: "b" * 40}))
    assert "**The settings were not all trained by the same code**: commits " in told
    assert "aaaaaaa (1 setting)" in told


def test_one_run_of_each_setting_is_compared_with_a_unigram_model_too(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, unigram_perplexity=101.0)
    [alone] = collect_inputs(inputs.loaded[inputs.loaded["seed"] == 3])
    words = " ".join(map(block_as_markdown, answer(alone)))
    assert words.count("In the mean over seeds, no setting is better than a unigram model") == 1
    assert f"not named, because {TOO_LITTLE}" in words


def test_the_answer_says_which_range_or_margin_a_claim_allows(tmp_path: Path) -> None:
    """The rise is 4.6 in the mean, and by 10 % of 102 it would be 10.2."""
    sized = [
        replace(WORSE, text=text, size=size) for text, size in (("much", ["5.1%", "15%"]), ("little", [4.5, 4.75]))
    ]
    alike = replace(WORSE, text="alike", kind="equivalent", margin="1%")
    claims = [*sized, alike]
    inputs = inputs_of(tmp_path, [{"ask": f"{each.text}?", "claims": [each.text]} for each in claims], claims=claims)
    found = dict(answers(inputs, question_of(inputs)))
    raised = "noise 0.5 instead of 0.0 raises the validation perplexity by 4.6"
    certain = "(+4.5%, 95 % interval 4.48 to 4.72, 3 seeds)"
    assert found == {
        "Much?": f"“much” is contradicted: {raised} {certain}, where +5.2 to +15.3 (+5.1% to +15.0%) is claimed.",
        "Little?": f"“little” is supported: {raised} {certain}, where +4.5 to +4.75 (+4.4% to +4.7%) is claimed.",
        "Alike?": f"“alike” is contradicted: {raised}, beyond the margin of 1.02 {certain}.",
    }


def test_runs_that_recorded_the_question_as_a_text_have_the_parts_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another text of the runs stands, and so does one whose experiment has no file."""
    (tmp_path / "options" / "experiment").mkdir(parents=True)
    monkeypatch.setenv("MOE_SEARCH_PATH", str(tmp_path / "options"))
    file = tmp_path / "options" / "experiment" / "mine.yaml"
    file.write_text("question:\n  - ask: Does noise hurt,\n    claims: [noise hurts]\n  - ask: and why?\n")
    same = inputs_of(tmp_path / "same", "Does noise hurt, and why?", "mine")
    assert [part.claims for part in question_of(same)] == [("noise hurts",), ()]
    for number, (text, experiment) in enumerate((("Does it hurt?", "mine"), ("Does noise hurt, and why?", "other"))):
        inputs = inputs_of(tmp_path / str(number), text, experiment)
        assert [each.ask for each in question_of(inputs)] == [text]
        assert answers(inputs, question_of(inputs)) == [], "nobody said which claims answer"
    file.write_text("question: [")
    assert text_of(question_of(same)) == "Does noise hurt, and why?"
    assert len(question_of(same)) == 1


def ranked(level: float = 0.05, /, **places: tuple[int, int]) -> League:
    """Return a league of routers, each with its best and its worst rank, over two seeds; "a" is the reference."""
    rows = [(3 + n / 10, n + 1, *ends, n / 10, -0.1, 0.3) for n, ends in enumerate(places.values())]
    columns = ["mean", "rank", "best rank", "worst rank", "difference", "low", "high"]
    table = pd.DataFrame(rows, index=list(places), columns=columns)
    table.loc["a", ["difference", "low", "high"]] = math.nan
    return League(table, pd.DataFrame({"a": [3.0, 3.0]}), level)


def test_the_best_of_a_league_is_named_with_its_lead_and_those_that_may_be_as_good() -> None:
    """Two sentences have the effect, its interval and the number of seeds; "c" is worse than "a" by its interval."""
    lead = "a has the lowest test loss: 3 nats per token in the mean of 2 seeds; that of b differs by "
    lead += "+0.100 [-0.100, 0.300]."
    together = "By intervals for all routers together, of differences and of ranks"
    certain = league._first(ranked(a=(1, 1), b=(2, 3), c=(2, 3)), "test loss", "a")
    assert certain == f"{lead} {together}, a is certainly the best of 3 routers."
    found = ranked(a=(1, 3), b=(1, 3), c=(1, 3))
    assert league._first(found, "test loss", "a") == (
        f"{lead} {together}, 2 other routers may be as good, because no router is shown to be better than they are: "
        "b and c."
    )
    found.table.loc["c", ["low", "high"]] = 0.1, 0.2
    assert league._first(found, "test loss", "a") == (
        f"{lead} {together}, one other router may be as good, because no router is shown to be better than it is: b. "
        "The other one is worse than some router."
    )
    four = ranked(a=(1, 3), b=(1, 3), c=(2, 4), d=(2, 4))
    assert league._first(four, "test loss", "a").endswith(" b. Each of the other 2 is worse than some router.")
    many = ranked(**dict.fromkeys("abcdefgh", (1, 8)))
    assert league._first(many, "test loss", "a").endswith(
        "7 other routers may be as good, because no router is shown to be better than they are: "
        "b, c, d, e, f and 2 other routers."
    )
    best = ranked(b=(1, 2), a=(1, 2))
    best.table.loc["b", "difference"] = -0.1
    assert "2 seeds; it differs from that of a by -0.100 [-0.100, 0.300]. By" in league._first(best, "test loss", "a")
    assert league._first(ranked(0.0, a=(1, 2), b=(1, 2)), "test loss", "a").endswith(
        "No router is shown to be better than another one, because there are no intervals."
    )
    of_one_seed = ranked(a=(1, 2), b=(1, 2))._replace(values=pd.DataFrame({"a": [3.0]}))
    alone = league._first(of_one_seed, "test loss", "a")
    assert "nats per token with one seed; " in alone
    assert alone.endswith("because there are no intervals.")


def test_routers_change_places_only_if_both_leagues_are_certain() -> None:
    one, turned = ranked(a=(1, 1), b=(2, 3), c=(2, 3)).table, ranked(c=(1, 1), b=(2, 2), a=(3, 3)).table
    assert league._changed_places({"x=1": one, "x=2": turned}) == "a is better than b at x=1, and worse at x=2"
    unsure = ranked(b=(1, 2), a=(1, 2), c=(3, 3)).table
    assert league._changed_places({"x=1": one, "x=2": unsure}) == ""


def test_the_units_of_all_judged_metrics_are_said_once(tmp_path: Path) -> None:
    """Percentages are explained if there are any."""
    inputs = inputs_of(tmp_path, "Does noise hurt?", "mine")
    loss = Judgment(
        "a", "undecided", "b", "lower", "loss", 3, -1.0, -2.0, 0.0, math.nan, 0.5, False, metric="test/loss"
    )
    perplexity, accuracy = loss._replace(metric="test/perplexity"), loss._replace(metric="val/accuracy", reference=10.0)
    [said] = _numbers(inputs._replace(judgments=[loss, loss, perplexity]))
    assert said == "**Numbers:** test loss is in nats per token; test perplexity is a number without a unit."
    [said] = _numbers(inputs._replace(judgments=[loss, accuracy]))
    assert said.endswith(
        "accuracy is a share of tokens. A percentage in parentheses is the difference as a share of the mean of the "
        "second setting."
    )
    assert list(_numbers(inputs._replace(judgments=[loss._replace(n=0)]))) == []


def test_a_report_shows_the_start_of_a_checksum() -> None:
    """A number and a short word stay as they are."""
    assert _value_text(["0a" * 32, "123456789012", "decade"]) == "0a0a0a0a, 123456789012, decade"
