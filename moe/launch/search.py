"""Search for good settings with Optuna: `python train.py -m hydra/sweeper=optuna lb=interval(0,0.1) seed=1,2`.

A trial is a small sweep: its settings with all seeds of the command. Trials are stored as run folders alone. The same
command again reads the objectives of finished trials from there, so that Optuna proposes the same settings again.
"""

import importlib.util
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any, NamedTuple, cast

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from moe.checks import ConfigError, finite, one_of, require
from moe.config.cell import Cell, Grid
from moe.config.schema import allowed_values
from moe.distributed import ranks
from moe.files import shown
from moe.launch import sweep
from moe.launch.cells import Start, expand, keys_of_options, lacking
from moe.launch.claims import check_metric
from moe.launch.compose import composing
from moe.launch.overrides import (
    MOST_CELLS,
    SWEEPERS,
    check_number,
    lines_of,
    misfit,
    parse_override,
    values_of,
)
from moe.runs.folder import status
from moe.runs.record import MetricsRecord, SweepRecord

CHOSEN = "hydra/sweeper=optuna"
MOST_CHECKED = 256  # combinations of settings that are checked before any training; of more, only those of `ends`
STOPPED = "the search was stopped; the same command continues it"
CHOSEN_BY_RESULT = "It was chosen by this result, which is therefore too good on average: confirm it with other seeds."


class Dimension(NamedTuple):
    """A key that is searched. values: its levels as words, in order if `ordered`; without them, an interval."""

    key: str
    values: list[str]
    ordered: bool = False
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Any) -> str:
        """Return the level that Optuna proposes for a trial. Numbers have six digits, so that folders have names."""
        if self.values and not self.ordered:
            return str(trial.suggest_categorical(self.key, self.values))
        if self.ordered:
            return self.values[trial.suggest_int(self.key, 0, len(self.values) - 1)]
        if self.whole:
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log))
        value = float(f"{trial.suggest_float(self.key, self.low, self.high, log=self.log):.6g}")
        return repr(min(max(value, self.low), self.high))

    def levels(self) -> list[str]:
        """Return all levels that a trial can have, or of an interval of real numbers both ends."""
        if self.values or not self.whole:
            return self.values or self.ends()
        return [str(number) for number in range(int(self.low), int(self.high) + 1)]

    def number(self) -> int:
        """Return how many `levels` there are, without listing them."""
        return len(self.values) or (int(self.high) - int(self.low) + 1 if self.whole else 2)

    def ends(self) -> list[str]:
        """Return all choices, or both ends of an interval or a range."""
        if self.values:
            return list(dict.fromkeys((self.values[0], self.values[-1]))) if self.ordered else self.values
        return [str(int(end)) if self.whole else repr(end) for end in (self.low, self.high)]


class SearchSettings(NamedTuple):
    """Settings of `hydra.sweeper`, see conf/hydra/sweeper/optuna.yaml. sampler: a class of optuna.samplers."""

    n_trials: int
    n_jobs: int
    direction: str
    metric: str
    sampler: str
    seed: int


class Search(NamedTuple):
    """A checked search.

    fixed: the overrides that all trials have, with the list of seeds. grid: what the search varies, without cells.
    keys: those of all its options. A trial goes without the keys that its own options lack. folder: the sweep folder,
    where the trials are stored.
    """

    settings: SearchSettings
    dimensions: list[Dimension]
    fixed: list[Override]
    grid: Grid
    keys: frozenset[str]
    folder: Path

    def run_folders(self) -> list[Path]:
        """Return the folders of all runs of this search so far, also of those that an earlier command trained."""
        path = self.folder / SweepRecord.FILE
        given = {o.get_key_element() for o in self.fixed} | {dimension.key for dimension in self.dimensions}
        grid = SweepRecord.read(path).extended_by(self.grid, given) if path.exists() else None
        return [self.folder / name for name in grid.cells] if grid else []


def is_search(overrides: Sequence[Override]) -> bool:
    """Return whether a command chooses Optuna's sweeper. Raises ConfigError for a sweeper that does not exist."""
    chosen = [str(o.value()) for o in overrides if o.key_or_group == "hydra/sweeper"]
    for name in chosen:
        one_of("hydra/sweeper", name, SWEEPERS["hydra/sweeper"])
    return "optuna" in chosen


