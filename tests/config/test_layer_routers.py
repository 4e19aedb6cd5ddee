"""Tests of the key `model.routers`: its text, and the routers that it stands for."""

import pytest

from moe.checks import ConfigError
from moe.config import layer_routers, run_routers
from moe.config.layer_entries import in_words
from moe.launch.command_line import read_cells

TOPK = {"_target_": "moe.routers.topk.TopK", "k": 2, "gate": "renorm"}
HASH = {"_target_": "moe.routers.hash.Hash", "k": 2, "balanced": True}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0:hash+0:balanced:true+0:k:2", "layer 0: hash, balanced, k=2"),
        ("0-1:hash+0-1:balanced:false+3:k:1", "layers 0 to 1: hash, not balanced; layer 3: k=1"),
        ("0-1:4+3:1", "layers 0 to 1: 4 experts; layer 3: 1 expert"),
        ("none", "none"),
        ("absent", "absent"),
        ("3:relu+3:coefficient:1e-08+3:rate:1.2", "layer 3: relu, coefficient=1e-08, rate=1.2"),
    ],
)
def test_entries_in_words(text: str, words: str) -> None:
    assert in_words(text) == words


def test_entries_choose_options_and_change_settings_of_single_layers() -> None:
    found = layer_routers.specs("0-1:hash+1:k:1+3:k:4+3:gate:softmax_all", TOPK)
    assert found == {0: HASH, 1: HASH | {"k": 1}, 3: TOPK | {"k": 4, "gate": "softmax_all"}}
    assert layer_routers.specs(None, TOPK) == {}


