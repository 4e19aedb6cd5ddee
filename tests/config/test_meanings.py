"""Tests that every key of the configuration has a meaning, which `--help` prints."""

import pytest

from moe.config import meanings
from moe.config.classes import locate
from moe.config.options import CLASSES, sources
from moe.launch.option_files import preset_of
from moe.routers.base import Router


@pytest.mark.parametrize("key", meanings.all_keys())
def test_every_key_has_a_comment_beside_its_field(key: str) -> None:
    """A comment that only lists what is allowed, as "silu | swiglu", says nothing about the key."""
    said = meanings.meaning(key, {})
    assert said is not None
    assert len(said.split(":")[0].split("|")) == 1


NAMED = [(node, name) for node in CLASSES for name in sources(CLASSES[node]) if preset_of(node, name) is not None]


@pytest.mark.parametrize(("node", "option"), NAMED)
def test_every_setting_of_a_class_that_an_option_names_has_an_entry_in_its_docstring(node: str, option: str) -> None:
    target = (preset_of(node, option) or {})["_target_"]
    for name in meanings.settings(locate(target, node, trusted=True)):
        assert meanings.meaning(f"{node}.{name}", {node: target}), name


def test_a_docstring_explains_settings_in_entries_and_a_derived_class_may_explain_them_otherwise() -> None:
    class First(Router):
        """Router with two settings.

        gate, scale: weights of an expert,
            as numbers:
            one: the first.
        Not an entry: this line.
        """

        def __init__(self, dim: int, num_experts: int, *, k: int = 2, gate: float = 1.0, scale: float = 2.0) -> None:
            super().__init__(dim, num_experts, fixed_k=k)

    class Second(First):
        """Router that explains one of them again.

        gate: another weight.
        """

    text = "weights of an expert, as numbers: one: the first"
    assert meanings.of_settings(First) == {"k": "experts per token", "gate": text, "scale": text}
    assert meanings.of_settings(Second) == {"k": "experts per token", "gate": "another weight", "scale": text}
    assert meanings.settings(Second) == {"k": 2, "gate": 1.0, "scale": 2.0}
