"""Say how many seeds each claim of an experiment needs: `moe plan experiment=noise_lb_seed effect=0.5% --pilot DIR`.

All other words are overrides, as `moe train` takes them. `effect` is the smallest difference that matters: a share of
the mean (0.5%), units of the metric (0.02), or standard deviations of the differences between runs of one seed (1.5sd).
A share or units are for metrics of quality, such as losses; `--effect METRIC=SIZE` is for one metric. The plan is
printed, and written to a file. An earlier plan there gets a number in its name.
"""

import argparse
import difflib
import json
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from moe.analysis.sentences import enumerated, level_text, numbers_in_words
from moe.checks import ConfigError, require, unknown
from moe.config.cell import Cell
from moe.config.effect import UNIT, Effect
from moe.config.options import named_folders
from moe.config.words import SEARCHED, as_word
from moe.files import read_text, shown
from moe.launch.listing import number_text
from moe.launch.plans import not_comparable
from moe.options import OneLineParser, whole
from moe.planning.cells import planned_cells
from moe.planning.cost import Speed, flops_of, measured_speed, speed_of_runs
from moe.planning.plan import Plan, Request, make_plan, pilot_command
from moe.planning.seeds import NOT_TOLD, Need, has_range
from moe.planning.sources import Source, Sources
from moe.planning.written import write_plan
from moe.program import ended, program
from moe.results.shipped import STUDIES
from moe.runs.place import duration
from moe.runs.planned import is_plan
from moe.runs.record import RecordError

WIDTH = 110
PERCENT = "\N{NO-BREAK SPACE}%"
DIFFERENCES = 8  # differing settings that are named
WITHOUT_PILOT = """\
This plan has no pilot. So how much runs differ by chance is read from finished runs of this experiment or, without \
them, from shipped runs. Train a pilot of three seeds to know it better, and pass it:"""
UNTOLD = "No runs tell how much {metrics} {differ} by chance{why}. "
UNTOLD_RANGE = "A claim with a range then has no number of seeds. "
UNTOLD_EFFECT = """\
An effect then has a number of seeds only in standard deviations of the differences between runs of one seed, such as \
1.5{unit}."""
NO_TABLES = ", and an installed package has no tables of finished studies, as docs/studies of a checkout"
POWER = """\
With its number of seeds, a claim that is true is supported by the report with probability {power:g} (the power). This \
is a mean over the spreads that the runs below leave open: the fewer their seeds, the more seeds the study needs."""
TOLD = "How much runs differ by chance is read from {name} ({runs} runs, seeds {seeds})"
GUIDE = "They are only a guide, because"
LEFT_OUT = """\
Seeds {seeds} told the spread, so they judge nothing. To judge by them too would be a look at the study that no report \
counts."""
ELSEWHERE = """\
The command has a folder of its own, because a report about the present one would judge by these seeds. A report about \
the present folder says how many seeds it lacks, and counts as a look."""
LEGEND = """\
In parentheses: the 95 % interval of the spread, and the numbers of seeds for its two ends.
distance to the bound: from the true difference that is assumed to what the claim does not allow. It is the
  effect; or half of the range, if the claim has one.
spread: the standard deviation of the difference between two settings, from seed to seed.
mean: of the setting with which the claim compares, as in the report; of all these runs if they lack it.
level: of the 5 % error that all tests of the report share, what this test gets."""
OUT_OF_REACH = """\
A claim that needs over {most} seeds is out of reach. Longer runs differ less, so they need fewer seeds."""
IN_UNITS = "effect={size} means {size} in units of each metric. A share of its mean is effect={size}%."
LARGER = "If an effect has this size or more, {most} seeds are enough for all claims about its metric:"
OWN_SEEDS = "{note}. So what follows is for as many seeds as the experiment has."
TWICE = "command, which must be given twice: first it trains {}, then, given again, {}"
NOTES = """\
The time was measured, and depends on what else ran on the machine. Power is that of a test that must pass alone. After
other tests of its family passed, fewer seeds would do."""


