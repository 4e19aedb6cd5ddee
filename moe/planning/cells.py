"""The runs of a planned experiment. One seed of each setting is composed, which takes long; the others are copies.

So the seed alone must tell the runs of a setting apart. Where a command gives `init_seed` or `data_seed`, all runs are
composed and checked.
"""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

from moe.checks import ConfigError, require
from moe.config.cell import Cell
from moe.config.claim import ClaimConfig, amount_of
from moe.config.words import as_word, with_words
from moe.launch.cells import Start
from moe.launch.command_line import read_command
from moe.launch.tuning import SEEDS, Tuning, seeds_of, seeds_that_choose
from moe.planning.plan import Request, free_seeds

WITHOUT_CLAIMS = """\
experiment={}: has no claims, and a plan counts the seeds that claims need; write claims first (docs/reports.md), or \
see its runs, tokens and FLOPs with `python train.py --list`"""


def planned_cells(request: Request) -> tuple[list[Cell], list[Cell]]:
    """Return the cells of the experiment with its own seeds, and the runs that tune, unless all have ended.

    The cells have the usual values of the tuned keys, because the best ones are not known yet. Seeds that chose a value
    of the experiment give way to others. Raises ConfigError for an experiment that cannot be planned.
    """
    cells = _composed(request.words)
    trials, tune = list[Cell](), cells[0].config.tune if cells else None
    if tune:
        trials = cells if _tunes(cells) else []
        cells = _composed(with_words(request.words, "tune=null"))
    require(bool(cells), "experiment", None, "a grid of runs; a search for good settings has no claims to plan for")
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


def _composed(words: Sequence[str], *, every_trial: bool = False) -> list[Cell]:
    """Return the cells of a command: the runs that tune, unless all have ended, and otherwise those of its own seeds.

    every_trial: whether the runs of each seed that tunes are composed, to know whether they have ended.
    """
    seeds: list[int] = []
    tuning: Tuning | None = None

    def prepare(start: Start) -> Start:
        nonlocal tuning
        _check_has_claims(start)
        of_one_seed, own = _of_one_seed(start)
        tuning = Tuning.of(of_one_seed)
        if tuning is None:
            seeds.extend(own)
            return of_one_seed
        if every_trial:
            return start
        seeds.extend(tuning.seeds)
        return start.replacing(f"tune_seeds=[{tuning.seeds[0]}]")

    with redirect_stdout(StringIO()):  # the next stage of a command that tunes is no news here
        cells = read_command(["-m", *words], prepare=prepare).cells
    assert cells is not None
    if tuning and not every_trial and not _tunes(cells):  # the trials of the first seed have ended
        return _composed(words, every_trial=True)
    return [_copy(cell, seed) for cell in cells for seed in seeds or [cell.config.seed]]


def _tunes(cells: list[Cell]) -> bool:
    """Return whether these are the runs that tune."""
    return cells[0].grid is not None and cells[0].grid.search is not None


def _of_one_seed(start: Start) -> tuple[Start, list[int]]:
    """Return a start with the first of its seeds alone, and all of them; as it is, and none, if the seed is not alone.

    Seeds that chose a value of the experiment give way to free ones.
    """
    words = [*start.presets, *start.own]
    others = any(o.key_or_group in SEEDS[1:] for o in words) or any(start.base[key] is not None for key in SEEDS[1:])
    texts = seeds_of(start)
    if others or not all(text.isdecimal() for text in texts):
        return start, []
    own = [*map(int, texts)]
    seeds = free_seeds(own, {*seeds_that_choose(start.base, start)}, len(own))
    return start.replacing(f"seed={seeds[0]}"), seeds


def _copy(cell: Cell, seed: int) -> Cell:
    """Return the cell of another seed. Its folder is not that of the run, but one of its own beside."""
    if seed == cell.config.seed:
        return cell
    return cell._replace(
        config=replace(cell.config, seed=seed), folder=cell.folder.with_name(f"{cell.folder.name},seed {seed}")
    )


def _check_has_claims(start: Start) -> None:
    """Raise ConfigError for an experiment without claims."""
    given = [o.value() for o in start.own if o.key_or_group == "claims"]
    if not (given[-1] if given else start.base.claims):
        raise ConfigError(WITHOUT_CLAIMS.format(start.base.hydra.runtime.choices["experiment"]))


def _check_fall(request: Request, claim: ClaimConfig) -> None:
    """Raise ConfigError if an effect is all of the mean or more, and a claim without a range says that it falls."""
    falls = claim.kind in ("lower", "lowest") or (claim.kind == "mixed" and claim.direction == "lower")
    if not falls or claim.size:
        return
    own, effect = request.effects.get(claim.metric), request.effect_on(claim.metric)
    text = effect.text if effect else ""
    allowed = f"below 100%: “{claim.text}” claims a fall of {claim.metric}"
    possible = not text.endswith("%") or amount_of(text).share < 1
    require(possible, f"--effect {claim.metric}" if own else "effect", text, allowed)
