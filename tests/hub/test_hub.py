"""Tests of the configurations that read from the Hugging Face Hub, with the real clients and a stand-in server."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from train_processes import TRAIN, read_record

from moe.data.tokenizer import train_bpe

pytestmark = pytest.mark.hub

SMALL = """
    model.dim=32 model.heads=2 model.layers=1 model.ffn=32 model.num_experts=4 model.dense_ffn=64 data.max_val_blocks=8
    steps=2 batch_size=2 grad_accum=1 eval_every=2 save_every=1 logger.mode=disabled data.seq_len=64
""".split()


def sentence(rng: random.Random, words: int) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(words))


def write_datasets(root: Path, version: int, *, rows: int = 300, words: int = 150) -> None:
    """Write both data sets with the columns of the real ones; the texts depend on `version`."""
    rng = random.Random(version)
    corpus, talk = (root / "datasets/HuggingFaceTB" / name for name in ("smollm-corpus", "smoltalk"))
    for folder, inner in ((corpus, "cosmopedia-v2"), (talk, "data/all")):
        (folder / inner).mkdir(parents=True, exist_ok=True)
        name = Path(inner).name
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {name}\n  data_files:\n  - split: train\n    path: {inner}/*\n---\n"
        )
    for shard in range(2):
        texts = [
            {
                "prompt": sentence(rng, words),
                "text": sentence(rng, words),
                "format": rng.choice(["blogpost", "story"]),
                "audience": "general",
            }
            for _ in range(rows)
        ]
        table = pa.Table.from_pylist(texts)
        parquet.write_table(table, corpus / f"cosmopedia-v2/train-{shard}.parquet", row_group_size=rows // 2)
    talks = []
    for _ in range(100):
        turns = [{"content": sentence(rng, 3), "role": role} for role in ("user", "assistant")]
        talks.append({"messages": turns, "source": rng.choice(["rewrite", "magpie"])})
    parquet.write_table(pa.Table.from_pylist(talks), talk / "data/all/train-0.parquet")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the two tokenizers."""
    root, rng = tmp_path_factory.mktemp("models"), random.Random(0)
    for name in ("SmolLM-135M", "SmolLM2-135M-Instruct"):
        tokenizer = train_bpe([sentence(rng, 300) for _ in range(20)], 400)
        folder = root / "HuggingFaceTB" / name
        if "Instruct" in name:
            tokenizer.chat_template = (
                "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            )
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return root


class FakeHub:
    """A running stand-in hub with its folder."""

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(root / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def train(self, *words: str, out: str = "runs") -> subprocess.CompletedProcess[str]:
        """Run train.py in a new Python, because the libraries read the address of the hub when they are imported."""
        command = [sys.executable, str(TRAIN), *words, f"data.cache={self.root / 'cache'}", f"out={self.root / out}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=400, env=self.environment)

    def outage(self, kind: str) -> None:
        (self.root / "outage").write_text(kind)

    def requests(self) -> list[list[str]]:
        path = self.root / "requests"
        return [line.rsplit(" ", 2) for line in path.read_text().splitlines()] if path.exists() else []

    def runs(self) -> list[dict[str, Any]]:
        return [read_record(path.parent) for path in sorted((self.root / "runs").glob("*/*/run.json"))]


@pytest.fixture
def hub(tmp_path: Path, models: Path) -> Iterator[FakeHub]:
    write_datasets(tmp_path, 1)
    shutil.copytree(models, tmp_path / "models")
    command = [sys.executable, str(Path(__file__).with_name("server.py")), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield FakeHub(tmp_path, int(server.stdout.readline()))
        server.terminate()


def update(hub: FakeHub) -> None:
    """Publish new texts on the hub. The old commit stays available."""
    name = hub.runs()[0]["identity"]["data.source.revision"]
    shutil.copytree(hub.root / "datasets/HuggingFaceTB/smollm-corpus", hub.root / "old" / name)
    write_datasets(hub.root, 2)


@pytest.mark.parametrize(
    "words",
    [
        ["data=cosmopedia", "data.source.max_documents=60"],
        ["data=smoltalk", "data.source.max_samples=100"],
        ["experiment=noise_lb_seed", "variant=noise_study", "noise=0.0", "lb=0.0", "seed=42", "precision=fp32"],
    ],
)
def test_the_configurations_of_the_hub_train_and_record_what_they_read(hub: FakeHub, words: list[str]) -> None:
    """Each run ends well, records the commits of its data set and tokenizer, and prints no line for each request."""
    done = hub.train(*words, *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = hub.runs()
    assert record["status"] == "finished"
    for key in ("data.source.revision", "data.tokenizer_revision"):
        assert len(record["identity"][key]) == 40
    assert record["facts"]["data"]["source"]["revision"] == record["identity"]["data.source.revision"]
    assert record["facts"]["data"]["tokenizer"]["revision"] == record["identity"]["data.tokenizer_revision"]
    assert "HTTP Request" not in done.stdout + done.stderr


@pytest.mark.long
def test_cells_of_a_sweep_and_resumed_runs_read_the_recorded_commit(hub: FakeHub) -> None:
    """After an update on the hub, the next cell of the sweep reads the text that the first cells read.

    A single run in another folder reads the new text.
    """
    words = ["data=cosmopedia", "data.source.max_documents=60", *SMALL]
    done = hub.train("-m", "seed=1,2", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    update(hub)
    assert hub.train("-m", "seed=1,2,3", *words).returncode == 0
    texts = {run["facts"]["data"]["corpus_sha256"] for run in hub.runs()}
    assert (len(hub.runs()), len(texts)) == (3, 1)
    assert hub.train("seed=4", *words, out="other").returncode == 0
    [other] = (hub.root / "other").glob("*/*/run.json")
    assert read_record(other.parent)["facts"]["data"]["corpus_sha256"] not in texts
    hub.outage("503")  # a finished sweep needs no hub
    assert hub.train("-m", "seed=1,2,3", *words).returncode == 0


@pytest.mark.long
def test_few_documents_of_a_large_data_set_are_few_bytes(hub: FakeHub) -> None:
    """Columns that are not read are not fetched: two fifths of the files at most, where all columns need half."""
    write_datasets(hub.root, 1, rows=3000, words=1000)
    size = sum(path.stat().st_size for path in (hub.root / "datasets").rglob("train-*.parquet"))
    assert hub.train("data=cosmopedia", "data.source.max_documents=60", *SMALL).returncode == 0
    fetched = sum(int(count) for path, _, count in hub.requests() if "parquet" in path)
    assert fetched < 0.4 * size  # one group of rows of each column that is read; 18.7 of 53.3 MB were seen


@pytest.mark.parametrize("outage", ["503", "429", "404", "403"])
def test_a_hub_that_does_not_answer_is_one_line(hub: FakeHub, outage: str) -> None:
    """The command is refused before any work, with the name and the reason."""
    hub.outage(outage)
    done = hub.train("data=cosmopedia", *SMALL)
    assert done.returncode == 2
    assert done.stdout in ("", "checking the settings and loading PyTorch\n")
    [line] = done.stderr.splitlines()
    assert line.startswith("train.py: data.source.path=HuggingFaceTB/smollm-corpus: ")
    assert not (hub.root / "runs").exists()


def test_a_connection_that_breaks_once_is_repaired_with_at_most_one_line(hub: FakeHub) -> None:
    hub.outage("cut")
    done = hub.train("data=cosmopedia", "data.source.max_documents=60", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("trying again") <= 1
    assert "Retrying in" not in done.stdout + done.stderr


def test_a_saved_model_is_published_as_the_page_says_and_loaded_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """Weights, tokenizer, the model card of the run and the Python file arrive, and another process loads them."""
    assert hub.train("data=cosmopedia", "data.source.max_documents=60", *SMALL).returncode == 0
    [run] = (hub.root / "runs").glob("*/*")
    (tmp_path / "outputs/default").mkdir(parents=True)
    run.rename(tmp_path / "outputs/default/base")
    page = (TRAIN.parent / "docs" / "models.md").read_text(encoding="utf-8")
    load, publish = (re.findall(rf"^```python{kind}\n(.*?)^```", page, re.M | re.S)[0] for kind in ("", " hub"))
    again = load.replace("outputs/default/base/model", "ME/NAME") + "print(model.device, len(tokenizer))"
    for script in (load + publish, again):
        environment = hub.environment | {"HF_TOKEN": "hf_x"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    published, local = hub.root / "models/ME/NAME", tmp_path / "outputs/default/base/model"
    assert {path.name for path in published.iterdir()} == {path.name for path in local.iterdir()}
    for name in ("README.md", "modeling_moe_routing.py", "model.safetensors", "tokenizer.json"):
        assert (published / name).read_bytes() == (local / name).read_bytes(), name
    assert "datasets:\n- HuggingFaceTB/smollm-corpus" in (published / "README.md").read_text()