@pytest.mark.parametrize(
    ("text", "explicit"),
    [
        ("0-1:hash", "0-1:hash+0-1:balanced:true+0-1:k:2"),
        ("0:hash+0:k:2", "0:hash+0:balanced:true+0:k:2"),
        ("0-1:hash+0:k:1", "0:hash+0:balanced:true+0:k:1+1:hash+1:balanced:true+1:k:2"),
        ("2:k:1", "2:k:1"),
        ("3:k:1+1:k:1+2:k:1", "1-3:k:1"),
        ("0:hash+1:hash+0-1:k:1", "0-1:hash+0-1:balanced:true+0-1:k:1"),
        ("0-2:hash+1:topk", "0:hash+0:balanced:true+0:k:2+1:topk+1:gate:renorm+1:k:2+2:hash+2:balanced:true+2:k:2"),
        ("3:relu", "3:relu+3:coefficient:1e-08+3:rate:1.2+3:target:2.0"),
    ],
)
def test_the_explicit_text_has_all_settings_and_means_the_same(text: str, explicit: str) -> None:
    assert layer_routers.explicit(text) == explicit
    assert layer_routers.explicit(explicit) == explicit
    assert layer_routers.specs(text, TOPK) == layer_routers.specs(explicit, TOPK)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.routers=0=hash", "^model.routers=0=hash: must be entries such as 0-2:hash .*; wrong: '0=hash'$"),
        ("model.routers=2-1:hash", "first layer is not after the last; wrong: 2-1:hash$"),
        ("model.routers=0:hsh", "^unknown option of router in model.routers 'hsh'; nearest: hash$"),
        ("model.routers=0-9:hash", "must be layers from 0 to 3, those that have experts$"),
        ("model.routers=0:hash model.first_k_dense_replace=1", "must be layers from 1 to 3, those that have experts$"),
        (
            "model.routers=0-3:hash",
            "^model.routers=0-3:hash: must be without an option for one layer at least: name the ",
        ),
        ("model.routers=0:hash+0:topk", r"^model.routers=0:hash\+0:topk: must be entries .*; 0:hash has none$"),
        ("model.routers=0:kk:1", "^model.routers=0:kk:1: unknown key of router 'router.kk'; nearest: router.k$"),
        ("model.routers=0:k:9", "^model.routers=0:k:9: router.k=9: must be between 1 and model.num_experts=8$"),
        ("model.routers=0:k:two", "^model.routers=0:k:two: router.k=two: must be a whole number$"),
        ("model.routers=0:chain_of_experts", "must be routers that all run once in a layer, or all equally often$"),
        ("model.routers=0:k:1+0:hash", r"^model.routers=0:k:1\+0:hash: must be entries .*; 0:k:1 has none$"),
        ("model.routers=0-1:k:1+0:k:3+1:k:4", "must be entries that later ones leave an effect; 0-1:k:1 has none$"),
        ("model.routers=0:topk", "^model.routers=0:topk: must be entries .*; layer 0 has the same one$"),
        (
            "model.routers=0:k:1+2:k:2",
            r"^model.routers=0:k:1\+2:k:2: must be .* another router .*; layer 2 has the same",
        ),
        ("model.routers=0:k:4 capacity=2", "^model.routers=0:k:4: capacity=2.0: must be null, or below 2: "),
        ("model.routers=0:hash model.first_k_dense_replace=4", "must be null, because no layer has experts$"),
        ("model.routers=\N{ARABIC-INDIC DIGIT ZERO}:hash", "; wrong: "),
        (
            "model.routers=0:expert_choice data=smoltalk",
            "must be a router that keeps the conversations of a block apart",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_cells(words.split())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("words", ["router=temperature model.routers=0:temp:3", "model.routers=0:temperature+0:temp:3"])
def test_the_temperature_is_that_of_whichever_layer_has_one_and_there_is_only_one(words: str) -> None:
    if words.startswith("model"):
        [cell] = read_cells(words.split()) or []
        assert cell.config.temperature == 3
    else:
        with pytest.raises(ConfigError, match="routers with one temp"):
            read_cells(words.split())


def test_a_key_applies_if_the_router_of_any_layer_uses_it() -> None:
    """Hash has no probabilities, so that a balance loss changes nothing. Causality is that of all layers."""
    plain, mixed, choice = (
        read_cells(["router=hash", *words])[0]
        for words in ([], ["model.routers=0:topk"], ["model.routers=0:expert_choice"])
    )
    assert "lb" in plain.ignored
    assert "lb" not in mixed.ignored
    assert [run_routers.is_causal(each.config) for each in (plain, mixed, choice)] == [True, True, False]


def test_a_sweep_over_routers_of_layers_names_its_levels() -> None:
    cells = read_cells(["-m", "model.routers=null,0-1:hash,0-1:k:1"])
    assert [cell.config.model.routers for cell in cells] == [None, "0-1:hash+0-1:balanced:true+0-1:k:2", "0-1:k:1"]
    assert cells[0].grid.factors == ["model.routers"]


def test_each_layer_may_have_an_entry_if_one_keeps_the_option_of_the_others() -> None:
    [cell] = read_cells(["model.layers=2", "model.routers=1:k:1+0:hash"])
    assert cell.config.model.routers == "0:hash+0:balanced:true+0:k:2+1:k:1"


def test_a_cell_whose_layers_have_the_router_of_the_others_anyway_is_the_same_run_as_the_plain_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Layer 1 of the last cell with top-k has top-k anyway, and layer 0 of the one with hash has hash anyway.

    Which cells are the same run is said with the router of both.
    """
    cells = read_cells(["-m", "router=topk,hash", "model.routers=null,0:hash,0:hash+1:topk"])
    hashed = "0:hash+0:balanced:true+0:k:2"
    assert [(cell.choices["router"], cell.identity()["model.routers"]) for cell in cells] == [
        ("topk", None),
        ("topk", hashed),
        ("hash", None),
        ("hash", "1:topk+1:gate:renorm+1:k:2"),
    ]
    assert [line.partition(", and ")[0].replace("\\", "") for line in caplog.messages] == [
        "model.routers=0:hash is the same run as model.routers=null with router=hash",
        "model.routers=0:hash+1:topk is the same run as model.routers=0:hash with router=topk",
    ]


def test_two_spellings_of_the_same_routers_are_the_same_run() -> None:
    one, two = (read_cells([f"model.routers={text}"])[0] for text in ("0:hash", "0:hash+0:k:2"))
    assert one.identity() == two.identity()
    with pytest.raises(ConfigError, match=r"^two cells of this sweep are the same run: model.routers=0.?:hash and "):
        read_cells(["-m", "model.routers=0:hash,0:hash+0:k:2"])
