"""Tests of texts: a reader sees the characters of Markdown that were meant, and why the hub gives nothing."""

from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from moe.checks import escaped, not_on_hub, unknown

markdown_it = pytest.importorskip("markdown_it")


@pytest.mark.parametrize("text", ["# one", "two #", "_three_", "__four__", "snake_case_", "a # b_c", "x ## y #", "#"])
def test_the_title_of_a_section_is_shown_as_it_is(text: str) -> None:
    inline = next(token for token in markdown_it.MarkdownIt().parse(f"## {escaped(text)}") if token.type == "inline")
    assert "".join(child.content for child in inline.children or []) == text
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}


def test_code_is_not_escaped() -> None:
    assert escaped("`_target_` of _a_ and `#b`") == r"`_target_` of \_a\_ and `#b`"


def test_the_nearest_names_have_the_last_word_of_the_typed_one() -> None:
    names = [
        "routing/margin",
        "routing/load_gini",
        *(f"routing/load_cv/layer{number}" for number in range(6)),
        "val/mi",
    ]
    assert str(unknown("metric", "routing/gini", names)) == "unknown metric 'routing/gini'; nearest: routing/load_gini"
    assert "; nearest: routing/load_cv/layer" in str(unknown("metric", "routing/cv", names))
    assert str(unknown("metric", "routing/margins", names)).endswith("; nearest: routing/margin")


def answered(kind: type[Exception], status: int | None = None) -> Exception:
    """Return an error of the hub's library with the status of an answer, if there was one."""
    error = kind.__new__(kind)
    error.args = ("the hub says so\nin two lines",)
    if status is not None:
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (answered(errors.GatedRepoError, 401), "only to users who are logged in"),
        (answered(errors.HfHubHTTPError, 403), "only to users who are logged in"),
        (answered(errors.HfHubHTTPError, 429), "the hub takes no more requests for now; try again later"),
        (answered(errors.HfHubHTTPError, 503), "the hub does not answer"),
        (ConnectionRefusedError("the hub says so"), "the hub does not answer"),
        (answered(errors.RepositoryNotFoundError, 401), "none on the hub"),
        (answered(errors.RevisionNotFoundError, 404), "none on the hub"),
        (answered(errors.HFValidationError), "none on the hub"),
    ],
)
def test_the_reason_why_the_hub_gives_nothing_is_the_true_one(error: Exception, why: str) -> None:
    text = not_on_hub(error)
    assert why in text
    assert text.endswith("(the hub says so)")
