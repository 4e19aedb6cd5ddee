"""Tests of the report: it counts every run, its sentences follow from the data, and no broken folder stops it."""

import base64
import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from run_folders import RECORD, change_record, write_cells, write_metrics, write_record
from statsmodels.stats.multitest import multipletests
from train_processes import ANALYZE, run_script

from moe.analysis.__main__ import main
from moe.analysis.figures.charts import charts
from moe.analysis.figures.curves import gradient_norms, learning_curves
from moe.analysis.figures.drawing import Drawing
from moe.analysis.figures.effects import factor_panels
from moe.analysis.figures.expert_grids import MeasuredRun
from moe.analysis.figures.forest import contrast_rows, forest
from moe.analysis.figures.layers import drop_by_position, layer_profile, layer_trends
from moe.analysis.figures.specialization_by_condition import regret_by_route
from moe.analysis.report.blocks import (
    MAX_ROWS,
    Attachment,
    BulletList,
    Cards,
    Details,
    Glossary,
    Heading,
    Interval,
    Paragraph,
    ReportBlock,
    StatusBar,
    TableBlock,
    Term,
    csv_file,
)
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.earlier import FILE, Listing
from moe.analysis.report.html import Page as HtmlPage
from moe.analysis.report.html import interval_picture
from moe.analysis.report.inputs import GRADIENT_METRICS, ReportInputs, ReportOptions
from moe.analysis.report.judgments import Judgment, cards
from moe.analysis.report.markdown import block_as_markdown, table_as_markdown
from moe.analysis.report.report import save_report, write_report
from moe.analysis.report.sections.answer import _warnings, answer
from moe.analysis.report.sections.asked import asked
from moe.analysis.report.sections.best_setting import about_same_settings, best_setting
from moe.analysis.report.sections.collapse import MEANING, NONE, NONE_TOLD, SHORT, collapse
from moe.analysis.report.sections.comparisons import condition_table
from moe.analysis.report.sections.cost import about_speeds
from moe.analysis.report.sections.headline import headline
from moe.analysis.report.sections.over_training import contrasts_at_shares, contrasts_over_training
from moe.analysis.report.sections.overview import _tuning, what_was_run
from moe.analysis.report.sections.provenance import differences
from moe.analysis.report.sections.routing import LAYERS_DIFFER, routing_by_layer
from moe.analysis.report.sections.setup import setup
from moe.analysis.report.sections.terms import terms
from moe.analysis.report.sections.verdicts import contrast_verdicts
from moe.analysis.statistics import contrasts
from moe.analysis.studies.published import read_published
from moe.api import compare
from moe.checks import ConfigError
from moe.config.claim import ClaimConfig
from moe.files import sha256
from moe.results.conditions import with_causality
from moe.results.table import load_runs, read_event_tables
from moe.runs.collapse import Collapse

ROOT = Path(__file__).parents[2]

HIGHER = asdict(ClaimConfig("noise hurts", "val/perplexity", "noise", [0.5], "higher", "us", than=[0.0]))

Analyze = Callable[..., subprocess.CompletedProcess[str]]