def read_search(overrides: list[Override], *, multirun: bool) -> Search:
    """Return the checked search that a command asks for.

    All combinations of `Dimension.levels` are checked, as the cells of a sweep are. If they are more than
    `MOST_CHECKED`, all combinations of `Dimension.ends` are.
    """
    for override in overrides:
        check_number([override])
    launch, own, base, multirun, presets = Start.of(overrides, multirun=multirun)
    require(multirun, "hydra/sweeper", "optuna", "used with -m, because it trains many runs")
    require(ranks.world_size() == 1, "hydra/sweeper", "optuna", "used in a single process: leave the launcher out")
    given = {o.get_key_element() for o in own}
    words = [*(o for o in presets if o.get_key_element() not in given), *own]
    searched = [o for o in words if o.is_sweep_override() and o.key_or_group != "seed"]
    if not searched:
        raise ConfigError(f"{CHOSEN}: needs a key to search, such as lb=interval(0,0.1)")
    dimensions = [_dimension(o, base) for o in searched]
    seeds = [value for o in words if o.key_or_group == "seed" for value in _seeds(o)]
    settings = _settings(base.hydra.sweeper, seeds=max(1, len(seeds)))
    others = [o for o in launch if not str(o.key_or_group).startswith(("hydra/sweeper", "hydra.sweeper"))]
    fixed = [parse_override("hydra/sweeper=basic"), *others, *(o for o in words if o not in searched)]
    checked = [o for o in fixed if o.key_or_group != "seed"]
    few = math.prod(dimension.number() for dimension in dimensions) <= MOST_CHECKED
    for each in dimensions:  # with one seed, which is enough to check the settings
        checked.append(parse_override(f"{each.key}={','.join(each.levels() if few else each.ends())}"))
    cells, _ = expand(checked, multirun=True, planned=False)
    check_metric("hydra.sweeper.metric", settings.metric, cells)
    if cells[0].config.claims:
        raise ConfigError(f"{CHOSEN}: claims judge a planned grid, and a search chooses its settings; add claims=[]")
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(f"{CHOSEN}: needs `pip install -e '.[optuna]'`")
    assert cells[0].grid is not None
    purpose = f"{settings.direction} {settings.metric}"
    grid = cells[0].grid._replace(cells=[], search=purpose, name=f"{cells[0].grid.name}: {purpose}")
    keys = frozenset[str]().union(*(keys_of_options(cell.overrides) for cell in cells))
    search = Search(settings, dimensions, fixed, grid, keys, cells[0].folder.parent)
    _trial_cells(search, _trial_words(search, {each.key: each.ends()[0] for each in dimensions}))  # refuses wrong seeds
    return search


def carry_out(search: Search, launch: Callable[[list[Cell], list[str]], object]) -> int:
    """Train all trials, report the best one, and return the exit status, as `sweep.carry_out` does.

    launch: trains these cells, given what Hydra needs for it.
    """
    with _stop_told():
        return _carry_out(search, launch)


@contextmanager
def _stop_told() -> Iterator[None]:
    """Print that Ctrl-C stopped the search, whether it stops a run or comes between two runs."""

    def stop(number: int, frame: FrameType | None) -> None:
        print(STOPPED, flush=True)
        signal.signal(number, before)
        signal.raise_signal(number)

    before = signal.signal(signal.SIGINT, stop)  # a run has a handler of its own, and then exits
    try:
        yield
    except SystemExit:
        print(STOPPED, flush=True)
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _carry_out(search: Search, launch: Callable[[list[Cell], list[str]], object]) -> int:
    import optuna

    from moe.results import sweep_tables

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = search.settings
    sampler = getattr(optuna.samplers, settings.sampler)(seed=settings.seed)
    study = optuna.create_study(direction=cast(Any, settings.direction), sampler=sampler)
    results: dict[str, float] = {}
    failed, folder = 0, None
    while (first := len(study.trials)) < settings.n_trials:
        trials = [study.ask() for _ in range(min(settings.n_jobs, settings.n_trials - first))]
        members: dict[int, list[Cell]] = {}
        names: dict[int, str] = {}
        arguments: list[str] = []
        for trial in trials:
            levels = {each.key: each.suggest(trial) for each in search.dimensions}
            with composing():
                words = _trial_words(search, levels)
            refusal = None
            try:
                with composing():
                    members[trial.number], arguments = _trial_cells(search, words)
            except ConfigError as error:  # a value between the ends is not allowed, or not with the others
                members[trial.number], failed, refusal = [], 1, error
            ignored = [cell.ignored for cell in members[trial.number]]
            useless = frozenset.intersection(*ignored) if ignored else frozenset[str]()
            searched = [word for word in words if word.get_key_element() in levels and word.key_or_group not in useless]
            names[trial.number] = " ".join(str(word.input_line).lstrip("+") for word in searched)
            print(f"trial {trial.number + 1} of {settings.n_trials}: {names[trial.number]}", flush=True)
            if refusal is not None:
                print(f"trial {trial.number + 1}: {refusal}", flush=True)
        cells = list({cell.folder: cell for each in members.values() for cell in each}.values())
        if cells:
            folder = cells[0].folder.parent
            code = sweep.carry_out(cells, partial(launch, cells, arguments), tables=False)
            if any(status(cell) == "interrupted" for cell in cells):  # by a signal that reached its process alone
                print(STOPPED, flush=True)
                return code
            if code == 2:  # the next trial would end like this
                return code
            failed = max(failed, code)
        for trial in trials:
            name, value = names[trial.number], objective(members[trial.number], settings.metric)
            if value is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                print(f"trial {trial.number + 1}: no {settings.metric}; the search goes on without it", flush=True)
            else:
                study.tell(trial, value)
                results[name] = value
                print(f"trial {trial.number + 1}: {settings.metric} {value:.6g}", flush=True)
    if folder is None:  # no trial has settings that are allowed
        return 2
    runs = sweep_tables.write_sweep_tables(folder)
    print(f"\n{sweep_tables.console_table(runs[runs['experiment'] == search.grid.name])}\n")
    if results:
        best = (min if settings.direction == "minimize" else max)(results, key=results.__getitem__)
        print(f"best of {settings.n_trials} trials: {best}, {settings.metric} {results[best]:.6g}. {CHOSEN_BY_RESULT}")
    print(f"table: {shown(folder / 'results.csv')}; {sweep.next_step(folder)}")
    return failed


