"""Tests of the question of an experiment and of its parts."""

from typing import Any

import pytest
import yaml

from moe.checks import ConfigError
from moe.config.options import CONF
from moe.config.question import Part, parts_of, text_of


def test_the_parts_are_questions_of_their_own_and_together_the_whole() -> None:
    parts = parts_of([{"ask": "Which is best,", "claims": ["a", "b"]}, {"ask": "and does noise change that?"}])
    assert parts == [Part("Which is best,", ("a", "b")), Part("and does noise change that?")]
    assert [part.alone for part in parts] == ["Which is best?", "Does noise change that?"]
    assert text_of(parts) == "Which is best, and does noise change that?"
    assert parts_of("Is it fast?") == [Part("Is it fast?")]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (None, "question=null: must be a text, or a list of parts such as {ask: "),
        ([], "question=[]: must be a text, or a list"),
        (["Is it?"], "question[0]=Is it?: must be a part such as {ask: "),
        ([{"ask": "Is it?"}, {"asks": "Is it?"}], "unknown key of question[1] 'asks'; nearest: ask"),
        ([{"claims": []}], "question[0].ask=: must be a text that is not empty"),
        ([{"ask": "Is it?", "claims": "a"}], "question[0].claims=a: must be a list of texts of claims"),
    ],
)
def test_a_question_of_another_form_is_refused(question: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parts_of(question)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_claim_that_a_question_names_is_one_of_its_experiment(path: Any) -> None:
    """With claims, at least one of them answers the question; only a part that no claim is about names none."""
    content = yaml.safe_load(path.read_text()) or {}
    texts = {claim["text"] for claim in content.get("claims", [])}
    named = [text for part in parts_of(content.get("question", "")) for text in part.claims]
    assert set(named) <= texts
    assert len(named) == len(set(named))
