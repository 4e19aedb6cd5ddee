"""Tests of the league of routers and of the share of the distance to the oracle, in reports about made-up runs."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import write_metrics, write_record

from moe.analysis.figures.charts import charts
from moe.analysis.figures.drawing import Drawing
from moe.analysis.league import compared_runs, league_of
from moe.analysis.limits import covered
from moe.analysis.looks import FURTHER, Seen
from moe.analysis.power import SIGNIFICANCE
from moe.analysis.report.blocks import Attachment, Paragraph, TableBlock
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import LEAGUE, ReportInputs
from moe.analysis.report.question import question_of
from moe.analysis.report.sections.best_setting import (
    NOT_COMPARED,
    TURNED,
    UNCERTAIN,
    Setting,
    _by_ranks,
    best_setting,
)
from moe.analysis.report.sections.league import (
    _level,
    _unequal_cost,
    how_much_routing_matters,
    league,
    order_of_routers,
)
from moe.analysis.sentences import with_interval
from moe.analysis.simultaneous import to_reference
from moe.results.learned import learned_little
from moe.results.table import load_runs


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.015, 0.0004, 0.03, "+0.0150 [0.0004, 0.0300]"),
        (-0.0018, -0.0164, 0.0128, "-0.0018 [-0.0164, 0.0128]"),
        (0.185, 0.17, 0.199, "+0.185 [0.170, 0.199]"),
        (0.0, 0.0, 0.0, "+0.000 [0.000, 0.000]"),
        (0.25, math.nan, math.nan, "+0.250"),
    ],
)
def test_an_end_of_an_interval_is_shown_as_zero_only_if_it_is(value: float, low: float, high: float, text: str) -> None:
    assert with_interval(value, low, high, least=3) == text


LOSSES = {"topk": 3.0, "balanced_random": 3.2, "oracle": 2.9, "hash": 3.21, "expert_choice": 2.0}


def inputs_of(
    place: Path, losses: dict[str, float], *, spread: float = 0.01, flops: dict[str, int] | None = None
) -> ReportInputs:
    rng = np.random.default_rng(0)
    for router, seed in product(losses, (1, 2, 3)):
        folder = place / "made_up" / f"{router}{seed}"
        folder.mkdir(parents=True)
        causal = router != "expert_choice"
        cost = (flops or {}).get(router, 1000)
        write_record(folder, choices={"router": router}, config={"seed": seed}, causal=causal, flops_per_token=cost)
        write_metrics(folder, {"val/loss": losses[router] + seed + rng.normal(0, spread)})
        (folder / "events.jsonl").touch()
    [inputs] = collect_inputs(load_runs([place]))
    return inputs


def test_the_league_ranks_causal_routers_with_intervals_that_hold_together(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, LOSSES)
    blocks = list(league(inputs))
    [table] = [block.frame for block in blocks if isinstance(block, TableBlock)]
    by_router = table.set_index("router")
    assert list(by_router.index) == ["oracle", "topk", *by_router.index[2:4], "expert_choice (not causal)"]
    assert by_router.loc["oracle", "95 % interval of the rank"] == "1 to 1"
    assert by_router.loc["hash", "95 % interval of the rank"] == "3 to 4", "as good as balanced_random"
    assert by_router.loc["expert_choice (not causal)", ["rank", "causal"]].tolist() == ["–", "no"]
    runs = inputs.runs[inputs.runs["causal"]]
    gap = to_reference(runs.pivot_table("val/loss", "seed", "router"), "topk").loc["oracle"]
    expected = f"{gap['difference']:+.3f} [{gap['low']:.3f}, {gap['high']:.3f}]".replace("-", "\N{MINUS SIGN}")
    compared = "difference from topk [interval, all together]"
    assert by_router.loc["oracle", compared].replace("-", "\N{MINUS SIGN}") == expected
    assert by_router.loc[["oracle", "topk", "hash", "expert_choice (not causal)"], "verdict"].tolist() == [
        "better",
        "–",
        "worse",
        "–",
    ], "of the interval beside it"
    assert [each.name for each in blocks if isinstance(each, Attachment)] == ["league.csv"]
    [figure] = [each.figure for each in blocks if isinstance(each, Drawing)]
    assert figure is not None
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{number}. {name}" for number, name in enumerate(by_router.index[:4], 1)
    ]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points[0] == pytest.approx(gap["difference"])
    limits = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    assert limits["oracle"].get_xdata()[0] == pytest.approx(gap["difference"])
    assert charts(figure) is not None, "the page shows values"


def test_a_later_look_at_a_league_has_less_of_its_level(tmp_path: Path) -> None:
    """The third seed was added after a report about two, so that look gets a fifth of the level."""
    inputs = inputs_of(tmp_path, {"topk": 3.0, "hash": 3.08, "random": 3.09})
    assert "is certainly the best of 3 routers" in order_of_routers(inputs)
    before = {folder: run.setting for folder, run in inputs.study.runs.items() if run.seed < 3}
    later = inputs._replace(study=replace(inputs.study, earlier=[Seen("2026-01-01", before, 2, 2)]))
    assert "better than it is: random. The other one is worse than some router." in order_of_routers(later)
    blocks = list(league(later))
    [table] = [block.frame for block in blocks if isinstance(block, TableBlock)]
    assert table["99 % interval of the rank"].tolist() == ["1 to 2", "2 to 3", "1 to 3"]
    runs = inputs.runs.pivot_table("val/loss", "seed", "router")
    gap = to_reference(runs, "topk", 0.01).loc["hash"]
    shown = table.set_index("router").loc["hash", "difference from topk [interval, all together]"]
    assert shown == with_interval(*gap, least=3)
    assert "corrected for the number of routers and of looks: in 99 % of cases all" in " ".join(str(blocks).split())


def test_models_that_learned_too_little_have_no_certain_winner(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, LOSSES)
    perplexity = {"val/perplexity": 100.0, "unigram_perplexity": 90.0}
    little = inputs._replace(learned_little=learned_little(inputs.runs.assign(**perplexity)))
    assert little.learned_little
    assert "is certainly the best" in order_of_routers(inputs)
    assert "oracle has the lowest validation loss" in order_of_routers(little)
    assert "certain" not in order_of_routers(little)
    blocks = list(league(little))
    [table] = [block.frame for block in blocks if isinstance(block, TableBlock)]
    assert not [column for column in table if "interval" in column or column == "verdict"]
    assert "no verdicts, because no setting is better than a unigram model" in str(blocks)


def test_the_share_is_that_of_fieller_and_a_bad_oracle_is_named(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path / "good", LOSSES)
    blocks = list(how_much_routing_matters(inputs))
    [table] = [block.frame for block in blocks if isinstance(block, TableBlock)]
    values = inputs.runs.pivot_table("val/loss", "seed", "router")
    share = covered(*(values[name].to_numpy() for name in ("topk", "balanced_random", "oracle")))
    shown = table.set_index("router").loc["topk", "share covered"]
    assert shown == f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]"
    [explained] = [each.text for each in blocks if isinstance(each, Paragraph)]
    assert "for a single look" in explained
    [figure] = [each.figure for each in blocks if isinstance(each, Drawing)]
    assert figure is not None
    points = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert points == sorted(points, reverse=True)
    assert share.value in points
    for name, oracle, words in (("worse", 3.4, "is worse than"), ("unclear", 3.2, "not clear from zero")):
        found = inputs_of(tmp_path / name, LOSSES | {"oracle": oracle})
        blocks = list(how_much_routing_matters(found))
        assert words in str(blocks)
        assert [each.figure for each in blocks if isinstance(each, Drawing)] == [None]


@pytest.mark.parametrize(
    ("flops", "said"),
    [
        ({"oracle": 981}, ""),
        ({"oracle": 800}, "`balanced_random` takes 25 % more FLOPs per token than `oracle`"),
        ({"hash": 1030}, "`hash` takes 3 % more FLOPs per token than `balanced_random`"),
    ],
)
def test_the_share_says_if_the_routers_cost_differently(flops: dict[str, int], said: str, tmp_path: Path) -> None:
    losses = {name: LOSSES[name] for name in ("balanced_random", "hash", "oracle")}
    blocks = how_much_routing_matters(inputs_of(tmp_path, losses, flops=flops))
    [_, *doubts] = [block.text for block in blocks if isinstance(block, Paragraph)]
    assert len(doubts) == bool(said)
    assert all(said in text and "`model.ffn=${equal_flops:F}`" in text for text in doubts)


def test_equal_widths_are_advised_only_where_all_routers_have_one() -> None:
    routers = pd.DataFrame({"router": ["oracle", "hash"], "flops_per_token": [1000, 1100], "model.ffn": [64, 64]})
    [advised] = _unequal_cost([routers])
    assert "`model.ffn=${equal_flops:F}` makes the costs equal" in advised
    [chosen] = _unequal_cost([routers.assign(**{"model.ffn": [64, 60]})])
    assert "equal_flops" not in chosen
    assert "although the widths of the experts were chosen for each router" in chosen


def test_a_league_names_the_routers_and_seeds_without_a_place_and_judges_alone(tmp_path: Path) -> None:
    """By validation text hash is first. By test text, which chose nothing, it is oracle."""
    inputs = inputs_of(tmp_path, LOSSES | {"nan": math.nan, "lost": math.nan})
    values = inputs.runs["val/loss"].to_numpy()
    runs = inputs.runs.assign(**{"val/perplexity": values, "test/loss": values})
    runs.loc[runs["router"] == "hash", "val/perplexity"] -= 1
    runs.loc[(runs["router"] == "oracle") & (runs["seed"] == 2), "test/loss"] = math.nan
    runs.loc[runs["router"] == "lost", "status"] = "diverged"
    inputs = inputs._replace(runs=runs)
    lacking = (
        "Left out: lost (no run with a finite test/loss: 3 diverged); nan (no run with a finite test/loss: 3 "
        "finished); "
        "seed 2 (no finite test/loss of oracle)."
    )
    assert lacking in [block.text for block in league(inputs) if isinstance(block, Paragraph)]
    assert order_of_routers(inputs).endswith(lacking)
    first, *_ = best_setting(inputs)
    assert first.startswith("**Lowest on the validation text, which is no verdict:** of 4 settings, router=hash ")
    assert "The verdict is that of the league, by test loss, which\nchose nothing: oracle is first." in first
    assert question_of(inputs)[0].ask.endswith("do to test loss?")
    same = inputs._replace(runs=runs.assign(**{"val/perplexity": values}))
    assert next(best_setting(same)).startswith("**Best setting here:** of 4 settings, router=oracle has")


def test_without_three_routers_with_a_loss_the_report_says_why_there_is_no_league(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, {"topk": 3.0, "hash": 3.1, "nan": math.nan})
    [_, said] = league(inputs)
    assert isinstance(said, Paragraph)
    assert " ".join(said.text.split()) == (
        "None: a league needs at least 3 causal routers with a finite val/loss, topk among them, and a seed that all "
        "of these have. Of 3 routers, 2 have a finite val/loss, and 2 of these are causal."
    )
    [_, said] = league(inputs_of(tmp_path / "later", {"topk": 3.0, "hash": 3.1, "expert_choice": 2.0}))
    assert isinstance(said, Paragraph)
    assert said.text.endswith("Of 3 routers, 3 have a finite val/loss, and 2 of these are causal.")


def test_the_next_setting_is_told_apart_by_the_ranks_of_the_league(tmp_path: Path) -> None:
    """No contrast compares hash with balanced_random, because topk is the reference."""
    names = ("hash", "balanced_random")
    for number, (gap, words) in enumerate(((0.5, ""), (0.0001, UNCERTAIN), (-0.5, TURNED))):
        losses = {"topk": 3.0, "hash": 2.0, "balanced_random": 2.0 + gap}
        inputs = inputs_of(tmp_path / str(number), losses)
        settings = [Setting({"router": name}, name, inputs.runs, pd.Series(dtype=float)) for name in names]
        assert _by_ranks(inputs, *settings) == words
    assert _by_ranks(inputs, settings[0], settings[1]._replace(levels={"router": "none"})) == NOT_COMPARED


@pytest.mark.parametrize("losses", [{"topk": 3.0, "hash": 3.1}, {"topk": 3.0, "hash": 3.1, "random": 3.2}])
def test_two_routers_are_no_league_and_without_limits_there_is_no_share(losses: dict, tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, losses)
    assert bool(list(league(inputs))) == (len(losses) > 2)
    assert list(how_much_routing_matters(inputs)) == []


def test_a_league_keeps_its_level_if_its_runs_stay_the_same(tmp_path: Path) -> None:
    """A look before saw all but the last seed of one router. Without that run, the others of its seed do not count."""
    inputs = inputs_of(tmp_path, {"topk": 3.0, "hash": 3.08, "random": 3.09})
    added = inputs.runs[inputs.runs["router"] == "hash"].sort_values("seed").iloc[-1]
    lacking = inputs.runs[(inputs.runs["seed"] != added["seed"]) | (inputs.runs["router"] == "topk")]
    complete = inputs.runs[inputs.runs["seed"] != added["seed"]]
    assert {*compared_runs(lacking, "val/loss")["folder"]} == {*complete["folder"]}
    before = {folder: run.setting for folder, run in inputs.study.runs.items() if run.seed != added["seed"]}
    later = inputs._replace(study=replace(inputs.study, earlier=[Seen("2026-01-01", before, 2, 2)]))
    assert _level(later, compared_runs(lacking, "val/loss")) == pytest.approx(SIGNIFICANCE)
    assert _level(later, compared_runs(inputs.runs, "val/loss")) == pytest.approx(SIGNIFICANCE / 5)


def test_a_mean_is_over_the_seeds_that_all_ranked_routers_have() -> None:
    """A router with two more seeds, both bad, keeps the lowest mean."""
    rows = [(name, seed, 5 + place / 10 + seed / 100) for place, name in enumerate("abc") for seed in (1, 2, 3)]
    rows += [("a", seed, 7.0) for seed in (4, 5)]
    runs = pd.DataFrame(rows, columns=["router", "seed", "test/loss"]).assign(causal=True)
    found = league_of(runs, "test/loss", "a")
    assert found is not None
    assert found.table["mean"].to_dict() == pytest.approx({"a": 5.02, "b": 5.12, "c": 5.22})
    assert found.table["n"].to_dict() == {"a": 3, "b": 3, "c": 3}, "those of the mean"


def test_a_league_with_another_reference_is_another_one(tmp_path: Path) -> None:
    """The league compares with top-k, and the contrasts with the first router, unless the reader names a reference."""
    losses = {"hash": 3.08, "topk": 3.0, "random": 3.09}
    inputs = inputs_of(tmp_path, losses)
    first = inputs.study.present._replace(time="2026-01-01")
    league_of = {name: each for name, each in inputs.study.references.items() if name == LEAGUE}
    assert league_of == {LEAGUE: "topk"}
    for reference, share in (("topk", 1.0), ("random", FURTHER)):
        asked = inputs.study.references | {LEAGUE: reference}
        later = inputs._replace(study=replace(inputs.study, earlier=[first], references=asked))
        assert _level(later, inputs.runs) == pytest.approx(SIGNIFICANCE * share)