def write_run(
    folder: Path,
    metrics: dict[str, float],
    *,
    causal: bool = True,
    status: str = "finished",
    variant: str | None = None,
    **keys: object,
) -> None:
    folder.mkdir(parents=True)
    router = "topk" if causal else "expert_choice"
    write_record(
        folder,
        status=status,
        error="boom\ntrace" if status == "failed" else None,
        causal=causal,
        commit="abc1234",
        choices={"router": router, "variant": variant},
        config=keys,
        seconds=2.0,
        train_seconds=1.0,
        peak_memory_gb=None,
        parameters={"total": 1, "active": 1, "trainable": 1},
    )
    write_metrics(folder, metrics)
    loss = metrics.get("val/loss", 1.0)
    events = [
        {"kind": "eval", "step": step, "val/loss": loss + 4 * math.exp(-step / 100)} for step in range(0, 401, 100)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


class Page(HTMLParser):
    """Parser of report.html in a folder. The only links are to parts of the page and to tables that it contains."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.sources: list[str] = []
        self.files: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.folder = folder
        self.feed((folder / "report.html").read_text())
        self.tables = self.tags.count("table")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.sources += [value or "" for name, value in attrs if name == "src"]
        if tag in ("h1", "h2", "h3", "h4"):
            self.titles.append("")
        values = {name: value or "" for name, value in attrs}
        if not values.get("href", "#").startswith("#"):
            kind, content = values["href"].split(",")
            assert kind == "data:text/csv;base64"
            files = [path.read_bytes() for path in self.folder.rglob(values["download"])]
            assert base64.b64decode(content) in files
            self.files.append(values["download"])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.titles and not self.titles[-1]:
            self.titles[-1] = data.strip()


@pytest.mark.usefixtures("undrawn")
def test_no_test_is_made_on_runs_that_a_search_chose(tmp_path: Path) -> None:
    """The report names the best settings of a search, but has no verdicts, contrasts or analysis of variance."""
    sweep = tmp_path / "searched"
    cells = {f"lb={lb},seed={seed}": {"lb": lb, "seed": seed} for lb in (0.1, 0.02, 0.3) for seed in (1, 2)}
    for name, keys in cells.items():
        write_run(sweep / name, {"val/loss": 1 + keys["lb"] + keys["seed"] / 100}, **keys)
    write_cells(sweep, cells, search="minimize val/loss")
    runs = load_runs([sweep])
    text = write_report(runs, tmp_path / "out").read_text()
    titles = re.findall("^##+ (.*)$", text, re.MULTILINE)
    assert titles[:4] == ["Search", "Settings that were tried", "Conditions", "Learning curves"]
    assert not {"Verdicts", "Contrasts, paired by seed", "Analysis of variance within seeds"} & set(titles)
    assert "This report makes no test on them" in text.replace("\n", " ")
    best = text.split("## Search")[1].split("## Settings")[0]
    assert re.findall(r"^\| (0\.\d+) \|", best, re.MULTILINE) == ["0.02", "0.1", "0.3"]
    with pytest.raises(ConfigError, match="a search to minimize val/loss chose these runs by results, so that no test"):
        compare(runs)


@pytest.mark.usefixtures("undrawn")
def test_runs_that_a_search_trained_too_are_named_and_left_out_of_the_tests(tmp_path: Path) -> None:
    """An ordinary grid over the settings that a search found has the runs of the search among its own."""
    sweep = tmp_path / "searched"
    cells = {f"lb={lb},seed={seed}": {"lb": lb, "seed": seed} for lb in (0.1, 0.02) for seed in range(1, 6)}
    for name, keys in cells.items():
        write_run(sweep / name, {"val/loss": 1 + keys["lb"] + keys["seed"] / 100}, **keys)
    write_cells(sweep, cells)
    ordinary = json.loads((sweep / "sweep.json").read_text())
    search = {"name": "found", "factors": [], "fixed": {}, "search": "minimize val/loss"}

    def searched(found: list[str]) -> str:
        grids = [*ordinary["grids"], search | {"cells": found}] if found else ordinary["grids"]
        (sweep / "sweep.json").write_text(json.dumps(ordinary | {"grids": grids}))
        inputs = collect_inputs(load_runs([sweep]))
        compared = next((part.contrasts["n"].max() for part in inputs if len(part.contrasts)), 0)
        assert compared == 5 - len(found) if len(found) < len(cells) else compared == 0
        return write_report(load_runs([sweep]), tmp_path / "out").read_text().replace("\n", " ")

    text = searched([name for name in cells if name in ("lb=0.02,seed=1", "lb=0.02,seed=2")])
    assert text.count("Settings from a search") == 1
    assert "also trained these runs: lb=0.02 (seed 1, 2). Settings" in text
    assert "also trained these runs: lb=0.1 (seed 1, 2, 3, 4, 5); lb=0.02" in searched([*cells])
    assert "Settings from a search" not in searched([])


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Return the sweep folder of the 18 published runs, with as many other metrics as a real run has."""
    sweep = tmp_path / "multirun" / "noise_lb_seed"
    for row in read_published("noise_runs").itertuples():
        name = f"lb={row.load_balancing_weight},noise={row.noise_std},seed={row.seed}"
        metrics = {f"routing/entropy/layer{layer:02d}": 0.5 for layer in range(150)} | {
            "val/loss": row.val_loss,
            "val/perplexity": row.val_perplexity,
            "val/accuracy": row.val_accuracy,
            "routing/load_cv/pooled": row.expert_usage_cv,
        }
        write_run(sweep / name, metrics, seed=row.seed, noise=row.noise_std, lb=row.load_balancing_weight)
    return sweep


def test_the_published_runs_give_the_published_verdicts(published: Path, tmp_path: Path) -> None:
    text = write_report(load_runs([published]), tmp_path / "out", ReportOptions(references={"lb": 0.01})).read_text()
    assert (
        "noise 0.1 vs 0.0 at lb=0.01: +1.15 validation perplexity [0.967, 1.34], p=0.0014 (Holm 0.025), n=3: **worse**"
        in text
    )
    assert "p=0.017 (Holm 0.25), n=3: **undecided**" in text
    family = "comparisons that nobody planned (contrasts, and terms of the analysis of variance)"
    assert f"20 tests of {family} share 5 %, 0.25 % each." in text
    assert "lb 0.0 vs 0.01 at noise=0.0: +0.307 validation perplexity [-1.72, 2.33], p=0.58 (Holm 1), n=3: **un" in text
    assert "**undecided**, smallest detectable effect 12 validation perplexity (6.2 to 75) at the level 0.25 %" in text
    assert text.count("the **smallest detectable effect** is the true difference that so many seeds") == 1
    assert "| topk | 18 | 18 |" in text
    assert "(ddof=1)" in text
    names = {
        "report.md",
        "report.html",
        "runs.csv",
        "conditions.csv",
        "contrasts.csv",
        "anova.csv",
        "progress.csv",
        "noise_lb.png",
        "learning_curves.png",
        "contrasts_val_perplexity.png",
        "contrasts_routing_load_cv_pooled.png",
        "layer_profile.png",
        "report_files.json",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert "- layers_routing_load_cv: not drawn, no evaluation has routing/load_cv by layer" in text
    assert "- drop_by_position: not drawn, no finished run has a capacity limit" in text
    page = Page(tmp_path / "out")
    assert page.titles == re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    assert page.tables == len(re.findall(r"^\| (?::---|---:)", text, flags=re.MULTILINE))
    linked = re.findall(r"\]\(([^)]*)\)", text)
    assert set(linked) == names - {"report.md", "report.html", "report_files.json"}
    assert page.files == [name for name in linked if name.endswith(".csv")], "report.html contains the tables"
    for sentence in re.findall(r"^- (.*)$", text, flags=re.MULTILINE):
        assert re.sub(r"\*\*|`", "", sentence).partition(": ")[2] in page.text or "**" in sentence
    assert len(pd.read_csv(tmp_path / "out" / "contrasts.csv")) == 14
    for name in ("noise_lb", "learning_curves", "contrasts_val_perplexity", "layer_profile"):
        pixels = matplotlib.image.imread(tmp_path / "out" / f"{name}.png")
        assert pixels.std() > 0.05, "something is drawn"
        edge = (pixels[0, :, :3], pixels[-1, :, :3], pixels[:, 0, :3], pixels[:, -1, :3])
        assert all((side == 1).all() for side in edge), "nothing is cut off at the border"


@pytest.mark.usefixtures("undrawn")
def test_contrasts_at_shares_of_training_are_described_and_not_tested(published: Path, tmp_path: Path) -> None:
    write_report(load_runs([published]), tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "progress.csv")
    assert sorted(table["share"].unique()) == [0.25, 0.5, 0.75, 1.0], "no run was evaluated at 10 %"
    final = contrasts(with_causality(load_runs([published])), "val/loss", ["noise", "lb"])
    for _, rows in table.groupby("share"):  # the losses of these runs all fall in the same way
        for column in ("difference", "ci_low", "ci_high"):
            np.testing.assert_allclose(rows[column], final[column], atol=1e-9)
    assert not [column for column in table if column.startswith("p")]
    assert (table["together_high"] > table["ci_high"]).all(), "intervals that hold together are wider"
    first = table.iloc[0]
    cell = f"{first['difference']:+.4f} [{first['together_low']:.4f}, {first['together_high']:.4f}]"
    text = (tmp_path / "out" / "report.md").read_text()
    assert cell in text
    assert "of a single look" in text


def test_a_report_removes_the_files_of_an_earlier_one_and_no_others(tmp_path: Path) -> None:
    """A list that somebody else wrote can name any file: one outside stays, and so does one with other content."""
    out = tmp_path / "out"
    table = pd.DataFrame({"a": [1]})
    save_report("first", [csv_file(name, table, "numbers.") for name in ("runs", "part/claims", "mine")], out)
    (out / "mine.csv").write_text("my own numbers")
    (out / "notes.txt").write_text("my own notes")
    listing = Listing.read(out)
    assert listing is not None
    outside = tmp_path / "outside.csv"
    outside.write_text("a")
    listing._replace(files=listing.files | {"../outside.csv": sha256(outside), "a\0b": ""}).write(out)
    save_report("second", [csv_file("runs", table, "numbers.")], out)
    assert sorted(path.name for path in out.iterdir()) == [
        *("mine.csv", "notes.txt", "report.html", "report.md", "report_files.json", "runs.csv")
    ]
    assert outside.exists()
    for broken in ("[]", "{", '{"title": 1, "files": []}'):
        (out / FILE).write_text(broken)
        assert Listing.read(out) is None


@pytest.mark.usefixtures("undrawn")
def test_a_command_says_which_report_it_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "x" / "seed=1", {"val/loss": 1.0}, seed=1)
    command = [str(tmp_path / "x"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "replaced" not in capsys.readouterr().out
    assert main(command) == 0
    assert f"{tmp_path / 'out'}: an earlier report was replaced (Report: x)\n" in capsys.readouterr().out


def test_columns_over_training_are_evaluations_that_exist(tmp_path: Path) -> None:
    """A run with 3 evaluations was evaluated at none of 10, 25, 50 and 75 %; with one there is nothing to show."""
    for noise, seed in product((0.0, 0.1), (1, 2)):
        folder = tmp_path / "x" / f"{noise},{seed}"
        write_run(folder, {"val/loss": 1.0 + noise, "val/perplexity": 3.0 + noise}, seed=seed, noise=noise)
        events = [{"kind": "eval", "step": step, "val/loss": 2.0 + noise} for step in (0, 100, 200, 300)]
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    [inputs] = collect_inputs(load_runs([tmp_path / "x"]))
    assert contrasts_at_shares(inputs)["share"].tolist() == [0.33, 0.67, 1.0]
    evals = inputs.past.evals
    past = inputs.past._replace(evals=evals[evals["step"].isin([0, 300])])
    assert list(contrasts_over_training(inputs._replace(past=past))) == []


@pytest.mark.usefixtures("undrawn")
def test_a_share_before_the_first_step_is_left_out(tmp_path: Path) -> None:
    """10 % of four steps is no step, and the losses before training say nothing about it."""
    for noise, seed in product((0.0, 0.1), (1, 2)):
        folder = tmp_path / "x" / f"{noise},{seed}"
        write_run(folder, {"val/loss": 1.0 + noise, "val/perplexity": 3.0 + noise}, seed=seed, noise=noise)
        events = [{"kind": "eval", "step": step, "val/loss": 2.0 + noise} for step in (0, 2, 4)]
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_report(load_runs([tmp_path / "x"]), tmp_path / "out")
    assert pd.read_csv(tmp_path / "out" / "progress.csv")["share"].tolist() == [0.5, 1.0]


def test_the_question_names_what_the_answer_is_about(tmp_path: Path) -> None:
    """The answer judges the first tested metric. A single run is compared with nothing; an observed one has no seed."""
    values = {"val/loss": 1.0, "val/perplexity": 3.0, "routing/load_cv/pooled": 0.5}
    write_run(tmp_path / "x" / "a", values, seed=1, noise=0.0, steps=0)
    [inputs] = collect_inputs(load_runs([tmp_path / "x"]))
    texts = [str(block) for block in answer(inputs)]
    assert "**Question:** How well does this one run do?" in texts[0]
    assert not any("With one seed" in text for text in texts)
    for seed, noise in ((1, 0.1), (2, 0.0), (2, 0.1)):
        write_run(tmp_path / "x" / f"{seed}{noise}", values, seed=seed, noise=noise, steps=0)
    [inputs] = collect_inputs(load_runs([tmp_path / "x"]))
    assert "What does a change of noise do to validation perplexity?" in str(next(answer(inputs)))


def test_an_open_end_of_a_claim_is_an_arrow_and_the_key_of_the_pictures_comes_first() -> None:
    """Markdown has no pictures, and so no key to them."""

    def corners(low: float, high: float) -> list[str]:
        picture = interval_picture(Interval(1.0, 0.5, 1.5, -1.0, 2.0, (low, high)))
        [points] = re.findall('class="claimed" points="([^"]*)"', picture)
        return points.split()

    middle = "17"
    assert not any(corner.endswith(f",{middle}") for corner in corners(0.0, 1.0))
    assert corners(0.0, math.inf)[3] == f"294.0,{middle}"
    assert corners(-math.inf, 0.0)[1] == f"6.0,{middle}"
    lowered = Judgment("a", "undecided", "b", "lower", "c", 3, -1.0, -2.0, 0.0, math.nan, 0.5, False)
    [card] = cards([lowered._replace(claimed=(0.0, math.inf))])
    assert card.interval is not None
    assert card.interval.most > 0, "the claim goes on beyond all values"
    block = Cards([card], "Dot: the estimate.")
    written = HtmlPage()
    written.add(block)
    page = written.render("title")
    assert 0 < page.index("Dot: ") < page.index("<article")
    [numbers] = [re.findall("<text[^>]*>([^<]*)</text>", str(interval_picture(card.interval)))]
    assert numbers == ["-2", "-1", "0"], "the picture has an axis"
    assert "Dot: " not in block_as_markdown(block)


@pytest.mark.usefixtures("undrawn")
def test_claims_margins_and_several_experiments(published: Path, tmp_path: Path) -> None:
    """Claims in the records are planned, all other contrasts are post hoc, and each experiment is judged alone."""
    for path in published.glob("*/run.json"):
        config = json.loads(path.read_text())["config"]
        change_record(path.parent, config=config | {"claims": [HIGHER | {"text": "noise hurts (+14)"}]})
    for seed in (42, 43, 44):  # noise_lb_seed has this condition too
        metrics = {"val/perplexity": 130.0 + seed, "val/loss": 4.9 + seed / 100}
        write_run(tmp_path / "multirun" / "floor" / f"seed={seed}", metrics, seed=seed, noise=0.0, lb=0.0)
    options = ReportOptions(references={"lb": 0.01}, margins={"val/perplexity": "3%"})
    text = write_report(load_runs([tmp_path / "multirun"]), tmp_path / "out", options).read_text()
    assert "in the experiment's YAML file or on the command line, and every run recorded" in text
    assert (
        "- noise hurts (+14) (us): **supported**; noise 0.5 vs 0.0: validation perplexity 144.3 vs 130.4 (+10.7%)"
        in text
    )
    assert "noise 0.5 vs 0.0 at lb=0.0: " not in text.split("Post hoc")[0].split("load CV")[0]
    assert "lb 0.0 vs 0.01 at noise=0.0: +0.307 validation perplexity [-1.72, 2.33], p=0.58 (Holm 1), n=3: **eq" in text
    equivalent = text.split("\n**Equivalent**: ")[1].split("\n**")[0]
    assert equivalent.count("**equivalent** within") == text.count("**equivalent** within") > 0
    assert "\n**Undecided**: " in text
    assert "Holm's correction over all contrasts of this report that have a margin" in text.replace("\n", " ")
    assert "- 1 test of planned claims of sources has 2.5 %.\n" in text
    second_p = (
        "share 5 %: 1 test of planned claims of sources has 2.5 %; other comparisons have the rest. So the smallest p "
    )
    assert f"{second_p}is multiplied by up to 2 to give the p in parentheses, and no other p by more." in text.replace(
        "\n", " "
    )
    assert text.startswith('# Report: "floor", "noise_lb_seed"\n'), "a name may hold a comma"
    assert "### Noise floor" in text
    assert "![noise_lb_seed/noise_lb](noise_lb_seed/noise_lb.png)" in text
    assert (tmp_path / "out" / "noise_lb_seed" / "claims.csv").is_file()
    assert not (tmp_path / "out" / "floor" / "claims.csv").exists()


def test_a_reference_applies_to_the_experiments_that_have_this_level(published: Path, tmp_path: Path) -> None:
    for lb, seed in product((0.0, 0.02), (42, 43)):
        metrics = {"val/perplexity": 130.0 + seed + 100 * lb}
        write_run(tmp_path / "multirun" / "other" / f"lb={lb},seed={seed}", metrics, seed=seed, noise=0.0, lb=lb)
    _, *parts = collect_inputs(load_runs([tmp_path / "multirun"]), ReportOptions(references={"lb": 0.01}))
    assert [set(part.contrasts.query("factor == 'lb'")["reference"]) for part in parts] == [{0.01}, {0.0}]
    with pytest.raises(ValueError, match=r"^--reference lb=7: allowed are 0.0, 0.01, 0.02"):
        collect_inputs(load_runs([tmp_path / "multirun"]), ReportOptions(references={"lb": 7}))


@pytest.mark.usefixtures("undrawn")
def test_an_added_metric_is_judged_and_corrected_together_with_the_others(published: Path, tmp_path: Path) -> None:
    runs, metric = load_runs([published]), "val/accuracy"
    options = ReportOptions(margins={metric: "5%"}, metrics=(metric, "val/perplexity", metric))
    text = write_report(runs, tmp_path / "out", options).read_text()
    table = pd.read_csv(tmp_path / "out" / "contrasts.csv")
    expected = contrasts(with_causality(runs), metric, ["noise", "lb"], margin="5%").set_index(
        ["factor", "level", "within"]
    )
    added = table[table["metric"] == metric].fillna({"within": ""}).astype({"level": float})
    columns = ["n", "difference", "ci_low", "ci_high", "p", "p TOST", "p TOST Holm", "equivalent"]
    np.testing.assert_allclose(
        added.set_index(["factor", "level", "within"])[columns].astype(float), expected[columns].astype(float)
    )
    assert table["metric"].value_counts().to_dict() == {"val/perplexity": 7, "routing/load_cv/pooled": 7, metric: 7}
    variance = pd.read_csv(tmp_path / "out" / "anova.csv").dropna(subset="p")
    family = pd.concat([table["p"], variance["p GG"]])
    for column, method in (("p Holm", "holm"), ("p BH", "fdr_bh")):
        np.testing.assert_allclose(table[column], multipletests(family, method=method)[1][: len(table)])
    np.testing.assert_allclose(variance["p Holm"], multipletests(family, method="holm")[1][len(table) :])
    assert {"term", "F", "p", "p GG"} <= set(variance)
    assert table.loc[table["metric"] != metric, "equivalent"].isna().all(), "without a margin, equivalence is unknown"
    assert re.search(
        r"noise 0\.5 vs 0\.0 at lb=0\.0: -\S+ validation accuracy \[.*\(Holm 0\.086\), n=3: \*\*equivalent\*\*",
        text,
    )
    assert set(pd.read_csv(tmp_path / "out" / "anova.csv")["metric"]) == {*table["metric"]}
    for name in ("noise_lb", "factors_val_accuracy", "contrasts_val_accuracy"):
        assert f"![{name}]({name}.png)" in text
    assert not (tmp_path / "out" / "factors_val_perplexity.png").exists(), "noise_lb.png shows it already"


@pytest.fixture
def analyze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Analyze:
    """Return a function that runs analyze.py in the folder `tmp_path`.

    It runs in this process, because pandas is imported here already.
    """

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["analyze.py", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / "analyze.py"), run_name="__main__")
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(exit_info.value.code or 0), printed.out, printed.err)

    return run


@pytest.mark.usefixtures("undrawn")
def test_the_option_metric_adds_a_metric_to_the_tables_and_tests(
    published: Path, analyze: Analyze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal, the command says first what takes a while."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    metric = "routing/entropy/layer03"
    done = analyze("--metric", metric, "--metric", "val/loss", "--margin", f"{metric}=1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("runs read: 18; writing the report and its figures, which takes a while\n")
    header = next(line for line in done.stdout.splitlines() if "val/loss" in line)
    assert header.split() == [
        *("noise", "lb", "val/loss", "val/perplexity", "val/accuracy", "routing/load_cv/pooled", metric, "n", "seeds")
    ]
    text = (tmp_path / "analysis" / "report.md").read_text()
    assert f"In every row, {metric} (nats per token) is 0.5 ± 0, n seeds is 3." in text
    found = "lb 0.01 vs 0.0 at noise=0.0: +0 router entropy, layer 3, n=3"
    assert f"{found}: **the same in every seed**, no difference" in text
    assert f"- {metric} has no spread between seeds" in text.replace(f"{metric}: ", "", 1)


def post_hoc_tests(part: ReportInputs) -> list[tuple[pd.DataFrame, str]]:
    """Return the tables of tests that nobody planned, each with the column of their p-values."""
    return [(part.contrasts, "p"), (part.variance, "p GG")]


def test_an_added_metric_is_tested_only_in_experiments_that_have_it(tmp_path: Path) -> None:
    """All tests of both experiments are corrected together."""
    for experiment, metrics in (("with_metric", ["routing/load_gini"]), ("without_metric", [])):
        for noise, seed in product((0.0, 0.1), (1, 2, 3)):
            names = ["val/perplexity", "routing/load_cv/pooled", *metrics]
            values = {name: (seed + noise) ** index for index, name in enumerate(names, start=2)}
            write_run(tmp_path / experiment / f"{noise},{seed}", values, seed=seed, noise=noise)
    _, with_metric, without_metric = collect_inputs(
        load_runs([tmp_path]), ReportOptions(metrics=("routing/load_gini",))
    )
    assert with_metric.tested == [*without_metric.tested, "routing/load_gini"]
    [line] = asked(with_metric)
    same = asked(with_metric._replace(contrasts=with_metric.contrasts.assign(deterministic=True)))
    assert "1 comparison (1 the same in every seed)" in next(iter(same))
    columns = {"p": math.nan, "p Holm": math.nan, "verdict": "not tested"}
    untested = asked(with_metric._replace(contrasts=with_metric.contrasts.assign(**columns)))
    assert "surest" not in next(iter(untested)), "no test tells which is"
    assert line.count("Gini coefficient of the experts' load") == 2, "a heading and an effect name it by the same words"
    np.testing.assert_allclose(without_metric.contrasts["p"], with_metric.contrasts["p"][:2])
    pooled = [each for part in (with_metric, without_metric) for each in post_hoc_tests(part) if len(each[0])]
    parts, found = [table[column] for table, column in pooled], [table["p Holm"] for table, _ in pooled]
    assert len(parts) == 2, "the analysis of variance of two levels is the same test as their comparison"
    family = pd.concat(parts).dropna()
    np.testing.assert_allclose(pd.concat(found).dropna(), multipletests(family, method="holm")[1])
    assert {(each.name, each.tests, each.share) for each in with_metric.families} == {
        ("comparisons that nobody planned (contrasts, and terms of the analysis of variance)", len(family), 1.0)
    }


def test_a_metric_that_is_null_everywhere_cannot_be_added(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "seed=1", {"val/loss": 1.0, "routing/jaccard": math.nan}, seed=1)
    with pytest.raises(ValueError, match=r"^--metric routing/jaccard: null in every run: null if no token asks"):
        collect_inputs(load_runs([tmp_path]), ReportOptions(metrics=("routing/jaccard",)))


@pytest.mark.usefixtures("undrawn")
def test_routing_metrics_are_reported_by_condition_where_they_were_measured(tmp_path: Path) -> None:
    for noise, ginis in ((0.0, (0.1, 0.3)), (0.1, (0.4, 0.4))):
        for seed, gini in enumerate(ginis):
            metrics = {"val/loss": 1.0 + seed, "routing/load_gini": gini, "routing/jaccard": math.nan}
            metrics |= {"routing/load_cv": gini + 1, "routing/load_cv/pooled": gini - 0.1}
            metrics |= {"routing/consistency_kappa": 0.5 + seed} if noise else {}
            write_run(tmp_path / "x" / f"{noise},{seed}", metrics, seed=seed, noise=noise)
    options = ReportOptions(metrics=("routing/consistency_kappa",))  # this metric is also in the table of conditions
    text = write_report(load_runs([tmp_path / "x"]), tmp_path / "out", options).read_text()
    rows = [line for line in text.split("**Routing by condition**")[1].splitlines() if line.startswith("|")]
    both = "load_cv (mean over layers)", "load_cv/pooled (layers pooled)"
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[:4] if "---" not in row] == [
        ["noise", *both, "load_gini", "consistency_kappa"],
        ["0.0", "1.20 ± 0.14", "0.10 ± 0.14", "0.20 ± 0.14", "– (n=0)"],
        ["0.1", "1.4 ± 0", "0.3 ± 0", "0.4 ± 0", "1.00 ± 0.71"],
    ]
    means = pd.read_csv(tmp_path / "out" / "conditions.csv").set_index(["noise", "metric"])["mean"]
    assert means.loc[[(0.0, "val/loss"), (0.0, "routing/load_gini"), (0.1, "routing/load_gini")]].tolist() == [
        *(1.5, pytest.approx(0.2), 0.4)
    ]
    assert means.index.is_unique


@pytest.mark.usefixtures("undrawn")
def test_the_routing_table_counts_the_seeds_of_a_model_without_routing(tmp_path: Path) -> None:
    for seed in range(3):
        for noise, metrics in ((0.0, {}), (0.1, {"routing/load_gini": 0.1 + 0.1 * seed})):
            write_run(tmp_path / f"{noise},{seed}", {"val/loss": 1.0 + seed, **metrics}, seed=seed, noise=noise)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    _, routing = (block.frame for block in condition_table(inputs) if isinstance(block, TableBlock))
    assert routing["load_gini"].tolist() == ["– (n=0)", "0.20 ± 0.10"]
    assert routing["n seeds"].tolist() == [3, 3]


def test_the_option_replay_judges_the_published_numbers(analyze: Analyze, tmp_path: Path) -> None:
    done = analyze("--replay")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "analysis" / "report.md").read_text()
    assert "| supported |" in text
    assert "| contradicted |" in text
    assert (tmp_path / "analysis" / "noise_contrasts.csv").is_file()


@pytest.mark.usefixtures("undrawn")
def test_every_run_is_counted(published: Path, tmp_path: Path) -> None:
    write_run(published / "lb=0.0,noise=0.1,seed=45", {}, status="failed", seed=45, noise=0.1, lb=0.0)
    write_run(published / "lb=0.0,noise=0.5,seed=45", {"val/perplexity": math.inf}, seed=45, noise=0.5, lb=0.0)
    write_run(published / "lb=0.0,noise=0.1,seed=46", {}, status="interrupted", seed=46, noise=0.1, lb=0.0)
    (published / "lb=0.0,noise=0.1,seed=46" / "events.jsonl").write_text("")
    (published / "lb=0.0,noise=0.0,seed=42" / "run.json").write_text("{")
    write_cells(published, {"lb=0.0,noise=0.0,seed=45": {}})
    with (published / "lb=0.0,noise=0.0,seed=43" / "events.jsonl").open("a") as log:
        log.write('{"kind": "ev')
    text = write_report(load_runs([published]), tmp_path / "out").read_text()
    assert "4 of 22 runs did not finish" in text
    assert "| lb=0.0,noise=0.1,seed=45 | failed | boom |" in text
    assert "| lb=0.0,noise=0.0,seed=42 | unreadable |" in text
    assert "| lb=0.0,noise=0.0,seed=45 | missing |" in text
    assert "lb=0.0,noise=0.5,seed=45: finished, but its val/perplexity is not finite" in text
    assert "line 6 skipped" in text
    assert "lb=0.0,noise=0.1,seed=46: no evaluation, because the run ended before its first one" in text
    assert "the seeds that have all combinations, not 42" in text
    assert "without a partner: seed 42" in text


def test_the_report_says_in_words_which_layers_collapsed(tmp_path: Path) -> None:
    for lb in (0.0, 0.1):
        write_run(tmp_path / "x" / f"lb={lb},seed=1", {"val/loss": 3.0}, lb=lb, seed=1)
    [inputs] = collect_inputs(load_runs([tmp_path / "x"]))
    [_, paragraph] = collapse(inputs)
    assert paragraph == Paragraph(f"{NONE} {NONE_TOLD}")
    found = Collapse(3, "few", [1, 5], 8, 40, None)._asdict()
    change_record(tmp_path / "x" / "lb=0.0,seed=1", collapses=[found])
    [inputs] = collect_inputs(load_runs([tmp_path / "x"]))
    [_, _, sentences] = collapse(inputs)
    line = "lb=0.0, seed 1, layer 3: 2 of 8 experts (1, 5) take 90 % of the assignments since step 40"
    assert sentences == BulletList([line])
    event = {"kind": "eval", "step": 500, "routing/utilization": [[0.5, 0.5, 0, 0]], "routing/collapsed/layer00": 1.0}
    with (tmp_path / "x" / "lb=0.1,seed=1" / "events.jsonl").open("a") as log:
        log.write(json.dumps(event) + "\n")
    [inputs] = collect_inputs(load_runs([tmp_path / "x"]))
    [_, paragraph, sentences] = collapse(inputs)
    assert paragraph == Paragraph(MEANING), "nothing is denied that the last evaluation shows"
    start = "lb=0.1, seed 1, layer 0:"
    evaluated = ["2 of 4 experts (0, 1) take 90 % of the assignments", "no token takes 2 of 4 experts (2, 3)"]
    assert sentences == BulletList([line, *(f"{start} {each} in the last evaluation" for each in evaluated)])
    for lb in (0.0, 0.1):
        config = RECORD["config"] | {"lb": lb, "seed": 1, "steps": 2}
        change_record(tmp_path / "x" / f"lb={lb},seed=1", collapses=[], config=config)
    [inputs] = collect_inputs(load_runs([tmp_path / "x"]))
    assert list(collapse(inputs))[1:] == [Paragraph(SHORT.format(runs="2 runs are"))]


def test_the_table_of_what_was_run_counts_every_status(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "noise=0.0,seed=1", {"val/loss": 1.0}, seed=1, noise=0.0)
    write_run(tmp_path / "x" / "noise=0.1,seed=1", {"val/loss": 1.0}, seed=1, noise=0.1)
    for seed, (status, error) in enumerate(
        [
            ("failed", "OSError: x"),
            ("failed", "Diverged: step 3: the loss is not finite"),
            ("interrupted", ""),
            ("running", ""),
        ]
    ):
        folder = tmp_path / "x" / f"noise=0.1,seed={seed + 2}"
        write_run(folder, {}, status=status, seed=seed + 2, noise=0.1)
        change_record(folder, error=error)
    trained = {folder.name: {} for folder in sorted((tmp_path / "x").iterdir())}
    write_cells(tmp_path / "x", trained | {"noise=0.0,seed=9": {}})
    write_run(tmp_path / "y" / "noise=0.0,seed=1", {"val/loss": 1.0}, seed=1, noise=0.0)
    blocks = list(what_was_run(collect_inputs(load_runs([tmp_path]))[0]))
    assert [(name, n) for block in blocks if isinstance(block, StatusBar) for name, n, _ in block.counts] == [
        *(("finished", 3), ("missing", 1), ("failed", 1), ("diverged", 1), ("killed", 1), ("interrupted", 1)),
        ("running", 0),
        ("unreadable", 0),
    ]
    by_experiment, by_condition = (
        block.frame for block in blocks if isinstance(block, TableBlock) and "finished" in block.frame
    )
    assert by_experiment.to_numpy().tolist() == [["x", 2, 1, 1, 1, 1, 1], ["y", 1, 0, 0, 0, 0, 0]]
    rows = by_condition.set_index(["experiment", "condition"])
    assert rows.loc[("x", "noise=0.1, experiment=x")].to_dict() == {
        "finished": 1,
        "missing": 0,
        "failed": 1,
        "diverged": 1,
        "killed": 1,
        "interrupted": 1,
    }
    assert rows["finished"].sum() == 3


@pytest.mark.parametrize("level", [math.nan, math.inf, "nan"])
def test_a_level_that_is_no_finite_number_is_a_level_like_others(level: float | str, tmp_path: Path) -> None:
    for seed, noise in product((1, 2, 3), (0.0, level, 0.7)):
        if (seed, noise) != (1, 0.0):  # one run is missing
            metrics = {"val/perplexity": 1.0 + seed**2 + (noise != 0.0) / seed}
            write_run(tmp_path / "x" / f"{noise},{seed}", metrics, seed=seed, noise=noise)
    text = write_report(load_runs([tmp_path]), tmp_path / "out").read_text()
    assert f"noise {'0' if level == 'nan' else level}" in text or f"noise {level} vs 0.0" in text
    assert "6 of 9: the seeds that have all combinations, not 1" in text


@pytest.mark.usefixtures("undrawn")
def test_a_key_that_is_called_like_a_column_of_the_tables_is_a_factor(tmp_path: Path) -> None:
    for seed, value in product((1, 2), (0.0, 0.1)):
        for key in ("metric", "n", "mean", "level", "run", "error"):
            write_run(tmp_path / key / f"{value},{seed}", {"val/loss": 1.0 + value + seed}, seed=seed, **{key: value})
    text = write_report(load_runs([tmp_path]), tmp_path / "out").read_text()
    for key in ("metric", "n", "mean", "level", "run", "error"):
        assert f"config.{key} 0.1 vs 0.0" in text


@pytest.mark.parametrize("names", [("", "/"), ("..", "."), ("x" * 5000, "x" * 5001)])
@pytest.mark.usefixtures("undrawn")
def test_the_files_of_an_experiment_have_a_folder_of_their_own_whatever_its_name(
    names: tuple[str, str], tmp_path: Path
) -> None:
    for number, name in enumerate(names):
        for seed in (1, 2):
            folder = tmp_path / "runs" / str(number) / f"{seed}"
            write_run(folder, {"val/loss": 1.0 + seed}, seed=seed, noise=0.0)
            change_record(folder, experiment=name)
    write_report(load_runs([tmp_path / "runs"]), tmp_path / "out")
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_dir()]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}


