"""The smallest difference that matters: `effect` of `moe plan`, which its command records as `planned_effect`."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moe.checks import require, unknown
from moe.config.claim import amount_of

UNIT = "sd"  # of an effect in standard deviations of the paired differences
ALLOWED = "an amount > 0: a share of the mean such as 0.5%, units of the metric, or 1.5sd"
LONGEST = 300  # characters of all effects together


class Effect(NamedTuple):
    """The smallest difference that matters: in units of the metric or, as text such as "0.5%", a share of its mean.

    "1.5sd" is in standard deviations of the paired differences.
    """

    text: str

    @classmethod
    def read(cls, key: str, text: str) -> "Effect":
        """Return an effect. Raises ConfigError, naming the key, unless it is a positive amount."""
        require(_is_amount(text), key, text, ALLOWED)
        return cls(text)

    def in_units(self, mean: float, spread: float) -> float:
        """Return the effect in units of the metric, or of the spread if that is not known in units of the metric."""
        if self.text.endswith(UNIT):
            return float(self.text.removesuffix(UNIT)) * spread
        return amount_of(self.text if self.text.endswith("%") else float(self.text)).at(mean)


def effects_as_text(effect: Effect, effects: Mapping[str, Effect]) -> str:
    """Return an effect, and those on single metrics, as one text: "0.5%, but 0.02 for test/loss and 10% for val/loss".

    effects: metric -> the effect on it.
    """
    others = " and ".join(f"{each.text} for {metric}" for metric, each in effects.items())
    return effect.text + (f", but {others}" if others else "")


def read_effects(text: str) -> tuple[Effect, dict[str, Effect]] | None:
    """Return the effects of which `effects_as_text` made a text; None if it has another form."""
    first, _, rest = text.partition(", but ")
    others = {metric: size for size, _, metric in (part.partition(" for ") for part in re.split(", | and ", rest))}
    sizes = [first, *(others.values() if rest else ())]
    if len(text) > LONGEST or not text.isprintable() or not all(map(_is_amount, sizes)):
        return None
    return Effect(first), {metric: Effect(size) for metric, size in others.items() if rest}


def check_effects(key: str, text: str, metrics: Iterable[str]) -> None:
    """Raise ConfigError, naming the key, unless a text is one of effects. metrics: those of the claims, if any."""
    effects, known = read_effects(text), set(metrics)
    require(effects is not None, key, text, f"{ALLOWED}; or 0.5%, but 10% for METRIC; or null")
    for metric in effects[1] if effects and known else ():
        if metric not in known:
            raise unknown(f"metric of {key}", metric, known)


def _is_amount(text: str) -> bool:
    try:
        size = float(text.removesuffix(UNIT).removesuffix("%").replace("_", "no number"))
    except ValueError:
        return False
    return size > 0 and math.isfinite(size) and not text.endswith(f"%{UNIT}")
