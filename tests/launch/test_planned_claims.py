"""Tests of what a command plans: a claim that no run can judge is refused, and it is known which runs have ended."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.config.options import SEARCH_PATH
from moe.config.question import parts_of
from moe.config.schema import without_defaults
from moe.launch.claims import LEFT_OUT
from moe.launch.command_line import read_cells
from moe.launch.plans import kept_claims, not_comparable, record_plan
from moe.launch.run import run, write_run_record
from moe.runs.events import read_events
from moe.runs.folder import stored_record
from moe.runs.planned import ENDED_FILE, add_ended, begin_ended, digest_of_run, digests_in, ended_in, plans_in
from moe.runs.record import RecordError

CLAIM = {
    "text": "a",
    "metric": "val/perplexity",
    "factor": "noise",
    "levels": "[0.5]",
    "than": "[0.0]",
    "kind": "higher",
}


def short_runs(*words: str) -> list[Cell]:
    """Return the cells of a sweep over noise whose runs take one step, after making their folders."""
    short = ["model.layers=1", "steps=1", "save_model=none"]
    cells = read_cells(["-m", "noise=0.0,0.5", *words, *short]) or []
    for cell in cells:
        cell.folder.mkdir(parents=True)
    return cells


def read(*command: str, **changed: str) -> int:
    """Read a command with one claim and return its number of cells."""
    claim = ", ".join(f"{key}: {value}" for key, value in (CLAIM | changed).items())
    return len(read_cells([*command, f"claims=[{{{claim}}}]"]) or [])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metric": "val/perp"}, ["claims[0]", "'val/perp'", "nearest: val/perplexity"]),
        ({"metric": "grad_norm"}, ["claims[0].metric=grad_norm"]),
        ({"metric": "routing/utilization"}, ["'routing/utilization'"]),
        ({"metric": "routing/load_cv/layer04"}, ["of one of the 4 layers with experts, layer00 to layer03"]),
        ({"metric": "routing/load_cv/layer003"}, ["of one of the 4 layers with experts, layer00 to layer03"]),
        ({"metric": "routing/capacity_usage"}, ["null in evaluations"]),
        ({"metric": "routing/load_cv", "within": "{domain: [pooled]}"}, ["claims[0].within.domain=['pooled']"]),
        ({"metric": "val/loss/pyhton"}, ["claims[0].metric=val/loss/pyhton", "python"]),
        ({"metric": "val_capacity/loss"}, ["without capacity=..."]),
        ({"factor": "nois"}, ["claims[0]", "'nois'", "nearest: noise"]),
        ({"factor": "router.tmep"}, ["claims[0]", "'router.tmep'"]),
        ({"factor": "threads"}, ["'threads'"]),
        ({"levels": "[0.55]"}, ["noise=0.55", "0.0, 0.1, 0.5"]),
        ({"than": "[0.2]"}, ["noise=0.2", "0.0, 0.1, 0.5"]),
        ({"within": "{lb: [0.02]}"}, ["within: lb=0.02", "0.0, 0.01"]),
        ({"within": "{lbb: [0.01]}"}, ["'lbb'", "nearest: lb"]),
        ({"within": "{noise: [0.5]}"}, ["within=noise"]),
        ({"within": "{lb: 0.01}"}, ["within.lb=0.01"]),
        ({"within": "{domain: [speach]}"}, ["val/perplexity/speach"]),
        ({"metric": "val/loss", "within": "{domain: [speach]}"}, ["val/loss/speach", "speech"]),
        ({"kind": "interaction"}, ["claims[0].within", "two levels"]),
        ({"kind": "interaction", "within": "{lb: [0.0, 0.01]}", "direction": "up"}, ["direction=up"]),
        ({"kind": "interaction", "within": "{lb: [0.0, 0.01]}", "direction": "lower", "margin": "1%"}, ["direction"]),
        ({"direction": "lower"}, ["claims[0].direction=lower"]),
        ({"text": "' '"}, ["claims[0].text= : must be not empty"]),
        ({"kind": "equivalent", "margin": "true"}, ["claims[0].margin=True: must be a finite number, or a text"]),
        ({"size": "[true, 10]"}, ["claims[0].size=True: must be a finite number, or a text"]),
        ({"size": "[5%, 10]"}, ["claims[0].size=['5%', 10]", "in one unit"]),
        ({"kind": "highest", "than": "[]", "levels": "[0.5, 0.0, 0.1]"}, ["claims[0].levels", "a part of the levels"]),
        ({"factor": "seed", "levels": "[42]", "than": "[43]"}, ["claims[0].factor=seed", "the seed is no factor"]),
        ({"within": "{seed: [42]}"}, ["claims[0].within=seed", "the seed is no factor"]),
        ({"factor": "steps", "levels": "[300]", "than": "[400]"}, ["steps=400", "300"]),
        ({"factor": "steps", "levels": "[300]", "than": "[]", "kind": "highest"}, ["steps", "varies"]),
    ],
)
def test_a_claim_that_no_run_can_judge_is_refused_in_one_line(changed: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read("experiment=noise_lb_seed", "seed=42", **changed)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("command", "changed", "words"),
    [
        (
            "model.first_k_dense_replace=1",
            {"metric": "routing/load_cv/layer03"},
            "the 3 layers with experts",
        ),
        (
            "model=dense noise=0.0 batch_size=2,4",
            {"metric": "routing/load_cv", "factor": "batch_size", "levels": "[4]", "than": "[2]"},
            "which have no layer with experts",
        ),
        ("router=topk,hash", {"within": "{router: [hash]}"}, "levels at which noise changes something"),
        ("steps=20 eval_every=10", {"metric": "val/loss_last_3"}, "fewer than three evaluations .* these runs have 2"),
        (
            "",
            {"metric": "routing/consistency", "at": "flops"},
            "a metric of evaluations, such as val/loss, with at=flops",
        ),
        (
            "model.experts_by_layer=0-1:4",
            {"metric": "routing/load_gini/pooled"},
            r"^claims\[0\].metric=routing/load_gini/pooled: must be another metric: it is null if layers differ in "
            "their number of experts, as with model.experts_by_layer=0-1:4$",
        ),
        (
            "model.experts_by_layer=null,0:4",
            {
                "metric": "routing/load_cv/pooled",
                "factor": "model.experts_by_layer",
                "levels": "['0:4']",
                "than": "[null]",
            },
            "as with model.experts_by_layer=0:4$",
        ),
    ],
)
def test_a_claim_is_about_what_the_runs_of_this_command_have(command: str, changed: dict[str, str], words: str) -> None:
    grid = ("-m", "noise=0.0,0.5", "seed=1,2")
    assert read(*grid, "router=topk,hash", **(CLAIM | {"within": "{router: [topk]}"})) == 6
    with pytest.raises(ConfigError, match=words):
        read(*grid, *command.split(), **changed)


def test_layers_of_different_numbers_of_experts_leave_the_claims_about_other_runs_and_metrics() -> None:
    grid = ("-m", "noise=0.0,0.5", "seed=1,2")
    assert read(*grid, "model.experts_by_layer=0:4", metric="routing/load_cv/worst") == 4
    assert read(*grid, "model.experts_by_layer=null,0:4", metric="routing/load_cv/pooled") == 8
    assert read(*grid, "model.experts_by_layer=0:4", "model.num_experts=4,8", metric="routing/load_cv/pooled") == 8


def test_an_amount_may_be_written_with_an_exponent() -> None:
    assert read("experiment=noise_lb_seed", "seed=42", kind="equivalent", margin="5e-1") == 6


def test_a_part_of_an_experiment_keeps_the_claims_about_its_whole_grid(caplog: pytest.LogCaptureFixture) -> None:
    assert read("experiment=noise_lb_seed", "noise=0.0,0.1", "seed=42", "lb=0.01") == 2
    assert [record.message for record in caplog.records] == [LEFT_OUT % ("noise=0.5", "a")]
    caplog.clear()
    assert read("experiment=noise_lb_seed", "noise=0.0,0.5", "seed=42", within="{lb: [0.01]}") == 4
    assert not caplog.records
    assert read("experiment=noise_lb_seed", "noise=0.5", "seed=42", kind="highest", than="[]") == 2
    assert [record.message for record in caplog.records] == [LEFT_OUT % ("another level of noise", "a")]
    assert read("experiment=noise_lb_seed", "noise=0.0,0.9", "seed=42", "lb=0.01", levels="[0.9]") == 2
    within = {"kind": "interaction", "within": "{lb: [0.0, 0.01]}", "margin": "1%"}
    assert read("experiment=noise_lb_seed", "noise=0.0,0.5", "seed=42", **within) == 4


def test_a_command_says_that_runs_which_have_begun_keep_their_claims(tmp_path: Path) -> None:
    words = ["-m", "noise=0.0,0.5", "seed=1", f"out={tmp_path}", "save_model=none"]
    claim = "{text: a, metric: val/loss, factor: noise, levels: [0.5], than: [0.0], kind: higher}"
    cells = read_cells([*words, f"claims=[{claim}]"])
    assert cells is not None
    assert kept_claims(cells) == ""
    for cell in cells:
        cell.folder.mkdir(parents=True)
        write_run_record(cell, "interrupted")
    assert kept_claims(read_cells([*words, f"claims=[{claim}]"]) or []) == ""
    again = read_cells([*words, f"claims=[{claim.replace('higher', 'lower')}]"]) or []
    assert kept_claims(again).startswith("2 runs keep the claims of an earlier command, which differ")
    assert kept_claims(again[:1]).startswith("1 run keeps the claims")


def test_a_run_that_has_ended_is_written_into_its_sweep_folder(
    small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its folder may be deleted later. A run that was stopped or failed is not written down."""
    cells = short_runs("seed=1,2", *small, f"out={tmp_path}")
    sweep = cells[0].folder.parent
    assert ended_in(sweep) is None
    record_plan(cells, "a")
    [plan] = plans_in(sweep)
    for status, error in (("running", None), ("interrupted", "SIGINT"), ("failed", "out of memory")):
        write_run_record(cells[0], status, error=error)
    assert ended_in(sweep) == []
    run(cells[0])
    for cell in cells[1:]:
        write_run_record(cell, "failed", error="Diverged: the loss is not finite")
    ended = ended_in(sweep) or []
    assert [each.run for each in ended] == plan.runs
    assert [each.seed for each in ended] == [cell.config.seed for cell in cells]
    [*_, evaluated] = (event for event in read_events(cells[0].folder / "events.jsonl") if event["kind"] == "eval")
    assert [each.result for each in ended] == [repr(evaluated["val/loss"]), *["nan"] * 3]
    settings = [each.setting for each in ended]
    assert (settings[0] == settings[1]) == (cells[0].config.noise == cells[1].config.noise)
    assert len({*settings}) == 2
    assert all(plan.time <= each.time for each in ended)
    with (sweep / ENDED_FILE).open("a") as file:
        file.write('{"time": "2026-')
    assert ended_in(sweep) == ended, "a torn last line"
    (sweep / ENDED_FILE).unlink()
    (sweep / ENDED_FILE).mkdir()
    write_run_record(cells[1], "failed", error="Diverged: the loss is not finite")
    assert f"ended.jsonl: a report will not know that {cells[1].folder.name} has ended: " in caplog.text
    with pytest.raises(RecordError, match=r"ended.jsonl: cannot be read: "):
        record_plan(cells, "a")
    (sweep / ENDED_FILE).rmdir()
    record_plan([cell._replace(folder=sweep / f"{cell.folder.name} again") for cell in cells], "a")
    assert ended_in(sweep) is None, "a folder that has a plan would lack the runs that ended before"