def test_a_report_about_unreadable_runs_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "x" / "seed=1").mkdir(parents=True)
    (tmp_path / "x" / "seed=1" / "run.json").write_text("{")
    (tmp_path / "x" / "odd").mkdir()
    (tmp_path / "x" / "odd" / "run.json").write_text("{")
    assert "2 of 2 runs did not finish" in write_report(load_runs([tmp_path]), tmp_path / "out").read_text()


@pytest.mark.usefixtures("undrawn")
def test_contrasts_without_a_test_are_no_undecided_ones_and_dead_layers_are_named(tmp_path: Path) -> None:
    dead = {"routing/active_experts/layer00": 2.0, "routing/active_experts/layer01": 0.0}
    for noise in (0.0, 0.1):
        write_run(tmp_path / "x" / f"noise={noise},seed=1", {"val/loss": 1.0 + noise} | dead, seed=1, noise=noise)
    text = write_report(load_runs([tmp_path]), tmp_path / "out").read_text()
    assert "**Not tested**" in text
    assert "| 0.0 | 1 ± – |" in text, "a level is written in tables as in sentences"
    assert "| noise | 0.1 | 0.0 |" in text
    assert "**undecided**" not in text.lower(), "the verdict, not the word"
    assert "- noise=0.1,seed=1: no token takes an expert in layer01" in text