def main() -> int:
    """Carry out the command in `sys.argv`, and return the exit status."""
    try:
        arguments, request = _read(sys.argv[1:])
        cells, trials = planned_cells(request)
        request = _with_folders(request)
        sources = Sources(cells, arguments.pilot)
        if sources.pilot is None:
            _say_without_pilot(request, cells, sys.argv[1:])
        plan = make_plan(request, cells, sources, lambda: _speed(cells, sources), trials)
        written = write_plan(arguments.out, plan.as_json())
    except (ConfigError, RecordError) as error:
        print(f"{program('moe plan')}: {error}", file=sys.stderr)
        return 2
    if line := not_comparable(cells):
        print("\n".join(_wrapped(f"{line}.")))
    print("\n".join(_lines(plan)))
    print(f"\n{written}")
    return 0


def _read(words: list[str]) -> tuple[argparse.Namespace, Request]:
    """Return the options of a command line. Raises ConfigError for words that cannot be used."""
    parser = OneLineParser(prog=program("moe plan"), description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("words", nargs="*", metavar="KEY=VALUE", help="experiment=NAME, effect=SIZE, and settings as for `moe train`")
    add("--config-dir", metavar="DIR", help="a folder of options outside of this project")
    add("--pilot", type=Path, metavar="DIR", help="folder of a few finished runs, which tell spread and speed")
    add("--effect", action="append", default=[], metavar="METRIC=SIZE", help="effect for one metric: val/loss=1%%")
    add("--power", type=float, default=0.8, help="wanted probability that a claim is supported if it is true (0.8)")
    add("--most", type=whole, default=32, help="seeds beyond which a claim is out of reach (32)")
    add("--out", type=Path, default=Path("plan.json"), help="file for the plan (plan.json)")
    arguments = parser.read(words)
    effects = [word.partition("=")[2] for word in arguments.words if word.startswith("effect=")]
    keys = {word.partition("=")[0] for word in arguments.words}
    if not effects and (close := difflib.get_close_matches("effect", keys, n=1, cutoff=0.8)):
        raise unknown("key", close[0], ["effect"])
    if not effects:
        raise ConfigError("effect is missing: give the smallest difference that matters, such as effect=0.5%")
    require(len(effects) == 1, "effect", effects[-1], "given once, such as effect=0.5%")
    require(arguments.most > 1, "--most", arguments.most, "a whole number > 1: a test needs two seeds at least")
    require(0.05 < arguments.power < 1, "--power", arguments.power, "between 0.05 and 1, such as 0.8")
    others = {}
    for text in arguments.effect:
        metric, equals, size = text.rpartition("=")
        require(bool(equals), "--effect", text, "METRIC=SIZE, such as routing/load_cv/pooled=10%")
        if metric in others:
            raise ConfigError(f"--effect={text}: given twice for {metric}; give one size for each metric")
        others[metric] = Effect.read(f"--effect {metric}", size)
    _check_out(arguments.out)
    kept = [word for word in arguments.words if not word.startswith("effect=")]
    kept += [f"{SEARCHED}={as_word([arguments.config_dir])}"] if arguments.config_dir else []
    request = Request(kept, Effect.read("effect", effects[0]), others, arguments.power, arguments.most)
    return arguments, request


def _with_folders(request: Request) -> Request:
    """Return the request with all folders of options among its words, also those that the environment names."""
    words = [word for word in request.words if not word.startswith(f"{SEARCHED}=")]
    folders = [str(shown(folder)) for folder in named_folders()]
    return request._replace(words=words + ([f"{SEARCHED}={as_word(folders)}"] if folders else []))


def _check_out(path: Path) -> None:
    """Raise ConfigError unless the file is new or an earlier plan, so that no other file is moved."""
    require(path.parent.is_dir() and not path.is_dir(), "--out", path, "a file in a folder that exists")
    require(os.access(path.parent, os.W_OK), "--out", path, "a file in a folder to which you may write")
    if not path.exists():
        return
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError):
        content = None
    require(is_plan(content), "--out", path, "a new file, or an earlier plan: this file holds something else")