def _trial_words(search: Search, levels: dict[str, str]) -> list[Override]:
    """Return the overrides of a trial, without keys that its options lack, as router.temp of a router without one."""
    words = [*search.fixed, *(parse_override(f"{key}={value}") for key, value in levels.items())]
    missing = lacking(lines_of(words), search.keys)
    return [word for word in words if word.key_or_group not in missing]


def _trial_cells(search: Search, words: list[Override]) -> tuple[list[Cell], list[str]]:
    """Return the cells of a trial, one for each seed, and what Hydra needs to launch them.

    The words contain the experiment's own grid already (`planned`). A key may apply to no cell (`in_vain`), because the
    search chose it, and not the user.
    """
    cells, arguments = expand(words, multirun=True, planned=False, in_vain=True)
    grid = search.grid._replace(cells=[cell.folder.name for cell in cells])
    return [cell._replace(grid=grid) for cell in cells], arguments


def objective(cells: list[Cell], metric: str) -> float | None:
    """Return the mean of a metric over the runs of a trial; None unless there are some and all have a finite value."""
    values: list[float] = []
    for cell in cells:
        if status(cell) != "finished":
            return None
        value = MetricsRecord.read(cell.folder / MetricsRecord.FILE).scalars().get(metric)
        if value is None or not math.isfinite(value):
            return None
        values.append(value)
    return fmean(values) if values else None


def _dimension(override: Override, base: DictConfig) -> Dimension:
    """Return what a swept override says about its key."""
    line, key, value = override.input_line, override.get_key_element(), override.value()
    if getattr(value, "shuffle", False):
        raise ConfigError(f"{line}: leave shuffle out, because Optuna chooses the order")
    tags: set[str] = getattr(value, "tags", set())
    if tags - ({"log"} if isinstance(value, IntervalSweep) else set()):
        raise ConfigError(f"{line}: only an interval can have a tag, as tag(log,interval(0.001,1))")
    if not isinstance(value, IntervalSweep):
        values = values_of(override)
        return Dimension(key, values, ordered=isinstance(value, RangeSweep))
    low, high = value.start, value.end
    assert low is not None
    assert high is not None
    allowed = "two finite numbers, the smaller one first" + (", both > 0 with log" if "log" in tags else "")
    ok = finite(low) and finite(high) and low < high and (low > 0 or "log" not in tags)
    require(ok, key, str(line).partition("=")[2], allowed)
    if allowed_values(override.key_or_group) is not None:
        whole = misfit(override.key_or_group, 0.5) is not None
    else:
        now = OmegaConf.select(base, override.key_or_group, default=None)
        whole = isinstance(now, int) and not isinstance(now, bool)
    whole = (whole or (type(low) is int and type(high) is int)) and low == int(low) and high == int(high)
    return Dimension(key, [], low=low, high=high, log="log" in tags, whole=whole)


def _seeds(override: Override) -> list[str]:
    if isinstance(override.value(), IntervalSweep):
        raise ConfigError(f"{override.input_line}: list the seeds; a trial trains all, and its objective is their mean")
    return values_of(override)


def _settings(sweeper: DictConfig, *, seeds: int) -> SearchSettings:
    """Return the settings of `hydra.sweeper`. Raises ConfigError for a value that is not allowed."""
    place = "hydra.sweeper"
    most = MOST_CELLS // seeds
    for key, limit in (("n_trials", most), ("n_jobs", most)):
        value = sweeper[key]
        ok = type(value) is int and 1 <= value <= limit
        require(ok, f"{place}.{key}", value, f"a whole number from 1 to {limit:,}")
    one_of(f"{place}.direction", str(sweeper.direction), ("minimize", "maximize"))
    seed = sweeper.sampler.seed
    require(type(seed) is int and 0 <= seed < 2**32, f"{place}.sampler.seed", seed, "between 0 and 2^32 - 1")
    name = str(sweeper.sampler["_target_"]).rpartition(".")[2]
    return SearchSettings(sweeper.n_trials, sweeper.n_jobs, sweeper.direction, str(sweeper.metric), name, seed)