ATTACK = '<script>alert(1)</script>"><img src=x onerror=alert(1)>[click](javascript:alert(1))`|\n\x1b[2J\u202e</style>'


def test_text_of_run_records_is_never_treated_as_markup(tmp_path: Path) -> None:
    for level in ("0.0", "<script>"):  # the level is short because figures show it too
        for seed in (1, 2):
            folder = tmp_path / "x" / f"{seed},{len(level)}"
            metrics = {"val/loss": 1.0 + seed * len(level), "val/perplexity": 2.0 + seed * len(level)}
            write_run(folder, metrics, seed=seed, noise=level)
            data = {"corpus_sha256": ATTACK, ATTACK: ATTACK, "domains": {ATTACK: {ATTACK: ATTACK}}}
            change_record(folder, name=ATTACK, experiment=ATTACK, commit=ATTACK, versions={ATTACK: ATTACK}, data=data)
    write_run(tmp_path / "x" / "broken", {}, status="failed", seed=3, noise="0.0")
    change_record(tmp_path / "x" / "broken", name=ATTACK, error=ATTACK)
    text = write_report(load_runs([tmp_path]), tmp_path / "out").read_text()
    assert set(filter(lambda c: not c.isprintable(), text)) == {"\n"}
    assert set(filter(lambda c: not c.isprintable(), (tmp_path / "out" / "report.html").read_text())) == {"\n"}
    assert "<script" not in text
    assert "<img" not in text
    assert "](javascript" not in text
    page = Page(tmp_path / "out")
    assert {"iframe", "object", "link", "base", "img"}.isdisjoint(page.tags)
    assert page.tags.count("figure") == len(list((tmp_path / "out").rglob("*.png")))
    assert page.tags.count("script") == page.tags.count("figure") + 2, "charts as data, plotly.js as data, and a script"
    assert {path.name for path in tmp_path.iterdir()} == {"x", "out"}, "nothing is written outside of these folders"
    assert page.tags.count("style") == 1
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text, "the script is shown as text"
    assert page.sources == []
    raw = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"""(url\(|@import|(src|href)=["']?(https?:)?//)""", raw)


def test_names_of_runs_with_the_characters_of_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    claim = HIGHER | {"text": "a **bold** `claim`", "factor": "router.kind", "levels": ["**x**"], "than": ["`y`"]}
    for level in ("**x**", "`y`"):
        for seed in (1, 2):
            metrics = {"val/loss": 1.0 + seed * len(level), "val/perplexity": 2.0 + seed * len(level)}
            folder = tmp_path / "x" / f"{seed},{len(level)}"
            write_run(folder, metrics, seed=seed, router={"kind": level}, claims=[claim])
            change_record(folder, experiment="**E**")
    text = write_report(load_runs([tmp_path]), tmp_path / "out").read_text()
    page = Page(tmp_path / "out")
    for words in ("a **bold** `claim`", "router.kind **x** vs `y`", "Report: **E**"):
        assert words in page.text
        assert words not in text
        assert re.sub(r"([*`])", r"\\\1", words) in text
    bold = re.findall("<strong>(.*?)</strong>", (tmp_path / "out" / "report.html").read_text())
    assert not {"bold", "x", "E"} & set(bold)


