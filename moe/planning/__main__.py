"""Say how many seeds each claim of an experiment needs: `moe plan experiment=noise_lb_seed effect=0.5% --pilot DIR`.

All other words are overrides, as `moe train` takes them. `effect` is the smallest difference that matters: a share of
the mean (0.5%), units of the metric (0.02), or standard deviations of the differences between runs of one seed (1.5sd).
The plan is printed, and written to a file.
"""

import argparse
import json
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from moe.analysis.sentences import level_text, numbers_in_words
from moe.bench.options import OneLineParser, whole
from moe.checks import ConfigError, require
from moe.config.cell import Cell
from moe.config.claim import ClaimConfig, amount_of
from moe.config.options import named_folders
from moe.config.words import SEARCHED, as_word, with_words
from moe.files import read_text, shown, write_json
from moe.launch.cells import Start
from moe.launch.command_line import read_command
from moe.launch.listing import number_text
from moe.launch.tuning import SEEDS
from moe.planning.cost import Speed, flops_of, measured_speed, speed_of_runs
from moe.planning.plan import Plan, Request, make_plan, pilot_command
from moe.planning.seeds import UNIT, Effect, Need
from moe.planning.sources import Source, Sources
from moe.planning.written import as_written
from moe.program import ended, program
from moe.results.shipped import STUDIES
from moe.runs.place import duration
from moe.runs.planned import is_plan
from moe.runs.record import RecordError

WIDTH = 110
DIFFERENCES = 8  # differing settings that are named
WITHOUT_PILOT = """\
This plan has no pilot. So how much runs differ by chance is read from finished runs of this experiment or, without \
them, from shipped runs. Train a pilot of three seeds to know it better, and pass it:"""
UNKNOWN = """\
No runs tell how much runs differ by chance{why}. So only an effect in standard deviations of the differences between \
runs of one seed, such as 1.5{unit}, has a number of seeds."""
NO_TABLES = ", and an installed package has no tables of finished studies, as docs/studies of a checkout"
GUIDE = "This is only a guide, because"
LEFT_OUT = """\
Seeds {seeds} told the spread, so they judge nothing. To judge by them too would be a look at the study that no report \
counts."""
ELSEWHERE = """\
The command has a folder of its own, because a report about the present one would judge by these seeds. A report about \
the present folder says how many seeds it lacks, and counts as a look."""
WITHOUT_CLAIMS = """\
experiment={}: has no claims, and a plan counts the seeds that claims need; write claims first (docs/reports.md), or \
see its runs, tokens and FLOPs with `python train.py --list`"""
LEGEND = """\
In parentheses: the number of seeds for each end of the 95 % interval of the spread.
distance to the bound: from the true difference that is assumed to what the claim does not allow. It is the
  effect; or half of the range, if the claim has one.
spread: the standard deviation of the difference between two settings, from seed to seed.
level: of the 5 % error that all tests of the report share, what this test gets."""
OUT_OF_REACH = """\
A claim that needs over {most} seeds is out of reach. Fewer do for longer runs, which differ less."""
LARGER = " {most} seeds are also enough for an effect of this size or more:"
NO_NUMBER = "no claim has a number of seeds"
NOTES = """\
The time was measured, and depends on what else ran on the machine. Power is that of a test that must pass alone. After
other tests of its family passed, fewer seeds would do."""


def main() -> int:
    """Carry out the command in `sys.argv`, and return the exit status."""
    try:
        arguments, request = _read(sys.argv[1:])
        cells, trials = _cells(request)
        request = _with_folders(request)
        sources = Sources(cells, arguments.pilot)
        if sources.pilot is None:
            _say_without_pilot(request, cells, sys.argv[1:])
        plan = make_plan(request, cells, sources, lambda: _speed(cells, sources), trials)
        write_json(arguments.out, as_written(plan.as_json()))
    except (ConfigError, RecordError) as error:
        print(f"{program('moe plan')}: {error}", file=sys.stderr)
        return 2
    print("\n".join(_lines(plan)))
    print(f"\nplan: {shown(arguments.out)}")
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
    add("--out", type=Path, default=Path("plan.json"), help="file to write the plan to (plan.json)")
    arguments = parser.read(words)
    effects = [word.partition("=")[2] for word in arguments.words if word.startswith("effect=")]
    require(len(effects) == 1, "effect", effects[-1] if effects else None, "given once, such as effect=0.5%")
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
    """Raise ConfigError unless the file is new or an earlier plan, so that no other file is overwritten."""
    require(path.parent.is_dir() and not path.is_dir(), "--out", path, "a file in a folder that exists")
    if not path.exists():
        return
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError):
        content = None
    require(is_plan(content), "--out", path, "a new file, or an earlier plan: this file holds something else")


