"""The text of `--help`: keys with their meanings, options with their purposes; and of `--help` with one of these."""

import textwrap
from functools import cache
from inspect import Parameter
from typing import Any

from omegaconf import OmegaConf

from moe.checks import ConfigError, one_of, unknown
from moe.config import meanings
from moe.config.classes import locate
from moe.config.options import CLASSES, CONF, GROUPS, WHOLE, options, sources
from moe.config.question import parts_of, text_of
from moe.config.schema import allowed_values, defaults
from moe.launch.hints import hint
from moe.launch.option_files import named_in, read_option, values_of
from moe.program import program

WIDTH = 80
INTRODUCTION = """\
Train one Mixture-of-Experts language model, or with -m one for each combination
of several values.

  python train.py router=temperature router.temp=1.5
  python train.py -m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44
  python train.py experiment=noise_lb_seed
  python train.py --help noise         explain a key; also: --help router.temp
  python train.py --help router=topk   explain an option and its keys
  python train.py --list               how many runs each experiment has, and
                                       what they compute
  python train.py --cfg job            print every key and its value

Set a key as key=value, a key in a group as group.key=value (router.temp=1.5), a
group by the name of one of its options (router=temperature).

Keys, with their defaults, or the value in the group's usual option:"""


def help_text() -> str:
    """Return the text about all keys and all options."""
    return "\n\n".join([_introduction() + "\n" + "\n".join(_explained(usual_values(), {})), *map(group_text, GROUPS)])


def _introduction() -> str:
    """Return the introduction, whose examples call the command as the user did."""
    typed = program("train.py")
    return INTRODUCTION if typed == "train.py" else INTRODUCTION.replace("python train.py", typed)


def topic_text(word: str) -> str:
    """Return the text about one option (router=topk), one group (router), or one key (noise, router.temp).

    A value after a key counts for nothing. Raises ConfigError, with the nearest name, for a word that is none of these.
    """
    name, _, value = word.lstrip("+~").partition("=")
    if name in GROUPS:
        return option_text(name, value) if value else group_text(name)
    node, _, setting = name.rpartition(".")
    if setting and node in CLASSES:
        return _setting_text(node, name)
    if name in meanings.all_keys():
        return _key_text(name)
    if meant := hint(name):
        raise ConfigError(f"unknown key '{name}'; write {meant}")
    raise unknown("key", name, [*meanings.all_keys(), *GROUPS, *_keys_of_files()])


def group_text(group: str) -> str:
    """Return a line for each option of a group."""
    entries = options(group)
    column = max(map(len, entries), default=0) + 4
    usual = usual_options().get(group)
    lines = [f"{group}={f'  (usually {usual})' if usual else ''}"]
    for name, purpose in entries.items():
        lines += _wrapped(f"  {name}".ljust(column) + purpose, column)
    return "\n".join(lines)


def option_text(group: str, option: str) -> str:
    """Return the text about one option: its comments, its keys with their values, and the class that it names.

    Of an experiment, it also has the question and the claims. Raises ConfigError for an unknown option. The code of its
    class is imported.
    """
    found = sources(group)
    one_of(group, option, found)
    content: Any = OmegaConf.to_container(read_option(found[option]))
    comments = option_comments(group, option)
    lines = _wrapped(f"{group}={option}: {comments[0]}" if comments else f"{group}={option}", 2)
    lines += [part for line in comments[1:] for part in _wrapped(line, 2)]
    lines += _wrapped(f"question: {text_of(parts_of(content['question']))}", 2) if "question" in content else []
    lines.append("")
    grid = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    for part in content.get("defaults", []):
        lines += [f"  {name.removeprefix('override ').lstrip('/')}={value}" for name, value in part.items()]
    values, targets = option_values(group, option)
    lines += _explained({key: value for key, value in values.items() if key != "question"}, targets)
    lines += [f"class: {target}" for target in targets.values()]
    lines += [f"varied: {key}={value}" for key, value in grid.items()]
    claims = content.get("claims", [])
    lines += ["", "Claims, written down before the runs. The report gives a verdict on each:"] if claims else []
    for claim in claims:
        about = ", ".join(filter(None, (claim["metric"], claim.get("source"))))
        lines += _wrapped(f"- {claim['text']} ({about})", 2)
    return "\n".join(lines)


def _key_text(key: str) -> str:
    """Return the text about a key that has the same meaning with every option."""
    lines = [*_explained({key: usual_values()[key]}, {}), "", f"It takes {allowed_values(key)}."]
    group = key.partition(".")[0] if "." in key else "router"  # routers may set keys of the whole configuration
    if group in GROUPS:
        read = {name: values_of(group, path) for name, path in sources(group).items()}
        listed = [f"{group}={name}: {value_text(values[key])}" for name, values in read.items() if key in values]
        which = "each option" if len(listed) == len(read) else "the options that set it"
        lines += [f"Its value in {which}:", *(f"  {each}" for each in listed)] if len(listed) > 1 else []
    return "\n".join(lines)


def _keys_of_files() -> set[str]:
    """Return the keys that the files of options name, of all groups whose options are parts of the configuration."""
    found = set[str]()
    for group in {*GROUPS} - {*WHOLE}:
        for path in sources(group).values():
            found |= values_of(group, path).keys()
    return {key for key in found if not key.endswith("._target_")}


def _setting_text(node: str, key: str) -> str:
    """Return the text about a key of a class that options name, such as router.temp. The code of these is imported."""
    group = CLASSES[node]
    users: dict[str, list[str]] = {}
    for name in options(group):
        values, targets = option_values(group, name)
        if key in values:
            said = "\n".join(_explained({key: values[key]}, targets))
            users.setdefault(said, []).append(f"{group}={name}")
    if not users:
        raise unknown("key", key, [*meanings.all_keys(), *_keys_of_files()])
    return "\n\n".join(
        f"{said}\n" + "\n".join(_wrapped(f"with {', '.join(names)}", 2)) for said, names in users.items()
    )


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
    rest = {key: value for key, value in content.items() if key not in ("defaults", "hydra", "claims")}
    values = named_in(group, rest)
    targets = {node: values.pop(f"{node}._target_") for node in CLASSES if f"{node}._target_" in values}
    for node, target in targets.items():
        own = meanings.settings(locate(target, node, trusted=True))
        values |= {f"{node}.{name}": value for name, value in own.items() if f"{node}.{name}" not in values}
    return values, targets


def _wrapped(text: str, indent: int) -> list[str]:
    """Return the lines of a text. Lines after the first one are indented. No word is broken."""
    rest = " " * indent
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
    return lines or [text]


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
    values = dict(defaults())
    for group, option in usual_options().items():
        if group in ("model", "data", "optimizer", "logger"):
            values |= values_of(group, sources(group)[option])
    return {key: values.get(key) for key in meanings.all_keys()}


@cache
def usual_options() -> dict[str, str]:
    """Return the option of each group that a run has if the command chooses none."""
    chosen: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    pairs = [pair for entry in chosen["defaults"] if isinstance(entry, dict) for pair in entry.items()]
    return {group: str(option) for group, option in pairs if group in GROUPS and option is not None}
