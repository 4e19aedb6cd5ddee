"""What a single evaluation shows of layers whose routing has collapsed. Apart from `collapse`, because of NumPy."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moe.metrics import formulas
from moe.runs.collapse import Collapse, is_too_short, sentences

IN_EVALUATION = ("routing/utilization", "routing/collapsed")  # how the names begin of what is read here


def in_evaluation(values: Mapping[str, Any]) -> list[Collapse]:
    """Return what the metrics of an evaluation show, of all layers, as of step 0. `values` is an event of it."""
    found = []
    layers = values.get("routing/utilization")
    for layer, row in enumerate(layers if isinstance(layers, list) else ()):
        share = np.array(row, dtype=float)
        if np.isnan(share).any():
            continue
        if values.get(f"routing/collapsed/layer{layer:02d}") == 1:
            members = np.flatnonzero(formulas.busiest(share[None])[0]).tolist()
            found.append(Collapse(layer, "few", members, len(share), 0, None))
        if unused := np.flatnonzero(share == 0).tolist():
            found.append(Collapse(layer, "unused", unused, len(share), 0, None))
    return found


def collapse_lines(values: Mapping[str, Any], told: list[Collapse], *, steps: int, warmup: float) -> list[str]:
    """Return what a run showed of collapsed layers, a sentence each: while it trained, and in its last evaluation.

    The terminal and the report both print these. values: an event of the last evaluation. told: from training.
    steps, warmup: of the run. If it is too short to tell a collapse in training, its evaluation tells none either.
    """
    evaluated = [] if is_too_short(steps, warmup) else not_told(in_evaluation(values), told)
    return [*sentences(told), *(f"{each.sentence()} in the last evaluation" for each in evaluated)]


def not_told(evaluated: Iterable[Collapse], told: Iterable[Collapse]) -> list[Collapse]:
    """Return the findings of the last evaluation that add something to those that held after the last step.

    Where few experts took almost everything in training, the evaluation adds nothing.
    """
    still = [each for each in told if each.until is None]
    crowded = {each.layer for each in still if each.kind != "unused"}
    unused = {(each.layer, expert) for each in still if each.kind == "unused" for expert in each.experts}
    return [
        each
        for each in evaluated
        if each.layer not in crowded
        and not (each.kind == "unused" and {(each.layer, expert) for expert in each.experts} <= unused)
    ]
