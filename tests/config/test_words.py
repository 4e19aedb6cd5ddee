"""Tests of the words of a command that this project writes."""

from moe.config.words import key_of, with_words


def test_a_key_is_never_given_twice() -> None:
    words = ["-m", "experiment=x", "tune={optimizer.muon_lr: [0.01, 0.02]}", "++router.k=1"]
    assert with_words(words, "tune=null", "router.k=2", "seed=1") == [
        *("-m", "experiment=x"),
        *("tune=null", "router.k=2", "seed=1"),
    ]
    assert with_words(words) == words
    assert [*map(key_of, ("+a.b=c=d", "~a", "-m"))] == ["a.b", "a", "-m"]
