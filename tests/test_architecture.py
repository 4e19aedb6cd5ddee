"""Imports go one way, and docs/architecture.md draws them as they are.

`python tests/test_architecture.py` prints the picture of the rooms for docs/architecture.md.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a room may import rooms of lower floors only. A room is a package of moe/ or a file beside them.
FLOORS = [
    {"checks", "files"},
    {"distributed", "routing", "data"},
    {"config", "metrics", "routers"},
    {"model", "runs"},
    {"results", "training"},
    {"analysis", "launch"},
    {"dashboard", "specialization"},
    {"bench"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = {
    "analysis",
    "results",
    "config",
    "checks",
    "files",
}  # these answer at once: importing torch takes seconds


class Import(NamedTuple):
    """One import: the module that has it, the module that it names, and whether it runs when the module is imported."""

    importer: str
    imported: str
    at_once: bool


def modules() -> dict[str, Path]:
    """Return every module of moe/ and the two entry points, by dotted name."""
    found = {name: ROOT / f"{name}.py" for name in ("train", "analyze")}
    for path in sorted((ROOT / "moe").rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports() -> Iterator[Import]:
    """Yield every import of every module; type-checking imports count as well, as not at once."""
    known = modules()
    for module, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_once = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path}: imports are absolute"
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [part if part in known else node.module for part in parts]
            else:
                continue
            for name in dict.fromkeys(names):
                yield Import(module, name, id(node) in at_once)


IMPORTS = list(imports())


def room(module: str) -> str:
    """Return the package of moe/ or the top-level file that a module belongs to; a library's own name for others."""
    first, *below = module.split(".")
    return below[0] if first == "moe" and below else first


def arrows() -> dict[str, set[str]]:
    """Return for every room the other rooms that it imports."""
    ours = {room: set() for room in FLOOR} | {"train.py": set(), "analyze.py": set()}
    for one in IMPORTS:
        if one.imported.startswith("moe.") and room(one.importer) != room(one.imported):
            name = room(one.importer)
            ours[name if name in FLOOR else f"{name}.py"].add(room(one.imported))
    return ours


def reached(start: str) -> set[str]:
    """Return all that importing a module imports at once, through modules of ours, with the packages above them."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += [one.imported for one in IMPORTS if one.importer == module and one.at_once]
            todo += [module.rpartition(".")[0]] if module.startswith("moe.") else []
    return seen


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room(module) for module in modules() if module.startswith("moe.")}
    assert rooms == set(FLOOR)


def test_imports_go_down() -> None:
    up = {
        (one.importer, one.imported)
        for one in IMPORTS
        if one.importer.startswith("moe.") and one.imported.startswith("moe.")
        if room(one.importer) != room(one.imported) and FLOOR[room(one.importer)] <= FLOOR[room(one.imported)]
    }
    assert not up


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("data", {"model", "routers", "routing", "training"}),
        ("routing", set(FLOOR) - {"routing"}),
        ("analysis", {"torch", "training", "model", "launch"}),
        ("results", {"torch", "training", "model", "launch"}),
    ],
)
def test_what_a_room_never_imports(importer: str, forbidden: set[str]) -> None:
    """Not even inside a function."""
    found = {(one.importer, one.imported) for one in IMPORTS if room(one.importer) == importer}
    assert not {pair for pair in found if room(pair[1]) in forbidden}


def test_only_the_entry_points_import_hydra() -> None:
    users = {one.importer for one in IMPORTS if room(one.imported) == "hydra"}
    assert users
    assert all(user == "train" or room(user) == "launch" for user in users)


@pytest.mark.parametrize("module", [name for name in modules() if room(name) in WITHOUT_TORCH])
def test_reading_results_needs_no_torch(module: str) -> None:
    heavy = {name for name in reached(module) if name.split(".")[0] in ("torch", "transformers", "datasets")}
    assert not heavy


def picture() -> str:
    """Return the rooms as a Mermaid graph, with an arrow to each room that a room imports and reaches no other way."""
    direct = arrows()

    def below(name: str) -> set[str]:
        return {far for near in direct.get(name, ()) for far in {near} | below(near)}

    lines = ["```mermaid", "flowchart TD"]
    for name in ["train.py", "analyze.py", *(name for rooms in reversed(FLOORS) for name in sorted(rooms))]:
        lines.append(f'  {name.removesuffix(".py")}["{name}"]')
        others = {near: set().union(*(below(other) for other in direct[name] - {near})) for near in direct[name]}
        lines += [
            f"  {name.removesuffix('.py')} --> {near}" for near in sorted(direct[name]) if near not in others[near]
        ]
    return "\n".join([*lines, "```"])


def test_the_picture_of_the_rooms_is_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert picture() in page, "docs/architecture.md: paste what `python tests/test_architecture.py` prints"


def test_the_page_names_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [name if name in ("checks", "files", "dashboard") else f"{name}/" for name in FLOOR]
    assert not [name for name in rooms if f"`{name}" not in page]


if __name__ == "__main__":
    print(picture())
