"""Tests of the command `moe`, which a wheel installs, and of its subcommands."""

import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from moe.__main__ import COMMANDS, main
from moe.bench.questions import QUESTIONS
from moe.config.options import CONF
from moe.program import ended, program, train_command


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moe", *words])
    return main()


def test_without_a_subcommand_all_subcommands_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  moe ")] == [
        *COMMANDS
    ]


def test_an_unknown_subcommand_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "analyse") == 2
    assert capsys.readouterr().err == "moe: unknown command 'analyse'; nearest: analyze\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = call(monkeypatch, name, "--help")
    except SystemExit as end:  # argparse
        status = end.code
    assert status == 0
    out = capsys.readouterr().out
    assert len(out) > 100
    assert out.startswith(f"usage: moe {name} ") or (name == "train" and "\n  moe train router=" in out)


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("analyze multirun --metrc val/loss", "--metric"),
        ("export model --out x --max-shrad-size 1GB", "--max-shard-size"),
        ("observe model --out x --blcks=3", "--blocks"),
        ("dashboard noise_lb_seed --projct x", "--project"),
        ("plan experiment=noise_lb_seed effect=1% --pliot x", "--pilot"),
        ("specialize run --smaples 3", "--samples"),
    ],
)
def test_a_misspelled_option_is_one_line_with_the_nearest(
    words: str, nearest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *others = words.split()
    try:
        status = call(monkeypatch, name, *others)
    except SystemExit as end:
        status = end.code
    assert status == 2
    wrong = next(word for word in others if word.startswith("--") and not word.startswith("--out")).partition("=")[0]
    assert capsys.readouterr().err == f"moe {name}: unknown option '{wrong}'; nearest: {nearest}\n"


def test_usage_and_errors_name_the_other_ways_to_call_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/moe/__main__.py", "export", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("usage: python -m moe export ")
    monkeypatch.setattr(sys, "argv", ["/somewhere/moe/__main__.py", "trian"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("python -m moe: unknown command 'trian'")
    monkeypatch.setattr(sys, "argv", ["/somewhere/moe/specialization/__main__.py"])
    assert program("python -m moe.specialization") == "python -m moe.specialization"
    monkeypatch.setattr(sys, "argv", ["../analyze.py", "multirun"])
    assert program("moe analyze") == "analyze.py"


def test_commands_that_reports_print_run_in_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_command() == "python -m moe train"
    (tmp_path / "train.py").touch()
    assert train_command() == "python train.py"


DEFAULT = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


@pytest.fixture
def handlers() -> Iterator[None]:
    """Begin with the handlers of a command in the foreground, and install the present ones again after the test."""
    before = {number: signal.signal(number, default) for number, default in DEFAULT.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])  # tests/faults/test_kills.py
def test_a_signal_ends_every_command_with_one_line(
    name: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        signal.raise_signal(number)
        pytest.fail("the command goes on")

    monkeypatch.setattr("pkgutil.resolve_name", lambda _: work)
    assert call(monkeypatch, name) == 128 + number
    assert capsys.readouterr().err == f"moe {name}: stopped by {number.name}\n"
    assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends it at once


@pytest.mark.usefixtures("handlers")
def test_a_command_in_the_background_keeps_ignoring_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert ended(lambda: signal.raise_signal(signal.SIGINT), "moe plan") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train router.k=99", "moe train: router.k=99: must be between 1 and model.num_experts=8\n"),
        ("analyze nowhere", "moe analyze: no folder nowhere\n"),
        ("bench dispach", "moe bench: unknown question 'dispach'; nearest: dispatch\n"),
        ("bench dispatch --experts 48,x", "moe bench: --experts: x: must be a whole number > 0\n"),
        ("bench dispatch --capacity nan", "moe bench: --capacity: nan: must be a finite number > 0\n"),
        ("bench dispatch --k 1,1", "moe bench: --k: 1,1: 1 is given twice\n"),
        ("bench dispatch --expert 4", "moe bench: unknown option '--expert'; nearest: --experts\n"),
        (
            "bench dispatch --k 1 3",
            "moe bench: 3: belongs to no option; several values of an option are written as A,B,C\n",
        ),
        ("bench --k 1", "moe bench: --k: name the question first: moe bench QUESTION --k 1\n"),
        ("bench layer --dtype fp16", "moe bench: --dtype: unknown value 'fp16'; nearest: bf16\n"),
        (
            "bench dispatch --experts 4,8 --k 1,9",
            "moe bench: --k=9: must be at most 4, the smallest of --experts\n",
        ),
        ("bench step steps=0", "moe bench: steps=0: must be left out, because the benchmark sets it\n"),
        ("bench step noise=-1", "moe bench: noise=-1.0: must be a finite number >= 0\n"),
        ("bench profile noise=-1", "moe bench: noise=-1.0: must be a finite number >= 0\n"),
        ("bench sweep noise=-1", "moe bench: noise=-1.0: must be a finite number >= 0\n"),
        ("bench step --rounds 0", "moe bench: --rounds: 0: must be a whole number > 0\n"),
        ("bench analyze --json no/x.json", "moe bench: --json: no/x.json: must be a file in a folder that exists\n"),
    ],
)
def test_errors_begin_with_the_command_that_the_user_typed(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words.split()) == 2
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize("words", ["--help", "dispach", "--k 1"])
def test_the_help_of_the_benchmarks_and_a_wrong_question_are_answered_without_pytorch(words: str) -> None:
    code = """
import sys
from moe.bench.__main__ import main
try:
    main()
finally:
    print("torch" in sys.modules, "pandas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False False"
    assert ("training step, alone and in" in " ".join(done.stdout.split())) == (words == "--help")


def test_the_help_of_each_question_of_the_benchmarks_imports_nothing_that_takes_seconds() -> None:
    """All in one process, so that it starts once."""
    code = """
import sys
from moe.bench.__main__ import QUESTIONS, main
for name in QUESTIONS:
    sys.argv = ["bench", name, "-h"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    loaded = [heavy for heavy in ("torch", "transformers", "numpy", "pandas", "scipy", "hydra") if heavy in sys.modules]
    print("loaded", name, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("loaded")] == [
        f"loaded {name} []" for name in QUESTIONS
    ]
    assert all(f" {name} [-h]" in done.stdout for name in QUESTIONS)


def test_a_wheel_holds_every_yaml_where_an_installed_package_looks_for_it(tmp_path: Path) -> None:
    [wheel] = WheelBuilder(str(CONF.parent)).build(directory=str(tmp_path), versions=["standard"])
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("moe/conf/")}
    assert inside == {f"moe/conf/{path.relative_to(CONF).as_posix()}" for path in CONF.rglob("*.yaml")}