def _cells(request: Request) -> tuple[list[Cell], list[Cell]]:
    """Return the cells of the experiment with its own seeds, and the runs that tune, unless all have ended.

    The cells have the usual values of the tuned keys, because the best ones are not known yet.
    """
    with redirect_stdout(StringIO()):  # the next stage of a command that tunes is no news here
        cells = read_command(["-m", *request.words], check=_check_start).cells
    trials, tune = [], cells[0].config.tune if cells else None
    if cells and tune:
        trials = cells if cells[0].grid and cells[0].grid.search else []
        cells = read_command(["-m", *with_words(request.words, "tune=null")]).cells
    require(bool(cells), "experiment", None, "a grid of runs; a search for good settings has no claims to plan for")
    assert cells is not None
    for key in SEEDS[1:]:
        values = list(dict.fromkeys(getattr(cell.config, key) for cell in cells))
        swept = cells[0].grid and key in cells[0].grid.factors
        if not swept and all(getattr(cell.config, key) == cell.config.seed for cell in cells):
            continue  # such as data_seed=${seed}, which means null
        allowed = "one value for all runs: a plan counts runs by seed alone, and its pilot would repeat these values"
        require(len(values) == 1, key, ",".join(map(as_word, values)), allowed)
    measured = {claim.metric for claim in cells[0].config.claims}
    for metric in request.effects:
        require(metric in measured, "--effect", metric, f"a metric of the claims: {', '.join(sorted(measured))}")
    for claim in cells[0].config.claims:
        _check_fall(request, claim)
    if planned := cells[0].config.planned_seeds:
        print(f"planned_seeds={planned} plays no part in a plan: its command has the number that the claims need")
    return [cell._replace(config=replace(cell.config, planned_seeds=None, tune=tune)) for cell in cells], trials


def _check_start(start: Start) -> None:
    """Raise ConfigError for an experiment without claims."""
    given = [o.value() for o in start.own if o.key_or_group == "claims"]
    if not (given[-1] if given else start.base.claims):
        raise ConfigError(WITHOUT_CLAIMS.format(start.base.hydra.runtime.choices["experiment"]))


def _check_fall(request: Request, claim: ClaimConfig) -> None:
    """Raise ConfigError if an effect is all of the mean or more, and a claim without a range says that it falls."""
    falls = claim.kind in ("lower", "lowest") or (claim.kind == "mixed" and claim.direction == "lower")
    if not falls or claim.size:
        return
    own = request.effects.get(claim.metric)
    text = (own or request.effect).text
    allowed = f"below 100%: “{claim.text}” claims a fall of {claim.metric}"
    possible = not text.endswith("%") or amount_of(text).share < 1
    require(possible, f"--effect {claim.metric}" if own else "effect", text, allowed)


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
    yield f"power {request.power:g}, after the correction for all tests that the report will make, and on average over"
    yield "the spreads that the runs below leave open: the fewer their seeds, the more seeds the study needs"
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
    if any(each.seeds is None and not each.reason for each in plan.needs):
        larger = _within_reach(plan)
        advice = OUT_OF_REACH + (LARGER if larger else "")
        yield from ("", *_wrapped(advice.format(most=request.most)), *(f"  {each}" for each in larger))
    if plan.table:
        why = "" if STUDIES.is_dir() else NO_TABLES
        yield from ("", *_wrapped(UNKNOWN.format(why=why, unit=UNIT)))
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
    seeds = f"{len(plan.seeds)} seeds{tuned} = {plan.runs}" if plan.seeds else f"1 seed{tuned}"
    yield f"runs: {plan.settings} settings x {seeds}, {number_text(plan.tokens)} tokens"
    if not plan.seeds:
        yield f"{NO_NUMBER}, so these are the runs and tokens of one seed"
    if plan.seconds is not None:
        about = f"time: about {duration(plan.seconds)} on this machine if one run is trained at a time"
        yield from _wrapped(f"{about}, from {plan.seconds_from}")
        yield from _wrapped(NOTES)
    yield f"command: {plan.command or f'none, because {NO_NUMBER}'}"


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
    yield f"the spread is that of {source.name} ({len(source.runs)} runs, seeds {seeds})"
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
    """Return lines of at most `WIDTH` characters. A path and a setting stay whole, so that they can be copied."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


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
    return f"{each.claim.metric}: {distance}, {level}; {spread.source}"


if __name__ == "__main__":
    sys.exit(ended(main, "moe plan"))