def _say_without_pilot(request: Request, cells: list[Cell], typed: list[str]) -> None:
    """Print what a plan lacks without a pilot, and the commands that train and name one.

    typed: the words of this command, which the second one repeats. Folders that only the environment names are added.
    """
    print(*_wrapped(WITHOUT_PILOT), sep="\n")
    print(f"  {pilot_command(request, cells)}")
    named = any(word.startswith(("--config-dir", f"{SEARCHED}=")) for word in typed)
    folders = [] if named else [word for word in request.words if word.startswith(f"{SEARCHED}=")]
    print(f"  python -m moe plan {shlex.join([*typed, *folders, '--pilot', 'pilot'])}", flush=True)


def _speed(cells: list[Cell], sources: Sources) -> Speed:
    """Return the speed of a pilot or of finished runs here, or that of a short measurement if they do not tell it."""
    source = sources.pilot or sources.own
    if source is not None and (speed := speed_of_runs(source.runs, source.name)):
        return speed
    print("measuring the speed: a few steps of the setting with the most FLOPs", flush=True)
    return measured_speed(max((cell.config for cell in cells), key=flops_of))


def _lines(plan: Plan) -> Iterator[str]:
    """Yield the plan as text."""
    request = plan.request
    yield from _wrapped(POWER.format(power=request.power))
    if not request.effect.text.endswith(("%", UNIT)):
        yield from _wrapped(IN_UNITS.format(size=request.effect.text))
    if plan.replaced:
        yield "The command replaces what the experiment's own file sets, on which its claims may rest:"
        yield from (f"  {each}" for each in plan.replaced)
    if plan.passed_over:
        yield from _wrapped(f"passed over: {plan.passed_over}")
    for source in plan.sources.values():
        yield from _about(source)
    yield ""
    numbers = [_number(each, request.most) for each in plan.needs]
    width = max(map(len, numbers))
    for number, each in zip(numbers, plan.needs, strict=True):
        indent = (width + 2) * " "
        yield f"{number:>{width}}  {each.claim.text}"
        yield from _wrapped(_basis(each), indent)
    if not all(each.reason for each in plan.needs):
        yield from ("", *LEGEND.splitlines())
    far = any(each.seeds is None and not each.reason for each in plan.needs)
    larger = _within_reach(plan)
    if far or larger:
        advice = f"{OUT_OF_REACH if far else ''} {LARGER if larger else ''}"
        yield from ("", *_wrapped(advice.strip().format(most=request.most)), *(f"  {each}" for each in larger))
    if any(each.spread.source == NOT_TOLD.source for each in plan.needs):
        yield from ("", *_wrapped(_untold(plan)))
    if plan.table:
        yield from ("", "seeds of a paired test for effects in standard deviations of the differences between runs:")
        sizes = list(next(iter(plan.table.values())))
        yield "  level    " + "".join(f"{size:>7g}" for size in sizes)
        for tests, row in plan.table.items():
            values = "".join(f"{seeds or '>' + str(request.most):>7}" for seeds in row.values())
            yield f"  {level_text(tests):<9}{values}"
    yield ""
    tuned = f" + {plan.trials} that tune" if plan.trials else ""
    if plan.left_out:
        yield from _wrapped(LEFT_OUT.format(seeds=numbers_in_words(plan.left_out)))
    if plan.elsewhere and plan.command:
        yield from _wrapped(ELSEWHERE)
    if plan.note:
        yield from _wrapped(OWN_SEEDS.format(note=plan.note))
    elif lacking := sum(not each.seeds for each in plan.needs):
        known = len(plan.needs) - lacking
        yield f"What follows is for the claims with a number of seeds: {known} of {len(plan.needs)}."
    seeds = f"{len(plan.seeds)} {'seed' if len(plan.seeds) == 1 else 'seeds'}{tuned} = {plan.runs}"
    yield f"runs: {plan.settings} settings x {seeds}, {number_text(plan.tokens)} tokens"
    about = f"time: about {duration(plan.seconds)} on this machine if one run is trained at a time"
    yield from _wrapped(f"{about}, from {plan.seconds_from}")
    yield from _wrapped(NOTES)
    if plan.trials:
        yield from (*_wrapped(TWICE.format(*plan.stages)), f"  {plan.command}")
    else:
        yield f"command: {plan.command}"


