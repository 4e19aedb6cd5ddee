"""Tests of the words of the key `trainable`, and of the keys that change nothing with them."""

from collections.abc import Callable

import pytest

from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.config.trainable import Trainable, normalized
from moe.launch.command_line import read_cells


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("experts+router", "router+experts"),
        ("router + experts+router", "router+experts"),
        ("router+all", "all"),
        ("-router+all", "all+-router"),
        ("*.bias+-norms+router+-embeddings", "router+*.bias+-embeddings+-norms"),
    ],
)
def test_all_spellings_of_a_value_have_one_normal_form(text: str, expected: str) -> None:
    assert normalized(text) == expected
    assert normalized(expected) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ruter", "trainable=ruter: must be one of all, router, experts"),
        ("ruter", "nearest: router"),
        ("all+-expert", "trainable=expert: must be one of all, router, experts, shared, attention, embeddings, norms"),
        ("-router", "trainable=-router: nothing is left to train; write all+-router"),
        ("router+", "an entry is missing"),
        ("router+-router", "router cannot be trained and frozen"),
        ("all+-all", "all cannot be trained and frozen"),
    ],
)
def test_wrong_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Trainable.of(text).check()
    assert message in str(error.value)


def test_a_sweep_needs_no_quotes_and_has_equal_meanings_once(small: list[str]) -> None:
    cells = read_cells([*small, "-m", "trainable=all,null,router,experts,router+experts,all+-router"]) or []
    assert [cell.config.trainable for cell in cells] == ["all", "router", "experts", "router+experts", "all+-router"]
    with pytest.raises(ConfigError, match=r"the same run: trainable=router\+experts and"):
        read_cells([*small, "-m", "trainable=router+experts,experts+router"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainable=shared"], "trainable=shared: this model has no part shared; it has router, experts, attention"),
        (["trainable=*.ruter.weight"], "no parameter has such a name: '*.ruter.weight'"),
        (["trainable=router", "router=hash"], "nothing that gradients train"),
        (["trainable=experts", "optimizer=adamw", "optimizer.router_lr=0.1"], "with trainable=experts it changes"),
        (["trainable=router", "optimizer=adamw", "optimizer.experts_lr=0.1"], "with trainable=router it changes"),
        (["trainable=experts", "simbal=0.1"], "simbal=0.1: with trainable=experts it changes nothing; leave it out"),
        (["trainable=experts", "z=0.1", "model.layers=1"], "z=0.1: with trainable=experts it changes nothing"),
        (["trainable=norms", "optimizer.momentum=0.5"], "with trainable=norms it changes nothing"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(small: list[str], words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_cells([*small, *words])
    assert message in str(error.value)


def test_keys_that_frozen_parts_make_useless_are_switched_off(cell: Callable[..., Cell]) -> None:
    alone = cell("trainable=experts", "model.layers=1")
    assert {"lb", "z", "simbal", "router_entropy"} <= alone.ignored
    assert "output_orthogonality" not in alone.ignored
    assert alone.config.lb == 0
    for usable in (["model.layers=2"], ["model.layers=1", "trainable=experts+attention"], ["trainable=router"]):
        one = cell("trainable=experts", *usable)
        assert one.config.lb == 0.01
        assert "lb" not in one.ignored
