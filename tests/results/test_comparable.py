"""Tests that metrics are compared only between runs that read the same text, cut into the same tokens.

Times are compared only between runs that took turns.
"""

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import write_metrics, write_record
from scipy import stats

from moe.analysis.claims import judge
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportOptions
from moe.analysis.report.report import write_report
from moe.analysis.sentences import contrast_sentence
from moe.config.cell import Cell
from moe.config.claim import ClaimConfig
from moe.launch.command_line import in_turns, read_cells
from moe.launch.run import _say_finished
from moe.results.comparable import apart, incomparable, not_poolable, shown_together
from moe.results.sweep_tables import console_table
from moe.results.table import load_runs
from moe.runs.place import Place


def runs_of(tmp_path: Path, *, key: str, digest: str) -> pd.DataFrame:
    """Return runs of two levels of a key of the data, with three seeds each. The digest differs between the levels."""
    for level in (300, 600):
        for seed in (1, 2, 3):
            folder = tmp_path / "text" / f"{level},{seed}"
            folder.mkdir(parents=True)
            digests = {"corpus_sha256": "a", "tokenizer_sha256": "b"} | {digest: f"digest {level}"}
            write_record(folder, config={key: level, "seed": seed}, data=digests)
            values = {"val/perplexity": level / 10 + seed / 5, "val/bits_per_byte": 2 + level / 1e4 + seed**2 / 1e3}
            write_metrics(folder, values | {"routing/load_cv/pooled": level / 1e3 + seed**2 / 1e2})
    return load_runs([tmp_path])


def sentences(runs: pd.DataFrame) -> dict[str, str]:
    [inputs] = collect_inputs(runs)
    return {
        row["metric"]: contrast_sentence(row, "", unit="", up="up", down="down")
        for _, row in inputs.contrasts.iterrows()
    }


def test_bits_per_byte_replace_the_perplexity_if_tokenizers_differ(tmp_path: Path) -> None:
    found = sentences(runs_of(tmp_path, key="data.vocab_size", digest="tokenizer_sha256"))
    assert found.keys() == {"val/bits_per_byte", "routing/load_cv/pooled"}
    assert not [text for text in found.values() if "not comparable" in text]


@pytest.mark.usefixtures("undrawn")
def test_means_over_tokens_of_two_tokenizers_stand_in_no_table_of_conditions(tmp_path: Path) -> None:
    """The report says why, and that the tokenizer follows the size of the vocabulary."""
    runs = runs_of(tmp_path, key="data.vocab_size", digest="tokenizer_sha256")
    text = write_report(runs, tmp_path / "out").read_text()
    assert "The runs have different tokenizers" in text
    assert "| data.tokenizer_sha256 | digest 300 (×3), digest 600 (×3) | follows data.vocab_size |" in text
    for table in (console_table(runs), text.split("### Conditions")[1].split("##")[0]):
        assert "val/bits_per_byte" in table
        assert "val/perplexity" not in table
    assert "val/perplexity" in console_table(runs[:3])


def test_nothing_about_the_test_text_is_shown_where_results_choose(tmp_path: Path) -> None:
    """The runs that tune a key are those of a search. The runs that judge its values are not."""
    runs = runs_of(tmp_path, key="noise", digest="corpus_sha256").assign(**{"test/loss": 4.0})
    assert "test/loss" in console_table(runs)
    tuning = runs.assign(search="minimize val/loss")
    assert "test/" not in console_table(tuning)
    assert not [name for each in collect_inputs(tuning) for name in each.metrics if name.startswith("test/")]