def _untold(plan: Plan) -> str:
    """Return of which metrics no runs tell the spread, and what follows for their claims."""
    untold = [each.claim for each in plan.needs if each.spread.source == NOT_TOLD.source]
    metrics = list(dict.fromkeys(claim.metric for claim in untold))
    why = "" if STUDIES.is_dir() else NO_TABLES
    text = UNTOLD.format(metrics=enumerated(metrics), differ="differ" if len(metrics) > 1 else "differs", why=why)
    text += UNTOLD_RANGE if any(map(has_range, untold)) else ""
    return text + (UNTOLD_EFFECT.format(unit=UNIT) if plan.table else "")


def _within_reach(plan: Plan) -> list[str]:
    """Return for each metric, as an option of the command, the effect from which all its claims are within reach."""
    largest: dict[str, Need] = {}
    for each in plan.needs:
        metric = each.claim.metric
        if each.within_reach > (largest[metric].within_reach if metric in largest else 0):
            largest[metric] = each
    sizes = {metric: _at_least(each, plan.request) for metric, each in largest.items()}
    return [f"--effect {metric}={size}" for metric, size in sizes.items() if size]


def _at_least(each: Need, request: Request) -> str:
    """Return the effect that is within reach, rounded up to two digits, in the unit of the effect that was asked for.

    Returns "" for all of the mean or more.
    """
    text, spread = request.effects.get(each.claim.metric, request.effect).text, each.spread
    unit = UNIT if text.endswith(UNIT) else "%" if text.endswith("%") else ""
    if unit == "%" and each.within_reach >= 0.95 * abs(spread.mean):
        return ""
    size = each.within_reach / {UNIT: spread.value, "%": abs(spread.mean) / 100, "": 1.0}[unit]
    digit = 10 ** (math.floor(math.log10(size)) - 1)
    return f"{math.ceil(size / digit) * digit:.2g}{unit}"


def _about(source: Source) -> Iterator[str]:
    """Yield which runs tell a spread, and in what they differ from the planned ones."""
    seeds = numbers_in_words(sorted(source.seeds))
    yield from _wrapped(TOLD.format(name=source.name, runs=len(source.runs), seeds=seeds))
    if source.differs:
        yield GUIDE
        yield from (f"  {each}" for each in source.differs[:DIFFERENCES])
        more = len(source.differs) - DIFFERENCES
        yield from ([f"  and {more} more {'setting' if more == 1 else 'settings'}"] if more > 0 else [])


def _number(each: Need, most: int) -> str:
    """Return the number of seeds that a claim needs, in a few words."""
    if each.reason:
        return "unknown"
    if each.seeds is None:
        return f"over {most} seeds" + (f" ({each.low} to over {most})" if each.low else "")
    ends = "" if each.low == each.high else f" ({each.low or most} to {each.high or f'over {most}'})"
    return f"{each.seeds} seeds{ends}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    """Return lines of at most `WIDTH` characters. A path and a setting stay whole, so that they can be copied.

    So does a number with its percent sign.
    """
    lines = textwrap.wrap(
        text.replace(" %", PERCENT),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(PERCENT, " %") for line in lines]


def _basis(each: Need) -> str:
    """Return from what the number of seeds follows."""
    if each.reason:
        return each.reason
    level = f"level {level_text(each.tests)}"
    spread = each.spread
    if math.isnan(spread.mean):
        return f"{each.claim.metric}: distance to the bound {each.effect:.3g} {UNIT}, {level}; {spread.source}"
    ends = f" ({spread.low:.3g} to {spread.high:.3g})" if spread.value else ""
    ends += f", {100 * spread.value / spread.mean:.2g} % of the mean {spread.mean:.3g}" if spread.mean > 0 else ""
    distance = f"distance to the bound {each.effect:.3g}, spread {spread.value:.3g}{ends}"
    change = "how a difference changes, " if each.claim.kind == "interaction" else ""
    return f"{change}{each.claim.metric}: {distance}, {level}; {spread.source}"


if __name__ == "__main__":
    sys.exit(ended(main, "moe plan"))
