"""Tests of the records of a run and a sweep: they can be read again, and wrong files give one-line errors."""

import fcntl
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import change_record, write_cells, write_metrics, write_record
from train_processes import ANALYZE, TRAIN, run_script

from moe.config.cell import Grid
from moe.config.plugins import Plugin
from moe.config.sections import LoggerConfig
from moe.results.sweep_tables import console_table
from moe.results.table import load_runs, read_event_tables
from moe.runs.collapse import Collapse
from moe.runs.record import (
    FORMAT,
    Machine,
    MetricsRecord,
    Parameters,
    Ranks,
    RecordError,
    RunFacts,
    RunRecord,
    SweepRecord,
)

FACTS = RunFacts(
    parameters=Parameters(total=10, active=5, trainable=4),
    flops_per_token=100,
    seconds=2.5,
    train_seconds=2.0,
    peak_memory_gb=None,
    device="cpu",
    process={"threads": 1},
    ranks=Ranks(number=1, layout="single"),
    experts_kernel="loop",
    loss_kernel="chunks",
    data={"key": "k", "files": {"a": "b"}},
    collapses=[Collapse(1, "few", [0, 5], 8, 40, 95), Collapse(1, "unused", [3], 8, 60, None)],
    unigram_perplexity=500.0,
)
RUN = RunRecord(
    status="finished",
    error=None,
    experiment="default",
    name="seed=1",
    started="2026-01-01T00:00:00+00:00",
    choices={"router": "topk", "variant": None},
    causal=True,
    config={"seed": 1, "router": {"k": 2}, "claims": []},
    identity={"seed": 1},
    versions={"python": "3.11"},
    machine=Machine(system="Linux", processor=None, cpus=None, gpus=["H100"], driver="1.2"),
    commit="ä\u2028",
    plugins={"mylab": Plugin("0" * 64, None)},
    facts=FACTS,
)
METRICS = MetricsRecord(
    final_metrics={
        "val/loss": 1.5,
        "val/perplexity": math.inf,
        "val/accuracy": 0,
        "x/y": None,
        "routing/utilization": [[0.5, 0.5]],
    },
    history={"steps": [0, 1], "train_losses": [None, 1.0]},
)
CLAIM = {"text": "noise hurts", "metric": "val/loss", "factor": "noise", "levels": [0.5], "than": [0.0]}
CLAIM |= {"kind": "higher", "source": "us", "margin": None, "size": ["1%", "5%"]}
CLAIM |= {"within": {"lb": [0.0]}, "direction": None, "at": None}
SWEEP = SweepRecord(
    cells={"seed=1": {"seed": 1, "capacity": None}},
    grids=[Grid("x: noise, steps=5", ["noise"], {"steps": 5}, ["seed=1"])],
)


@pytest.mark.parametrize("record", [RUN, replace(RUN, status="running", facts=None), METRICS, SWEEP])
def test_a_record_is_read_as_it_was_written(record: Any, tmp_path: Path) -> None:
    record.write(tmp_path / record.FILE)
    assert type(record).read(tmp_path / record.FILE) == record
    assert [path.name for path in tmp_path.iterdir()] == [record.FILE]
    assert json.loads((tmp_path / record.FILE).read_text())["format"] == FORMAT


def test_a_run_from_before_the_unigram_perplexity_is_read_without_it(tmp_path: Path) -> None:
    content = written_content(RUN, tmp_path / RUN.FILE)
    assert content["facts"].pop("unigram_perplexity") == 500.0
    (tmp_path / RUN.FILE).write_text(json.dumps(content | {"format": 7}))
    old = RunRecord.read(tmp_path / RUN.FILE)
    assert old == replace(RUN, facts=FACTS._replace(unigram_perplexity=None))
    assert old.format == FORMAT, "it is written as a record of this format"


def test_a_key_that_has_become_free_is_no_part_of_the_identity_of_an_earlier_run(tmp_path: Path) -> None:
    identity = RUN.identity | {"cuda_graph": False, "data.cache": "elsewhere"}
    replace(RUN, identity=identity).write(tmp_path / RUN.FILE)
    assert RunRecord.read(tmp_path / RUN.FILE) == RUN


def written_content(record: Any, path: Path) -> dict[str, Any]:
    """Write a record and return the content of its file."""
    record.write(path)
    return json.loads(path.read_text())


