"""The key `trainable`: which parameters of a model train. Reading it needs no model and no torch."""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from moe.checks import ConfigError, one_of, unknown
from moe.routing.loss_table import LOSSES

PARTS = {
    "router": "routers",
    "experts": "routed experts",
    "shared": "shared experts and dense feed-forward layers",
    "attention": "attention, and whatever is none of the other parts: state spaces, connections between layers",
    "embeddings": "the input embedding and the output matrix",
    "norms": "every norm, also one inside of attention",
    "adapter": "what `adapter` adds",
}
ALL = "all"


class Trainable(NamedTuple):
    """A value of the key `trainable`, read: what trains, and what of it is frozen again.

    An entry is `all`, a part of `PARTS`, or a pattern of parameter names, which has one of the characters * ? and dot.
    """

    trained: tuple[str, ...]
    frozen: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Trainable":
        """Read entries joined by `+`; those with `-` in front are frozen. Their order does not matter."""
        words = dict.fromkeys(word.strip() for word in text.split("+"))
        trained = sorted((word for word in words if not word.startswith("-")), key=_place)
        frozen = sorted((word.removeprefix("-") for word in words if word.startswith("-")), key=_place)
        if ALL in trained:
            trained = [ALL]
        return cls(tuple(trained), tuple(frozen))

    def __str__(self) -> str:
        return "+".join([*self.trained, *(f"-{word}" for word in self.frozen)])

    def check(self) -> None:
        """Raise ConfigError for an unknown part, an empty entry, and if nothing is left to train in any model."""
        for word in (*self.trained, *self.frozen):
            if not word:
                raise ConfigError(f"trainable={self}: an entry is missing beside a + or after a -")
            if not _is_pattern(word):
                one_of("trainable", word, (ALL, *PARTS))
        if not self.trained:
            raise ConfigError(f"trainable={self}: nothing is left to train; write {ALL}+{self}")
        if covered := {ALL, *self.trained} & {*self.frozen}:
            word = sorted(covered)[0]
            raise ConfigError(f"trainable={self}: {word} cannot be trained and frozen; leave one out")

    def may_train(self, *parts: str) -> bool:
        """Return whether parameters of one of these parts may train. Only a model tells what patterns match."""
        anything = ALL in self.trained or any(map(_is_pattern, self.trained))
        return any((anything or part in self.trained) and part not in self.frozen for part in parts)

    def without_effect(self, *, layers: int, dense_layers: int, acts_on: frozenset[str], muon: str) -> frozenset[str]:
        """Return the keys that change nothing because of what is frozen: rates, and weights of losses.

        A loss of a frozen router still has a gradient: it reaches what computes the router's input, which is attention,
        embeddings, norms, and the feed-forward layers before it. So has one of the outputs of frozen experts. SimBal
        depends on the router's own rows alone, and ERC also on the matrices of experts. Where an adapter changes these
        while they run, ERC cannot read them. Muon trains only matrices.

        layers: of the model; the first dense_layers of them have no router. acts_on, muon: of the adapter that trains,
        see `moe.adapters.base.Adapter`. They are empty without one.
        """
        trained_by = {
            "optimizer.momentum": bool(muon) or self.may_train("router", "experts", "shared", "attention"),
            "optimizer.expert_step": muon == "stacks" or self.may_train("experts"),
            "optimizer.experts_lr": self.may_train("experts"),
            "optimizer.router_lr": self.may_train("router"),
        }
        router = "router" in acts_on or self.may_train("router")
        trained = "input" in acts_on or self.may_train("attention", "embeddings", "norms")
        inputs = trained or layers - dense_layers > 1 or (dense_layers > 0 and self.may_train("shared"))
        trained_by |= {loss.weight: router or inputs for loss in LOSSES.values()} | {
            "simbal": router,
            "erc": "experts" not in acts_on and self.may_train("router", "experts"),
            "output_orthogonality": inputs or "outputs" in acts_on or self.may_train("experts"),
        }
        return frozenset(key for key, trains in trained_by.items() if not trains)

    def selects(self, part_of: Mapping[str, str]) -> set[str]:
        """Return the names that train, of those in `part_of`, which tells the part of each.

        Raises ConfigError for an entry that stands for no name, and if nothing is left.
        """
        for word in (*self.trained, *self.frozen):
            if not any(_stands_for(word, *item) for item in part_of.items()):
                if _is_pattern(word):
                    raise unknown("pattern of trainable: no parameter has such a name:", word, part_of)
                present = ", ".join(part for part in PARTS if part in part_of.values())
                raise ConfigError(f"trainable={self}: this model has no part {word}; it has {present}")
        chosen = {name for name, part in part_of.items() if self._trains(name, part)}
        if not chosen:
            raise ConfigError(f"trainable={self}: nothing is left to train")
        return chosen

    def _trains(self, name: str, part: str) -> bool:
        trained, frozen = (any(_stands_for(word, name, part) for word in words) for words in self)
        return trained and not frozen


def normalized(text: str) -> str:
    """Return the one spelling of a value that all its spellings share, such as router+experts for experts+router."""
    return str(Trainable.of(text))


def _place(word: str) -> tuple[int, str]:
    """Return by what entries are sorted: parts as in `PARTS`, then patterns by their letters."""
    known = [ALL, *PARTS]
    return (known.index(word) if word in known else len(known), word)


def _is_pattern(word: str) -> bool:
    return re.search(r"[*?.]", word) is not None


def _stands_for(word: str, name: str, part: str) -> bool:
    return fnmatchcase(name, word) if _is_pattern(word) else word in (ALL, part)
