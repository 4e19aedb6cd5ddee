"""Tests of what `import moe` offers, on one small trained run."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from docstrings import run_examples
from run_folders import change_record, write_metrics, write_record

import moe
import moe.api
from moe.checks import ConfigError
from moe.config.options import SEARCH_PATH
from moe.config.schema import Config
from moe.launch.command_line import read_cells
from moe.launch.run import run

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"
TEXT = "The quick brown fox"


@pytest.fixture(scope="module")
def trained(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> moe.Run:
    [cell] = read_cells([*small, "steps=2", "eval_every=2", f"out={tmp_path_factory.mktemp('api')}"]) or []
    run(cell)
    return moe.load_run(cell.folder)


def test_every_public_name_can_be_imported_and_others_are_refused() -> None:
    assert all(getattr(moe, name) is not None for name in moe.__all__)
    assert set(moe.__all__) <= set(dir(moe))
    with pytest.raises(AttributeError, match="module 'moe' has no attribute 'trian'"):
        moe.trian  # noqa: B018


def test_the_examples_in_docstrings_print_what_they_say(
    trained: moe.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They concern the run of `python train.py`; here it is a smaller one. docs/python.md shows `train`."""
    shutil.copytree(trained.folder, tmp_path / "outputs" / "default" / "base")
    change_record(tmp_path / "outputs" / "default" / "base", name="base")
    monkeypatch.chdir(tmp_path)
    shown = run_examples(moe.api)
    assert shown == ["load_run", "load_runs", "compare", "judge", "route", "show"]


def test_reading_runs_imports_no_torch() -> None:
    code = "import sys, moe; moe.load_runs; moe.compare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_knows_its_configuration_metrics_and_history(trained: moe.Run) -> None:
    assert trained.status == "finished"
    assert trained.config.steps == 2
    assert trained.metrics["val/loss"] == trained.history["val/loss"].iloc[-1]
    assert list(trained.history["step"]) == [0, 2]
    assert trained.data().tokenizer.vocab_size == trained.tokenizer().vocab_size


def test_a_run_is_shown_in_one_short_line(trained: moe.Run) -> None:
    assert repr(trained).startswith(
        f"<Run {trained.folder}: finished, val/loss={trained.metrics['val/loss']:.4g}, val/"
    )
    assert len(repr(trained)) < len(str(trained.folder)) + 200


