"""How well the experts that tokens ask for agree with the domains of their text.

The functions take the counts (L, N, E): how many assignments to each of E experts the tokens of each of N domains ask
for, by layer. An expert is taken as a cluster of its assignments, and a domain as a class.

Two domains of equal size, and experts of which each has tokens of one domain alone:

>>> purity(np.array([[[4.0, 0.0], [0.0, 4.0]]])), domain_information(np.array([[[4.0, 0.0], [0.0, 4.0]]]))
(array([1.]), array([1.]))

Where one domain leads in both experts, the purity is that of chance, although the experts differ:

>>> counts = np.array([[[5.0, 3.0], [0.0, 2.0]]])
>>> purity(counts), purity_chance(counts), domain_information(counts).round(3)
(array([0.8]), array([0.8]), array([0.328]))
"""

import math

import numpy as np
from jaxtyping import Float

from moe.metrics.agreement import by_layer
from moe.metrics.formulas import Layers, entropy_of

Counts = Float[np.ndarray, "L N E"]


def purity(counts: Counts) -> Layers:
    """Return the share of the assignments that belong to the leading domain of their expert.

    This is the purity of clusters (Manning, Raghavan and Schütze 2008, section 16.3). NaN as in `domain_agreement`.
    """
    return counts.max(1).sum(-1) / _known(counts)


def purity_chance(counts: Counts) -> Layers:
    """Return the purity if experts did not depend on the domain: the share of the largest domain."""
    return counts.sum(-1).max(-1) / _known(counts)


def domain_information(counts: Counts) -> Layers:
    """Return I(expert; domain) / H(domain): 0 if the expert says nothing about the domain, 1 if it determines it.

    This is the homogeneity of clusters (Rosenberg and Hirschberg 2007), at its plug-in estimate.
    """
    joint = counts / _known(counts)[:, None, None]
    domain = entropy_of(joint.sum(2))
    told = domain + entropy_of(joint.sum(1)) - entropy_of(joint.reshape(len(joint), -1))
    return np.maximum(told, 0) / domain  # rounding may make it negative


def domain_agreement(counts: Counts) -> dict[str, float | None]:
    """Return the three metrics of the counts, means over layers and by layer.

    A value is None where a layer has no assignments or processes slots (NaN), or if the tokens are of one domain.
    """
    found = (by_layer(f"routing/{each.__name__}", each(counts)) for each in (purity, purity_chance, domain_information))
    return {name: value for values in found for name, value in values.items()}


def _known(counts: Counts) -> Layers:
    """Return the number of assignments of each layer, and NaN where they are of fewer than two domains."""
    return np.where((counts.sum(-1) > 0).sum(-1) > 1, counts.sum((1, 2)), math.nan)