def test_a_report_of_fine_tuning_names_the_base_its_loss_and_how_far_routing_moved(tmp_path: Path) -> None:
    """Columns of adapters stand in a table of their own. Runs without an adapter have no value there."""
    for seed, lb in product((1, 2), (0.0, 0.1)):
        metrics = {"val/loss": 1.0, "routing/drift_kl": 0.25}
        metrics |= {"adapter/routing/load_cv/pooled": 0.125} if lb else {}
        folder = tmp_path / "x" / f"lb={lb},seed={seed}"
        write_run(folder, metrics, seed=seed, lb=lb, steps=400, model={"checkpoint": "lab/base"})
        first = {"kind": "eval", "step": 0, "val/loss": 3.0, "val/loss_in_domain": 4.0, "val/loss_out_of_domain": 2.5}
        (folder / "events.jsonl").write_text(json.dumps(first) + "\n")
    [inputs] = collect_inputs(load_runs([tmp_path]))
    losses = "3.0000, 4.0000 in the domains that train, 2.5000 in the other ones"
    assert ("Base", f"lab/base; validation loss before the first step {losses}") in setup(inputs)
    _, routing, adapters = (block.frame for block in condition_table(inputs) if isinstance(block, TableBlock))
    assert routing[[column for column in routing if "drift_kl" in column]].to_numpy().tolist() == [["0.25 ± 0"]] * 2
    assert adapters["load_cv/pooled"].tolist() == ["– (n=0)", "0.125 ± 0"]


def test_a_report_names_the_effect_for_which_its_seeds_were_planned(tmp_path: Path) -> None:
    """Runs from before the key, and runs without a plan, say nothing about it."""
    for seed in (1, 2):
        text = "2, but 0.02 for test/loss and 5 % for routing/load_cv/pooled"
        write_run(tmp_path / "w" / f"seed={seed}", {"val/loss": 1.0}, seed=seed, planned_effect=text)
        write_run(tmp_path / "x" / f"seed={seed}", {"val/loss": 1.0}, seed=seed, planned_effect="0.5%, but *1* for x")
        write_run(tmp_path / "y" / f"seed={seed}", {"val/loss": 1.0}, seed=seed, planned_effect=None)
        write_run(tmp_path / "z" / f"seed={seed}", {"val/loss": 1.0}, seed=seed)
    said = [
        [text for name, text in setup(*collect_inputs(load_runs([tmp_path / each]))) if name == "Planned effect"]
        for each in "wxyz"
    ]
    assert [len(each) for each in said] == [1, 1, 0, 0]
    words = "2, but 0.02 nats for test/loss and 5 % of the mean for routing/load_cv/pooled: the smallest difference"
    assert said[0][0].startswith(words)
    assert said[1][0].startswith(r"0.5%, but \*1\* for x: the smallest difference that matters")


def test_a_report_names_what_precision_auto_was(tmp_path: Path) -> None:
    """Runs with another precision, and those without facts, say nothing."""
    for seed, process in enumerate([{}, {"precision": "fp32", "precision_reason": "of *speed*"}] * 2):
        folder = tmp_path / f"seed={seed}"
        write_run(folder, {"val/loss": 1.0}, seed=seed)
        change_record(folder, facts=json.loads((folder / "run.json").read_text())["facts"] | {"process": process})
    write_run(tmp_path / "seed=9", {}, status="failed", seed=9)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    said = [text for name, text in setup(inputs) if name == "What precision=auto was"]
    assert said == [r"fp32, because of \*speed\*"]


def test_a_report_names_domains_that_are_left_out_and_the_metrics_that_the_runs_have(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "seed=1"
    source = {"domains": ["a", "b", "problems"]}
    write_run(folder, {"val/loss": 1.0, "routing/router_gram": 0.5}, seed=1, data={"source": source})
    record = json.loads((folder / "run.json").read_text())
    change_record(folder, facts=record["facts"] | {"data": {"domains": {"a": {}}}})
    [inputs] = collect_inputs(load_runs([tmp_path / "x"]))
    not_read = "no run read the domain {}, because the Python package{} that holds its text was not installed; so the "
    not_read += "models neither trained on it nor were\nevaluated on it"
    said = [text for name, text in setup(inputs) if name == "Domain without text"]
    assert said == [not_read.format("b", ""), not_read.format("problems", " reasoning-gym==0.1.25")]
    _, names = terms(inputs)
    assert isinstance(names, Details)
    [table] = names.blocks
    assert isinstance(table, TableBlock)
    assert {"val/loss", "routing/router_gram"} <= {*table.frame["metric"]}
    assert "routing/jaccard" not in {*table.frame["metric"]}, "these runs do not have it"


def test_columns_that_are_the_same_in_every_row_are_said_once(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "x"], "c": [3, 4], "d": [math.nan, None], "n": [3, 3]})
    text = save_report("Title", [TableBlock(table)], tmp_path).read_text()
    assert "In every row, b is x, n is 3. No row has d.\n\n| a | c |\n" in text
    page = Page(tmp_path)
    assert "In every row, b is x, n is 3. No row has d." in page.text
    assert page.tags.count("th") == 2
    sentences = table.assign(b="None of them differs.")
    assert (
        'In every row, b is "None of them differs", n is 3.'
        in save_report("Title", [TableBlock(sentences)], tmp_path).read_text()
    )


def test_every_kind_of_block_is_in_the_markdown_and_in_the_html_report(tmp_path: Path) -> None:
    figure = Figure(figsize=(1, 1))
    blocks: list[ReportBlock] = [
        Heading("A title"),
        Paragraph("some `code` and\n**bold**"),
        BulletList(["one", "two"]),
        TableBlock(pd.DataFrame({"row": range(MAX_ROWS + 1)})),
        StatusBar([("complete", 3, "good"), ("broken", 1, "bad"), ("absent", 0, "idle")]),
        Drawing("drawing", "what it shows", figure),
        Attachment("a.csv", "x\n1\n", "some numbers"),
        Details("more of it", [Paragraph("inside")]),
    ]
    text = save_report("Title", blocks, tmp_path).read_text()
    page = Page(tmp_path)
    for words in ("Title", "A title", "one", "two", "what it shows", "some numbers", "more of it", "inside"):
        assert words in text
        assert words in page.text
    assert f"The first {MAX_ROWS} of {MAX_ROWS + 1} rows." in text
    assert f"The first {MAX_ROWS} of {MAX_ROWS + 1} rows." in page.text
    assert page.tags.count("tr") == MAX_ROWS + 1, "the rows include the header"
    assert "4 runs: 3 complete, 1 broken" in text
    assert "absent" not in page.text
    assert {"code", "strong", "details"} <= set(page.tags)
    assert page.files == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "x\n1\n"


def test_the_first_use_of_a_term_in_running_text_is_a_link_to_its_meaning(tmp_path: Path) -> None:
    terms = [Term("n", "number of <seeds>", "n(?==)"), Term("family, level", "tests", "famil(?:y|ies)|level")]
    blocks: list[ReportBlock] = [
        Heading("A family"),
        Paragraph("n, `n=1`, levels, family.size, then **n=3** and n=4 of two families or one level"),
        TableBlock(pd.DataFrame({"level": ["level"]})),
        Glossary(terms),
    ]
    text = save_report("n=1", blocks, tmp_path).read_text()
    assert "- n: number of &lt;seeds>\n- family, level: tests" in text
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r'<a class="term" href="#([\w-]+)" title="([^"]*)">(\w+)</a>(.{5})', html) == [
        ("term-n", "number of &lt;seeds&gt;", "n", "=3</s"),
        ("term-family-level", "tests", "families", " or o"),
    ]
    assert '<div id="term-n">' in html
    assert '<div id="term-family-level">' in html


def test_differences_count_the_runs_at_each_level_of_a_key() -> None:
    table = pd.DataFrame(
        {"lr": [0.1, 0.1, 0.2, None], "same": ["a"] * 4, "mixed": [1, "1", True, "none"], "gone": None}
    )
    differing, common = differences(table.astype(object))
    assert differing.to_numpy().tolist() == [["lr", "0.1 (×2), 0.2 (×1)"], ["mixed", "1 (×2), True (×1), none (×1)"]]
    assert common.to_numpy().tolist() == [["same", "a"]]


def test_layers_are_drawn_as_means_over_seeds() -> None:
    events = pd.DataFrame(
        {"step": step, "folder": f"{condition}{seed}", "condition": condition}
        | {f"routing/load_cv/layer{layer:02d}": 10 * layer + step + seed for layer in (0, 1, 2)}
        for condition in "ab"
        for seed in (1, 3)
        for step in (0, 5)
    )
    left, right = layer_trends(events, "routing/load_cv").axes
    assert (left.get_title(), right.get_title()) == ("a (n=2)", "b (n=2)")
    assert [line.get_ydata().tolist() for line in left.lines] == [[2, 7], [12, 17], [22, 27]]
    runs = events[events["step"] == 5]
    (axes,) = layer_profile(runs).axes
    assert axes.get_legend_handles_labels()[1] == ["a (n=2)", "b (n=2)"]
    means = [line for line in axes.lines if line.get_markersize() == 5]
    assert [line.get_ydata().tolist() for line in means] == [[7, 17, 27]] * 2
    seeds = [line for line in axes.lines if line.get_marker() == "."]
    assert [line.get_ydata().tolist() for line in seeds] == [[6, 16, 26, 8, 18, 28]] * 2


def test_a_panel_has_a_line_of_its_title_for_each_factor_also_if_a_level_is_a_list() -> None:
    condition = "router=topk (not causal), model.routers=(layer 0: hash, k=2), lb=0.0"
    event = {"step": 0, "folder": "a", "condition": condition, "routing/load_cv/layer00": 1.0}
    [axes] = layer_trends(pd.DataFrame([event]), "routing/load_cv").axes
    lines = ["router=topk (not causal)", "model.routers=(layer 0: hash, k=2)", "lb=0.0 (n=1)"]
    assert axes.get_title().split("\n") == lines


