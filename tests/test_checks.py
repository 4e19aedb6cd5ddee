"""Tests of texts that are written into Markdown: a reader sees the characters that were meant."""

import pytest

from moe.checks import escaped

markdown_it = pytest.importorskip("markdown_it")


@pytest.mark.parametrize("text", ["# one", "two #", "_three_", "__four__", "snake_case_", "a # b_c", "x ## y #", "#"])
def test_the_title_of_a_section_is_shown_as_it_is(text: str) -> None:
    inline = next(token for token in markdown_it.MarkdownIt().parse(f"## {escaped(text)}") if token.type == "inline")
    assert "".join(child.content for child in inline.children or []) == text
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}


def test_code_is_not_escaped() -> None:
    assert escaped("`_target_` of _a_ and `#b`") == r"`_target_` of \_a\_ and `#b`"