def test_a_router_outside_of_this_project_needs_trust_and_its_changes_are_told(
    trained: moe.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal names the argument that loads the model. Code that changed since the training brings a warning."""
    folder, target = Path(shutil.copytree(trained.folder, tmp_path / "run")), {"_target_": "ownlab.mine.Mine"}
    (tmp_path / "conf/router").mkdir(parents=True)
    (tmp_path / "ownlab").mkdir()
    (tmp_path / "ownlab/mine.py").write_text("from moe.routers.topk import TopK\nclass Mine(TopK): ...\n")
    monkeypatch.setenv(SEARCH_PATH, str(tmp_path / "conf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    record, settings = (json.loads((folder / name).read_text()) for name in ("run.json", "model/config.json"))
    config = record["config"] | {"router": record["config"]["router"] | target}
    change_record(folder, config=config, plugins={"ownlab": {"sha256": "0" * 64, "commit": None}})
    (folder / "model/config.json").write_text(json.dumps(settings | {"router": settings["router"] | target}))
    run = moe.load_run(folder)
    with pytest.raises(
        ConfigError, match=r"^router._target_=ownlab.mine.Mine: .* you trust it: model\(trusted=True\); "
    ):
        run.model()
    with pytest.warns(UserWarning, match=f"^{folder}: the code of ownlab has changed since that run began$"):
        model = run.model(trusted=True)
    assert type(model.moe_layers[0].router.chain[0]).__name__ == "Mine"


def test_the_table_of_runs_takes_one_folder_or_several(trained: moe.Run) -> None:
    one = moe.load_runs(str(trained.folder))
    pd.testing.assert_frame_equal(one, moe.load_runs([trained.folder]))
    assert one["val/loss"].tolist() == [trained.metrics["val/loss"]]


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}: no run.json$"):
        moe.load_run(tmp_path)


def test_routes_are_those_of_the_model(trained: moe.Run) -> None:
    """Each token has its k experts per layer, with the weights and probabilities that the model computes."""
    model, tokenizer = trained.model(), trained.tokenizer()
    table = moe.route(model, tokenizer, TEXT)
    ids = tokenizer(TEXT)["input_ids"]
    k, layers = trained.config.router["k"], trained.config.model.layers
    assert len(table) == len(ids) * k * layers
    assert "".join(table[(table["layer"] == 0)].drop_duplicates("position")["token"]) == TEXT
    np.testing.assert_allclose(table.groupby(["position", "layer"])["weight"].sum(), 1, rtol=1e-5)
    with torch.no_grad():
        routing = model(torch.tensor([ids])).routing[1][0]
    rows = table[table["layer"] == 1]
    for position, expert, weight, probability in rows[["position", "expert", "weight", "probability"]].to_numpy():
        at = (routing.token == position) & (routing.expert == expert)
        assert routing.weight[at].item() == pytest.approx(weight)
        assert routing.probs[int(position), int(expert)].item() == pytest.approx(probability)


def test_a_page_shows_each_token_and_its_experts(trained: moe.Run, tmp_path: Path) -> None:
    page = moe.show(trained.model(), trained.tokenizer(), "fox & <hound>")
    assert "&lt;" in page
    assert "<hound>" not in page
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    assert page._repr_html_().startswith("<iframe srcdoc=")


def test_a_table_of_routes_takes_a_text_that_the_model_reads_at_once(trained: moe.Run) -> None:
    """A page shows a longer text too, which the model reads in parts."""
    model, tokenizer = trained.model(), trained.tokenizer()
    with pytest.raises(ConfigError, match=r"^text has \d+ tokens: must have at most \d+, the length of this model$"):
        moe.route(model, tokenizer, "word " * 500)
    assert '<h2 id="text2">your text, part 2</h2>' in moe.show(model, tokenizer, "word " * 500)
    for look in (moe.route, moe.show):
        with pytest.raises(ConfigError, match=r"^text=: must be text with at least one token$"):
            look(model, tokenizer, "")


def test_what_is_no_text_is_refused(trained: moe.Run) -> None:
    with pytest.raises(ConfigError, match=r"^text=.*: must be text without halves of surrogate pairs$"):
        moe.route(trained.model(), trained.tokenizer(), "\ud800")


def test_looking_into_a_model_leaves_its_mode_as_it_is(trained: moe.Run) -> None:
    model = trained.model().train()
    moe.route(model, trained.tokenizer(), TEXT)
    moe.show(model, trained.tokenizer(), TEXT)
    assert model.training
    with pytest.raises(ConfigError, match=r"^model=Run: must be a model of this project"):
        moe.route(trained, trained.tokenizer(), TEXT)


def test_a_run_without_a_saved_model_says_so_and_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bare = moe.Run(Path("base"), "failed", Config(save_model="none"), {}, pd.DataFrame())
    for read in (bare.model, bare.tokenizer):
        with pytest.raises(ConfigError, match=r"^base: this run has no saved model; it is failed, with save_"):
            read()


def test_settings_are_compared_by_name(tmp_path: Path) -> None:
    for noise, loss in ((0.0, 1.0), (0.1, 2.0)):
        for seed in (1, 2, 3):
            folder = tmp_path / f"{noise}-{seed}"
            folder.mkdir()
            write_record(folder, config={"seed": seed, "noise": noise}, experiment="e")
            write_metrics(folder, {"val/loss": loss + 0.01 * seed * (1 + noise)})
    runs = moe.load_runs(tmp_path)
    [row] = moe.compare(runs).to_dict("records")
    assert row["difference"] == pytest.approx(1 + 0.01 * 2 * 0.1)
    judged = moe.judge(runs)
    assert len(judged) == 0
    assert {"claim", "p Holm", "verdict", "reason"} <= {*judged}
    with pytest.raises(ConfigError, match=r"^the runs are of 2 experiments, 'e', 'f': compare those of one, runs\["):
        moe.compare(pd.concat([runs, runs.assign(experiment="f")]))
    with pytest.raises(ConfigError, match=r"^unknown metric 'val/los'; nearest: val/loss$"):
        moe.compare(runs, "val/los")
    with pytest.raises(ConfigError, match=r"^unknown factor 'nois'; nearest: noise$"):
        moe.compare(runs, factors=["nois"])
    for wrong in ("seed", "status"):
        with pytest.raises(ConfigError, match=r"^unknown metric"):
            moe.compare(runs, wrong)
    for wrong in ("folder", "val/loss", "seed"):
        with pytest.raises(ConfigError, match=r"^unknown factor"):
            moe.compare(runs, factors=[wrong])
    assert len(moe.compare(runs, factors="noise")) == 1


def test_training_returns_the_runs_and_trains_none_twice(trained: moe.Run, small: list[str]) -> None:
    """The run of the fixture is finished, so the command skips it, and its folder is read."""
    words = [*small, "steps=2", "eval_every=2", f"out={trained.folder.parents[1]}"]
    [again] = moe.train(*words)
    assert again.folder == trained.folder
    assert again.metrics == trained.metrics


def test_wrong_overrides_are_refused_before_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *arguments: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match="unknown key 'stepz'; nearest: steps"):
        moe.train("stepz=2")
    with pytest.raises(ConfigError, match=r"^overrides=--help: must be texts such as"):
        moe.train("--help")
    with pytest.raises(ConfigError, match=r"^paths=\[\]: must be a folder, or several$"):
        moe.load_runs([])


def test_spaces_around_an_override_do_not_count(trained: moe.Run, small: list[str]) -> None:
    words = [*small, "steps=2", "eval_every=2", f"out={trained.folder.parents[1]}"]
    [again] = moe.train(*(f" {word}\n" for word in words))
    assert again.folder == trained.folder


WRONG = """
import pandas as pd
import moe
from moe import testing

runs = pd.DataFrame({"experiment": "e", "status": "finished", "noise": [0, 0, 1, 1], "seed": [1, 2, 1, 2]})
runs = runs.assign(**{"val/loss": [1.0, 2.0, 3.0, 5.0]})
calls = {
    "load_runs": [((wrong,), {}) for wrong in (3, None, [FOLDER, 3])],
    "load_run": [((wrong,), {}) for wrong in (3, None, FOLDER + "/run.json")],
    "compare": [(("o",), {}), ((runs.drop(columns="status"),), {}), ((runs[:0],), {}), ((runs.assign(status="x"),), {}),
        ((runs,), {"factors": 3}), ((runs,), {"factors": "nois"}), ((runs,), {"references": ["noise"]})],
    "judge": [(("o",), {})],
}
for name, cases in calls.items():
    for positional, named in cases:
        try:
            getattr(moe, name)(*positional, **named)
        except ValueError as error:
            print(f"{name}: {error}")
assert len(moe.compare(runs, factors=["noise", "noise"])) == 1
try:
    testing.check_law(3, moe.Router)
except ValueError as error:
    print(error)
"""
REFUSED = """
load_runs: paths=3: must be a folder, or several
load_runs: paths=null: must be a folder, or several
load_runs: paths=['{folder}', 3]: must be a folder, or several
load_run: folder=3: must be a path, as text or Path
load_run: folder=null: must be a path, as text or Path
load_run: folder={folder}/run.json: must be the folder of a run, and not a file in it
compare: runs=o: must be a table of runs, such as load_runs('multirun')
compare: runs=a table with the columns experiment, noise, seed, val/loss: must be a table of runs, such as load_runs(
compare: the table has no runs: runs['experiment'].unique() of the whole table lists its experiments
compare: none of the 4 runs is finished: runs['experiment'].unique() of the whole table lists its experiments
compare: factors=3: must be the name of a factor, or several
compare: unknown factor 'nois'; nearest: noise
compare: references=['noise']: must be an object, such as {{'router': 'topk'}}
judge: runs=o: must be a table of runs, such as load_runs('multirun')
unknown law '3'
"""


def test_arguments_of_a_wrong_type_are_refused_in_one_line(trained: moe.Run) -> None:
    """This runs in a process of its own, because the tests themselves check the types of all arguments."""
    code = WRONG.replace("FOLDER", repr(str(trained.folder)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = REFUSED.format(folder=trained.folder).strip().splitlines()
    found = done.stdout.splitlines()
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_a_tokenizer_is_told_from_what_is_none(trained: moe.Run) -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer=NoneType: must be the tokenizer of the model, such as load_run"):
        moe.route(trained.model(), None, TEXT)  # type: ignore[arg-type]


@pytest.mark.pages
def test_the_notebook_runs_and_its_outputs_are_stored(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell of docs/tour.ipynb runs in turn. Only its runs are smaller and fewer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SEARCH_PATH, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    smaller = [*small, "data.seq_len=64", "steps=2", "eval_every=2", "seed=1,2"]
    replaced = ("steps=", "eval_every=", "seed=")
    small_train = partial(moe.train, *smaller)
    monkeypatch.setattr("moe.api.train", lambda *words: small_train(*(w for w in words if not w.startswith(replaced))))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    plt.close("all")
    del sys.modules["distance"]
    assert set(names["runs"]["router"]) == {"topk", "distance"}
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = {kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
