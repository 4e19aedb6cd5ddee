"""Tests that imports go in one direction and that docs/architecture.md shows the imports of the code.

`python tests/test_architecture.py` prints the picture of the packages for docs/architecture.md.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from moe.config.classes import BASES

ROOT = Path(__file__).parents[1]

# The layers of the code, lowest first. A package may import packages of lower layers only. A single file in moe/ counts
# as a package here.
LAYERS = [
    {"checks", "files", "fused", "program"},
    {"distributed", "routing", "data", "options"},
    {"config", "metrics", "routers"},
    {"model", "runs"},
    {"adapters", "results", "training"},
    {"analysis", "launch"},
    {"dashboard", "foreign", "specialization", "testing"},
    {"api", "bench"},
    {"observe", "planning", "reference"},
    {"__main__"},
]
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
TORCH = {"torch", "transformers", "datasets", "accelerate"}  # libraries that are torch or import it
# Libraries that a plain command imports until it refuses or skips a run, and those that it imports to train one.
TO_CHECK = {"hydra", "omegaconf", "orjson", "safetensors", "yaml"}
TO_TRAIN = {*TORCH - {"datasets"}, *TO_CHECK, "filelock", "jaxtyping", "jinja2", "numpy", "tokenizers", "tqdm"}
# Packages that must start quickly. Importing torch takes seconds.
WITHOUT_TORCH = {"analysis", "results", "config", "checks", "files", "options", "program"}


class Import(NamedTuple):
    """One import statement.

    importer: the module that contains it. imported: the module that it names.
    at_once: whether the statement runs as soon as `importer` is imported.
    """

    importer: str
    imported: str
    at_once: bool


@cache
def modules() -> dict[str, Path]:
    """Return every module of moe/ and the two entry points, by dotted name."""
    found = {name: ROOT / f"{name}.py" for name in ("train", "analyze")}
    for path in sorted((ROOT / "moe").rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def tree_of(module: str) -> ast.Module:
    """Return the parsed source of a module. Only tests call it: each worker imports this file, and parsing is slow."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports() -> dict[str, list[Import]]:
    """Return every import of every module, including `importlib.import_module("...")` and imports for type checking."""
    return {module: [*imports_of(module, tree_of(module))] for module in modules()}


def all_imports() -> list[Import]:
    """Return the imports of all modules as one list."""
    return [each for found in imports().values() for each in found]


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    """Yield every import in the parsed source of a module, whatever name it gets there."""
    known, nodes = modules(), [*_nodes(tree)]
    froms = [node for node, _ in nodes if isinstance(node, ast.ImportFrom)]
    given = [alias for node in froms if node.module in ("importlib", "builtins") for alias in node.names]
    importers = {"__import__", *(alias.asname or alias.name for alias in given)}
    for node, at_once in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write an absolute import"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [part if part in known else str(node.module) for part in parts]
        elif isinstance(node, ast.Call) and _imports(node.func, importers):
            names = [str(ast.literal_eval(node.args[0]))]
        else:
            continue
        assert "moe" not in names, f"{module}:{node.lineno}: import the module that is used, not all of moe"
        for name in dict.fromkeys(names):
            yield Import(module, name, at_once)


def _nodes(tree: ast.Module) -> list[tuple[ast.AST, bool]]:
    """Return every node of a tree, and whether importing the module runs it."""
    nodes: list[tuple[ast.AST, bool]] = [(tree, True)]
    for node, at_once in nodes:  # which grows meanwhile
        at_once = at_once and not _runs_later(node)
        nodes += [(child, at_once) for child in ast.iter_child_nodes(node)]
    return nodes


def _imports(function: ast.expr, importers: set[str]) -> bool:
    """Return whether a function that is called is one that imports a module by its name."""
    if isinstance(function, ast.Attribute):
        return function.attr in ("import_module", "__import__")
    return isinstance(function, ast.Name) and function.id in importers


def _runs_later(node: ast.AST) -> bool:
    """Return whether importing a module leaves out the statements in this node: a function, or an import for types."""
    for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def package(module: str) -> str:
    """Return the package of moe/ or the single file that a module belongs to. For a library, return its name."""
    first, *below = module.split(".")
    return below[0] if first == "moe" and below else first


def arrows() -> dict[str, set[str]]:
    """For every package, return the other packages that it imports."""
    found = {name: set() for name in LAYER} | {"train.py": set(), "analyze.py": set()}
    for each in all_imports():
        public = each.importer == "moe"  # `import moe` only passes on names of moe.api
        if not public and each.imported.startswith("moe.") and package(each.importer) != package(each.imported):
            name = package(each.importer)
            found[name if name in LAYER else f"{name}.py"].add(package(each.imported))
    return found


@cache
def reached(start: str) -> frozenset[str]:
    """Return every module that is loaded when a module is imported, including its parent packages in moe/."""
    loaded: set[str] = set()
    to_visit = [start]
    while to_visit:
        module = to_visit.pop()
        if module not in loaded:
            loaded.add(module)
            to_visit += [each.imported for each in imports().get(module, []) if each.at_once]
            to_visit += [module.rpartition(".")[0]] if module.startswith("moe.") else []
    return frozenset(loaded)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.nn as other",
        "from torch import nn as other",
        "import importlib as other; other.import_module('torch')",
        "from importlib import import_module as other; other('torch')",
        "from builtins import __import__ as other; other('torch')",
        "def later(): __import__('torch')",
    ],
)
def test_an_import_is_found_under_any_name(source: str) -> None:
    assert "torch" in {package(each.imported) for each in imports_of("moe.analysis.claims", ast.parse(source))}