def test_runs_whose_layers_differ_are_compared_by_the_mean_load_and_their_figures_say_what_differs(
    tmp_path: Path,
) -> None:
    """Such a run has no load of all layers together. A reference is named as the command writes the level."""
    for by_layer, seed in product((None, "0:4"), (1, 2)):
        folder = tmp_path / "x" / f"{by_layer} {seed}"
        folder.mkdir(parents=True)
        write_record(folder, config={"seed": seed, "model": {"experts_by_layer": by_layer}})
        pooled = {"routing/load_cv/pooled": None if by_layer else 0.3}
        write_metrics(folder, {"routing/load_cv": 0.2 + seed / 9, "routing/load_cv/layer00": 0.2} | pooled)
        (folder / "events.jsonl").touch()
    options = ReportOptions({"model.experts_by_layer": "0:4"}, {}, ())
    [inputs] = collect_inputs(load_runs([tmp_path]), options)
    assert "routing/load_cv" in inputs.tested
    assert "routing/load_cv/pooled" not in inputs.tested
    assert set(inputs.contrasts["reference"]) == {"layer 0: 4 experts"}
    assert (inputs.contrasts["n"] == 2).all()
    [profile] = [
        each for each in routing_by_layer(inputs) if isinstance(each, Drawing) and each.name == "layer_profile"
    ]
    assert profile.caption.endswith(f". {LAYERS_DIFFER}")
    alike = inputs._replace(loaded=inputs.loaded[inputs.loaded["model.experts_by_layer"] == "none"])
    assert not any(LAYERS_DIFFER in str(each) for each in routing_by_layer(alike))


def test_the_ticks_of_small_ranges_of_gradients_are_numbers(tmp_path: Path) -> None:
    """Within one power of ten also the minor ticks have labels, and none of them is the source of a formula."""
    trains = [
        {"folder": "a", "seed": 1, "condition": "all", "step": step}
        | dict.fromkeys(GRADIENT_METRICS, 0.01 * (2 + step))
        for step in range(4)
    ]
    figure = gradient_norms(pd.DataFrame(trains))
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    labels = {label.get_text() for axes in figure.axes for label in axes.yaxis.get_ticklabels(which="both")}
    assert {"0.02", "0.03"} <= labels
    assert not [label for label in labels if "$" in label]
    narrow = [entry | dict.fromkeys(GRADIENT_METRICS, 0.02 + 0.001 * entry["step"]) for entry in trains]
    figure = gradient_norms(pd.DataFrame(narrow))
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    shown = [label.get_text() for label in figure.axes[0].yaxis.get_ticklabels(which="both") if label.get_text()]
    assert len(shown) == len(set(shown)) > 1, "no two ticks have the same label"


def test_the_second_half_of_training_shows_its_lines_whole() -> None:
    """The panel begins between two evaluations, where a line lies higher than at the next evaluation."""
    losses = {0: 9.0, 40: 6.0, 60: 4.0, 100: 3.0}
    events = pd.DataFrame([{"step": step, "val/loss": loss} for step, loss in losses.items()])
    events = events.assign(folder="a", seed=1, by="x")
    panel = learning_curves(events, "by").axes[1]
    assert panel.get_xlim()[0] == 50
    assert panel.get_ylim()[1] > 5, "the line enters at a loss of 5"


def test_the_axis_of_a_metric_that_is_never_negative_does_not_begin_below_zero() -> None:
    """The interval of two seeds reaches below 0 and is cut there."""
    runs = pd.DataFrame(
        [{"condition": "a", "seed": seed, "routing/load_cv/layer00": cv} for seed, cv in ((1, 0.01), (2, 0.2))]
    )
    assert layer_profile(runs).axes[0].get_ylim()[0] == 0


@pytest.mark.usefixtures("undrawn")
def test_grids_with_shortened_names_are_told_apart_by_a_setting(tmp_path: Path) -> None:
    for layers, grid in ((1, "default: lb, dim=32… 0123abcd"), (2, "default: lb, dim=32… 4567abcd")):
        for lb in (0.0, 0.1):
            folder = tmp_path / grid / f"lb={lb}"
            write_run(folder, {"val/loss": 1.0}, seed=1, lb=lb, **{"model.layers": layers})
    text = write_report(load_runs([tmp_path]), tmp_path / "out").read_text()
    assert "a checksum of the factors and of all settings of the command" in text
    assert "| default: lb, dim=32… 0123abcd | 1 |" in text
    assert "| default: lb, dim=32… 4567abcd | 2 |" in text


@pytest.mark.usefixtures("undrawn")
def test_the_table_of_the_data_says_what_is_counted_before_the_limit_of_blocks(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "seed=1", {"val/loss": 1.0}, seed=1)
    counts = {"a": {"train": {"blocks": 5}, "val": {"blocks": 1, "tokens": 900}}}
    record = json.loads((tmp_path / "x" / "seed=1" / "run.json").read_text())
    change_record(tmp_path / "x" / "seed=1", facts=record["facts"] | {"data": {"domains": counts}})
    text = write_report(load_runs([tmp_path / "x"]), tmp_path / "out").read_text()
    assert "The other columns count the whole text, before this limit." in text.replace("\n", " ")


def test_the_axis_of_a_single_layer_has_one_tick() -> None:
    runs = pd.DataFrame([{"condition": "a", "routing/load_cv/layer00": 0.1 * seed} for seed in (1, 2)])
    figure = layer_profile(runs)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [0]


def test_the_ticks_of_the_regret_of_tokens_are_numbers() -> None:
    layer = {"values": np.array([0.0, 0.2, 3.0]), "regret": {"mean": 1.0}, "advantage": {"mean": 0.1}, "routes": 3}
    figure = regret_by_route([MeasuredRun("all", 1, {"regret": [layer, layer]})])
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert {"0", "0.01", "1"} <= set(labels)
    found = charts(figure)
    assert found is not None
    assert found["panels"][1]["x"]["ticktext"] == ["0", "1"], "there is no layer 0.5"
    assert not [note for note in found["notes"] if "left" in note], "the page has no panel that is always left"


def test_drop_rates_are_drawn_by_decile_of_the_position() -> None:
    rows = [
        {"condition": drop} | {f"val_capacity/drop_rate/decile{i}": (i + seed) / 100 + nan_or_zero for i in range(10)}
        for drop, nan_or_zero in (("position", 0.0), ("score", math.nan))
        for seed in (0, 2)
    ]
    figure = drop_by_position(pd.DataFrame(rows))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    label = axes.yaxis.label.get_window_extent()
    assert 0 <= label.y0 < label.y1 <= figure.bbox.height, "the label of the axis is cut off"
    assert axes.get_legend_handles_labels()[1] == ["position (n=2)"], "a condition without the metric draws no line"
    (mean,) = [line for line in axes.lines if line.get_markersize() == 5]
    assert mean.get_ydata() == pytest.approx([(i + 1) / 100 for i in range(10)])


def test_the_forest_plot_has_one_row_per_contrast() -> None:
    rows = [
        {"factor": "lb", "level": level, "reference": 0, "within": "", "n": 3, "difference": d, "ci_low": d - 1}
        | {"ci_high": d + 1, "p Holm": p}
        for level, d, p in ((1, 0.5, 0.2), (2, 2.0, 0.04), (3, -3.0, 0.01))
    ]
    (axes,) = forest(contrast_rows(pd.DataFrame(rows)), "loss", "marks").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"lb {i} vs 0 (n=3)" for i in (1, 2, 3)]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in points] == [0.5, 2.0, -3.0]
    assert [line.get_markerfacecolor() == "white" for line in points] == [True, False, False], (
        "filled: significant after Holm's correction"
    )
    assert len({line.get_color() for line in points}) == 3, "undecided, above zero, below zero"


@pytest.mark.parametrize("others", [0.0, 0.3])
def test_a_load_that_is_even_by_construction_is_said_to_be_so(others: float, tmp_path: Path) -> None:
    """The loads tell it, not the name of a router: it is exactly even in each run of the setting."""
    for seed, even in product((1, 2, 3), (True, False)):
        cv = others * (seed < 3) if even else 0.3 + seed / 100
        metrics = {"val/perplexity": 3.0 + seed, "routing/load_cv": cv, "routing/load_cv/pooled": cv}
        write_run(tmp_path / f"{even},{seed}", metrics, causal=not even, seed=seed)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    for section in (condition_table, contrast_verdicts):
        text = "".join(map(block_as_markdown, section(inputs)))
        said = "The load CV is exactly 0 in every run of router=expert_choice (not causal)."
        assert text.count(said) == (not others)
        assert ("by construction" in text) == (not others)


