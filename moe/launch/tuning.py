"""Tune keys for each setting of a sweep on equal budgets: `tune` and `tune_seeds` of an experiment.

The same command has two stages. The first one trains each arm (a combination of the levels that the sweep has
otherwise) at each value of the tuned keys, with seeds of its own. The second one chooses the best value of each arm
by these runs, and trains the seeds of the sweep, which judge it. A run that two arms have in common, because the keys
that tell them apart do not apply to it, counts for both.

An experiment with `tune_seeds` alone tunes nothing: these seeds chose one of its values in an earlier experiment.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, islice
from math import inf, isfinite
from typing import Any, NamedTuple

from omegaconf import DictConfig

from moe.checks import ConfigError, require
from moe.config.cell import CHOOSES, Cell
from moe.config.keys import is_free
from moe.config.options import GROUPS
from moe.config.words import as_word
from moe.distributed import ranks
from moe.launch.cells import Start, combinations, expand_start
from moe.launch.compose import compose_config
from moe.launch.explain import explain
from moe.launch.grids import with_part
from moe.launch.hydra_errors import FAULTS
from moe.launch.overrides import DEFAULTS, is_group, lines_of, parse_override, values_of
from moe.launch.search import objective
from moe.runs.folder import diverged, finished

log = logging.getLogger(__name__)
KEYS = ("tune", "tune_seeds")
SEEDS = ("seed", "init_seed", "data_seed")
SEED_LIMIT = 2**32
GOAL = f"minimize {CHOOSES}"


class Tuning(NamedTuple):
    """What a command tunes: its keys, the values of each, and the seeds that choose among them."""

    values: dict[str, list[int | float]]
    seeds: list[int]

    @classmethod
    def of(cls, start: Start) -> "Tuning | None":
        """Return the checked `tune` and `tune_seeds` of a command; None if it tunes nothing."""
        given = [o for o in start.own if o.key_or_group in KEYS]
        base = start.base
        if given:
            swept = next((o for o in given if o.is_sweep_override()), None)
            if swept is not None:
                raise ConfigError(f"{swept.input_line}: a command tunes once; write [a,b] for several values")
            groups = [o for o in start.own if is_group(o) and not o.is_sweep_override()]
            base = compose_config(lines_of([*start.launch, *groups, *given]))
        if start.base.tune is None:
            _check_apart(start, seeds_that_choose(start.base, start))
        seeds = seeds_that_choose(base, start)
        if base.tune is None:
            useless = seeds and given and all(o.key_or_group != "tune" for o in given)
            require(not useless, "tune_seeds", seeds, "left out without tune")
            return None
        require(start.multirun, "tune", "{...}", "null, or used in a sweep: add -m")
        tuning = cls(_values(base.tune), seeds)
        tuning._check(start)
        return tuning

    def _check(self, start: Start) -> None:
        """Raise ConfigError for a tuned key that the command sets too, and for seeds that both choose and judge."""
        words = [*start.presets, *start.own]
        for override in words:
            if override.key_or_group in self.values:
                raise ConfigError(f"{override.input_line}: this key is tuned; leave it out, or add tune=null")
        _check_one_seed(start, "null with tune, because both stages would share it")
        judging = seeds_of(start)
        allowed = f"one or more different seeds >= 0 that are not those of the sweep, which are {', '.join(judging)}"
        ok = self.seeds and len({*self.seeds}) == len(self.seeds) and not {*self.seeds} & {*_numbers(judging)}
        require(bool(ok), "tune_seeds", self.seeds, allowed)

    def trials(self, start: Start) -> Start:
        """Return the start of the first stage: every value of the tuned keys with the seeds for tuning."""
        swept = {key: list(map(as_word, values)) for key, values in self.values.items()}
        swept["seed"] = list(map(str, self.seeds))
        words = [parse_override(f"{key}={','.join(values)}") for key, values in swept.items()]
        return start._replace(own=[*(o for o in start.own if o.key_or_group != "seed"), *words])

    def arm(self, arguments: Iterable[str]) -> frozenset[str]:
        """Return the overrides of a cell without seed, tuned keys and folder: what its arm is."""
        others = {"seed", "hydra.sweep.subdir", *self.values}
        return frozenset(line for line in arguments if line.partition("=")[0] not in others and line not in DEFAULTS)

    def word(self, key: str, value: float) -> str:
        """Return a value of a key as the experiment writes it, such as 1 for 1.0."""
        return next(as_word(each) for each in self.values[key] if each == value)

    def __str__(self) -> str:
        keys = "; ".join(f"{key} over {', '.join(map(as_word, values))}" for key, values in self.values.items())
        return f"{keys} (seeds {', '.join(map(str, self.seeds))})"

    def named(self, cells: list[Cell], text: str, search: str | None) -> list[Cell]:
        """Return the cells of a stage with a grid that the tuning tells from others. search: see `Grid`."""
        assert cells[0].grid is not None
        settings = {"tune": self.values, "tune_seeds": self.seeds}
        grid = with_part(cells[0].grid, f"{text} {self}", settings)._replace(search=search)
        return [cell._replace(grid=grid) for cell in cells]


def expand_tuned(start: Start) -> tuple[list[Cell], list[str]]:
    """Return what `expand` returns: the cells of the stage that comes next, if the command tunes."""
    tuning = Tuning.of(start)
    if tuning is None:
        return expand_start(start)
    trials, arguments = expand_start(tuning.trials(start), merge=False)
    if not all(finished(cell) or diverged(cell) for cell in trials):
        _say(f"stage 1 of 2: {len(trials)} runs tune {tuning}")
        return tuning.named(trials, "tuning", GOAL), arguments
    best = chosen_values(tuning, trials)

    def with_chosen(grid: list[list[str]]) -> list[list[str]]:
        """Add its chosen values to each cell."""
        return [[*cell, *best[tuning.arm(cell)]] for cell in grid]

    # in_vain: a key may apply to none of the chosen values. Stage 1 has checked that it applies to others.
    cells, arguments = expand_start(start, chosen=with_chosen, merge=False, in_vain=True)
    _say(f"stage 2 of 2: {len(cells)} runs with other seeds judge the chosen values")
    return tuning.named(cells, "tuned", None), arguments


def chosen_values(tuning: Tuning, trials: Sequence[Cell]) -> dict[frozenset[str], list[str]]:
    """Return for each arm the overrides with its best values, and print them.

    Those with the lowest mean over the seeds are the best; of equal ones the smaller. Values with a run that diverged
    are not chosen. Raises ConfigError if these are all values of an arm.
    """
    arms: dict[frozenset[str], dict[tuple[float, ...], list[Cell]]] = {}
    for cell in trials:
        identity = cell.identity()
        levels = tuple(float(identity.get(key, inf)) for key in tuning.values)  # inf: the arm ignores the key
        for arm in dict.fromkeys(map(tuning.arm, (cell.overrides, *cell.twins))):
            arms.setdefault(arm, {}).setdefault(levels, []).append(cell)
    common = frozenset.intersection(*arms)
    best = {}
    for arm, by_levels in arms.items():
        name = ", ".join(sorted(arm - common)) or "all runs"
        means = {levels: objective(cells, CHOOSES) for levels, cells in by_levels.items()}
        known = {levels: mean for levels, mean in means.items() if mean is not None}
        if not known:
            raise ConfigError(f"tune: {name} diverged at each value of {', '.join(tuning.values)}; give other values")
        levels = min(known, key=lambda each: (known[each], each))
        chosen = {key: level for key, level in zip(tuning.values, levels, strict=True) if level < inf}
        best[arm] = [f"{key}={tuning.word(key, level)}" for key, level in chosen.items()]
        _say(f"{name}: {', '.join(best[arm]) or 'no tuned key applies'}, mean {CHOOSES} {known[levels]:.6g}")
        for key, level in chosen.items():
            if level in (tuning.values[key][0], tuning.values[key][-1]):
                log.warning("%s: the best %s is at the end of its list; a better one may lie beyond", name, key)
    return best


def seeds_after(last: int, taken: Iterable[int], number: int) -> list[int]:
    """Return the next so many seeds after `last` that are not taken; where seeds end, they begin again at 0."""
    known = {*taken}
    after = (seed % SEED_LIMIT for seed in count(last + 1))
    return [*islice((seed for seed in after if seed not in known), number)]


def seeds_that_choose(base: DictConfig, start: Start) -> list[int]:
    """Return `tune_seeds`, which an experiment may read from the results of another one."""
    try:
        return list(base.tune_seeds)
    except FAULTS as error:
        raise explain(error, lines_of(start.own)) from None


def seeds_of(start: Start) -> list[str]:
    """Return the seeds of a sweep as the command or its experiment writes them."""
    words = [*start.presets, *start.own]
    return next((values_of(o) for o in reversed(words) if o.key_or_group == "seed"), [str(start.base.seed)])


def _check_one_seed(start: Start, allowed: str) -> None:
    """Raise ConfigError unless the seed alone decides initial weights, order of the data and noise."""
    words = [*start.presets, *start.own]
    for name in SEEDS[1:]:
        given = next((values_of(o) for o in reversed(words) if o.key_or_group == name), None)
        values = [as_word(start.base[name])] if given is None else given
        require(values == ["null"], name, ",".join(values), allowed)


def _numbers(seeds: Iterable[str]) -> list[int]:
    return [int(each.strip("'\"")) for each in seeds if each.strip("'\"").isdecimal()]  # 042 is 42


def _check_apart(start: Start, seeds: list[int]) -> None:
    """Raise ConfigError for seeds of a sweep that chose one of its values in an earlier experiment.

    seeds: those that chose. A part of what a seed decides could be that of a seed that chose, so it has no own key.
    """
    if not seeds:
        return
    _check_one_seed(start, "null, because seeds chose a value of this experiment, and this key could bring them back")
    judging = _numbers(seeds_of(start))
    both = sorted({*judging} & {*seeds})
    free = seeds_after(max([*judging, *seeds], default=0), (), len(judging))
    chose, named, others = (", ".join(map(str, each)) for each in (sorted({*seeds}), both, free))
    allowed = f"seeds that chose no value of this experiment, as {chose} did; the next free ones are {others}"
    require(not both, "seed", named, allowed)


def _say(line: str) -> None:
    if ranks.is_first():
        print(line, flush=True)


def runs_of(start: Start) -> list[list[str]]:
    """Return the overrides of all runs that a command spans, those for tuning included."""
    tuning = Tuning.of(start)
    stages = [start] if tuning is None else [tuning.trials(start), start]
    return [cell for each in stages for cell in combinations([*each.presets, *each.own])]


def _values(tune: Any) -> dict[str, list[int | float]]:
    """Return the checked values of each tuned key."""
    allowed = "keys with lists of two or more different numbers, such as {optimizer.muon_lr: [0.01, 0.02]}, or null"
    require(isinstance(tune, Mapping) and len(tune) > 0, "tune", tune, allowed)
    found: dict[str, list[int | float]] = {}
    for key, values in tune.items():
        place = f"tune: {key}"
        of_run = key not in SEEDS and key not in GROUPS and not is_free(str(key))
        require(of_run, place, values, "a key of a run, not a seed")
        listed = isinstance(values, Sequence) and not isinstance(values, str)
        numbers = [each for each in values if type(each) in (int, float) and isfinite(each)] if listed else []
        ok = listed and len(numbers) == len(values) == len({*numbers}) >= 2
        require(ok, place, values, "a list of two or more different finite numbers")
        found[str(key)] = sorted(numbers)
    return found
