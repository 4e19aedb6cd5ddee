"""Tests of the tables of a study in a repository: they hold what the run folders hold that a page needs."""

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from run_folders import change_record, write_metrics, write_record

from moe.analysis import pages
from moe.analysis.claims import judge_planned
from moe.analysis.report.markdown import block_as_markdown
from moe.analysis.sentences import effects_in_words
from moe.results.shipped import EVALS, RUNS, ship
from moe.results.table import load_runs
from moe.runs.planned import digest_of_plan

CLAIM = {"text": "noise helps", "metric": "val/loss", "factor": "noise", "levels": [0.5], "kind": "lower", "than": [0]}
DEFAULTS = {"source": "our own", "within": {}, "direction": None, "margin": None, "size": [], "at": None}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Return the folder of six finished runs and a failed one, with values that a table could mistake for others."""
    folder = tmp_path / "sweep"
    for seed in (1, 2, 3):
        for noise in (0.0, 0.5):
            run = folder / f"noise={noise},seed={seed}"
            run.mkdir(parents=True)
            temp = {"router": {"_target_": "a.B", "temp": 1.5, "gate": "none", "flag": True}} if noise else {}
            config = {"seed": seed, "noise": noise, "lists": [1, 2], "name": "12e5", "out": str(tmp_path), **temp}
            write_record(run, config=config | {"claims": [CLAIM | DEFAULTS]}, commit="1234567", data={})
            write_metrics(run, {"val/loss": 3.0 - noise + 0.01 * seed * (1 + noise), "routing/load_cv": None})
            lines = [{"kind": "eval", "step": step, "val/loss": 4.0 - step, "other": 1} for step in (0, 1)]
            (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change_record(folder / "noise=0.5,seed=3", status="failed", error='it, "broke"')
    return folder


def test_the_tables_that_are_shipped_are_those_of_the_run_folders(sweep: Path, tmp_path: Path) -> None:
    runs = load_runs([sweep])
    ship(runs, tmp_path / "shipped")
    again, past = pages.read_shipped(tmp_path / "shipped")
    assert again["folder"].tolist() == [f"sweep/{name}" for name in runs["run"]]
    pd.testing.assert_frame_equal(again.drop(columns="folder"), runs.drop(columns=["folder", "out"]))
    assert str(tmp_path) not in again.to_csv()
    verdicts = judge_planned(runs)
    assert verdicts["verdict"].tolist() == ["supported"]
    assert verdicts["n"].tolist() == [2]
    pd.testing.assert_frame_equal(judge_planned(again), verdicts)
    assert past.evals["val/loss"].tolist() == [4.0, 3.0] * 6
    assert set(past.evals["folder"]) == set(again["folder"])


def test_a_sweep_that_is_shipped_again_replaces_its_tables(sweep: Path, tmp_path: Path) -> None:
    """The same runs have the same bytes, and a longer sweep has each run once. Equal names would be counted twice."""
    tables = [tmp_path / "shipped" / name for name in (RUNS, EVALS)]
    whole = load_runs([sweep])
    ship(whole[whole["seed"] < 3], tmp_path / "shipped")
    short = [table.read_bytes() for table in tables]
    ship(whole[whole["seed"] < 3], tmp_path / "shipped")
    assert [table.read_bytes() for table in tables] == short
    ship(whole, tmp_path / "shipped")
    again, past = pages.read_shipped(tmp_path / "shipped")
    assert again["folder"].is_unique
    assert (len(again), len(past.evals)) == (6, 12)
    shutil.copytree(sweep, tmp_path / "copy" / "sweep")
    with pytest.raises(ValueError, match=r"would both be called sweep/noise=0.0,seed=1: ship one"):
        ship(load_runs([sweep, tmp_path / "copy"]), tmp_path / "shipped")
    assert len(pages.read_shipped(tmp_path / "shipped")[0]) == 6


PLAN = {"time": "2025-12-31T23:59:30+00:00", "power": 0.8, "most_seeds": 32, "effect": "0.5%", "runs": 20}
PLAN |= {"effects": {"val/loss": "0.01"}, "seeds": [1, 2, 3, 4, 7], "settings": 4, "runs_that_tune": 2}
PLAN |= {"command": "python train.py"}


def with_digest(plan: dict[str, Any]) -> dict[str, Any]:
    return plan | {"digest": digest_of_plan(plan)}


def test_a_page_holds_what_the_tables_show_between_its_marks(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "one.md"
    assert pages.main(["ship", str(sweep), str(page.with_suffix(""))]) == 0
    page.write_text(f"# Title\n\n{pages.BEGIN}\nearlier words\n{pages.END}\n\nThe end.\n")
    claim = {"text": "noise helps", "metric": "val/loss", "kind": "lower", "spread": 0.01, "effect": 0.0123}
    claim |= {"seeds": 5, "reachable": True, "seeds_low": 4, "seeds_high": None}
    plan = with_digest(PLAN | {"claims": [claim]})
    (page.with_suffix("") / pages.PLAN).write_text(json.dumps(plan))
    assert pages.main(["write", str(page.parent)]) == 0
    text = page.read_text()
    assert "80 % of cases" in text
    assert (
        "The plan was made on 2025-12-31 at 23:59 UTC, before the first run started (on 2026-01-01 at 00:00 UTC). The "
        f"fingerprint of the plan is {plan['digest'][:8]}. The smallest difference that mattered is 0.5 % of the "
        "mean, but 0.01 nats for val/loss. It names the seeds 1 to 4, 7 and 20 runs: 4 settings with each seed, and 2 "
        "that tune. Trained "
        "were the seeds 1 to 3."
    ) in text
    assert "`moe plan` said before the runs how many" in text.replace("\n", " ")
    assert "| noise helps | val/loss | 0.0123 | 5 (4 to over 32) | 3 |" in text
    assert text.startswith("# Title\n\n<!--")
    assert text.endswith("-->\n\nThe end.\n")
    assert "earlier words" not in text
    assert "noise helps (our own): **supported**" in text
    assert "noise helps: **supported**" not in text, "the cards say the same"
    assert "1 of 6 runs did not finish" in text
    assert "| 0.0 | 3.020 ± 0.010 |" in text
    assert "| 0 | 4.000 | 4.000 | 4.000 |" in text
    assert "| 1 | 3.000 | 3.000 | 3.000 |" in text
    old = {key: value for key, value in plan.items() if key != "digest"}
    for damaged, message in (
        ("[]", "is no plan of `moe plan`"),
        ("{}", "is no plan of `moe plan`"),
        ("{", "is no plan of `moe plan`"),
        (json.dumps(with_digest(PLAN | {"claims": [claim | {"effect": "much"}]})), "is no plan of `moe plan`"),
        (json.dumps(plan | {"power": 0.9}), "its fingerprint is "),
        (json.dumps(old), "this plan is older than fingerprints of plans and must be made again with `moe plan`\n"),
        (
            json.dumps(with_digest(PLAN | {"claims": [claim, claim | {"text": "b"}]})),
            "its claims must be those of the runs; “b” (lower, val/loss) is in one of the two alone\n",
        ),
        (json.dumps(with_digest(PLAN | {"claims": [claim | {"kind": "higher"}]})), "its claims must be those of"),
    ):
        (page.with_suffix("") / pages.PLAN).write_text(damaged)
        assert pages.main(["write", str(page.parent)]) == 2
        assert f"{page.with_suffix('') / pages.PLAN}: {message}" in capsys.readouterr().err
        assert page.read_text() == text
    (page.with_suffix("") / pages.PLAN).unlink()
    page.write_text("# Title\n")
    assert pages.main(["write", str(page.parent)]) == 2
    assert "must have the lines" in capsys.readouterr().err
    assert page.read_text() == "# Title\n"


def test_a_plan_without_a_pilot_is_in_standard_deviations() -> None:
    known = {"text": "a", "metric": "val/loss", "effect": 1.5, "spread": None, "seeds": 6, "reachable": True}
    unknown = known | {"text": "b", "effect": None, "seeds": None, "reachable": None}
    far = known | {"text": "c", "seeds": None, "reachable": False}
    claims = [each | {"seeds_low": None, "seeds_high": None} for each in (known, unknown, far)]
    plan = with_digest(PLAN | {"claims": claims, "seeds": [], "time": "2026-01-01T00:00:00+00:00"})
    runs = pd.DataFrame({"seed": [1, 2, 3], "status": "finished", "started": "2026-01-01T00:00:00+00:00"})
    _, made, text, table = map(block_as_markdown, pages.planned(plan, runs))
    assert "after the first run started (on 2026-01-01 at 00:00 UTC)." in made
    assert "No claim has a number of seeds, so it names none that decide. Trained were the seeds 1 to 3." in made
    assert text.startswith("`moe plan` said afterward how many seeds")
    assert text.endswith(
        "There was no pilot. So a distance is in standard deviations of the differences between runs of one seed (sd)."
    )
    assert "| claim | distance to the bound |" in table
    assert "| a | 1.5 sd | 6 |" in table
    assert "| b | – | unknown |" in table
    assert "| c | 1.5 sd | over 32 |" in table


@pytest.mark.parametrize(
    ("effect", "effects", "words"),
    [
        ("1%", {}, "1 % of the mean"),
        ("1.5sd", {}, "1.5 standard deviations of the differences between runs of one seed"),
        (
            "10%",
            {"test/loss": "0.02", "routing/load_cv": "5%"},
            "10 % of the mean, but 0.02 nats for test/loss and 5 % of the mean for routing/load_cv",
        ),
        ("0.1", {"routing/load_cv": "0.05"}, "0.1, but 0.05 for routing/load_cv"),
    ],
)
def test_the_effects_of_a_plan_have_their_units(effect: str, effects: dict[str, str], words: str) -> None:
    assert effects_in_words(effect, effects) == words


def test_findings_hold_the_verdicts_of_the_claims_that_they_name(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs" / "studies"
    ship(load_runs([sweep]), folder / "one")
    (folder / "one.md").write_text(f"{pages.BEGIN}\n{pages.END}\n")
    findings = folder.parent / pages.FINDINGS
    findings.write_text(
        "Before.\n<!-- one: noise helps --> \n> “noise helps”: an old verdict\n> my own words\n\nAfter.\n"
    )
    for _ in range(2):  # the second one changes nothing
        assert pages.main(["write", str(folder)]) == 0
        before, mark, verdict, *after = findings.read_text().splitlines()
        assert (before, mark) == ("Before.", "<!-- one: noise helps -->")
        assert after == ["> my own words", "", "After."]
        assert verdict.startswith("> “noise helps”: **supported**; noise 0.5 vs 0.0: validation loss 2.5")
    findings.write_text("<!-- one: noise hurts -->\n")
    capsys.readouterr()
    assert pages.main(["write", str(folder)]) == 2
    assert capsys.readouterr().err == "python -m moe.analysis.pages: findings.md: one has no claim 'noise hurts'\n"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (RUNS, lambda packed: packed[: len(packed) // 2], "cannot be read"),
        (RUNS, lambda packed: gzip.compress(b"folder,run\nx,y\n"), "lacks the column"),
        (
            RUNS,
            lambda packed: gzip.compress(gzip.decompress(packed).replace(b",3.0", b",three", 1)),
            "could not convert",
        ),
        (EVALS, lambda packed: b"", "cannot be read"),
        (
            EVALS,
            lambda packed: gzip.compress(gzip.decompress(packed).replace(b",0,", b",none,", 1)),
            "column step must",
        ),
    ],
)
def test_a_damaged_table_is_named_and_no_page_is_written(
    file: str, damage: Any, message: str, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "one.md"
    ship(load_runs([sweep]), page.with_suffix(""))
    path = page.with_suffix("") / file
    path.write_bytes(damage(path.read_bytes()))
    page.write_text(f"{pages.BEGIN}\n{pages.END}\n")
    assert pages.main(["write", str(page.parent)]) == 2
    told = capsys.readouterr().err
    assert str(path) in told
    assert message in told
    assert len(told.splitlines()) == 1
    assert page.read_text() == f"{pages.BEGIN}\n{pages.END}\n"


def test_the_pages_of_docs_hold_what_their_tables_show() -> None:
    folder = Path(__file__).parents[2] / "docs" / "studies"
    texts = pages.texts_of(folder)
    assert folder.parent / pages.FINDINGS in texts
    for page, text in texts.items():
        assert text == page.read_text(), f"python -m moe.analysis.pages write {folder}"


def sentences(page: Path) -> str:
    """Return the text of a page in HTML, without its scripts, its style and its pictures."""
    text = re.sub(r"(?s)<(script|style|svg)\b.*?</\1>", "", page.read_text())
    return " ".join(re.sub("<[^>]*>", " ", text).split())


@pytest.mark.usefixtures("undrawn")
def test_the_example_report_says_what_the_report_on_its_tables_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no look at any runs, so nothing is written but the page."""
    docs = Path(__file__).parents[2] / "docs"
    monkeypatch.chdir(tmp_path)
    assert pages.main(["report", str(docs / "studies" / "noise_lb_seed"), "report.html"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    said, command = sentences(tmp_path / "report.html"), (docs / "reports.md").read_text()
    assert len(said) > 20_000
    assert sentences(docs / "example-report" / "report.html") == said
    assert "python -m moe.analysis.pages report docs/studies/noise_lb_seed docs/example-report/report.html" in command
    assert pages.main(["report", "none", "other.html"]) == 2
    assert capsys.readouterr().err.startswith("python -m moe.analysis.pages: none/runs.csv.gz: cannot be read (")
    assert not Path("other.html").exists()
