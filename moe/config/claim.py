"""What an experiment says beforehand that it will show: `moe.analysis.claims` judges it."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from moe.checks import finite, one_of, require, unknown


@dataclass
class ClaimConfig:
    """What is said of a sweep before it is trained: the `levels` of a `factor` change a `metric` as `kind` says.

    higher, lower: every one of `levels` against every one of `than`. highest, lowest: against all the other levels.
    equivalent: the difference is smaller than `margin`. A `margin` or `size` is in units of the metric, or a text such
    as 5%, of the mean at the level compared with; `size` is the range of the claimed rise or fall.
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

    def check(self, key: str, factors: list[str]) -> None:
        one_of(f"{key}.kind", self.kind, ("higher", "lower", "highest", "lowest", "equivalent"))
        one_of(f"{key}.metric", self.metric.split("/")[0], ("val", "val_capacity", "routing", "train", "time"))
        elsewhere = self.factor.startswith(("router.", "schedule."))  # another cell's router or schedule may have it
        if not elsewhere and self.factor not in factors:
            raise unknown(f"factor of {key}", self.factor, factors)
        require(bool(self.levels), f"{key}.levels", self.levels, "a list of at least one level")
        all_others = self.kind in ("highest", "lowest")
        allowed = f"empty: {self.kind} is against all other levels" if all_others else "a list of at least one level"
        require(all_others != bool(self.than), f"{key}.than", self.than, allowed)
        both = [level for level in self.levels if level in self.than]
        require(not both, f"{key}.than", self.than, f"without {both}, which levels has too")
        equivalent = self.kind == "equivalent"
        allowed = "given, such as 1%" if equivalent else "left out: only kind=equivalent has one"
        require(equivalent == (self.margin is not None), f"{key}.margin", self.margin, allowed)
        sized = self.kind in ("higher", "lower") and len(self.size) == 2
        require(sized or not self.size, f"{key}.size", self.size, "two amounts, and kind higher or lower")
        amounts = [absolute(amount, 1.0) for amount in ([self.margin] if equivalent else self.size)]
        ok = all(amount > 0 for amount in amounts) and amounts == sorted(amounts)
        require(ok, f"{key}.{'margin' if equivalent else 'size'}", self.margin or self.size, "positive and rising")


def absolute(amount: Any, reference: float) -> float:
    """An amount in units of a metric: a number is one, "5%" is that share of `reference`, taken as positive."""
    share = isinstance(amount, str) and amount.endswith("%")
    try:
        value = float(amount[:-1] if share else amount)
    except (TypeError, ValueError):
        value = float("nan")
    require(finite(value), "amount", amount, "a finite number, or a text such as 5%")
    return value / 100 * abs(reference) if share else value
