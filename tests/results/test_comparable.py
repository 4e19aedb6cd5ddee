"""Tests that metrics are compared only between runs that read the same text, cut into the same tokens."""

from pathlib import Path

import pandas as pd
import pytest
from run_folders import write_metrics, write_record

from moe.analysis.claims import judge
from moe.analysis.report.inputs import collect_inputs
from moe.analysis.report.report import write_report
from moe.analysis.sentences import contrast_sentence
from moe.config.claim import ClaimConfig
from moe.launch.run import _say_finished
from moe.results.comparable import incomparable, not_poolable, shown_together
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
