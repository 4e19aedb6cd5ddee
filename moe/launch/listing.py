"""The text of `--list`: how many runs each experiment has, and what their training reads and computes."""

import hashlib
import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from moe.checks import ConfigError
from moe.config.options import CONF, options, search_path
from moe.files import sha256, write_json
from moe.launch.cells import Start
from moe.launch.compose import compose_config, composing
from moe.launch.flops import training_flops
from moe.launch.help import WIDTH
from moe.launch.overrides import DEFAULTS, parse_override
from moe.launch.tuning import runs_of

ADVICE = (
    "Tokens and FLOPs are those of training: three times the forward FLOPs of each token that is read. The time "
    "depends on the machine, and small models do not use all of it. A run says after its first steps how long it "
    "takes, and a sweep after each run how long the others take. So try one run first:"
)
# Of an experiment: the tokens that each run reads in training, and the FLOPs of that; 0 if a checkpoint has the sizes.
Runs = Sequence[Sequence[int]]


def experiments_lines() -> Iterator[str]:
    """Yield two lines for each experiment: its numbers, and its purpose.

    The first time takes many seconds, because each run is composed and its model is counted. The numbers are kept in
    the cache folder until a file of this project changes.
    """
    names = options("experiment")
    row = f"{{:<{max(map(len, names))}}}  {{:>4}}  {{:>14}}  {{:>14}}  {{:>12}}"
    yield row.format("experiment", "runs", "tokens per run", "FLOPs per run", "FLOPs in all")
    for name, runs in _kept(names):
        if isinstance(runs, ConfigError):
            yield from (row.format(name, "?", "", "", "").rstrip(), *_indented(names[name]), *_indented(f"{runs}"))
            continue
        tokens, flops = zip(*runs, strict=True)
        costs = (_range(flops), number_text(sum(flops))) if all(flops) else ("of checkpoint", "")
        yield row.format(name, len(runs), _range(tokens), *costs).rstrip()
        yield from _indented(names[name])
    yield from ("", *textwrap.wrap(ADVICE, WIDTH))
    yield "  python train.py experiment=noise_lb_seed seed=42 noise=0.0 lb=0.01"


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _kept(names: Iterable[str]) -> Iterator[tuple[str, Runs | ConfigError]]:
    """Yield each experiment with its runs, from the cache if it has them, or with why they are not known.

    An experiment may need the results of another one, which are not there yet. With options from outside of this
    project nothing is kept, because the classes that they name may change.
    """
    place = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moe-routing" / "experiments.json"
    state = None if search_path() else _state()
    kept: dict[str, Runs] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(place.read_text(encoding="utf-8"))
        if state is not None and content["state"] == state:
            kept = {name: content["runs"][name] for name in names if name in content["runs"]}
    found = dict(kept)
    with composing() if {*names} - {*kept} else nullcontext():
        for name in names:
            runs = kept.get(name) or _runs_or_reason(name)
            yield name, runs
            if not isinstance(runs, ConfigError):
                found[name] = runs
    if state is not None and found != kept:
        with suppress(OSError, ValueError):  # a folder in which nobody may write, or a link
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, {"state": state, "runs": found})


def _state() -> str:
    """Return what is equal as long as no option and no code of this project changes."""
    files = sorted([*CONF.rglob("*.yaml"), *Path(__file__).parents[1].rglob("*.py")])
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def _runs_or_reason(experiment: str) -> Runs | ConfigError:
    try:
        return list(_runs(experiment))
    except ConfigError as error:
        return error


def _runs(experiment: str) -> Iterator[tuple[int, int]]:
    """Yield the tokens that each run of an experiment reads in training, and the FLOPs of that."""
    start = Start.of([parse_override(f"experiment={experiment}")], multirun=False)
    for arguments in runs_of(start):
        yield _training(tuple(line for line in arguments if line not in DEFAULTS and not line.startswith("seed=")))


@cache
def _training(overrides: tuple[str, ...]) -> tuple[int, int]:
    """Return the tokens that a run reads in training, and the FLOPs of that, 0 if they are unknown.

    The seed changes neither.
    """
    composed = compose_config(list(overrides))
    tokens = composed.steps * composed.batch_size * composed.grad_accum * composed.data.seq_len
    if OmegaConf.is_missing(composed.model, "dim"):
        return tokens, 0
    model, router = OmegaConf.to_container(composed.model, resolve=True), OmegaConf.to_container(composed.router)
    assert isinstance(router, dict)
    assert isinstance(model, dict)
    router = {key: value for key, value in router.items() if "${" not in str(value)}  # from results to come
    settings = [{str(key): value for key, value in part.items()} for part in (model, router)]
    return tokens, tokens * training_flops(
        *settings, vocab_size=composed.data.vocab_size, seq_len=composed.data.seq_len
    )


def _range(values: Sequence[int]) -> str:
    least, most = number_text(min(values)), number_text(max(values))
    return least if least == most else f"{least} to {most}"


def number_text(value: int) -> str:
    """Return a number in three digits, such as 614k, 1.23M, 2G or 3.4P."""
    units = [(10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"), (1, "")]
    factor, unit = next((factor, unit) for factor, unit in units if value >= factor or factor == 1)
    return f"{value / factor:.3g}{unit}"