def test_every_router_is_labeled_causal_or_not(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for causal in (True, False):
            metrics = {
                "val/loss": 1.0 + 0.1 * causal + 0.01 * seed**2 * causal,
                "val/perplexity": 3.0 + 0.1 * seed * causal,
            }
            write_run(tmp_path / "r" / f"{causal},{seed}", metrics, causal=causal, seed=seed, capacity=None)
    options = ReportOptions(references={"router": "topk"})
    text = write_report(load_runs([tmp_path / "r"]), tmp_path / "out", options).read_text()
    assert "| expert_choice (not causal) | 3 | 3 |" in text
    assert "| capacity | null |" in text
    assert "router expert_choice (not causal) vs topk: -0.2 validation perplexity" in text
    doubt = "; not comparable, because one of the settings may use later tokens of the text, perhaps in training alone:"
    assert text.count(doubt) == 2, "a card, and a sentence"
    assert "factors_routing_load_cv_pooled: not drawn, no run has routing/load_cv/pooled" in text
    assert (tmp_path / "out" / "factors_val_perplexity.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"^--reference router=topkk: allowed are expert_choice, topk$"):
        write_report(load_runs([tmp_path / "r"]), tmp_path / "out", ReportOptions(references={"router": "topkk"}))


@pytest.mark.usefixtures("undrawn")
def test_an_arm_is_labeled_causal_or_not_and_compared_in_place_of_its_router(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for variant, causal in (("top1", True), ("top2", True), ("choice", False)):
            metrics = {"val/perplexity": 3.0 + 0.1 * seed * causal}
            write_run(tmp_path / "r" / f"{variant},{seed}", metrics, causal=causal, variant=variant, seed=seed)
    options = ReportOptions(references={"variant": "top2"})
    text = write_report(load_runs([tmp_path / "r"]), tmp_path / "out", options).read_text()
    assert "variant choice (not causal) vs top2: -0.2 validation perplexity" in text
    assert "variant top1 vs top2: +0 validation perplexity" in text
    assert "router changes only together with variant" in text
    assert "router changes only together with variant, so its effect cannot be told apart from that of variant" in text


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        (["missing"], "**1 of 3 runs is missing**, and no result includes it."),
        (["missing", "missing"], "**2 of 3 runs are missing**, and no result includes them."),
        (["missing", "failed"], "**2 of 3 runs did not finish or are missing**, and no result includes them."),
        (["failed"], "**1 of 3 runs did not finish**, and no result includes it."),
    ],
)
def test_a_run_that_is_missing_is_not_said_to_have_failed(statuses: list[str], said: str, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path / f"seed={seed}", {"val/perplexity": 3.0}, seed=seed)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    all_statuses = [*statuses, *["finished"] * (3 - len(statuses))]
    assert said in [*_warnings(inputs._replace(runs=inputs.runs.assign(status=all_statuses)))]


NO_EFFECT = "No difference that was tested is more than chance explains, in the validation perplexity: "
WOULD_DECIDE = "+0.333 validation perplexity, +0.3%); about 41 more seeds would decide it, if the true difference is"


@pytest.mark.parametrize(
    ("effects", "claims", "words"),
    [  # level of noise -> what it adds to the perplexity of each seed
        ({}, [], "No run has finished, so there is no answer yet."),
        (
            {0.0: [0]},
            [],
            "The only setting has a validation perplexity of 100, and there is nothing to compare it with",
        ),
        (
            {0.0: [0, 1, 2]},
            [],
            "Nothing but the seed varies: the validation perplexity is 101 ± 1 (standard deviation)",
        ),
        ({0.0: [0], 0.5: [3]}, [HIGHER], "With one seed no difference can be told from chance, and the planned claim "),
        ({0.0: [0], 0.5: [3]}, [], "largest difference that was seen is that of noise 0.5 instead of 0.0 (+3 valid"),
        ({0.0: [0, 0, 0], 0.5: [0, 0, 1]}, [HIGHER], f"{NO_EFFECT}the planned claim is not decided with 3 seeds; "),
        ({0.0: [0, 0, 0], 0.5: [0, 0, 1]}, [HIGHER], f"that of noise 0.5 instead of 0.0 ({WOULD_DECIDE}"),
        (
            {0.0: [0, 0, 0], 0.5: [0, 0, 1]},
            [],
            f"{NO_EFFECT}the comparison of validation perplexity is not decided with",
        ),
        (
            {0.0: [0, 0, 0], 0.5: [9, 9, 9.1]},
            [HIGHER],
            "noise 0.5 instead of 0.0 raises the validation perplexity by 9.03 (+9.0%, 95 % interval 8.89 to 9.18, 3 "
            "seeds), so the claim “noise hurts” is supported.",
        ),
        (
            {0.0: [0, 0, 0], 0.5: [-9, -9, -9.1]},
            [HIGHER, HIGHER | {"text": "1.0 too", "levels": [1.0]}],
            "Of 2 planned claims, 1 is contradicted and 1 is not tested; the most certain result is that noise 0.5 ",
        ),
        (
            {0.0: [0, 0, 0], 0.5: [0, 0, 0.1]},
            [HIGHER | {"kind": "equivalent", "margin": "5%"}],
            "noise 0.5 instead of 0.0 changes the validation perplexity by less than the margin of 5 (+0.03%, 95 % ",
        ),
        (
            {0.0: [0, 1, 2], 0.1: [0, 1, 2], 0.5: [0, 1, 2.1]},
            [],
            f"{NO_EFFECT}the comparison of validation perplexity is not decided with 3 seeds; ",
        ),
        (
            {0.0: [0, 0], 0.5: [1, 1]},
            [HIGHER | {"kind": "equivalent", "margin": "5%"}],
            "The planned claim could not be tested; the largest difference that was seen is that of noise 0.5 ",
        ),
        (
            {0.0: [math.nan, math.nan], 0.5: [1, 2], 0.7: [1, 2]},
            [],
            "Nothing can be compared, because no run with noise=0.0 finished with a finite validation perplexity.",
        ),
        (
            {0.0: [0, math.nan], 0.5: [math.nan, 1]},
            [],
            "Nothing can be compared, because no two runs that a report compares both finished with a finite valid",
        ),
        (
            {0.0: [0, 1, math.nan], 0.5: [3, math.nan, 4]},
            [],
            "Each pair of settings shares only one seed, so no difference can be told from chance, and the comparison",
        ),
        (
            {0.0: [0, 0], 0.5: [9, 9]},
            [],
            "0.5 instead of 0.0 raises the validation perplexity by 9 in each of 2 seeds.",
        ),
        ({0.0: [0, 0], 0.5: [0, 0]}, [], "0.5 instead of 0.0 leaves the validation perplexity as it is in each of 2 "),
    ],
)
def test_the_answer_is_one_sentence_that_follows_from_the_runs(
    effects: dict[float, list[float]], claims: list[dict[str, object]], words: str, tmp_path: Path
) -> None:
    """It says the surest effect; or else that nothing is decided, and what would decide the largest difference."""
    for noise, values in effects.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"noise={noise},seed={seed}"
            write_run(folder, {"val/perplexity": 100.0 + value}, seed=seed, noise=noise, claims=claims)
    if not effects:
        write_run(tmp_path / "failed", {}, status="failed", seed=1)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    assert words in headline(inputs)
    assert inputs.search or headline(inputs).count(". ") == 0


def test_the_answer_says_how_a_difference_relates_to_the_margin(tmp_path: Path) -> None:
    """A difference that is no accident may still be one that counts as none."""
    for seed, noise in product((1, 2, 3), (0.0, 0.5)):
        values = {"val/perplexity": 100 + (1 + seed / 100) * (noise > 0)}
        write_run(tmp_path / f"{seed},{noise}", values, seed=seed, noise=noise)
    runs = load_runs([tmp_path])
    for margin, words in ((0.5, "beyond"), (1.01, "not shown to exceed"), (2, "within")):
        [inputs] = collect_inputs(runs, ReportOptions(margins={"val/perplexity": margin}))
        assert f"raises the validation perplexity by 1.02, {words} the margin of {margin} (95 %" in headline(inputs)


def test_the_answer_compares_no_losses_of_routers_that_see_later_tokens_with_others(tmp_path: Path) -> None:
    """It gives the largest difference among the others and the reason; a metric that is no loss is compared."""
    why = "left out of this answer, because settings that see later tokens have losses that are not comparable with"
    for seed, causal in product((1, 2), (True, False)):
        values = {"val/perplexity": 50.0 + 50 * causal, "routing/load_cv/pooled": 0.5 * causal + 1e-5 * causal * seed}
        write_run(tmp_path / f"{causal},{seed}", values, causal=causal, seed=seed, noise=0)
    runs = load_runs([tmp_path])
    [inputs] = collect_inputs(runs)
    surest = "but 1 of 1 comparison that nobody planned shows more than chance: router expert_choice (not causal) inst"
    assert headline(inputs).startswith(f"The comparison is {why}")
    assert surest in headline(inputs)
    for seed in (1, 2):
        write_run(tmp_path / f"noisy,{seed}", {"val/perplexity": 101.0}, seed=seed, noise=0.1)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    begin = "noise 0.1 instead of 0.0 at router=topk raises the validation perplexity by 1 in each of 2 seeds; "
    begin += "1 comparison is "
    assert headline(inputs).startswith(begin + why)


def test_a_report_says_whether_arms_were_tuned_equally(tmp_path: Path) -> None:
    """An arm that lacks a run at one learning rate had another budget."""
    rate = "optimizer.muon_lr"
    for noise, lr, seed in product((0.0, 0.1), (0.01, 0.02), (1, 2)):
        settings = {"seed": seed, "noise": noise, rate: lr}
        write_run(tmp_path / f"{noise},{lr},{seed}", {"val/perplexity": 100 + noise + lr + seed}, **settings)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    assert _tuning(inputs).startswith(
        f"tuned equally: yes, each setting of noise has the same 2 values of {rate}; no seed"
    )
    change_record(tmp_path / "0.1,0.02,2", status="failed", error="stopped")
    [inputs] = collect_inputs(load_runs([tmp_path]))
    assert _tuning(inputs) == f"tuned equally: no, the settings of noise differ in how many runs finished by {rate}"


def test_the_best_setting_says_what_it_leaves_out(tmp_path: Path) -> None:
    """A router that sees later tokens and a setting without a value are no candidates, and the reader is told."""
    for seed in (1, 2):
        for noise in (0.0, 0.1, 0.2):
            values = {"val/perplexity": math.nan if noise == 0.2 else 100 + seed + 10 * noise}
            write_run(tmp_path / f"noise={noise},seed={seed}", values, seed=seed, noise=noise)
        write_run(tmp_path / f"acausal,seed={seed}", {"val/perplexity": 50.0}, causal=False, seed=seed, noise=0.0)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    [text, luck, _] = best_setting(inputs)
    assert (
        "of 2 settings, router=topk, noise=0.0 has the lowest validation perplexity: 101.5 ± 0.71 (mean and standard "
        in text
    )
    assert "is 0.5 below the mean of both settings; if all were equal, the best of 2 would be 0 below the mean" in luck
    assert (
        "judges it on validation text, as there is no test text. On average, the validation perplexity of the chosen "
        "setting is then 0.5 below the mean" in luck
    )
    acausal = "Left out: router=expert_choice (not causal), noise=0.0 (they see later tokens"
    assert acausal in text
    assert "Left out: router=topk, noise=0.2 (no finished run has a finite validation perplexity)." in text


def test_two_names_of_one_setting_count_once_where_settings_are_counted(tmp_path: Path) -> None:
    """A temperature of 1 gives what top-k gives, in every seed, to the last bit; at 2 it does not."""
    temperatures = {"a": None, "b": 1.0, "c": 2.0}
    for seed, (name, temp) in product((1, 2, 3), temperatures.items()):
        loss = math.log(100 + seed) + (0.1 + seed / 100) * (temp == 2)
        folder = tmp_path / "r" / f"{name} {seed}"
        write_run(folder, {"val/loss": loss, "val/perplexity": math.exp(loss)}, seed=seed)
        router, settings = ("temperature", {"router.temp": temp}) if temp else ("topk", {})
        config = {"seed": seed, "router._target_": router} | settings
        change_record(folder, choices={"router": router}, config=config, identity=config)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    text, luck, *_ = best_setting(inputs)
    assert "of 2 settings, router=topk has" in text
    assert "That of the next one, router=temperature, router.temp=2.0, is" in text
    assert "the mean of both settings; if all were equal, the best of 2 would" in luck
    [said] = about_same_settings(inputs)
    assert said.startswith(
        "router=topk and router=temperature, router.temp=1.0 gave the same results in every seed, so they are one "
        "setting with 2 names. It counts once"
    )
    assert said in write_report(load_runs([tmp_path]), tmp_path / "out").read_text()
    metrics = json.loads((tmp_path / "r" / "b 3" / "metrics.json").read_text())
    changed = metrics["final_metrics"]["val/loss"] + 1e-15
    write_metrics(tmp_path / "r" / "b 3", metrics["final_metrics"] | {"val/loss": changed})
    [inputs] = collect_inputs(load_runs([tmp_path]))
    assert not list(about_same_settings(inputs))
    assert "of 3 settings, " in next(best_setting(inputs))


def test_settings_are_ranked_by_the_seeds_that_all_of_them_have(tmp_path: Path) -> None:
    """Noise 0.1 lacks the easy seed 3, and is the best one on the others."""
    losses = {0.0: (130, 132, 80), 0.1: (120, 122), 0.2: (140, 142, 141)}
    for noise, values in losses.items():
        for seed, value in enumerate(values, 1):
            write_run(tmp_path / f"noise={noise},seed={seed}", {"val/perplexity": value}, seed=seed, noise=noise)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    [text, luck, _] = best_setting(inputs)
    assert text.startswith("**Best setting here:** of 3 settings, noise=0.1 has the lowest validation perplexity: 121")
    assert text.endswith("noise=0.0, is 10 higher. Ranked by the seeds that all settings have; without seed 3.")
    assert "is 10 below the mean of all 3 settings;" in luck
    for seed in (1, 2):
        change_record(tmp_path / f"noise=0.1,seed={seed}", status="failed", error="stopped")
    write_run(tmp_path / "noise=0.1,seed=4", {"val/perplexity": 120.0}, seed=4, noise=0.1)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    [text] = best_setting(inputs)
    assert text.endswith("not named, because no seed has a finished run of every setting.")


def test_the_best_setting_is_chosen_by_validation_text_and_judged_by_test_text(tmp_path: Path) -> None:
    """Noise 0.1 is the best on the test text, but the choice does not look there."""
    for seed in (1, 2, 3):
        for noise, val, test in ((0.0, 100, 110), (0.1, 101, 90), (0.2, 102, 100)):
            values = {"val/perplexity": val + seed / 10, "test/perplexity": test + seed / 10}
            write_run(tmp_path / f"noise={noise},seed={seed}", values, seed=seed, noise=noise)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    [text, luck, _] = best_setting(inputs)
    assert text.startswith(
        "**Best setting here:** of 3 settings, noise=0.0 has the lowest validation perplexity: 100.2"
    )
    words = "noise=0.0 has a test perplexity of 110.2 ± 0.1 (mean and standard deviation of 3 seeds)"
    assert f"On test text, by which nothing was chosen, {words}" in luck
    assert "is 1 below the mean of all 3 settings;" in luck
    assert "On average, the test perplexity of the chosen setting is then 10 above the mean of all settings" in luck


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("seconds", "said"), [(2.0, ", 2.00 times as long as the fastest setting;"), (1.001, ";")])
def test_the_cost_of_the_best_setting_is_compared_with_a_faster_one_alone(
    seconds: float, said: str, tmp_path: Path
) -> None:
    for noise in (0.0, 0.1):
        for seed in (1, 2):
            values = {"val/perplexity": 100 + seed + noise, "time/tokens_per_s": 1000.0}
            write_run(tmp_path / f"noise={noise},seed={seed}", values, seed=seed, noise=noise)
    runs = load_runs([tmp_path])
    [inputs] = collect_inputs(runs.assign(train_seconds=runs["noise"].map({0.0: seconds, 0.1: 1.0})))
    [cost] = [text for text in best_setting(inputs) if text.startswith("**Its cost:**")]
    assert f"of training a run{said} training of all runs" in cost