@pytest.mark.parametrize("tested", [True, False])
def test_the_last_line_of_a_run_that_chooses_leaves_the_test_text_out(
    tested: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _say_finished(Place(), {"val/perplexity": 5.0, "test/perplexity": 6.0}, tested=tested)
    assert caplog.messages == [f"finished, val perplexity 5.00{', test perplexity 6.00' if tested else ''}"]


def test_nothing_that_depends_on_the_validation_text_is_compared_between_texts(tmp_path: Path) -> None:
    found = sentences(runs_of(tmp_path, key="data.val_percent", digest="corpus_sha256"))
    assert found["val/perplexity"].startswith(": **not comparable**: the validation texts differ")
    assert "not comparable" not in found["routing/load_cv/pooled"]


@pytest.mark.parametrize(("metric", "comparable"), [("val/perplexity", False), ("val/bits_per_byte", True)])
def test_a_claim_about_a_mean_over_tokens_is_not_judged_between_tokenizers(
    metric: str, comparable: bool, tmp_path: Path
) -> None:
    runs = runs_of(tmp_path, key="data.vocab_size", digest="tokenizer_sha256")
    claim = ClaimConfig(text="", metric=metric, factor="data.vocab_size", levels=[300], than=[600], kind="lower")
    [judged] = judge(runs, [claim]).to_dict("records")
    assert (judged["n"] == 3) == comparable
    if not comparable:
        assert judged["verdict"] == "not tested"
        assert judged["reason"].startswith("not comparable: the tokenizers differ")


def test_a_missing_run_is_no_reason_not_to_compare(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, key="data.val_percent", digest="tokenizer_sha256").assign(**{"data.val_percent": 10})
    missing = runs.iloc[:1].assign(**dict.fromkeys(["val/perplexity", "data.corpus_sha256", "data.val_percent"]))
    assert incomparable("val/perplexity", runs[:3], missing) == ""
    assert not_poolable("val/perplexity", pd.concat([runs[:3], missing])) == ""
    assert incomparable("val/perplexity", runs[:3], runs[3:]).startswith("not comparable: the tokenizers differ")


def test_the_mean_over_layers_stands_for_a_pooled_load_that_a_run_does_not_have() -> None:
    """Layers with different numbers of experts have no load together."""
    runs = pd.DataFrame({"routing/load_cv": [0.1, 0.2], "routing/load_cv/pooled": [0.05, None], "val/loss": [1.0, 2.0]})
    shown = ["val/loss", "routing/load_cv/pooled"]
    assert shown_together(runs, shown) == ["val/loss", "routing/load_cv"]
    assert shown_together(runs.drop(columns="routing/load_cv/pooled"), shown) == ["val/loss", "routing/load_cv"]
    assert shown_together(runs.iloc[:1], shown) == shown
    assert shown_together(runs.drop(columns="routing/load_cv"), shown) == shown


MINUTE = timedelta(minutes=1)  # what a run takes in these tests
SETTINGS = 6
ORDERS = {
    "settings": lambda seeds: list(itertools.product(range(SETTINGS), range(seeds))),
    "seeds": lambda seeds: [(setting, seed) for seed in range(seeds) for setting in range(SETTINGS)],
}


def times(order: list[tuple[int, int]], workers: int = 1) -> pd.DataFrame:
    """Return runs of (setting, seed) in the order in which they start, so many at a time."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return pd.DataFrame(
        {
            "router": [f"r{setting}" for setting, _ in order],
            "seed": [seed for _, seed in order],
            "started": [(start + place // workers * MINUTE).isoformat() for place in range(len(order))],
            "seconds": MINUTE.total_seconds(),
        }
    )


def why_apart(order: list[tuple[int, int]], workers: int = 1) -> str:
    runs = times(order, workers)
    return apart(runs[runs["router"] == "r1"], runs[runs["router"] == "r4"], ("r1", "r4"))


@pytest.fixture(scope="module")
def in_order() -> partial[list[tuple[int, int]]]:
    """Return the function that orders the runs of a sweep with so many seeds as train.py starts them."""
    [cell] = read_cells(["router=hash"]) or []
    return partial(_as_started, cell)


def _as_started(cell: Cell, seeds: int) -> list[tuple[int, int]]:
    cells = [
        cell._replace(config=replace(cell.config, seed=seed), folder=Path(str(setting)))
        for setting, seed in ORDERS["settings"](seeds)
    ]
    return [(int(each.folder.name), each.config.seed) for each in in_turns(cells)]


def loads(kind: str, studies: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Return the log of how much other work slows each run, (studies, runs), in the order of the runs in time."""
    place = np.arange(runs)
    if kind == "none":
        return np.zeros((studies, runs))
    if kind == "random walk":
        return rng.normal(0, 0.02, (studies, runs)).cumsum(axis=1)
    if kind == "trend":
        return 0.2 * rng.normal(size=(studies, 1)) * place / runs
    if kind == "waves":
        period = runs * rng.uniform(0.3, 3, (studies, 1))
        return 0.2 * np.sin(2 * np.pi * (place / period + rng.random((studies, 1))))
    changes = rng.random((studies, runs)) < 0.1  # another job begins or ends
    return 0.5 * (changes.cumsum(axis=1) % 2)


LOADS = ("none", "random walk", "trend", "waves", "another job")


def false_verdicts(order: list[tuple[int, int]], seeds: int, load: str, studies: int = 4000) -> float:
    """Return how often two of six equally fast settings differ at 5 %; a run has 1 % of spread of its own."""
    rng = np.random.default_rng(0)
    slowed = loads(load, studies, len(order), rng) + rng.normal(0, 0.01, (studies, len(order)))
    one, other = (slowed[:, [order.index((setting, seed)) for seed in range(seeds)]] for setting in (1, 4))
    return float((stats.ttest_rel(one, other, axis=1).pvalue <= 0.05).mean())


@pytest.mark.parametrize("seeds", [3, 4, 5, 8])
def test_chance_and_a_drifting_load_decide_five_percent_of_speeds_if_runs_took_turns(
    seeds: int, in_order: partial[list[tuple[int, int]]]
) -> None:
    """The orders that are not judged err in up to 90 %. docs/statistics.md has the rates."""
    assert why_apart(in_order(seeds)) == ""
    assert max(false_verdicts(in_order(seeds), seeds, load) for load in LOADS) < 0.075
    for order in ORDERS.values():
        assert why_apart(order(seeds)) != ""
        assert max(false_verdicts(order(seeds), seeds, load) for load in LOADS) > 0.4


def test_the_reason_says_how_the_runs_lie_in_time(in_order: partial[list[tuple[int, int]]]) -> None:
    """One seed apart from its partner is not enough to mislead a test, so it is allowed."""
    assert why_apart(ORDERS["settings"](4)).startswith("all runs of r1 ended before those of r4 began")
    assert why_apart(ORDERS["seeds"](4)).startswith("r1 ran before r4 in 4 of 4 seeds")
    order = in_order(6)
    late = [[each for each in order if each not in again] + again for again in ([(4, 0)], [(4, 0), (4, 1)])]
    assert why_apart(late[0]) == ""
    assert why_apart(late[1]).startswith("in 2 of 6 seeds, other seeds ran between r1 and r4")
    assert why_apart(ORDERS["settings"](4), workers=24) == ""  # all at once
    assert why_apart(in_order(6), workers=2) == ""
    assert apart(times(order[:1]), times(order[1:2])) == ""


def test_settings_are_pooled_only_if_each_took_turns_with_each() -> None:
    """Setting 0 took turns with 1 and with 2, but 1 ran before 2 in both seeds."""
    runs = times([(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (0, 1)])
    runs = runs.assign(**{"time/tokens_per_s": 1.0, "experiment": "made up"})
    assert not_poolable("time/tokens_per_s", runs[runs["router"] != "r2"], timed=True) == ""
    assert not_poolable("time/tokens_per_s", runs[runs["router"] != "r1"], timed=True) == ""
    assert "ran before" in not_poolable("time/tokens_per_s", runs, timed=True)


@pytest.mark.parametrize("kind", ["higher", "mixed", "interaction"])
@pytest.mark.parametrize("turns", [True, False])
def test_a_claim_about_a_speed_is_judged_only_if_the_runs_took_turns(
    kind: str, turns: bool, tmp_path: Path, in_order: partial[list[tuple[int, int]]]
) -> None:
    order = in_order(4) if turns else ORDERS["settings"](4)
    for (setting, seed), (_, when) in zip(order, times(order).iterrows(), strict=True):
        folder = tmp_path / "speed" / f"{setting},{seed}"
        folder.mkdir(parents=True)
        config = {"noise": float(setting % 3), "lb": setting // 3 / 100, "seed": seed}
        write_record(folder, config=config, started=when["started"], seconds=when["seconds"])
        write_metrics(
            folder,
            {"time/tokens_per_s": 1000 - 9 * setting**2 + seed**2 * (setting + 1) % 7, "val/loss": 1 + seed / 10},
        )
    names = {"direction": "higher"} if kind != "higher" else {}
    within = {"lb": [0.0, 0.01]} if kind == "interaction" else {}
    claim = ClaimConfig("", "time/tokens_per_s", "noise", [0.0], kind, than=[1.0], within=within, **names)
    runs = load_runs([tmp_path])
    assert runs["seed"].nunique() == 4
    [judged] = judge(runs, [claim]).to_dict("records")
    if turns:
        assert judged["verdict"] == "supported"
    else:
        assert judged["verdict"] == "not tested"
        assert judged["reason"].startswith("not comparable: all runs of ")
    [quality] = judge(runs, [replace(claim, metric="val/loss", at=None)]).to_dict("records")
    assert not quality["reason"].startswith("not comparable")
    [inputs] = collect_inputs(runs, ReportOptions(metrics=("time/tokens_per_s",)))
    notes = inputs.contrasts.loc[inputs.contrasts["metric"] == "time/tokens_per_s", "note"]
    assert len(notes)
    assert notes.str.startswith("not comparable").all() == (not turns)
