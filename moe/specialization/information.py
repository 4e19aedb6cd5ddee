"""How much the choice of experts says about domain, token and position, and how much of that is chance.

Each of a token's k experts gets 1/k of it. The entropy of experts then has a part that no label can
explain, mean ln k, because a token has k of them; information is judged against the rest, so that every deterministic
function of the label (hash routing of the token id, say) scores 1 for every k.
"""

from collections import Counter
from math import factorial, prod
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.special import entr
from sklearn.metrics import adjusted_mutual_info_score

DECILES = 10
MIN_OCCURRENCES = 10  # of a token id, as in OLMoE (2409.02060)
PERMUTATIONS = 999
TINY = 1e-12  # nats that are rounding


def shares(chosen: Bool[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N E"]:
    """1/k for each of a token's k experts; zeros for a token without any."""
    return chosen / chosen.sum(-1, keepdims=True).clip(min=1)


def counts(labels: Int[np.ndarray, "N"], values: np.ndarray, *, size: int) -> Float[np.ndarray, "size E"]:
    """Sums of `values` (N, E) over the tokens of each label 0 ... size-1."""
    tokens = len(labels)
    return sparse.csr_array((np.ones(tokens), (labels, np.arange(tokens))), shape=(size, tokens)) @ values


def given(table: Float[np.ndarray, "*L V E"]) -> Float[np.ndarray, "*L V E"]:
    """P(expert | label) from counts; NaN for a label that no expert took a token of."""
    total = table.sum(-1, keepdims=True)
    return np.divide(table, total, out=np.full(table.shape, np.nan), where=total > 0)


def mutual_information(table: Float[np.ndarray, "*P V E"]) -> Float[np.ndarray, "*P"]:
    """Plug-in mutual information of the two last axes, nats."""
    total = table.sum((-2, -1))
    joint = table / total[..., None, None]
    return np.asarray(entr(joint.sum(-1)).sum(-1) + entr(joint.sum(-2)).sum(-1) - entr(joint).sum((-2, -1)))


def set_labels(chosen: Bool[np.ndarray, "N E"]) -> Int[np.ndarray, "N"]:
    """A number for each distinct set of experts: the clusters of tokens when k > 1."""
    return np.unique(np.packbits(chosen, axis=-1), axis=0, return_inverse=True)[1].ravel()


def domain_dependence(
    chosen: Bool[np.ndarray, "N E"],
    domain: Int[np.ndarray, "B"],
    document: Int[np.ndarray, "B"],
    *,
    rng: np.random.Generator,
) -> dict[str, Any] | None:
    """I(domain; expert) / sqrt(H(domain) (H(expert) - mean ln k)), against domains shuffled over documents.

    Whole documents are shuffled because what a document's blocks share beyond their domain is much: against shuffled
    blocks or tokens, or the analytic bias (D-1)(E-1)/2N that is given too, routing by topic would look like routing by
    domain. Here a document counts once, however long: domains differ in how long their documents are, which a
    shuffle would undo, so that totals over tokens would differ from shuffled ones without any dependence.

    `adjusted` is 1 for routing by domain and 0 on average for routing that is blind to it; `p_least` is the smallest p
    that the numbers of documents allow (`least_p`); `ami` is scikit-learn's, of the sets of experts, where a token
    counts once and chance is that of independent tokens. None if all blocks are of one domain.
    """
    tokens, routed = len(chosen) // len(domain), chosen.any(-1)
    chosen = chosen[routed]
    present, by_token = np.unique(np.repeat(domain, tokens)[routed], return_inverse=True)
    if len(present) < 2:
        return None
    _, unit, length = np.unique(np.repeat(document, tokens)[routed], return_inverse=True, return_counts=True)
    weight = 1 / length[unit]
    profile = counts(unit, shares(chosen) * weight[:, None], size=len(length))
    label = np.zeros_like(length)
    label[unit] = by_token
    one_hot = np.eye(len(present))
    permuted = np.stack([one_hot[rng.permutation(label)] for _ in range(PERMUTATIONS)])  # (P, documents, D)
    null = mutual_information(np.swapaxes(permuted, 1, 2) @ profile)
    table = one_hot[label].T @ profile
    ceiling = float(np.sqrt(entr(table.sum(-1) / len(length)).sum() * _explicable(chosen, weight)))
    effective = weight.sum() ** 2 / (weight**2).sum()  # Kish: as many tokens of equal weight would vary as much
    return _against(float(mutual_information(table)), ceiling, null) | {
        "p_least": least_p(label),
        "documents": len(length),
        "bias": (len(present) - 1) * (np.count_nonzero(table.sum(0)) - 1) / (2 * effective),
        "ami": adjusted_mutual_info_score(by_token, set_labels(chosen)),
    }


def least_p(labels: Int[np.ndarray, "N"]) -> float:
    """The smallest p of a permutation test over units with these labels, whatever is observed.

    It is the share of all labelings that part the units just so (labels of equally many units may trade names), at
    least 1 / (`PERMUTATIONS` + 1): 1 if each unit has its own label, 1/35 for 4 + 4 of them. Where the share is the
    larger, p, from random labelings, scatters around it.
    """
    sizes = Counter(labels.tolist()).values()
    ways = factorial(len(labels)) // prod(factorial(size) for size in sizes)
    alike = prod(factorial(number) for number in Counter(sizes).values())
    return max(alike / ways, 1 / (PERMUTATIONS + 1))


def vocabulary_dependence(
    chosen: Bool[np.ndarray, "N E"], labels: Int[np.ndarray, "N"], *, rng: np.random.Generator, permutations: int = 99
) -> dict[str, Any] | None:
    """Two measures of how far a token id fixes its experts, over ids with `MIN_OCCURRENCES` or more.

    id: I(id; expert) / (H(expert) - mean ln k). specialization: mean over ids of the largest share of an id's tokens
    that one expert took (OLMoE 2409.02060); both against tokens shuffled among those ids, across documents: ids that
    some documents prefer look informative where routing goes by document. Labels below 0 are no ids.
    None if no id is frequent enough.
    """
    frequent, occurrences = np.unique(labels[(labels >= 0) & chosen.any(-1)], return_counts=True)
    frequent = frequent[occurrences >= MIN_OCCURRENCES]
    if len(frequent) == 0:
        return None
    kept = np.isin(labels, frequent) & chosen.any(-1)
    label, chosen = np.searchsorted(frequent, labels[kept]), chosen[kept]
    size = len(frequent)
    shuffled = [rng.permutation(label) for _ in range(permutations)]
    share = shares(chosen)

    def informed(order: Int[np.ndarray, "N"]) -> float:
        return float(mutual_information(counts(order, share, size=size)))

    def specialized(order: Int[np.ndarray, "N"]) -> float:
        table = counts(order, chosen.astype(float), size=size)
        return float((table.max(-1) / np.bincount(order, minlength=size)).mean())

    return {
        "ids": size,
        "tokens": len(label),
        "id": _against(
            informed(label), _explicable(chosen, np.ones(len(label))), np.array([informed(order) for order in shuffled])
        ),
        "specialization": _against(specialized(label), 1.0, np.array([specialized(order) for order in shuffled])),
    }


def coactivation(chosen: Bool[np.ndarray, "N E"]) -> Float[np.ndarray, "E E"]:
    """Share of row's tokens that took column's expert too, over all pairs; NaN on the diagonal and for unused rows."""
    both = chosen.T.astype(float) @ chosen
    table = np.divide(both, np.diag(both)[:, None], out=np.full_like(both, np.nan), where=np.diag(both)[:, None] > 0)
    np.fill_diagonal(table, np.nan)
    return table


def by_position(chosen: Bool[np.ndarray, "N E"], seq_len: int) -> Float[np.ndarray, "P E"]:
    """P(expert | decile of the position in the sequence)."""
    deciles = np.arange(len(chosen)) % seq_len * DECILES // seq_len
    return given(counts(deciles, shares(chosen), size=DECILES))


def _explicable(chosen: Bool[np.ndarray, "N E"], weight: Float[np.ndarray, "N"]) -> float:
    """H(expert) - mean ln k of tokens with an expert: the most that any label can say about experts, nats."""
    share = shares(chosen)
    ceiling = entr(np.average(share, axis=0, weights=weight)).sum() - np.average(entr(share).sum(-1), weights=weight)
    return float(ceiling) if ceiling > TINY else 0.0


def _against(observed: float, ceiling: float, null: Float[np.ndarray, "P"]) -> dict[str, float]:
    """A statistic, and the same as shares of its ceiling: raw, its null, and adjusted so that chance is 0.

    Where there is nothing to explain (ceiling 0: one set of experts for all tokens) the shares are 0; where chance
    explains it all, what is beyond chance is NaN.
    """
    mean, std = null.mean(), null.std(ddof=1)
    room = ceiling - mean
    return {
        "observed": observed,
        "normalized": observed / ceiling if ceiling else 0.0,
        "null": mean / ceiling if ceiling else 0.0,
        "null_high": np.quantile(null, 0.975) / ceiling if ceiling else 0.0,
        "adjusted": (observed - mean) / room if room > TINY else np.nan if ceiling else 0.0,
        "z": (observed - mean) / std if std > TINY else np.nan,
        "p": (1 + np.sum(null >= observed - TINY)) / (1 + len(null)),
    }
