"""Tests that the generated pages in docs/ are those of the code, and of the site that is built from docs/."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pytest
from run_folders import write_metrics, write_record

import moe
from moe.analysis.simultaneous import to_reference
from moe.bench.routers import COLUMN
from moe.checks import plain
from moe.config.meanings import all_keys
from moe.config.options import GROUPS, options
from moe.reference import PAGES, router_size, router_speeds, router_verdicts
from moe.results.shipped import ship
from moe.results.table import load_runs
from moe.routers.base import Router
from moe.routers.chain_of_experts import ChainOfExperts
from moe.routers.hash import Hash
from moe.routers.mlp import MLPRouter
from moe.routers.random import Random
from moe.routers.sigmoid_bias import SigmoidBias
from moe.routers.topk import TopK

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_says_now(name: str) -> None:
    """`python -m moe.reference --write` makes it so."""
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name]()


def test_no_two_keys_of_a_router_share_a_text_and_no_table_is_empty() -> None:
    page = (DOCS / "routers.md").read_text(encoding="utf-8")
    for section in page.split("\n## ")[2:]:
        meanings = re.findall(r"^\| `router\..* \| (.*) \|$", section, re.MULTILINE)
        assert len(set(meanings)) == len(meanings), section.partition("\n")[0]
        assert bool(meanings) != ("It has no keys." in section)


def test_the_reference_has_every_public_name_every_key_and_every_option() -> None:
    api, configuration, routers = ((DOCS / name).read_text(encoding="utf-8") for name in PAGES)
    for name in moe.__all__:
        assert f"\n## moe.{name}\n" in api
    for key in all_keys():
        assert f"\n| `{key}` | " in configuration
    for group in GROUPS:
        for option in options(group):
            row = f"\n| [{option}](#{option}) | " if group == "router" else f"\n| `{option}` | "
            assert row in (routers if group == "router" else configuration)


class Page(HTMLParser):
    """The links of a built page, what it loads, and the names to which a link can lead."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if "href" in given:
            (self.loads if tag == "link" else self.links).append(given["href"])
        if "src" in given:
            self.loads.append(given["src"])


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as README says."""
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(source), str(site)]
    return subprocess.run(command, text=True, capture_output=True, check=False)


def broken(site: Path) -> Iterator[str]:
    """Yield every link of a page of the site that leads nowhere."""
    pages = {path: Page(path) for path in site.glob("*.html")}
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            place = path.parent / unquote(parts.path) if parts.path else path
            names = pages[place].names if place in pages else ()
            if not parts.scheme and (not place.exists() or (parts.fragment and unquote(parts.fragment) not in names)):
                yield f"{path.name}: {link}"


@pytest.mark.pages
def test_the_site_has_every_page_and_each_of_its_links_leads_somewhere(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    written = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for pattern in ("*.md", "*.ipynb") for path in DOCS.glob(pattern)} <= written
    assert list(broken(tmp_path / "site")) == []
    for path in (tmp_path / "site").glob("*.html"):
        assert [each for each in Page(path).loads if re.match(r"(https?:)?//", each)] == [], (
            "a page loads from a network"
        )
    for path in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path
    assert "data:image/png" in (tmp_path / "site" / "tour.html").read_text(encoding="utf-8")
    for page in ("architecture", "routing"):
        drawn = (tmp_path / "site" / f"{page}.html").read_text(encoding="utf-8").count("data:image/svg+xml")
        assert drawn == (DOCS / f"{page}.md").read_text(encoding="utf-8").count("```mermaid")


@pytest.mark.pages
@pytest.mark.parametrize("link", ["nowhere.md", "#nowhere", "nowhere.csv"])
def test_the_site_is_not_built_with_a_broken_link(tmp_path: Path, link: str) -> None:
    source = tmp_path / "docs"
    (source / "example-report").mkdir(parents=True)
    for name in ("conf.py", "site.css"):
        shutil.copy(DOCS / name, source / name)
    (source / "index.md").write_text(f"# Title\n\nA [link]({link}).\n", encoding="utf-8")
    done = build(source, tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere" in done.stderr


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (TopK(10, 4, k=3), ["3", "40", "0", "80"]),
        (MLPRouter(10, 4, hidden=7), ["2", f"{7 * 14}", "0", f"{2 * 7 * 14}"]),
        (SigmoidBias(10, 4), ["2", "40", "4", "80"]),  # a bias for each expert
        (Random(10, 4, k=1), ["1", "0", "40", "80"]),
        (Hash(10, 4, vocab_size=50), ["2", "0", "100", "0"]),  # looking up costs nothing
        (ChainOfExperts(10, 4, iterations=3, k=1), ["1 in each of 3 iterations", "120", "0", "240"]),
    ],
)
def test_the_size_of_a_router_is_that_of_its_matrices(router: Router, expected: list[str]) -> None:
    assert router_size(router) == expected


def test_the_page_of_routers_has_the_speeds_that_the_benchmark_wrote(tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    assert router_speeds(file) == ("", {})
    rows = [{"router": "topk", COLUMN: 1.004}, {"router": "hash", COLUMN: 1.25}]
    machine = {"processor": "A CPU", "threads": 2}
    file.write_text(json.dumps({"machine": machine, "tables": {"by router: model=tiny; median of 7 pairs": rows}}))
    text, speeds = router_speeds(file)
    assert speeds == {"topk": "1.00", "hash": "1.25"}
    assert "(model=tiny; median of 7 pairs;\nA CPU with threads=2)." in text


def test_the_page_of_routers_has_the_verdicts_of_the_shipped_league(tmp_path: Path) -> None:
    """The intervals hold together. Runs that tuned do not count, and a router that is not causal has none."""
    assert router_verdicts(tmp_path / "none") == ("", {})
    losses = {"topk": 3.0, "oracle": 2.8, "hash": 3.2, "cosine": 3.001, "soft_moe": 2.0}
    rng = np.random.default_rng(1)
    for router, loss in losses.items():
        for seed in (1, 2, 3, 4):
            folder = tmp_path / "sweep" / f"{router}{seed}"
            folder.mkdir(parents=True)
            write_record(folder, choices={"router": router}, config={"seed": seed}, causal=router != "soft_moe")
            write_metrics(folder, {"val/loss": 9.0, "test/loss": loss + seed + rng.normal(0, 0.01)})
            (folder / "events.jsonl").touch()
    runs = load_runs([tmp_path / "sweep"])
    trials = runs.assign(search="minimize val/loss", seed=runs["seed"] + 10, **{"test/loss": 1.0})
    ship(runs, tmp_path / "shipped")
    text, verdicts = router_verdicts(tmp_path / "shipped")
    assert {name: cell.rpartition(", ")[2] for name, cell in verdicts.items()} == {
        "topk": "reference",
        "oracle": "better",
        "hash": "worse",
        "cosine": "undecided",
    }
    gap = to_reference(runs[runs["causal"]].pivot_table("test/loss", "seed", "router"), "topk").loc["hash"]
    assert verdicts["hash"] == plain(f"{gap['difference']:+.3f} [{gap['low']:.3f}, {gap['high']:.3f}], worse")
    assert "over\n4 seeds of" in text
    assert "test/loss" in text
    ship(pd.concat([runs, trials], ignore_index=True), tmp_path / "tuned")
    assert router_verdicts(tmp_path / "tuned")[1] == verdicts
    ship(runs[runs["router"].isin(["topk", "hash"])], tmp_path / "two")
    with pytest.raises(ValueError, match="three routers"):
        router_verdicts(tmp_path / "two")
