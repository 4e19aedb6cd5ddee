"""Planned claims: what an experiment is expected to show. `moe.analysis.claims` judges them after it ran."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from omegaconf import MISSING

from moe.checks import finite, one_of, require, unknown

OURS = "our own"  # start of `source` for claims that this project adds to those of a published study
DOMAIN = "domain"  # name in `within` for the domains of the text, which are levels within each run
KINDS = ("higher", "lower", "highest", "lowest", "equivalent", "interaction", "mixed")
COSTS = ("flops", "seconds")  # of training, at which a claim can compare


@dataclass
class ClaimConfig:
    """A claim that the `levels` of a `factor` change a `metric` in the way that `kind` says.

    Kinds: "higher" and "lower" compare each of `levels` with each level in `than`. "highest" and "lowest" compare them
    with all other levels. "equivalent": the difference from `than` is smaller than `margin`. `size` is the range of the
    claimed rise or fall. `margin` and `size` are in units of the metric, or a text such as 5%, which is a share of the
    mean at the level compared with.

    within: other factors, each with those of its levels that the claim is about; by default all levels. "interaction"
    compares how much the difference between `levels` and `than` changes from the first to the second level in `within`
    (a difference of differences). The change is `direction` (higher or lower) than zero; without a direction it is not
    zero; with a `margin` it is closer to zero than that. The key `domain` in `within` names domains of the text.

    "mixed" compares as "higher" or "lower" do, as `direction` says, or with a `margin` as "equivalent" does, but in a
    model of all runs of the sweep at the levels in `within`. Where runs are missing, the runs at other levels of
    `factor` tell how the seeds differ, so that also levels without a common seed are compared. With all runs it is the
    same test.

    at: "flops" or "seconds": compare the metric at the largest training cost that both sides of a comparison have
    reached, interpolated between two evaluations, not at the end. At each combination of levels of the other factors,
    such as each number of steps, that is a cost of its own. Seconds are as measured, so the machine should be idle.
    """

    text: str = MISSING
    metric: str = MISSING
    factor: str = MISSING
    levels: list[Any] = MISSING
    kind: str = MISSING
    source: str = OURS
    than: list[Any] = field(default_factory=list)
    within: dict[str, Any] = field(default_factory=dict)
    direction: str | None = None
    margin: Any = None
    size: list[Any] = field(default_factory=list)
    at: str | None = None

    @property
    def compared_levels(self) -> dict[str, list[Any]]:
        """The levels that the claim names, by factor, without the domains of the text."""
        named = {self.factor: [*self.levels, *self.than]}
        return named | {factor: levels for factor, levels in self.within.items() if factor != DOMAIN}

    @property
    def moderator(self) -> str:
        """The factor of `within` from whose first level to whose second level an interaction is compared."""
        return next(factor for factor, levels in self.within.items() if len(levels) > 1)

    def check(self, key: str, factors: list[str] | None = None) -> None:
        """Raise ConfigError, naming the key, for a wrong value; also for another factor than `factors`, if given.

        `moe.launch.claims` checks metric and levels, which depend on the runs.
        """
        one_of(f"{key}.kind", self.kind, KINDS)
        one_of(f"{key}.metric", self.metric.split("/")[0], ("val", "test", "val_capacity", "routing", "train", "time"))
        if self.at is not None:
            one_of(f"{key}.at", self.at, COSTS)
        for place, text in (("text", self.text), ("source", self.source)):
            require(bool(text.strip()), f"{key}.{place}", text, "not empty")
        for factor in (self.factor, *self.within):
            allowed = "another key: the seed is no factor, because runs of the same seed are compared"
            require(factor != "seed", f"{key}.{'factor' if factor == self.factor else 'within'}", factor, allowed)
            depends_on_cell = factor.startswith(("router.", "schedule."))  # only some cells may have such a key
            known = depends_on_cell or (factor == DOMAIN and factor in self.within)
            if factors is not None and not known and factor not in factors:
                raise unknown(f"factor of {key}", factor, factors)
        require(bool(self.levels), f"{key}.levels", self.levels, "a list of at least one level")
        self._check_within(f"{key}.within")
        all_others = self.kind in ("highest", "lowest")
        allowed = f"empty: {self.kind} compares with all other levels" if all_others else "a list of at least one level"
        require(all_others != bool(self.than), f"{key}.than", self.than, allowed)
        both = [level for level in self.levels if level in self.than]
        require(not both, f"{key}.than", self.than, f"without {both}, which are in levels too")
        equivalent, directional = self.kind == "equivalent", self.kind in ("interaction", "mixed")
        bounded = equivalent or (directional and self.margin is not None)
        allowed = "given, such as 1%" if equivalent else "left out: only equivalent, interaction, mixed have it"
        require(bounded == (self.margin is not None), f"{key}.margin", self.margin, allowed)
        directed = self.direction is None or (directional and not bounded and self.direction in ("higher", "lower"))
        directed = directed and not (self.kind == "mixed" and not bounded and self.direction is None)
        allowed = "higher or lower, with kind=interaction or kind=mixed and without a margin"
        require(directed, f"{key}.direction", self.direction, allowed)
        sized = self.kind in ("higher", "lower") and len(self.size) == 2
        require(sized or not self.size, f"{key}.size", self.size, "two amounts, with kind=higher or kind=lower")
        part = "margin" if bounded else "size"
        amounts = [amount_of(amount, key=f"{key}.{part}") for amount in ([self.margin] if bounded else self.size)]
        values = [amount.at(1.0) for amount in amounts]
        ok = all(value > 0 for value in values) and values == sorted(values)
        allowed = "positive and rising"
        if values[:1] == [0] and values[-1] > 0:
            allowed += f"; up to {self.size[1]} is two claims: {self.kind}, and equivalent with margin={self.size[1]}"
        require(ok, f"{key}.{part}", self.margin or self.size, allowed)
        in_one_unit = len({amount.share > 0 for amount in amounts}) < 2
        require(in_one_unit, f"{key}.size", self.size, "two amounts in one unit, such as [5%, 15%] or [5, 15]")

    def _check_within(self, key: str) -> None:
        for factor, levels in self.within.items():
            require(factor != self.factor, key, factor, f"another factor than {self.factor}")
            require(isinstance(levels, list) and bool(levels), f"{key}.{factor}", levels, "a list of levels")
            different = all(level not in levels[:number] for number, level in enumerate(levels))
            require(different, f"{key}.{factor}", levels, "a list of different levels")
        if self.kind == "interaction":
            numbers = sorted(len(levels) for levels in self.within.values())
            ok = numbers[-1:] == [2] and set(numbers[:-1]) <= {1}
            allowed = (
                "given for kind=interaction: two levels of one factor, such as {lb: [0.0, 0.01]}, one of any other"
            )
            require(ok, key, self.within, allowed)


class Amount(NamedTuple):
    """An amount of a metric: a constant in its units, plus a share of the absolute value of a mean."""

    constant: float
    share: float = 0.0

    def at(self, mean: float) -> float:
        """Return the amount in units of the metric. The mean plays no part without a share."""
        return self.constant + (self.share * abs(mean) if self.share else 0.0)

    def __neg__(self) -> "Amount":
        return Amount(-self.constant, -self.share)


def amount_of(amount: Any, *, key: str = "amount") -> Amount:
    """Return an amount: a number in units of a metric, or a text such as "5%"; "1%" and "1.0%" are equal.

    Raises ConfigError, naming `key`, for anything else.
    """
    share = isinstance(amount, str) and amount.endswith("%")
    try:
        value = float("nan" if isinstance(amount, bool) else amount[:-1] if share else amount)
    except (TypeError, ValueError):
        value = float("nan")
    require(finite(value), key, amount, "a finite number, or a text such as 5%")
    return Amount(0.0, value / 100) if share else Amount(value)
