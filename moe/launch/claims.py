"""Check planned claims against the runs of a command: no sweep is trained for a claim that nothing can judge.

Only commands with claims import the catalog of metrics, and NumPy with it, and only those with claims about domains
import the sources of text, because every command should start fast.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from moe.checks import ConfigError, printable, require, unknown
from moe.config import run_routers
from moe.config.cell import Cell
from moe.config.claim import DOMAIN, ClaimConfig
from moe.config.classes import build
from moe.config.keys import OFF
from moe.config.layer_experts import KEY as EXPERTS_BY_LAYER
from moe.config.options import GROUPS, options, sources
from moe.config.question import parts_of
from moe.config.words import as_word
from moe.launch.option_files import read_option
from moe.launch.overrides import values
from moe.runs.events import LAST, LAST_MEAN

LEFT_OUT = "no run of this command has %s, so its runs alone cannot test this claim: %s"
log = logging.getLogger(__name__)


def check_claims(cells: Sequence[Cell], grid: Iterable[Override], *, sweep: bool) -> None:
    """Raise ConfigError for a claim whose metric no run of a level will have, or whose factor or level is in no run.

    grid: the overrides that span the experiment's own grid, of which the command may train a part. A level that only
    the runs left out have is warned of. Without `sweep`, the command trains one of the runs that a claim is about; then
    only its kind of level is known.
    """
    from moe.metrics.catalog import without_limit

    leaves = [_factors(cell) for cell in cells]
    for number, claim in enumerate(cells[0].config.claims):
        key = f"claims[{number}]"
        _check_metric(f"{key}.metric", claim, cells)
        # Tables give these metrics to runs without a limit too.
        known_without_limit = without_limit(claim.metric) is not None
        for factor, named in claim.compared_levels.items():
            place = key if factor == claim.factor else f"{key}.within"
            known = [each[factor] for each in leaves if factor in each]
            if not sweep:
                _check_kind(f"{place}.{factor}", factor, named, known)
                continue
            if not known:
                raise unknown(f"factor of {key}", factor, {name for each in leaves for name in each})
            known += [value for override in grid if override.key_or_group == factor for value in values(override)]
            known = [value for number, value in enumerate(known) if value not in known[:number]]
            listed = ", ".join("null" if value is None else str(value) for value in known)
            for level in named:
                require(level in known, f"{place}: {factor}", level, f"a level of this sweep: {listed}")
                here = [cell for cell, each in zip(cells, leaves, strict=True) if (factor, level) in each.items()]
                if here and not known_without_limit:  # no runs: in a part of the grid that this command does not train
                    _check_metric(f"{key}.metric", claim, here)
            require(len(known) > 1, f"{place}.factor", factor, f"a factor that varies; {factor} is always {listed}")
            if factor == claim.factor and claim.kind in ("highest", "lowest"):
                some = any(value not in named for value in known)
                require(some, f"{key}.levels", named, f"a part of the levels of this sweep, which are {listed}")
        if sweep:
            _check_applies(f"{key}.within", claim, [cell for cell in cells if _is_within(cell, claim)])
            if left_out := _left_out(claim, leaves):
                log.warning(LEFT_OUT, ", ".join(left_out), printable(claim.text))


def check_question(cell: Cell, own: Iterable[Override]) -> None:
    """Raise ConfigError for a part of the question that names no claim. own: the overrides of the command.

    A command that replaces claims alone may lack some of those that the experiment's question names. An experiment may
    build on another one whose question names none of its claims: see `applicable`.
    """
    given = {override.key_or_group.partition(".")[0] for override in own}
    if "claims" in given and "question" not in given:
        return
    texts = [claim.text for claim in cell.config.claims]
    named = [(number, text) for number, part in enumerate(parts_of(cell.config.question)) for text in part.claims]
    lacking = [(number, text) for number, text in named if text not in texts]
    origin, inherited = _origin(cell.experiment, given)
    if lacking and not (inherited and lacking == named):
        number, text = lacking[0]
        error = unknown(f"claim of question[{number}]", text, texts)
        raise ConfigError(f"{error}; the question is from {origin}: set question to one about these claims")


def _origin(experiment: str, given: set[str]) -> tuple[str, bool]:
    """Return where the question of an experiment is from, and whether that is another experiment.

    given: the keys of the command.
    """
    file = sources("experiment").get(experiment)
    if "question" in given or file is None:
        return "this command", False
    inherited = "question" not in read_option(file)
    return f"what {file} builds on" if inherited else str(file), inherited


def _left_out(claim: ClaimConfig, leaves: Sequence[dict[str, Any]]) -> list[str]:
    """Return the levels that a claim compares and that no run of the command has."""
    trained = {factor: [each[factor] for each in leaves if factor in each] for factor in claim.compared_levels}
    lacking = [
        f"{factor}={as_word(level)}"
        for factor, named in claim.compared_levels.items()
        for level in named
        if level not in trained[factor]
    ]
    alone = not claim.than and all(level in claim.levels for level in trained[claim.factor])
    return lacking + ([f"another level of {claim.factor}"] if alone else [])


def _check_metric(key: str, claim: ClaimConfig, cells: Sequence[Cell]) -> None:
    from moe.metrics.catalog import METRICS, lookup

    domains = claim.within.get(DOMAIN, [])
    names = [claim.metric, *(f"{claim.metric}/{domain}" for domain in domains)]
    for name in names:
        check_metric(key, name, cells)
    kind = METRICS.get(claim.metric)
    if claim.at is not None:
        allowed = f"a metric of evaluations, such as val/loss, with at={claim.at}"
        of_variant = lookup(claim.metric)
        early = of_variant is not None and "evaluation" in of_variant.written
        require(early, key, claim.metric, allowed)
    allowed = f"left out: {claim.metric} has no values of single domains"
    by_domain = kind is not None and "<domain>" in kind.variants
    require(not domains or by_domain, f"{key.rpartition('.')[0]}.within.{DOMAIN}", domains, allowed)


def check_metric(key: str, name: str, cells: Sequence[Cell]) -> None:
    """Raise ConfigError if the value of `key` names a metric that no run will have."""
    from moe.metrics.catalog import final_metrics, lookup
    from moe.metrics.metric import NULL_POOLED

    metric = lookup(name)
    if metric is None or not metric.final:
        raise unknown(f"metric of {key.rpartition('.')[0]}", name, final_metrics())
    if name.startswith("routing/"):
        most = max(cell.config.model.layers - cell.config.model.first_k_dense_replace for cell in cells)
        require(most > 0, key, name, "a metric of these runs, which have no layer with experts")
        if layer := re.search(r"/layer([0-9]+)$", name):
            known = [f"layer{number:02d}" for number in range(most)]
            allowed = f"of one of the {most} layers with experts, {known[0]} to {known[-1]}"
            require(f"layer{layer[1]}" in known, key, name, allowed)
        if name.endswith("/pooled"):
            models = [cell.config.model for cell in cells if not cell.config.is_dense]
            allowed = f"another metric: it is {NULL_POOLED}, as with {EXPERTS_BY_LAYER}={models[0].experts_by_layer}"
            require(any(len({*model.experts_of_layers}) == 1 for model in models), key, name, allowed)
    if name.startswith("val_capacity/"):
        limited = any(cell.config.capacity is not None for cell in cells)
        require(limited, key, name, "a metric of these runs; without capacity=... there is no val_capacity")
    usage = name.startswith("routing/capacity_usage")
    require(not usage, key, name, "another metric: this one is null in evaluations, which have no capacity limit")
    if name == LAST_MEAN:
        most = max(1 + (cell.config.steps - 1) // cell.config.eval_every for cell in cells)
        allowed = f"another metric: it is {metric.when_null}, and these runs have {most}"
        require(most >= LAST, key, name, allowed)
    base, _, domain = name.rpartition("/")
    if name.startswith("test/"):
        tested = any(cell.config.data.test_percent for cell in cells)
        require(tested, key, name, "a metric of these runs; with data.test_percent=0 there is no test")
    if base.startswith(("val/", "test/")):
        known = [d for cell in cells for d in _domains(cell)]
        require(not known or domain in known, key, name, f"of one of the domains {', '.join(dict.fromkeys(known))}")


def _is_within(cell: Cell, claim: ClaimConfig) -> bool:
    factors = _factors(cell)
    return all(factors.get(factor) in levels for factor, levels in claim.within.items() if factor != DOMAIN)


def _check_applies(key: str, claim: ClaimConfig, members: Sequence[Cell]) -> None:
    """Raise ConfigError if a claim is about a key that all its runs ignore, such as noise with a hash router."""
    if claim.factor in OFF and claim.within and members:
        applies = any(claim.factor not in run_routers.ignored_keys(cell.config) for cell in members)
        require(applies, key, claim.within, f"levels at which {claim.factor} changes something")


def _domains(cell: Cell) -> list[str]:
    """Return the names that a domain of the text can have; empty if only the text itself tells."""
    from moe.data import embedded

    source = build(cell.config.data.source, "data.source", trusted=True)
    return list(embedded.DOMAINS) if isinstance(source, embedded.Embedded) else []


def _check_kind(key: str, factor: str, named: list[Any], known: list[Any]) -> None:
    """Raise ConfigError for a level that a factor cannot have, such as a text where this run has a number.

    named: the levels in the claim. known: the level of this run, if it has the factor.
    """
    for level in named:
        if factor in GROUPS:
            if level not in options(factor):
                raise unknown(f"option of {factor} in {key}", str(level), options(factor))
        elif known and None not in (level, known[0]):
            kinds = [float if type(value) is int else type(value) for value in (level, known[0])]
            require(kinds[0] is kinds[1], key, level, f"like {known[0]}, the level in this run")


def _factors(cell: Cell) -> dict[str, Any]:
    """Return every factor of a cell with its level: its settings and the option chosen from each group."""
    return cell.config.identity() | cell.choices