@pytest.mark.parametrize("record", [RUN, METRICS, SWEEP])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "incomplete or not JSON"),
        (b'{"format": 1, "status"', "incomplete or not JSON"),
        (b"\xff\xfe\x00", "incomplete or not JSON"),
        (b"[" * 100_000, "incomplete or not JSON"),
        (b'{"format": 1, "x": "\\ud800"}', "incomplete or not JSON"),
        (b"[]", "the content is []: must be an object"),
        (b"null", "the content is None: must be an object"),
        (b"{}", f"written by another version of this project: no format number, here {FORMAT}"),
        (b'{"format": 999, "a": 1}', f"written by another version of this project: format 999, here {FORMAT}"),
        (b'{"format": [1]}', f"written by another version of this project: format [1], here {FORMAT}"),
        (b'{"format": %d}' % FORMAT, "is missing"),
    ],
)
def test_a_damaged_file_or_one_of_another_format_is_refused_in_one_line(
    record: Any, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / record.FILE
    path.write_bytes(content)
    with pytest.raises(RecordError) as raised:
        type(record).read(path)
    assert str(raised.value).startswith(f"{path}: {message}" if message != "is missing" else f"{path}: ")
    assert message in str(raised.value)
    assert str(raised.value).endswith(record.ADVICE)
    assert len(str(raised.value).splitlines()) == 1


def test_every_missing_unknown_or_mistyped_field_is_named(tmp_path: Path) -> None:
    """The error names every missing, unknown or mistyped field, for each kind of record and at every depth."""
    path = tmp_path / "x.json"

    def assert_refused(record: Any, content: Any, name: str) -> None:
        """Assert that a file with this content gives a one-line error that contains `name`."""
        path.write_text(json.dumps(content))
        with pytest.raises(RecordError) as raised:
            type(record).read(path)
        assert name in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1

    for record in (RUN, METRICS, SWEEP):
        content = written_content(record, path)
        for name in content.keys() - {"format"}:
            assert_refused(record, {key: value for key, value in content.items() if key != name}, name)
            assert_refused(record, content | {name: 10**400}, name)
            assert_refused(record, content | {name: [1]}, name)
        assert_refused(record, content | {"line\nbreak": 1}, "line")
    content = written_content(RUN, path)
    for name in RunFacts._fields:
        if name not in RunFacts._field_defaults:
            assert_refused(
                RUN, content | {"facts": {k: v for k, v in content["facts"].items() if k != name}}, f"facts.{name}"
            )
        assert_refused(RUN, content | {"facts": content["facts"] | {name: [True]}}, f"facts.{name}")
    assert_refused(RUN, content | {"facts": content["facts"] | {"extra": 1}}, "facts.extra")
    assert_refused(RUN, content | {"status": "done"}, "one of running, interrupted, failed, finished")
    assert_refused(
        RUN,
        content | {"machine": content["machine"] | {"cpus": True}},
        "machine.cpus is True: must be a whole number",
    )
    assert_refused(
        METRICS,
        written_content(METRICS, path) | {"final_metrics": {"val/loss": "low"}},
        "final_metrics.val/loss is 'low'",
    )
    assert_refused(
        METRICS, written_content(METRICS, path) | {"final_metrics": {"val/loss": 10**400}}, "final_metrics.val/loss"
    )
    assert_refused(SWEEP, {"format": FORMAT, "cells": {"seed=1": None}, "grids": []}, "cells.seed=1 is None")
    grid = {"name": "x", "factors": [], "fixed": {}, "cells": ["seed=2"], "search": None}
    assert_refused(
        SWEEP, written_content(SWEEP, path) | {"grids": [grid]}, "must be in cells, and in the cells of a grid"
    )


def test_a_missing_file_and_a_folder_in_its_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no run\.json"):
        RunRecord.read(tmp_path / "run.json")
    (tmp_path / "run.json").mkdir()
    with pytest.raises(RecordError, match=r"run\.json: cannot be read: Is a directory"):
        RunRecord.read(tmp_path / "run.json")


def test_integers_are_read_as_floats_where_a_float_is_expected(tmp_path: Path) -> None:
    content = written_content(RUN, tmp_path / "run.json")
    (tmp_path / "run.json").write_text(json.dumps(content | {"facts": content["facts"] | {"seconds": 2}}))
    facts = RunRecord.read(tmp_path / "run.json").facts
    assert facts is not None
    assert isinstance(facts.seconds, float)


def test_configuration_and_claims_are_read_as_dataclasses(cell: Any) -> None:
    from moe.launch.run import run_record, write_run_record

    claim = "{text: new, metric: val/perplexity, factor: noise, levels: [0.5], than: [0.0], kind: higher}"
    one = cell(f"claims=[{claim}]")
    one.folder.mkdir(parents=True)
    write_run_record(one, "running")
    record = RunRecord.read(one.folder / "run.json")
    assert record.typed_config() == one.config
    assert record.claims() == one.config.claims
    later = one._replace(config=replace(one.config, claims=[], planned_seeds=8, planned_effect="0.5%"))
    assert run_record(later, "running").typed_config() == one.config  # what was planned stays as it was before the run
    for name, value in (("seed", "one"), ("model", {}), ("claims", [{"text": "x"}]), ("extra", 1)):
        with pytest.raises(ValueError, match=name):
            replace(record, config=record.config | {name: value}).typed_config()
    older = {key: value for key, value in record.config.items() if key not in ("load", "logger")}
    older["optimizer"] = {key: value for key, value in older["optimizer"].items() if key != "clip"}
    found = replace(record, config=older).typed_config()
    assert (found.load, found.logger, found.optimizer.clip) == (0.0, LoggerConfig(), 1.0)
    for name in ("router", "model", "data"):  # each has, or is, a key without a default
        with pytest.raises(ValueError, match=f"^config.{name} is missing$"):
            replace(record, config={key: value for key, value in older.items() if key != name}).typed_config()


def test_the_analysis_shows_every_unreadable_run_as_a_row(tmp_path: Path) -> None:
    damage = {
        "seed=1": b"{",
        "seed=2": b"[]",
        "seed=3": b"\xff",
        "seed=4": b'{"format": 0}',
        "seed=5": b'{"format": 1}',
    }
    for name, content in damage.items():
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "run.json").write_bytes(content)
    for seed, final in ((6, {"val/loss": "low"}), (7, {"val/loss": 1.0})):
        (tmp_path / "x" / f"seed={seed}").mkdir()
        write_record(tmp_path / "x" / f"seed={seed}", config={"seed": seed})
        write_metrics(tmp_path / "x" / f"seed={seed}", final)
    edits = {"seed=91": {"config": {"seed": 91, "claims": [CLAIM | {"size": None}]}}, "seed=92": {"facts": None}}
    for name, fields in edits.items():
        (tmp_path / "x" / name).mkdir()
        write_record(tmp_path / "x" / name, **fields)
    write_cells(tmp_path / "x", {"seed=8": {"seed": 8}})
    runs = load_runs([tmp_path]).set_index("run")
    assert runs["status"].tolist() == ["unreadable"] * 6 + ["finished"] + ["unreadable"] * 2 + ["missing"]
    assert f"seed=91/{RunRecord.FILE}: config.claims[0].size is None: must be a list" in runs.loc["seed=91", "error"]
    assert f"seed=92/{RunRecord.FILE}: facts is None: must be an object" in runs.loc["seed=92", "error"]
    for name in [*damage, "seed=6"]:
        assert str(tmp_path / "x" / name) in runs.loc[name, "error"]
    assert f"format 0, here {FORMAT}" in runs.loc["seed=4", "error"]
    assert "1 of 10 runs finished" in console_table(load_runs([tmp_path]))
    done = run_script(ANALYZE, str(tmp_path / "x"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {name} | unreadable |" in report for name in [*damage, *edits, "seed=6"])


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 0}', '{"format": 1}'])
def test_training_in_a_folder_with_an_unreadable_record_ends_with_exit_status_2(
    content: str, small: list[str], cell: Any, tmp_path: Path
) -> None:
    folder = cell().folder
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    done = run_script(TRAIN, *small, f"out={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"train.py: {folder / 'run.json'}: ")
    assert done.stderr.endswith("; delete the folder or choose another out=DIR\n")
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_training_of_a_sweep_with_a_damaged_sweep_json_ends_with_exit_status_2(
    small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "sweep.json").write_text('{"cells": {')
    done = run_script(TRAIN, "-m", *small, "seed=1,2", f"out={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "sweep.json: incomplete or not JSON" in done.stderr
    assert "delete this file" in done.stderr


def test_the_test_helpers_write_and_change_valid_records(tmp_path: Path) -> None:
    write_record(tmp_path, seconds=1.0)
    change_record(tmp_path, seconds=3.0, causal=False)
    record = RunRecord.read(tmp_path / "run.json")
    assert record.facts is not None
    assert (record.facts.seconds, record.causal) == (3.0, False)


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/b", "", ".", "..", "a\0b", "a\nb"])
def test_the_name_of_a_cell_is_the_name_of_a_folder_beside_sweep_json(tmp_path: Path, name: str) -> None:
    write_cells(tmp_path, {"seed=1": {"seed": 1}, name: {"seed": 2}})
    with pytest.raises(RecordError, match="must be the name of a folder beside this file") as raised:
        SweepRecord.read(tmp_path / "sweep.json")
    assert str(raised.value).isprintable()
    [status] = load_runs([tmp_path])["status"]
    assert status == "unreadable"


@pytest.mark.parametrize("file", ["run.json", "metrics.json", "events.jsonl"])
def test_a_pipe_in_place_of_a_file_is_named_instead_of_read_for_ever(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "x" / "seed=1"
    folder.mkdir(parents=True)
    write_record(folder, config={"seed": 1})
    write_metrics(folder, {"val/loss": 1.0})
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    [row] = load_runs([tmp_path]).itertuples()
    problems = read_event_tables([folder]).problems
    said = problems[0] if file == "events.jsonl" else row.error
    assert said.startswith(f"{folder / file}: ")
    assert said.endswith("it is a pipe or a device, not a file")


def test_a_run_that_no_process_trains_is_killed_in_every_list(tmp_path: Path) -> None:
    write_record(tmp_path, status="running", config={"seed": 1})
    [row] = load_runs([tmp_path]).itertuples()
    assert (row.status, row.error) == ("killed", "its process ended without a message")
    assert "killed: " in console_table(load_runs([tmp_path]))
    with (tmp_path / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert load_runs([tmp_path])["status"].tolist() == ["running"]


def test_a_key_with_a_line_break_does_not_cut_the_message(tmp_path: Path) -> None:
    content = written_content(METRICS, tmp_path / "x.json") | {"history": {"a\nb": 1}}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"history\.'a\\nb' is 1: must be a list"):
        MetricsRecord.read(tmp_path / "x.json")


def test_a_final_metric_without_a_slash_in_its_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"final_metrics\.status"):
        MetricsRecord(final_metrics=METRICS.final_metrics | {"status": 4}, history={})


@pytest.mark.parametrize("name", CLAIM)
def test_every_field_of_a_recorded_claim_is_checked(name: str) -> None:
    """A hand-edited claim with an object in place of any field, or with null where a value is needed, is refused."""
    replace(RUN, config={"seed": 1, "claims": [CLAIM]})
    for value in ({}, None, 1.5):
        if not ((name in ("margin", "direction", "at") and value is None) or (name == "within" and value == {})):
            with pytest.raises(ValueError, match=rf"^config\.claims\[0\]\.{name}"):
                replace(RUN, config={"seed": 1, "claims": [CLAIM | {name: value}]})


@pytest.mark.parametrize("claims", [None, {}, "x", [None], [{}], [CLAIM | {"sort": 1}]], ids=str)
def test_recorded_claims_of_another_shape_are_refused(claims: Any) -> None:
    with pytest.raises(ValueError, match=r"config\.claims"):
        replace(RUN, config={"seed": 1, "claims": claims})


@pytest.mark.parametrize("seed", [None, "x", 1.5, True])
def test_a_run_without_a_whole_number_as_its_seed_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"config\.seed="):
        replace(RUN, config={"seed": seed})
    with pytest.raises(ValueError, match=r"config\.seed=None"):
        replace(RUN, config={})


@pytest.mark.parametrize("value", [None, "low", [[1.0]], "left out"])
@pytest.mark.parametrize("name", MetricsRecord.EVERY_RUN)
def test_final_metrics_without_a_metric_that_every_run_has_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    content = written_content(METRICS, tmp_path / "metrics.json")
    content["final_metrics"][name] = value
    if value == "left out":
        del content["final_metrics"][name]
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(RecordError, match=rf"metrics\.json: final_metrics\.{name} is "):
        MetricsRecord.read(tmp_path / "metrics.json")


def test_a_run_whose_seed_is_no_number_and_a_missing_cell_with_extra_keys_are_rows(tmp_path: Path) -> None:
    (tmp_path / "seed=1").mkdir()
    write_record(tmp_path / "seed=1", config={"seed": "x"})
    write_cells(tmp_path, {"seed=2": {"folder": 3, "seed": 2}})
    runs = load_runs([tmp_path]).set_index("run")
    assert runs.loc["seed=1", "status"] == "unreadable"
    assert "config.seed='x'" in runs.loc["seed=1", "error"]
    assert runs.loc["seed=2", "folder"] == str(tmp_path / "seed=2")
