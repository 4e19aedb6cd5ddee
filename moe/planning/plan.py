"""The plan of an experiment: the seeds that its claims need, the runs, what they cost, and the command."""

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe.analysis.power import Prediction, seeds_for
from moe.config.cell import Cell
from moe.config.effect import UNIT, Effect, effects_as_text
from moe.config.schema import Config
from moe.config.words import as_word, key_of, quoted, with_words
from moe.launch.tuning import seeds_after
from moe.metrics.catalog import is_quality
from moe.planning.cost import Speed, tokens_of
from moe.planning.report_ahead import tests_ahead
from moe.planning.seeds import NOT_TOLD, Need, has_range, need
from moe.planning.sources import Source, Sources
from moe.program import train_command

EFFECTS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # where no spread is known: standard deviations of the differences


class Request(NamedTuple):
    """What a plan is asked for.

    words: the overrides of the command, without those of the plan. effects: metric -> the difference that matters;
    `effect` is that of all other metrics of quality, and of every other metric if it is in `UNIT`. power: the
    probability with which a claim is decided. most: the number of seeds beyond which a claim is out of reach.
    """

    words: Sequence[str]
    effect: Effect
    effects: dict[str, Effect]
    power: float
    most: int

    def effect_on(self, metric: str) -> Effect | None:
        """Return the smallest difference in a metric that matters; None if nobody said."""
        applies = is_quality(metric) or self.effect.text.endswith(UNIT)
        return self.effects.get(metric, self.effect if applies else None)

    def command(self, *words: str, without: Sequence[str] = ()) -> str:
        """Return the command of a sweep with these words. without: keys that are left out."""
        left_out = {*without, "planned_seeds", "planned_effect", "-m", "--multirun"}
        kept = [word for word in self.words if key_of(word) not in left_out]
        return f"{train_command()} -m {shlex.join(with_words(kept, *words))}"


