"""Tests of the specialization study: statistics of known cases, stability of routing, and the files of a study."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from run_folders import change_record, write_metrics, write_record
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moe.analysis.figures.specialization import specialization_drawings
from moe.data.blocks import Batch
from moe.launch.run import run
from moe.metrics.agreement import overlap
from moe.results.table import load_runs
from moe.runs.record import RunRecord, SpecializationRecord
from moe.runs.traces import Trace
from moe.specialization.__main__ import main
from moe.specialization.geometry import projections
from moe.specialization.information import (
    coactivation,
    coactivation_chance,
    conditional_probabilities,
    domain_dependence,
    expert_shares,
    probabilities_by_position,
    smallest_p,
    sum_by_label,
    vocabulary_dependence,
)
from moe.specialization.observation import Observation
from moe.specialization.stability import churn, saturation, seed_agreement
from moe.specialization.study import _differ_in_seed_only, to_json
from moe.specialization.vocabulary import keywords

DOMAINS = np.repeat([0, 1, 2, 3], 8)
DOCUMENTS = np.arange(32) // 2  # two blocks each
TOKENS = 64  # per block


def chosen_by(labels: np.ndarray, *, k: int, experts: int) -> np.ndarray:
    """Return choices (N, E) in which a token with label v takes the experts v * k to v * k + k - 1, modulo E."""
    columns = (labels[:, None] * k + np.arange(k)) % experts
    return (np.arange(experts) == columns[..., None]).any(1)


def random_choices(shape: tuple[int, ...], *, k: int, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).random(shape)
    return scores >= np.sort(scores, axis=-1)[..., -k][..., None]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.mark.parametrize("k", [1, 2])
def test_routing_by_domain_has_the_largest_domain_dependence_for_every_k(k: int, rng: np.random.Generator) -> None:
    chosen = chosen_by(np.repeat(DOMAINS, TOKENS), k=k, experts=4 * k)
    found = domain_dependence(chosen, DOMAINS, DOCUMENTS, rng=rng)
    assert found is not None
    assert found["normalized"] == pytest.approx(1)
    assert found["adjusted"] == pytest.approx(1)
    assert found["ami"] == pytest.approx(1)
    assert found["documents"] == 16
    assert found["p"] == found["smallest_p"] == pytest.approx(1 / 1000)  # no shuffle reaches the observed value
    table = conditional_probabilities(sum_by_label(np.repeat(DOMAINS, TOKENS), expert_shares(chosen), size=4))
    np.testing.assert_allclose(table, np.kron(np.eye(4), np.full(k, 1 / k)))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_random_routing_has_no_domain_dependence_after_correction(k: int, rng: np.random.Generator) -> None:
    found = domain_dependence(random_choices((len(DOMAINS) * TOKENS, 8), k=k), DOMAINS, DOCUMENTS, rng=rng)
    assert found is not None
    assert found["normalized"] > 0.0005  # the plug-in estimate is never 0
    assert abs(found["adjusted"]) < 0.003
    assert abs(found["ami"]) < 0.01
    assert 0.02 < found["p"] < 0.98
    assert found["observed"] < 2.5 * found["bias"]


def test_the_topic_of_a_document_is_not_mistaken_for_its_domain(rng: np.random.Generator) -> None:
    topic = rng.integers(8, size=16)  # every document has one expert, drawn independently of its domain
    chosen = chosen_by(np.repeat(topic[DOCUMENTS], TOKENS), k=1, experts=8)
    found = domain_dependence(chosen, DOMAINS, DOCUMENTS, rng=rng)
    assert found is not None
    assert found["observed"] > 10 * found["bias"]  # a test that shuffles tokens would find dependence on the domain
    assert found["p"] > 0.02
    assert abs(found["adjusted"]) < 0.2


def choices_by_document(
    lengths: list[list[int]], rng: np.random.Generator, *, of_domain: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the experts of 8 tokens per block, the domain of each block, and its document.

    Every document and every domain has random preferences for experts. A share `of_domain` of the probability comes
    from the domain, the rest from the document. `lengths` has, for each domain, the numbers of blocks of its documents.
    """
    domain = np.repeat(np.arange(len(lengths)), [len(documents) for documents in lengths])
    of_each_domain, of_each_document = (rng.dirichlet(np.ones(8), size=count) for count in (len(lengths), len(domain)))
    preference = (of_domain * of_each_domain[domain] + (1 - of_domain) * of_each_document).cumsum(-1)
    document = np.repeat(np.arange(len(domain)), np.concatenate(lengths))
    expert = (rng.random(len(document) * 8)[:, None] > preference[np.repeat(document, 8)]).sum(-1)
    return np.eye(8, dtype=bool)[expert.clip(max=7)], domain[document], document


