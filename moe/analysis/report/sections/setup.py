"""The set-up of the runs: the facts without which no number of a report can be judged."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from moe.analysis.components import DATA, INIT
from moe.analysis.report.blocks import literal
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.sections.commands import fixed_settings, grid_of, training_command
from moe.analysis.report.sections.planned import margin_facts, planned_facts
from moe.analysis.sentences import effects_in_words, enumerated
from moe.analysis.tuned import tuned_equally
from moe.config.effect import read_effects
from moe.data.embedded import DOMAINS
from moe.results.conditions import levels
from moe.results.table import ABSENT

PLANNED_EFFECT = "{effect}: the smallest difference that matters, for which the number of seeds was planned"
NOT_READ = """\
no run read the domain {domain}, because {packages} not installed; so the models neither trained on it nor were
evaluated on it"""


def setup(inputs: ReportInputs) -> list[tuple[str, str]]:
    """Return runs, model, training, data, date and command, each with its name."""
    runs = inputs.runs.drop_duplicates("folder")
    finished = runs[runs["status"] == "finished"]
    seeds = "; ".join(filter(None, (_seeds(runs, each) for each in ("seed", INIT, DATA)))) or "seeds unknown"
    facts = [] if inputs.observed else [("Runs", f"{len(finished)} of {len(runs)} finished; {seeds}")]
    facts += [
        ("Settings that differ from the experiment's own", literal(text))
        for name in levels(inputs.runs["experiment"])
        if (text := _own_settings(inputs.runs[inputs.runs["experiment"] == name], str(name)))
    ]
    if replaced := _replaced(inputs.runs):
        facts.append(("What the command replaced in the experiment's own file", literal(", ".join(replaced))))
    total, active, trainable = (
        _range(finished, f"parameters.{part}", _count) for part in ("total", "active", "trainable")
    )
    if total:
        frozen = "" if trainable == total else f", {trainable} trained"
        facts.append(("Model", f"{total} parameters, {active} of them used by a token{frozen}"))
    facts += _base(inputs)
    sizes = ["steps", "batch_size", "grad_accum", "data.seq_len"]
    if not inputs.trained:
        facts.append(("Training", "none; the model was evaluated as it is"))
    elif set(sizes) <= set(runs):
        tokens = runs[sizes].astype(float).prod(axis=1)
        steps = _range(runs, "steps", lambda value: f"{value:,.0f}")
        facts.append(
            ("Training", f"{_range(pd.DataFrame({'tokens': tokens}), 'tokens', _count)} tokens in {steps} steps")
        )
    if chosen := _chosen_precisions(inputs):
        facts.append(("What precision=auto was", literal("; ".join(chosen))))
    source, tokenizer = (literal(_texts(runs, key)) for key in ("data", "data.tokenizer"))
    words = _range(runs, "data.vocab_size", lambda value: f"{value:,.0f}")
    if source:
        facts.append(
            ("Data", f"{source}; tokenizer {tokenizer or 'trained on it'}" + (f", {words} tokens" if words else ""))
        )
    facts += [("Domain without text", literal(NOT_READ.format(**each))) for each in _not_read(inputs)]
    if days := sorted({str(start)[:10] for start in runs["started"].dropna()}):
        facts.append(("Date", " to ".join(dict.fromkeys((days[0], days[-1])))))
    facts += planned_facts(inputs.study) + margin_facts(inputs)
    planned = runs[runs["planned_effect"] != "none"] if "planned_effect" in runs else runs[:0]
    if effect := "; ".join(map(_effects, levels(planned["planned_effect"]) if len(planned) else ())):
        facts.append(("Planned effect", PLANNED_EFFECT.format(effect=literal(effect))))
    if len(inputs.trials):
        facts.append(("Tuning", tuned_equally(inputs.trials)))
    if command := training_command(inputs.runs):
        facts.append(("Repeat", f"`{command}`"))
    return facts


def _seeds(runs: pd.DataFrame, name: str) -> str:
    """Return the seeds of one kind with their name; "" if no run has one."""
    known = [each for each in levels(runs[name]) if each != "none"] if name in runs else []
    return f"{name}{'s' * (name == 'seed')} {', '.join(map(str, known))}" if known else ""


def _own_settings(runs: pd.DataFrame, name: str) -> str:
    """Return what the runs of a grid set otherwise than its experiment, with full keys; by its name if need be.

    The name of a grid is cut if it is long.
    """
    grid = grid_of(runs)
    return ", ".join(fixed_settings(grid)) if grid and grid.fixed else name.partition(": ")[2]


def _replaced(runs: pd.DataFrame) -> list[str]:
    """Return what the commands of these runs replaced in the files of their experiments."""
    grids = [grid_of(members) for _, members in runs.groupby("experiment", sort=False)]
    return list(dict.fromkeys(word for grid in grids if grid for word in grid.replacements()))


def _chosen_precisions(inputs: ReportInputs) -> list[str]:
    """Return what `precision=auto` stood for in these runs, and why."""
    records = [inputs.records[folder] for folder in inputs.runs["folder"] if folder in inputs.records]
    processes = [record.facts.process for record in records if record.facts is not None]
    told = [(each.get("precision"), each["precision_reason"]) for each in processes if "precision_reason" in each]
    return list(dict.fromkeys(f"{precision}, because {reason}" for precision, reason in told))


def _base(inputs: ReportInputs) -> list[tuple[str, str]]:
    """Return the checkpoints with which the runs began, and the validation losses before the first step."""
    runs, evals = inputs.runs, inputs.past.evals
    names = {
        name: None
        for key in ("model.checkpoint", "model.dense")
        for name in (levels(runs[key]) if key in runs else ())
        if name not in ("none", ABSENT)
    }
    if not names or not inputs.trained:
        return []
    first = evals[(evals["step"] == 0) & evals["folder"].isin(runs["folder"])] if len(evals) else pd.DataFrame()
    words = {
        "val/loss": "",
        "val/loss_in_domain": " in the domains that train",
        "val/loss_out_of_domain": " in the other ones",
    }
    losses = [f"{text}{words[key]}" for key in words if (text := _range(first, key, lambda value: f"{value:.4f}"))]
    before = f"; validation loss before the first step {', '.join(losses)}" if losses else ""
    return [("Base", literal(", ".join(names)) + before)]


def _not_read(inputs: ReportInputs) -> list[dict[str, str]]:
    """Return the domains that a run was to read, and that its text does not have, with the packages that hold them."""
    left: dict[str, None] = {}
    for record in inputs.records.values():
        asked = record.config.get("data", {}).get("source", {}).get("domains") or []
        if record.facts is not None:
            left |= dict.fromkeys(domain for domain in asked if domain not in record.facts.data.get("domains", asked))
    packages = {name: DOMAINS[name].packages if name in DOMAINS else () for name in left}
    return [{"domain": name, "packages": _are_in_words(found)} for name, found in packages.items()]


def _are_in_words(packages: Sequence[str]) -> str:
    """Return Python packages as the subject of a clause, with its verb; without any, the package is unknown."""
    if len(packages) > 1:
        return f"the Python packages {enumerated(packages)} that hold its text were"
    return f"the Python package{f' {packages[0]}' if packages else ''} that holds its text was"


def _range(runs: pd.DataFrame, column: str, text: Any) -> str:
    """Return the values of a column of numbers: the one that all runs have, or the smallest and the largest."""
    values = pd.to_numeric(runs[column], errors="coerce").dropna() if column in runs else pd.Series(dtype=float)
    ends = dict.fromkeys(text(value) for value in (values.min(), values.max())) if len(values) else {}
    return " to ".join(ends)


def _effects(planned: object) -> str:
    """Return a `planned_effect` in words; as it is, if `train.py` would refuse it today."""
    if (found := read_effects(str(planned))) is None:
        return str(planned)
    effect, effects = found
    return effects_in_words(effect.text, {metric: each.text for metric, each in effects.items()})


def _texts(runs: pd.DataFrame, column: str) -> str:
    values = levels(runs[column]) if column in runs else []
    return ", ".join(str(value) for value in values if value not in (ABSENT, ""))


def _count(number: Any) -> str:
    """Return a number with three digits and the unit thousand, million or billion."""
    for size, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
