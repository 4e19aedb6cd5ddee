"""Tests of routers and options that lie outside of this project: how they are named, recorded and refused."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import FACTS
from train_processes import TRAIN, run_script

from moe.checks import ConfigError, parse
from moe.config.cell import Cell
from moe.config.options import CONF, SEARCH_PATH, options, router_spec
from moe.config.plugins import _read
from moe.files import shown
from moe.launch.command_line import help_text, read_cells
from moe.launch.groups import _pickled
from moe.launch.help import topic_text
from moe.launch.option_files import require_content
from moe.launch.run import run, write_run_record
from moe.runs.folder import _runs_by_content, difference, finished
from moe.runs.record import RunFacts, RunRecord

EXTENDING = (CONF.parent / "docs" / "extending.md").read_text(encoding="utf-8")
CODE = """
from moe.routers.topk import TopK

class Momentum(TopK):
    def __init__(self, dim: int, num_experts: int, *, k: int = 1, beta: float = 0.5, names: list[str] | None = None):
        super().__init__(dim, num_experts, k=k)
"""
YAML = "# Top-k with momentum, causal\n# p = softmax(beta W x)\n_target_: mylab.momentum.Momentum\nk: 2\nbeta: 0.5\n"
TARGET = "router._target_=mylab.momentum.Momentum"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user with a router, its yaml and an experiment, which nothing has named yet."""
    monkeypatch.setenv(SEARCH_PATH, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    for name in ("mylab", "conf/router", "conf/experiment"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mylab/momentum.py").write_text(CODE)
    (tmp_path / "conf/router/momentum.yaml").write_text(YAML)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\n# Does momentum help?\nhydra: {sweeper: {params: {router: 'topk,momentum'}}}\nsteps: 7\n"
    )
    yield tmp_path
    _read.cache_clear()
    _pickled.cache_clear()
    require_content.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


def cells(*words: str) -> list[Cell]:
    return read_cells(list(words)) or []


@pytest.mark.parametrize(
    "words",
    [
        ["hydra.searchpath=[conf]"],
        ["hydra.searchpath=[file://{lab}/conf]"],
        ["--config-dir", "conf"],
        ["--config-dir={lab}/conf"],
    ],
    ids=" ".join,
)
def test_a_command_can_name_a_folder_of_options(lab: Path, words: list[str]) -> None:
    [cell] = cells(*(word.format(lab=lab) for word in words), "router=momentum", "router.beta=0.9")
    assert cell.choices["router"] == "momentum"
    assert cell.config.router == {"_target_": "mylab.momentum.Momentum", "k": 2, "beta": 0.9}
    assert os.environ[SEARCH_PATH] == str(lab / "conf"), "processes of launchers find the folder by this variable"


def test_a_router_can_set_keys_of_the_whole_configuration(lab: Path) -> None:
    """The file says so in its first line, as Hydra asks. Every other reader of routers finds class and settings too."""
    indented = YAML.replace("_target_", "router:\n  _target_").replace("\nk", "\n  k").replace("\nbeta", "\n  beta")
    (lab / "conf/router/momentum.yaml").write_text(f"# @package _global_\n{indented}lb: 0.5\n")
    folder = ("hydra.searchpath=[conf]",)
    plain, own, weighted = cells(*folder, "-m", "router=topk,momentum") + cells(*folder, "router=momentum", "lb=0.2")
    assert [cell.config.lb for cell in (plain, own, weighted)] == [0.01, 0.5, 0.2]
    assert own.config.router == {"_target_": "mylab.momentum.Momentum", "k": 2, "beta": 0.5}
    assert router_spec("momentum") == own.config.router
    with pytest.raises(ConfigError, match=r"^unknown key of router=momentum 'router\.bta'; nearest: router\.beta$"):
        cells(*folder, "router=momentum", "router.bta=1")
    assert "router=momentum: 0.5" in topic_text("lb")


def test_the_environment_can_name_several_folders(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab / "other/variant").mkdir(parents=True)
    (lab / "other/variant/wide.yaml").write_text("# @package _global_\n# Wide experts\nmodel: {ffn: 99}\n")
    monkeypatch.setenv(SEARCH_PATH, f"conf{os.pathsep}odd:name")
    with pytest.raises(
        ConfigError, match=r"/odd: no such folder of options; a ':' in MOE_SEARCH_PATH separates folders"
    ):
        cells()
    monkeypatch.setenv(SEARCH_PATH, f"conf{os.pathsep}file://{lab}/other")
    found = cells("experiment=mine", "-m", "variant=wide")
    assert [cell.choices["router"] for cell in found] == ["topk", "momentum"]
    assert {(cell.config.steps, cell.config.model.ffn, cell.experiment) for cell in found} == {(7, 99, "mine")}
    assert options("router")["momentum"] == "Top-k with momentum, causal"


def test_an_installed_package_can_offer_options(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package names its folder of options by an entry point. Its code does not run until a command uses it."""
    (lab / "mylab/__init__.py").write_text("")
    (lab / "conf").rename(lab / "mylab/conf")
    (lab / "mylab-1.0.dist-info").mkdir()
    (lab / "mylab-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mylab\nVersion: 1.0\n")
    (lab / "mylab-1.0.dist-info/entry_points.txt").write_text("[moe.conf]\nmylab = mylab.conf\n")
    monkeypatch.syspath_prepend(str(lab))
    assert cells("router=topk")[0].choices["router"] == "topk"
    assert "mylab" not in sys.modules
    assert cells("router=momentum")[0].choices["router"] == "momentum"


@pytest.mark.parametrize(
    ("words", "router"),
    [
        ([TARGET, "+router.beta=0.9"], {"k": 2, "beta": 0.9}),
        ([TARGET, "router.beta=0.9", "router.k=3"], {"k": 3, "beta": 0.9}),
        (
            ["router={_target_: mylab.momentum.Momentum, beta: 0.9, names: [a b, x]}"],
            {"beta": 0.9, "names": ["a b", "x"]},
        ),
        ([TARGET, "router=softk"], {"k": 2}),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_class_can_be_named_with_keys_of_its_own(lab: Path, words: list[str], router: dict[str, object]) -> None:
    """The run has the name of the class, never that of the option that it replaced, and no key of that option."""
    [cell] = cells("--config-dir=conf", *words)
    assert cell.choices["router"] == "mylab.momentum.Momentum"
    assert {"k": 2} | router == {key: value for key, value in cell.config.router.items() if key != "_target_"}


def test_keys_of_a_class_can_be_swept(lab: Path) -> None:
    found = cells("--config-dir=conf", "-m", TARGET, "router.beta=0.1,0.9")
    assert [cell.config.router["beta"] for cell in found] == [0.1, 0.9]
    assert [cell.folder.name.split(",")[0] for cell in found] == ["router.beta=0.1", "router.beta=0.9"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config-dir=con router=momentum", "con: no such folder of options$"),
        (
            "--config-dir=mylab router=topk",
            "mylab: must hold at least one of the folders router, schedule, adapter, model, ",
        ),
        (
            "hydra.searchpath=3",
            r"^hydra.searchpath=3: must be a list of folders, such as \[file:///home/me/lab/conf\]$",
        ),
        ("hydra.searchpath=[no.such]", "no.such: no such folder of options$"),
        (
            "--config-dir=conf experiment=mine",
            "^hydra.sweeper.params: a grid of router needs a sweep; add -m, or write `mode: MULTIRUN` below `hydra:`",
        ),
        (
            "router=foo",
            "^unknown option of router 'foo'; name a folder that holds router/foo.yaml by .*; --help lists all$",
        ),
        ("--config-dir=conf router=foo", "^unknown option of router 'foo'; --help lists all$"),
        ("--config-dir=conf router=momentun", "^unknown option of router 'momentun'; nearest: momentum$"),
        (
            "--config-dir=conf router=momentum router.bet=1",
            "^unknown key of router=momentum 'router.bet'; nearest: router",
        ),
        (f"--config-dir=conf {TARGET} router.bet=1", "^unknown key of router 'router.bet'; nearest: router.beta$"),
        (f"--config-dir=conf {TARGET} router.beta=x", "^router.beta=x: must be a number$"),
        (
            f"--config-dir=conf {TARGET}x",
            "^router._target_=mylab.momentum.Momentumx: must be a class that can be imported",
        ),
        (
            f"{TARGET}",
            f"^{TARGET}: no package mylab can be imported: install it, or name its folder of options in MOE_SEARCH_",
        ),
        ("--config-dir=odd:name/conf", "^odd:name/conf: a folder of options cannot have ':' in its path; rename it$"),
        ("hydra.searchpath=[pkg://nope.conf]", "^pkg://nope.conf: no package nope$"),
        ("hydra.searchpath=[pkg://]", "^pkg://: the name is missing; must be a folder, file://DIR or pkg://PACKAGE$"),
        ("hydra.searchpath=[http://evil/x]", "^http://evil/x: must be a folder, file://DIR or pkg://PACKAGE$"),
        (
            "+router.beta=1",
            "^unknown key of router 'router.beta'; known: router.after_drops, router.gate, router.jitter, router.k$",
        ),
        (
            "+nois=1",
            r"^\+nois=1: keys can be added and deleted only in router, .*, adapter.router; set others as key=",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(lab: Path, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(*words.split())


@pytest.mark.parametrize("name", ["a b", "ä", "a=b,c", "100%25"])
def test_a_folder_of_options_may_have_any_name_without_a_colon(lab: Path, name: str) -> None:
    (lab / "conf").rename(lab / name)
    (lab / name / "router/momentum.yaml").rename(lab / name / "router/odd.yaml")
    [cell] = cells(f"--config-dir={name}", "router=odd")
    assert cell.choices["router"] == "odd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# a\nk: [1\n", ", line 3: expected ',' or "),
        (b"k: 1\nk: 2\n", ", line 2: found duplicate key k$"),
        (b"# \xe4\nk: 1\n", ": must be UTF-8$"),
        (b"3\n", ": Invalid loaded object type: int$"),
        (b"- a\n", ": must hold keys and values, as key: value$"),
        (b"# a\n", r": is empty; write keys and values as in conf/router/topk\.yaml$"),
        (None, ": Is a directory$"),
    ],
)
def test_only_the_use_of_an_option_whose_file_cannot_be_read_is_refused(
    lab: Path, content: bytes | None, message: str
) -> None:
    path = lab / "conf/router/broken.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{path}{message}"):
        cells("--config-dir=conf", "router=broken")
    if content == b"# a\n":
        for group in ("experiment", "variant"):
            (lab / "conf" / group).mkdir(exist_ok=True)
            empty = lab / "conf" / group / "empty.yaml"
            empty.write_text("# @package _global_\n")
            with pytest.raises(ConfigError, match=f"^{empty}: is empty; write keys and values as in conf/{group}/"):
                cells("--config-dir=conf", f"{group}=empty")
    with pytest.raises(ConfigError, match=r"^unknown key 'sede'; nearest: seed$"):
        cells("sede=1")
    with pytest.raises(ConfigError, match=r"^unknown option of router 'brokn'; nearest: broken$"):
        cells("router=brokn")
    assert "\n  broken" in help_text()


@pytest.mark.parametrize("first", ["# conf/experiment/mine.yaml", "steps: 7"])
def test_the_first_line_of_an_experiment_must_say_where_its_keys_belong(lab: Path, first: str) -> None:
    """Hydra ignores that line in another place, and complains about something else then."""
    path = lab / "conf/experiment/mine.yaml"
    path.write_text(f"{first}\n" + path.read_text().replace("steps: 7\n", ""))
    with pytest.raises(ConfigError, match=f"^{path}={first}: must be `# @package _global_` in the first line$"):
        cells("--config-dir=conf", "experiment=mine", "-m")


def test_the_first_line_of_a_router_with_keys_of_the_whole_configuration_must_say_so(lab: Path) -> None:
    path = lab / "conf/router/momentum.yaml"
    path.write_text("# Mine\nlb: 0.0\nrouter: {_target_: mylab.momentum.Momentum, k: 2, beta: 0.5}\n")
    with pytest.raises(ConfigError, match=f"^{path}=# Mine: must be `# @package _global_` in the first line$"):
        cells("--config-dir=conf", "router=momentum")


def test_help_lists_the_options_of_a_named_folder_and_refuses_a_missing_one(lab: Path) -> None:
    """The process that is refused finds another folder in the environment, of which the message says nothing."""
    assert "Top-k with momentum, causal" in help_text(["--help", "--config-dir", "conf"])
    done = run_script(TRAIN, "--help", "--config-dir=gone", cwd=lab)
    assert (done.returncode, done.stderr) == (2, f"train.py: {lab}/gone: no such folder of options\n")


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (
            "def __init__(self, dim, num_experts): raise RuntimeError('boom')",
            "",
            " cannot be built: RuntimeError: boom$",
        ),
        ("def __init__(self, dim, num_experts): raise OSError", "", " cannot be built: OSError$"),
        ("import sys; sys.exit('bye')", "", r" must be a class that can be imported \(SystemExit: bye\)$"),
        ("def __init__(self, dim, num_experts): raise SystemExit(3)", "", " cannot be built: SystemExit: 3$"),
        (
            "def __init__(self, dim, num_experts): pass",
            "",
            r" its __init__ must call super\(\).__init__\(dim, num_experts, ",
        ),
        (
            "def __init__(self, dim, num_experts): super().__init__(dim, num_experts, fixed_k=1)",
            "",
            r" must implement forward\(x, context\)$",
        ),
        ("def __init__(self, dim, num_experts, *, k: 'int'): pass", "router.k=x", None),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_in_one_line(
    lab: Path, code: str, words: str, message: str | None
) -> None:
    own = f"from moe.routers.base import Router\n\nclass Momentum(Router):\n    {code}\n"
    (lab / "mylab/momentum.py").write_text(own)
    expected = "^router.k=x: must be a whole number$" if message is None else f"^{TARGET}:{message}"
    with pytest.raises(ConfigError, match=expected):
        cells("--config-dir=conf", TARGET, *words.split())


@pytest.mark.parametrize("signature", ["*, k=2, beta=0.5", "*, k: 'Unknown' = 2, **others", "**others"])
def test_a_setting_without_a_type_takes_any_value(lab: Path, signature: str) -> None:
    code = CODE.replace("*, k: int = 1, beta: float = 0.5, names: list[str] | None = None", signature)
    (lab / "mylab/momentum.py").write_text(code.replace("k=k", "k=2"))
    [cell] = cells("--config-dir=conf", TARGET, "router.k=2", "router.beta=x")
    assert cell.config.router["beta"] == "x"


def test_the_reason_of_an_unexpected_error_names_the_file_with_its_traceback(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("moe.training.loop.train", fail)
    monkeypatch.setattr("moe.launch.run.follow_parent", lambda: None)
    [cell] = cells("router=topk", "out=runs", "logger.mode=disabled")
    run(cell)
    record = RunRecord.read(cell.folder / "run.json")
    assert (record.status, record.error) == ("failed", f"RuntimeError: boom; see {cell.folder}/traceback.txt")
    assert "in fail" in (cell.folder / "traceback.txt").read_text()


def test_two_options_of_one_name_are_refused(lab: Path) -> None:
    (lab / "conf/router/topk.yaml").write_text(YAML)
    with pytest.raises(ConfigError, match=r"^router=topk is both .*/router/topk.yaml and .*: rename the second file$"):
        cells("--config-dir=conf", "router=hash")


def test_a_run_records_the_code_of_its_classes_and_is_not_continued_with_other_code(lab: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(lab)]
    for command in (["init", "-q"], ["add", "mylab"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    [cell] = cells("--config-dir=conf", "router=momentum", "out=runs")
    cell.folder.mkdir(parents=True)
    write_run_record(cell, "finished", parse(RunFacts, FACTS))
    plugin = RunRecord.read(cell.folder / "run.json").plugins["mylab"]
    assert plugin.commit == subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert finished(cell)
    (lab / "mylab/helper.py").write_text("")
    _read.cache_clear()
    assert not finished(cell)
    assert difference(cell) == ["the code of mylab has changed since that run began"]


def code(lab: Path) -> dict[str, str]:
    """Return the digest of each package that a run of router=momentum needs."""
    _read.cache_clear()
    [cell] = cells("--config-dir=conf", "router=momentum")
    return {name: plugin.sha256 for name, plugin in cell.config.plugins().items()}


def test_only_what_can_be_imported_is_the_code_of_a_package(lab: Path) -> None:
    """Files of editors, notebooks and runs in the folder of a package do not change its code."""
    before = code(lab)
    for name in (".ipynb_checkpoints", "outputs/default/base/model", "a,b", "odd.py"):
        (lab / "mylab" / name).mkdir(parents=True)
    for name in (".ipynb_checkpoints/momentum.py", "outputs/default/base/model/modeling_moe_routing.py", "a,b/c.py"):
        (lab / "mylab" / name).write_text("")
    (lab / "mylab/outputs/default/base/run.json").write_text("{}")
    (lab / "mylab/momentum-checkpoint.py").write_text("")
    (lab / "mylab/.#momentum.py").symlink_to("nobody@host.123:4")
    (lab / "mylab/gone.py").symlink_to("nowhere.py")
    (lab / "mylab/back").symlink_to("..")
    (lab / "mylab/again").symlink_to("..")
    assert code(lab) == before
    (lab / "mylab/part").mkdir()
    (lab / "mylab/part/new.py").write_text("")
    assert code(lab) != before


def test_what_a_class_imports_from_the_folder_of_its_package_is_its_code_too(lab: Path) -> None:
    """These are base classes and helpers, also those that another helper imports. Other files beside them are not."""
    (lab / "mylab/momentum.py").write_text(CODE.replace("from moe.routers.topk import TopK", "from first import TopK"))
    (lab / "first.py").write_text("from moe.routers.topk import TopK as Base\nclass TopK(Base):\n    import second.a\n")
    (lab / "second").mkdir()
    for name in ("second/a.py", "second/b.py", "other.py"):
        (lab / name).write_text("")
    before = code(lab)
    assert list(before) == ["first", "mylab", "second"]
    for name in ("second/b.py", "other.py"):
        (lab / name).write_text("x = 1\n")
    after = code(lab)
    assert [name for name in before if before[name] != after[name]] == ["second"]
    for name in ("first", "second", "second.a"):
        del sys.modules[name]


def test_a_helper_in_the_folder_of_options_is_code_of_the_class_too(lab: Path) -> None:
    (lab / "mylab/momentum.py").write_text(f"import helper_of_options\n{CODE}")
    (lab / "conf/helper_of_options.py").write_text("x = 1\n")
    before = code(lab)
    (lab / "conf/helper_of_options.py").write_text("x = 2\n")
    after = code(lab)
    assert [name for name in before if before[name] != after[name]] == ["helper_of_options"]
    sys.modules.pop("helper_of_options", None)


def test_two_folders_of_options_cannot_hold_packages_of_one_name(lab: Path) -> None:
    """Python would import the first one for the options of both. It is refused before either is imported."""
    (lab / "two/mylab").mkdir(parents=True)
    (lab / "two/mylab/momentum.py").write_text(CODE)
    (lab / "two/conf/router").mkdir(parents=True)
    (lab / "two/conf/router/far.yaml").write_text(YAML)
    os.environ[SEARCH_PATH] = f"conf{os.pathsep}two/conf"
    message = f"both {lab} and {lab}/two have a package mylab, and Python would import only one: rename the second"
    with pytest.raises(ConfigError, match=f"^{TARGET}: {message}$"):
        cells("router=far")
    assert "mylab.momentum" not in sys.modules


def test_a_key_that_a_class_does_not_take_is_refused_beside_its_finished_run(lab: Path) -> None:
    """The finished run is found without the key, and then the class has to be asked what it takes."""
    [cell] = cells("--config-dir=conf", TARGET)
    cell.folder.mkdir(parents=True)
    write_run_record(cell, "finished", parse(RunFacts, FACTS))
    _runs_by_content.cache_clear()
    known = "router.beta, router.k, router.names"
    with pytest.raises(ConfigError, match=f"^unknown key of router 'router.alpha'; known: {known}$"):
        cells("--config-dir=conf", TARGET, "router.alpha=0.9")


def test_the_experiment_of_the_page_about_extending_spans_its_grid(lab: Path) -> None:
    [experiment] = re.findall(r"```yaml\n(# @package _global_\n.*?)```", EXTENDING, re.DOTALL)
    [router] = re.findall(r"`moe/routers/distance.py`:\n\n```python\n(.*?)```", EXTENDING, re.DOTALL)
    [option] = re.findall(r"`conf/router/distance.yaml`:\n\n```yaml\n(.*?)```", EXTENDING, re.DOTALL)
    (lab / "mylab/distance.py").write_text(router)
    (lab / "conf/router/distance.yaml").write_text(option.replace("moe.routers", "mylab"))
    (lab / "conf/experiment/mine.yaml").write_text(experiment)
    found = cells("--config-dir=conf", "experiment=mine")
    asked = [(cell.choices["router"], cell.config.seed, len(cell.config.claims)) for cell in found]
    assert asked == [(router, seed, 1) for router in ("topk", "distance") for seed in (42, 43, 44)]


def test_a_folder_is_printed_relative_to_the_current_folder(lab: Path) -> None:
    assert str(shown(lab / "outputs" / "a")) == "outputs/a"
    assert shown(lab.parent / "a") == lab.parent / "a"


def test_a_run_without_foreign_classes_records_none(lab: Path) -> None:
    [cell] = cells("router=topk")
    assert cell.config.plugins() == {}