@pytest.mark.usefixtures("undrawn")
def test_speeds_of_a_machine_that_did_other_work_say_nothing_about_settings(tmp_path: Path) -> None:
    for noise in (0.0, 0.1):
        for seed in (1, 2):
            values = {"val/perplexity": 100 + seed + noise, "time/tokens_per_s": 1000.0 + 400 * (seed - 1)}
            write_run(tmp_path / f"noise={noise},seed={seed}", values, seed=seed, noise=noise)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    assert about_speeds(inputs.runs) == ""
    slow = inputs.runs.assign(**{"time/tokens_per_s": [1000.0, 1400.0, 1000.0, 100.0]})
    text = about_speeds(slow)
    assert "the fastest run of noise=0.1 is 10 times as fast as its slowest" in text
    tables = [block.text for block in condition_table(inputs._replace(runs=slow)) if isinstance(block, Paragraph)]
    assert text in tables
    assert text not in [block.text for block in condition_table(inputs) if isinstance(block, Paragraph)]
    assert about_speeds(inputs.runs.drop(columns="time/tokens_per_s")) == ""


@pytest.mark.usefixtures("undrawn")
def test_the_order_of_the_best_two_settings_agrees_with_the_corrected_verdict(tmp_path: Path) -> None:
    """The interval of a single comparison excludes 0, whatever the p after correction is."""
    for seed in range(3):
        for noise, rise in ((0.0, 0.0), (0.1, 2 + seed / 2), (0.2, 9 + 2 * (seed % 2))):
            values = {"val/perplexity": 100 + seed + rise, "test/perplexity": 110 + seed + rise}
            write_run(tmp_path / f"noise={noise},seed={seed}", values, seed=seed, noise=noise)
    [inputs] = collect_inputs(load_runs([tmp_path]), ReportOptions(metrics=("test/perplexity",)))
    for p, end in (
        (
            0.2,
            "(95 % interval 1.3 to 3.7), but corrected for all tests of this report, the order of the two may be luck.",
        ),
        (0.01, "(95 % interval 1.3 to 3.7)."),
    ):
        text = next(best_setting(inputs._replace(contrasts=inputs.contrasts.assign(**{"p Holm": p}))))
        assert text.endswith(f"That of the next one, noise=0.1, is 2.5 higher {end}")
    doubtful = inputs._replace(contrasts=inputs.contrasts.assign(**{"p Holm": 0.2}))
    claim = inputs.judgments[0]._replace(kind="lower", verdict="supported", compared="noise 0.0, averaged vs 0.1")
    text = next(best_setting(doubtful._replace(judgments=[claim])))
    assert "order of the two may be luck; that is about these two settings and this metric alone" in text
    text = next(best_setting(doubtful._replace(judgments=[claim._replace(compared="lb 0.01 vs 0.0")])))
    assert text.endswith("order of the two may be luck.")
    other = inputs.contrasts[inputs.contrasts["level"] == 0.2]
    text = next(best_setting(inputs._replace(contrasts=other)))
    assert text.endswith("(95 % interval 1.3 to 3.7), but no test of this report compares the two.")
    [line] = asked(inputs)
    assert line.startswith("**Asked for, test perplexity:** 2 comparisons (")
    assert re.search(r"The surest is noise 0\.[12] vs 0\.0: \*\*\+[0-9.]+ test perplexity\*\* \[", line)
    page = write_report(load_runs([tmp_path]), tmp_path / "out", inputs.options).read_text()
    assert line in page.split("**Best setting here:**")[0]


def test_a_single_run_is_reported_too(published: Path, tmp_path: Path) -> None:
    run = published / "lb=0.0,noise=0.1,seed=42"
    text = write_report(load_runs([run]), tmp_path / "out").read_text()
    assert "factors: none varies" in text
    assert "learning rates, batch size and data: the same in all runs; not tuned per condition" in text
    assert "131.9 ± –" in text
    assert "- factors: not drawn, no factor varies" in text
    assert "![learning_curves]" in text


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_without_a_finished_run_gets_a_report(tmp_path: Path) -> None:
    (tmp_path / "x" / "seed=1").mkdir(parents=True)
    (tmp_path / "x" / "seed=1" / "run.json").write_text("")
    text = write_report(load_runs([tmp_path / "x"]), tmp_path / "out").read_text()
    assert "unreadable" in text
    assert "learning_curves: not drawn" in text


def test_figures_show_every_seed_and_the_number_of_seeds(published: Path) -> None:
    runs = load_runs([published])
    left, right = factor_panels(runs, "noise", "lb", ["val/perplexity", "routing/load_cv/pooled"]).axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("validation perplexity", "load CV over experts, layers pooled")
    assert left.get_legend_handles_labels()[1] == [
        "load-balancing weight 0.0 (n=3)",
        "load-balancing weight 0.01 (n=3)",
    ]
    seeds = [line for line in left.lines if line.get_markersize() == 4 and len(line.get_xdata()) == 3]
    assert sorted(y for line in seeds for y in line.get_ydata()) == sorted(runs["val/perplexity"])
    events = read_event_tables(runs["folder"]).evals.merge(runs[["folder", "seed", "noise"]], on="folder")
    assert learning_curves(events, "noise").axes[0].get_legend_handles_labels()[1] == [
        *("0.0 (n=6)", "0.1 (n=6)", "0.5 (n=6)")
    ]


def test_a_data_frame_becomes_a_markdown_table() -> None:
    table = pd.DataFrame({"name": ["a|b", None], "p": [0.00123, float("nan")], "mean": [130.23456, -123456.7]})
    assert table_as_markdown(table).split("\n") == [
        "| name | p | mean |",
        "| :--- | ---: | ---: |",
        "| a\\|b | 0.0012 | 130.23 |",
        "| – | – | -123460 |",
    ]
    assert table_as_markdown(pd.DataFrame()) == "(none)"


def test_the_command_prints_the_table_and_the_path_of_the_report(published: Path, tmp_path: Path) -> None:
    done = run_script(ANALYZE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "18 of 18 runs finished\nlook 1 at noise_lb_seed; in the next look, new tests together" in done.stdout
    assert done.stdout.endswith("report: analysis/report.md and analysis/report.html\n")
    assert (tmp_path / "analysis" / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["multirn"], "analyze.py: no folder multirn; the nearest is multirun\n"),
        (["--reference", "lb"], "analyze.py: --reference lb: must be FACTOR=LEVEL, such as lb=0.01\n"),
        (["--margin", "1%"], "analyze.py: --margin 1%: must be METRIC=SIZE, such as val/perplexity=1%\n"),
        (["--reference", "nose=7"], "analyze.py: unknown factor of --reference 'nose'; nearest: noise\n"),
        (["--reference", "depth=7"], "analyze.py: unknown factor of --reference 'depth'; known: lb, noise\n"),
        (
            ["--margin", "val/loss=1%"],
            "analyze.py: --margin val/loss=1%: tested metrics are val/perplexity, routing/load_cv/pooled\n",
        ),
        (
            ["--margin", "val/perplexity=-1"],
            "analyze.py: --margin val/perplexity=-1: must be positive, in units of the metric or a text such as 1%\n",
        ),
        (
            ["--margin", "val/perplexity=abc"],
            "analyze.py: --margin val/perplexity=abc: must be a finite number, or a text such as 5%\n",
        ),
        (["--metric", "val/acuracy"], "analyze.py: unknown metric of --metric 'val/acuracy'; nearest: val/accuracy\n"),
        (
            ["--metric", "noise", "--metric", "val/loss"],
            "analyze.py: unknown metric of --metric 'noise'; docs/metrics.md lists them\n",
        ),
        (["--reference", "lb=7"], "analyze.py: --reference lb=7: allowed are 0.0, 0.01\n"),
    ],
)
def test_a_wrong_command_gets_a_one_line_error(
    published: Path, analyze: Analyze, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    done = analyze(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", complaint)
    assert not (tmp_path / "analysis").exists()
