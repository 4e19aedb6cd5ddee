"""Planned claims: what an experiment is expected to show. `moe.analysis.claims` judges them after it ran."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from moe.checks import finite, one_of, require, unknown


@dataclass
class ClaimConfig:
    """A claim that the `levels` of a `factor` change a `metric` in the way that `kind` says.

    Kinds: "higher" and "lower" compare each of `levels` with each level in `than`. "highest" and "lowest" compare them
    with all other levels. "equivalent": the difference from `than` is smaller than `margin`. `size` is the range of the
    claimed rise or fall. `margin` and `size` are in units of the metric, or a text such as 5%, which is a share of the
    mean at the level compared with.
    """

    text: str = MISSING
    metric: str = MISSING
    factor: str = MISSING
    levels: list[Any] = MISSING
    kind: str = MISSING
    source: str = "our own"
    than: list[Any] = field(default_factory=list)
    margin: Any = None
    size: list[Any] = field(default_factory=list)

    def check(self, key: str, factors: list[str] | None = None) -> None:
        """Raise ConfigError, naming the key, for a wrong value; also for another factor than `factors`, if given."""
        one_of(f"{key}.kind", self.kind, ("higher", "lower", "highest", "lowest", "equivalent"))
        one_of(f"{key}.metric", self.metric.split("/")[0], ("val", "val_capacity", "routing", "train", "time"))
        depends_on_cell = self.factor.startswith(("router.", "schedule."))  # only some cells may have such a key
        if factors is not None and not depends_on_cell and self.factor not in factors:
            raise unknown(f"factor of {key}", self.factor, factors)
        require(bool(self.levels), f"{key}.levels", self.levels, "a list of at least one level")
        all_others = self.kind in ("highest", "lowest")
        allowed = f"empty: {self.kind} compares with all other levels" if all_others else "a list of at least one level"
        require(all_others != bool(self.than), f"{key}.than", self.than, allowed)
        both = [level for level in self.levels if level in self.than]
        require(not both, f"{key}.than", self.than, f"without {both}, which are in levels too")
        equivalent = self.kind == "equivalent"
        allowed = "given, such as 1%" if equivalent else "left out: only kind=equivalent has a margin"
        require(equivalent == (self.margin is not None), f"{key}.margin", self.margin, allowed)
        sized = self.kind in ("higher", "lower") and len(self.size) == 2
        require(sized or not self.size, f"{key}.size", self.size, "two amounts, with kind=higher or kind=lower")
        part = "margin" if equivalent else "size"
        amounts = [
            absolute(amount, 1.0, key=f"{key}.{part}") for amount in ([self.margin] if equivalent else self.size)
        ]
        ok = all(amount > 0 for amount in amounts) and amounts == sorted(amounts)
        require(ok, f"{key}.{part}", self.margin or self.size, "positive and rising")


def absolute(amount: Any, reference: float, *, key: str = "amount") -> float:
    """Return an amount in units of a metric; "5%" is that share of the absolute value of `reference`.

    Raises ConfigError, naming `key`, for anything else.
    """
    share = isinstance(amount, str) and amount.endswith("%")
    try:
        value = float(amount[:-1] if share else amount)
    except (TypeError, ValueError):
        value = float("nan")
    require(finite(value), key, amount, "a finite number, or a text such as 5%")
    return value / 100 * abs(reference) if share else value
