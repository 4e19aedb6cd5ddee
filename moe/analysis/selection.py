"""How much of the lead of a chosen setting is luck: the best of several equal settings leads too."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.integrate import quad
from scipy.special import gammaln
from scipy.stats import norm


class Lead(NamedTuple):
    """By how much the setting with the lowest mean lies below the mean of all settings.

    chosen: on the values by which it was chosen. luck: what `chosen` would be on average if all settings were equal.
    judged: what is left on other seeds and on the judging values. Each seed is left out once: the others choose, and it
    judges. The mean of this over repeated experiments is not raised by the choice.
    """

    chosen: float
    luck: float
    judged: float


def first_alike(results: Sequence[Mapping[int, bytes]]) -> list[int]:
    """Return for each setting the place of the first one with the same results, which may be its own.

    results: of each setting, seed -> the numbers of its run, to the last bit. Two settings are the same if all seeds
    that both have, two at least, have equal numbers.
    """
    places: list[int] = []
    having: dict[tuple[int, bytes], list[int]] = {}
    for place, setting in enumerate(results):
        equal = Counter(other for run in setting.items() for other in having.get(run, []))
        alike = (o for o, seeds in equal.items() if seeds >= 2 and seeds == len(setting.keys() & results[o].keys()))
        first = min(alike, default=place)
        places.append(place if first == place else places[first])
        for run in setting.items():
            having.setdefault(run, []).append(place)
    return places


def lead(choosing: Float[np.ndarray, "M N"], judging: Float[np.ndarray, "M N"]) -> Lead:
    """Return the lead of the best of M settings, given a value of each for N seeds; lower is better.

    choosing: such as the validation loss. judging: such as the test loss of the same runs. `luck` supposes normal
    deviations of one size, and common effects of the seeds. It needs two settings and two seeds.
    """
    settings, seeds = choosing.shape
    means = choosing.mean(1)
    others = [np.delete(choosing, seed, axis=1).mean(1).argmin() for seed in range(seeds)]
    judged = [judging[:, seed].mean() - judging[best, seed] for seed, best in enumerate(others)]
    deviations = choosing - means[:, None] - choosing.mean(0) + choosing.mean()
    freedom = (settings - 1) * (seeds - 1)
    spread = math.sqrt((deviations**2).sum() / freedom) / c4(freedom)
    return Lead(
        chosen=float(means.mean() - means.min()),
        luck=expected_largest(settings) * spread / math.sqrt(seeds),
        judged=float(np.mean(judged)),
    )


def c4(freedom: int) -> float:
    """Return the mean of the square root of a variance with so many degrees of freedom, if the true variance is 1.

    It is sqrt(2 / f) Gamma((f + 1) / 2) / Gamma(f / 2), the constant c4 of control charts. The normal law is supposed.
    """
    return math.sqrt(2 / freedom) * math.exp(gammaln((freedom + 1) / 2) - gammaln(freedom / 2))


@cache
def expected_largest(number: int) -> float:
    """Return the mean of the largest of so many independent numbers with a standard normal distribution."""
    return float(quad(lambda x: number * x * norm.pdf(x) * norm.cdf(x) ** (number - 1), -10, 10)[0])
