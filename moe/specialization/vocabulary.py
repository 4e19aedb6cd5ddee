"""Which tokens an expert takes (TF-IDF keywords, with their text around them)."""

from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfTransformer
from transformers import PreTrainedTokenizerFast

from moe.specialization.information import counts
from moe.specialization.observation import Observation

KEYWORDS, LEAST = 10, 3  # an expert; occurrences that make a keyword
CONTEXTS, AROUND = 3, 8  # snippets an expert; tokens on either side


def keywords(seen: Observation, tokenizer: PreTrainedTokenizerFast) -> list[list[dict[str, Any]]]:
    """By layer and expert: the tokens of largest TF-IDF, the expert's tokens being its document, and contexts.

    Term frequencies are logarithmic (1 + ln tf) so that the commonest words of the language do not fill every list.
    share: of the token's occurrences, those that went to this expert; chance is the expert's share of all tokens.
    contexts: text around the occurrence with the largest gate weight of each of the first keywords, cut in three.
    """
    ids = seen.ids.ravel()
    vocabulary, labels = np.unique(ids, return_inverse=True)
    occurrences = np.bincount(labels)
    words = [tokenizer.decode([int(token)]) for token in vocabulary]
    layers = []
    for chosen, weight in zip(seen.chosen, seen.weight, strict=True):
        table = counts(labels, chosen.astype(float), size=len(vocabulary)).T
        scores = TfidfTransformer(sublinear_tf=True).fit_transform(table).toarray() * (table >= LEAST)
        experts = []
        for expert, (row, count) in enumerate(zip(scores, table, strict=True)):
            best = [place for place in np.argsort(-row, kind="stable")[:KEYWORDS] if row[place] > 0]
            entries = [
                {"token": words[p], "tfidf": row[p], "count": int(count[p]), "share": count[p] / occurrences[p]}
                for p in best
            ]
            taken = np.where(chosen[:, expert], weight[:, expert], -np.inf)
            places = [int(np.argmax(np.where(labels == p, taken, -np.inf))) for p in best[:CONTEXTS]]
            experts.append({"keywords": entries, "contexts": [_context(seen.ids, p, tokenizer) for p in places]})
        layers.append(experts)
    return layers


def _context(ids: np.ndarray, place: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Text before a token, the token, text after, all of its own block."""
    block, position = divmod(place, ids.shape[1])
    row = ids[block].tolist()
    cuts = row[max(0, position - AROUND) : position], [row[position]], row[position + 1 : position + 1 + AROUND]
    return [str(tokenizer.decode(cut)) for cut in cuts]
