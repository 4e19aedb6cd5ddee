"""The text of `--help`: keys with their meanings, options with their purposes; `--help router=topk`; and `--list`."""

import textwrap
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from moe.checks import locate, one_of
from moe.config import meanings
from moe.config.options import CLASSES, CONF, GROUPS, options, sources
from moe.config.schema import Config, flatten
from moe.launch.cells import Start, combinations
from moe.launch.compose import compose_config, composing
from moe.launch.option_files import read_option
from moe.launch.overrides import DEFAULTS, parse_override

WIDTH = 110
INTRODUCTION = """\
Train one Mixture-of-Experts language model, or with -m one for each combination of several values.

  python train.py router=temperature router.temp=1.5
  python train.py -m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44
  python train.py experiment=noise_lb_seed
  python train.py --help router=topk   explain an option and its keys
  python train.py --list               how many runs each experiment has, and how much they compute
  python train.py --cfg job            print every key and its value

Set a key as key=value, a key in a group as group.key=value (router.temp=1.5), a group by the name of
one of its options (router=temperature).

Keys, with their defaults, or the value in the group's usual option:"""


def help_text() -> str:
    """Return the text about all keys and all options."""
    usual = _usual_options()
    values = _defaults()
    for group, option in usual.items():
        if group in ("model", "data", "optimizer", "logger"):
            content = OmegaConf.to_container(read_option(sources(group)[option]))
            values |= flatten(content, f"{group}.")
    lines = [INTRODUCTION, *_explained({key: values.get(key) for key in meanings.all_keys()}, {})]
    for group in GROUPS:
        entries = options(group)
        width = max(map(len, entries), default=0)
        usually = f"  (usually {usual[group]})" if usual.get(group) else ""
        lines += ["", f"{group}={usually}"]
        lines += [f"  {name:<{width}}  {purpose}" for name, purpose in entries.items()]
    return "\n".join(lines)


def option_text(group: str, option: str) -> str:
    """Return the text about one option: its comments, its keys with their values, and the class that it names.

    Raises ConfigError for an unknown option. The code of its class is imported.
    """
    found = sources(group)
    one_of(group, option, found)
    content: Any = OmegaConf.to_container(read_option(found[option]))
    comments = []
    for line in found[option].read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("# "))
    comments = [line for line in comments if not line.startswith("@package")]
    lines = [f"{group}={option}: {comments[0]}" if comments else f"{group}={option}", *comments[1:], ""]
    whole = group in ("experiment", "variant")  # such an option sets keys of the whole configuration
    grid = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    for part in content.get("defaults", []):
        lines += [f"  {name.removeprefix('override ').lstrip('/')}={value}" for name, value in part.items()]
    rest = {key: value for key, value in content.items() if key not in ("defaults", "hydra", "claims")}
    values = flatten(rest, "" if whole else f"{group}.")
    targets = {node: values.pop(f"{node}._target_") for node in CLASSES if f"{node}._target_" in values}
    for node, target in targets.items():
        own = meanings.settings(locate(target, node, trusted=True))
        values |= {f"{node}.{name}": value for name, value in own.items() if f"{node}.{name}" not in values}
    lines += _explained(values, targets)
    lines += [f"class: {target}" for target in targets.values()]
    lines += [f"varied: {key}={value}" for key, value in grid.items()]
    return "\n".join(lines)


def experiments_text() -> str:
    """Return how many runs each experiment has, and how many tokens they read in training."""
    rows = []
    with composing():
        for name, purpose in options("experiment").items():
            tokens = _training_tokens(name)
            least, most = _number(min(tokens)), _number(max(tokens))
            each = least if least == most else f"{least} to {most}"
            rows.append((name, f"{len(tokens)}", each, _number(sum(tokens)), purpose))
    rows.insert(0, ("experiment", "runs", "tokens per run", "of all runs", "purpose"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers, purpose in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=False)]
        lines.append("  ".join([name.ljust(widths[0]), *cells, purpose]))
    advice = (
        "Tokens are those that training reads. The time depends on the machine and on the model. A run says after its "
        "first steps how long it takes, and a sweep after each run how long the others take. So try one run first:",
        "  python train.py experiment=noise_lb_seed seed=42 noise=0.0 lb=0.01",
    )
    return "\n".join([*lines, "", *textwrap.wrap(advice[0], WIDTH), advice[1]])


def _training_tokens(experiment: str) -> list[int]:
    """Return how many tokens each run of an experiment reads in training."""
    start = Start.of([parse_override(f"experiment={experiment}")], multirun=False)
    found = []
    for arguments in combinations([*start.presets, *start.own]):
        config = compose_config([line for line in arguments if line not in DEFAULTS])
        found.append(config.steps * config.batch_size * config.grad_accum * config.data.seq_len)
    return found


def _number(value: int) -> str:
    """Return a number of tokens in three digits, such as 614k, 1.23M or 2G."""
    factor, unit = next(((10**n, name) for n, name in ((9, "G"), (6, "M"), (3, "k")) if value >= 10**n), (1, ""))
    return f"{value / factor:.3g}{unit}"


def _explained(values: dict[str, Any], targets: dict[str, str]) -> list[str]:
    """Return a line for each key: its value, and its meaning, which may go on in further lines."""
    shown = {key: f"  {key}={_text(value)}" for key, value in values.items()}
    column = min(34, max(map(len, shown.values()), default=0) + 2)
    lines = []
    for key, line in shown.items():
        said = textwrap.wrap(meanings.meaning(key, targets) or "", WIDTH - column) or [""]
        if len(line) + 2 > column and said != [""]:
            lines.append(line)
            line = ""
        lines += [f"{line:<{column}}{said[0]}".rstrip(), *(" " * column + more for more in said[1:])]
    return lines


def _text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if value in ("???", Parameter.empty):
        return "(required)"
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(str(value), str(value))


def _usual_options() -> dict[str, str]:
    """Return the option of each group that a run has if the command chooses none."""
    chosen: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    pairs = [pair for entry in chosen["defaults"] if isinstance(entry, dict) for pair in entry.items()]
    return {group: str(option) for group, option in pairs if group in GROUPS and option is not None}


def _defaults(holder: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Return the default of each key of a dataclass, flat, if it has one."""
    types, found = get_type_hints(holder), dict[str, Any]()
    for each in fields(holder):
        if is_dataclass(types[each.name]):
            found |= _defaults(types[each.name], f"{prefix}{each.name}.")
        elif each.default is not MISSING:
            found[f"{prefix}{each.name}"] = each.default
        elif each.default_factory is not MISSING:
            found[f"{prefix}{each.name}"] = each.default_factory()
    return found
