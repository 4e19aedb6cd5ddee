"""Print the reference pages that follow from the code; `python -m moe.reference --write` updates them in docs/.

They are api.md, configuration.md and routers.md. docs/metrics.md has a command of its own, `python -m moe.metrics`.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from moe.analysis.league import METRICS, PLAIN, league_of, verdict
from moe.analysis.sentences import with_interval
from moe.config import meanings
from moe.config.classes import build, locate
from moe.config.options import options, router_spec
from moe.files import read_text, write_text
from moe.launch.help import option_comments, option_values, usual_options, usual_values, value_text
from moe.options import OneLineParser
from moe.results.conditions import present, with_causality, without_causality
from moe.results.shipped import RUNS, STUDIES, read_shipped
from moe.routers.base import Router

GENERATED = "Generated from the code by `python -m moe.reference --write`; a test compares."
API = f"""\
# The Python interface

{GENERATED}

[python.md](python.md) introduces these functions and classes, and [tour.ipynb](tour.ipynb) uses them.
"""
CONFIGURATION = f"""\
# The configuration

{GENERATED}

Set a key as `key=value`, a key in a group as `group.key=value`, and a group by the name of one of its options:
`python train.py noise=0.1 data.seq_len=256 router=temperature`. `python train.py --help` prints the keys and the
options, `python train.py --help noise` explains one key, and `python train.py --help model=base` explains one option.
[hydra.md](hydra.md) explains sweeps.

## Keys

Keys of a group have the values of its usual option. [routers.md](routers.md) has the keys of routers.

"""
ROUTERS = f"""\
# Routers

{GENERATED}

