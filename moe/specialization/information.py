"""Measure how much a token's domain, id and position tell about its experts, and how much of that is chance.

Each of a token's k experts gets a share of 1/k. Even if the label of a token determines its k experts, the entropy of
these shares is ln k. No label can explain this part of the entropy, the mean of ln k over tokens. Information is
therefore compared with the remaining entropy. In this way every deterministic function of the label (for example hash
routing of the token id) scores 1 for every k.
"""

from collections import Counter
from math import factorial, prod
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.special import entr
from sklearn.metrics import adjusted_mutual_info_score

from moe.metrics.formulas import Sums, experts_per_assignment
from moe.routing.axes import DECILES

MIN_OCCURRENCES = 10  # Token ids with fewer occurrences are left out, as in OLMoE (2409.02060).
PERMUTATIONS = 999
TINY = 1e-12  # Nats below this are rounding errors.


def expert_shares(chosen: Bool[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N E"]:
    """Return 1/k for each of a token's k experts, and zeros for a token without experts."""
    return chosen / chosen.sum(-1, keepdims=True).clip(min=1)


def sum_by_label(labels: Int[np.ndarray, " N"], values: np.ndarray, *, size: int) -> Float[np.ndarray, "size E"]:
    """Return the sums of `values` (N, E) over the tokens of each label 0 ... size-1."""
    tokens = len(labels)
    return sparse.csr_array((np.ones(tokens), (labels, np.arange(tokens))), shape=(size, tokens)) @ values


def conditional_probabilities(table: Float[np.ndarray, "*L V E"]) -> Float[np.ndarray, "*L V E"]:
    """Return P(expert | label) from a table of counts; NaN for a label if no expert took any of its tokens."""
    total = table.sum(-1, keepdims=True)
    return np.divide(table, total, out=np.full(table.shape, np.nan), where=total > 0)


def information_from_counts(table: Float[np.ndarray, "*P V E"]) -> Float[np.ndarray, "*P"]:
    """Return the plug-in estimate of the mutual information of the last two axes, in nats."""
    total = table.sum((-2, -1))
    joint = table / total[..., None, None]
    return np.asarray(entr(joint.sum(-1)).sum(-1) + entr(joint.sum(-2)).sum(-1) - entr(joint).sum((-2, -1)))


def expert_set_labels(chosen: Bool[np.ndarray, "N E"]) -> Int[np.ndarray, " N"]:
    """Return a number for each distinct set of experts. For k > 1 these sets are the clusters of tokens."""
    return np.unique(np.packbits(chosen, axis=-1), axis=0, return_inverse=True)[1].ravel()


def domain_dependence(
    chosen: Bool[np.ndarray, "N E"],
    domain: Int[np.ndarray, " B"],
    document: Int[np.ndarray, " B"],
    *,
    rng: np.random.Generator,
) -> dict[str, Any] | None:
    """Return I(domain; expert) / sqrt(H(domain) (H(expert) - mean ln k)) and its permutation null.

    The null shuffles domains over whole documents, because the blocks of a document have much in common beyond their
    domain. Compared with shuffled blocks or tokens, or with the analytic bias (D-1)(E-1)/2N, routing by topic would
    look like routing by domain. (The bias is returned too.) Every document counts once, whatever its length. The
    documents of different domains differ in length, and a shuffle would remove that difference: totals over tokens
    would then differ from shuffled totals even without any dependence.

    `adjusted` is 1 for routing by domain, and 0 on average for routing that does not depend on the domain. `smallest_p`
    is the smallest p that the numbers of documents allow (see `smallest_p`). `ami` is scikit-learn's adjusted mutual
    information of the sets of experts; there each token counts once, and chance means independent tokens.
    Returns None if all blocks are of one domain.
    """
    tokens, routed = len(chosen) // len(domain), chosen.any(-1)
    chosen = chosen[routed]
    present, by_token = np.unique(np.repeat(domain, tokens)[routed], return_inverse=True)
    if len(present) < 2:
        return None
    _, document_of_token, length = np.unique(
        np.repeat(document, tokens)[routed], return_inverse=True, return_counts=True
    )
    weight = 1 / length[document_of_token]
    profile = sum_by_label(document_of_token, expert_shares(chosen) * weight[:, None], size=len(length))
    label = np.zeros_like(length)
    label[document_of_token] = by_token
    one_hot = np.eye(len(present))
    permuted = np.stack([one_hot[rng.permutation(label)] for _ in range(PERMUTATIONS)])  # (P, documents, D)
    null = information_from_counts(np.swapaxes(permuted, 1, 2) @ profile)
    table = one_hot[label].T @ profile
    ceiling = float(np.sqrt(entr(table.sum(-1) / len(length)).sum() * _explainable_entropy(chosen, weight)))
    effective = weight.sum() ** 2 / (weight**2).sum()  # Kish's effective number of tokens, as if weights were equal.
    return _compare_with_null(float(information_from_counts(table)), ceiling, null) | {
        "smallest_p": smallest_p(label),
        "documents": len(length),
        "bias": (len(present) - 1) * (np.count_nonzero(table.sum(0)) - 1) / (2 * effective),
        "ami": adjusted_mutual_info_score(by_token, expert_set_labels(chosen)),
    }


def smallest_p(labels: Int[np.ndarray, " N"]) -> float:
    """Return the smallest p that a permutation test over units with these labels can give, whatever is observed.

    It is the share of all labelings that divide the units into the same groups, and at least 1 / (`PERMUTATIONS` + 1).
    Labels with equally many units may exchange their names. Examples: 1 if each unit has its own label, 1/35 for two
    labels of 4 units each. Where the share is larger than 1 / (`PERMUTATIONS` + 1), the p of random permutations varies
    around it.
    """
    sizes = Counter(labels.tolist()).values()
    labelings = factorial(len(labels)) // prod(factorial(size) for size in sizes)
    same_groups = prod(factorial(number) for number in Counter(sizes).values())
    return max(same_groups / labelings, 1 / (PERMUTATIONS + 1))


def vocabulary_dependence(
    chosen: Bool[np.ndarray, "N E"], labels: Int[np.ndarray, " N"], *, rng: np.random.Generator, permutations: int = 99
) -> dict[str, Any] | None:
    """Return two measures of how far a token's id determines its experts, over ids with `MIN_OCCURRENCES` or more.

    id: I(id; expert) / (H(expert) - mean ln k).
    specialization: the largest share of an id's tokens that one expert took, mean over ids (OLMoE 2409.02060).

    The null of both shuffles the tokens of those ids across documents. If routing depends on the document, ids that
    occur mostly in some documents therefore look informative. Tokens with a label below 0 are left out. Returns None if
    no id is frequent enough.
    """
    frequent, occurrences = np.unique(labels[(labels >= 0) & chosen.any(-1)], return_counts=True)
    frequent = frequent[occurrences >= MIN_OCCURRENCES]
    if len(frequent) == 0:
        return None
    included = np.isin(labels, frequent) & chosen.any(-1)
    label, chosen = np.searchsorted(frequent, labels[included]), chosen[included]
    size = len(frequent)
    shuffled = [rng.permutation(label) for _ in range(permutations)]
    share = expert_shares(chosen)

    def information(order: Int[np.ndarray, " N"]) -> float:
        return float(information_from_counts(sum_by_label(order, share, size=size)))

    def largest_share(order: Int[np.ndarray, " N"]) -> float:
        table = sum_by_label(order, chosen.astype(float), size=size)
        return float((table.max(-1) / np.bincount(order, minlength=size)).mean())

    ceiling = _explainable_entropy(chosen, np.ones(len(label)))
    return {
        "ids": size,
        "tokens": len(label),
        "id": _compare_with_null(information(label), ceiling, np.array([information(order) for order in shuffled])),
        "specialization": _compare_with_null(
            largest_share(label), 1.0, np.array([largest_share(order) for order in shuffled])
        ),
    }


def coactivation(chosen: Bool[np.ndarray, "N E"]) -> Float[np.ndarray, "E E"]:
    """Return the share of the row expert's tokens that also took the column expert.

    The diagonal and the rows of unused experts are NaN.
    """
    both = chosen.T.astype(float) @ chosen
    table = np.divide(both, np.diag(both)[:, None], out=np.full_like(both, np.nan), where=np.diag(both)[:, None] > 0)
    np.fill_diagonal(table, np.nan)
    return table


def coactivation_chance(chosen: Bool[np.ndarray, "N E"]) -> float:
    """Return the mean of `coactivation` if each token took as many experts as it did, at random.

    This is (K' - 1) / (E - 1), see `experts_per_assignment`. NaN if no token takes an expert.
    """
    experts = chosen.shape[-1]
    tokens_by_active = np.bincount(chosen.sum(-1), minlength=experts + 1)
    with np.errstate(invalid="ignore"):
        [others] = experts_per_assignment(Sums({"tokens_by_active": tokens_by_active[None]})) - 1
    return float(others / max(1, experts - 1))


def probabilities_by_position(chosen: Bool[np.ndarray, "N E"], seq_len: int) -> Float[np.ndarray, "P E"]:
    """Return P(expert | decile of the position in the sequence)."""
    deciles = np.arange(len(chosen)) % seq_len * DECILES // seq_len
    return conditional_probabilities(sum_by_label(deciles, expert_shares(chosen), size=DECILES))


def _explainable_entropy(chosen: Bool[np.ndarray, "N E"], weight: Float[np.ndarray, " N"]) -> float:
    """Return H(expert) - mean ln k of tokens with an expert: the most nats that a label can tell about experts."""
    share = expert_shares(chosen)
    ceiling = entr(np.average(share, axis=0, weights=weight)).sum() - np.average(entr(share).sum(-1), weights=weight)
    return float(ceiling) if ceiling > TINY else 0.0


def _compare_with_null(observed: float, ceiling: float, null: Float[np.ndarray, " P"]) -> dict[str, float]:
    """Compare an observed statistic with its null. `ceiling` is the largest value that the statistic can take.

    `normalized`, `null` and `null_high` are shares of the ceiling. `adjusted` is 0 for chance and 1 for the ceiling. If
    there is nothing to explain (ceiling 0: all tokens have the same experts), the shares are 0. If chance explains
    everything, `adjusted` is NaN.
    """
    mean, std = null.mean(), null.std(ddof=1)
    beyond_chance = ceiling - mean
    return {
        "observed": observed,
        "normalized": observed / ceiling if ceiling else 0.0,
        "null": mean / ceiling if ceiling else 0.0,
        "null_high": np.quantile(null, 0.975) / ceiling if ceiling else 0.0,
        "adjusted": (observed - mean) / beyond_chance if beyond_chance > TINY else np.nan if ceiling else 0.0,
        "z": (observed - mean) / std if std > TINY else np.nan,
        "p": (1 + np.sum(null >= observed - TINY)) / (1 + len(null)),
    }
