"""Tests of the key `model.experts_by_layer`: its text, what is refused, and which cells are the same run."""

import pytest

from moe.checks import ConfigError
from moe.config import layer_experts
from moe.launch.command_line import read_cells


@pytest.mark.parametrize(
    ("text", "explicit"),
    [("0-1:4", "0-1:4"), ("3:2+0:4", "0:4+3:2"), ("1:4+0:4", "0-1:4"), ("00-02:04+3:4", "0-3:4"), ("2-2:1", "2:1")],
)
def test_a_text_means_the_same_as_its_explicit_form(text: str, explicit: str) -> None:
    assert layer_experts.explicit(text) == explicit
    for layer in range(5):
        assert layer_experts.of_layer(text, layer, 8) == layer_experts.of_layer(explicit, layer, 8)


def test_the_other_layers_have_the_number_of_all() -> None:
    assert [layer_experts.of_layer("1:4+2-3:16", layer, 8) for layer in range(5)] == [8, 4, 16, 16, 8]
    assert layer_experts.of_layer(None, 0, 8) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0=4", "^model.experts_by_layer=0=4: must be entries such as 0-2:4 .*; wrong: '0=4'$"),
        ("0:four", "must be entries such as 0-2:4 .*; wrong: '0:four'$"),
        ("2-1:4", "must be entries whose first layer is not after the last; wrong: 2-1:4$"),
        ("0:0", "must be entries of 1 to 10\\^6 experts; wrong: 0:0$"),
        ("0-1:4+1:2", "must be one entry for each layer; layer 1 has several$"),
        ("0-9:4", "must be layers from 0 to 3, those that have experts$"),
        ("0:4 model.first_k_dense_replace=1", "must be layers from 1 to 3, those that have experts$"),
        ("0-3:4", "must be left out for one layer at least: model.num_experts is the number of experts of the others$"),
        (
            "2:4+0:8",
            "^model.experts_by_layer=2:4\\+0:8: must be .* another number of experts; layer 0 has 8 anyway$",
        ),
        ("1:4 router.k=5", "^model.experts_by_layer=1:4: router.k=5: must be between 1 and model.num_experts=4$"),
        ("1:4 capacity=3", "^model.experts_by_layer=1:4: capacity=3.0: must be null, or below 2: "),
        ("0:4 router=oracle", "^model.experts_by_layer=0:4: model.num_experts=4: must be at least 6, for speech, "),
        ("0:4 model.first_k_dense_replace=4", "^model.experts_by_layer=0:4: must be null, because no layer has exp"),
        ("\N{ARABIC-INDIC DIGIT ZERO}:4", "must be entries such as 0-2:4 "),
        (
            "0:1 router.k=1 model.ffn=${equal_flops:64}",
            "^model.ffn: model.experts_by_layer=0:1: must be at least 2 experts in each layer, because equal_flops "
            "compares with top-2 routing$",
        ),
        (
            "0:2 router.k=3 model.ffn=${equal_flops:64}",
            "^model.ffn: model.experts_by_layer=0:2: router.k=3: must be between 1 and model.num_experts=2$",
        ),
        ("1:4 model.routers=1:k:5", "^model.routers=1:k:5: model.experts_by_layer=1:4: router.k=5: must be between"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_cells(f"model.experts_by_layer={words}".split())
    assert "\n" not in str(raised.value)


def test_a_cell_whose_layers_have_the_number_of_the_others_anyway_is_the_same_run_as_the_plain_one() -> None:
    cells = read_cells(["-m", "model.num_experts=4,8", "model.experts_by_layer=null,0:4"]) or []
    found = [(cell.config.model.num_experts, cell.identity()["model.experts_by_layer"]) for cell in cells]
    assert found == [(4, None), (8, None), (8, "0:4")]
    with pytest.raises(ConfigError, match=r"^two cells of this sweep are the same run: model.experts_by_layer=0"):
        read_cells(["-m", "model.experts_by_layer=0-1:4,0:4+1:4"])


def test_two_spellings_of_the_same_numbers_are_one_run(caplog: pytest.LogCaptureFixture) -> None:
    """Layers of 8 experts with 0:4, and layers of 4 experts with 1:8, are both layers of 4 and 8 experts."""
    with caplog.at_level("WARNING"):
        cells = read_cells(["-m", "model.layers=2", "model.num_experts=4,8", "model.experts_by_layer=0:4,1:8"]) or []
    assert [cell.config.model.experts_of_layers for cell in cells] == [[4, 4], [4, 8], [8, 8]]
    [said] = caplog.messages
    assert said.endswith(r"and is trained once, as model.num_experts=4,model.experts_by_layer=1\:8")


def test_a_key_applies_if_it_changes_something_in_a_layer_of_any_size() -> None:
    """With two experts, top-2 gives an even load, and `lb` changes nothing. Layer 1 has more experts."""
    plain, mixed = (
        read_cells(["model.num_experts=2", "router.k=2", *words])[0] for words in ([], ["model.experts_by_layer=1:4"])
    )
    assert "lb" in plain.ignored
    assert plain.ignored - mixed.ignored >= {"lb", "lb_sequence", "lb_global"}
    with pytest.raises(ConfigError, match=r"router.gate=softmax_all: router=topk ignores"):
        read_cells(["model.num_experts=2", "router.gate=softmax_all"])
    read_cells(["model.num_experts=2", "router.gate=softmax_all", "model.experts_by_layer=1:4"])