class Plan(NamedTuple):
    """The seeds that the claims need, and the runs that all claims within reach need together.

    If no claim has a number of seeds, they are as many seeds and runs as the experiment has. Then note says why.
    elsewhere: whether the command has a folder of its own, because runs that tell the spread are in the usual one.
    trials: the number of runs that tune. replaced: settings in the experiment's file that the command overrules, in
    words. sources: the runs that tell a spread, by their names. passed_over: see `Sources`. left_out: the seeds of the
    sources, which judge nothing. pilot: the command of a pilot; None if the plan has one. table: for each level of a
    test whose spread is unknown, the seeds that effects of several sizes need; of claims without a range.
    """

    request: Request
    needs: list[Need]
    seeds: list[int]
    settings: int
    trials: int
    tokens: int
    seconds: float
    seconds_from: str
    command: str
    elsewhere: bool
    replaced: list[str]
    sources: dict[str, Source]
    passed_over: str
    left_out: list[int]
    pilot: str | None
    table: dict[int, dict[float, int | None]]

    @property
    def runs(self) -> int:
        return self.settings * len(self.seeds) + self.trials

    @property
    def stages(self) -> list[str]:
        """What the command trains; of an experiment that tunes, that and what the same command trains after it."""
        tuning, judging = (f"{n} run{'s' * (n != 1)}" for n in (self.trials, self.runs - self.trials))
        return [f"{tuning} for tuning", f"{judging} for judging"] if self.trials else [judging]

    @property
    def note(self) -> str:
        """Why no claim has a number of seeds; "" if one has."""
        if any(each.seeds for each in self.needs):
            return ""
        over = sum(not each.reason for each in self.needs)
        counts = {f"over {self.request.most}": over, "unknown": len(self.needs) - over}
        parts = [f"{words} for {number} of {len(self.needs)}" for words, number in counts.items() if number]
        return f"No claim has a number of seeds: it is {' and '.join(parts)}"

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plan.json has it.

        `command_trains` has an entry for each time that the command must be given. `effect` of a claim is the distance
        from its assumed true difference to the nearest bound of what it allows. Effects, spreads and means are in units
        of the metric. If no runs tell a spread, it is null, and effects are in standard deviations of the paired
        differences. What is unknown is null: `reachable` and `seeds` of a claim that cannot be planned, whose `note`
        says why. If all claims lack a number, `note` of the plan says why.
        """
        return {
            "claims": [_need_as_json(each) for each in self.needs],
            "runs": self.runs,
            "command": self.command,
            "command_trains": self.stages,
            "seeds": self.seeds,
            "settings": self.settings,
            "runs_that_tune": self.trials,
            "note": self.note or None,
            "tokens": self.tokens,
            "seconds": round(self.seconds),
            "seconds_from": self.seconds_from,
            "replaced": self.replaced,
            "sources": [source.as_json() for source in self.sources.values()],
            "passed_over": self.passed_over,
            "seeds_left_out": self.left_out,
            "pilot": self.pilot,
            "power": self.request.power,
            "most_seeds": self.request.most,
            "effect": self.request.effect.text,
            "effects": {metric: effect.text for metric, effect in self.request.effects.items()},
            "seeds_by_effect": [
                {"tests": tests, "effect_sd": effect, "seeds": seeds}
                for tests, row in self.table.items()
                for effect, seeds in row.items()
            ],
        }


def _need_as_json(each: Need) -> dict[str, Any]:
    known = None if math.isnan(each.spread.mean) else each.spread.value
    return {
        "text": each.claim.text,
        "seeds": each.seeds,
        "reachable": None if each.reason else each.seeds is not None,
        "metric": each.claim.metric,
        "kind": each.claim.kind,
        "tests": each.tests,
        "effect": None if math.isnan(each.effect) else each.effect,
        "spread": known,
        "mean": None if known is None else each.spread.mean,
        "spread_from": each.spread.source,
        "seeds_low": each.low,
        "seeds_high": each.high,
        "note": each.reason,
    }


def make_plan(
    request: Request,
    cells: list[Cell],
    sources: Sources | None,
    speed: Callable[[], Speed],
    trials: Sequence[Cell] = (),
) -> Plan:
    """Return the plan for the cells of a sweep, whose experiment has claims.

    sources: the runs that may tell the spread; None if it is unknown. speed: measures that of training here, which
    takes a while. trials: the runs that tune.
    """
    claims = cells[0].config.claims
    needs, used = [], [sources.pilot if sources else None]
    for claim, ahead in zip(claims, tests_ahead(cells), strict=True):
        spread, source = sources.spread(claim) if sources else (NOT_TOLD, None)
        needs.append(
            need(claim, ahead, spread, request.effect_on(claim.metric), power=request.power, most=request.most)
        )
        used.append(source)
    known = {source.name: source for source in used if source}
    told = set[int]().union(*(source.seeds for source in known.values()))
    own = list(dict.fromkeys(cell.config.seed for cell in cells))
    wanted = max((each.seeds for each in needs if each.seeds), default=None)
    seeds = free_seeds(own, {*told, *cells[0].config.tune_seeds}, wanted or len(own))
    of_one_seed = [cell for cell in cells if cell.config.seed == own[0]]
    runs = [cell.config for cell in (*trials, *of_one_seed * len(seeds))]
    measured = speed()
    elsewhere = _in_folder_of(cells, known.values())
    untold = [each for each in needs if each.spread.source == NOT_TOLD.source]
    levels_of_tests = sorted({each.tests for each in untold if not has_range(each.claim)})
    table = {each: {effect: _seeds_alone(request, each, effect) for effect in EFFECTS} for each in levels_of_tests}
    return Plan(
        request=request,
        needs=needs,
        seeds=seeds,
        settings=len(of_one_seed),
        trials=len(trials),
        tokens=sum(map(tokens_of, runs)),
        seconds=sum(map(measured.seconds, runs)),
        seconds_from=measured.source,
        command=study_command(request, cells[0].config, seeds, decides=wanted is not None, elsewhere=elsewhere),
        elsewhere=elsewhere,
        replaced=cells[0].grid.replacements() if cells[0].grid else [],
        sources=known,
        passed_over=sources.passed_over if sources else "",
        left_out=sorted(told),
        pilot=None if sources and sources.pilot else pilot_command(request, cells),
        table=table,
    )


def study_command(request: Request, config: Config, seeds: list[int], *, decides: bool, elsewhere: bool) -> str:
    """Return the command of the study with these seeds. decides: whether it says that it decides after them.

    elsewhere: see `Plan`.
    """
    effects = effects_as_text(request.effect, request.effects)
    planned = [f"planned_seeds={len(seeds)}", f"planned_effect={_text(effects)}"]
    words = [*(planned if decides else []), f"seed={','.join(map(str, seeds))}"]
    return request.command(*words, *(_elsewhere(request, config, f"{_out(config)}_study") if elsewhere else []))


def _in_folder_of(cells: list[Cell], sources: Iterable[Source]) -> bool:
    """Return whether runs of these sources are in the folder of the cells, whose report would judge by them."""
    places = {Path(run).parent.resolve() for source in sources if source.here for run in source.runs["folder"]}
    return cells[0].folder.parent.resolve() in places


def pilot_command(request: Request, cells: list[Cell]) -> str:
    """Return the command of a pilot of three seeds, none of which the study has. It tunes nothing."""
    config = cells[0].config
    taken = {*config.tune_seeds, *(cell.config.seed for cell in cells)}
    seeds = seeds_after(0, taken, 3)
    words = ["tune=null"] if _tunes(request, config) else []
    words += [f"seed={','.join(map(str, seeds))}", *_elsewhere(request, config, "pilot")]
    return request.command(*words, without=["tune", "tune_seeds"])


def _elsewhere(request: Request, config: Config, folder: str) -> list[str]:
    """Return the words that put runs into a folder, where results that chose a value of them are not, but are found."""
    words = [f"out={_path(folder)}"]
    chosen = config.tune_seeds and not _tunes(request, config)
    return words + ([f"results={_path(config.results or _out(config))}"] if chosen else [])


def _tunes(request: Request, config: Config) -> bool:
    return config.tune is not None or "tune" in map(key_of, request.words)


def _out(config: Config) -> str:
    return config.out or "multirun"


def _path(folder: str) -> str:
    return quoted(folder) if "/" in folder else as_word(folder)


def _text(text: str) -> str:
    """Return a text as an override has it, in quotes if it is several words."""
    return quoted(text) if " " in text else text


def free_seeds(own: list[int], taken: set[int], wanted: int) -> list[int]:
    """Return so many seeds: the own ones, then those after the largest of them, and below it where these end.

    taken: seeds that judge nothing, because they choose or tell the spread. None of them is returned.
    """
    return [*(seed for seed in own if seed not in taken), *seeds_after(max(own), {*own, *taken}, wanted)][:wanted]


def _seeds_alone(request: Request, tests: int, effect: float) -> int | None:
    prediction = Prediction(0.0, float("inf"), effect, tests)
    return seeds_for(prediction, power_wanted=request.power, most=request.most)