Choose a router with `router=NAME`, and set its keys with `router.KEY=VALUE`. If a router is causal, the experts of a
token do not depend on later tokens. Numbers such as [2101.03961](https://arxiv.org/abs/2101.03961) are papers on arXiv.
[extending.md](extending.md) shows how to add a router.

"""
SIZES = """
## Sizes

For one layer with `model.dim={dim}` and `model.num_experts={experts}`, and the values of the keys below. *Parameters*
learn by gradient. *State* is what a saved model has beside them: numbers that are fixed, or that the router learns in
another way. FLOPs are those of the forward pass, without experts: 2 for each number in a matrix that multiplies
tokens, and those for mixing tokens.{speed}{league}

"""
SPEED = """
*Speed* is the number of tokens per second in training, as a multiple of that with `topk` ({run};
{machine}). In each pair a step with the router follows a step with `topk`, so that other work on
the machine slows both. `python -m moe.bench routers --json docs/{file}` measured it; – is not measured yet."""
LEAGUE = """
*League* is the difference of `{metric}` from that with `{reference}` in nats per token, with its 95 % interval, over
{seeds} seeds of [a study at equal work](studies/router_league.md): better or worse if the interval leaves out 0. All
intervals hold together. A router that sees later tokens has none, because its loss is not comparable.
Neither has a router that the study leaves out or does not have yet."""
TWO_MODELS = """
*Speed* and *league* are about different models, so one column does not explain the other: for the speed, the experts of
all routers have the same width; in the league, a token costs about the same FLOPs with nearly all of them, so the
widths differ. The league is one of small models with default settings; [its page](studies/router_league.md) says
more."""
DOCS = Path(__file__).parents[1] / "docs"
MEASURED = DOCS / "router_speed.json"  # what `moe.bench routers` wrote; without it, the table has no speeds
STUDY = STUDIES / "router_league"  # its shipped tables; without them, the table has no league
EMPTY = "''"  # a text without a letter, as it is written in a yaml file


def api_page() -> str:
    """Return docs/api.md: the signature and the docstring of each public name."""
    names = [*(f"moe:{name}" for name in resolve_name("moe:__all__")), "moe.testing:check_router"]
    return API + "".join(part for name in names for part in _described(name))


def configuration_page() -> str:
    """Return docs/configuration.md: every key, and every option with the settings of its class."""
    usual = usual_options()
    text = CONFIGURATION + _keys(usual_values(), {})
    for group in ("schedule", "adapter", "model", "data", "optimizer", "logger", "variant", "experiment"):
        text += f"\n## {group}\n\n"
        text += f"Usually `{group}={usual[group]}`.\n\n" if group in usual else ""
        rows = [[f"`{name}`", _prose(purpose)] for name, purpose in options(group).items()]
        text += _table(["option", "what it is for"], rows)
        for name in options(group) if group in ("schedule", "adapter", "data") else ():
            values, targets = option_values(group, name)
            own = {key: value for key, value in values.items() if key.rpartition(".")[0] in targets}
            text += f"\n### {group}={name}\n\n{_keys(own, targets)}" if own else ""
    return text


def routers_page() -> str:
    """Return docs/routers.md: what each router does, whether it is causal, its size, its papers and its keys."""
    rows, sizes, sections = [], [], ""
    usual = usual_values()
    dim, experts = usual["model.dim"], usual["model.num_experts"]
    speed, speeds = router_speeds(MEASURED)
    league, verdicts = router_verdicts(STUDY)
    for name in options("router"):
        comments = option_comments("router", name)
        purpose, causal = re.split(", (?=(?:not )?causal)", _papers(comments[0]), maxsplit=1)
        values, targets = option_values("router", name)
        rows.append([f"[{name}](#{name})", purpose, causal])
        router = build(router_spec(name), "router", dim, experts)
        measured = [found.get(name, "–") for found in (speeds, verdicts) if found]
        sizes.append([f"[{name}](#{name})", *router_size(router), *measured])
        equations = "".join(f"`{line}`\n\n" for line in comments[1:])
        sections += f"\n## {name}\n\n{purpose}. This router is {causal}.\n\n{equations}"
        sections += f"{_papers(_without_settings(locate(targets['router'], 'router', trusted=True)))}\n\n"
        sections += f"Class: `{targets['router']}`.\n\n{_keys(values, targets)}"
    columns = [column for column, found in (("speed", speeds), ("league", verdicts)) if found]
    head = ["router", "experts per token", "parameters", "state", "FLOPs per token", *columns]
    table = _table(["router", "what it does", "causal"], rows)
    return (
        ROUTERS
        + table
        + SIZES.format(dim=dim, experts=experts, speed=speed, league=league + (TWO_MODELS if len(columns) > 1 else ""))
        + _table(head, sizes)
        + sections
    )


PAGES = {"api.md": api_page, "configuration.md": configuration_page, "routers.md": routers_page}


def router_speeds(file: Path) -> tuple[str, dict[str, str]]:
    """Return what the page says about speed, and the speed of each router that `file` has. No file: nothing."""
    if not file.is_file():
        return "", {}
    content = json.loads(read_text(file))
    [(title, rows)] = content["tables"].items()
    machine = f"{content['machine']['processor']} with threads={content['machine']['threads']}"
    speeds = {name: f"{speed:.2f}" for name, speed in (row.values() for row in rows)}
    return SPEED.format(run=title.partition(": ")[2], machine=machine, file=file.name), speeds


def router_verdicts(folder: Path) -> tuple[str, dict[str, str]]:
    """Return what the page says about the league, and the verdict on each router in the shipped tables of `folder`.

    Runs that chose the values of tuned keys do not count. Nothing if there is no such folder. Raises ValueError if its
    runs make no league.
    """
    if not (folder / RUNS).is_file():
        return "", {}
    runs = with_causality(read_shipped(folder)[0])
    runs = runs[(runs["status"] == "finished") & runs["search"].isna()]
    [metric, *_] = present(runs, METRICS)
    found = league_of(runs, metric, PLAIN)
    if found is None:
        raise ValueError(f"{folder / RUNS}: must have three routers that can be compared, {PLAIN} among them")
    ranked = found.table.dropna(subset="rank").drop(index=PLAIN)
    verdicts = {
        str(without_causality(each.Index)): with_interval(each.difference, each.low, each.high, least=3)
        + f", {verdict(each.low, each.high)}"
        for each in ranked.itertuples()
    }
    return LEAGUE.format(metric=metric, reference=PLAIN, seeds=len(found.values)), {PLAIN: "reference"} | verdicts


def router_size(router: Router) -> list[str]:
    """Return the cells of a router in the table of sizes, behind its name."""
    number = "varies" if router.fixed_k is None else str(router.fixed_k)
    if len(router.chain) > 1:
        number += f" in each of {len(router.chain)} iterations"
    parameters = sum(p.numel() for p in router.parameters())
    state = sum(tensor.numel() for tensor in router.state_dict().values()) - parameters
    matrices = [tensor for tensor in router.state_dict().values() if tensor.ndim > 1 and tensor.is_floating_point()]
    flops = 2 * sum(matrix.numel() for matrix in matrices) + router.mixing_flops()
    return [number, f"{parameters:,}", f"{state:,}", f"{flops:,}"]


def _described(name: str) -> Iterator[str]:
    """Yield the sections about a public function or class, such as "moe:train", from the file that defines it."""
    thing = resolve_name(name)
    source = inspect.getsource(resolve_name(thing.__module__))
    [node] = [each for each in ast.parse(source).body if getattr(each, "name", "") == thing.__name__]
    yield _section(node, f"## {name.replace(':', '.')}", source.splitlines())
    for each in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_") and ast.get_docstring(each):
            yield _section(each, f"### {thing.__name__}.{each.name}", source.splitlines())


def _section(node: Any, heading: str, lines: list[str]) -> str:
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    head = textwrap.dedent("\n".join(lines[first - 1 : node.body[0].lineno - 1]))
    source = "\n".join(lines)
    fields = [f"    {ast.get_source_segment(source, each)}" for each in node.body if isinstance(each, ast.AnnAssign)]
    signature = "\n".join([head, *fields]).rstrip(":")
    return f"\n{heading}\n\n```python\n{signature}\n```\n\n{_prose(ast.get_docstring(node) or '')}\n"


def _prose(docstring: str) -> str:
    """Return a docstring as Markdown: its examples as blocks of code, and no sign outside of code has a meaning."""
    parts = []
    for paragraph in docstring.split("\n\n"):
        if paragraph.startswith(">>>"):
            parts.append(f"```pycon\n{paragraph}\n```")
        else:
            pieces = re.split("(`[^`]*`)", paragraph)
            parts.append("".join(re.sub(r"[*<\[]", r"\\\g<0>", p) if p[:1] != "`" else p for p in pieces))
    return "\n\n".join(parts)


def _papers(text: str) -> str:
    """Turn the numbers of papers on arXiv into links."""
    return re.sub(r"\b\d{4}\.\d{5}\b", r"[\g<0>](https://arxiv.org/abs/\g<0>)", text)


def _without_settings(cls: type) -> str:
    """Return the docstring of a class without the entries "name: meaning" of its settings."""
    kept = ""
    depth: int | None = None
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        indent = len(line) - len(line.lstrip())
        entry = re.match(r"\s*(\w+(?:, \w+)*): ", line)
        if entry and {*entry[1].split(", ")} <= meanings.settings(cls).keys():
            kept = re.sub(":$", ".", kept.rstrip()) + "\n\n"
            depth = indent
        elif depth is None or (line.strip() and indent <= depth):
            kept += f"{line}\n"
            depth = None
    return _prose(kept.strip())


def _keys(values: dict[str, Any], targets: dict[str, str]) -> str:
    """Return a table of keys, their values and what they mean."""
    rows = [
        [f"`{key}`", f"`{value_text(value) or EMPTY}`", _papers(_prose(meanings.meaning(key, targets) or ""))]
        for key, value in values.items()
    ]
    return _table(["key", "value", "meaning"], rows) if rows else "It has no keys.\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    parser = OneLineParser(prog="python -m moe.reference", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update the pages in docs/ instead")
    write = parser.parse_args().write
    for name, page in PAGES.items():
        if write:
            write_text(DOCS / name, page())
        else:
            print(page())