EQUAL_LENGTHS, UNEQUAL_LENGTHS = [[4] * 6] * 3, [[14] * 4, [3] * 12, [1] * 16]


@pytest.mark.parametrize(("lengths", "least"), [(EQUAL_LENGTHS, 0.01), (UNEQUAL_LENGTHS, 0.0)])
def test_routing_by_document_is_rarely_mistaken_for_routing_by_domain(
    lengths: list[list[int]], least: float, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """About 5 % of 200 models that route by document but not by domain are significant.

    If blocks were shuffled instead of documents, most would be significant.
    """
    monkeypatch.setattr("moe.specialization.information.PERMUTATIONS", 99)
    found, found_over_blocks = [], []
    for repeat in range(200):
        chosen, domain, document = choices_by_document(lengths, rng)
        found.append(domain_dependence(chosen, domain, document, rng=rng))
        if repeat < 20:
            found_over_blocks.append(domain_dependence(chosen, domain, np.arange(len(domain)), rng=rng))
    rate, rate_over_blocks = (
        np.mean([result["p"] <= 0.05 for result in results]) for results in (found, found_over_blocks)
    )
    assert least <= rate <= 0.1
    assert rate_over_blocks > 0.5
    assert abs(np.mean([result["adjusted"] for result in found])) < 0.02


def test_domain_dependence_beside_documents_is_found_with_enough_documents(rng: np.random.Generator) -> None:
    with_many_documents = domain_dependence(*choices_by_document([[3] * 12] * 3, rng, of_domain=0.7), rng=rng)
    with_few_documents = domain_dependence(*choices_by_document([[18] * 2] * 3, rng, of_domain=0.7), rng=rng)
    assert with_many_documents is not None
    assert with_few_documents is not None
    assert with_many_documents["p"] == with_many_documents["smallest_p"] == 1 / 1000
    assert with_many_documents["adjusted"] > 0.05
    assert with_few_documents["p"] >= 0.05 > with_many_documents["p"]
    assert with_few_documents["smallest_p"] == pytest.approx(1 / 15)
    assert (with_many_documents["documents"], with_few_documents["documents"]) == (36, 6)


def test_a_document_counts_once_whatever_its_length(rng: np.random.Generator) -> None:
    chosen, domain, document = choices_by_document(UNEQUAL_LENGTHS, rng)
    blocks = np.arange(len(document)).repeat(np.where(document == 20, 5, 1))  # one document is repeated five times
    longer = chosen.reshape(len(document), 8, 8)[blocks].reshape(-1, 8)
    once = domain_dependence(chosen, domain, document, rng=np.random.default_rng(0))
    again = domain_dependence(longer, domain[blocks], document[blocks], rng=np.random.default_rng(0))
    assert once is not None
    assert again is not None
    for name in ("observed", "normalized", "null", "null_high", "adjusted", "z", "p", "smallest_p", "documents"):
        assert again[name] == pytest.approx(once[name]), name


def test_with_one_document_per_domain_the_domain_dependence_is_unknown(rng: np.random.Generator) -> None:
    found = domain_dependence(chosen_by(np.repeat(DOMAINS, TOKENS), k=1, experts=4), DOMAINS, DOMAINS, rng=rng)
    assert found is not None
    assert found["normalized"] == pytest.approx(1)
    assert found["p"] == found["smallest_p"] == 1
    assert np.isnan(found["adjusted"])
    assert np.isnan(found["z"])


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 2, 2], [5, 5, 5, 7, 7, 7], [3, 3, 1, 0]])
def test_the_smallest_p_is_one_divided_by_the_number_of_partitions(labels: list[int]) -> None:
    partitions = {
        frozenset(frozenset(np.flatnonzero(np.array(order) == label).tolist()) for label in labels)
        for order in itertools.permutations(labels)
    }
    assert smallest_p(np.array(labels)) == 1 / len(partitions)
    assert smallest_p(np.repeat(np.arange(6), 40)) == 1 / 1000


