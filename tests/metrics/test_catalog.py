"""Tests of the catalog of metrics: it has every metric that a run writes, and a run writes every metric that it has."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields

import pytest
import torch

from moe.config.cell import Cell
from moe.config.classes import build
from moe.config.options import CONF, router_spec
from moe.config.schema import Config
from moe.launch.run import run
from moe.metrics.__main__ import page
from moe.metrics.catalog import ENTRIES, METRICS, ROUTING_METRICS, lookup, select
from moe.metrics.metric import GROUPS, SHOWN, VARIANTS, WRITTEN, Metric
from moe.routing.loss_table import LOSSES, ROUTER_LOSSES
from moe.runs.events import read_events
from moe.testing.inputs import context

LAYERS, DOMAINS = 2, ("early", "late")  # of the small runs that tests train
FORMS = {
    "pooled": ["pooled"],
    "worst": ["worst"],
    "layerNN": [f"layer{layer:02d}" for layer in range(LAYERS)],
    "<domain>": DOMAINS,
    "decileN": [f"decile{decile}" for decile in range(10)],
}


def names(metrics: Iterable[Metric]) -> set[str]:
    """Return the names of metrics and of all their variants."""
    selected = list(metrics)
    variants = {f"{m.name}/{form}" for m in selected for variant in m.variants for form in FORMS[variant]}
    return variants | {metric.name for metric in selected}


def test_a_run_writes_exactly_the_metrics_of_the_catalog(cell: Callable[..., Cell]) -> None:
    small_cell = cell(
        "capacity=1.0", "output_orthogonality=0.1", "erc=0.1", "noise=0.1", "load=0.1", "data.train_domains=[late]"
    )  # otherwise some metrics are absent
    run(small_cell)
    events = read_events(small_cell.folder / "events.jsonl")
    of_every_evaluation = names(select(written="evaluation"))
    of_every_evaluation -= names(select(group="drift"))  # of runs from a checkpoint, see tests/training/test_drift.py
    of_every_step = {m.name for m in select(written="step") if m.group != "router loss"}
    of_every_step |= {f"train/{name}" for name in ROUTING_METRICS}
    only_at_evaluations = {name for name in of_every_step if name.startswith("update/")}
    of_the_last = names(select(group="test"))
    last = [event for event in events if event["kind"] == "eval"][-1]
    for event in events:
        written = set(event) - {"kind", "step"}
        if event["kind"] == "eval":
            assert written == of_every_evaluation | (of_the_last if event is last else set())
        else:
            assert written == (of_every_step if event["step"] % 3 == 0 else of_every_step - only_at_evaluations)
    final = json.loads((small_cell.folder / "metrics.json").read_text())["final_metrics"]
    at_the_end = {name for name in of_every_evaluation if "/" in name and not name.startswith("time/")}
    assert set(final) == at_the_end | of_the_last | {metric.name for metric in select(written="end")}
    assert all(lookup(name) for event in events for name in set(event) - {"kind", "step"})


@pytest.fixture(scope="module")
def losses_by_router() -> dict[str, set[str]]:
    """Return the names of the losses that each router returns, by the name of its YAML file."""
    found = {}
    for path in sorted((CONF / "router").glob("*.yaml")):
        router = next(iter(build(router_spec(path.stem), "router", 16, 8).chain))
        router.initialize(0.02)
        found[path.stem] = set(router(torch.randn(16, 16), context(torch.zeros(2, 8, dtype=torch.long))).aux)
    return found


def test_every_loss_of_a_router_is_in_the_table_under_the_key_that_weights_it(
    losses_by_router: dict[str, set[str]],
) -> None:
    assert set().union(*losses_by_router.values()) == set(ROUTER_LOSSES)
    for router, losses in losses_by_router.items():
        keys = router_spec(router)
        for name in losses:
            assert ROUTER_LOSSES[name].weight.removeprefix("router.") in keys, (router, name)


def test_every_shared_loss_is_weighted_by_a_key_of_the_configuration() -> None:
    assert {loss.weight for loss in LOSSES.values()} <= {field.name for field in fields(Config)}
    assert not set(LOSSES) & set(ROUTER_LOSSES)


def test_entries_use_only_the_allowed_values() -> None:
    assert len(METRICS) == len(ENTRIES)
    for metric in ENTRIES:
        assert metric.group in GROUPS, metric.name
        assert metric.better in (None, "lower", "higher"), metric.name
        assert set(metric.variants) <= set(VARIANTS), metric.name
        assert set(metric.written) <= set(WRITTEN), metric.name
        assert set(metric.shown) <= set(SHOWN), metric.name
        assert metric.meaning.endswith("."), metric.name
        assert "|" not in metric.formula + metric.meaning, metric.name  # | would end a cell of a Markdown table
    assert {word for metric in ENTRIES for word in metric.shown} == set(SHOWN)
    assert {metric.group for metric in ENTRIES} == set(GROUPS)


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("val/loss", "validation loss (nats per token)"),
        ("val/loss/python", "validation loss, python (nats per token)"),
        ("routing/load_cv/pooled", "load CV over experts, layers pooled"),
        ("routing/load_gini/worst", "Gini coefficient of the experts' load, worst layer"),
        ("routing/entropy/layer03", "router entropy, layer 3 (nats per token)"),
        ("train/routing/drop_rate", "drop rate, in training (share of assignments)"),
        (
            "val_capacity/drop_rate/decile9",
            "drop rate under the capacity limit, decile 9 of the position (share of assignments)",
        ),
    ],
)
def test_variants_have_names_and_labels(name: str, axis: str) -> None:
    metric = lookup(name)
    assert metric is not None
    assert (metric.name, metric.axis) == (name, axis)


@pytest.mark.parametrize(
    ("name", "noun"),
    [
        ("routing/load_cv", "load CV"),
        ("routing/load_cv/pooled", "load CV (layers pooled)"),
        ("train/routing/load_cv", "load CV (in training)"),
        ("adapter/routing/load_cv/pooled", "load CV (layers pooled, adapter's router)"),
        ("val/loss/python", ""),
    ],
)
def test_the_noun_of_a_variant_says_which_one_it_is(name: str, noun: str) -> None:
    metric = lookup(name)
    assert metric is not None
    assert metric.noun == noun


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("routing/load_cv", ""),
        ("routing/load_cv_normalized", "null for K = E"),
        ("routing/load_cv/worst", ""),
        ("routing/load_cv/pooled", "null if layers differ in their number of experts"),
        ("routing/load_cv_normalized/pooled", "null for K = E; null if layers differ in their number of experts"),
    ],
)
def test_a_metric_and_its_variants_say_when_they_are_null(name: str, when: str) -> None:
    metric = lookup(name)
    assert metric is not None
    assert metric.when_null == when


@pytest.mark.parametrize(
    "name",
    [
        *(
            "val/los",
            "routing/entropy/pooled",
            "routing/load_cv/layer",
            "val/perplexity/python",
            "train/routing/consistency",
        ),
        *("router.temp", "", "/", "val_capacity/drop_rate/decile10", "routing/load_cv/pooled/layer00"),
    ],
)
def test_names_that_no_run_writes_are_not_found(name: str) -> None:
    assert lookup(name) is None


def test_a_rise_and_a_fall_have_their_own_words() -> None:
    directions = {metric.headline: (metric.rise, metric.fall) for metric in ENTRIES}
    assert directions["val/perplexity"] == ("worse", "better")
    assert directions["val/accuracy"] == ("better", "worse")
    assert directions["routing/load_cv/pooled"] == ("less balanced", "more balanced")
    assert directions["routing/load_entropy"] == ("more balanced", "less balanced")
    assert directions["routing/entropy"] == ("less sharp", "sharper")
    assert directions["routing/jaccard"] == ("higher", "lower")
    assert directions["routing/load_cv_floor"] == ("higher", "lower")


def test_the_page_of_metrics_matches_the_catalog() -> None:
    """docs/metrics.md is the page that the catalog generates.

    To update it, run `python -m moe.metrics > docs/metrics.md`.
    """
    assert (CONF.parent / "docs" / "metrics.md").read_text() == page()


def test_the_catalog_does_not_import_torch() -> None:
    code = "import sys; import moe.metrics.__main__, moe.analysis.figures.layers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_metric_name_in_the_code_is_in_the_catalog() -> None:
    """A misspelled name in a table, figure or report is found here, not by an empty column."""
    name = re.compile(r"(train|val|val_capacity|routing|time|update)/\w([\w/]*\w)?")
    for path in sorted((CONF.parent / "moe").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        in_f_strings = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_f_strings:
                assert not name.fullmatch(node.value) or lookup(node.value), f"{path}:{node.lineno}: {node.value}"


@pytest.mark.parametrize("wrong", ["routing/load_cv/layer٣", "routing/load_cv/layer-1", "val/loss/", "val/perplexty"])
def test_names_that_no_run_writes_are_unknown(wrong: str) -> None:
    assert lookup(wrong) is None
