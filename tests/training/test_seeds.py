"""Tests of init_seed and data_seed: each decides its own part of a run, and together they are the seed."""

from typing import Any

import pytest
import torch
from small_runs import run, untimed

from moe.checks import ConfigError
from moe.config import run_routers
from moe.launch.command_line import read_cells
from moe.training.setup import build_model, prepare_data
from moe.training.step import micro_batches


def weights(config: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in build_model(config, vocab_size=400).parameters()])


def test_the_seed_of_the_weights_leaves_the_order_of_the_text_alone_and_vice_versa(cell: Any) -> None:
    seed, init, data = (
        cell(*words).config for words in (["seed=1"], ["seed=1", "init_seed=2"], ["seed=1", "data_seed=2"])
    )
    assert weights(seed).equal(weights(data))
    assert not weights(seed).equal(weights(init))
    text = prepare_data(seed)
    first, of_init, of_data = (micro_batches(config, text, 0)[0].ids for config in (seed, init, data))
    assert first.equal(of_init)
    assert not first.equal(of_data)


def test_both_seeds_together_are_the_seed(cell: Any) -> None:
    one, both = (
        cell("seed=7", "noise=0.5", "steps=2"),
        cell("seed=1", "init_seed=7", "data_seed=7", "noise=0.5", "steps=2"),
    )
    assert one.folder != both.folder
    for each in (one, both):
        run(each)
    assert untimed(one.folder) == untimed(both.folder)
    assert run_routers.settings_in_effect(one.config) == run_routers.settings_in_effect(both.config)


def test_a_seed_that_both_seeds_replace_is_trained_once() -> None:
    cells = read_cells(["-m", "seed=1,2", "init_seed=3", "data_seed=4,5", "logger.mode=disabled"]) or []
    assert len(cells) == 2
    with pytest.raises(
        ConfigError, match=r"^init_seed=-1: must be between 0 and 2\^32 - 1, or null for the value of seed"
    ):
        read_cells(["init_seed=-1"])