def test_domain_dependence_is_zero_with_one_expert_and_none_with_one_domain(rng: np.random.Generator) -> None:
    single = np.zeros((len(DOMAINS) * TOKENS, 4), dtype=bool)
    single[:, 2] = True
    found = domain_dependence(single, DOMAINS, DOCUMENTS, rng=rng)
    assert found is not None
    assert (found["normalized"], found["adjusted"], found["p"]) == (0, 0, 1)
    assert domain_dependence(single, np.zeros_like(DOMAINS), DOCUMENTS, rng=rng) is None


@pytest.mark.parametrize("k", [1, 2])
def test_routing_by_token_id_depends_fully_on_the_id(k: int, rng: np.random.Generator) -> None:
    ids = rng.integers(40, size=3000)
    found = vocabulary_dependence(chosen_by(ids, k=k, experts=8), ids, rng=rng)
    assert found is not None
    assert found["ids"] == 40
    assert found["id"]["normalized"] == pytest.approx(1)
    assert found["specialization"]["normalized"] == 1
    assert found["specialization"]["null"] < 0.5
    of_random_routing = vocabulary_dependence(random_choices((3000, 8), k=k), ids, rng=rng)
    assert of_random_routing is not None
    for measure in ("id", "specialization"):
        assert abs(of_random_routing[measure]["adjusted"]) < 0.01
        assert of_random_routing[measure]["p"] > 0.02


def test_rare_ids_and_negative_ids_do_not_count(rng: np.random.Generator) -> None:
    ids = np.repeat([0, 1, -1], [10, 9, 30])
    found = vocabulary_dependence(chosen_by(np.repeat([0, 1, 2], [10, 9, 30]), k=1, experts=4), ids, rng=rng)
    assert found is not None
    assert (found["ids"], found["tokens"]) == (1, 10)
    assert vocabulary_dependence(random_choices((9, 4), k=1), np.zeros(9, dtype=int), rng=rng) is None


def test_coactivation_counts_all_pairs_and_is_at_chance_for_random_sets() -> None:
    chosen = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0]], dtype=bool)
    nan = np.nan
    expected = [[nan, 1 / 2, 1, nan], [1 / 2, nan, 1 / 2, nan], [1, 1 / 2, nan, nan], [nan] * 4]
    table = coactivation(chosen)
    np.testing.assert_allclose(table[:3, :3], np.array(expected)[:3, :3])
    assert np.isnan(table[3]).all()
    assert (table[:3, 3] == 0).all()
    off = coactivation(random_choices((20_000, 8), k=3))[~np.eye(8, dtype=bool)]
    np.testing.assert_allclose(off, 2 / 7, atol=0.02)


def test_the_chance_level_of_coactivation_is_that_of_tokens_with_as_many_experts_each() -> None:
    active = np.array([0, 1, 2, 4, 4])
    varied = np.arange(6) < active[:, None]
    chosen = np.stack([random_choices((5, 6), k=3), varied, np.zeros_like(varied)])
    others = (active * (active - 1)).sum() / active.sum()
    np.testing.assert_allclose([coactivation_chance(of_layer) for of_layer in chosen], [2 / 5, others / 5, np.nan])


