"""Tests that files of a stranger cannot run code or write outside their folder, and are refused in one line.

Every kind of file that this project reads is filled with hostile content. Code that ran would leave the file `ran`.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from matplotlib.figure import Figure
from small_runs import read_small_cell
from train_processes import ANALYZE, TRAIN, run_script
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moe.analysis.figures.drawing import Drawing
from moe.analysis.figures.specialization import specialization_drawings
from moe.analysis.report.blocks import Attachment
from moe.analysis.report.markdown import block_as_markdown
from moe.checks import ConfigError
from moe.config.checkpoints import dense as dense_checkpoint
from moe.config.checkpoints import files
from moe.config.classes import build
from moe.config.options import SEARCH_PATH
from moe.data import readers
from moe.data.blocks import prepare
from moe.data.embedded import Embedded
from moe.data.limits import BlockSettings
from moe.data.sources import Files
from moe.data.tokenizer import pretrained_tokenizer
from moe.files import LinkError, open_unlinked, write_text
from moe.launch.resolvers import best_level
from moe.launch.run import run
from moe.launch.sweep import carry_out
from moe.model.architecture import AUTO_MAP, MoEConfig
from moe.model.causal_lm import MoEForCausalLM, load_model
from moe.results.table import load_runs
from moe.runs import checkpoint, traces
from moe.runs.documents import read_documents
from moe.runs.folder import locked, user
from moe.runs.record import RecordError
from moe.specialization.__main__ import main as specialization

RAN = "print(1); open({!r}, 'w').close()"


@pytest.fixture(scope="module")
def pristine(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with its specialization.json. It must stay as it is."""
    cell = read_small_cell((*small, "model.layers=1", "steps=2"))
    folder = tmp_path_factory.mktemp("pristine") / "run"
    run(cell._replace(folder=folder))
    assert specialization([str(folder), "--blocks", "4", "--samples", "2"]) == 0
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(pristine, tmp_path / "run"))


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that hostile code would write. `evil.py`, whose import writes it, can be imported."""
    path = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"{RAN.format(str(path))}\nclass Evil: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


class Runs:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Replace the content of a JSON file by what `edit` makes of it."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(edit(content) or content))


def one_line(error: BaseException) -> str:
    """Return the message of an error, which must be a single line that a terminal shows as it is."""
    assert str(error).isprintable(), str(error)
    return str(error)


# ---- Names of classes -------------------------------------------------------------------------------------------


TARGETS = {
    "another library": "sympy.collect",
    "a command": "subprocess.Popen",
    "a module of the stranger": "evil.Evil",
    "a function here": "moe.routers.base.check_k",
    "a module that this project imports": "moe.routers.base.torch.load",
    "a class of another kind": "moe.routers.base.Context",
    "no name": "Evil",
    "a number": 3,
    "a name with a line break": "evil\n.Evil",
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("key", ["router", "schedule", "data.source"])
def test_only_classes_of_this_project_and_of_the_right_kind_are_built(key: str, target: Any, ran: Path) -> None:
    """A `_target_` from a file is compared with what is allowed before anything is imported."""
    with pytest.raises(ConfigError) as raised:
        build({"_target_": target}, key, *([8, 4] if key == "router" else []))
    assert one_line(raised.value).startswith(f"{key}._target_=")
    assert not ran.exists()


def test_the_users_own_class_is_imported_and_must_still_derive_from_the_base_class(ran: Path) -> None:
    with pytest.raises(ConfigError, match=r"a class that derives from moe\.routers\.base\.Router"):
        build({"_target_": "evil.Evil"}, "router", 8, 4, trusted=True)
    assert ran.exists()


# ---- Saved models -----------------------------------------------------------------------------------------------


CONFIGS: dict[str, dict[str, Any]] = {
    "an expression": {"num_experts": "__import__('os').mkdir('ran')", "router": {"_target_": "sympy.collect"}},
    "a command": {"hidden_size": ["mkdir", "ran"], "router": {"_target_": "subprocess.Popen"}},
    "a module": {"router": {"_target_": "evil.Evil"}},
    "no router": {"router": None},
    "a router's setting": {"router": {"_target_": "moe.routers.topk.TopK", "k": "2"}},
    "another type": {"dropout": "0.1\n\x1b[31m"},
    "code of the folder": {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
    "more code than that of this project": {"auto_map": {**AUTO_MAP, "AutoTokenizer": ["evil.Evil", None]}},
    "a list of code": {"auto_map": ["evil.Evil"]},
    "a kernel of the hub": {"attn_implementation": "stranger/kernel"},
    "a kernel of the hub, as transformers stores it": {"_attn_implementation": "stranger/kernel"},
    "a quantizer": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "an attribute of torch": {"dtype": "load"},
    "another model": {"model_type": "llama"},
    "a function of its own": {"hidden_act": "evil.Evil"},
    "an expert of its own": {"expert": "evil.Evil"},
    "an impossible norm": {"rms_norm_eps": -1.0},
    "an impossible temperature": {"router_temperature": 0.0},
    "impossible noise": {"router_noise": -1.0},
    "padding beyond the vocabulary": {"pad_token_id": 10**9},
    "padding below 0": {"pad_token_id": -1},
    "one end of several beyond the vocabulary": {"eos_token_id": [0, 10**9]},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_config_json_is_refused_in_one_line(changes: dict[str, Any], folder: Path, ran: Path) -> None:
    """Every field is checked before anything that config.json names is imported."""
    change(folder / "model" / "config.json", lambda content: content | changes)
    with pytest.raises(ValueError, match=r"config\.json|router") as raised:
        load_model(folder / "model")
    one_line(raised.value)
    if "model_type" not in changes:  # transformers itself chooses the class by this field
        with pytest.raises(ConfigError):
            AutoModelForCausalLM.from_pretrained(folder / "model")
    if not changes.keys() & {"model_type", "dtype"}:  # transformers itself reads these two
        with pytest.raises((ConfigError, StrictDataclassError)):  # and it compares some types
            MoEForCausalLM._from_config(MoEConfig(**json.loads((folder / "model" / "config.json").read_text())))
    assert not ran.exists()


# Sizes that no memory holds, or loops that do not end.
HUGE: dict[str, dict[str, Any]] = {
    **{name: {name: 10**12} for name in ("vocab_size", "hidden_size", "intermediate_size", "num_experts")},
    **{name: {name: 10**12} for name in ("num_hidden_layers", "shared_experts", "num_attention_heads", "head_dim")},
    "more than a tensor can have": {"vocab_size": 10**40},
    "numbers of no weights": {"hidden_size": 0, "head_dim": 10**12},
    "dense layers": {"dense_ffn": 10**12, "first_k_dense_replace": 10**12},
    "a chain": {"router": {"_target_": "moe.routers.chain_of_experts.ChainOfExperts", "iterations": 10**12}},
    "a table": {"router": {"_target_": "moe.routers.hash.Hash", "vocab_size": 10**12}},
    "slots": {"router": {"_target_": "moe.routers.soft_moe.SoftMoE", "slots": 10**12}},
    "a recurrence": {"router": {"_target_": "moe.routers.spectra.Spectra", "router_dim": 10**12}},
    "a plan": {"router": {"_target_": "moe.routers.sinkhorn.Sinkhorn", "iterations": 10**12}},
}


@pytest.mark.parametrize("changes", HUGE.values(), ids=HUGE)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_allocated(
    changes: dict[str, Any], folder: Path
) -> None:
    """A config.json whose sizes are not those of the weights is refused in one line, without their memory."""
    change(folder / "model" / "config.json", lambda content: content | changes)
    with pytest.raises(ValueError, match=r"config\.json|router") as raised:
        load_model(folder / "model")
    assert "alloc" not in one_line(raised.value)
    with pytest.raises(ConfigError):
        AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.mark.parametrize("word", ["trusted", "trust_remote_code"])
def test_a_trusted_saved_model_may_have_a_router_of_its_own(
    word: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package may lie beside a folder of options. Without trust, a line says which module would be imported."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(SEARCH_PATH, str(tmp_path / "conf"))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "conf" / "router").mkdir(parents=True)
    (tmp_path / "mine.py").write_text("from moe.routers.topk import TopK\nclass Mine(TopK): ...\n")
    change(folder / "model" / "config.json", lambda content: content["router"].update(_target_="mine.Mine"))
    for untrusted in ({}, {"trust_remote_code": False}):
        with pytest.raises(ConfigError, match=r"^router\._target_=mine\.Mine: must be .* The module mine is imported"):
            AutoModelForCausalLM.from_pretrained(folder / "model", **untrusted)
    assert "mine" not in sys.modules
    trusted = AutoModelForCausalLM.from_pretrained(folder / "model", **{word: True})
    assert type(trusted.moe_layers[0].router).__name__ == "Mine"


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def replace_with_pickle(path: Path) -> None:
    path.unlink()
    torch.save({"model": Runs(path.parents[2] / "ran")}, path.with_name("pytorch_model.bin"))


def empty(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize("damage", [tear, replace_with_pickle, empty])
def test_wrong_weights_are_refused_in_one_line(
    damage: Callable[[Path], None], folder: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="model") as raised:
        load_model(folder / "model")
    one_line(raised.value)
    assert specialization([str(folder)]) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.startswith("python -m moe.specialization: ")
    assert not ran.exists()


# ---- Records of runs --------------------------------------------------------------------------------------------


def name_source(content: dict[str, Any]) -> None:
    content["config"]["data"]["source"] = {"_target_": "evil.Evil"}


def name_other_text(content: dict[str, Any]) -> None:
    content["config"]["data"]["source"]["paths"] = [__file__]


@pytest.mark.parametrize("edit", [name_source, name_other_text])
def test_the_data_source_in_run_json_runs_no_code_and_reads_no_text(
    edit: Callable[[Any], None], folder: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --trust, `python -m moe.specialization` reads the data of a run from the cache alone."""
    change(folder / "run.json", edit)
    (folder / "specialization.json").unlink()
    capsys.readouterr()
    assert specialization([str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not ran.exists()


HOSTILE_JSON = ["", "{", "[]", "null", "\x00", "[" * 100_000, '{"format": 1}', '{"format": "<script>"}']


@pytest.mark.parametrize("text", HOSTILE_JSON, ids=range(len(HOSTILE_JSON)))
@pytest.mark.parametrize("name", ["run.json", "metrics.json", "specialization.json"])
def test_a_wrong_record_is_one_line_for_both_readers(
    name: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`load_runs`, with which analyze.py starts, and `python -m moe.specialization` give a line for a wrong record."""
    (folder / name).write_text(text)
    [row] = load_runs([folder.parent]).to_dict("records")
    status = specialization([str(folder)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert name in lines[0]
    if name == "specialization.json":
        assert status == 2
    else:
        assert (status, row["status"]) == (0, "unreadable")
        assert name in row["error"]


# ---- Checkpoints and traces -------------------------------------------------------------------------------------


def write_checkpoint(root: Path, state: Any, manifest: Any = None) -> None:
    """Write a checkpoint that is newer than all others, with the right checksum."""
    folder = root / "step-00000099"
    folder.mkdir(parents=True)
    torch.save(state, folder / "state.pt")
    digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    right = {"step": 99, "sha256": {"state.pt": digest}}
    (folder / "manifest.json").write_text(json.dumps(right if manifest is None else manifest))


def test_a_pickle_in_a_checkpoint_is_not_loaded(tmp_path: Path, ran: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(tmp_path / "checkpoints", 2, {"step": 2})
    write_checkpoint(tmp_path / "checkpoints", {"model": Runs(ran)})
    assert checkpoint.load(tmp_path / "checkpoints") == (2, {"step": 2})
    assert not ran.exists()
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("manifest", [[], {"step": 99, "sha256": "x"}, {"step": 99, "sha256": {"state.pt": []}}, 3])
def test_a_checkpoint_with_a_wrong_manifest_is_damaged(manifest: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, manifest)
    with pytest.raises(RuntimeError, match=r"no checkpoint of .* can be read") as raised:
        checkpoint.load(tmp_path)
    one_line(raised.value)


def test_a_trace_with_a_pickle_or_other_content_is_refused_in_one_line(tmp_path: Path, ran: Path) -> None:
    mask = np.array([Runs(ran)], dtype=object)
    path = tmp_path / "step-00000001.npz"
    np.savez(path, bits=mask, shape=mask, allow_pickle=True)
    zipped = path.read_bytes()
    header = b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f8'}"
    for content in (zipped, zipped[:-30], zipped[:200] + bytes(200) + zipped[400:], pickle.dumps(Runs(ran)), header):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"step-00000001\.npz: incomplete or not a trace") as raised:
            traces.read_traces(tmp_path)
        one_line(raised.value)
    assert not ran.exists()


# ---- Tokenizers and dense checkpoints ---------------------------------------------------------------------------


def test_a_tokenizer_never_runs_code_and_never_asks(folder: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("the terminal was asked")

    monkeypatch.setattr("builtins.input", ask)
    model = folder / "model"
    shutil.copy(ran.parent / "evil.py", model / "evil.py")
    auto_map = {"AutoTokenizer": [None, "evil.Evil"], "AutoConfig": "evil.Evil"}
    settings = {"tokenizer_class": "Evil", "auto_map": auto_map}
    change(model / "tokenizer_config.json", lambda content: content | settings)
    with pytest.raises(ValueError, match=r"^data\.tokenizer=") as raised:
        pretrained_tokenizer(str(model))
    assert "\n" not in str(raised.value)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"^data\.tokenizer="):
        pretrained_tokenizer(str(model))
    assert not ran.exists()


def test_a_tokenizer_that_skips_numbers_is_refused(folder: Path) -> None:
    """A model has one row for each token, so a number beyond the number of tokens has no row."""
    model = folder / "model"
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(re.sub(r'"t": \d+', '"t": 5000', text))
    message = (
        r"^data\.tokenizer=.*: must be a tokenizer that numbers its 400 tokens from 0 to 399; this one has .* 5000$"
    )
    with pytest.raises(ValueError, match=message):
        pretrained_tokenizer(str(model))


LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
DENSE: dict[str, Any] = {
    "a list": [],
    "a text as a size": LLAMA | {"num_hidden_layers": "1"},
    "a negative size": LLAMA | {"hidden_size": -8},
    "a kernel of the hub": LLAMA | {"attn_implementation": "stranger/kernel"},
    "a quantizer": LLAMA | {"quantization_config": {"quant_method": "gptq"}},
    "weights without their index": LLAMA,
    "a list of labels": LLAMA | {"num_labels": 10**12},
}


@pytest.mark.parametrize("settings", DENSE.values(), ids=DENSE)
def test_a_hostile_dense_folder_is_refused_in_one_line_and_its_pickle_is_not_tried(
    settings: Any, tmp_path: Path, ran: Path
) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(settings))
    (dense / "other.safetensors").write_bytes(b"x")
    torch.save({"model": Runs(ran)}, dense / "pytorch_model.bin")
    keys = (*dense_checkpoint.SIZES, "expert", "embed_scale", "dense_digest", "layers", "upcycle_parents")
    with pytest.raises(ConfigError) as raised:
        dense_checkpoint.resolve({**dict.fromkeys(keys), "upcycle_split": 1, "dense": str(dense)})
    assert "model.dense" in one_line(raised.value)
    assert not ran.exists()


@pytest.mark.parametrize("key", sorted({*LLAMA, "head_dim", "num_key_value_heads", "attention_bias"} - {"model_type"}))
def test_sizes_that_a_dense_checkpoint_does_not_have_are_refused(key: str, tmp_path: Path) -> None:
    """The sizes of a dense checkpoint are compared with its weights when the command line is read."""
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    keys = (*dense_checkpoint.SIZES, "expert", "embed_scale", "dense_digest", "layers", "upcycle_parents")
    model = {**dict.fromkeys(keys), "upcycle_split": 1, "dense": str(tmp_path)}
    assert dense_checkpoint.resolve(model)["layers"] == 1
    change(tmp_path / "config.json", lambda content: content | {key: key == "attention_bias" or 10**12})
    with pytest.raises(ConfigError, match=r"config\.json") as raised:
        dense_checkpoint.resolve(model)
    assert "model.dense=" in one_line(raised.value)


# ---- Pipes ------------------------------------------------------------------------------------------------------


PIPES: dict[str, Callable[[Path], object]] = {
    "run.lock": user,
    "trace/step-00000001.npz": lambda path: traces.read_traces(path.parent),
    "documents.npz": lambda path: read_documents(path.parent),
    "checkpoints/step-00000001/manifest.json": lambda path: checkpoint.load(path.parents[1]),
    "checkpoints/step-00000001/state.pt": lambda path: checkpoint.load(path.parents[1]),
    "model/model.safetensors": lambda path: load_model(path.parent),
    "model/generation_config.json": lambda path: load_model(path.parent),
    "model/special_tokens_map.json": lambda path: pretrained_tokenizer(str(path.parent)),
    "dense/config.json": lambda path: files.digest(str(path.parent)),
    "dense/model-2.safetensors": lambda path: files.digest(str(path.parent)),
    "texts/x.txt": lambda path: Files(paths=[str(path)], column="text", domain=None),
    "texts/x.csv.gz": lambda path: list(readers.read_rows(path, "data.source.path")),
    "texts/x.parquet": lambda path: list(readers.read_rows(path, "data.source.path")),
    "results.csv": lambda path: best_level(str(path), "router.temp"),
}


@pytest.mark.parametrize("name", PIPES)
def test_no_reader_waits_for_a_pipe(name: str, pristine: Path, tmp_path: Path) -> None:
    """A pipe in place of a file is named in one line. To read it, or only to open it, could take for ever."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.name == "model":
        shutil.copytree(pristine / "model", path.parent, dirs_exist_ok=True)
    if path.parent.name == "dense":
        (path.parent / "config.json").write_text(json.dumps(LLAMA))
        (path.parent / "model.safetensors").write_bytes(b"x")
    if path.name == "state.pt":
        write_checkpoint(path.parents[1], {})
        path = path.parents[1] / "step-00000099" / "state.pt"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"something waits for {path}"))
    signal.alarm(20)
    try:
        if name == "run.lock":
            assert user(tmp_path) == "unknown"
            with pytest.raises(LinkError, match=r"run\.lock is a pipe"), locked(path):
                pass
        else:
            with pytest.raises((ValueError, OSError, RuntimeError)) as raised:
                PIPES[name](path)
            assert str(path.parent if "checkpoints" in name else path.parent.name) in one_line(raised.value)
    finally:
        signal.alarm(0)


# ---- Links ------------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a file outside of every run folder, which must keep its content."""
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.mark.parametrize("name", ["sweep.lock", ".sweep.json.tmp", "results.csv", ".submitit"])
def test_a_sweep_does_not_write_through_a_link_in_its_folder(
    name: str, small: list[str], tmp_path: Path, victim: Path
) -> None:
    """A link in a sweep folder is refused in one line, with exit status 2, before a run starts."""
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / name).symlink_to(victim.parent if name == ".submitit" else victim)
    done = run_script(TRAIN, "-m", *small, "seed=1,2", f"out={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{name} is a link" in done.stderr
    assert victim.read_text() == "precious"
    assert [path.name for path in (tmp_path / "default").iterdir()] == [name]


LINKED_FOLDERS = ("", "checkpoints", "model", "trace", "milestones", "wandb")


@pytest.mark.parametrize("name", [*LINKED_FOLDERS, "run.lock", "events.jsonl", "wandb/settings"])
def test_a_run_does_not_write_through_a_link_in_its_folder(name: str, cell: Any, tmp_path: Path, victim: Path) -> None:
    """A run folder that is a link, and a link in it that leads out of it, are refused before any work."""
    one = cell(f"out={tmp_path / 'out'}")
    link = one.folder / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim.parent if name in LINKED_FOLDERS else victim)
    with pytest.raises((ConfigError, RecordError), match=r"is a link|no run\.json"):
        carry_out([one], lambda: pytest.fail("the run was started"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == [victim.name]
    assert victim.read_text() == "precious"


def test_a_sweep_does_not_write_into_the_folder_to_which_a_cell_is_linked(
    cell: Any, pristine: Path, tmp_path: Path
) -> None:
    """This holds even for a link to a finished run, which the table of the sweep would not find."""
    cells = [cell(f"out={tmp_path / 'out'}", f"seed={seed}") for seed in (1, 2)]
    target = Path(shutil.copytree(pristine, tmp_path / "elsewhere"))
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    cells[0].folder.parent.mkdir(parents=True)
    for each in cells:
        each.folder.symlink_to(target)
        with pytest.raises(ConfigError, match="is a link: delete it"):
            carry_out(cells, lambda: pytest.fail("the sweep was started"))
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    assert {path.name for path in cells[0].folder.parent.iterdir()} == {each.folder.name for each in cells}


def test_a_file_is_never_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(victim)
    for mode in ("w", "a", "xb", "a+"):
        with pytest.raises(LinkError, match="is a link"):
            open_unlinked(link, mode)
    write_text(link, "precious")  # the same content as the target's
    assert not link.is_symlink()
    (tmp_path / f".link.{os.getpid()}.tmp").symlink_to(victim)
    with pytest.raises(LinkError):
        write_text(link, "other")
    assert victim.read_text() == "precious"


def test_prepared_data_are_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    source = Embedded(domains=["docs"], chars_per_domain=60_000)
    settings = BlockSettings(tokenizer="bpe", vocab_size=300, seq_len=32, val_percent=20, max_val_blocks=4)
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    made = prepare(source, settings, cache=str(cache))
    key = made.manifest["key"]
    shutil.rmtree(cache / key)
    outside.mkdir()
    (cache / f"{key}.unfinished").symlink_to(outside)
    with pytest.raises(LinkError, match="unfinished is a link"):
        prepare(source, settings, cache=str(cache))
    (cache / f"{key}.unfinished").unlink()
    (cache / f"{key}.lock").unlink(missing_ok=True)
    (cache / f"{key}.lock").symlink_to(victim)
    with pytest.raises(ValueError, match="symbolic"):
        prepare(source, settings, cache=str(cache))
    assert victim.read_text() == "precious"
    assert not list(outside.iterdir())


def test_a_study_and_a_report_do_not_write_through_links(folder: Path, tmp_path: Path, victim: Path) -> None:
    for name in ("specialization.json", "tokens.html", "own_text.html"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    victim.write_text("precious")
    assert specialization([str(folder), "--blocks", "4", "--samples", "2"]) in (0, 2)
    assert specialization([str(folder), "--text", "fox"]) in (0, 2)
    out = tmp_path / "analysis"
    out.mkdir()
    for name in ("report.md", "report.html", "runs.csv", "learning_curves.png"):
        (out / name).symlink_to(victim)
    done = run_script(ANALYZE, str(folder), "--out", str(out))
    assert "Traceback" not in done.stderr
    assert victim.read_text() == "precious"
    assert (out / "learning_curves.png").is_file()
    assert not (out / "learning_curves.png").is_symlink()


# ---- Studies and reports ----------------------------------------------------------------------------------------


def drop_expert(content: Any) -> None:
    content["measured"]["load"][0].pop()


def name_number(content: Any) -> None:
    content["measured"]["domains"][0] = 7


def mistype_nested(content: Any) -> None:
    content["measured"]["keywords"][0][0]["keywords"] = [{"token": 3}]


def drop_nested(content: Any) -> None:
    del content["measured"]["knockout"]["zeroed"]["delta"]["low"]


def empty_lists(content: Any) -> None:
    content["measured"]["regret"] = []


def drop_zero(content: Any) -> None:
    content["measured"]["landscape"]["distances"][4] = 0.5


def add_reason(content: Any) -> None:
    content["reason"] = "none"


@pytest.mark.parametrize(
    "edit", [drop_expert, name_number, mistype_nested, drop_nested, empty_lists, drop_zero, add_reason]
)
def test_a_wrong_level_of_specialization_json_is_one_line(
    edit: Callable[[Any], None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every level of specialization.json is checked, for the study and for the report."""
    change(folder / "specialization.json", edit)
    assert specialization([str(folder), "--blocks", "4", "--samples", "2"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.endswith("; delete the file and measure the run again\n")
    [drawn] = specialization_drawings(load_runs([folder]))
    assert (drawn.figure, drawn.reason) == (None, line.removeprefix("python -m moe.specialization: ").rstrip("\n"))


MARKUP = '<script>alert(1)</script>"><img src=x onerror=alert(2)>[x](javascript:alert(3))$\\foo{$|`'


def test_names_and_texts_of_a_stranger_become_neither_markup_nor_paths(pristine: Path, tmp_path: Path) -> None:
    """Run names, claims, domains, factors and experiments are text in a report, and lead to no file outside of it."""
    claim = {"text": MARKUP, "source": MARKUP, "metric": "val/loss", "factor": "noise", "levels": [0.1]}
    claim |= {"than": [0.0], "kind": "higher", "size": [], "margin": None, "within": {}, "direction": None, "at": None}
    for seed, noise in [(1, 0.0), (2, 0.0), (1, 0.1), (2, 0.1)]:
        folder = Path(shutil.copytree(pristine, tmp_path / "runs" / f"{seed}-{noise}<img src=x>"))

        def edit_run(record: Any, noise: float = noise, seed: int = seed) -> None:
            record["experiment"] = f"../../escaped{MARKUP}"
            record["name"] = record["commit"] = record["machine"]["system"] = MARKUP
            record["config"] |= {"seed": seed, "noise": noise, "claims": [claim], f"../escaped{MARKUP}": noise}
            record["facts"]["data"]["domains"] = {MARKUP: {"license": MARKUP}}

        def edit_study(record: Any) -> None:
            record["measured"]["domains"] = [MARKUP for _ in record["measured"]["domains"]]

        change(folder / "run.json", edit_run)
        change(folder / "specialization.json", edit_study)
        change(folder / "metrics.json", lambda record: record["final_metrics"].update({f"routing/../{MARKUP}": 1.0}))
    metric = f"routing/../{MARKUP}"
    out = tmp_path / "inner" / "analysis"
    done = run_script(ANALYZE, str(tmp_path / "runs"), "--out", str(out), "--metric", metric)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert "<script>alert" not in text
        assert "<img src=x" not in text
    assert "](javascript" not in (out / "report.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "inner"}
    assert [path.name for path in out.parent.iterdir()] == ["analysis"]


def test_the_name_of_a_picture_is_escaped_in_markdown() -> None:
    figure = Figure()
    shown = block_as_markdown(Drawing("a](x) <b>", "caption", figure))
    assert shown == "![a]\\(x) &lt;b>](a%5D%28x%29%20%3Cb%3E.png)\n\ncaption"
    assert block_as_markdown(Attachment("a b<i>.csv", "", "c")) == "[a b&lt;i>.csv](a%20b%3Ci%3E.csv): c"
