"""The text of `--help`: keys with their meanings, options with their purposes; `--help router=topk`; and `--list`."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from inspect import Parameter
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from moe.checks import one_of
from moe.config import meanings
from moe.config.classes import locate
from moe.config.options import CLASSES, CONF, GROUPS, options, sources
from moe.config.schema import Config, ModelConfig, flatten
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
  python train.py --list               how many runs each experiment has, and what they compute
  python train.py --cfg job            print every key and its value

Set a key as key=value, a key in a group as group.key=value (router.temp=1.5), a group by the name of
one of its options (router=temperature).

Keys, with their defaults, or the value in the group's usual option:"""

ADVICE = (
    "Tokens and FLOPs are those of training: three times the forward FLOPs of each token that is read. The time "
    "depends on the machine, and small models do not use all of it. A run says after its first steps how long it "
    "takes, and a sweep after each run how long the others take. So try one run first:"
)


def help_text() -> str:
    """Return the text about all keys and all options."""
    usual = usual_options()
    lines = [INTRODUCTION, *_explained(usual_values(), {})]
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
    comments = option_comments(group, option)
    lines = [f"{group}={option}: {comments[0]}" if comments else f"{group}={option}", *comments[1:], ""]
    grid = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    for part in content.get("defaults", []):
        lines += [f"  {name.removeprefix('override ').lstrip('/')}={value}" for name, value in part.items()]
    values, targets = option_values(group, option)
    lines += _explained(values, targets)
    lines += [f"class: {target}" for target in targets.values()]
    lines += [f"varied: {key}={value}" for key, value in grid.items()]
    return "\n".join(lines)


def option_comments(group: str, option: str) -> list[str]:
    """Return the lines of comment with which the yaml file of an option begins."""
    comments = []
    for line in sources(group)[option].read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.lstrip("# "))
    return [line for line in comments if not line.startswith("@package")]


def option_values(group: str, option: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys of an option with their values, and the class that each node of `CLASSES` in it names.

    Keys that only the class has are there too, with its defaults. The code of the class is imported.
    """
    content: Any = OmegaConf.to_container(read_option(sources(group)[option]))
    whole = group in ("experiment", "variant")  # such an option sets keys of the whole configuration
    rest = {key: value for key, value in content.items() if key not in ("defaults", "hydra", "claims")}
    values = flatten(rest, "" if whole else f"{group}.")
    targets = {node: values.pop(f"{node}._target_") for node in CLASSES if f"{node}._target_" in values}
    for node, target in targets.items():
        own = meanings.settings(locate(target, node, trusted=True))
        values |= {f"{node}.{name}": value for name, value in own.items() if f"{node}.{name}" not in values}
    return values, targets


def experiments_lines() -> Iterator[str]:
    """Yield a line for each experiment: how many runs it has, and what their training reads and computes.

    It takes some seconds, because every run is composed.
    """
    names = options("experiment")
    row = f"{{:<{max(map(len, names))}}}  {{:>4}}  {{:>14}}  {{:>14}}  {{:>12}}  {{}}"
    yield row.format("experiment", "runs", "tokens per run", "FLOPs per run", "FLOPs in all", "purpose")
    with composing():
        for name, purpose in names.items():
            tokens, flops = zip(*_training(name), strict=True)
            yield row.format(name, len(tokens), _range(tokens), _range(flops), _number(sum(flops)), purpose)
    yield from (
        "",
        *textwrap.wrap(ADVICE, WIDTH),
        "  python train.py experiment=noise_lb_seed seed=42 noise=0.0 lb=0.01",
    )


def _training(experiment: str) -> list[tuple[int, int]]:
    """Return the tokens that each run of an experiment reads in training, and the FLOPs of that."""
    start = Start.of([parse_override(f"experiment={experiment}")], multirun=False)
    found = []
    for arguments in combinations([*start.presets, *start.own]):
        composed = compose_config([line for line in arguments if line not in DEFAULTS])
        tokens = composed.steps * composed.batch_size * composed.grad_accum * composed.data.seq_len
        model, router = OmegaConf.to_container(composed.model, resolve=True), OmegaConf.to_container(composed.router)
        assert isinstance(router, dict)
        router = {key: value for key, value in router.items() if "${" not in str(value)}  # from results to come
        key = json.dumps([model, router, composed.data.vocab_size, composed.data.seq_len])
        found.append((tokens, 3 * tokens * _flops(key)))
    return found


@cache
def _flops(key: str) -> int:
    """Return the forward FLOPs of one token, given model, router, size of the vocabulary, and length of a sequence."""
    import torch

    from moe.model.causal_lm import MoEConfig, MoEForCausalLM
    from moe.model.cost import flops_per_token

    model, router, vocab_size, seq_len = json.loads(key)
    settings = MoEConfig.of(ModelConfig(**model), router, vocab_size=vocab_size, seq_len=seq_len)
    with torch.device("meta"):  # shapes without memory
        return flops_per_token(MoEForCausalLM(settings, trusted=True), seq_len)


def _range(values: Sequence[int]) -> str:
    least, most = _number(min(values)), _number(max(values))
    return least if least == most else f"{least} to {most}"


def _number(value: int) -> str:
    """Return a number in three digits, such as 614k, 1.23M, 2G or 3.4P."""
    units = [(10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"), (1, "")]
    factor, unit = next((factor, unit) for factor, unit in units if value >= factor or factor == 1)
    return f"{value / factor:.3g}{unit}"


def _explained(values: dict[str, Any], targets: dict[str, str]) -> list[str]:
    """Return a line for each key: its value, and its meaning, which may go on in further lines."""
    shown = {key: f"  {key}={value_text(value)}" for key, value in values.items()}
    column = min(34, max(map(len, shown.values()), default=0) + 2)
    lines = []
    for key, line in shown.items():
        said = textwrap.wrap(meanings.meaning(key, targets) or "", WIDTH - column) or [""]
        if len(line) + 2 > column and said != [""]:
            lines.append(line)
            line = ""
        lines += [f"{line:<{column}}{said[0]}".rstrip(), *(" " * column + more for more in said[1:])]
    return lines


def value_text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if value in ("???", Parameter.empty):
        return "(required)"
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(str(value), str(value))


def usual_values() -> dict[str, Any]:
    """Return each key with its default, or with the value in the group's usual option."""
    values = _defaults()
    for group, option in usual_options().items():
        if group in ("model", "data", "optimizer", "logger"):
            content = OmegaConf.to_container(read_option(sources(group)[option]))
            values |= flatten(content, f"{group}.")
    return {key: values.get(key) for key in meanings.all_keys()}


def usual_options() -> dict[str, str]:
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