def test_every_package_belongs_to_a_layer() -> None:
    packages = {package(module) for module in modules() if module.startswith("moe.")}
    assert packages == set(LAYER)


def test_imports_go_to_lower_layers_only() -> None:
    upward = {
        (each.importer, each.imported)
        for each in all_imports()
        if each.importer.startswith("moe.") and each.imported.startswith("moe.")
        if package(each.importer) != package(each.imported)
        and LAYER[package(each.importer)] <= LAYER[package(each.imported)]
    }
    assert not upward


def test_only_the_base_classes_of_configured_objects_are_named_in_text_from_below() -> None:
    """`moe.config.classes` imports them by name at run time. No other code does the like.

    The base class of data sources is not among them: it is in a layer below.
    """
    named, known = set(), modules()
    for module in known:
        for node in ast.walk(tree_of(module)):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text.startswith("moe.") and {text, text.rpartition(".")[0]} & known.keys():
                ours, theirs = package(module), package(text)
                if module != "moe" and ours != theirs and LAYER.get(ours, -1) <= LAYER.get(theirs, -2):
                    named.add((module, text))
    assert named == {("moe.config.classes", base) for base in BASES.values() if package(base) != "data"}


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("data", {"model", "routers", "routing", "training"}),
        ("routing", set(LAYER) - {"routing", "fused"}),
        ("analysis", {*TORCH, "training", "model", "launch"}),
        ("results", {*TORCH, "training", "model", "launch"}),
    ],
)
def test_forbidden_packages_are_never_imported(importer: str, forbidden: set[str]) -> None:
    """Some packages never import some others, not even inside a function."""
    found = {(each.importer, each.imported) for each in all_imports() if package(each.importer) == importer}
    assert not {pair for pair in found if package(pair[1]) in forbidden}


def test_nothing_imports_the_entry_points() -> None:
    assert not [each for each in all_imports() if each.imported in ("train", "analyze")]


def test_only_launching_imports_hydra() -> None:
    """Besides it, only the classes of the configuration import a name of OmegaConf: the mark of a missing value."""
    users = {
        each.importer for each in all_imports() if package(each.imported) in ("hydra", "hydra_plugins", "omegaconf")
    }
    assert {user for user in users if package(user) != "config"} == {
        "moe.launch.cells",
        "moe.launch.claims",
        "moe.launch.command_line",
        "moe.launch.compose",
        "moe.launch.distinct",
        "moe.launch.explain",
        "moe.launch.flops",
        "moe.launch.grids",
        "moe.launch.groups",
        "moe.launch.help",
        "moe.launch.hydra_errors",
        "moe.launch.implied",
        "moe.launch.listing",
        "moe.launch.option_files",
        "moe.launch.overrides",
        "moe.launch.resolvers",
        "moe.launch.search",
        "moe.launch.slurm",
        "moe.launch.train",
        "moe.launch.tuning",
    }


def test_the_configuration_takes_one_name_from_omegaconf() -> None:
    for module in modules():
        if package(module) == "config":
            for node in ast.walk(tree_of(module)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("omegaconf"):
                    assert [alias.name for alias in node.names] == ["MISSING"], module
                if isinstance(node, ast.Import):
                    assert not [alias for alias in node.names if alias.name.startswith("omegaconf")], module


@pytest.mark.parametrize("module", [name for name in modules() if package(name) in WITHOUT_TORCH])
def test_reading_results_needs_no_torch(module: str) -> None:
    """Importing the module loads no torch. For results and reports this also holds for imports inside functions."""
    loaded = reached(module)
    if package(module) in ("analysis", "results"):
        loaded |= set().union(*(reached(each.imported) for each in imports()[module]))
    assert not {name for name in loaded if name.split(".")[0] in TORCH}


@pytest.mark.parametrize(
    ("modules", "libraries"),
    [
        (["moe.launch.train"], TO_CHECK),
        (["moe.launch.train", "moe.launch.run", "moe.training.loop", "moe.runs.mirrors", "moe.routers.topk"], TO_TRAIN),
    ],
    ids=["checking a command", "training"],
)
def test_a_plain_command_imports_only_these_libraries(modules: list[str], libraries: set[str]) -> None:
    """What only some commands need, such as wandb, tensorboard or peft, is imported where it is used."""
    loaded = {name.partition(".")[0] for name in set[str]().union(*map(reached, modules))}
    assert loaded - {"moe", *sys.stdlib_module_names} == libraries


def picture() -> str:
    """Return the packages as a Mermaid graph with an arrow for each import between packages.

    An arrow is left out if a longer path of arrows already connects the two packages.
    """
    direct = arrows()

    def below(name: str) -> set[str]:
        return {far for near in direct.get(name, ()) for far in {near} | below(near)}

    lines = ["```mermaid", "flowchart TD"]
    for name in ["train.py", "analyze.py", *(name for packages in reversed(LAYERS) for name in sorted(packages))]:
        lines.append(f'  {name.removesuffix(".py")}["{name}"]')
        others = {near: set().union(*(below(other) for other in direct[name] - {near})) for near in direct[name]}
        lines += [
            f"  {name.removesuffix('.py')} --> {near}" for near in sorted(direct[name]) if near not in others[near]
        ]
    return "\n".join([*lines, "```"])


def test_the_picture_shows_the_imports_of_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert picture() in page, "docs/architecture.md: paste what `python tests/test_architecture.py` prints"


def test_the_page_names_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = [f"{name}/" if (ROOT / "moe" / name).is_dir() else f"{name}.py" for name in LAYER]
    assert not [name for name in names if f"`{name}`" not in page]


if __name__ == "__main__":
    print(picture())
