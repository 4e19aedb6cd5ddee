"""Tests of which factors vary, and which other factor determines the level of each tied one."""

import json
import random
from itertools import product

import pandas as pd
import pytest

from moe.analysis.statistics import name_cell
from moe.results.conditions import tied_factors, varied_factors, with_readable_levels


def expected(table: pd.DataFrame) -> tuple[list[str], dict[str, str]]:
    """Return the varied and the tied factors by comparing each pair of runs."""
    free: list[str] = []
    tied: dict[str, str] = {}
    for factor in ("lb", "noise", "router.k"):
        known = table[table[factor].notna()]
        if known[factor].nunique() < 2:
            continue
        for other in free:
            rows = known.loc[known[other].notna(), [other, factor]].to_numpy()
            if all(a[0] != b[0] or a[1] == b[1] for a, b in product(rows, rows)):
                tied[factor] = other
                break
        else:
            free.append(factor)
    return free, tied


@pytest.mark.parametrize("seed", range(30))
def test_a_factor_is_tied_to_the_first_one_that_determines_its_level(seed: int) -> None:
    """Some levels are unknown, as in runs of an older version; some are texts beside numbers."""
    rng = random.Random(seed)
    levels = [0.0, 0.1, "none", None][: rng.randint(2, 4)]
    rows = [[rng.choice(levels) for _ in range(3)] for _ in range(rng.randint(2, 6))]
    table = pd.DataFrame(rows, columns=["lb", "noise", "router.k"], dtype=object)
    if seed % 2:
        table["noise"] = table["lb"].map({level: rng.choice(levels) for level in levels})
    table = table.assign(experiment="x")
    assert (varied_factors(table), tied_factors(table)) == expected(table)


def test_what_the_factors_of_a_grid_determine_together_is_tied_to_them() -> None:
    """A batch for each size of a model and number of experts. A factor that the command varied itself stays one."""
    rows = [(size, experts, variant) for size, experts, variant in product((32, 64), (4, 8), ("small", "large"))]
    table = pd.DataFrame(rows, columns=["model.dim", "model.num_experts", "variant"])
    table["batch_size"] = table["model.dim"] * table["model.num_experts"]
    table = table.assign(experiment="x")
    asked = ["model.dim", "model.num_experts", "variant"]
    grid = table.assign(varied=json.dumps(asked))
    assert varied_factors(grid) == ["variant", "model.dim", "model.num_experts"]
    assert tied_factors(grid) == {"batch_size": "model.dim and model.num_experts"}
    for unknown in (table, grid.assign(varied=[None, *grid["varied"][1:]]), grid.assign(varied='["batch_size"]')):
        assert "batch_size" in varied_factors(unknown)


def test_levels_with_entries_for_layers_are_in_words_and_cells_put_them_in_parentheses() -> None:
    raw = ["none", "0:hash+0:balanced:true+0:k:2"]
    runs = pd.DataFrame({"model.routers": raw, "model.experts_by_layer": "0:4", "router": "topk", "causal": True})
    shown = with_readable_levels(runs)
    assert shown["model.routers"].tolist() == ["none", "layer 0: hash, balanced, k=2"]
    assert shown["model.experts_by_layer"].tolist() == ["layer 0: 4 experts"] * 2
    assert runs["model.routers"].tolist() == raw, "commands are made from these"
    cell = {"lb": 0.0, "model.routers": shown["model.routers"][1]}
    assert name_cell(cell) == "lb=0.0, model.routers=(layer 0: hash, balanced, k=2)"
