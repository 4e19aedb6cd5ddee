"""The benchmark runs and times what it says; how fast anything is, is not tested."""

from moe.bench import Shape, interleave, layer_variants, step_variants, table


def test_every_layer_variant_runs_once_a_round() -> None:
    medians = interleave(layer_variants(Shape(4, 2, 16, 16, 32)), rounds=1)
    assert list(medians)[:2] == ["dense, equal active FLOPs", "ours"]
    assert all(seconds > 0 for seconds in medians.values())


def test_every_step_variant_trains() -> None:
    for name, step in step_variants(64, 2, 16):
        assert step() is None, name


def test_rounds_are_interleaved_and_the_first_two_do_not_count() -> None:
    order: list[str] = []
    variants = [(name, lambda name=name: order.append(name)) for name in "ab"]
    medians = interleave(variants, rounds=3)
    assert order == ["a", "b"] * 5
    assert set(medians) == {"a", "b"}


def test_the_table_relates_everything_to_the_limit() -> None:
    text = table("question", {"limit": 1.0, "ours": 2.0})
    assert "| ours | 2.00 | 0.50 |" in text
