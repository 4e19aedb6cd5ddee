"""Tests of what a report says in words about the experts of one model: more than chance, or not."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_folders import write_metrics, write_record
from scipy.stats import norm

from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.report import write_report
from moe.analysis.report.sections.experts import findings
from moe.analysis.report.sections.headline import headline
from moe.checks import parse
from moe.results.table import load_runs
from moe.runs.record import FORMAT, SpecializationRecord

LAYERS, EXPERTS, DOCUMENTS = 2, 4, 1000
METRICS = {
    "val/perplexity": 50.0,
    "routing/load_cv/layer00": 0.25,
    "routing/load_cv": 0.25,
    "routing/load_cv/pooled": 0.125,
}


def interval(mean: Any, reach: float | None = 1.0) -> dict[str, Any]:
    """Return means with intervals that reach equally far to both sides; no interval for None."""
    values = np.asarray(mean, dtype=float)
    ends = [np.full(values.shape, None) if reach is None else values + sign * reach for sign in (-1, 1)]
    low, high = (end.tolist() for end in ends)
    return {"mean": values.tolist(), "low": low, "high": high, "documents": DOCUMENTS}


def comparison(p: float) -> dict[str, Any]:
    values = {"observed": 0.1, "normalized": 0.2, "null": 0.1, "null_high": 0.15, "adjusted": 0.125}
    return {**values, "z": 3.0, "p": p}


def measured(
    *,
    p_domain: tuple[float, ...] = (0.9, 0.9),
    smallest_p: float = 0.001,
    excess: Any = None,
    advantage: tuple[float, float] = (0.0, 0.0),
    by_k: dict[int, float] | None = None,
    reach: float | None = 1.0,
) -> dict[str, Any]:
    """Return measurements of a model with two experts per token, in which nothing is more than chance by default."""
    zeros = np.zeros((LAYERS, EXPERTS))
    rows = [comparison(p) | {"smallest_p": smallest_p, "documents": 9, "bias": 0.0, "ami": 0.0} for p in p_domain]
    token = {"ids": 5, "tokens": 99, "id": comparison(0.01), "specialization": comparison(0.01)}
    beyond = zeros if excess is None else np.array(excess)
    knockout: dict[str, Any] = {"delta": interval(beyond + 0.5, reach), "null": interval(zeros + 0.5, reach)}
    knockout |= {"excess": interval(beyond, reach), "domains": [0], "by_domain": zeros[..., None].tolist()}
    knockout |= {"rho": [0.0, 0.0], "rho_excess": [0.0, 0.0]}
    one = {"rho": 0.5, "low": 0.1, "high": 0.8}
    rho, hit = {"layers": [one, one], "all": one}, {"overlap": 0.75, "kappa": 0.5}
    regret = {"regret": interval(0.5, reach), "better": interval(0.5, reach), "tokens": 4, "routes": 4, "values": [0.0]}
    differences = {2: interval(0, 0.0)} | {k: interval(mean, reach) for k, mean in (by_k or {}).items()}
    return {
        "tokens": 99,
        "blocks": 9,
        "documents": DOCUMENTS,
        "domains": ["docs", "math"],
        "experts_per_token": [2.0, 2.0],
        "load": (zeros + 0.25).tolist(),
        "given_domain": np.full((LAYERS, 2, EXPERTS), 0.25).tolist(),
        "domain": rows,
        "vocabulary": {name: [token, token] for name in ("input", "next", "predicted")},
        "given_position": np.full((LAYERS, 10, EXPERTS), 0.25).tolist(),
        "coactivation": np.full((LAYERS, EXPERTS, EXPERTS), 0.3).tolist(),
        "coactivation_chance": [0.3, 0.3],
        "keywords": [[{"keywords": [], "contexts": []}] * EXPERTS] * LAYERS,
        "knockout": {"rerouted": knockout, "zeroed": knockout},
        "regret": [regret | {"advantage": interval(mean, reach)} for mean in advantage],
        "loss_by_k": [{"k": k, "loss": interval(3.0), "difference": each} for k, each in sorted(differences.items())],
        "landscape": None,
        "embedding": None,
        "similarity": {"outputs": np.full((LAYERS, EXPERTS, EXPERTS), 0.3).tolist(), "weights": None},
        "saliency": {"values": (zeros + 1).tolist(), "rho": dict.fromkeys(("rerouted", "zeroed"), rho)},
        "next_layer": [{"transitions": np.ones((EXPERTS, EXPERTS)).tolist(), "by_choice": hit, "by_state": None}],
        "saturation": [{"step": 0, "overlap": [1, 1], "kappa": [1, 1], "kappa_shuffled": [1, 1]}],
        "churn": [],
        "seed_agreement": [],
    }


def observed(folder: Path, content: dict[str, Any] | None) -> pd.DataFrame:
    """Write the folder of a model that was evaluated and not trained, and return the table of this run."""
    folder.mkdir()
    write_record(folder, config={"steps": 0, "seed": 1, "question": ""}, choices={"router": "topk"})
    write_metrics(folder, METRICS)
    (folder / "events.jsonl").write_text(
        '{"kind": "eval", "step": 0, "val/loss": 3.9, "routing/load_cv/layer00": 1.0}\n'
    )
    if content is not None:
        loss = {"mean": 3.0, "low": 2.9, "high": 3.1, "documents": 9, "blocks": 9, "tokens": 99}
        settings = {"format": 3, "model_sha256": "0", "blocks_wanted": 9, "samples": 4}
        record = {"format": FORMAT, "settings": settings, "step": 0, "seconds": 1.0, "val_loss": loss, "reason": None}
        parse(SpecializationRecord, record | {"measured": content}).write(folder / SpecializationRecord.FILE)
    return load_runs([folder])


def inputs_of(folder: Path, content: dict[str, Any] | None) -> ReportInputs:
    [inputs] = collect_inputs(observed(folder, content))
    return inputs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "no preference for domains is shown"),
        ({"p_domain": (0.001, 0.9)}, "experts prefer domains in 1 of 2 layers"),
        ({"p_domain": (0.04, 0.04)}, "no preference for domains is shown"),  # Holm: 0.08
        ({"p_domain": (0.1, 0.1), "smallest_p": 0.1}, "the documents are too few to show whether experts prefer"),
        ({"excess": [[0, 0, 0, 9], [0, 8, 0, 0]]}, "2 of 8 experts are missed more than as many random choices, most "),
        ({"excess": [[0, 0, 0, 9], [0, 8, 0, 0]]}, "most expert 3 of layer 0"),
        (
            {"by_k": {1: 3, 3: 0}},
            "fewer experts for each token raise the loss and more experts for each token are not ",
        ),
        (
            {"by_k": {1: 3, 3: 3, 4: -3}},
            "more experts for each token raise or lower the loss, depending on ",
        ),
        ({"by_k": {1: 3, 3: 3, 4: 0}}, "more experts for each token raise the loss, if not for every number"),
        ({"by_k": {1: 0, 4: 0}}, "fewer or more experts for each token are not shown to change the loss."),
    ],
)
def test_the_answer_about_an_observed_model_says_what_is_more_than_chance(
    content: dict[str, Any], words: str, tmp_path: Path
) -> None:
    answer = headline(inputs_of(tmp_path / "run", measured(**content)))
    assert words in answer
    assert answer.startswith("The validation perplexity is 50; the load CV is 0.25 as the mean over layers; ")
    assert answer.count(". ") == 0


def test_the_expert_that_is_missed_most_is_judged_as_the_largest_of_all(tmp_path: Path) -> None:
    """For many documents, the bound for m experts is that of the normal distribution at 5 % / m."""
    bound = norm.isf(0.025 / (LAYERS * EXPERTS)) / norm.isf(0.025)
    for name, factor, words in (
        ("below", 0.99, "no expert is shown to be missed"),
        ("above", 1.01, "1 of 8 experts is"),
    ):
        excess = np.zeros((LAYERS, EXPERTS))
        excess[1, 2] = factor * bound
        assert excess[1, 2] > 1.0  # its own 95 % interval is above 0 in both cases
        assert words in headline(inputs_of(tmp_path / name, measured(excess=excess)))


def test_without_intervals_nothing_is_called_more_than_chance(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path / "run", measured(excess=[[0, 0, 0, 9], [0] * 4], by_k={1: 9}, reach=None))
    assert "missed" not in headline(inputs)
    assert "raise the loss" not in headline(inputs)
    facts = {each.name: each.fact for each in findings(inputs)}
    assert (
        "Without expert 3 of layer 0, whose tokens then go to their next-best experts, the loss changes by +9.5"
        in (facts["Removed experts"])
    )
    for name in ("Removed experts", "Other experts", "Number of experts"):
        assert "Fewer than four documents give no interval" in facts[name]


@pytest.mark.parametrize(
    ("rows", "why"), [(1, "needs other weights of the router"), (0, "the router has no setting k")]
)
def test_a_report_says_why_no_other_number_of_experts_was_tried(rows: int, why: str, tmp_path: Path) -> None:
    content = measured()
    content["loss_by_k"] = content["loss_by_k"][:rows]
    facts = {each.name: each.fact for each in findings(inputs_of(tmp_path / "run", content))}
    assert facts["Number of experts"].startswith("Not tried: ")
    assert why in facts["Number of experts"]


def test_the_answer_without_specialization_comes_from_the_metrics(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path / "run", None)
    assert headline(inputs) == (
        "The validation perplexity is 50; the load CV is 0.25 as the mean over layers; "
        "what its experts do was not measured."
    )
    [load, experts] = findings(inputs)
    assert "(pooled), it is 0.125" in load.fact  # the value in the tables; the terminal shows the mean over layers
    assert "specialization.json" in experts.fact


def test_the_report_has_the_numbers_of_each_layer_and_says_where_all_are(tmp_path: Path) -> None:
    content = measured(excess=[[0, 0, 0, 9], [0, 8, 0, 0]], advantage=(3, -3), p_domain=(0.02, 0.04))
    text = write_report(observed(tmp_path / "run", content), tmp_path / "out").read_text()
    table = pd.read_csv(tmp_path / "out" / "experts_by_layer.csv")
    assert table["missed most"].tolist() == [3, 1]
    assert table["rise"].tolist() == [9.5, 8.5]
    assert table["rise beyond random low"].tolist() == [8, 7]
    assert table["other routes"].tolist() == [3, -3]
    assert table["p domain"].tolist() == [0.04, 0.04]  # Holm: 2 x 0.02, then 0.04
    assert table["token"].tolist() == [0.125, 0.125]
    assert "Everything that was measured is in specialization.json" in text
    assert "lower mean loss than other ones in 1 of 2 layers, and a higher one in 1." in text


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_an_observed_model_draws_nothing_over_training_and_compares_nothing(tmp_path: Path) -> None:
    text = write_report(observed(tmp_path / "run", measured()), tmp_path / "out").read_text()
    for name in ("learning_curves", "gradients", "specialization_stability"):
        assert f"- {name}: not drawn, " in text
    for name in ("learning_curves", "specialization_stability", "contrasts", "anova"):
        assert not list((tmp_path / "out").glob(f"{name}.*"))
    assert "- layers_routing_load_cv: not drawn, no run was trained" in text
    assert "Training: none; the model was evaluated as it is" in text
    shown = text.partition("## Terms")[0]
    assert "(none)" not in shown
    for word in ("seeds of", "over training", "at the last evaluation", "Verdicts", "Contrasts"):
        assert word not in shown