def test_probabilities_by_position_are_those_of_each_decile() -> None:
    seq_len = 20
    chosen = chosen_by(np.arange(3 * seq_len) % seq_len * 10 // seq_len, k=1, experts=10)
    np.testing.assert_allclose(probabilities_by_position(chosen, seq_len), np.eye(10))


def test_constant_routing_agrees_fully_and_random_routing_only_by_chance() -> None:
    masks = [random_choices((2, 5000, 8), k=2, seed=seed) for seed in range(2)]
    traces = [Trace(1, masks[0]), Trace(2, masks[1]), Trace(3, masks[1])]
    first, second, last = saturation(traces)
    for name in ("overlap", "kappa", "kappa_shuffled"):
        np.testing.assert_allclose(last[name], 1)
        np.testing.assert_allclose(second[name], 1)
    np.testing.assert_allclose(first["overlap"], 2 / 8, atol=0.02)
    np.testing.assert_allclose([first["kappa"], first["kappa_shuffled"]], 0, atol=0.02)
    changed, unchanged = churn(traces)
    assert (changed["since"], changed["step"]) == (1, 2)
    np.testing.assert_allclose(changed["overlap"], 1 - first["overlap"])
    np.testing.assert_allclose(unchanged["overlap"], 0, atol=1e-12)


def test_uneven_loads_alone_raise_kappa_but_not_the_shuffled_kappa() -> None:
    first_expert = [np.random.default_rng(seed).random((1, 20_000, 1)) < 0.9 for seed in (0, 1)]
    a, b = (np.concatenate([x, ~x, np.zeros_like(x), np.zeros_like(x)], -1) for x in first_expert)
    found = overlap(a, b)
    assert found["kappa"][0] > 0.7
    assert abs(found["kappa_shuffled"][0]) < 0.02
    everything = np.ones((1, 10, 3), dtype=bool)
    assert np.isnan(overlap(everything, everything)["kappa"]).all()


@pytest.mark.parametrize("k", [1, 2])
def test_seeds_agree_if_experts_are_renumbered_and_not_if_routing_is_independent(
    k: int, rng: np.random.Generator
) -> None:
    a, b = (random_choices((1, 4000, 6), k=k, seed=seed) for seed in range(2))
    [renumbered] = seed_agreement(a, a[..., rng.permutation(6)], rng=rng)
    assert renumbered["matched"] == renumbered["kappa"] == 1
    assert renumbered["rand"] == pytest.approx(1)
    [independent] = seed_agreement(a, b, rng=rng)
    assert independent["matched"] > k / 6  # matching finds some agreement in noise; `chance` measures it
    assert abs(independent["kappa"]) < 0.02
    assert abs(independent["rand"]) < 0.01


def test_runs_from_before_and_after_a_key_existed_differ_in_the_seed_alone(tmp_path: Path) -> None:
    """The older run lacks keys of three kinds: one of every run, one of the model, and one of the router."""
    options = {"router": "topk", "model": "tiny", "optimizer": "muon"}
    newer = {"noise": 0.0, "precision": "fp32", "model": {"dim": 64, "embed_scale": True}, "router": {"k": 2}}
    records = []
    for seed, config in enumerate((newer, {"noise": 0.0, "model": {"dim": 64}, "router": {}}, newer | {"noise": 0.1})):
        (folder := tmp_path / str(seed)).mkdir()
        write_record(folder, config=config | {"seed": seed}, choices=options)
        records.append(RunRecord.read(folder / RunRecord.FILE))
    after, before, other = records
    assert _differ_in_seed_only(after, before)
    assert _differ_in_seed_only(before, after)
    assert not _differ_in_seed_only(before, other)


def word_tokenizer(*vocabulary: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token n is the n-th word."""
    model = models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token=vocabulary[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), clean_up_tokenization_spaces=False)


def make_observation(ids: np.ndarray, domain: np.ndarray, chosen: np.ndarray, weight: np.ndarray) -> Observation:
    tokens = torch.from_numpy(ids)
    batch = Batch(tokens, torch.from_numpy(domain), tokens, None)
    return Observation(ids, domain, [*chosen], [*weight], ids, np.zeros(ids.shape), batch)


def observation_of(ids: np.ndarray, chosen: np.ndarray) -> Observation:
    weight = chosen / chosen.sum(-1, keepdims=True)
    return make_observation(ids, np.arange(len(ids)) % 2, chosen, weight)


def test_keywords_are_first_the_tokens_of_one_expert_and_then_shared_tokens() -> None:
    ids = np.tile([0, 1, 0, 2], (6, 3))  # "the" goes to both experts, "cat" to 0, "dog" to 1
    labels = np.where(ids == 1, 0, np.where(ids == 2, 1, np.arange(12) % 4 // 2))
    observed = observation_of(ids, chosen_by(labels.ravel(), k=1, experts=2)[None])
    [[first, second]] = keywords(observed, word_tokenizer("the", "cat", "dog"))
    assert [entry["token"] for entry in first["keywords"]] == ["cat", "the"]
    assert first["keywords"][0] | {"tfidf": 0} == {"token": "cat", "tfidf": 0, "count": 18, "share": 1}
    assert second["keywords"][0]["token"] == "dog"
    assert first["contexts"][0] == ["the", "cat", "the dog the cat the dog the cat"]


def test_projections_keep_similar_experts_together() -> None:
    centers = np.random.default_rng(0).normal(size=(2, 1, 30))
    vectors = centers.repeat(6, 1) + 0.01 * np.random.default_rng(1).normal(size=(2, 6, 30))
    found = projections([*vectors])
    assert found is not None
    for name in ("pca", "tsne"):
        within = max(np.linalg.norm(group - group.mean(0), axis=-1).max() for group in found[name])
        assert np.linalg.norm(found[name][0].mean(0) - found[name][1].mean(0)) > 2 * within
    assert found["explained"][0] > 0.99
    assert projections([vectors[0, :3]]) is None


def test_numbers_that_are_not_finite_become_null_and_arrays_become_lists() -> None:
    value = {"a": np.array([[1.0, np.nan]]), "b": (np.int64(3), np.float32(np.inf)), "c": 0.123456789, "d": None}
    assert to_json(value) == {"a": [[1.0, None]], "b": [3, None], "c": 0.123457, "d": None}
    json.dumps(to_json(value), allow_nan=False)


@pytest.fixture
def few_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Move the weights of routers by few distances. The study of few documents below moves them by all."""
    monkeypatch.setattr("moe.specialization.landscape.DISTANCES", (-1.0, 0.0, 1.0))
    monkeypatch.setattr("moe.specialization.landscape.RANDOM_DIRECTIONS", 1)


@pytest.mark.usefixtures("few_moves")
def test_a_study_writes_its_files_and_is_repeated_only_for_a_changed_model(
    cell: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (["seed=1"], ["seed=2"], ["router=hash", "seed=1"], ["router=soft_moe", "seed=1"])
    cells = [cell("data.max_val_blocks=12", *overrides) for overrides in settings]
    cells = [small_cell._replace(folder=tmp_path / str(number)) for number, small_cell in enumerate(cells)]
    for small_cell in cells:
        run(small_cell)
    command = [str(tmp_path), "--blocks", "12", "--samples", "6"]
    assert main(command) == 0
    records = [read_study(small_cell.folder) for small_cell in cells]
    first, second, hashed, slots = (record["measured"] for record in records)
    assert (first["blocks"], first["tokens"], records[0]["step"]) == (12, 12 * 32, 6)
    assert [entry["seed"] for entry in first["seed_agreement"]] == [2]
    assert [entry["seed"] for entry in second["seed_agreement"]] == [1]
    assert hashed["seed_agreement"] == []
    assert hashed["vocabulary"]["input"][0]["specialization"]["normalized"] == 1
    assert hashed["landscape"] is None
    assert slots is None
    assert "mixtures" in records[3]["reason"]
    for small_cell, found in zip(cells, records, strict=True):
        loss, metrics = found["val_loss"], json.loads((small_cell.folder / "metrics.json").read_text())
        if found is not records[3]:  # Soft MoE depends on the batch, and a study uses other batches than an evaluation.
            assert loss["mean"] == pytest.approx(metrics["final_metrics"]["val/loss"], rel=1e-4)
        assert loss["low"] < loss["mean"] < loss["high"]
        assert (loss["blocks"], loss["tokens"]) == (12, 12 * 31)
    domain, _ = first["domain"]
    assert domain["documents"] == first["documents"] == records[0]["val_loss"]["documents"]
    assert domain["p"] >= domain["smallest_p"] > 0
    assert SpecializationRecord.page(cells[0].folder) == cells[0].folder / "tokens.html"
    assert SpecializationRecord.page(cells[3].folder) is None
    last = np.load(sorted((cells[0].folder / "trace").glob("*.npz"))[-1])["shape"]
    assert np.shape(first["load"]) == (last[0], last[2])

    for folder in (tmp_path, cells[1].folder):  # all runs, and one run whose study names another seed
        for drawn in specialization_drawings(load_runs([folder])):
            assert isinstance(drawn.figure, Figure)
            drawn.figure.draw_without_rendering()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/specialization.json")}
    assert main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/specialization.json")}
    shutil.copy(cells[1].folder / "model" / "model.safetensors", cells[0].folder / "model" / "model.safetensors")
    earlier = {"key": "another", "files": {"train/data-00000-of-00001.arrow": "another"}}  # the text is the same
    change_data(cells[0].folder, **earlier)
    assert main(command) == 0
    changed = read_study(cells[0].folder)
    assert changed["settings"]["model_sha256"] == records[1]["settings"]["model_sha256"]
    assert changed["measured"]["load"] == second["load"]
    assert [entry["seed"] for entry in changed["measured"]["seed_agreement"]] == [2]
    change_data(cells[0].folder, corpus_sha256="another")
    assert main([*command, "--samples", "7"]) == 2
    assert "its data has changed (corpus_sha256 is " in capsys.readouterr().err

    written = (tmp_path / "0" / "specialization.json").read_bytes()  # a page of one's own text needs the model alone
    (tmp_path / "text.txt").write_text("fox & <hound> " * 20)
    assert main([str(tmp_path / "0"), "--text-file", str(tmp_path / "text.txt")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / '0' / 'own_text.html'}: written\n")
    page = (tmp_path / "0" / "own_text.html").read_text()
    assert "your text, part 2" in page, "the text is longer than the model reads at once"
    assert "<hound>" not in page
    assert (tmp_path / "0" / "specialization.json").read_bytes() == written
    for wrong, message in {
        ("--text", ""): "text=: must be text with at least one token",
        ("--text-file", str(tmp_path / "none.txt")): "none.txt",
        ("--text-file", str(cells[0].folder / "documents.npz")): "is not UTF-8 text",
    }.items():
        assert main([str(tmp_path / "0"), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main([str(tmp_path / "3"), "--text", "fox"]) == 2
    assert "mixtures of tokens" in capsys.readouterr().err


def read_study(folder: Path) -> dict[str, Any]:
    """Return specialization.json as it stands."""
    return dict(json.loads((folder / "specialization.json").read_text()))


def change_data(folder: Path, **fields: Any) -> None:
    """Replace recorded facts about the data of a run."""
    data = json.loads((folder / "run.json").read_text())["facts"]["data"]
    assert fields.keys() <= data.keys()
    change_record(folder, data=data | fields)


def test_without_a_study_the_report_gives_the_reason_instead_of_figures(cell: Any) -> None:
    small_cell = cell()
    small_cell.folder.mkdir(parents=True)
    write_record(small_cell.folder, status="running", config={"seed": 1})
    assert [(drawn.name, drawn.reason) for drawn in specialization_drawings(load_runs([small_cell.folder]))] == [
        ("specialization", "no run has a specialization.json: run python -m moe.specialization FOLDER")
    ]


@pytest.mark.usefixtures("few_moves")
def test_without_samples_no_other_experts_are_tried_and_the_figures_say_so(cell: Any) -> None:
    small_cell = cell("model.layers=1", "steps=0")
    run(small_cell)
    assert main([str(small_cell.folder), "--blocks", "4", "--samples", "0"]) == 0
    measured = read_study(small_cell.folder)["measured"]
    assert (measured["knockout"], measured["regret"]) == (None, [])
    reasons = {drawn.name: drawn.reason for drawn in specialization_drawings(load_runs([small_cell.folder]))}
    untried = {name for name, reason in reasons.items() if reason == "no other experts were tried (--samples 0)"}
    assert untried == {"expert_knockouts", "expert_importance", "expert_saliency", "route_regret"}
    assert {reasons[name] for name in ("expert_transitions", "next_layer")} == {"there is no next layer with experts"}
    assert reasons["loss_by_k"] is None or reasons["loss_by_k"] == ""


def test_a_study_of_few_documents_has_no_intervals_and_all_figures(cell: Any, capsys: Any) -> None:
    """Below four documents there is no interval, and a loss may be null because it is not finite."""
    small_cell = cell("model.layers=1", "steps=0", "data.max_val_blocks=3")
    run(small_cell)
    assert main([str(small_cell.folder), "--samples", "3"]) == 0
    assert "no interval, which takes four of them" in capsys.readouterr().out
    written = read_study(small_cell.folder)
    found = written["measured"]
    assert found["documents"] < 4
    assert {row["difference"]["low"] for row in found["loss_by_k"]} == {None}
    drawings = {drawn.name: drawn.figure for drawn in specialization_drawings(load_runs([small_cell.folder]))}
    assert isinstance(drawings["loss_by_k"], Figure)
    assert "no band: there are fewer than four documents" in drawings["loss_by_k"].legends[0].get_title().get_text()
    found["loss_by_k"][0]["difference"]["mean"] = found["knockout"]["zeroed"]["delta"]["mean"][0][0] = None
    found["regret"][0]["values"][0] = found["landscape"]["curves"]["random0"]["loss"][0] = None
    (small_cell.folder / "specialization.json").write_text(json.dumps(written))
    for drawn in specialization_drawings(load_runs([small_cell.folder])):
        assert drawn.figure is None or drawn.figure.draw_without_rendering() is None


def test_a_wrong_command_gets_a_one_line_error(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path), "--blocks", "0"]) == 2
    assert "--blocks 0: must be at least 1" in capsys.readouterr().err
    write_record(tmp_path, config={"seed": 1})
    write_metrics(tmp_path, {})
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(
        f"python -m moe.specialization: {tmp_path / 'run.json'}: config.router is "
    )
