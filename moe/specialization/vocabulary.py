"""Find the tokens that are typical of each expert (keywords by TF-IDF), with the text around them."""

from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfTransformer
from transformers import PreTrainedTokenizerFast

from moe.specialization.information import sum_by_label
from moe.specialization.observation import Observation

KEYWORDS_PER_EXPERT, CONTEXTS_PER_EXPERT = 10, 3
MIN_TOKENS = 3  # An expert took each of its keywords at least this many times.
TOKENS_AROUND = 8  # Tokens of context on either side.


def keywords(observed: Observation, tokenizer: PreTrainedTokenizerFast) -> list[list[dict[str, Any]]]:
    """Return, by layer and expert, the tokens with the largest TF-IDF and text in which they occur.

    For TF-IDF, all tokens that an expert took are one document. Term frequencies are logarithmic (1 + ln tf), so that
    the most common words of the language do not fill every list.

    share: the share of the token's occurrences that this expert took. By chance it equals the expert's share of all
        tokens.
    contexts: text before, at and after the occurrence with the largest gate weight, for each of the first keywords.
    """
    ids = observed.ids.ravel()
    vocabulary, labels = np.unique(ids, return_inverse=True)
    occurrences = np.bincount(labels)
    words = [tokenizer.decode([int(token)]) for token in vocabulary]
    layers = []
    for chosen, weight in zip(observed.chosen, observed.weight, strict=True):
        table = sum_by_label(labels, chosen.astype(float), size=len(vocabulary)).T
        scores = TfidfTransformer(sublinear_tf=True).fit_transform(table).toarray() * (table >= MIN_TOKENS)
        experts = []
        for expert, (row, count) in enumerate(zip(scores, table, strict=True)):
            best = [word for word in np.argsort(-row, kind="stable")[:KEYWORDS_PER_EXPERT] if row[word] > 0]
            entries = [
                {"token": words[w], "tfidf": row[w], "count": int(count[w]), "share": count[w] / occurrences[w]}
                for w in best
            ]
            taken = np.where(chosen[:, expert], weight[:, expert], -np.inf)
            tokens = [int(np.argmax(np.where(labels == w, taken, -np.inf))) for w in best[:CONTEXTS_PER_EXPERT]]
            experts.append(
                {"keywords": entries, "contexts": [_context(observed.ids, token, tokenizer) for token in tokens]}
            )
        layers.append(experts)
    return layers


def _context(ids: np.ndarray, token: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the text before a token, the token, and the text after it, all from its own block."""
    block, position = divmod(token, ids.shape[1])
    row = ids[block].tolist()
    before, after = row[max(0, position - TOKENS_AROUND) : position], row[position + 1 : position + 1 + TOKENS_AROUND]
    return [str(tokenizer.decode(part)) for part in (before, [row[position]], after)]