def test_a_run_that_was_killed_at_its_very_end_is_written_down_by_the_next_command(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record comes first: a report would take a run that has a line alone for one that it leaves out."""
    cells = short_runs("seed=1", *small, f"out={tmp_path}")
    sweep = cells[0].folder.parent
    record_plan(cells, "a")
    with monkeypatch.context() as patched:
        patched.setattr("moe.launch.run.record_end", lambda *arguments, **options: sys.exit("killed"))
        for end in (lambda: run(cells[0]), lambda: write_run_record(cells[1], "failed", error="Diverged: nan")):
            with pytest.raises(SystemExit):
                end()
    assert [record.ended for cell in cells if (record := stored_record(cell))] == [True, True]
    assert ended_in(sweep) == []
    before = datetime.now(UTC)
    for _ in range(2):
        record_plan(cells, "a")
        ended = ended_in(sweep) or []
        assert [each.run for each in ended] == plans_in(sweep)[0].runs
    assert [each.result == "nan" for each in ended] == [False, True]
    assert all(datetime.fromisoformat(each.time) < before for each in ended), "when the record was written"
    other = tmp_path / "without plans"
    moved = [cell._replace(folder=other / cell.folder.name) for cell in cells]
    sweep.rename(other)
    (other / "plans.json").unlink()
    (other / ENDED_FILE).write_text("")
    record_plan(moved, "a")
    assert ended_in(other) == [], "no plan names these runs"


def test_a_torn_line_is_passed_over_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    begin_ended(tmp_path)
    for seed in (1, 2):
        add_ended({"seed": seed}, seed, tmp_path / str(seed), {"val/loss": 1.0})
    path = tmp_path / ENDED_FILE
    path.write_text(path.read_text()[:-40])
    assert [each.seed for each in ended_in(tmp_path) or []] == [1]
    add_ended({"seed": 3}, 3, tmp_path / "3", {})
    assert [each.seed for each in ended_in(tmp_path) or []] == [1, 3]


def test_a_record_that_cannot_be_read_tells_no_fingerprint(tmp_path: Path) -> None:
    identity = {"noise": 0.5}
    texts = [json.dumps({"identity": identity}), "{", "[]", '{"identity": [1]}', "[" * 10**5]
    for name, text in zip("abcde", texts, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    (tmp_path / "f" / "run.json").mkdir(parents=True)
    assert digests_in(tmp_path) == {"a": digest_of_run(identity)}
    assert digest_of_run(identity | {"lb_first": 0.0}) == digest_of_run(identity), "a default does not change it"


def test_a_plan_that_comes_back_is_written_down_again(tmp_path: Path) -> None:
    """Eight seeds are planned, then three, then eight again; each command was stopped before a run had ended."""
    cells = [cell._replace(folder=tmp_path / cell.folder.name) for cell in read_cells(["-m", "seed=1,2"]) or []]
    for planned in (8, 8, 3, 8):
        record_plan([cell._replace(config=replace(cell.config, planned_seeds=planned)) for cell in cells], "a")
    assert [plan.planned_seeds for plan in plans_in(tmp_path)] == [8, 3, 8]
    add_ended(cells[0].identity(), 1, cells[0].folder, {"val/loss": 1.0})
    record_plan([cell._replace(config=replace(cell.config, planned_seeds=8)) for cell in cells], "a")
    assert [plan.planned_seeds for plan in plans_in(tmp_path)] == [8, 3, 8, 8], "a run is trained again"


def test_runs_that_end_at_the_same_time_are_all_written_down(tmp_path: Path) -> None:
    begin_ended(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(lambda seed: add_ended({"noise": 0.5, "seed": seed}, seed, tmp_path / str(seed), {}), range(200))]
    ended = ended_in(tmp_path) or []
    assert sorted(each.seed for each in ended) == [*range(200)]
    assert len({each.setting for each in ended}) == 1


def test_commands_that_begin_at_the_same_time_share_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one looked before the first one had created it."""
    begin_ended(tmp_path)
    add_ended({"seed": 1}, 1, tmp_path / "a", {})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", lambda self: False)
        begin_ended(tmp_path)
    assert [each.seed for each in ended_in(tmp_path) or []] == [1]


def test_a_command_says_before_the_runs_that_losses_of_routers_which_see_later_tokens_are_not_comparable() -> None:
    """It says nothing if all routers of the command see later tokens, or none."""
    cells = read_cells(["-m", "router=topk,expert_choice", "seed=1,2"]) or []
    assert not_comparable(cells).startswith("2 of 4 runs, such as router=expert_choice,seed=1, may use later tokens")
    causal = [cell for cell in cells if cell.choices["router"] == "topk"]
    assert not_comparable(causal) == ""
    assert not_comparable([cell for cell in cells if cell not in causal]) == ""


def test_one_run_of_many_keeps_claims_about_levels_of_other_runs() -> None:
    assert read("noise=0.3") == 1
    with pytest.raises(ConfigError, match=r"claims\[0\]\.noise=much: must be like 0.3"):
        read("noise=0.3", levels="[much]")
    with pytest.raises(ConfigError, match="option of router"):
        read(factor="router", levels="[topk]", than="[hsah]")


def test_a_part_of_the_question_that_names_no_claim_is_refused() -> None:
    """A command that replaces the claims alone keeps the question of its experiment."""
    question = "question=[{ask: Is it worse?, claims: [A]}]"
    words = r"^unknown claim of question\[0\] 'A'; known: a; the question is from this command: set question to one "
    with pytest.raises(ConfigError, match=words):
        read("-m", "noise=0.0,0.5", question)
    assert read("-m", "noise=0.0,0.5", question.replace("[A]", "[a]")) == 2
    assert read("experiment=noise_lb_seed", "seed=1") == 6
    [cell, *_] = read_cells(["experiment=noise_lb_seed", "claims.0.text=foo", "lb=0.0", "seed=1"]) or []
    assert cell.config.claims[0].text == "foo"
    assert len(parts_of(cell.config.question)) == 2


def test_the_question_of_another_experiment_is_a_text_for_own_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment that builds on another one inherits its question. With some of its claims, that is a mistake."""
    monkeypatch.setenv(SEARCH_PATH, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    conf = tmp_path / "conf"
    (conf / "experiment").mkdir(parents=True)

    def read_own(name: str, *texts: str, more: str = "") -> list[Cell]:
        claims = "".join(f"  - {CLAIM | {'text': text, 'levels': [0.5], 'than': [0.0]}}\n" for text in texts)
        content = f"# @package _global_\ndefaults: [noise_lb_seed]\nclaims:\n{claims}{more}"
        (conf / "experiment" / f"{name}.yaml").write_text(content)
        return read_cells([f"--config-dir={conf}", f"experiment={name}", "seed=1", "lb=0.0"]) or []

    cells = read_own("none", "mine")
    assert [claim.text for claim in cells[0].config.claims] == ["mine"]
    text = "Do router noise and the load-balance loss help or hurt quality, and do they depend on each other?"
    assert {cell.config.question for cell in cells} == {text}
    known = "Deterministic routing has the best perplexity"
    with pytest.raises(ConfigError, match=r"'Noise 0.5 raises.*; the question is from what .*some.yaml builds on: set"):
        read_own("some", "mine", known)
    with pytest.raises(ConfigError, match=r"'mien'; nearest: mine; the question is from .*wrong.yaml: set question to"):
        read_own("wrong", "mine", more="question: [{ask: 'Is it?', claims: [mien]}]\n")


def test_the_digest_of_a_run_stays_when_a_key_is_added_or_becomes_free() -> None:
    """A cell that ignores keys has the identity that it had before they existed."""
    [cell, changed] = read_cells(["-m", "lb_first=0.0,0.5"]) or []
    added = {"lb_first", "optimizer.expert_step", "model.first_k_dense_replace"}
    assert added <= cell.identity().keys()
    before = cell._replace(ignored=cell.ignored | added)
    digests = [digest_of_run(each.identity()) for each in (before, cell, changed)]
    assert digests[0] == digests[1] != digests[2]
    identity = cell.identity()
    assert without_defaults(identity | {"cuda_graph": True}) == without_defaults(identity)
    assert without_defaults(identity | {"noise": 0.3})["noise"] == 0.3


def test_a_claim_under_a_capacity_limit_may_compare_with_runs_without_one() -> None:
    """Tables give these the loss without a limit, which is the same. Without any limit in the sweep, no run has it."""
    words = {"metric": "val_capacity/loss", "factor": "capacity", "levels": "[1.0]", "than": "[null]"}
    assert read("-m", "capacity=1.0,null", **words) == 2
    with pytest.raises(ConfigError, match=r"without capacity=\.\.\."):
        read("-m", "noise=0.0,0.5", metric="val_capacity/loss")
